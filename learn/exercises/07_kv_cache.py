"""07  KV cache: keep the keys and values of the tokens already read.

中文：实现 KV 缓存：保存已读词元的键和值，使每生成一个新词元只需计算一列。

A model writes one token after another, and each new token looks at all before it. Their keys and values never change: later
tokens are invisible to earlier ones. So every layer keeps them, and a new token costs one row of attention instead of the whole square. A
cache for a text of S tokens holds 2 * layers * G * D * S numbers.

    k_all = [k of the tokens before | k of the new ones],  v_all likewise, in every layer;  length = tokens read so far

Pope et al. 2022 (arXiv:2211.05102). The solution: `KVCache` in nanollm/model.py. Judge:  python -m learn.exercises 07
"""
import torch


class KVCache:
    """One cache for one text (or one batch of texts) and all layers of a model."""

    def __init__(self):
        # Hint 1: a dict, layer -> (k, v), made here: what stands directly under `class` is shared by all caches.
        raise NotImplementedError("write KVCache.__init__")

    @property
    def length(self):
        """The number of tokens read so far, 0 at first. All layers have read the same ones."""
        # Hint 2: the size of the time axis of any layer's keys.
        raise NotImplementedError("write KVCache.length")

    def extend(self, layer, k, v):
        """layer: any hashable thing that names a layer. k, v (B, G, T, D) of the T newest tokens, T often 1.
        -> k, v (B, G, S, D) of all S tokens that this layer has read, the new ones last."""
        # Hint 3: torch.cat((old, new), dim=2), once for k and once for v; keep the result, and return it.
        raise NotImplementedError("write KVCache.extend")
