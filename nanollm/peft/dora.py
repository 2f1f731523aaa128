"""DoRA by hand (Liu et al. 2024, arXiv:2402.09353): LoRA turns the rows of W, a number for each row sets their length.

    W' = m * (W + s B A) / |W + s B A|          |.| (out,): the length of each row; m begins as |W|: step 0 is the base model

A full update changes length and direction of a row freely, LoRA's low rank ties the two together (section 3.2).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.peft.lora import TARGETS, LoRALinear, check, linears, product


class DoRALinear(LoRALinear):
    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__(base, r, alpha, dropout)
        self.lora_magnitude_vector = nn.Parameter(base.weight.detach().float().norm(dim=1))              # m (out,)

    def gain(self):
        """m / |W + s B A| (out,). The length counts as a constant in the backward pass: a quarter less memory (section 4.3)."""
        with torch.no_grad():
            length = (self.weight.float() + self.scaling * self.lora_B.float() @ self.lora_A.float()).norm(dim=1)
        return self.lora_magnitude_vector / length

    def forward(self, x):
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        plain, g = F.linear(x, self.weight), self.gain()
        dropped = F.linear(self.lora_dropout(x), self.weight) if self.training and self.lora_dropout.p else plain
        y = plain + (g - 1) * dropped + g * self.update(x)               # without dropout g * (W + s B A) x
        return (y if self.bias is None else y + self.bias).type_as(plain)                                # under autocast the g are fp32

    @torch.no_grad()
    def merged_weight(self):
        W = self.weight.float() + self.scaling * product(self.lora_B, self.lora_A)
        length = W.cpu().double().norm(dim=1).to(W)                      # the same bits on every machine, as product
        return ((self.lora_magnitude_vector / length)[:, None] * W).to(self.weight.dtype)


def dora(model, r=8, alpha=16.0, dropout=0.0, targets=TARGETS):
    check(r, alpha, dropout)
    return {name: DoRALinear(base, r, alpha, dropout) for name, base in linears(model, targets).items()}
