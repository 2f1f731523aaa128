"""17  Reward loss: learn from comparisons which answer is better.

中文：实现奖励模型的成对损失：取每行最后一个真实词元的分数，让被选中的回答得分更高。

People find it hard to give an answer 7.3 points, and easy to say which of two is better. The Bradley-Terry model turns scores into such
comparisons: the chosen answer wins with probability sigmoid(s_chosen - s_rejected). The loss is -log of that. The model gives a number at each
position; the score of an answer is the one at its last real token, where everything has been read, and not in the padding behind it.

    loss = - sum over the pairs of log sigmoid(s_chosen - s_rejected),        s = rewards[row, length - 1]

Ouyang et al. 2022, eq. 1 (arXiv:2203.02155). The solution: `reward_loss` in nanollm/losses.py. Judge:  python -m learn.exercises 17
"""
import torch
import torch.nn.functional as F


def reward_loss(rewards, lengths):
    """rewards (2B, T): rows 0 … B-1 are the chosen answers, B … 2B-1 the rejected ones in the same order. lengths (2B,): real tokens of
    each row; behind them is padding. -> (sum over the pairs, the number of pairs)."""
    # Hint 1: rewards.gather(1, index) picks one number a row; index has shape (2B, 1).
    # Hint 2: scores.chunk(2) gives the two halves.
    # Hint 3: log(sigmoid(z)) is -inf from z = -104 on; F.logsigmoid(z) is not.
    raise NotImplementedError("write reward_loss")
