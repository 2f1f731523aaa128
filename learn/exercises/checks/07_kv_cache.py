"""What is asked of exercise 07, and the solution: nanollm.model.KVCache."""
import torch

from learn.exercises.judge import Hint, equal, on, parts, randint, randn, same
from nanollm.model import KVCache, ModelArgs, Transformer

NAME = "KVCache"
B, G, D = 9, 6, 7
AXES = "B G S D"
reference = KVCache


def kv(T, seed=0):
    return randn(B, G, T, D, seed=seed), randn(B, G, T, D, seed=seed + 100)


def extended(cache, layer, k, v):
    return parts(cache.extend(layer, k, v), ("k", "v"))


def length_of(cache):
    if callable(cache.length):
        raise Hint("cache.length is a method; keep it a @property, the model reads it without brackets")
    return cache.length


def empty(attempt):
    """a new cache has length 0"""
    with on("a cache that has read nothing"):
        equal(length_of(attempt()), 0, "the length")


def first(attempt):
    """the first tokens come back as they are"""
    k, v = kv(3)
    for got, want, name in zip(extended(attempt(), "a", k, v), (k, v), "kv"):
        same(got, want, f"{name} after the first extend", AXES, {"k and v are swapped": v if name == "k" else k})


def second(attempt):
    """old tokens first, new ones behind them"""
    cache, (k, v), (k1, v1) = attempt(), kv(3), kv(1, 1)
    extended(cache, "a", k, v)
    for got, old, new, name in zip(extended(cache, "a", k1, v1), (k, v), (k1, v1), "kv"):
        same(got, torch.cat((old, new), 2), f"{name} after 3 + 1 tokens", AXES, {
            "only the new tokens came back: the old ones are forgotten": new, "only the old tokens came back: the new ones were not added": old,
            "the new tokens stand in front of the old: they belong behind them": torch.cat((new, old), 2)})
    k2, v2 = kv(1, 2)
    got, _ = extended(cache, "a", k2, v2)
    same(got, torch.cat((k, k1, k2), 2), "k after 3 + 1 + 1 tokens", AXES, {
        "the result of the second extend was not kept: the third begins again from the first tokens": torch.cat((k, k2), 2),
        "the cache keeps only the newest tokens: store the whole result": torch.cat((k1, k2), 2)})


def layers(attempt):
    """each layer has its own"""
    cache, (k, v), (k1, v1) = attempt(), kv(3), kv(3, 1)
    extended(cache, "a", k, v)
    got = extended(cache, "b", k1, v1)
    same(got[0], k1, "k of a second layer", AXES, {"the layers share one store: a layer got the keys of another; keep (k, v) by layer": torch.cat((k, k1), 2)})
    same(got[1], v1, "v of a second layer", AXES)


def counted(attempt):
    """length counts tokens, not calls, and not layers"""
    cache = attempt()
    for layer in "ab":
        extended(cache, layer, *kv(3))
    for layer in "ab":
        extended(cache, layer, *kv(1))
    equal(length_of(cache), 4, "the length after 3 + 1 tokens in two layers", {
        "the length counts tokens once, not once for each layer: got 8 for 3 + 1 tokens in two layers": 8,
        "the length is that of the newest piece: 1": 1, "the length counts calls: 2 for one layer": 2,
        "the length stays that of the first piece": 3, "the length is the number of text rows or layers; take the time axis, size(2)": B,
        "the length was read from the wrong axis: (B, G, S, D), S is size(2)": G})
    five = attempt()
    extended(five, "a", *kv(5))
    equal(length_of(five), 5, "the length after one piece of 5 tokens", {
        "the length counts calls of extend, not tokens": 1, "the length was read from the wrong axis: (B, G, S, D), S is size(2)": D})


def apart(attempt):
    """two caches know nothing of each other"""
    one, two = attempt(), attempt()
    extended(one, "a", *kv(3))
    if length_of(two):
        raise Hint("a second, new cache is not empty: what stands directly under `class` is shared by all caches; make it in __init__")


def decoding(attempt):
    """a model that writes with it gives the same logits as one that reads all at once"""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=16, n_layers=2, n_heads=2, vocab_size=32, max_seq_len=16, multiple_of=8)).eval()
    tokens, own = randint(32, 2, 7), attempt()

    class Cache:                                                 # what the model looks at; an attempt may give these names another meaning
        segments, extend = None, staticmethod(own.extend)
        length = position = property(lambda self: own.length)

    cache = Cache()
    with torch.no_grad():
        got = torch.cat([model(piece, cache=cache) for piece in tokens.split([4, 1, 1, 1], 1)], 1)
        same(got, model(tokens), "the logits, 4 + 1 + 1 + 1 tokens", "B T V", tolerance=1e-3)


CHECKS = [empty, apart, first, second, layers, counted, decoding]
