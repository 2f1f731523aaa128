"""LoRA by hand (Hu et al. 2021, arXiv:2106.09685): freeze W, learn a low-rank update B A beside it.

    y = W x + s * B A x          A (r, in) random, B (out, r) zero: step 0 is exactly the base model (qlora: the one in 4 bits)

    lora     s = alpha / r
    rslora   s = alpha / sqrt(r)          (Kalajdzievski 2023, arXiv:2312.03732): the update's size no longer falls with the rank
    qlora    W in 4 bits, A and B as ever (Dettmers et al. 2023, arXiv:2305.14314): quant.py

A LoRALinear is an nn.Linear with two more parameters, so every base weight keeps its name. The state dict of an adapted
model is therefore the plain one plus '<name>.lora_A' and '<name>.lora_B'.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.quant import NF4Linear

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")     # not `output`: tied, it is the embedding too


def product(B, A):
    """B A (out, in) in fp32, column times row by column times row: the same bits on every machine, where @ adds in an order of its own: an
    adapter trained on a merged model knows that base again by a hash of its bits (peft.fingerprint)."""
    return sum(b[:, None] * a for b, a in zip(B.float().T, A.float()))


class LoRALinear(nn.Linear):
    """The Linear `base` (its very weight, now frozen) plus a trainable update of rank r. x (…, in) -> (…, out)."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")      # no memory: the weight is base's
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.add_update(base, r, alpha, dropout, rslora)

    def add_update(self, base, r, alpha, dropout, rslora=False):
        self.r, self.alpha, self.scaling, self.enabled = r, alpha, alpha / (math.sqrt(r) if rslora else r), True
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        self.lora_dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))            # = uniform(-1/sqrt(in), 1/sqrt(in))
        self.train(base.training)                                        # a model in eval mode must stay there

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.update(x) if self.enabled else y

    def update(self, x):
        return self.scaling * F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged_weight(self):
        """W + s * B A, added up in fp32 whatever the dtype of W."""
        return (self.weight.float() + self.scaling * product(self.lora_B, self.lora_A)).to(self.weight.dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}"


class QLoRALinear(NF4Linear):
    """LoRA beside a weight in 4 bits, which is unpacked for each product (NF4Linear.weight) and never trained. Merging adds up what the 4 bits stand for."""
    add_update, update, merged_weight = LoRALinear.add_update, LoRALinear.update, LoRALinear.merged_weight

    def __init__(self, base, r, alpha, dropout=0.0, double=True):
        super().__init__(base, double=double)
        self.add_update(base, r, alpha, dropout)

    def forward(self, x):
        y = super().forward(x)
        return y + self.update(x) if self.enabled else y


def linears(model, targets):
    """{name: Linear} of the model's Linears whose last name is in `targets`. Raises UserError for an unknown target, or none."""
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets:
        wrong = ", ".join(map(repr, unknown)) or "none given"
        raise UserError(f"LoRA targets: {wrong}; choose from {' '.join(TARGETS)}")
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in targets}
    if not found:
        raise UserError(f"LoRA targets {' '.join(targets)}: this model has none of them; choose others from {' '.join(TARGETS)}")
    return found


def check(r, alpha, dropout):
    if r < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise UserError(f"LoRA: the rank must be at least 1, alpha above 0 and dropout in [0, 1), got r {r}, alpha {alpha} and dropout {dropout}")


# What --peft names: a function (model, option=default, …) -> {place in the model: what is to stand there}


def lora(model, r=8, alpha=16.0, dropout=0.0, targets=TARGETS):
    check(r, alpha, dropout)
    return {name: LoRALinear(base, r, alpha, dropout) for name, base in linears(model, targets).items()}


def rslora(model, r=8, alpha=16.0, dropout=0.0, targets=TARGETS):
    check(r, alpha, dropout)
    return {name: LoRALinear(base, r, alpha, dropout, rslora=True) for name, base in linears(model, targets).items()}


def qlora(model, r=8, alpha=16.0, dropout=0.0, targets=TARGETS, double=True):
    """double: the scales of the 4-bit blocks are in 8 bits themselves (QLoRA, section 3)."""
    check(r, alpha, dropout)
    return {name: QLoRALinear(base, r, alpha, dropout, double) for name, base in linears(model, targets).items()}
