"""05  Causal attention: every token gathers what it needs from the tokens before it.

中文：实现因果注意力：每个位置用查询与前面（含自己）的键做点积，softmax 之后对值加权求和。

Each token asks a question (its query q) and offers a label (its key k) and a content (its value v). The dot products of a query with
all keys become weights that add up to 1, and the token takes the weighted mean of the values. A language model predicts what comes
next, so no token may look at later ones. Dot products of D random numbers have the standard deviation sqrt(D); divided by it, the
softmax begins neither flat nor one-hot.

    attention(q, k, v) = softmax(q k^T / sqrt(D) + mask) v            mask: 0 where a query may look, -inf where not

Vaswani et al. 2017, eq. 1 (arXiv:1706.03762). The solution: `naive_attention` in nanollm/model.py. Judge:
python -m learn.exercises 05
"""
import torch


def attention(q, k, v):
    """q, k, v (B, H, T, D), the positions of H heads. -> (B, H, T, D); position t looks at the positions 0 … t.

    Write the formula out; F.scaled_dot_product_attention(q, k, v, is_causal=True) would do it in one line.
    """
    # Hint 1: q @ k.transpose(-2, -1) gives the scores (B, H, T, T): a row for each query, a column for each key.
    # Hint 2: torch.ones(T, T, dtype=torch.bool).tril() is True on and below the diagonal: there a query may look.
    # Hint 3: scores.masked_fill(~mask, float("-inf")) before the softmax: exp(-inf) is 0, and the rest still adds up to 1.
    # Hint 4: the softmax goes over the keys, the last axis.
    raise NotImplementedError("write attention")
