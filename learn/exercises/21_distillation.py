"""21  Distillation: learn from all that a teacher thinks possible.

中文：实现知识蒸馏损失：在温度 T 下让学生的分布接近老师的分布，并乘以 T² 保持梯度大小。

A text says which token came; a teacher model says how likely each of the V tokens was. "Paris", 80 %, "Lyon", 5 %, "cheese", 0 % teaches more than "Paris". The
distance of the distributions is the Kullback-Leibler divergence from teacher to student. A temperature T > 1 makes both flatter, so that the small
probabilities show; the gradient then shrinks like 1 / T^2, which the factor T^2 makes good.

    loss = T^2 * sum over the positions with a target of  sum_v p_t (log p_t - log p_s),         p = softmax(logits / T)

Hinton, Vinyals & Dean 2015, section 2 (arXiv:1503.02531). The solution: `kd_loss_sum` in nanollm/distill.py. Judge:
python -m learn.exercises 21
"""
import torch
import torch.nn.functional as F


def kd_loss(student_logits, teacher_logits, targets, temperature):
    """logits (B, T, V) of both, targets (B, T) with -100 where nothing is learnt. -> (sum over the other positions, their number)."""
    # Hint 1: student_logits[targets != -100] is (N, V): only the positions that count.
    # Hint 2: F.log_softmax(logits / temperature, -1) of both; never the logarithm of a softmax, which may be log(0).
    # Hint 3: F.kl_div(input, target, log_target=True, reduction="sum") is KL(target || input): the student comes first.
    raise NotImplementedError("write kd_loss")
