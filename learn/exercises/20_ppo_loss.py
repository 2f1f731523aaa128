"""20  PPO loss: improve the policy, but not by more than it has earned.

中文：实现 PPO 的裁剪策略损失：概率比超出 1±clip 且对自己有利时，不再给梯度。

The policy has written answers, and each token has an advantage: better or worse than expected. Raise the probability of the good, lower that of the
bad. But the tokens were drawn from the policy before the update; after a few steps on the same answers the estimate is worth little. So PPO weighs
by the ratio of new to old probability and stops paying when the ratio leaves 1 ± clip in the direction that pays. The *minimum* of
both keeps the pessimistic one: a step that made things worse is still punished.

    ratio = exp(logp - old_logp)
    loss = - sum over the tokens of min( ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A )

Schulman et al. 2017, eq. 7 (arXiv:1707.06347). The solution: `ppo_policy_loss` in nanollm/rl.py. Judge:  python -m learn.exercises 20
"""
import torch


def ppo_loss(logps, old_logps, advantages, mask, clip):
    """All (B, T). mask: 1 on the tokens of the answer, 0 elsewhere, where the numbers mean nothing. clip: 0.2, say.
    -> (sum over the tokens of the answers, their number)."""
    # Hint 1: logps are logarithms: their difference is the logarithm of the ratio.
    # Hint 2: ratio.clamp(1 - clip, 1 + clip); torch.min takes the smaller of two tensors, place by place. Then the minus.
    # Hint 3: behind the end the difference may be huge and exp of it infinite: multiply the difference by the mask before exp.
    raise NotImplementedError("write ppo_loss")
