"""What is asked of exercise 19, and the solution: nanollm.rl.gae."""
import torch

from learn.exercises.judge import Hint, parts, randn, same
from nanollm import rl

NAME = "gae"
B, T, GAMMA, LAM = 3, 6, 0.9, 0.8
AXES, NAMES = "B T", ("the advantages", "the returns")


def reference(rewards, values, mask, gamma, lam):
    return rl.gae(rewards, values, mask, gamma, lam)


def given(whole=True):
    mask = torch.ones(B, T)
    if not whole:
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).float()
    return randn(B, T), randn(B, T, seed=1), mask


def wrong(rewards, values, mask, gamma, lam, next_gamma=None, forward=False, bootstrap=False, keep=True):
    """A recursion with a mistake in it."""
    out, after, value_after = torch.zeros(B, T), 0.0, values[:, -1] if bootstrap else 0.0
    for t in range(T) if forward else reversed(range(T)):
        after = rewards[:, t] + (gamma if next_gamma is None else next_gamma) * value_after - values[:, t] + gamma * lam * after
        value_after = values[:, t]
        if keep:
            after, value_after = after * mask[:, t], value_after * mask[:, t]
        out[:, t] = after
    return out * mask


def advantages(attempt):
    """the recursion, on answers that fill the row"""
    args = (*given(), GAMMA, LAM)
    rewards, values, mask = given()
    deltas = rewards + GAMMA * torch.cat((values[:, 1:], torch.zeros(B, 1)), 1) - values
    got = parts(attempt(*args), NAMES)
    same(got[0], reference(*args)[0], NAMES[0], AXES, {
        "the recursion runs forwards: A_t needs A_{t+1}, so begin at the last token": wrong(*args, forward=True),
        "only the own step counts: the part gamma * lam * A_{t+1} is missing": deltas,
        "lam is missing: later surprises count gamma * lam, not gamma": wrong(*given(), GAMMA, 1.0),
        "gamma is missing: later surprises count gamma * lam, not lam": wrong(*given(), 1.0, LAM, next_gamma=GAMMA),
        "gamma is missing in front of v_{t+1}": wrong(*args, next_gamma=1.0),
        "the value of the next token is missing: delta = r_t + gamma v_{t+1} - v_t": wrong(*args, next_gamma=0.0),
        "behind the last token the value is 0, the answer has ended; the last value was used again": wrong(*args, bootstrap=True),
        "the value v_t is not subtracted: delta = r_t + gamma v_{t+1} - v_t": wrong(*args) + discounted(values, GAMMA * LAM),
        "these are the returns; advantages come first": wrong(*args) + values, "wrong sign": -wrong(*args),
        "gamma and lam are not used: they are arguments": wrong(*given(), 1.0, 0.95),
        "the reward of the next token was taken: delta_t has r_t": wrong(torch.cat((rewards[:, 1:], torch.zeros(B, 1)), 1), values, mask, GAMMA, LAM)})


def discounted(x, by):
    """sum of by^k x_{t+k}."""
    return torch.stack([sum(by**k * x[:, t + k] for k in range(T - t)) for t in range(T)], 1)


def returns(attempt):
    """the critic's target is A + v"""
    args = (*given(), GAMMA, LAM)
    rewards, values, _ = given()
    got, want = parts(attempt(*args), NAMES), reference(*args)
    same(got[1], want[1], NAMES[1], AXES, {
        "the returns are the discounted rewards; the target of the critic is A + v, with lam in it": discounted(rewards, GAMMA),
        "the returns are the sums of the rewards; the target of the critic is A + v":
        discounted(rewards, 1.0), "the returns are A - v; A + v": want[0] - values, "the returns are the advantages: add the values": want[0],
        "the returns are the values; add the advantages": values, "the returns are A + r; A + v": want[0] + rewards})


def ends(attempt):
    """prompts, and answers that end earlier"""
    args = (*given(False), GAMMA, LAM)
    rewards, values, mask = given(False)
    got, want = parts(attempt(*args), NAMES), reference(*args)
    if (torch.as_tensor(got[0]) * (1 - mask)).any():
        raise Hint("the mask is not used, or too late: advantages on the prompt and in the padding must be 0, "
                   "and nothing of them may be carried on")
    leak = wrong(*args, keep=False)
    same(got[0], want[0], NAMES[0], AXES, {
        "what stands behind the end leaks into the answer: multiply the carried advantage and value by the mask at each step, not only the result": leak,
        "the advantage behind the end is dropped, but its value leaks in: the value after the last token is 0": half_masked(*args)})
    same(got[1], want[1], NAMES[1], AXES, {"the returns outside the answer must be 0: multiply by the mask": want[0] + values})


def half_masked(rewards, values, mask, gamma, lam):
    out, after, value_after = torch.zeros(B, T), 0.0, 0.0
    for t in reversed(range(T)):
        after = (rewards[:, t] + gamma * value_after - values[:, t] + gamma * lam * after) * mask[:, t]
        out[:, t], value_after = after, values[:, t]
    return out


def extremes(attempt):
    """gamma = lam = 1: the sum of the rewards to come, minus the value"""
    rewards, values, mask = given()
    same(parts(attempt(rewards, values, mask, 1.0, 1.0), NAMES)[0], discounted(rewards, 1.0) - values, "the advantages with gamma = lam = 1", AXES,
         {"gamma and lam are not used: they are arguments": wrong(rewards, values, mask, GAMMA, LAM)})


CHECKS = [advantages, returns, ends, extremes]
