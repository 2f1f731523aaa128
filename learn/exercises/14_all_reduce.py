"""14  All-reduce: many processes train one model.

中文：实现数据并行的梯度平均：把所有梯度放进一个桶，一次 all-reduce 求和，再除以进程数。

With data parallelism every process (rank) holds the whole model and reads its own rows. After the backward pass the gradients are averaged over
the ranks; then all take the same step and stay copies of each other. all_reduce adds up one tensor over all ranks and gives everyone the
sum. It is a meeting: every rank must come, as often as the others and with a tensor of the same size, or all wait for ever. Each
message costs time before its first byte, so one large message is better than hundreds of small ones: lay the gradients end to end in a bucket.

    p.grad <- (1 / W) * sum over the W ranks of p.grad            a parameter without a gradient on this rank counts as 0

Li et al. 2020, section 3.2 (arXiv:2006.15704). The solution: `DDP` in nanollm/dist.py. Judge:  python -m learn.exercises 14
"""
import torch


def average_gradients(parameters, world_size, all_reduce):
    """parameters: list of tensors; p.grad is a tensor of p's shape, or None where this rank had no use for p (another rank may have).
    all_reduce(tensor): adds up the tensor over all ranks, in place. -> nothing; every p.grad is the mean over the ranks afterwards.

    Call all_reduce once."""
    # Hint 1: torch.cat([… .flatten() for p in parameters]) is the bucket; zeros_like(p) stands in for a gradient that is None.
    # Hint 2: all ranks must build the bucket in the same order and of the same size, whatever is None on them.
    # Hint 3: after all_reduce divide by world_size; bucket.split([p.numel() for p in parameters]) takes it apart; view_as(p) gives it its shape.
    raise NotImplementedError("write average_gradients")
