"""What is asked of exercise 22, and the solution: nanollm.generate.sample; what it hands to torch.multinomial."""
from unittest import mock

import torch

from learn.exercises.judge import Hint, on, randn, same
from nanollm.generate import sample

NAME = "top_p"
AXES = "B V"


def reference(logits, p):
    handed, draw = [], torch.multinomial
    with mock.patch.object(torch, "multinomial", lambda probs, *args, **named: handed.append(probs) or draw(probs, *args, **named)):
        sample(logits, top_p=p, generator=torch.Generator())
    return handed[0]


def simple(attempt):
    """probabilities 0.15, 0.5, 0.05, 0.3 and p = 0.6"""
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    keep = lambda *kept: torch.tensor([[x if i in kept else 0.0 for i, x in enumerate(probs[0].tolist())]])
    norm = lambda x: x / x.sum(-1, keepdim=True)
    same(attempt(probs.log(), 0.6), norm(keep(1, 3)), "the probabilities", AXES, {
        "the token that crosses p was left out: 0.5 is not yet 0.6, so 0.3 belongs to the set": norm(keep(1)),
        "the token that crosses p was left out, and what is kept is not scaled to add up to 1": keep(1),
        "what is kept must be scaled to add up to 1": keep(1, 3), "one token too many: with 0.5 + 0.3 the sum has reached 0.6": norm(keep(0, 1, 3)),
        "the order is that of the sorted tokens; bring it back into the order of the vocabulary (scatter)": norm(torch.tensor([[0.5, 0.3, 0.0, 0.0]])),
        "the order is that of the sorted tokens, and not scaled to add up to 1": torch.tensor([[0.5, 0.3, 0.0, 0.0]]),
        "the tokens were not sorted: the likeliest come first, in whatever order the vocabulary has them": norm(keep(0, 1)),
        "the tokens were not sorted: the likeliest come first, in whatever order the vocabulary has them ": norm(keep(0)),
        "sorted from the smallest up: the likeliest must come first (descending=True)": norm(keep(0, 2, 3)),
        "nothing was left out; were the tokens sorted from the smallest up (is descending=True missing)?": probs,
        "sorted from the smallest up: the likeliest must come first (descending=True) ": norm(keep(0, 2)),
        "these are logits; return probabilities": keep(1, 3).log(),
        "what was kept and what was left out are swapped": norm(keep(0, 2)),
        "the kept tokens all got the same probability; keep their proportions": norm((keep(1, 3) > 0).float())})


def rows(attempt):
    """each row by itself"""
    logits = torch.cat((5 * randn(2, 9), 0.2 * randn(2, 9, seed=1)))
    for p in (0.9, 0.5):
        want = reference(logits, p)
        flat = logits.softmax(-1).flatten()
        order = flat.sort(descending=True)
        kept = torch.zeros_like(flat).scatter(0, order.indices, order.values * (order.values.cumsum(0) - order.values < p)).view_as(logits)
        same(attempt(logits, p), want, f"the probabilities with p = {p}", AXES, {
            "the rows of the batch were thrown together: sort and add up along the last axis": kept / kept.sum(-1, keepdim=True)})


def least(attempt):
    """a p smaller than any probability: the likeliest token stays"""
    logits = randn(3, 9)
    with on("p = 0.01"):
        got = attempt(logits, 0.01)
        if got.isnan().any() or not got.sum():
            raise Hint("no token is left: the one that crosses p belongs to the set, so the likeliest always stays")
        same(got, reference(logits, 0.01), "the probabilities", AXES)


def most(attempt):
    """p = 1 leaves out nothing"""
    logits = randn(3, 9)
    with on("p = 1"):
        same(attempt(logits, 1.0), logits.softmax(-1), "the probabilities", AXES)


CHECKS = [simple, rows, least, most]
