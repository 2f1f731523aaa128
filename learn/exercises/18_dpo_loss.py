"""18  DPO loss: learn from comparisons without a reward model.

中文：实现 DPO 损失：让策略相对参考模型更偏向被选中的回答，不需要单独训练奖励模型。

PPO first trains a reward model from comparisons and then a policy from the reward. DPO shows that the best policy for a reward, kept near a
reference model, *is* that reward in disguise: reward = beta * log(policy / reference), up to a constant that a comparison does not see. So put it
into the reward loss of exercise 17 and train the policy itself. The reference is the frozen model of the start; beta says how tight the leash is.

    loss = - sum over the pairs of log sigmoid( beta * [ log pi/ref (chosen) - log pi/ref (rejected) ] )

Rafailov et al. 2023, eq. 7 (arXiv:2305.18290). The solution: `dpo_loss` in nanollm/losses.py. Judge:  python -m learn.exercises 18
"""
import torch
import torch.nn.functional as F


def dpo_loss(logps, ref_logps, beta):
    """logps (2B,): log-probability of each whole answer under the policy, rows 0 … B-1 chosen, B … 2B-1 rejected in the same order.
    ref_logps (2B,): the same under the reference. -> the sum over the pairs, a tensor."""
    # Hint 1: one log-ratio an answer, then one difference a pair.
    # Hint 2: (logps - ref_logps).chunk(2) gives chosen and rejected.
    # Hint 3: F.logsigmoid, which does not overflow. Before the first update policy = reference, and each pair costs ln 2 = 0.693.
    raise NotImplementedError("write dpo_loss")
