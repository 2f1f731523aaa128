"""Adapters: train a few new numbers beside a frozen model. Each method is a few lines in a file of its own, read lora.py first.

    add_adapter(model, "lora", r=8)        now only the adapter trains; step 0 is exactly the base model (not so: virtual tokens, qlora)
    with disable_adapter(model): ...       the base model, bit for bit (the reference of DPO needs no second model)
    merge_adapter(model)                   the update goes into W, and the plain model is back, at no cost per token
    set_adapter(model, other)              another adapter on the same base, or None: nothing is copied

An adapter is a dict {place in the model: what stands there}: mostly a Linear with some parameters more, under the Linear's name
and with its very weight. Putting it on and taking it off is setattr. --peft METHOD:option=value,… names one; the numbers
trained and what each does well: docs/peft.md. Files in the layout of the peft library: nanollm/adapter_files.py.
"""
import difflib
import hashlib
import inspect
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from nanollm.config import UserError, convert
from nanollm.model import Linear
from nanollm.peft.adalora import adalora, add_orthogonality, reallocate
from nanollm.peft.dora import dora
from nanollm.peft.lora import TARGETS, LoRALinear, QLoRALinear, lora, qlora, rslora
from nanollm.peft.small import adapter, bitfit, ia3
from nanollm.peft.soft import prefix, prompt, ptuning, ptuning_v2

RATES = {                                                # each method, and the learning rate that it usually wants in SFT
    lora: 2e-4, rslora: 2e-4, dora: 2e-4, qlora: 2e-4, adalora: 1e-3, adapter: 1e-3, ia3: 5e-3, bitfit: 1e-3,
    prefix: 1e-3, ptuning_v2: 1e-2, prompt: 3e-2, ptuning: 1e-3,
}
METHODS = {f.__name__: f for f in RATES}
ANYWHERE = ("lora", "rslora", "dora", "qlora", "adapter", "ia3", "bitfit")          # ask nothing of a script; the others only in train_sft.py
MERGEABLE = ("lora", "rslora", "dora", "qlora", "adalora", "ia3")                   # a change of weights, not new tokens, layers or biases
SHARDED = ("lora", "rslora")                             # fit --parallel fsdp
OWN = re.compile(r"(^|\.)(lora_|adapter_|ia3_|bitfit_|prompt|prefix|v_head|head)\w*(\.|$)")   # not the base's: a head is new, too
ABSENT = object()                                        # stands for nothing, where the plain model has nothing
AVERAGES = ("lora_mean", "lora_spread", "lora_alive")    # AdaLoRA's, of use in training only


@dataclass
class Adapter:
    config: dict                                         # {"method": "lora", "r": 8, …}: add_adapter(model, **config) builds it again
    parts: dict                                          # place in the model -> what stands there while it is on
    plain: dict                                          # place -> what stands there otherwise
    base: dict = field(default_factory=dict)             # {"path", "hash"} of the model that it belongs to
    template: str = ""                                   # of the chats that it was trained on, where that is known (load_adapters)


def options_of(method, among=METHODS):
    """{option: default}. Raises UserError for a method that is not among those."""
    if method not in METHODS or method not in among:
        near = difflib.get_close_matches(method, among, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(among)}"
        raise UserError(f"--peft {method} is {'for train_sft.py only' if method in METHODS else 'unknown'}; {hint}")
    return {p.name: p.default for p in list(inspect.signature(METHODS[method]).parameters.values())[1:]}


def check_options(method, options):
    """Raises UserError unless each option is one of the method's and of its kind, a number neither negative nor without end: these come
    from files, too."""
    defaults = options_of(method)
    for key, value in options.items():
        kind = type(defaults.get(key))
        fits = key in defaults and (type(value) is kind or kind is float and type(value) is int or kind is tuple and isinstance(value, list))
        if not fits or kind in (int, float) and not 0 <= value < (2**63 if type(value) is int else math.inf):
            wants = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word", tuple: "a list of names"}
            least = " of at least 0" + " and below 2^63" * (type(value) is int and value > 0) if kind in (int, float) else ""
            wants = wants[kind] + least if key in defaults else "left out, it is no option"
            raise UserError(f"{method} adapter: {key} must be {wants}, got {value!r}")


def read(cfg, among=METHODS):
    """--peft METHOD[:option=value,…] with the --lora flags -> (method, options), or None without it. Raises UserError."""
    alone = getattr(cfg, "adapter_only", False)
    if not cfg.peft:
        if alone:
            raise UserError("--adapter_only: without --peft there is no adapter; leave it out")
        return None
    method, _, rest = cfg.peft.partition(":")
    defaults = options_of(method, among)
    flags = {"r": cfg.lora_rank, "alpha": cfg.lora_alpha, "dropout": getattr(cfg, "lora_dropout", 0.0), "targets": tuple(cfg.lora_targets)}
    options = {k: v for k, v in flags.items() if k in defaults}
    if idle := [k for k, usual in options_of("lora").items() if k not in defaults and flags[k] != usual]:
        print(f"note: --peft {method} has no {', '.join(idle)}: these --lora_ flags do nothing here", flush=True)
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if key not in defaults or key in flags or not equals:
            own = [k for k in defaults if k not in flags]
            raise UserError(f"--peft {cfg.peft}: {pair!r} is no option; {method} takes " + (" ".join(f"{k}={defaults[k]}" for k in own) or "none")
                            + (" and the flags --lora_rank, --lora_alpha, --lora_targets" if "r" in defaults else ""))
        options[key] = convert(key, value, defaults[key], f"--peft {cfg.peft}")
    if cfg.tp > 1:
        raise UserError(f"--peft {method} with --tp {cfg.tp}: there is no plan for cutting adapters; leave --tp out")
    if cfg.parallel == "fsdp" and (alone or method not in SHARDED):
        raise UserError(f"--peft {method} with weights cut into slices: use {' or '.join(SHARDED)} there, without --adapter_only, or --parallel ddp")
    if getattr(cfg, "merge_on_save", False) and method not in MERGEABLE:
        raise UserError(f"--merge_on_save: --peft {method} is no change of a weight, so it cannot be merged; leave the option out")
    if cfg.activation_checkpointing and method in ("prefix", "ptuning_v2"):
        raise UserError(f"--peft {method} puts keys and values into a cache, which --activation_checkpointing would compute twice; leave it out")
    if among is METHODS and 10 * cfg.learning_rate < RATES[METHODS[method]]:
        print(f"note: --peft {method} usually wants a rate of about {RATES[METHODS[method]]:g}, --learning_rate is {cfg.learning_rate:g}", flush=True)
    return method, options


def place(model, name, thing):
    """Put `thing` at the dotted `name` in the model, or, if it is ABSENT, nothing. Returns what was there."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    before = getattr(parent, child) if child in parent._modules or child in parent.__dict__ else ABSENT
    delattr(parent, child) if thing is ABSENT else setattr(parent, child, thing)
    return before


def choose_trained(model):
    """With an adapter on, it and a new head are trained; of a plain model everything."""
    for name, p in model.named_parameters():
        p.requires_grad_(not adapter_config(model) or bool(OWN.search(name)))


def add_adapter(model, method="lora", **options):
    """Freeze the model and put an adapter on; it becomes model.adapter, an Adapter, and is returned.
    Raises UserError for an impossible option or a model that has an adapter already."""
    if now := adapter_config(model):
        raise UserError(f"the model carries an adapter already ({now['method']}); merge it (merge_adapter) or take it off before adding another")
    defaults = options_of(method)
    check_options(method, options)
    parts = METHODS[method](model, **options)
    plain = {name: place(model, name, part) for name, part in parts.items()}
    config = {"method": method} | {k: list(v) if isinstance(v, tuple) else v for k, v in {**defaults, **options}.items()}
    model.adapter = Adapter(config, parts, plain)
    choose_trained(model)
    return model.adapter


def inject_lora(model, r=8, alpha=16, dropout=0.0, targets=TARGETS):
    """add_adapter(model, "lora", …), returning the names of the matrices that got one."""
    return list(add_adapter(model, "lora", r=r, alpha=alpha, dropout=dropout, targets=list(targets)).parts)


def lora_layers(model):
    """[(name, layer)] of LoRA and its kin in the order of the model; empty for a plain model."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, (LoRALinear, QLoRALinear))]


def adapter_config(model):
    """{"method", its options}: what add_adapter rebuilds this adapter from; None if the model has none. Belongs beside the state dict
    in a checkpoint."""
    now = getattr(model, "adapter", None)
    return now.config if now else None


def base_args(model):
    """The ModelArgs without the adapter: virtual tokens shorten the context."""
    now = getattr(model, "adapter", None)
    return now.plain.get("args", model.args) if now else model.args


def set_adapter(model, adapter):
    """Take off the adapter that is on, if any, and put on `adapter`, an Adapter of this very model, or None: then the model is plain,
    unfrozen. Raises UserError for anything else."""
    now = getattr(model, "adapter", None)
    if adapter is now:
        return
    if not isinstance(adapter, Adapter | None):
        raise UserError(f"set_adapter wants what add_adapter or load_adapters gave, or None, not {adapter!r}")
    if now and not now.plain:
        raise UserError(f"the base of this {now.config['method']} adapter was let go to save memory: it cannot be taken off; load the base again")
    at = next(model.parameters())
    for name, thing in [*(now.plain if now else {}).items(), *(adapter.parts if adapter else {}).items()]:
        place(model, name, thing.to(at.device, at.dtype) if isinstance(thing, nn.Module) else thing)     # a model.to() has not reached it
    model.adapter = adapter
    choose_trained(model)


@contextmanager
def disable_adapter(model):
    """Inside, the model computes what the frozen base computes, bit for bit."""
    layers = [m for m in model.modules() if hasattr(m, "enabled")]       # also of a model that dist.wrap has wrapped
    before = [m.enabled for m in layers]
    for m in layers:
        m.enabled = False
    try:
        yield
    finally:
        for m, enabled in zip(layers, before):
            m.enabled = enabled


def merge_adapter(model, keep=False):
    """Add each update to its weight and put a plain Linear back, in place; the model is plain, unfrozen again. keep: so that
    unmerge_adapter can take it back, which holds a second copy of these weights.
    Raises UserError if there is nothing to merge, so a second merge cannot pass unnoticed, or nothing that can be."""
    now = getattr(model, "adapter", None)
    if not now:
        raise UserError("there is no adapter to merge: the model is plain, or was merged before")
    if now.config["method"] not in MERGEABLE:
        raise UserError(f"an adapter of the kind {now.config['method']} is no change of a weight, so it cannot be merged; keep it beside the model")
    for name, m in now.parts.items():
        plain = Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta")
        plain.weight, bias = nn.Parameter(m.merged_weight()), m.merged_bias() if hasattr(m, "merged_bias") else m.bias
        plain.bias = bias if bias is None else nn.Parameter(bias)
        place(model, name, plain.train(m.training))
    model.adapter, model.merged = None, now if keep else None
    choose_trained(model)
    return model


def unmerge_adapter(model):
    """Undo merge_adapter(model, keep=True), exactly. The adapter is on again, its base frozen."""
    if not getattr(model, "merged", None):
        raise UserError("there is nothing to unmerge: call merge_adapter(model, keep=True) before")
    merged, model.merged = model.merged, None
    set_adapter(model, merged)
    return model


def bake(model):
    """What only helped to train a prompt or a prefix goes, its output stays: the model computes the same."""
    now = model.adapter
    for part in now.parts.values():
        if hasattr(part, "bake"):
            part.bake()
            now.config = {"method": "prompt" if "tok_embeddings" in now.parts else "ptuning_v2", "n": now.config["n"]}


def adapter_state_dict(model):
    """Only the adapter: {'<name>.lora_A': (r, in), '<name>.lora_B': (out, r), …}."""
    return {k: v for k, v in model.state_dict().items() if OWN.search(k)}


def load_adapter_state_dict(model, state):
    """Fill the adapter of `model` from adapter_state_dict's form. Raises UserError unless names and shapes all fit."""
    own = adapter_state_dict(model)
    wrong = sorted(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"this adapter does not fit the model: {len(wrong)} tensors are missing, unknown or of another "
                        f"shape, the first is {wrong[0]}")
    model.load_state_dict(state, strict=False)


# ----------------------------------------------------------------------------------------------------------------
# Adapter and base


def fingerprint(model):
    """SHA-256 of a plain model's weights, names and fp32 numbers: by this an adapter knows its base."""
    h = hashlib.sha256()
    for name, weight in model.state_dict().items():
        h.update(f"{name} {tuple(weight.shape)}".encode())
        h.update(weight.detach().float().cpu().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()


def adapt(model, cfg, method, options, base=None):
    """Put on `model` the adapter that --peft names (peft.read); it will know its base, cfg.init_from, by path and hash. base: that plain
    language model, where `model` is made from it (a reward model). Returns the model."""
    known = {"path": str(cfg.init_from), "hash": fingerprint(base or model)}
    adapter = add_adapter(model, method, **options)
    adapter.base = known
    if method == "qlora":
        adapter.plain = {}                                   # the whole point: the weights in full precision are gone
        for p in model.parameters():
            p.data = p.data.clone()                          # the others' file, too, where they were still in it (checkpoint.load's mapped)
    return model


def to_meta(model, alone):
    """What meta.json tells of the adapter; None for a plain model. alone: the checkpoint holds no more than it. Raises UserError where
    that would be without a base."""
    now = getattr(model, "adapter", None)
    if now and alone and not now.base:
        raise UserError("--adapter_only: this adapter does not know its base; put it on with peft.adapt, or save the whole model")
    return {**now.config, "base": now.base, "alone": bool(alone)} if now else None


def of_meta(meta):
    """(config for add_adapter, base, alone) as meta.json tells; (None, {}, False) for a plain model."""
    table = dict(meta.get("adapter") or ({"method": "lora", **meta["lora"]} if meta.get("lora") else {}))        # "lora": version 2 at first
    base, alone = table.pop("base", {}), table.pop("alone", False)
    return table or None, base, alone


def check_base(model, base, path):
    """Raises UserError unless the plain `model` is the one that the adapter at `path` was trained on."""
    if base.get("hash") and fingerprint(model) != base["hash"]:
        raise UserError(f"{path} is an adapter for another base: it was trained on {base['path']} with weights {base['hash'][:8]}…, these are "
                        f"{fingerprint(model)[:8]}…; it fits that model and no other")


def load_state_dict(model, state, alone, assign=False):
    """A checkpoint's tensors into the model: all of them, or the adapter's alone. assign: the tensors themselves, not their numbers."""
    load_adapter_state_dict(model, state) if alone else model.load_state_dict(state, assign=assign)


def put_base(model, base, path, load):
    """Fill a fresh model with the weights of the base that the adapter-only checkpoint at `path` names; load: checkpoint.load. Raises
    UserError if it is not there, or another."""
    try:
        plain, _, _ = load(base.get("path", ""), plain=True)
    except UserError as e:
        raise UserError(f"{path} holds an adapter alone and wants its base, {base.get('path', 'which it does not name')}: {e}") from None
    check_base(plain, base, path)
    body = getattr(model, "backbone", model)
    body.load_state_dict({k: v for k, v in plain.state_dict().items() if k in body.state_dict()})


lora_config, lora_state_dict, load_lora_state_dict, merge_lora = adapter_config, adapter_state_dict, load_adapter_state_dict, merge_adapter
