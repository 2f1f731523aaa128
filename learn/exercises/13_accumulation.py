"""13  Gradient accumulation: a large batch in small pieces.

中文：实现梯度累积：把大批次拆成小批次逐个反传，得到的梯度与一次算完整个批次完全相同。

A batch of 512 rows may not fit into memory. Gradients add up: run the backward pass for each micro-batch, let p.grad collect, and step
once at the end. The catch is the mean. The loss is the mean over *all* tokens that have a target, and micro-batches have different
numbers of them: the mean of their means would give a token of a short answer more weight than one of a long answer. So each
micro-batch contributes its sum, divided by the number of targets of the whole batch.

    gradient = d/dp  [ sum over the micro-batches of their summed loss ]  /  [ number of targets in all micro-batches ]

Widely used training loops had this wrong until 2024. The solution: the loop in train_pretrain.py with `cross_entropy` in nanollm/losses.py. Judge:
python -m learn.exercises 13
"""
import torch
import torch.nn.functional as F


def accumulate(model, batches):
    """model: tokens (B, T) -> logits (B, T, V). batches: list of (inputs (B, T), targets (B, T)), -100 where there is no target; a
    micro-batch may have no target at all.

    Leaves in each p.grad the gradient of the mean loss over all targets (what stood there before is gone).
    -> that mean loss, a number without gradient. Keeps the graph of one micro-batch at a time."""
    # Hint 1: count the targets of all micro-batches before the first backward.
    # Hint 2: F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / count, then .backward().
    # Hint 3: model.zero_grad() once, in front of the loop; never inside it.
    raise NotImplementedError("write accumulate")
