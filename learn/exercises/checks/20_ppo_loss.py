"""What is asked of exercise 20, and the solution: nanollm.rl.ppo_policy_loss."""
import torch

from learn.exercises.judge import Hint, gradient, on, parts, randn, same
from nanollm import rl

NAME = "ppo_loss"
B, T, CLIP = 3, 6, 0.2


def reference(logps, old_logps, advantages, mask, clip):
    return rl.ppo_policy_loss(logps, old_logps, advantages, mask, clip)[:2]


def given():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).float()
    old = randn(B, T) - 2
    return old + 0.4 * randn(B, T, seed=1), old, randn(B, T, seed=2), mask


def loss(attempt, *args):
    return parts(attempt(*args), ("the sum over the tokens", "the number of tokens"))


def mistakes(logps, old, A, mask):
    ratio = (logps - old).exp()
    held = ratio.clamp(1 - CLIP, 1 + CLIP)
    right = torch.min(ratio * A, held * A)
    total = lambda x: -(x * mask).sum()
    return {
        "the smaller of the two surrogates counts, not the larger; as a loss that is max(-ratio A, -clamped A)": total(torch.max(ratio * A, held * A)),
        "wrong sign: what should grow must be made small, so a minus in front": -total(right), "the ratio was not clipped": total(ratio * A),
        "only the clipped ratio is used: without the minimum a step that made things worse gets no gradient back": total(held * A),
        "the ratio is exp(logp - old_logp); the exp is missing": total(torch.min((logps - old) * A, (logps - old).clamp(1 - CLIP, 1 + CLIP) * A)),
        "the ratio is exp(logp - old_logp), not logp / old_logp": total(torch.min(logps / old * A, (logps / old).clamp(1 - CLIP, 1 + CLIP) * A)),
        "the ratio is turned round: new over old, exp(logp - old_logp)": total(torch.min(A / ratio, (1 / ratio).clamp(1 - CLIP, 1 + CLIP) * A)),
        "the difference of the logarithms was clipped to ± clip; clip the ratio to 1 ± clip":
            total(torch.min(ratio * A, (logps - old).clamp(-CLIP, CLIP).exp() * A)),
        "the ratio was clipped to ± clip; it lies around 1: 1 - clip … 1 + clip": total(torch.min(ratio * A, ratio.clamp(-CLIP, CLIP) * A)),
        "the ratio is clipped from above only; from below, too": total(torch.min(ratio * A, ratio.clamp(max=1 + CLIP) * A)),
        "the minimum of the ratios was taken, and then times A; for a negative A that is the wrong one": total(torch.min(ratio, held) * A),
        "mean instead of sum: return the sum and the number of tokens": total(right) / mask.sum(),
        "this is the mean over all places; return the sum over the answers' tokens": total(right) / mask.numel(),
        "the mask is forgotten: prompt and padding count too": -right.sum(),
        "the mask is forgotten in the sum: prompt and padding count too": -torch.where(mask > 0, right, A).sum(),
        "this is the mean over all places, prompt and padding too": -right.mean(),
        "the advantages are missing": total(torch.min(ratio, held)),
        "the old policy's log-probability is missing: this is plain policy gradient": total(logps * A)}


def values(attempt):
    """the clipped surrogate, summed over the tokens of the answers"""
    args = given()
    same(loss(attempt, *args, CLIP)[0], reference(*args, CLIP)[0], "the sum", "", mistakes(*args))


def count(attempt):
    """the number of tokens"""
    args = given()
    same(torch.as_tensor(loss(attempt, *args, CLIP)[1]), args[3].sum(), "the number of tokens", "", {
        "all places were counted; only where the mask is 1": torch.tensor(B * T), "rows were counted; count tokens": torch.tensor(B)})


def pays(attempt):
    """what has earned its step gets no more gradient, what went wrong still does"""
    old, one = torch.zeros(1, 4), torch.ones(1, 4)
    logps = torch.tensor([[0.5, 0.5, -0.5, -0.5]]).requires_grad_()
    A = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    got = gradient(loss(attempt, logps, old, A, one, CLIP)[0], logps, names=("logps",))[0]
    want = gradient(reference(logps, old, A, one, CLIP)[0], logps)[0]
    same(got, want, "the gradient for ratios 1.65, 1.65, 0.61, 0.61 and advantages 1, -1, 1, -1", "B T")


def argument(attempt):
    """clip is an argument"""
    args = given()
    same(loss(attempt, *args, 0.05)[0], reference(*args, 0.05)[0], "the sum with clip 0.05",
    "", {"clip is not used: 0.2 stands in the code": reference(*args, 0.2)[0]})


def padding(attempt):
    """garbage behind the end"""
    logps, old, A, mask = given()
    far = torch.where(mask > 0, logps, torch.tensor(500.0)).requires_grad_()
    with on("log-probabilities of 500 in the padding"):
        got = loss(attempt, far, old, A, mask, CLIP)[0]
        if not got.isfinite():
            raise Hint("the loss is NaN or infinite: exp of the padding is infinite, and 0 * inf is NaN; multiply the difference by the mask before exp")
        same(got, reference(logps, old, A, mask, CLIP)[0], "the sum")
        gradient(got, far, names=("logps",))


CHECKS = [values, count, pays, argument, padding]
