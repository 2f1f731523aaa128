"""What is asked of exercise 08, and the solution: nanollm.model.FeedForward."""
import torch
import torch.nn.functional as F

from learn.exercises.judge import Hint, gradient, randn, same, shape
from nanollm.model import FeedForward, ModelArgs

NAME = "swiglu_ffn"
B, T, C, WIDE = 2, 3, 8, 12


def reference(x, w1, w2, w3):
    network = FeedForward(ModelArgs(dim=x.size(-1), hidden_dim=len(w1)))
    return torch.func.functional_call(network, {"w1.weight": w1, "w2.weight": w2, "w3.weight": w3}, (x,))


def given():
    return randn(B, T, C), randn(WIDE, C, seed=1), randn(C, WIDE, seed=2), randn(WIDE, C, seed=3)


def sizes(attempt):
    """from C up to F and back to C"""
    got = attempt(*given())
    if not isinstance(got, torch.Tensor):
        same(got, torch.zeros(B, T, C))
    if tuple(got.shape) == (B, T, WIDE):
        raise Hint(f"wrong shape: expected {(B, T, C)} (B, T, C), got {(B, T, WIDE)}: the down projection w2 is missing")
    shape(got, (B, T, C), "the result", "B T C")


def values(attempt):
    """silu(gate) times up, then down"""
    x, w1, w2, w3 = given()
    gate, up = x @ w1.T, x @ w3.T
    same(attempt(x, w1, w2, w3), reference(x, w1, w2, w3), "the result", "B T C", {sentence: h @ w2.T for sentence, h in {
        "gate and up are swapped: silu belongs to w1, not to w3": gate * F.silu(up),
        "the nonlinearity is a bare sigmoid (that is GLU); silu(z) is z * sigmoid(z)": torch.sigmoid(gate) * up,
        "the nonlinearity is ReLU (that is ReGLU); SwiGLU takes silu": F.relu(gate) * up,
        "the nonlinearity is GELU (that is GEGLU); SwiGLU takes silu": F.gelu(gate) * up,
        "the nonlinearity is GELU (that is GEGLU); SwiGLU takes silu ": F.gelu(gate, approximate="tanh") * up,
        "the nonlinearity is tanh; SwiGLU takes silu": torch.tanh(gate) * up,
        "the nonlinearity is missing: without silu the gate is only a product": gate * up,
        "the paths are added; a gate multiplies": F.silu(gate) + up,
        "both paths go through silu; only the gate does": F.silu(gate) * F.silu(up),
        "silu came after the product; it belongs to the gate alone": F.silu(gate * up),
        "w3 is not used: that is the classic network with two matrices": F.silu(gate),
        "the gate is w1 x both times; the other path is w3 x": F.silu(gate) * gate}.items()})


def learns(attempt):
    """gradients reach x and all three matrices"""
    inputs = [x.requires_grad_() for x in given()]
    gradient(attempt(*inputs), *inputs, names=("x", "w1", "w2", "w3"))


CHECKS = [sizes, values, learns]
