"""10  AdamW: one update of the optimizer that trains nearly every language model.

中文：实现 AdamW 的一步更新：一阶矩、二阶矩、偏差修正，以及与梯度分开的权重衰减。

Plain gradient descent moves a weight by lr * gradient, so weights with small gradients hardly learn. Adam keeps two running means for each
weight, of the gradient (m) and of its square (v), and moves by m / sqrt(v): about lr, whatever the gradient's size. Both means start
at 0 and are too small at first; the bias correction divides by how much weight they have collected. Weight decay pulls each weight towards
0; in Adam it used to be added to the gradient, where sqrt(v) divides it away again. The W stands for doing it apart.

    p <- p - lr * weight_decay * p
    m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
    p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)              t = 1, 2, 3, …

Kingma & Ba 2015, algorithm 1 (arXiv:1412.6980); Loshchilov & Hutter 2019, algorithm 2 (arXiv:1711.05101). The solution: `make_optimizer` in
nanollm/optim.py, which takes torch.optim.AdamW. Judge:  python -m learn.exercises 10
"""
import torch


def adamw_step(p, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """p, grad, m, v: tensors of one shape. t: the number of this update, 1 for the first. -> the new (p, m, v), as new tensors."""
    # Hint 1: write the four lines of the formula in order, each with a new name on the left.
    # Hint 2: what you return as m and v is not bias-corrected: the correction is only for this step.
    # Hint 3: eps stands outside the root, behind the correction.
    raise NotImplementedError("write adamw_step")
