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
from nanollm.config import UserError
from nanollm.hf import from_hf_name, safetensors, to_hf_name

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
    except UserError:
        peft.set_adapter(model, before)
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as e:
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
    kind, init, known = c.get("peft_type"), c.get("init_lora_weights"), {"LORA", "ADALORA", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
    odd = [k for k, v in c.items() if v and k not in (PLAIN | {"rank_pattern"} if kind == "ADALORA" else PLAIN)]
    odd += [f"init_lora_weights {init}, which changes the base"] if init not in (None, True, False, "gaussian", "eva") else []
    if kind not in known or odd:
        raise UserError(f"{dir}: this is {kind}{' with ' + ' '.join(odd) if kind in known else ''}; what can be read is plain {', '.join(sorted(known))}")
    if "prompt_embeddings" in state:
        table = state["prompt_embeddings"]
        adapter = peft.add_adapter(model, "ptuning_v2" if kind == "PREFIX_TUNING" else "prompt", n=len(table))
        name = next(k for k in peft.adapter_state_dict(model))
        return fill(model, adapter, {name: table})
    ours = {}
    for key, value in state.items():                     # base_model.model.<their module>.lora_A.weight
        module, _, leaf = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        ours[f"{from_hf_name(module)}.{leaf}"] = value
    targets = [t for t in peft.TARGETS if any(k.split(".")[-2] == t for k in ours)]
    if kind == "IA3":
        adapter = peft.add_adapter(model, "ia3")
    elif kind == "ADALORA":
        adapter = peft.add_adapter(model, "adalora", r=min(c["target_r"], c["init_r"]), r0=c["init_r"], alpha=float(c["lora_alpha"]), targets=targets)
        ours = {k: widen(k, v, c["init_r"]) for k, v in ours.items()}
    else:
        method = "dora" if c.get("use_dora") else "rslora" if c.get("use_rslora") else "lora"
        if c.get("use_dora") and c.get("use_rslora"):
            raise UserError(f"{dir}: DoRA with rsLoRA's scaling is none of ours; scale lora_B yourself and set use_rslora to false")
        adapter = peft.add_adapter(model, method, r=c["r"], alpha=float(c["lora_alpha"]), dropout=c.get("lora_dropout", 0.0), targets=targets)
    return fill(model, adapter, ours)


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
        found[name].base = base
        peft.load_adapter_state_dict(model, {k: v for k, v in checkpoint.read(path, "model.pt").items() if peft.OWN.search(k)})
        peft.bake(model)
    peft.set_adapter(model, None)
    return found
