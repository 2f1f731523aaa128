"""What is asked of exercise 16, and the solution: nanollm.peft.lora.LoRALinear."""
import torch
import torch.nn as nn

from learn.exercises.judge import Hint, equal, randn, same, shape
from nanollm.peft.lora import LoRALinear

NAME = "LoRALinear"
IN, OUT, R, ALPHA = 12, 10, 4, 8.0
reference = LoRALinear


def made(attempt, bias=True, r=R):
    base = nn.Linear(IN, OUT, bias=bias)
    return base, attempt(base, r, ALPHA)


def two_thin_matrices(attempt):
    """lora_A (r, in) and lora_B (out, r)"""
    _, layer = made(attempt)
    for name, sizes, axes in (("lora_A", (R, IN), "r in"), ("lora_B", (OUT, R), "out r")):
        if not isinstance(getattr(layer, name, None), nn.Parameter):
            raise Hint(f"{name} is no nn.Parameter of the layer, so no optimizer would find it: self.{name} = nn.Parameter(…)")
        shape(getattr(layer, name), sizes, name, axes)


def starts_as_base(attempt):
    """at first it is exactly the base layer"""
    x = randn(5, IN)
    for bias in (False, True):
        base, layer = made(attempt, bias)
        with torch.no_grad():
            if layer(x) is not None and not torch.allclose(layer(x), base(x)) and layer.lora_B.any():
                raise Hint("the first step does not start from the base model: lora_B must begin at zero, lora_A random" if layer.lora_A.any() else
                           "lora_B is random and lora_A zero; it is the other way round: A random, B zero")
            same(layer(x), base(x), "the output of the fresh layer", "N out", {"the bias of the base layer is lost": x @ base.weight.T,
            "the base layer is missing: W x + update": torch.zeros(5, OUT)})


def can_begin(attempt):
    """a gradient arrives although the update is zero"""
    _, layer = made(attempt)
    if not layer.lora_A.any():
        raise Hint("lora_A and lora_B are both zero: then neither ever gets a gradient, and nothing is learnt; A must be random" if not layer.lora_B.any() else
                   "lora_A is zero and lora_B random; it is the other way round: A random, B zero")
    rank = torch.linalg.matrix_rank(layer.lora_A.detach().float().nan_to_num())
    if rank < R:
        raise Hint(f"lora_A has rank {rank}, not r = {R}: where its rows are alike, the columns of B learn the same; A must be random")
    layer(randn(5, IN)).sum().backward()
    if layer.lora_B.grad is None or not layer.lora_B.grad.any():
        raise Hint("lora_B gets no gradient; .data, .detach() and torch.no_grad() cut it")


def frozen(attempt):
    """only A and B are trained"""
    base, layer = made(attempt)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    if not {"lora_A", "lora_B"} <= trained:
        raise Hint("lora_A and lora_B must be trainable")
    if trained - {"lora_A", "lora_B"}:
        raise Hint(f"the base is not frozen: {', '.join(sorted(trained - {'lora_A', 'lora_B'}))} would be trained too; base.requires_grad_(False)")
    if not any(p is base.weight for p in layer.parameters()):
        raise Hint("the base's own weight is not a parameter of the layer: keep base (self.base = base), do not copy it")
    equal(sum(p.numel() for p in layer.parameters() if p.requires_grad), R * (IN + OUT), "the number of trainable numbers")


def update(attempt):
    """W x + bias + alpha / r * B A x"""
    for r in (R, 2):
        base, layer = made(attempt, r=r)
        x, A, B = randn(5, IN), randn(r, IN, seed=1), randn(OUT, r, seed=2)
        with torch.no_grad():
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            y, change = base(x), x @ A.T @ B.T
            same(layer(x), y + ALPHA / r * change, f"the output with r = {r}, alpha = {ALPHA:g}", "N out", {
                "the scale is missing: alpha / r in front of B A x": y + change, "the scale is alpha; it should be alpha / r": y + ALPHA * change,
                "the scale is alpha / sqrt(r), that of rsLoRA; here alpha / r": y + ALPHA / r**0.5 * change,
                "the scale is turned round: alpha / r, not r / alpha": y + r / ALPHA * change,
                "the scale is 1 / r; alpha is missing": y + change / r, "the scale multiplies the base too: W x + alpha / r * B A x": ALPHA / r * (y + change),
                "the update is missing: the base layer alone came back": y, "the base layer is missing: W x + bias + update": ALPHA / r * change})


def both_learn(attempt):
    """as soon as B is not zero, A gets a gradient, too"""
    _, layer = made(attempt)
    with torch.no_grad():
        layer.lora_B.copy_(randn(OUT, R, seed=2))
    layer(randn(5, IN)).sum().backward()
    if layer.lora_A.grad is None or not layer.lora_A.grad.any():
        raise Hint("lora_A gets no gradient although lora_B is not zero, so only B would learn; .data, .detach() and torch.no_grad() cut it")


def any_axes(attempt):
    """it works on (batch, time, in), too"""
    base, layer = made(attempt)
    with torch.no_grad():
        same(layer(randn(2, 3, IN)), base(randn(2, 3, IN)), "the output for x (2, 3, in)", "B T out")


CHECKS = [two_thin_matrices, can_begin, starts_as_base, frozen, update, both_learn, any_axes]
