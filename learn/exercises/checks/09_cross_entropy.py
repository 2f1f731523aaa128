"""What is asked of exercise 09, and the solution: nanollm.losses.linear_cross_entropy."""
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from learn.exercises.judge import Hint, gradient, on, parts, randint, randn, same
from nanollm.losses import linear_cross_entropy

NAME = "chunked_cross_entropy"
N, C, V, CHUNK = 22, 8, 37, 5


def reference(hidden, weight, targets, chunk):
    return linear_cross_entropy(hidden[None], weight, targets[None], chunk)[:2]


def given(n=N):
    targets = randint(V, n, seed=2)
    targets[3:7] = -100
    return randn(n, C), randn(V, C, seed=1), targets


def loss(attempt, *args):
    return parts(attempt(*args), ("the sum of the losses", "the number of targets"))


def total(attempt):
    """the sum of the losses"""
    hidden, weight, targets = given()
    targets[3:7] = 1
    got, _ = loss(attempt, hidden, weight, targets, CHUNK)
    nll = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    same(got, nll.sum(), "the sum", "", {
        "this is the mean over the tokens; return the sum, the caller divides": nll.mean(),
        "this is the sum of the chunks' means; each chunk must give its sum": sum(part.mean() for part in nll.split(CHUNK)),
        "this is the mean of the chunks' means: the short last chunk counts too much, and the sum is wanted":
            torch.stack([part.mean() for part in nll.split(CHUNK)]).mean(),
        "the last, shorter chunk is left out: 22 tokens in chunks of 5 are five chunks": nll[: N // CHUNK * CHUNK].sum(),
        "only the last chunk came back: add up over the chunks": nll[N // CHUNK * CHUNK :].sum(),
        "only the first chunk came back; is the `return` inside the loop?": nll[:CHUNK].sum(),
        "wrong sign: the loss is -log p": -nll.sum(),
        "these are bits, logarithms to base 2; nats are wanted, torch.log": nll.sum() / torch.tensor(2.0).log(),
        "the targets were shifted once more: they are shifted already": F.cross_entropy((hidden @ weight.T)[:-1], targets[1:], reduction="sum"),
        "the probabilities were added, without the logarithm": -(-nll).exp().sum()})


def ignored(attempt):
    """a target of -100 is no target"""
    hidden, weight, targets = given()
    got, count = loss(attempt, hidden, weight, targets, CHUNK)
    want, n = reference(hidden, weight, targets, CHUNK)
    zeroth = F.cross_entropy(hidden @ weight.T, targets.clamp(min=0), reduction="sum")
    same(got, want, "the sum with 4 targets of -100", "", {"the targets of -100 were taken for token 0 and counted": zeroth})
    same(torch.as_tensor(count), n, "the number of targets", "", {"the targets of -100 count too: only the others have a loss": torch.tensor(N)})


def nothing(attempt):
    """a batch without any target"""
    hidden, weight, targets = given()
    with on("targets that are all -100"):
        got, count = loss(attempt, hidden, weight, torch.full_like(targets, -100), CHUNK)
        if not torch.as_tensor(got).isfinite().all():
            raise Hint("the sum is NaN: a mean over nothing is 0 / 0; reduction=\"sum\" gives 0")
        same(got, torch.tensor(0.0), "the sum")
        same(count, torch.tensor(0), "the number of targets")


def gradients(attempt):
    """the gradients are those of the plain loss"""
    hidden, weight, targets = given()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    got = gradient(loss(attempt, hidden, weight, targets, CHUNK)[0], hidden, weight, names=("hidden", "weight"))
    want = gradient(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), hidden, weight)
    for g, w, name, axes in zip(got, want, ("hidden", "weight"), ("N C", "V C")):
        same(g, w, f"the gradient of {name}", axes)


class Largest(TorchDispatchMode):
    """The most rows of logits that any operation makes."""
    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and V in out.shape:
            self.rows = max(self.rows, out.numel() // V if out.numel() != V * C else 0)
        return out


def in_chunks(attempt):
    """at most `chunk` rows of logits at a time"""
    with Largest() as largest, torch.no_grad():
        loss(attempt, *given(), CHUNK)
    if largest.rows > CHUNK:
        raise Hint(f"{largest.rows} rows of logits were there at once, {CHUNK} are allowed: cut hidden before the product with weight, "
                   "not the logits behind it")


def kept(attempt):
    """no logits are kept for the backward pass"""
    hidden, weight, targets = given()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() if V in x.shape and x.numel() != V * C else 0) or x, lambda x: x):
        loss(attempt, hidden.requires_grad_(), weight.requires_grad_(), targets, CHUNK)
    if sum(sizes) > CHUNK * V:
        raise Hint(f"autograd keeps {sum(sizes) // V} rows of logits or of their softmax for the backward pass, all chunks together: "
                   "the memory is not saved; wrap each chunk in torch.utils.checkpoint.checkpoint(…, use_reentrant=False)")


CHECKS = [total, ignored, nothing, gradients, in_chunks, kept]
