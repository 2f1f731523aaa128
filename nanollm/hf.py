"""The Hugging Face layout: what our tensors and settings are called in transformers (adapters in peft: adapter_files.py).

    model_type   our variants                what its config.json and its tensors have
    llama        (none), qkv_bias:output=true
    mistral      sliding_window:sinks=0      `sliding_window`
    qwen2        qkv_bias                    biases of q, k and v
    qwen3        qk_norm                     q_norm and k_norm
    mixtral      moe                         a gate and experts instead of one feed-forward
    gpt2         gpt2                        names of its own, matrices transposed, q, k and v in one

head_dim, rope_scaling and geglu go with each but the last, a window also with qwen2, qwen3 and mixtral. Our RoPE is half-split
like theirs, so a conversion renames tensors and never permutes them. What would silently compute something else is refused.
"""
import json
import math
from pathlib import Path

import torch

from nanollm.config import UserError
from nanollm.model import ModelArgs
from nanollm.variants import parse

TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK = {                                                # inside layers.N / model.layers.N
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
EXPERTS = ("feed_forward.gate", "feed_forward.experts.")                       # Mixtral's begin with block_sparse_moe instead
OUR_TOP, OUR_BLOCK = {v: k for k, v in TOP.items()}, {v: k for k, v in BLOCK.items()}
GPT2 = {"attention_norm": "ln_1", "attention.wo": "attn.c_proj", "ffn_norm": "ln_2", "feed_forward.w1": "mlp.c_fc", "feed_forward.w2": "mlp.c_proj"}
FAMILIES = {                                             # model_type: (class in transformers, the variants that make it)
    "llama": ("LlamaForCausalLM", set()), "mistral": ("MistralForCausalLM", {"sliding_window"}), "qwen2": ("Qwen2ForCausalLM", {"qkv_bias"}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm"}), "mixtral": ("MixtralForCausalLM", {"moe"}), "gpt2": ("GPT2LMHeadModel", {"gpt2"}),
}
DEFAULTS = {                                             # what transformers assumes where a config.json is silent
    "llama": {"max_position_embeddings": 2048}, "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
}
DIFFERS = {
    "gemma": "embeddings times sqrt(dim), norms that multiply by 1 + weight", "gemma2": "soft-capped scores and norms behind each sub-layer",
    "gemma3_text": "two thetas by layer and norms behind each sub-layer", "phi": "attention and feed-forward side by side, RoPE on a part of each head",
    "phi3": "q, k and v in one matrix, gate and up in one", "gpt_neox": "attention and feed-forward side by side, RoPE on a part of each head",
    "olmo2": "norms behind the sub-layers instead of before", "smollm3": "layers without RoPE", "opt": "learned positions and ReLU with biases",
    "bloom": "ALiBi instead of RoPE", "mpt": "ALiBi instead of RoPE", "falcon": "attention and feed-forward side by side",
    "chatglm": "RoPE on half of each head, q, k and v in one matrix", "qwen2_moe": "a shared expert beside the others",
    "qwen3_moe": "experts under other names and only in some layers", "deepseek_v2": "latent attention and shared experts",
    "deepseek_v3": "latent attention and shared experts", "bert": "it reads in both directions", "t5": "an encoder before the decoder",
    "mamba": "a state-space model without attention", "gpt_oss": "learned sinks in the softmax and alternating windows",
}
ROPE = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor", "low_freq_factor", "high_freq_factor",
        "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"}
IGNORED = {"dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "auto_map", "_name_or_path"}


# ---- tensors ---------------------------------------------------------------------------------------------------------

def to_hf_name(module):
    """'layers.3.attention.wq' -> 'model.layers.3.self_attn.q_proj'."""
    if module in TOP:
        return TOP[module]
    _, n, rest = module.split(".", 2)
    return f"model.layers.{n}." + (rest.replace("feed_forward", "block_sparse_moe") if rest.startswith(EXPERTS) else BLOCK[rest])


def from_hf_name(module):
    """The inverse of to_hf_name. Raises UserError for a module that our model does not have."""
    if module in OUR_TOP:
        return OUR_TOP[module]
    words = module.split(".", 3)                                               # model, layers, N, the rest
    if words[:2] == ["model", "layers"] and len(words) == 4:
        ours = OUR_BLOCK.get(words[3]) or words[3].replace("block_sparse_moe", "feed_forward")
        if words[3] in OUR_BLOCK or ours.startswith(EXPERTS):
            return f"layers.{words[2]}.{ours}"
    raise UserError(f"{module!r} has no counterpart in our model; what can be read: {', '.join(FAMILIES)}, each with its plain language-model head")


def rename(state, name_of):
    """Rename the module part of each key, keep its last word ('weight')."""
    return {f"{name_of(k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v for k, v in state.items()}


def to_hf_state(state, args):
    """Our plain state dict under Hugging Face's names; a tied output matrix is stored once, as the embedding."""
    state = {k: v for k, v in state.items() if not (args.tie_embeddings and k == "output.weight")}
    return to_gpt2(state, args) if "gpt2" in args.variants else rename(state, to_hf_name)


def from_hf_state(state, args):
    """Their state dict as ours, in fp32. Raises UserError for a tensor that our model does not have."""
    state = {k: v.float() for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}    # a table in old files
    state = from_gpt2(state) if "gpt2" in args.variants else rename(state, from_hf_name)
    if args.tie_embeddings and "tok_embeddings.weight" in state:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def to_gpt2(state, args):
    """GPT2LMHeadModel's tensors. Its Conv1D keeps a matrix as (in, out)."""
    out = {"transformer.wte.weight": state["tok_embeddings.weight"], "transformer.wpe.weight": state["layers.0.positions"][0],
           "transformer.ln_f.weight": state["norm.weight"], "transformer.ln_f.bias": state["norm.bias"]}
    for n in range(args.n_layers):
        for kind in ("weight", "bias"):
            ours = lambda name: state[f"layers.{n}.{name}.{kind}"].t()                            # .t() of a bias is itself
            out[f"transformer.h.{n}.attn.c_attn.{kind}"] = torch.cat([ours(f"attention.{w}") for w in ("wq", "wk", "wv")], -1)
            out |= {f"transformer.h.{n}.{theirs}.{kind}": ours(name) for name, theirs in GPT2.items()}
    return out | ({"lm_head.weight": state["output.weight"]} if "output.weight" in state else {})


def from_gpt2(state):
    """The inverse of to_gpt2; the first files had no `transformer.` in front, and the causal mask as a buffer."""
    top, block = {"wte": "tok_embeddings", "ln_f": "norm", "lm_head": "output"}, {v: k for k, v in GPT2.items()}
    out = {}
    for key, value in state.items():
        words = key.removeprefix("transformer.").split(".")
        name, kind = ".".join(words[2:-1]), words[-1]
        if words[0] in top:
            out[f"{top[words[0]]}.{kind}"] = value
        elif words[0] == "wpe":
            out["layers.0.positions"] = value[None]                                               # (1, T, C)
        elif name == "attn.c_attn":                                                               # (C, 3C) or (3C,)
            out |= {f"layers.{words[1]}.attention.{w}.{kind}": part.t().contiguous() for w, part in zip(("wq", "wk", "wv"), value.chunk(3, -1))}
        elif name in block:
            out[f"layers.{words[1]}.{block[name]}.{kind}"] = value.t().contiguous()
        elif key.rpartition(".attn.")[2] not in ("bias", "masked_bias"):
            raise UserError(f"{key!r} has no counterpart in our GPT-2")
    return out


# ---- settings --------------------------------------------------------------------------------------------------------

def family_of(args):
    """(model_type, {variant: its options}) that computes what `args` describes. UserError if no family does."""
    parts = dict(map(parse, args.variants))
    window = parts.get("sliding_window")
    if window and (window["window"] or args.max_seq_len) + window["sinks"] >= args.max_seq_len:          # nothing is out of reach
        del parts["sliding_window"]
    names = parts.keys() - {"rope_scaling", "geglu"}
    kind = next((k for k, (_, own) in FAMILIES.items() if own == names or k in ("qwen2", "qwen3", "mixtral") and own | {"sliding_window"} == names), None)
    if kind == "qwen2" and parts["qkv_bias"]["output"]:
        kind = None if "sliding_window" in parts else "llama"
    why = ("the window keeps sinks; only :sinks=0 is Mistral's" if "sliding_window" in parts and window["sinks"] else
           "with top_k=1 its weights are not divided by their sum" if kind == "mixtral" and parts["moe"]["top_k"] == 1 else
           "GPT-2 knows no grouped queries" if kind == "gpt2" and (args.n_kv_heads, args.head_dim) != (args.n_heads, args.dim // args.n_heads) else
           "chat.py and evaluate.py run it" if kind is None else "")
    if why:
        raise UserError(f"no Hugging Face family computes this model's {' '.join(args.variants)} (--variants): {why}")
    return kind, parts


def to_hf_config(args, tokenizer, dtype="float32"):
    """config.json as a dict; both stop tokens are eos. UserError if no family computes this model."""
    return architecture(args) | {"dtype": dtype, "torch_dtype": dtype, "bos_token_id": None,
                                 "eos_token_id": [tokenizer.im_end_id, tokenizer.eos_id], "pad_token_id": tokenizer.pad_id}


def architecture(args):
    """What config.json says of the model's shape. transformers 5 reads `rope_parameters`, 4 reads `rope_theta` and `rope_scaling`."""
    kind, parts = family_of(args)
    table = {"architectures": [FAMILIES[kind][0]], "model_type": kind, "vocab_size": args.vocab_size, "tie_word_embeddings": args.tie_embeddings,
             "initializer_range": 0.02, "use_cache": True}
    if kind == "gpt2":
        return table | {"n_embd": args.dim, "n_inner": args.hidden_dim or None, "n_layer": args.n_layers, "n_head": args.n_heads,
                        "n_positions": args.max_seq_len, "layer_norm_epsilon": args.norm_eps, "activation_function": "gelu_new",
                        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    rope = to_hf_rope(args, parts.get("rope_scaling"))
    table |= {
        "hidden_act": "gelu" if "geglu" in parts else "silu", "hidden_size": args.dim, "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads, "num_key_value_heads": args.n_kv_heads, "head_dim": args.head_dim,
        "max_position_embeddings": args.max_seq_len, "rms_norm_eps": args.norm_eps, "attention_dropout": 0.0,
        "rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else rope, "rope_parameters": rope}
    window = parts["sliding_window"]["window"] if "sliding_window" in parts else None
    if kind == "llama":
        return table | {"attention_bias": "qkv_bias" in parts, "mlp_bias": False}
    if kind in ("mistral", "mixtral"):
        table |= {"sliding_window": window}
    else:
        table |= {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": 0 if window else args.n_layers,
                  "layer_types": ["sliding_attention" if window else "full_attention"] * args.n_layers, "attention_bias": False}
    if kind == "mixtral":
        moe = parts["moe"]
        table |= {"num_local_experts": moe["n_experts"], "num_experts_per_tok": moe["top_k"],
                  "router_aux_loss_coef": moe["balance"] / moe["top_k"],                          # theirs sums over the choices
                  "intermediate_size": moe["hidden_dim"] or args.ffn_dim // moe["top_k"]}
    return table


def to_hf_rope(args, scaling):
    """rope_parameters from the options of rope_scaling, or from None. They know no `ntk`: it is a larger theta."""
    plain = {"rope_type": "default", "rope_theta": args.rope_theta}
    if scaling is None:
        return plain
    kind, factor = scaling["kind"], scaling["factor"]
    if kind == "ntk":
        return plain | {"rope_theta": args.rope_theta * factor ** (args.head_dim / (args.head_dim - 2))}
    rope = plain | {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return rope
    rope["original_max_position_embeddings"] = scaling["original"] or round(args.max_seq_len / factor)
    if kind == "llama3":
        return rope | {"low_freq_factor": scaling["beta_slow"], "high_freq_factor": scaling["beta_fast"] or 4.0}
    return rope | {"beta_fast": scaling["beta_fast"] or 32.0, "beta_slow": scaling["beta_slow"],
                   "attention_factor": scaling["attention_factor"] or 0.1 * math.log(factor) + 1}


def refuse_unless(checks, kind):
    """checks: (is it as we compute it?, what it is else)."""
    if odd := [what for ok, what in checks if not ok]:
        raise UserError(f"config.json: this {kind} model has {', '.join(odd)}, which our model does not compute")


def from_hf_config(config):
    """config.json (a dict) -> ModelArgs. Raises UserError that names what differs if our model does not compute that model."""
    if not isinstance(config, dict):
        raise UserError("config.json is not that of a model: it is no table of settings")
    kind = config.get("model_type")
    if str(kind) not in FAMILIES:
        new = sorted(k for k in config.keys() - architecture(ModelArgs()).keys() - IGNORED if config[k] is not None)
        differs = DIFFERS.get(str(kind), f"at least the settings {', '.join(new[:6])}" if new else "its settings do not tell")
        raise UserError(f"config.json: model_type {kind!r} is none of those that can be read ({', '.join(FAMILIES)}); what differs: {differs}")
    try:
        return from_gpt2_config(config) if kind == "gpt2" else from_llama_config(kind, DEFAULTS[kind] | config)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(f"config.json is not that of a {kind} model: {e!r}") from None


def whole(config, key, usual=None, most=2**24, least=1):
    """The size `key`; None or missing: the usual one. Raises UserError for what is no size: a fraction, true, a word, or beyond any model."""
    value = usual if config.get(key) is None else config[key]
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"config.json: {key} must be a whole number from {least} to {most}, got {value!r}")
    return value


def positive(config, key, usual):
    value = usual if config.get(key) is None else config[key]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"config.json: {key} must be a number above 0, got {value!r}")
    return float(value)


def from_llama_config(kind, config):
    dim, heads, context = (whole(config, k) for k in ("hidden_size", "num_attention_heads", "max_position_embeddings"))
    layers = whole(config, "num_hidden_layers", most=10_000)
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if not isinstance(config.get(key), bool | None):
            raise UserError(f"config.json: {key} must be true or false, got {config[key]!r}")
    act, output_bias = config.get("hidden_act", "silu"), bool(config.get("attention_bias"))
    window = config.get("sliding_window") if kind != "llama" and config.get("use_sliding_window", kind in ("mistral", "mixtral")) else None
    first = config.get("max_window_layers", 0) if kind in ("qwen2", "qwen3") else 0
    types = config.get("layer_types") or ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    refuse_unless([
        (act in ("silu", "swish") or act == "gelu" and kind != "mixtral", f"the activation {act!r}"),
        (not config.get("mlp_bias"), "biases in its feed-forward"),
        (not output_bias or kind in ("llama", "qwen2"), "biases in its attention"),
        (set(types) in ({"full_attention"}, {"sliding_attention"}), f"layers that alternate ({', '.join(sorted(set(types)))})"),
        (not config.get("quantization_config"), f"quantised weights ({(config.get('quantization_config') or {}).get('quant_method')})"),
    ], kind)
    words = {"qwen2": ["qkv_bias"], "qwen3": ["qk_norm"], "llama": ["qkv_bias:output=true"] if output_bias else []}.get(kind, [])
    words += ["geglu"] if act == "gelu" else []
    if kind == "mixtral":
        experts, balance = whole(config, "num_local_experts", most=10_000), config.get("router_aux_loss_coef", 0.001)
        top_k = whole(config, "num_experts_per_tok", most=experts)
        words += [f"moe:n_experts={experts},top_k={top_k},balance={balance * top_k},hidden_dim={whole(config, 'intermediate_size')}"]
    if window and types[0] == "sliding_attention" and whole(config, "sliding_window", most=2**31) < context:
        words += [f"sliding_window:window={window},sinks=0"]
    theta, scaling = from_hf_rope(kind, config, context)
    return ModelArgs(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=whole(config, "num_key_value_heads", heads), head_dim=whole(config, "head_dim", 0, least=0),
        vocab_size=whole(config, "vocab_size"), hidden_dim=whole(config, "intermediate_size"), norm_eps=positive(config, "rms_norm_eps", 1e-6),
        max_seq_len=context, rope_theta=theta, tie_embeddings=bool(config.get("tie_word_embeddings", False)), variants=words + scaling)


def from_hf_rope(kind, config, context):
    """(theta, [the word for rope_scaling, if any])."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), dict | None):
            raise UserError(f"config.json: {key} must be a table or null, got {config[key]!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key in rope.keys() & {"factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"}:
        positive(rope, key, 1)
    scaling, theta = rope.get("rope_type") or rope.get("type") or "default", positive(rope, "rope_theta", positive(config, "rope_theta", 10000.0))
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    factor = rope.get("factor") or (original and context / original)
    odd, original = sorted(rope.keys() - ROPE), original and whole({"original_max_position_embeddings": original}, "original_max_position_embeddings")
    refuse_unless([
        (scaling in ("default", "linear", "dynamic", "yarn", "llama3"), f"RoPE scaled by {scaling!r}"),
        (factor or scaling not in ("linear", "yarn", "llama3"), f"RoPE scaled by {scaling!r} without a factor"),
        (not odd, f"RoPE with the settings {', '.join(odd)}"), (part == 1, f"RoPE on {part} of each head"),
        (rope.get("truncate", True), "YaRN without rounding")], kind)
    if scaling == "dynamic":
        print(f"note: this model's RoPE is rescaled beyond {context} tokens (dynamic NTK); ours ends there, and is the same up to there", flush=True)
    if scaling in ("default", "dynamic"):
        return theta, []
    original = original or context
    word = f"rope_scaling:kind={scaling},factor={float(factor)},context={context}"
    if scaling == "linear":
        return theta, [word]
    if scaling == "llama3":
        return theta, [f"{word},original={original},beta_slow={rope['low_freq_factor']},beta_fast={rope['high_freq_factor']}"]
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    sharper = rope.get("attention_factor") or ((0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1) if mscale and all_dim else 0.0)
    return theta, [f"{word},original={original},beta_fast={rope.get('beta_fast') or 32},beta_slow={rope.get('beta_slow') or 1},attention_factor={sharper}"]


def from_gpt2_config(config):
    act = config.get("activation_function", "gelu_new")
    refuse_unless([
        (act in ("gelu_new", "gelu_pytorch_tanh"), f"the activation {act!r}"),
        (config.get("scale_attn_weights", True), "scores that are not divided by sqrt(D)"),
        (not config.get("scale_attn_by_inverse_layer_idx"), "scores divided by the layer's number"),
        (not config.get("add_cross_attention"), "cross-attention"),
    ], "gpt2")
    dim = whole(config, "n_embd")
    return ModelArgs(dim=dim, n_layers=whole(config, "n_layer", most=10_000), n_heads=whole(config, "n_head"), vocab_size=whole(config, "vocab_size"),
                     hidden_dim=whole(config, "n_inner", 4 * dim) if config.get("n_inner") else 0, max_seq_len=whole(config, "n_positions", 1024),
                     norm_eps=positive(config, "layer_norm_epsilon", 1e-5), tie_embeddings=bool(config.get("tie_word_embeddings", True)), variants=["gpt2"])


# ---- files -----------------------------------------------------------------------------------------------------------

def safetensors():
    """The safetensors.torch module; an optional extra, asked for where it is needed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError('this needs the safetensors package: pip install -e ".[export]"') from None
    return safetensors.torch


def write_weights(dir, state, dtype, shard_bytes):
    """model.safetensors, or where that would be larger than shard_bytes model-0000N-of-0000M.safetensors and the index that says
    which tensor is in which."""
    shards, size = [[]], 0
    for key, value in state.items():
        need = value.numel() * dtype.itemsize
        if shards[-1] and size + need > shard_bytes:
            shards, size = shards + [[]], 0
        shards[-1].append(key)
        size += need
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)] if len(shards) > 1 else ["model.safetensors"]
    for name, keys in zip(names, shards):
        safetensors().save_file({k: state[k].to(dtype).contiguous() for k in keys}, dir / name, metadata={"format": "pt"})
        (dir / name).chmod(0o644)                            # save_file's is readable by its owner alone
    if len(shards) > 1:
        total = sum(v.numel() * dtype.itemsize for v in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": {k: name for name, keys in zip(names, shards) for k in keys}}
        (dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_weights(dir):
    """All tensors of a directory, as they are stored. Raises UserError for a missing, damaged or foreign shard, and for pickles."""
    one, index, where = dir / "model.safetensors", dir / "model.safetensors.index.json", None
    if one.exists() or not index.exists():                   # the order in which transformers looks
        files = [one] if one.exists() else sorted(dir.glob("model*.safetensors"))
    else:
        try:
            where = {key: dir / Path(name).name for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{index} is not an index of shards: {e!r}; download it again") from None
        files = sorted(set(where.values()))
    if not files:
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(dir.glob(pattern))]
        raise UserError(f"{dir} holds its weights as a pickle ({pickles[0]}), and opening a pickle runs whatever code is inside it; save it again "
                        "as safetensors, on a machine that may run that code" if pickles else
                        f"{dir} holds no model*.safetensors; other weight files cannot be read")
    state, load = {}, safetensors().load_file
    for file in files:
        if not file.exists():
            raise UserError(f"{dir}: the shard {file.name}, which {index.name} names, is missing; download it again")
        try:
            part = load(file)
        except Exception as e:                               # safetensors has an exception class of its own
            raise UserError(f"cannot read {file}: {e}; the file is damaged, download it again") from None
        lost = [] if where is None else [key for key, home in where.items() if home == file and key not in part]
        if lost:
            raise UserError(f"{file} lacks {lost[0]}, which {index.name} says is in it: shards of different models; download them again")
        state |= part if where is None else {key: value for key, value in part.items() if where.get(key) == file}
    return state
