"""11  Cosine schedule: how fast to learn at which update.

中文：实现带预热的余弦学习率：先线性升到峰值，再沿半个余弦降到最小值，之后保持不变。

At the start the gradients of a random model point anywhere and Adam's means know little: the rate rises slowly from 0, the warmup. Then it
should be high, to get far, and at the end low, to settle. Half a cosine does that without a corner: flat at the peak, steep in the
middle, flat at the end. Behind the end the minimum holds.

    it < warmup            peak * it / warmup
    warmup <= it < total   low + (peak - low) * (1 + cos(pi * done)) / 2         done = (it - warmup) / (total - warmup)
    it >= total            low

Loshchilov & Hutter 2017, eq. 5 (arXiv:1608.03983). The solution: `get_lr` in nanollm/optim.py. Judge:  python -m learn.exercises 11
"""
import math


def lr_at(it, peak, low, warmup, total):
    """it: the number of the update, from 1 on. peak and low: the highest and the last rate. warmup, total: updates. -> a float."""
    # Hint 1: three cases, three returns.
    # Hint 2: done goes from 0 at the end of the warmup to 1 at `total`; the cosine of pi * done from 1 to -1.
    # Hint 3: with warmup = 0 nothing may be divided by 0.
    raise NotImplementedError("write lr_at")
