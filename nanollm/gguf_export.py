"""GGUF, the one-file format of llama.cpp and ollama, written through the `gguf` package (extra "gguf").

Weights, settings, vocabulary and chat template are one file. Most tensors are renamed; three things are not:

- The architecture "llama" turns neighbours (x_2i, x_2i+1) where we turn halves (x_i, x_{i+D/2}): the rows of wq and wk go from
  0 1 2 … D-1 to 0 D/2 1 D/2+1 … in each head. qwen2 and qwen3 turn halves, as we do.
- llama3's RoPE scaling is a tensor, by how much each pair is slower.
- GPT-2's q, k and v are one matrix.
"""
import json
import math

import torch

from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.foreign_tokenizers import GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN, SMOLLM_PATTERN, hf_pattern, processor, to_hf_json
from nanollm.hf import family_of, to_hf_rope
from nanollm.variants.rope_scaling import scaled_frequencies

TOP = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
BLOCK = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output", "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
}
# llama.cpp has the regexes of known tokenizers built in and calls them by name
PRE = {GPT2_PATTERN: "gpt-2", QWEN_PATTERN: "qwen2", LLAMA3_PATTERN: "llama-bpe", SMOLLM_PATTERN: "smollm"}
NEAREST = "qwen2"


def interleaved(x, n_heads):
    """Rows 0 1 2 … D-1 of each head in the order 0 D/2 1 D/2+1 …; x (H * D, C) or (H * D,)."""
    return x.view(n_heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def to_gguf_state(state, args):
    """Our plain state dict under GGUF's names, for the architecture that family_of(args) says."""
    kind, _ = family_of(args)
    out = {}
    for key, x in state.items():
        module, _, leaf = key.rpartition(".")
        words = key.split(".", 2)
        if key == "output.weight" and args.tie_embeddings:
            continue
        if key == "layers.0.positions":
            out["position_embd.weight"] = x[0]                                            # (T, C)
            continue
        if module in TOP:
            out[f"{TOP[module]}.{leaf}"] = x
            continue
        name = module.split(".", 2)[2]
        theirs = "ffn_up" if kind == "gpt2" and name == "feed_forward.w1" else BLOCK[name]
        if kind == "llama" and name in ("attention.wq", "attention.wk"):
            x = interleaved(x, args.n_heads if name == "attention.wq" else args.n_kv_heads)
        out[f"blk.{words[1]}.{theirs}.{leaf}"] = x
    if kind == "gpt2":
        for n in range(args.n_layers):
            for leaf in ("weight", "bias"):
                out[f"blk.{n}.attn_qkv.{leaf}"] = torch.cat([out.pop(f"blk.{n}.attn_{p}.{leaf}") for p in "qkv"])
    return out


def add_vocabulary(out, tok, size):
    """The tokenizer into the writer `out`. Types of tokens: 1 text, 2 unknown, 3 control, 5 unused, 6 a byte."""
    names = {i: name for name, i in tok.control.items()}
    types = {i: 5 if name.startswith("<|reserved_") else 3 for i, name in names.items()}
    table = to_hf_json(tok)["model"]                         # refuses what has no such form
    if tok.kind == "sentencepiece":
        sp = processor(tok.raw)
        known = {i: sp.IdToPiece(i) for i in range(sp.GetPieceSize())}
        types = {i: 2 if sp.IsUnknown(i) else 6 if sp.IsByte(i) else 1 for i in known} | types
        out.add_tokenizer_model("llama")
        out.add_token_scores([sp.GetScore(i) if i in known else 0.0 for i in range(size)])
        out.add_add_space_prefix(tok.added_blank)
    else:
        known = {i: token for token, i in table["vocab"].items()}
        pre = PRE.get(tok.spec.get("pattern") or hf_pattern(json.loads(tok.raw)))
        if pre is None:
            print(f"note: llama.cpp does not know how this tokenizer cuts text and will cut as {NEAREST!r} does, the nearest that it knows", flush=True)
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(pre or NEAREST)
        out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in table["merges"]])
    known |= names
    out.add_token_list([known.get(i, f"[PAD{i}]") for i in range(size)])
    out.add_token_types([types.get(i, 1 if i in known else 5) for i in range(size)])
    out.add_eos_token_id(tok.end_id)
    out.add_eot_token_id(tok.eos_id)
    out.add_pad_token_id(tok.pad_id)
    out.add_add_bos_token(False)
    out.add_chat_template(tokenizers.chat_template(tok))


def save(model, tok, path, dtype):
    """Write `path`; matrices in dtype (torch.float32, float16 or bfloat16), vectors and positions in fp32. Raises UserError for
    what llama.cpp would compute differently and for tokenizers that it does not have."""
    try:
        import gguf
    except ImportError:
        raise UserError('this needs the gguf package: pip install -e ".[gguf]"') from None
    args = model.args
    kind, parts = family_of(args)
    if odd := sorted(parts.keys() & {"sliding_window", "moe", "geglu"}):
        raise UserError(f"GGUF: llama.cpp would not compute this model's {odd[0]} as we do; the Hugging Face layout can hold it (--out without .gguf)")
    state = to_gguf_state(model.state_dict(), args)
    path.parent.mkdir(parents=True, exist_ok=True)

    out = gguf.GGUFWriter(path, kind)
    out.add_name(path.stem)
    out.add_file_type({torch.float32: gguf.LlamaFileType.ALL_F32, torch.float16: gguf.LlamaFileType.MOSTLY_F16}.get(dtype, gguf.LlamaFileType.MOSTLY_BF16))
    out.add_vocab_size(args.vocab_size)
    out.add_context_length(args.max_seq_len)
    out.add_embedding_length(args.dim)
    out.add_block_count(args.n_layers)
    out.add_feed_forward_length(model.layers[0].feed_forward.w1.out_features)
    out.add_head_count(args.n_heads)
    out.add_head_count_kv(args.n_kv_heads)
    if kind == "gpt2":
        out.add_layer_norm_eps(args.norm_eps)
    else:
        out.add_layer_norm_rms_eps(args.norm_eps)
        out.add_key_length(args.head_dim)
        out.add_value_length(args.head_dim)
        rope = to_hf_rope(args, parts.get("rope_scaling"))
        out.add_rope_dimension_count(args.head_dim)
        out.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            out.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            out.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            out.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            out.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            out.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
            out.add_rope_scaling_yarn_attn_factor(rope["attention_factor"] / (0.1 * math.log(rope["factor"]) + 1))     # times what it computes itself
        if rope["rope_type"] == "llama3":
            plain, _ = scaled_frequencies(args.head_dim, args.rope_theta, "linear", 1.0, 0)
            scaled, _ = scaled_frequencies(args.head_dim, args.rope_theta, "llama3", rope["factor"], rope["original_max_position_embeddings"],
                                           rope["high_freq_factor"], rope["low_freq_factor"])
            state["rope_freqs.weight"] = plain / scaled                                   # (D/2,)

    add_vocabulary(out, tok, args.vocab_size)
    for name, x in state.items():
        if x.dim() == 1 or name == "position_embd.weight":
            out.add_tensor(name, x.float().contiguous().numpy())
        elif dtype == torch.bfloat16:                        # which numpy does not have: as bytes
            out.add_tensor(name, x.bfloat16().contiguous().view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            out.add_tensor(name, x.to(dtype).contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
