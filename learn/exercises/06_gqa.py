"""06  Grouped-query attention: several query heads share one key and value head.

中文：实现分组查询注意力 GQA：每个键/值头服务 H / G 个查询头，结果与复制键值头之后的普通注意力相同。

While a model writes, it keeps the keys and values of all earlier tokens: the cache, often larger than what one reads from the
weights. GQA keeps G key and value heads for H query heads, so the cache is H / G times smaller and the quality nearly the same. Query
heads 0 … H/G - 1 read key/value head 0, the next H/G read head 1, and so on. G = H is multi-head attention, G = 1 multi-query.

    head h:   softmax(q_h k_g^T / sqrt(D) + causal mask) v_g,        g = h // (H / G)

Ainslie et al. 2023, section 2 (arXiv:2305.13245). The solution: `Attention.forward` in nanollm/model.py. Judge:
python -m learn.exercises 06
"""
import torch
import torch.nn.functional as F


def grouped_query_attention(q, k, v):
    """q (B, H, T, D). k, v (B, G, T, D), H a multiple of G. -> (B, H, T, D), causal."""
    # Hint 1: make H heads out of G, then it is exercise 05; F.scaled_dot_product_attention(q, k, v, is_causal=True) may do that part.
    # Hint 2: which order do the copies have? 0 0 1 1 or 0 1 0 1? Read the formula for g again.
    # Hint 3: torch.repeat_interleave and torch.Tensor.repeat differ in just this.
    raise NotImplementedError("write grouped_query_attention")
