"""What is asked of exercise 17, and the solution: nanollm.losses.reward_loss."""
import torch
import torch.nn.functional as F

from learn.exercises.judge import Hint, gradient, on, parts, randn, same
from nanollm import losses

NAME = "reward_loss"
B, T = 3, 6


def reference(rewards, lengths):
    return losses.reward_loss(rewards, lengths)[:2]


def given():
    return randn(2 * B, T), torch.tensor([6, 3, 2, 4, 5, 1])


def loss(attempt, *args):
    return parts(attempt(*args), ("the sum over the pairs", "the number of pairs"))


def pairs_of(scores):
    return scores[:B] - scores[B:]


def pairs(attempt):
    """-log sigmoid of the difference of the last real scores"""
    rewards, lengths = given()
    at = lambda i: rewards.gather(1, i.clamp(0, T - 1)[:, None]).squeeze(1)
    last = at(lengths - 1)
    nll = lambda z: -F.logsigmoid(z).sum()
    inside = torch.arange(T) < lengths[:, None]
    same(loss(attempt, rewards, lengths)[0], reference(rewards, lengths)[0], "the sum", "", {
        "the score was read at the last column, which is padding for short answers; read position length - 1": nll(pairs_of(rewards[:, -1])),
        "off by one: the last real token stands at length - 1, not at length": nll(pairs_of(at(lengths))),
        "the score was read at the first token, where nothing has been read yet": nll(pairs_of(rewards[:, 0])),
        "off by one: the last real token stands at length - 1, not at length - 2": nll(pairs_of(at(lengths - 2))),
        "the scores of all real tokens were averaged; only the last one has read everything": nll(pairs_of((rewards * inside).sum(1) / lengths)),
        "the mean over all columns was taken, padding too; read position length - 1": nll(pairs_of(rewards.mean(1))),
        "every position was compared; a pair has one score each, at its last real token": nll(rewards[:B] - rewards[B:]),
        "chosen and rejected are swapped: the first half is the chosen one, and chosen - rejected must grow": nll(-pairs_of(last)),
        "the rows are paired as neighbours (0, 1), (2, 3); row i belongs to row B + i": nll(last[0::2] - last[1::2]),
        "mean instead of sum: return the sum and the number of pairs": nll(pairs_of(last)) / B, "wrong sign: the loss is -log sigmoid": -nll(pairs_of(last)),
        "the logarithm is missing: -log sigmoid": -pairs_of(last).sigmoid().sum(),
        "the logarithm is missing: -log sigmoid ": (1 - pairs_of(last).sigmoid()).sum(),
        "the sigmoid is missing: this is the plain difference": -pairs_of(last).sum(),
        "a hinge, max(0, 1 - difference); here -log sigmoid": F.relu(1 - pairs_of(last)).sum(),
        "the logarithm is to base 2; take the natural one": nll(pairs_of(last)) / torch.tensor(2.0).log()})


def count(attempt):
    """the number of pairs"""
    same(torch.as_tensor(loss(attempt, *given())[1]), torch.tensor(B), "the number of pairs", "", {"2B rows are B pairs": torch.tensor(2 * B)})


def padding(attempt):
    """what stands in the padding plays no part"""
    rewards, lengths = given()
    garbage = rewards.masked_fill(torch.arange(T) >= lengths[:, None], float("nan"))
    if not torch.as_tensor(loss(attempt, garbage, lengths)[0]).isfinite():
        raise Hint("NaN in the padding reaches the loss: pick the one number of each row, do not multiply by a mask (0 * NaN is NaN)")


def certain(attempt):
    """a model that is certain and wrong"""
    rewards = torch.tensor([[-150.0], [150.0]]).requires_grad_()
    with on("a chosen answer at -150 and a rejected one at +150"):
        got = loss(attempt, rewards, torch.tensor([1, 1]))[0]
        if not got.isfinite():
            raise Hint("the loss is infinite: log(sigmoid(-300)) is log(0); F.logsigmoid computes it in one, and gives 300")
        same(got, torch.tensor(300.0), "the loss")
        gradient(got, rewards, names=("rewards",))


CHECKS = [pairs, count, padding, certain]
