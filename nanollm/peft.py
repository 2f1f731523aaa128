"""LoRA by hand (Hu et al. 2021, arXiv:2106.09685): freeze W, learn a low-rank update B A beside it.

    y = W x + (alpha / r) * B A x          A (r, in) random, B (out, r) zero: step 0 is exactly the base model

    inject_lora(model, r=8, alpha=16)      now only A and B train: r * (in + out) numbers for each matrix
    with disable_adapter(model): ...       the base model, bit for bit (the reference of DPO needs no second model)
    merge_lora(model)                      W += (alpha / r) * B A, and the plain model is back, at no cost per token

A LoRALinear is an nn.Linear with two more parameters, so every base weight keeps its name. The state dict of an
adapted model is therefore the plain one plus '<name>.lora_A' and '<name>.lora_B', and with `lora_config(model)` beside
it a checkpoint holds all that is needed to go on exactly. Adapter files in PEFT's layout: see hf.py.
"""
import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")     # not `output`: tied, it is the embedding too


class LoRALinear(nn.Linear):
    """The Linear `base` (its very weight, now frozen) plus a trainable update of rank r. x (…, in) -> (…, out)."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.r, self.alpha, self.scaling, self.enabled = r, alpha, alpha / r, True
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        self.lora_dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))            # = uniform(-1/sqrt(in), 1/sqrt(in))
        self.train(base.training)                                        # a model in eval mode must stay there

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return y + self.scaling * F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged_weight(self):
        """W + (alpha / r) * B A, added up in fp32 whatever the dtype of W."""
        return (self.weight.float() + self.scaling * (self.lora_B.float() @ self.lora_A.float())).to(self.weight.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}"


def lora_layers(model):
    """[(name, LoRALinear)] in the order of the model; empty for a plain model."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def inject_lora(model, r=8, alpha=16, dropout=0.0, targets=TARGETS):
    """Freeze the model and put an adapter on every Linear whose last name is in `targets`. Returns their names.
    Raises UserError for an unknown target, an impossible r or dropout, or a model that has an adapter already."""
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets:
        wrong = ", ".join(map(repr, unknown)) or "none given"
        raise UserError(f"LoRA targets: {wrong}; choose from {' '.join(TARGETS)}")
    if r < 1 or not 0 <= dropout < 1:
        raise UserError(f"LoRA: the rank must be at least 1 and dropout in [0, 1), got r {r} and dropout {dropout}")
    if lora_layers(model):
        raise UserError("the model carries a LoRA adapter already; merge it (merge_lora) before adding another")
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in targets]
    if not found:
        raise UserError(f"LoRA targets {' '.join(targets)}: this model has none of them; choose others from {' '.join(TARGETS)}")
    model.requires_grad_(False)
    for name, base in found:
        replace(model, name, LoRALinear(base, r, alpha, dropout))
    return [name for name, _ in found]


def lora_config(model):
    """{"r", "alpha", "dropout", "targets"}: the arguments with which inject_lora rebuilds this adapter; None if the
    model has none. Belongs beside the state dict in a checkpoint."""
    layers = lora_layers(model)
    if not layers:
        return None
    used = {name.split(".")[-1] for name, _ in layers}
    _, m = layers[0]
    return {"r": m.r, "alpha": m.alpha, "dropout": m.lora_dropout.p, "targets": [t for t in TARGETS if t in used]}


@contextmanager
def disable_adapter(model):
    """Inside, the model computes what the frozen base computes, bit for bit."""
    layers = [m for _, m in lora_layers(model)]
    before = [m.enabled for m in layers]
    for m in layers:
        m.enabled = False
    try:
        yield
    finally:
        for m, enabled in zip(layers, before):
            m.enabled = enabled


def merge_lora(model):
    """Add each update to its weight and put a plain Linear back, in place; the model is plain, unfrozen again.
    Raises UserError if there is nothing to merge, so a second merge cannot pass unnoticed."""
    layers = lora_layers(model)
    if not layers:
        raise UserError("there is no LoRA adapter to merge: the model is plain, or was merged before")
    for name, m in layers:
        plain = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(m.merged_weight()), m.bias
        replace(model, name, plain)
    model.requires_grad_(True)
    return model


def lora_state_dict(model):
    """Only the adapter: {'<name>.lora_A': (r, in), '<name>.lora_B': (out, r)}."""
    return {k: v for k, v in model.state_dict().items() if k.endswith((".lora_A", ".lora_B"))}


def load_lora_state_dict(model, state):
    """Fill the adapter of `model` from lora_state_dict's form. Raises UserError unless names and shapes all fit."""
    own = lora_state_dict(model)
    wrong = sorted(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"this adapter does not fit the model: {len(wrong)} tensors are missing, unknown or of another "
                        f"shape, the first is {wrong[0]}")
    model.load_state_dict(state, strict=False)
