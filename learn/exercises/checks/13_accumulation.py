"""What is asked of exercise 13, and the solution: the loop of train_pretrain.py with nanollm.losses.cross_entropy."""
import torch

from learn.exercises.judge import Hint, on, randint, same
from nanollm.losses import cross_entropy

NAME = "accumulate"
V = 11


def reference(model, batches):
    model.zero_grad()
    count, total = sum((targets != -100).sum() for _, targets in batches), 0.0
    for inputs, targets in batches:
        loss = cross_entropy(model(inputs), targets)[0] / count
        loss.backward()
        total += loss.item()
    return total


def a_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(V, 6), torch.nn.Linear(6, V))


def given(*targets_in_each):
    """One micro-batch of 2 rows of 8 tokens for each number: so many of its 16 targets are real."""
    batches = []
    for seed, n in enumerate(targets_in_each):
        targets = randint(V, 2, 8, seed=seed + 50)
        targets.view(-1)[n:] = -100
        batches.append((randint(V, 2, 8, seed=seed), targets))
    return batches


def gradients(function, batches, stale=False):
    """(loss, the gradient of the last matrix, after function(model, batches); what ran: the rows of each forward pass, "backward")."""
    model, seen = a_model(), []
    if stale:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model[1].weight.register_hook(lambda _: seen.append("backward"))
    loss = function(model, batches)
    return loss, model[1].weight.grad, seen


def wrong(batches, each, stale=False, keep=slice(None)):
    """The gradient where each(sum, count, total count, number of micro-batches) is what goes backward."""
    def run(model, batches):
        total = sum(cross_entropy(torch.zeros(2, 8, V), t)[1] for _, t in batches)
        for inputs, targets in batches[keep]:
            loss, count, _ = cross_entropy(model(inputs), targets)
            each(loss, count, total, len(batches)).backward()
    return gradients(run, batches, stale)[1]


def same_as_whole(attempt):
    """the gradient of the whole batch"""
    batches = given(16, 3, 9)
    loss, grad, _ = gradients(attempt, batches)
    if grad is None:
        raise Hint("p.grad is None afterwards: call .backward() for each micro-batch, and do not clear the gradients at the end")
    whole, want, _ = gradients(reference, batches)
    same(grad, want, "the gradient", "V C", {
        "mean of means: each micro-batch was divided by its own number of targets; divide the sums by the number of all, 16 + 3 + 9":
            wrong(batches, lambda s, n, total, k: s / n / k),
        "each micro-batch was divided by its own number of targets, and the means added up; divide the sums by the number of all":
            wrong(batches, lambda s, n, total, k: s / n),
        "sum instead of mean: divide by the number of all targets": wrong(batches, lambda s, n, total, k: s),
        "the sum was divided by the number of micro-batches; divide by the number of targets": wrong(batches, lambda s, n, total, k: s / k),
        "divided by the number of targets and by that of the micro-batches; once is enough": wrong(batches, lambda s, n, total, k: s / total / k),
        "divided by all places, padding too; count only the targets that are not -100": wrong(batches, lambda s, n, total, k: s / 48),
        "only the last micro-batch is in the gradient: zero_grad() belongs in front of the loop":
            wrong(batches, lambda s, n, total, k: s / total, keep=slice(-1, None)),
        "only the last micro-batch is in the gradient: zero_grad() belongs in front of the loop; and divide by all targets":
            wrong(batches, lambda s, n, total, k: s / n, keep=slice(-1, None)),
        "only the first micro-batch is in the gradient": wrong(batches, lambda s, n, total, k: s / total, keep=slice(0, 1))})
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        raise Hint("the loss that comes back still carries its graph, and with it the memory of the micro-batch: return loss.item() or .detach()")
    same(loss, whole, "the mean loss", mistakes={
        "the gradient is right, but the loss that comes back is not the mean over all targets: add up what went backward": whole * 28,
                                                 "the gradient is right, but the loss that comes back is three times the mean": whole * 3})


def fresh(attempt):
    """what stood in p.grad before is gone"""
    batches = given(16, 3, 9)
    same(gradients(attempt, batches, stale=True)[1], gradients(reference, batches)[1], "the gradient of the second update", "V C", {
        "old gradients are still in there: model.zero_grad() in front of the loop": gradients(reference, batches)[1] + 1})


def empty(attempt):
    """a micro-batch without targets"""
    batches = given(16, 0, 9)
    with on("a micro-batch whose targets are all -100"):
        loss, grad, _ = gradients(attempt, batches)
        if not grad.isfinite().all():
            raise Hint('the gradient is NaN: the mean over no targets is 0 / 0; reduction="sum" gives 0')
        same(grad, gradients(reference, batches)[1], "the gradient", "V C")


def one_at_a_time(attempt):
    """one micro-batch in memory at a time"""
    seen = gradients(attempt, given(16, 3, 9))[2]
    rows = [n for n in seen if n != "backward"]
    if rows != [2, 2, 2]:
        raise Hint(f"the model was called with {rows} rows; call it once for each micro-batch, with its 2 rows: the whole batch does not fit into memory")
    if (2, 2) in zip(seen, seen[1:]):
        raise Hint("a micro-batch went forward before the one in front of it went backward: the graphs of both are in memory; "
                   "call .backward() in the loop, on the loss of each")


CHECKS = [same_as_whole, fresh, empty, one_at_a_time]
