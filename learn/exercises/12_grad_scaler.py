"""12  GradScaler: keep small gradients alive in fp16.

中文：实现 GradScaler 的逻辑：还原被放大的梯度，遇到 inf/NaN 跳过更新并减半倍率，连续顺利若干步后加倍。

The smallest number of fp16 is 6e-8; many gradients are smaller and become 0. So the loss is multiplied by a large scale before the
backward pass, and the gradients by 1 / scale afterwards, in fp32. Which scale? As large as possible without overflow, which nobody knows in
advance: when a gradient is infinite or NaN the update is left out and the scale halved; after `interval` good updates in a row it is doubled.

    any gradient not finite:   no update,  scale * backoff,  streak 0
    otherwise:                 gradients / scale,  streak + 1;  and when the streak reaches interval: scale * growth, streak 0

Micikevicius et al. 2018, section 3.2 (arXiv:1710.03740). The solution: torch.amp.GradScaler, in the order of `update` in nanollm/optim.py. Judge:
python -m learn.exercises 12
"""
import torch


def scaler_step(grads, scale, streak, interval, growth=2.0, backoff=0.5):
    """grads: list of tensors, the gradients of loss * scale. scale: a float. streak: good updates in a row so far.
    -> (the true gradients as a new list, or None if this update must be left out; the next scale; the next streak)."""
    # Hint 1: first look at all gradients: torch.isfinite(g).all() is False for inf and for NaN.
    # Hint 2: two cases, two returns; the bad one is the shorter.
    # Hint 3: these gradients are divided by the scale they were made with; only the next update has the next scale.
    raise NotImplementedError("write scaler_step")
