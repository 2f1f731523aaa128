"""Claims of the notes about memory, precision and quantisation that no other test shows."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_lm
from nanollm.losses import cross_entropy
from nanollm.model import KVCache
from nanollm.optim import get_lr, make_optimizer
from nanollm.quant import matrices

PAGE = 4


class PagedCache(KVCache):
    """PagedAttention's idea (Kwon et al. 2023, section 4.1) for one row: keys and values lie in pages of PAGE tokens out of one pool, and a
    table says which page holds which stretch. Pages are taken when they are needed, wherever there is room."""

    def __init__(self, pool):
        super().__init__()
        self.pool, self.tables, self.n = pool, {}, {}                # the pool is shared by all rows

    @property
    def length(self):
        return next(iter(self.n.values()), 0)

    def extend(self, module, k, v):
        table, start = self.tables.setdefault(module, []), self.n.get(module, 0)
        self.n[module] = end = start + k.size(2)
        while len(table) * PAGE < end:
            table.append(self.pool["free"].pop())
        for i, t in enumerate(range(start, end)):
            self.pool["pages"][table[t // PAGE]][:, :, t % PAGE] = torch.stack((k[0, :, i], v[0, :, i]))
        kv = torch.cat([self.pool["pages"][page] for page in table], dim=2)[:, :, :end]              # (2, G, S, D)
        return kv[0][None], kv[1][None]


def test_a_cache_in_pages_changes_no_logit_and_wastes_less_than_a_page_a_text():
    """Three texts of different lengths grow in turn, so that their pages lie mixed; a cache that reserves the whole context for each would
    hold 3 * 64 places."""
    model = tiny_lm()
    shape = (2, model.args.n_kv_heads, PAGE, model.args.head_dim)
    pool = {"pages": torch.zeros(64, *shape), "free": list(torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist())}
    rows = [torch.randint(0, 300, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 13, 18)]
    caches, out = [PagedCache(pool) for _ in rows], [[] for _ in rows]
    with torch.no_grad():
        for t in range(18):
            for i, row in enumerate(rows):
                if t < row.size(1):
                    out[i].append(model(row[:, t : t + 1], cache=caches[i]))
        for row, cache, logits in zip(rows, caches, out):
            torch.testing.assert_close(torch.cat(logits, 1), model(row), atol=1e-5, rtol=0)
            for module, table in cache.tables.items():
                assert 0 <= len(table) * PAGE - row.size(1) < PAGE
    used = 64 - len(pool["free"])
    assert used * PAGE == model.args.n_layers * (8 + 16 + 20) and 8 + 16 + 20 < 3 * model.args.max_seq_len / 4
    pages = [page for cache in caches for table in cache.tables.values() for page in table]
    assert len(pages) == len(set(pages)) == used


def test_each_weight_that_is_read_does_the_work_of_as_many_rows_as_the_batch_has():
    """A step of decoding multiplies every matrix by one vector a row: 2 FLOPs a weight at batch 1, 32 at batch 16, for the same bytes of
    weights. So one answer waits for memory, on a CPU and on a GPU alike, and a batch gives the arithmetic units something to do."""
    model, work = tiny_lm(tie_embeddings=False), {}
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "tok_embeddings" not in name)
    for rows in (1, 16):
        cache = KVCache()
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            model(torch.zeros(rows, 1, dtype=torch.long), cache=cache)
        work[rows] = counted.get_total_flops() / weights
    assert work[1] == pytest.approx(2, rel=0.05) and work[16] == pytest.approx(16 * work[1])


def rounded(weight):
    """Each weight to -s, 0 or s with s the mean of their sizes (1.6 bits; Ma et al. 2024, arXiv:2402.17764, eq. 1)."""
    s = weight.abs().mean()
    return (weight / s).round().clamp(-1, 1) * s


class RoundedLinear(torch.nn.Module):
    """Computes with the rounded weight and learns the fp32 one: the gradient passes as if nothing had been rounded (the straight-through
    estimator, Bengio et al. 2013, arXiv:1308.3432)."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return F.linear(x, self.weight + (rounded(self.weight) - self.weight).detach())


class Operators(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **kwargs or {})


def losses(model, ids, steps, learning_rate=1e-2):
    optimizer, found = make_optimizer(model, learning_rate=learning_rate, weight_decay=0.0), []
    for _ in range(steps):
        loss, count, _ = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss / count).item())
    return found


def cost(model, ids):
    """(FLOPs of the matrix products, number of operators) of a forward and a backward pass."""
    with FlopCounterMode(display=False) as flops:
        cross_entropy(model(ids[:, :-1]), ids[:, 1:])[0].backward()
    with Operators() as operators:
        cross_entropy(model(ids[:, :-1]), ids[:, 1:])[0].backward()
    return flops.get_total_flops(), operators.n


def test_training_for_rounded_weights_is_better_than_rounding_afterwards_and_costs_more():
    """128 random tokens learnt by heart, then three levels a weight: rounded once, most is forgotten; trained on, much comes back. But that
    training keeps each weight, gradient and moment in fp32, does the same products, and the rounding besides: no cheaper than other fine-tuning."""
    ids, model = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0)), tiny_lm(n_layers=1).train()
    learnt = losses(model, ids, 60)[-1]
    after = copy.deepcopy(model)
    for name, linear in matrices(after).items():
        after.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], RoundedLinear(linear))
    before = cost(model, ids), {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
    assert (cost(after, ids)[0], {n: (p.shape, p.dtype) for n, p in after.named_parameters()}) == (before[0][0], before[1])
    assert cost(after, ids)[1] > cost(model, ids)[1]
    once, *_, trained = losses(after, ids, 40)
    assert once > learnt + 1 and trained < (once + learnt) / 2, (learnt, once, trained)


def test_the_cosine_schedule_never_rises_again():
    """After warmup each rate is at most the one before: nothing periodic without restarts."""
    rates = [get_lr(i, 3e-4, 3e-5, 50, 1000) for i in range(1, 1100)]
    assert all(a <= b for a, b in itertools.pairwise(rates[:50])) and all(a >= b for a, b in itertools.pairwise(rates[49:]))


def test_the_old_names_of_mixed_precision_warn():
    """torch.cuda.amp.GradScaler and autocast still work and say what to write instead."""
    for old in (lambda: torch.cuda.amp.GradScaler(enabled=False), lambda: torch.cuda.amp.autocast(enabled=False)):
        with pytest.warns(FutureWarning, match="torch.amp"):
            old()


def test_bf16_counts_to_256_and_fp16_to_2048():
    """What the mantissa holds: up to there every whole number is exact, the next one is not."""
    for dtype, last in ((torch.bfloat16, 256), (torch.float16, 2048)):
        whole = torch.arange(last + 2.0)
        assert torch.equal(whole[:-1].to(dtype).float(), whole[:-1]) and whole[-1].to(dtype).float() == last
