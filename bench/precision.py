"""What the notes say costs or saves time and memory in a training step, measured on this CPU: prints tables, writes a JSON.

    python bench/precision.py --what batch         is a batch size that is a power of two faster?
    python bench/precision.py --what memory        what backward keeps, and the time of a step: fp32, autocast, checkpointing
"""
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nanollm.model
from nanollm import dist, env
from nanollm.config import UserError, arg, run
from nanollm.losses import cross_entropy
from nanollm.model import ModelArgs, Transformer


@dataclass
class Config:
    what: str = arg("batch", "batch | memory")
    dim: int = arg(256, "width of the model; 4 layers, 4 heads")
    vocab_size: int = arg(4096, "its vocabulary")
    seq_len: int = arg(128, "its context", unit="tokens")
    rows: int = arg(16, "rows a step for memory")
    sizes: list = arg(["12", "15", "16", "17", "20", "24", "31", "32", "33"], "batch sizes for batch")
    repeats: int = arg(7, "rounds; each runs every side once", least=1)
    threads: int = arg(1, "threads of PyTorch; with more, CPU seconds are more than the time of a step", least=1)
    out: str = arg("out/bench", "where the JSON goes")


def step(model, rows, dtype):
    """Forward and backward of one batch. CPU seconds of this process: with one thread they are the time of a step on a machine that does
    nothing else, and other jobs count little."""
    tokens = torch.randint(0, model.args.vocab_size, (rows, model.args.max_seq_len + 1), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    with dist.autocast(torch.device("cpu"), dtype):
        loss, count, _ = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    (loss / count).backward()
    seconds = time.process_time() - began
    model.zero_grad()
    return seconds


def kept_bytes(model, rows, dtype, gpu=False):
    """Bytes that autograd keeps between forward and backward, each storage once, weights and tables left out. gpu: along the path
    that the model takes on a GPU, without the CPU's derivatives by hand (fp32) and attention in fp32 (16 bits)."""
    own, kept = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t
    tokens = torch.zeros(rows, model.args.max_seq_len, dtype=torch.long)
    if gpu:
        with mock.patch.object(nanollm.model, "by_hand", lambda x: False), mock.patch.object(torch, "is_autocast_enabled", lambda *a: False):
            return kept_bytes(model, rows, dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), dist.autocast(torch.device("cpu"), dtype):
        loss, _, _ = cross_entropy(model(tokens), tokens)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def batch(cfg, model):
    sides = {int(size): [] for size in cfg.sizes}
    for repeat in range(cfg.repeats + 1):                    # one after the other, round by round; the first round warms up
        for size in sides:
            sides[size].append(step(model, size, torch.float32))
    print("| rows a batch | CPU ms a row |\n|---|---|")
    found = {size: 1e3 * statistics.median(times[1:]) / size for size, times in sides.items()}
    for size, ms in found.items():
        print(f"| {size} | {ms:.2f} |")
    return found


def memory(cfg, model):
    sides = {"fp32": (torch.float32, False), "bf16 autocast": (torch.bfloat16, False), "fp32, checkpointing": (torch.float32, True),
             "bf16 autocast, checkpointing": (torch.bfloat16, True)}
    times, kept, gpu = {name: [] for name in sides}, {}, {}
    for repeat in range(cfg.repeats + 1):
        for name, (dtype, model.checkpointing) in sides.items():
            if repeat == 0:
                kept[name], gpu[name] = (kept_bytes(model, cfg.rows, dtype, on_gpu) for on_gpu in (False, True))
            times[name].append(step(model, cfg.rows, dtype))
    print("| step | kept on a GPU's path, MB | of fp32 | kept on the CPU, MB | of fp32 | CPU ms a step | of fp32 |\n|---|---|---|---|---|---|---|")
    found = {name: {"gpu": gpu[name], "bytes": kept[name], "ms": 1e3 * statistics.median(times[name][1:])} for name in sides}
    for name, f in found.items():
        print(f"| {name} | {f['gpu'] / 1e6:.1f} | {f['gpu'] / found['fp32']['gpu']:.2f} | {f['bytes'] / 1e6:.1f} | {f['bytes'] / found['fp32']['bytes']:.2f} "
              f"| {f['ms']:.0f} | {f['ms'] / found['fp32']['ms']:.2f} |")
    return found


def main(cfg):
    whats = {"batch": batch, "memory": memory}
    if cfg.what not in whats:
        raise UserError(f"--what {cfg.what} is unknown; use one of {', '.join(whats)}")
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=cfg.dim, n_layers=4, n_heads=4, vocab_size=cfg.vocab_size, max_seq_len=cfg.seq_len))
    print(f"PyTorch {torch.__version__}, {cfg.threads} thread(s), dim {cfg.dim}, 4 layers, vocabulary {cfg.vocab_size}, T {cfg.seq_len}")
    found = whats[cfg.what](cfg, model)
    rss = env.peak_rss_mb()
    print(f"peak RSS of all sides in one process: {rss or 0:.0f} MB")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    figures = {"config": vars(cfg), **env.stamp(), "peak_rss_mb": rss, "found": found}
    (Path(cfg.out) / f"precision_{cfg.what}.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
