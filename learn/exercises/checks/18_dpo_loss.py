"""What is asked of exercise 18, and the solution: nanollm.losses.dpo_loss."""
import math

import torch
import torch.nn.functional as F

from learn.exercises.judge import Hint, gradient, on, randn, same
from nanollm import losses

NAME = "dpo_loss"
B, BETA = 3, 0.3


def reference(logps, ref_logps, beta):
    return losses.dpo_loss(logps, ref_logps, torch.ones_like(logps), beta)[0]


def given():
    return 4 * randn(2 * B) - 20, 4 * randn(2 * B, seed=1) - 20


def start(attempt):
    """ln 2 a pair when policy and reference are equal"""
    logps, _ = given()
    got = attempt(logps, logps, BETA)
    same(got, torch.tensor(B * math.log(2)), f"the loss of {B} pairs when policy and reference are equal", "", {
        "mean instead of sum: add up over the pairs": torch.tensor(math.log(2)), "one loss a pair came back: add them up": torch.full((B,), math.log(2)),
        "the reference is not subtracted: what counts is how far the policy has moved from it": reference(logps, torch.zeros(2 * B), BETA),
        "wrong sign: the loss is -log sigmoid": torch.tensor(-B * math.log(2)),
        "the sum goes over 2B answers; there are B pairs": torch.tensor(2 * B * math.log(2)),
        "the logarithm is to base 2; take the natural one": torch.tensor(float(B)), "the logarithm is missing: -log sigmoid": torch.tensor(-B / 2)})


def values(attempt):
    """-log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected))"""
    logps, ref = given()
    c, r = (logps - ref).chunk(2)
    nll = lambda z: -F.logsigmoid(z).sum()
    even = (logps - ref)
    same(attempt(logps, ref, BETA), reference(logps, ref, BETA), "the loss", "", {
        "beta is missing": nll(c - r), "beta stands in front of the loss; it belongs inside the sigmoid": BETA * nll(c - r),
        "divided by beta; multiply": nll((c - r) / BETA),
        "beta multiplies only one side": nll(BETA * c - r),
        "beta multiplies only the policy; it multiplies the whole log-ratio": nll((BETA * logps - ref)[:B] - (BETA * logps - ref)[B:]),
        "chosen and rejected, or policy and reference, are swapped: the first half is chosen, and the ratio is log pi - log ref": nll(-BETA * (c - r)),
        "mean instead of sum: add up over the pairs": nll(BETA * (c - r)) / B,
        "the reference is not subtracted: what counts is how far the policy has moved from it": nll(BETA * (logps[:B] - logps[B:])),
        "the log-ratios of chosen and rejected are added; take the difference": nll(BETA * (c + r)),
        "the reference is added; subtract it": nll(BETA * ((logps + ref)[:B] - (logps + ref)[B:])),
        "the rows are paired as neighbours (0, 1), (2, 3); row i belongs to row B + i": nll(BETA * (even[0::2] - even[1::2])),
        "a ratio of logarithms, logps / ref_logps; the logarithm of the ratio is the difference": nll(BETA * ((logps / ref)[:B] - (logps / ref)[B:])),
        "each answer has its own sigmoid; one for the difference of the pair": nll(BETA * c) + nll(-BETA * r)})


def certain(attempt):
    """a policy that is far on the wrong side"""
    with on("log-ratios of -1000 and +1000"):
        got = attempt(torch.tensor([-1000.0, 1000.0]), torch.zeros(2), BETA)
        if not torch.as_tensor(got).isfinite():
            raise Hint("the loss is infinite: log(sigmoid(-600)) is log(0); F.logsigmoid computes it in one, and gives 600")
        same(got, torch.tensor(600.0), "the loss")


def learns(attempt):
    """the gradient pulls the chosen up and the rejected down"""
    logps, ref = given()
    got = gradient(attempt(logps.requires_grad_(), ref, BETA), logps, names=("logps",))[0]
    same(got, gradient(reference(logps, ref, BETA), logps)[0], "the gradient of logps", "row")


CHECKS = [start, values, certain, learns]
