"""03  RMSNorm: every token's vector gets the same size before a layer reads it.

中文：实现 RMSNorm：每个词元的向量除以自己的均方根，再乘以可学的增益。

The numbers in a deep network grow and shrink from layer to layer, and a layer learns badly when its input does so. LayerNorm
subtracts the mean and divides by the standard deviation. RMSNorm leaves out the mean, which turned out not to matter: it divides
each vector by its root mean square. eps keeps a vector of zeros from a division by zero. The squares are added up in fp32: in fp16
300^2 is already infinity.

    y = x / sqrt(mean(x^2) + eps) * weight          mean over the last axis, for each token alone

Zhang & Sennrich 2019, eq. 4 (arXiv:1910.07467). The solution: `RMSNorm` in nanollm/model.py. Judge:  python -m learn.exercises 03
"""
import torch


def rms_norm(x, weight, eps):
    """x (…, C), any float type. weight (C,). -> (…, C) in the type of x."""
    # Hint 1: x.float() first, and back to x's type at the end.
    # Hint 2: mean(-1, keepdim=True) keeps the axis, so that the result divides x row by row.
    # Hint 3: torch.rsqrt(z) is 1 / sqrt(z); eps is added to the mean of the squares, inside the root.
    raise NotImplementedError("write rms_norm")
