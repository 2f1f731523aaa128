"""08  SwiGLU: the feed-forward network of LLaMA, with a gate.

中文：实现 SwiGLU 前馈层：一路经 SiLU 当门，与另一路逐元素相乘，再投影回原来的宽度。

Behind attention every token passes a small network by itself, which holds two thirds of a block's weights. The classic one is up,
nonlinearity, down. SwiGLU goes up twice: one path, through SiLU, is a gate that decides how much of each number of the other path gets
through. Three matrices instead of two, so the width F is made 2/3 of what it was.

    y = (silu(x W1^T) * (x W3^T)) W2^T            silu(z) = z * sigmoid(z)

Shazeer 2020, eq. 6 (arXiv:2002.05202). W1 is the gate, W3 the up and W2 the down projection, as in LLaMA. The solution: `FeedForward` in
nanollm/model.py. Judge:  python -m learn.exercises 08
"""
import torch
import torch.nn.functional as F


def swiglu_ffn(x, w1, w2, w3):
    """x (B, T, C). w1, w3 (F, C), w2 (C, F): stored as nn.Linear stores them, output first. -> (B, T, C)."""
    # Hint 1: F.linear(x, w) is x @ w.T.
    # Hint 2: only one of the two paths goes through the nonlinearity; which one does the formula name?
    # Hint 3: gate, up = F.linear(x, w1), F.linear(x, w3); multiply element by element; then w2.
    raise NotImplementedError("write swiglu_ffn")
