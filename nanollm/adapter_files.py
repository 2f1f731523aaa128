"""Adapters in the layout of the peft library: adapter_config.json and adapter_model.safetensors in a directory.

    ours           peft_type          tensors, behind base_model.model.<their name of the module>
    lora rslora    LORA               .lora_A.weight (r, in)   .lora_B.weight (out, r)
    dora           LORA, use_dora     the same, and .lora_magnitude_vector (out,)
    qlora          LORA               the same as lora; the base in 4 bits is up to whoever loads it
    adalora        ADALORA            .lora_A (r, in)   .lora_E (r, 1)   .lora_B (out, r)
    ia3            IA3                .ia3_l (out, 1), of the FFN (1, in)
    prompt         PROMPT_TUNING      prompt_embeddings (n, C); P_TUNING has the same, its network's output
    ptuning_v2     PREFIX_TUNING      prompt_embeddings (n, 2 L G D): ours in shape and order

peft knows no bottleneck adapters and no biases without LoRA; those stay in our checkpoints.
"""
import json
import re
from pathlib import Path

import torch

from nanollm import checkpoint, peft
from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.hf import BLOCK, from_hf_name, safetensors, to_hf_name
from nanollm.quant import QuantLinear

VIRTUAL = {"prompt": "PROMPT_TUNING", "ptuning": "PROMPT_TUNING", "ptuning_v2": "PREFIX_TUNING", "prefix": "PREFIX_TUNING"}
PLAIN = set("""task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules
    r lora_alpha lora_dropout bias use_rslora use_dora init_lora_weights eva_config layers_to_transform layers_pattern megatron_core qalora_group_size
    target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step feedforward_modules init_ia3_weights
    num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers prompt_tuning_init prompt_tuning_init_text
    tokenizer_name_or_path tokenizer_kwargs encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout
    init_weights prefix_projection""".split())           # what else a configuration sets may change what is computed


def save_adapter(model, dir, base=""):
    """Write the adapter that is on `model`; `base` names the exported model that it belongs to. Raises UserError if there is none, or
    one that peft has no name for."""
    config = peft.adapter_config(model)
    if config is None:
        raise UserError("the model carries no adapter to save")
    if "gpt2" in model.args.variants:
        raise UserError("peft's adapters of GPT-2 sit on q, k and v in one matrix, ours on three: export the model merged (without --adapter)")
    pack = safetensors().save                            # a missing extra is reported before anything is written
    c = config
    method, args = c["method"], peft.base_args(model)
    about = {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": str(base)}
    if method in VIRTUAL:
        part = next(part for part in model.adapter.parts.values() if hasattr(part, "table"))
        state, width = {"prompt_embeddings": part.table().detach()}, args.head_dim * args.n_kv_heads     # what a network makes, not the network
        in_layers = VIRTUAL[method] == "PREFIX_TUNING"
        about |= {"peft_type": VIRTUAL[method], "num_virtual_tokens": c["n"], "num_transformer_submodules": 1, "num_layers": args.n_layers,
                  "token_dim": width if in_layers else args.dim, "num_attention_heads": args.n_kv_heads if in_layers else args.n_heads}
        about |= {"prefix_projection": False} if in_layers else {"prompt_tuning_init": "RANDOM"}
    elif method in ("adapter", "bitfit"):
        raise UserError(f"the peft library has no {method}; this adapter can only stay in our checkpoint")
    else:
        state = {}
        for key, value in peft.adapter_state_dict(model).items():
            module, _, leaf = key.rpartition(".")
            if leaf in ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "ia3_l"):
                linear = leaf in ("lora_A", "lora_B") and method != "adalora"                            # a module of its own there
                state[f"base_model.model.{to_hf_name(module)}.{leaf}" + ".weight" * linear] = value
        targets = sorted({re.split(r"\.(?:lora|ia3)_", k)[0].rpartition(".")[2] for k in state})
        about |= {"peft_type": {"adalora": "ADALORA", "ia3": "IA3"}.get(method, "LORA"), "target_modules": targets, "fan_in_fan_out": False}
        if method == "ia3":
            about |= {"feedforward_modules": [t for t in targets if t not in ("k_proj", "v_proj")]}
        else:
            about |= {"lora_alpha": c["alpha"], "lora_dropout": c["dropout"], "bias": "none"}
        if method == "adalora":
            r0 = next(iter(model.adapter.parts.values())).r0
            about |= {"init_r": r0, "target_r": c["r"], "total_step": 1}                                 # it wants a schedule, training or not
        elif method != "ia3":
            about |= {"r": c["r"], "use_rslora": method == "rslora", "use_dora": method == "dora"}
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    packed = pack({k: v.cpu().contiguous().clone() for k, v in state.items()}, metadata={"format": "pt"})
    (dir / "adapter_model.safetensors").write_bytes(packed)                      # save_file's file nobody else may read
    (dir / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_adapter(model, dir):
    """Put the adapter in `dir` on a plain model. Raises UserError if it is missing, of a kind that we do not have, or of another shape;
    the model is as before then."""
    dir, before = Path(dir), getattr(model, "adapter", None)
    try:
        return read_adapter(model, dir, *read_files(dir))
    except UserError as e:
        peft.set_adapter(model, before)
        raise e if str(dir) in str(e) else UserError(f"{dir}: {e}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError, ArithmeticError) as e:
        peft.set_adapter(model, before)
        raise UserError(f"{dir}: adapter_config.json and adapter_model.safetensors are not of one adapter: {e!r}") from None


def read_files(dir):
    """(the configuration, {name: tensor} in fp32)."""
    try:
        c = json.loads((dir / "adapter_config.json").read_text(encoding="utf-8"))
        if not (dir / "adapter_model.safetensors").exists() and (dir / "adapter_model.bin").exists():
            raise UserError(f"{dir}/adapter_model.bin is a pickle, which may run code when it is read; save the adapter as safetensors")
        return c, {k: v.float() for k, v in safetensors().load_file(dir / "adapter_model.safetensors").items()}
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"{dir} is no adapter directory: {Path(e.filename or 'adapter_model.safetensors').name} is missing") from None
    except ValueError as e:
        raise UserError(f"{dir}/adapter_config.json is not JSON: {e}") from None
    except Exception as e:                               # safetensors has an exception class of its own
        raise UserError(f"cannot read {dir}/adapter_model.safetensors: {e}; the file is damaged, copy it again") from None


def read_adapter(model, dir, c, state):
    """Build what the configuration `c` describes, and fill it from `state`."""
    if not isinstance(c, dict):
        raise UserError(f"{dir}/adapter_config.json is no table of settings")
    kind, init, known = str(c.get("peft_type")), c.get("init_lora_weights"), {"LORA", "ADALORA", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
    odd = [k for k, v in c.items() if v and k not in (PLAIN | {"rank_pattern"} if kind == "ADALORA" else PLAIN)]
    odd += [f"init_lora_weights {init}, which changes the base"] if init not in (None, True, False, "gaussian", "eva") else []
    if kind not in known or odd:
        raise UserError(f"{dir}: this is {kind}{' with ' + ' '.join(odd) if kind in known else ''}; what can be read is plain {', '.join(sorted(known))}")
    if kind in VIRTUAL.values() or kind == "P_TUNING":
        if other := sorted(state.keys() ^ {"prompt_embeddings"}):
            raise UserError(f"{dir}/adapter_model.safetensors: {kind} is the tensor prompt_embeddings and no other, here {other[0]} is "
                            f"{'there, too' if other[0] in state else 'missing'}")
        table = state["prompt_embeddings"]
        same(dir, c, {"num_virtual_tokens": len(table)} | ({"num_layers": model.args.n_layers, "num_attention_heads": model.args.n_kv_heads}
                                                           if kind == "PREFIX_TUNING" else {}))
        adapter = peft.add_adapter(model, "ptuning_v2" if kind == "PREFIX_TUNING" else "prompt", n=len(table))
        name = next(k for k in peft.adapter_state_dict(model))
        return fill(model, adapter, {name: table})
    ours = {}
    for key, value in state.items():                     # base_model.model.<their module>.lora_A.weight
        module, _, leaf = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        ours[f"{from_hf_name(module)}.{leaf}"] = value
    check_targets(dir, c.get("target_modules"), {to_hf_name(k.rpartition(".")[0]) for k in ours})
    ranks = {k.rpartition(".")[0]: len(v) for k, v in ours.items() if k.endswith("lora_A")}
    targets = [t for t in peft.TARGETS if any(k.split(".")[-2] == t for k in ours)]
    if kind == "IA3":
        adapter = peft.add_adapter(model, "ia3")
    elif kind == "ADALORA":
        for key in ("init_r", "target_r"):
            if type(c.get(key)) is not int or c[key] < 1:
                raise UserError(f"{dir}/adapter_config.json: {key} must be a whole number of at least 1, got {c.get(key)!r}")
        r, r0 = c["target_r"], c["init_r"]
        check_pattern(dir, c.get("rank_pattern") or {}, ranks, r0)
        adapter = peft.add_adapter(model, "adalora", r=min(r, r0), r0=r0, alpha=c.get("lora_alpha"),
                                   dropout=c.get("lora_dropout", 0.0), targets=targets)
        ours = {k: widen(k, v, r0) for k, v in ours.items()}
    else:
        for flag in ("use_dora", "use_rslora"):
            if not isinstance(c.get(flag, False), bool):
                raise UserError(f"{dir}/adapter_config.json: {flag} must be true or false, got {c[flag]!r}")
        same(dir, c, {"r": next(iter(ranks.values()), 0)})
        method = "dora" if c.get("use_dora") else "rslora" if c.get("use_rslora") else "lora"
        if c.get("use_dora") and c.get("use_rslora"):
            raise UserError(f"{dir}: DoRA with rsLoRA's scaling is none of ours; scale lora_B yourself and set use_rslora to false")
        adapter = peft.add_adapter(model, method, r=c["r"], alpha=c.get("lora_alpha"), dropout=c.get("lora_dropout", 0.0), targets=targets)
    return fill(model, adapter, ours)


def same(dir, c, found):
    """Raises UserError unless what the configuration says of the tensors is so."""
    for key, value in found.items():
        if type(c.get(key)) is not int or c[key] != value:
            raise UserError(f"{dir}/adapter_config.json: {key} is {c.get(key)!r}, by adapter_model.safetensors and the model it is {value}")


def check_targets(dir, targets, modules):
    """Raises UserError unless target_modules, names or one pattern for all, are those of the tensors; None says nothing."""
    listed = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    if targets is not None and not targets or not (targets is None or listed or isinstance(targets, str)):
        raise UserError(f"{dir}/adapter_config.json: target_modules must be names of matrices, as q_proj, got {targets!r}")
    try:
        re.compile(targets if isinstance(targets, str) else "")
    except re.error as e:
        raise UserError(f"{dir}/adapter_config.json: target_modules {targets!r} is no regular expression: {e}") from None
    ends = lambda t, names: any(f".{m}".endswith(f".{t}") for m in names)
    idle = [t for t in targets if ends(t, BLOCK.values()) and not ends(t, modules)] if listed else []        # peft leaves names of other families in
    other = [m for m in sorted(modules) if not (any(ends(t, [m]) for t in targets) if listed else targets in (None, "all-linear")
                                                or re.fullmatch(targets, m))]
    if idle or other:
        raise UserError(f"{dir}/adapter_config.json: target_modules {'names ' + repr(idle[0]) if idle else 'leaves out ' + repr(other[0])}, "
                        f"adapter_model.safetensors {'does not' if idle else 'has it'}")


def check_pattern(dir, pattern, ranks, r0):
    """Raises UserError unless AdaLoRA's rank_pattern, {matrix: r0 times whether the triplet lives}, is that of the ranks in the file."""
    if not isinstance(pattern, dict):
        raise UserError(f"{dir}/adapter_config.json: rank_pattern must be a table of matrices, got {pattern!r}")
    lives = {from_hf_name(k.removeprefix("base_model.model.").removesuffix(".lora_E")): flags for k, flags in pattern.items()}
    for name in lives.keys() | ranks.keys():
        flags = lives.get(name)
        right = flags is None or isinstance(flags, list) and len(flags) == r0 and all(isinstance(f, bool) for f in flags)
        if not right or ranks.get(name) != (r0 if flags is None else sum(flags)):
            raise UserError(f"{dir}/adapter_config.json: rank_pattern and init_r {r0!r} do not give the rank of {name}, "
                            f"{ranks.get(name, 'which is missing')} in adapter_model.safetensors")


def widen(key, value, r0):
    """A triplet that AdaLoRA has dropped is left out of peft's file: here it is zero."""
    shape = (value.size(0), r0) if key.endswith("lora_B") else (r0, value.size(1))
    wide = torch.zeros(shape)
    wide[: value.size(0), : value.size(1)] = value
    return wide


def fill(model, adapter, state):
    """The tensors of `state` into the adapter; what only training needs (AdaLoRA's averages) keeps its start."""
    kept = {k: v for k, v in peft.adapter_state_dict(model).items() if any(word in k for word in peft.AVERAGES)}
    peft.load_adapter_state_dict(model, {**kept, **state})
    return adapter


def load_adapters(model, paths):
    """Several adapters beside one plain model: {name: a --peft run or a directory of peft's} -> {name: Adapter}.
    peft.set_adapter(model, found[name]) puts one on, None takes it off. Raises UserError for a checkpoint without an adapter, or with
    one of another base."""
    found = {}
    for name, path in paths.items():
        peft.set_adapter(model, None)
        if (Path(path) / "adapter_config.json").exists():
            found[name] = load_adapter(model, path)
            continue
        path = checkpoint.find(path, skip="training")
        config, base, _ = peft.of_meta(checkpoint.meta_of(path))
        if not config:
            raise UserError(f"{path} holds no adapter; it was trained without --peft")
        peft.check_base(model, base, path)
        found[name] = peft.add_adapter(model, **config)
        found[name].base, found[name].template = base, tokenizers.load(path / "tokenizer").template
        peft.load_adapter_state_dict(model, {k: v for k, v in checkpoint.read(path, "model.pt").items() if peft.OWN.search(k)})
        peft.bake(model)
    peft.set_adapter(model, None)
    return found


def bank(model, tok, paths, completion):
    """What chat.py's /adapter chooses from: {name: (Adapter or None, chat template, does it only complete a text?)}, first the base. A name
    is the last part of a path, or all of it where two would be called the same. Raises UserError as load_adapters, and for a base in few bits."""
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        raise UserError("--adapters go on the weights that they were trained beside: leave --quantize out")
    if peft.adapter_config(model):
        raise UserError("--adapters go on a plain model, and --init_from carries an adapter of its own: name its base there, and it among --adapters")
    paths = [Path(path).resolve() for path in paths]
    last = [path.name for path in paths] + ["base"]
    names = {path.name if last.count(path.name) == 1 else str(path): path for path in paths}
    found = load_adapters(model, names)
    return {"base": (None, tok.template, completion)} | {name: (a, a.template or tok.template, completion and not a.template) for name, a in found.items()}


def switch(chat, name):
    """Put the adapter of that name on and begin a new conversation: what one has said is not for another to go on with. Print them all."""
    if name in chat.adapters:
        adapter, chat.tok.template, chat.completion = chat.adapters[name]
        peft.set_adapter(chat.model, adapter)
        chat.reset()
    on = getattr(chat.model, "adapter", None)
    listed = " ".join(("*" if adapter is on else "") + key for key, (adapter, *_) in chat.adapters.items())
    print(f"[{name + ' is not among them: ' if name and name not in chat.adapters else ''}{listed or 'none: start with --adapters DIR …'}]", flush=True)
