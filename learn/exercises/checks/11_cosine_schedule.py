"""What is asked of exercise 11, and the solution: nanollm.optim.get_lr."""
import math

import torch

from learn.exercises.judge import Hint, kind, on, same
from nanollm.optim import get_lr

NAME = "lr_at"
PEAK, LOW, WARMUP, TOTAL = 1.0, 0.1, 10, 110


def reference(it, peak, low, warmup, total):
    return get_lr(it, peak, low, warmup, total, "cosine")


def rates(attempt, its):
    values = [attempt(it, PEAK, LOW, WARMUP, TOTAL) for it in its]
    if not isinstance(values[0], (int, float)):
        raise Hint(f"the rate must be a float; it is {kind(values[0])}" + (": is the `return` missing?" if values[0] is None else ""))
    return torch.tensor(values, dtype=torch.float64)


def compare(attempt, its, what, mistakes):
    want = torch.tensor([reference(it, PEAK, LOW, WARMUP, TOTAL) for it in its], dtype=torch.float64)
    same(rates(attempt, its), want, what, mistakes={s: torch.tensor([f(it) for it in its], dtype=torch.float64) for s, f in mistakes.items()})


def cosine(done, low=LOW, peak=PEAK):
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2


def warmup(attempt):
    """a straight line from 0 up to the peak"""
    compare(attempt, range(0, WARMUP), "the rate during the warmup", {
        "the warmup is missing: the first updates already run at the peak": lambda it: cosine(max(0, it - WARMUP) / 100),
        "the warmup is missing: the first updates already run at the peak ": lambda it: PEAK,
        "the warmup is missing: the cosine begins at 0": lambda it: cosine(it / TOTAL),
        "the warmup is missing: the cosine runs backwards from its start": lambda it: cosine((it - WARMUP) / (TOTAL - WARMUP)),
        "the warmup counts from 1 here: at `it` the rate is peak * it / warmup, not (it + 1) / warmup": lambda it: PEAK * (it + 1) / WARMUP,
        "the warmup counts from 1 here: at `it` the rate is peak * it / warmup, not (it + 1) / (warmup + 1)": lambda it: PEAK * (it + 1) / (WARMUP + 1),
        "the warmup starts from low; it starts from 0": lambda it: LOW + (PEAK - LOW) * it / WARMUP,
        "the warmup rises along the whole run; it ends at update `warmup`": lambda it: PEAK * it / TOTAL})


def fall(attempt):
    """half a cosine from the peak to the lowest rate"""
    compare(attempt, range(WARMUP, TOTAL), "the rate between warmup and end", {
        "the cosine begins at update 0, under the warmup: done = (it - warmup) / (total - warmup), so that it starts at the peak":
            lambda it: cosine(it / TOTAL),
        "done is (it - warmup) / total and never reaches 1: divide by total - warmup": lambda it: cosine((it - WARMUP) / TOTAL),
        "it falls to 0; it should end at `low`: low + (peak - low) * …": lambda it: cosine((it - WARMUP) / 100, 0),
        "low is added on top: the peak is too high; multiply by peak - low": lambda it: LOW + cosine((it - WARMUP) / 100, 0),
        "low is only a floor here, max(low, …); the curve itself should end there": lambda it: max(LOW, cosine((it - WARMUP) / 100, 0)),
        "a straight line; take the cosine": lambda it: PEAK - (PEAK - LOW) * (it - WARMUP) / 100,
        "a whole cosine: down and up again; half of one, pi * done": lambda it: cosine(2 * (it - WARMUP) / 100),
        "a quarter of a cosine: it leaves the peak flat but falls steeply at the end; take (1 + cos(pi * done)) / 2":
            lambda it: LOW + (PEAK - LOW) * math.cos(math.pi / 2 * (it - WARMUP) / 100),
        "the sign of the cosine: it rises where it should fall": lambda it: cosine(1 - (it - WARMUP) / 100),
        "the 1 / 2 is missing: (1 + cos) goes from 2 to 0": lambda it: LOW + 2 * (PEAK - LOW) * (1 + math.cos(math.pi * (it - WARMUP) / 100)) / 2,
        "pi is missing: the angle goes from 0 to pi": lambda it: cosine((it - WARMUP) / 100 / math.pi), "the peak was held; nothing falls": lambda it: PEAK})


def after(attempt):
    """behind the end the lowest rate holds"""
    compare(attempt, range(TOTAL, 2 * TOTAL, 7), "the rate behind `total`", {
        "the cosine goes on behind `total` and rises again: return low there": lambda it: cosine((it - WARMUP) / 100),
        "behind `total` the rate is 0; it should stay at low": lambda it: 0.0})


def no_warmup(attempt):
    """warmup = 0"""
    with on("warmup = 0"):
        if abs(attempt(0, 1.0, 0.1, 0, 100) - 1.0) > 1e-9 or abs(attempt(50, 1.0, 0.1, 0, 100) - 0.55) > 1e-9:
            raise Hint("it should begin at the peak and be half way at half time")


CHECKS = [warmup, fall, after, no_warmup]
