"""What is asked of exercise 04, and the solution: nanollm.model.rope_table and apply_rope."""
import torch

from learn.exercises.judge import Hint, gradient, randn, same, shape
from nanollm.model import apply_rope, rope_table

NAME = "rope"
B, H, T, D = 2, 3, 5, 8


def reference(x, positions, theta=10000.0):
    cos, sin = rope_table(x.size(-1), int(positions.max()) + 1, theta)
    return apply_rope(x, cos[positions], sin[positions])


def turned(x, angle, sign=1):
    """x rotated by angle (…, T, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * angle.cos() - sign * x2 * angle.sin(), x2 * angle.cos() + sign * x1 * angle.sin()), -1)


def sizes(attempt):
    """the shape is that of x"""
    got = attempt(randn(B, H, T, D), torch.arange(T))
    if not isinstance(got, torch.Tensor):
        same(got, torch.zeros(B, H, T, D))
    shape(got, (B, H, T, D), "the result", "B H T D")


def rotation(attempt):
    """each pair is turned by position times frequency"""
    x, at = randn(B, H, T, D), torch.arange(T)
    freq = lambda power: 10000.0 ** -power
    i = torch.arange(D // 2)
    angle, even = torch.outer(at.float(), freq(2 * i / D)), x.unflatten(-1, (-1, 2))
    pairs = turned(torch.cat((even[..., 0], even[..., 1]), -1), angle)
    interleaved = torch.stack(pairs.chunk(2, -1), -1).flatten(-2)
    x1, x2 = x.chunk(2, -1)
    mirrored = torch.cat((x1 * angle.cos() + x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()), -1)
    same(attempt(x, at), reference(x, at), "the result", "B H T D", {
        "the pairs are (x_0, x_1), (x_2, x_3), …, as in the paper and in GPT-J; here they are halves, (x_i, x_{i + D/2}), as in Hugging Face": interleaved,
        "the pairs are (x_0, x_1), (x_2, x_3), …; here they are halves, (x_i, x_{i + D/2}), as in Hugging Face": pairs,
        "it turns the other way: a sign is swapped, the first half is x1 cos - x2 sin": turned(x, angle, -1),
        "a minus is missing: with + in both halves nothing is rotated": mirrored,
        "the exponent is -i / D and should be -2i / D: the frequencies fall too slowly": turned(x, torch.outer(at.float(), freq(i / D))),
        "the frequencies rise: the exponent wants a minus, theta ** (-2i / D)": turned(x, torch.outer(at.float(), freq(-2 * i / D))),
        "the exponent is divided by D/2 where it should be by D": turned(x, torch.outer(at.float(), freq(4 * i / D))),
        "the positions were counted from 1: the first token is not turned at all": turned(x, torch.outer(at + 1.0, freq(2 * i / D))),
        "the angles were added; they must turn the pairs": x + angle.repeat(1, 2),
        "every pair turns at one speed: the frequency falls from pair to pair": turned(x, at[:, None].float().expand(T, D // 2)),
        "x came back as it was": x})


def lengths(attempt):
    """a rotation keeps every length"""
    x = randn(B, H, T, D)
    same(attempt(x, torch.arange(T)).norm(dim=-1), x.norm(dim=-1), "the length of the rotated vectors", "B H T")


def in_the_middle(attempt):
    """the positions that are given, not 0 … T - 1"""
    x, at = randn(B, H, T, D), torch.tensor([7, 8, 9, 20, 3])
    same(attempt(x, at), reference(x, at), "the result at positions 7, 8, 9, 20, 3", "B H T D", {
        "`positions` is not used: with a cache the first token of x may be the eighth of the text": reference(x, torch.arange(T)),
        "only the first of `positions` is used: take each": reference(x, torch.arange(T) + 7)})


def other_theta(attempt):
    """theta is an argument"""
    x, at = randn(B, H, T, D), torch.arange(T)
    same(attempt(x, at, theta=500.0), reference(x, at, 500.0), "the result with theta = 500", "B H T D",
         {"theta is not used: 10000 stands in the code": reference(x, at)})


def distance(attempt):
    """a dot product knows only the distance"""
    q, k = randn(1, 1, 1, D), randn(1, 1, 1, D, seed=1)
    dot = lambda m, n: (attempt(q, torch.tensor([m])) * attempt(k, torch.tensor([n]))).sum()
    same(dot(9, 4), dot(105, 100), "the dot product of positions 9 and 4, and of 105 and 100")


def half(attempt):
    """bf16 in, bf16 out; gradients pass"""
    x = randn(B, H, T, D).bfloat16()
    got = attempt(x, torch.arange(T) + 300)
    if got.dtype != torch.bfloat16:
        raise Hint(f"a bf16 x came back as {str(got.dtype).removeprefix('torch.')}: return the type of x, y.type_as(x)")
    same(got, reference(x, torch.arange(T) + 300), "the result in bf16 at position 300 (compute the angles in fp32)", "B H T D", tolerance=2e-2)
    x = randn(B, H, T, D).requires_grad_()
    gradient(attempt(x, torch.arange(T)), x, names=("x",))


CHECKS = [sizes, rotation, lengths, in_the_middle, other_theta, distance, half]
