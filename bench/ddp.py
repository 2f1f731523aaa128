"""Our DDP beside PyTorch's: seconds of an update on two gloo ranks with one thread each, in one process order A B A B.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 bench/ddp.py
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 bench/ddp.py --dim 512 --rows 2

An update is forward, backward, all-reduce, AdamW and zero_grad on the same rows. Compared are ours, torch's
DistributedDataParallel as it comes and with gradient_as_bucket_view, and the same update without any all-reduce: what the
others take longer is what communication costs and overlap does not hide. An update counts as long as its slowest rank takes.
"""
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch.nn.parallel import DistributedDataParallel

from bench.step import matmul_peak
from nanollm import dist, env
from nanollm.config import UserError, arg, run
from nanollm.model import ModelArgs, Transformer, flops_per_token
from nanollm.optim import make_optimizer


@dataclass
class Config:
    dim: int = arg(256, "width; heads of 64")
    n_layers: int = arg(8, "blocks")
    vocab_size: int = arg(6400, "vocabulary, tied")
    max_seq_len: int = arg(128, "tokens a row")
    rows: int = arg(2, "rows a rank and update: few, so that communication counts", least=1)
    updates: int = arg(10, "updates a round, the first one left out", least=2)
    rounds: int = arg(6, "times each side is run, in turns", least=1)
    out: str = arg("out/bench/ddp.json", "where the figures go")


def sides(cfg, ctx):
    """{name: (raw, model, update function)}"""
    def fresh():
        torch.manual_seed(0)
        raw = Transformer(ModelArgs(dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.dim // 64, vocab_size=cfg.vocab_size, max_seq_len=cfg.max_seq_len))
        return raw, make_optimizer(raw)

    def side(wrap, begin=lambda model: None, end=lambda model: None, clear=None):
        raw, optimizer = fresh()
        model = wrap(raw)
        def update(tokens):
            begin(model)
            model(tokens).logsumexp(-1).mean().backward()
            end(model)
            optimizer.step()
            clear(model) if clear else optimizer.zero_grad()
        return raw, update

    alone = dist.Context(0, 0, 1, ctx.device, ctx.main)
    return {"ours": side(lambda raw: dist.DDP(raw, ctx), end=lambda m: m.wait(), clear=lambda m: m.zero_grad()),
            "torch": side(DistributedDataParallel),
            "torch, views": side(lambda raw: DistributedDataParallel(raw, gradient_as_bucket_view=True)),
            "no all-reduce": side(lambda raw: dist.DDP(raw, alone))}


def main(cfg):
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise UserError("bench/ddp.py compares several processes: start it with torchrun --standalone --nproc_per_node=2 bench/ddp.py")
    ctx = dist.init("cpu")
    todo, seconds = sides(cfg, ctx), {}
    for round in range(cfg.rounds):
        for name, (_, update) in todo.items():
            for i in range(cfg.updates):
                tokens = torch.randint(cfg.vocab_size, (cfg.rows, cfg.max_seq_len), generator=torch.Generator().manual_seed(100 * round + 10 * i + ctx.rank))
                ctx.barrier()
                start = time.perf_counter()
                update(tokens)
                took = max(ctx.gather(time.perf_counter() - start))
                seconds.setdefault(name, []).extend([took] if i else [])
    weights = [list(todo[name][0].parameters()) for name in ("ours", "torch")]
    apart = max((a - b).abs().max().item() for a, b in zip(*weights))
    n = sum(p.numel() for p in weights[0])
    flops, peak = cfg.rows * cfg.max_seq_len * flops_per_token(todo["ours"][0], cfg.max_seq_len), matmul_peak()         # all ranks at once: each has its core
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    record = {"config": vars(cfg), "parameters": n, "ranks": ctx.world_size, "threads": torch.get_num_threads(), "median_seconds": medians,
              "ratio_torch_over_ours": medians["torch"] / medians["ours"], "ratio_views_over_ours": medians["torch, views"] / medians["ours"],
              "largest_difference_of_weights": apart, "seconds": seconds, "gflops": {name: flops / s / 1e9 for name, s in medians.items()},
              "matmul_peak": peak, "peak_rss_mb": ctx.gather(env.peak_rss_mb()), **env.stamp()}
    print(f"{n:,} parameters, {4 * n / 2**20:.0f} MB of gradients; {ctx.world_size} ranks, {record['threads']} thread(s) each; "
          f"{len(seconds['ours'])} updates a side; matmul peak {peak:.0f} GFLOP/s a rank; peak RSS of rank 0 with all four models {record['peak_rss_mb'][0] or 0:.0f} MB\n\n"
          "| | median s an update | torch's DDP = 1 | GFLOP/s a rank |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {median / medians['torch']:.3f} | {record['gflops'][name]:.1f} |")
    print(f"\nweights of ours and torch's after {cfg.rounds * cfg.updates} updates: {apart:.1e} apart")
    if ctx.main:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out).write_text(json.dumps(record, indent=1), encoding="utf-8")
    dist.finish(ctx)


if __name__ == "__main__":
    run(main, Config, __doc__)
