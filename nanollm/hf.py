"""The Hugging Face layout: what our tensors, settings and adapters are called in transformers and peft.

Our RoPE is half-split like theirs, so a conversion renames tensors and never permutes them. Only the plain LLaMA
is covered; what would silently compute something else (biases, scaled RoPE, another activation) is refused.
"""
import json
import math
from pathlib import Path

import torch

from nanollm.config import UserError
from nanollm.model import ModelArgs
from nanollm.peft import inject_lora, load_lora_state_dict, lora_config, lora_state_dict

TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK = {                                                # inside layers.N / model.layers.N
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
OUR_TOP, OUR_BLOCK = {v: k for k, v in TOP.items()}, {v: k for k, v in BLOCK.items()}


def to_hf_name(module):
    """'layers.3.attention.wq' -> 'model.layers.3.self_attn.q_proj'."""
    if module in TOP:
        return TOP[module]
    _, n, rest = module.split(".", 2)
    return f"model.layers.{n}.{BLOCK[rest]}"


def from_hf_name(module):
    """The inverse of to_hf_name. Raises UserError for a module that our model does not have."""
    if module in OUR_TOP:
        return OUR_TOP[module]
    words = module.split(".", 3)                                               # model, layers, N, the rest
    if words[:2] != ["model", "layers"] or len(words) < 4 or words[3] not in OUR_BLOCK:
        raise UserError(f"{module!r} has no counterpart in our LLaMA; only plain LlamaForCausalLM weights can be read")
    return f"layers.{words[2]}.{OUR_BLOCK[words[3]]}"


def rename(state, name_of):
    """Rename the module part of each key, keep its last word ('weight')."""
    return {f"{name_of(k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v for k, v in state.items()}


def to_hf_state(state, args):
    """Our plain state dict under Hugging Face's names; a tied output matrix is stored once, as the embedding."""
    return rename({k: v for k, v in state.items() if not (args.tie_embeddings and k == "output.weight")}, to_hf_name)


def from_hf_state(state, args):
    """A LlamaForCausalLM state dict as ours, in fp32. Raises UserError if it does not hold our model's tensors."""
    state = {k: v.float() for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}    # a table in old files
    state = rename(state, from_hf_name)
    if args.tie_embeddings and "tok_embeddings.weight" in state:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def to_hf_config(args, tokenizer, dtype="float32"):
    """config.json as a dict. Both stop tokens are eos; transformers 5 reads `rope_parameters` and `dtype`, 4 reads
    `rope_theta` and `torch_dtype`."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": args.vocab_size, "hidden_size": args.dim, "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads, "head_dim": args.dim // args.n_heads,
        "max_position_embeddings": args.max_seq_len, "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "tie_word_embeddings": args.tie_embeddings, "use_cache": True, "dtype": dtype, "torch_dtype": dtype,
        "bos_token_id": None, "eos_token_id": [tokenizer.im_end_id, tokenizer.eos_id], "pad_token_id": tokenizer.pad_id,
    }


def from_hf_config(config):
    """config.json (a dict) -> ModelArgs. Raises UserError if the model is not the plain LLaMA we compute."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        dim, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        for ok, what in [
            (config["model_type"] == "llama", f"model_type {config['model_type']!r}"),
            (config.get("hidden_act", "silu") == "silu", f"hidden_act {config.get('hidden_act')!r}"),
            (not config.get("attention_bias") and not config.get("mlp_bias"), "biases"),
            ((rope.get("rope_type") or rope.get("type") or "default") == "default", f"scaled RoPE {rope}"),
            ((config.get("head_dim") or dim // heads) == dim // heads, f"head_dim {config.get('head_dim')}"),
        ]:
            if not ok:
                raise UserError(f"config.json: {what}; only the plain LLaMA architecture can be read")
        return ModelArgs(
            dim=dim, n_layers=config["num_hidden_layers"], n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads, vocab_size=config["vocab_size"],
            hidden_dim=config["intermediate_size"], norm_eps=config.get("rms_norm_eps", 1e-6),
            max_seq_len=config.get("max_position_embeddings", 2048),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)))
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"config.json is not that of a LLaMA model: {e!r}") from None


def safetensors():
    """The safetensors.torch module; an optional extra, asked for where it is needed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError('this needs the safetensors package: pip install -e ".[export]"') from None
    return safetensors.torch


def save_adapter(model, dir, base=""):
    """Write the adapter of `model` as peft's files, adapter_config.json and adapter_model.safetensors; `base` names
    the exported model that it belongs to."""
    c = lora_config(model)
    if c is None:
        raise UserError("the model carries no LoRA adapter to save")
    write = safetensors().save_file                      # a missing extra is reported before anything is written
    state = {f"base_model.model.{to_hf_name(k.rpartition('.')[0])}.{k.rpartition('.')[2]}.weight": v.cpu().contiguous()
             for k, v in lora_state_dict(model).items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": c["r"], "lora_alpha": c["alpha"],
              "lora_dropout": c["dropout"], "target_modules": sorted({k.split(".")[-3] for k in state}),
              "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
              "base_model_name_or_path": str(base)}
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    write(state, dir / "adapter_model.safetensors", metadata={"format": "pt"})
    (dir / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model, dir):
    """Put the LoRA adapter in `dir` (peft's files) on a plain model. Raises UserError if it is of another kind."""
    dir = Path(dir)
    try:
        c = json.loads((dir / "adapter_config.json").read_text(encoding="utf-8"))
        state = safetensors().load_file(dir / "adapter_model.safetensors")
    except FileNotFoundError as e:
        raise UserError(f"{dir} is no adapter directory: {Path(e.filename or dir).name} is missing") from None
    except ValueError as e:
        raise UserError(f"{dir}/adapter_config.json is not JSON: {e}") from None
    odd = [k for k in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if c.get(k)]
    if c.get("peft_type") != "LORA" or odd:
        raise UserError(f"{dir}: only plain LoRA adapters can be read, this is {c.get('peft_type')} {' '.join(odd)}")
    ours = {}
    for key, value in state.items():                     # base_model.model.<their module>.lora_A.weight
        module, _, leaf = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        ours[f"{from_hf_name(module)}.{leaf}"] = value.float()
    alpha = c["lora_alpha"] * (math.sqrt(c["r"]) if c.get("use_rslora") else 1)        # rsLoRA scales by alpha/sqrt(r)
    inject_lora(model, c["r"], alpha, c.get("lora_dropout", 0.0), sorted({k.split(".")[-2] for k in ours}))
    load_lora_state_dict(model, ours)
