"""ZeRO-1 is AdamW with its states spread over the ranks: the same weights, 1/W of the bytes, no more to send."""
import os

import pytest
import torch
import torch.distributed as torch_dist

from conftest import largest_difference, run_ranks, tiny_lm
from nanollm.zero import ZeroAdamW

STEPS, ROWS = 6, 8


def groups_of(model):
    return [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]


def backward(model, step, rank, world_size):
    x = torch.randint(0, 60, (ROWS, 9), generator=torch.Generator().manual_seed(step))[rank::world_size]
    model(x).logsumexp(-1).square().mean().backward()


def plain():
    model = tiny_lm(3)
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, betas=(0.9, 0.95))
    for step in range(STEPS):
        backward(model, step, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def worker(out):
    torch_dist.init_process_group("gloo")
    rank, n = torch_dist.get_rank(), torch_dist.get_world_size()
    model = tiny_lm(3)
    optimizer = ZeroAdamW(groups_of(model), lr=1e-2)
    for step in range(STEPS):
        backward(model, step, rank, n)
        optimizer.step()
        optimizer.zero_grad()

    # an all-reduce is a reduce-scatter and an all-gather
    x = torch.randn(4 * n, generator=torch.Generator().manual_seed(rank))
    part, both = torch.empty(4), torch.empty(4 * n)
    torch_dist.reduce_scatter(part, list(x.chunk(n)))
    torch_dist.all_gather(list(both.chunk(n)), part)
    torch_dist.all_reduce(x)
    torch.save({"state": model.state_dict(), "bytes": optimizer.state_bytes(), "apart": (both - x).abs().max().item(), "size": x.norm().item()},
               out / f"seen{rank}.pt")
    torch_dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def seen(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"zero{request.param}")
    run_ranks("test_zero.worker", out, request.param)
    return [torch.load(out / f"seen{r}.pt", weights_only=True) for r in range(request.param)]


def test_zero_1_gives_the_weights_of_adamw(seen):
    """On every rank, after six steps with weight decay on the matrices only, to 1e-5."""
    want, start = plain()[0].state_dict(), tiny_lm(3).state_dict()
    for rank in seen:
        assert largest_difference(rank["state"], want) < 1e-5
        assert all(torch.equal(rank["state"][k], seen[0]["state"][k]) for k in want)      # between ranks: bit for bit
    assert largest_difference(want, start) > 1e-2


def test_each_rank_keeps_its_share_of_the_states(seen):
    """AdamW's 8 bytes a parameter, over the number of ranks, to the last few bytes that fill up the parts."""
    model, optimizer = plain()
    whole = sum(state[k].numel() * 4 for state in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    assert whole == 8 * sum(p.numel() for p in model.parameters())
    for rank in seen:
        assert 0 <= rank["bytes"] * len(seen) - whole < 8 * len(seen)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(seen):
    """So ZeRO-1 and 2 send what DDP sends; they save memory, not traffic."""
    for rank in seen:
        assert rank["apart"] < 1e-5 < rank["size"]


def test_without_a_group_it_is_plain_adamw():
    model = tiny_lm(3)
    optimizer = ZeroAdamW(groups_of(model), lr=1e-2)
    for step in range(STEPS):
        backward(model, step, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(model.state_dict(), plain()[0].state_dict()) < 1e-6
