"""What is asked of exercise 05, and the solution: nanollm.model.naive_attention."""
import math

import torch

from learn.exercises.judge import Hint, close, gradient, on, randn, same, shape
from nanollm.model import naive_attention

NAME = "attention"
B, H, T, D = 2, 3, 5, 16
AXES = "B H T D"


def reference(q, k, v):
    return naive_attention(q, k, v, torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril())


def qkv(T=T):
    return randn(B, H, T, D), randn(B, H, T, D, seed=1), randn(B, H, T, D, seed=2)


def wrong(q, k, v, scale=None, mask="before", dim=-1):
    """Attention with a mistake in it."""
    scores = q @ k.mT / (math.sqrt(D) if scale is None else scale)
    below = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-1 if mask == "strict" else 0)
    below = below.T if mask == "future" else below
    if mask in ("before", "strict", "future"):
        scores = scores.masked_fill(~below, float("-inf"))
    probs = (scores * below if mask == "times" else scores).softmax(dim)
    if mask == "after":
        probs = probs * below
    return probs @ v


def sizes(attempt):
    """the shape is that of q"""
    got = attempt(*qkv())
    if not isinstance(got, torch.Tensor):
        same(got, torch.zeros(B, H, T, D))
    if tuple(got.shape) == (B, H, T, T):
        raise Hint(f"wrong shape: expected {(B, H, T, D)} (B, H, T, D), got {(B, H, T, T)}: those are the weights; multiply them by v")
    shape(got, (B, H, T, D), "the result", AXES)


def past_only(attempt):
    """no token looks at later ones"""
    q, k, v = qkv()
    before = attempt(q, k, v)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, -1] += 3
    after = attempt(*later)
    if (before - after)[:, :, :-1].nan_to_num().abs().max() < 1e-5:
        return
    for sentence, value in {
        "leaks the future: no mask is applied, so every token sees the whole text; fill the scores above the diagonal with -inf":
            wrong(q, k, v, mask="none"),
        "leaks the future: the mask comes after the softmax, so later tokens still count in its denominator; mask the scores before":
            wrong(q, k, v, mask="after"),
        "leaks the future: a masked score must be -inf; 0 still gets the weight exp(0) = 1": wrong(q, k, v, mask="times"),
        "leaks the future: the mask is upside down, tokens see only what comes later": wrong(q, k, v, mask="future"),
        "leaks the future: the softmax goes over the queries; it must go over the keys, dim=-1": wrong(q, k, v, dim=-2),
        "leaks the future, and 1 / sqrt(D) is missing": wrong(q, k, v, scale=1, mask="none")}.items():
        if close(before, value):
            raise Hint(sentence)
    raise Hint("leaks the future: when only the last token changes, the results of earlier ones change too")


def itself(attempt):
    """the first token sees itself and nothing else"""
    q, k, v = qkv()
    got = attempt(q, k, v)[:, :, 0]
    if got.isnan().any():
        raise Hint("NaN at the first token: a token may look at itself, so the diagonal belongs to what is allowed (tril(), not tril(-1)); "
                   "where everything is -inf the softmax is 0 / 0")
    same(got, v[:, :, 0], "the result at the first token, which is its own value v", "B H D",
         {"the first token sees the mean of all values: nothing but -1e9 or zeros stands in its row of scores": v.mean(2)})


def values(attempt):
    """softmax(q k^T / sqrt(D)) v"""
    q, k, v = qkv()
    same(attempt(q, k, v), reference(q, k, v), "the result", AXES, {
        "wrong scale: the scores are sqrt(D) = 4 times too large; divide by sqrt(D)": wrong(q, k, v, scale=1),
        "wrong scale: divide the scores by sqrt(D), not by D: D products of random numbers have the standard deviation sqrt(D)": wrong(q, k, v, scale=D),
        "wrong scale: the scores were multiplied by sqrt(D); divide": wrong(q, k, v, scale=D**-0.5),
        "wrong scale: divide by the root of D, the width of a head, not of T, the number of tokens": wrong(q, k, v, scale=math.sqrt(T)),
        "wrong scale: divide by the root of D, the width of one head, not of all heads together": wrong(q, k, v, scale=math.sqrt(H * D)),
        "the scale comes after the softmax; divide the scores before": wrong(q, k, v, scale=1) / math.sqrt(D),
        "q and k are swapped: a row of scores belongs to a query": wrong(k, q, v)})


def extremes(attempt):
    """large scores and a text of one token"""
    q, k, v = qkv()
    with on("scores around 10,000 (subtract the largest before exp, as torch.softmax does)"):
        same(attempt(100 * q, 100 * k, v), reference(100 * q, 100 * k, v), "the result", AXES)
    with on("a text of one token"):
        same(attempt(*qkv(1)), qkv(1)[2], "the result", AXES)


def learns(attempt):
    """gradients reach q, k and v"""
    q, k, v = (x.requires_grad_() for x in qkv())
    gradient(attempt(q, k, v), q, k, v, names="qkv")


CHECKS = [sizes, past_only, itself, values, extremes, learns]
