"""What each form of parallelism keeps and sends: bytes a process, bytes on the wire and seconds of an update, on gloo ranks.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 bench/parallel.py
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=4 bench/parallel.py

Kept are the bytes of all tensors of weights, gradients and optimizer states that live between backward and step. Sent is
what the loopback device carried during an update (Linux; anything else that uses it is counted, too: the median of several
updates is taken), in units of Psi (W - 1) / W numbers a process, Psi = parameters, W = processes.
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
import torch.distributed as torch_dist

from nanollm import dist, env, parallel
from nanollm.config import UserError, arg, run
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import make_optimizer
from nanollm.zero import ZeroAdamW


@dataclass
class Config:
    dim: int = arg(512, "width; heads of 64")
    n_layers: int = arg(8, "blocks")
    vocab_size: int = arg(6400, "vocabulary, tied")
    max_seq_len: int = arg(32, "tokens a row")
    updates: int = arg(5, "updates, the first one left out", least=2)
    out: str = arg("out/bench/parallel.json", "results are added to this file")


def on_the_wire():
    """Bytes that the loopback device has received since the machine started."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


def size(tensors):
    return sum(parallel.local(t).numel() * t.element_size() for t in tensors)


def measure(name, ctx, cfg):
    torch.manual_seed(0)
    raw = Transformer(ModelArgs(dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.dim // 64, vocab_size=cfg.vocab_size, max_seq_len=cfg.max_seq_len))
    n = sum(p.numel() for p in raw.parameters())
    zero = name == "zero-1"
    model = raw if zero else dist.wrap(raw, ctx)
    optimizer = ZeroAdamW([{"params": list(raw.parameters()), "weight_decay": 0.1}]) if zero else make_optimizer(raw)
    W, sent, seconds = torch_dist.get_world_size(), [], []
    for i in range(cfg.updates):
        tokens = torch.randint(cfg.vocab_size, (1, cfg.max_seq_len), generator=torch.Generator().manual_seed(10 * i + ctx.rank))
        ctx.barrier()
        before, start = on_the_wire(), time.perf_counter()
        model.sync = True
        model(tokens).logsumexp(-1).mean().backward()
        None if zero else model.wait()
        gradients = size(p.grad for p in raw.parameters())
        optimizer.step()
        (optimizer if zero else model).zero_grad()
        ctx.barrier()
        sent.append(on_the_wire() - before)
        seconds.append(time.perf_counter() - start)
    states = optimizer.state_bytes() if zero else size(t for state in optimizer.state.values() for t in state.values() if t.dim())
    return {"layout": name, "processes": W, "parameters": n, "weights": size(raw.parameters()), "gradients": gradients, "states": states,
            "sent": statistics.median(sent[1:]) / (4 * n * (W - 1)), "seconds": statistics.median(seconds[1:])}


def main(cfg):
    W = int(os.environ.get("WORLD_SIZE", 1))
    if W < 2 or W % 2:
        raise UserError("bench/parallel.py compares layouts of 2 or 4 processes: start it with torchrun --standalone --nproc_per_node=2 bench/parallel.py")
    layouts = [("ddp", "ddp", 1), ("zero-1", "ddp", 1), ("fsdp", "fsdp", 1), (f"tp {W}", "ddp", W)] + [("fsdp, tp 2", "fsdp", 2)] * (W > 2)
    rows = []
    for name, kind, tp in layouts:
        ctx = dist.init("cpu", kind, tp)
        rows.append(measure(name, ctx, cfg))
    print(f"\n{rows[0]['parameters']:,} parameters, {W} processes; MB a process, sent in units of Psi (W - 1) / W\n\n"
          "| | weights | gradients | states | sum | sent | s an update |\n|---|---|---|---|---|---|---|")
    for r in rows:
        mb = [r[k] / 1e6 for k in ("weights", "gradients", "states")]
        print(f"| {r['layout']} | {mb[0]:.1f} | {mb[1]:.1f} | {mb[2]:.1f} | {sum(mb):.1f} | {r['sent']:.2f} | {r['seconds']:.2f} |")
    if ctx.main:
        out = Path(cfg.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        out.write_text(json.dumps([r for r in done if r["processes"] != W] + [{**r, **env.stamp()} for r in rows], indent=1), encoding="utf-8")
    dist.finish(ctx)


if __name__ == "__main__":
    run(main, Config, __doc__)
