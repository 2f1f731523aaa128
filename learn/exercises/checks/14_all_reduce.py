"""What is asked of exercise 14, and the solution: nanollm.dist.DDP.

The ranks run one after another, twice: the first time all_reduce only writes down what each sends, the second time it adds what the
others have sent. So a program that would wait for ever is found without waiting.
"""
from types import SimpleNamespace
from unittest import mock

import torch

from learn.exercises.judge import Hint, randn, same
from nanollm import dist

NAME = "average_gradients"
W = 3


def reference(parameters, world_size, all_reduce):
    def send(tensor, async_op):
        all_reduce(tensor)
        return SimpleNamespace(wait=lambda: None)
    with mock.patch.object(dist, "torch_dist", SimpleNamespace(broadcast=lambda tensor, src: None, all_reduce=send)):
        ddp = dist.DDP(torch.nn.ParameterList(parameters), SimpleNamespace(world_size=world_size))
        for p in parameters:
            if p.grad is not None:
                ddp._ready(p)                                    # what autograd calls when a gradient is there
        ddp.wait()


def ranks(without=()):
    """For each rank its parameters, copies of each other, with gradients of their own; without: (rank, parameter) that has none."""
    out = []
    for rank in range(W):
        parameters = [torch.nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate([(3, 4), (5,), (2, 2)])]
        for i, p in enumerate(parameters):
            p.grad = None if (rank, i) in without else randn(*p.shape, seed=10 * rank + i + 100)
        out.append(parameters)
    return out


def together(attempt, without=()):
    """Runs the attempt on all ranks -> (their parameters afterwards, what each has sent)."""
    sent = []
    for parameters in ranks(without):
        sent.append([])
        attempt(parameters, W, lambda tensor: sent[-1].append(tensor.detach().clone()))
    sizes = [[tuple(t.shape) for t in messages] for messages in sent]
    for rank, other in enumerate(sizes):
        if len(other) != len(sizes[0]):
            raise Hint(f"deadlock: rank 0 calls all_reduce {len(sizes[0])} times and rank {rank} {len(other)} times, so they would wait for each other for "
                       "ever; a gradient that is None must be sent as zeros")
        if other != sizes[0]:
            raise Hint(f"rank 0 sends {sizes[0]} and rank {rank} sends {other}: all must send the same sizes in the same order; a gradient that is None "
                       "must be sent as zeros")
    after = ranks(without)
    for rank, parameters in enumerate(after):
        calls = iter(range(10**9))

        def all_reduce(tensor):
            i = next(calls)
            tensor.data.add_(sum(sent[other][i] for other in range(W) if other != rank).view_as(tensor))
        attempt(parameters, W, all_reduce)
    return after, sent


def means(attempt):
    """every gradient is the mean over the ranks"""
    before, (after, sent) = ranks(), together(attempt)
    if not sent[0]:
        raise Hint("all_reduce was not called: no rank hears of the others")
    for i in range(3):
        total = sum(parameters[i].grad for parameters in before)
        for rank in range(W):
            got = after[rank][i].grad
            if got is None:
                raise Hint(f"p.grad of parameter {i} is None afterwards")
            same(got, total / W, f"the gradient of parameter {i} on rank {rank}", "", {
                "this is the sum over the ranks; divide by world_size": total, "divided by world_size twice": total / W**2,
                "the mean was computed but not written back: copy the parts of the bucket into p.grad": before[rank][i].grad,
                "divided, but not summed: all_reduce works in place on the very tensor that it is given, here on a copy": before[rank][i].grad / W,
                "the weights were averaged, not the gradients: put p.grad into the bucket, not p": before[rank][i].detach()})
            if not torch.equal(after[rank][i], before[rank][i]):
                raise Hint("the weights were changed; only the gradients are averaged")


def unused(attempt):
    """a parameter without gradient on some rank counts as zero there"""
    without = {(1, 1), (2, 1), (0, 2)}
    before, (after, _) = ranks(without), together(attempt, without)
    for i in range(3):
        grads = [parameters[i].grad for parameters in before if parameters[i].grad is not None]
        for rank in range(W):
            got = after[rank][i].grad
            if got is None:
                raise Hint(f"rank {rank} had no gradient for parameter {i} and has none afterwards; the others' mean belongs there too, "
                           "or the copies drift apart")
            same(got, sum(grads) / W, f"the gradient of parameter {i} on rank {rank}, which only {len(grads)} of {W} ranks have", "", {
                "a missing gradient counts as zero: divide by world_size, not by the number of ranks that have one": sum(grads) / len(grads)})


def one_message(attempt):
    """one message"""
    sent = together(attempt)[1][0]
    if len(sent) > 1:
        raise Hint(f"all_reduce is called {len(sent)} times, once for each parameter; put all gradients into one flat bucket and send that")


CHECKS = [means, unused, one_message]
