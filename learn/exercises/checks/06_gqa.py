"""What is asked of exercise 06, and the solution: nanollm.model.Attention.forward, its lines between the projections."""
import torch
import torch.nn.functional as F

from learn.exercises.judge import Hint, gradient, on, randn, same, shape
from nanollm.model import naive_attention

NAME = "grouped_query_attention"
B, H, G, T, D = 2, 6, 2, 5, 8
AXES = "B H T D"


def reference(q, k, v):
    n, T = q.size(1) // k.size(1), q.size(2)
    k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
    return naive_attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril())


def qkv(G=G):
    return randn(B, H, T, D), randn(B, G, T, D, seed=1), randn(B, G, T, D, seed=2)


def sizes(attempt):
    """H heads come out, as went in"""
    got = attempt(*qkv())
    if not isinstance(got, torch.Tensor):
        same(got, torch.zeros(B, H, T, D))
    if tuple(got.shape) == (B, G, T, D):
        raise Hint(f"wrong shape: expected {(B, H, T, D)}, got {(B, G, T, D)}: only G heads came out; the keys and values are shared, the queries are not")
    shape(got, (B, H, T, D), "the result", AXES)


def same_as_mha(attempt):
    """G = H is plain multi-head attention"""
    q, k, v = qkv(H)
    with on("G = H"):
        same(attempt(q, k, v), reference(q, k, v), "the result", AXES, mistakes(q, k, v))


def mistakes(q, k, v):
    attend = F.scaled_dot_product_attention
    n = H // k.size(1)
    spread = [x.repeat_interleave(n, 1) for x in (k, v)]
    tiled, first, mean = ([f(x) for x in (k, v)] for f in (lambda x: x.repeat(1, n, 1, 1), lambda x: x[:, :1].expand(-1, H, -1, -1),
                                                            lambda x: x.mean(1, keepdim=True).expand(-1, H, -1, -1)))
    return {"leaks the future: attention is causal (is_causal=True, or a mask)": attend(q, *spread),
            "leaks the future: attention is causal (is_causal=True, or a mask); and the heads are copied as 0 1 0 1 where 0 0 1 1 is wanted": attend(q, *tiled),
            "the key/value heads are copied as 0 1 0 1 (repeat); neighbours share, 0 0 0 1 1 1 (repeat_interleave)": attend(q, *tiled, is_causal=True),
            "all query heads read key/value head 0; the others were left out": attend(q, *first, is_causal=True),
            "the key/value heads were averaged; each serves its own group": attend(q, *mean, is_causal=True),
            "keys and values are copied in different orders": attend(q, spread[0], tiled[1], is_causal=True),
            "keys and values are copied in different orders ": attend(q, tiled[0], spread[1], is_causal=True),
            "wrong scale: divide the scores by sqrt(D)": attend(q, *spread, is_causal=True, scale=1.0),
            "the result is the sum over the heads of a group": attend(q, *spread, is_causal=True).unflatten(1, (-1, n)).sum(2).repeat_interleave(n, 1)}


def groups(attempt):
    """neighbouring query heads share a key/value head"""
    q, k, v = qkv()
    same(attempt(q, k, v), reference(q, k, v), "the result", AXES, mistakes(q, k, v))


def one_for_all(attempt):
    """G = 1, multi-query attention; any H / G"""
    for G in (1, 3):
        q, k, v = qkv(G)
        with on(f"H = {H}, G = {G}"):
            same(attempt(q, k, v), reference(q, k, v), "the result", AXES, mistakes(q, k, v))


def learns(attempt):
    """a key/value head gets the gradients of all its query heads"""
    q, k, v = (x.requires_grad_() for x in qkv())
    weight = randn(B, H, T, D, seed=3)
    got = gradient(attempt(q, k, v) * weight, q, k, v, names="qkv")
    same(got[2], gradient(reference(q, k, v) * weight, v)[0], "the gradient of v", "B G T D")


CHECKS = [sizes, same_as_mha, groups, one_for_all, learns]
