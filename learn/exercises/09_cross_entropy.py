"""09  Cross-entropy in chunks: the loss of a language model without ever holding all its logits.

中文：实现分块交叉熵：一块一块地计算 logits 与损失，显存里从不同时存在整个 (N, V) 矩阵。

The loss of a token is -log of the probability that the model gave to it. The logits have V numbers a token: for a vocabulary of
64,000 and 16,000 tokens that is 4 GB in fp32, more than the model. So compute them for a few tokens, add up their losses, forget them. For
the backward pass they are computed once more: torch.utils.checkpoint.checkpoint(f, *inputs, use_reentrant=False) runs f without
keeping anything inside it, and again when the gradient is asked for.

    loss = sum over the tokens n with a target of  [ logsumexp(z_n) - z_n[target_n] ],        z_n = hidden_n W^T

A target of -100 means: no loss here (a prompt, padding). Return the sum and the number of the others, and let the caller divide: only so
can several batches be put together rightly. The idea: Chen et al. 2016 (arXiv:1604.06174). The solution: `linear_cross_entropy` in
nanollm/losses.py (by another way: it computes the gradients in the forward pass). Judge:  python -m learn.exercises 09
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(hidden, weight, targets, chunk):
    """hidden (N, C), weight (V, C), targets (N,) with -100 where there is no loss. chunk: the most rows of logits at a time.
    -> (sum of the losses in nats, number of targets that are not -100), differentiable by hidden and weight."""
    # Hint 1: for i in range(0, N, chunk): the last chunk may be shorter; slices take care of that.
    # Hint 2: F.cross_entropy(logits, t, ignore_index=-100, reduction="sum") is right even for a chunk without any target.
    # Hint 3: first get it right without checkpoint; the last check asks for it.
    # Hint 4: put the body of the loop into a function part(h, weight, t) and call checkpoint(part, h, weight, t, use_reentrant=False).
    raise NotImplementedError("write chunked_cross_entropy")
