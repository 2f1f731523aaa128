"""Three small adapters beside the weights, by hand.

    adapter   y = W x + U gelu(D W x)   a bottleneck behind attention and feed-forward   (Houlsby et al. 2019, arXiv:1902.00751)
    ia3       y = l * (W x), W (l * x)  keys, values and the FFN's inside rescaled       (Liu et al. 2022, arXiv:2205.05638)
    bitfit    y = W x + b               biases alone                                      (Ben Zaken et al. 2021, arXiv:2106.10199)

U and b begin at 0, l at 1: step 0 is the base model.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.peft.lora import TARGETS, linears


class BottleneckLinear(nn.Linear):
    """The last matrix of a sub-layer, wo or w2, and behind it the bottleneck, before the residual is added. What it reads went through
    `base`, so it cannot be merged into a weight: it makes the model deeper."""

    def __init__(self, base, size):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.enabled = base.weight, base.bias, True
        self.requires_grad_(False)
        at = dict(device=base.weight.device)
        self.adapter_down, self.adapter_up = nn.Linear(base.out_features, size, **at), nn.Linear(size, base.out_features, **at)
        for p in (self.adapter_down.bias, *self.adapter_up.parameters()):
            nn.init.zeros_(p)
        self.train(base.training)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapter_up(F.gelu(self.adapter_down(y))) if self.enabled else y


class IA3Linear(nn.Linear):
    """l scales the input (w2) or the output (wk, wv); a rescaled row or column of W, so it can be merged."""

    def __init__(self, base, on_input):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.enabled = base.weight, base.bias, True
        self.requires_grad_(False)
        shape = (1, base.in_features) if on_input else (base.out_features, 1)                            # as peft has them
        self.ia3_l, self.on_input = nn.Parameter(torch.ones(shape, device=base.weight.device)), on_input
        self.train(base.training)

    def forward(self, x):
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        l = self.ia3_l.flatten()
        if self.on_input:
            return F.linear((l * x).type_as(x), self.weight, self.bias)
        y = F.linear(x, self.weight, self.bias)
        return (l * y).type_as(y)                            # under autocast l is fp32, and queries and keys must agree

    @torch.no_grad()
    def merged_weight(self):
        return (self.weight.float() * self.ia3_l.float()).to(self.weight.dtype)

    @torch.no_grad()
    def merged_bias(self):
        return self.bias if self.bias is None or self.on_input else self.bias * self.ia3_l.flatten()


class BiasLinear(nn.Linear):
    """LLaMA has no biases to tune: each matrix gets one. Not merged: the plain model has no place for it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.enabled = base.weight, base.bias, True
        self.requires_grad_(False)
        self.bitfit_b = nn.Parameter(torch.zeros(base.out_features, device=base.weight.device))
        self.train(base.training)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return (y + self.bitfit_b).type_as(y) if self.enabled else y


def adapter(model, size=16):
    """size: of the bottleneck."""
    if size < 1:
        raise UserError(f"--peft adapter: size must be at least 1, got {size}")
    return {name: BottleneckLinear(base, size) for name, base in linears(model, ["wo", "w2"]).items()}


def ia3(model):
    return {name: IA3Linear(base, on_input=name.endswith("w2")) for name, base in linears(model, ["wk", "wv", "w2"]).items()}


def bitfit(model):
    return {name: BiasLinear(base) for name, base in linears(model, TARGETS).items()}
