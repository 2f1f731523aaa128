"""What is asked of exercise 03, and the solution: nanollm.model.RMSNorm."""
import torch

from learn.exercises.judge import Hint, gradient, on, randn, same
from nanollm.model import RMSNorm

NAME = "rms_norm"


def reference(x, weight, eps):
    return torch.func.functional_call(RMSNorm(len(weight), eps), {"weight": weight}, (x,))


def unit(attempt):
    """the mean square of every token becomes 1"""
    x, one = 3 * randn(2, 4, 8) + 1, torch.ones(8)
    rms = x.pow(2).mean(-1, keepdim=True).sqrt()
    same(attempt(x, one, 1e-5), reference(x, one, 1e-5), "the result", "B T C", {
        "the root is missing: x was divided by the mean square": x / rms**2,
        "sum instead of mean: x was divided by the root of the sum of squares": x / x.norm(dim=-1, keepdim=True),
        "the mean was subtracted, as LayerNorm does; RMSNorm leaves x where it is": torch.layer_norm(x, (8,)),
        "x was divided by its standard deviation, which subtracts the mean; take the mean of x^2": x / x.std(-1, keepdim=True, unbiased=False),
        "one number for all tokens: take the mean over the last axis alone, with keepdim=True": x / x.pow(2).mean().sqrt(),
        "the mean went over the tokens: take it over the last axis, dim=-1": x / x.pow(2).mean(1, keepdim=True).sqrt(),
        "x was divided by the mean of |x|: square, mean, root": x / x.abs().mean(-1, keepdim=True)})


def gain(attempt):
    """each channel has its gain"""
    x, weight = randn(2, 4, 8), randn(8, seed=1)
    y = reference(x, torch.ones(8), 1e-5)
    same(attempt(x, weight, 1e-5), y * weight, "the result", "B T C", {
        "the gain `weight` is missing": y, "the gain multiplies; it was added": y + weight, "the gain multiplies; it was divided by": y / weight,
        "1 + weight is Gemma's form; here the gain itself multiplies": y * (1 + weight),
        "weight came before the norm, which takes part of it away again; multiply at the end": reference(x * weight, torch.ones(8), 1e-5)})


def place_of_eps(attempt):
    """eps inside the root"""
    x, one = 0.03 * randn(2, 4, 8), torch.ones(8)
    square = x.pow(2).mean(-1, keepdim=True)
    same(attempt(x, one, 1e-3), reference(x, one, 1e-3), "the result for a small x", "B T C", {
        "eps is forgotten": x / square.sqrt(), "eps belongs inside the root: sqrt(mean + eps), not sqrt(mean) + eps": x / (square.sqrt() + 1e-3),
        "eps is not used: it is an argument": reference(x, one, 1e-5), "eps is not used: it is an argument, 1e-6 is not always it": reference(x, one, 1e-6),
        "eps is no smallest value: add it": x / square.clamp(min=1e-3).sqrt()})


def zeros(attempt):
    """a token of zeros"""
    with on("a vector of zeros"):
        same(attempt(torch.zeros(1, 8), torch.ones(8), 1e-5), torch.zeros(1, 8), "the result")


def half(attempt):
    """fp16 in, fp16 out, and no overflow in between"""
    x = (300 * randn(2, 8)).half()
    got, want = attempt(x, torch.ones(8).half(), 1e-5), reference(x, torch.ones(8).half(), 1e-5)
    if got.dtype == torch.float32:
        raise Hint("an fp16 x came back as fp32: return the type of x, y.type_as(x)")
    same(got, want, "the result for fp16 numbers of size 300", "B C", {
        "the squares overflowed fp16 (300^2 is more than 65,504): x.float() first, and back at the end": torch.zeros(2, 8).half()}, 2e-3)


def learns(attempt):
    """gradients reach x and the gain"""
    x, weight = randn(2, 8).requires_grad_(), randn(8, seed=1).requires_grad_()
    got = gradient(attempt(x, weight, 1e-5) ** 2, x, weight, names=("x", "weight"))
    want = gradient(reference(x, weight, 1e-5) ** 2, x)
    same(got[0], want[0], "the gradient of x", "B C")


CHECKS = [unit, gain, place_of_eps, zeros, half, learns]
