"""How long until a character model of tinyshakespeare knows it well enough? nanoGPT's CPU recipe and ours, side by side.

    python bench/time_to_loss.py --nanogpt DIR --text input.txt                  both, in turns A B A B, on 2 threads
    python bench/time_to_loss.py --text input.txt --ours                         ours alone; then any change, e.g.
    python bench/time_to_loss.py --text input.txt --ours --optimizer adamw --learning_rate 2e-3

nanoGPT: its own train.py, unchanged but for the random seed, with the command of its README for "a macbook" (context 64, batch 12, 4 layers, 4 heads,
width 128, 2,000 updates). Ours: the loop below, of the package's model, optimizer and schedule, with the same context, the same
90/10 split and no more parameters. Seconds are those of the updates (fetch, forward, backward, clip, step), without imports,
evaluation and saving. The loss is the mean over all windows of 64 characters of the validation split.
"""
import dataclasses
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from bench.step import matmul_peak
from nanollm import dist, env, variants
from nanollm.config import UserError, arg, run
from nanollm.losses import cross_entropy
from nanollm.model import ModelArgs, flops_per_token
from nanollm.optim import get_lr, make_optimizer

T = 64
README = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
          "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0")


@dataclass
class Config:
    text: str = arg("", "tinyshakespeare's input.txt")
    nanogpt: str = arg("", "directory of nanoGPT")
    ours: bool = arg(False, "ours alone, one line of JSON")
    rounds: int = arg(2, "times each side is run", least=1)
    threads: int = arg(2, "PyTorch's threads, the same for both", least=1)
    out: str = arg("out/bench/time_to_loss.json", "where the figures go")
    # ours
    dim: int = arg(128, "width")
    n_layers: int = arg(4, "blocks")
    n_heads: int = arg(4, "heads")
    hidden_dim: int = arg(320, "FFN width")
    variants: list = arg(["qk_norm"], "parts to put in place")
    optimizer: str = arg("muon", "muon or adamw")
    muon_lr: float = arg(0.02, "peak rate of the blocks' matrices")
    learning_rate: float = arg(4e-3, "peak rate of the rest")
    schedule: str = arg("linear", "from the peak to 0")
    warmup_steps: int = arg(20, "linear warmup", unit="updates")
    weight_decay: float = arg(0.01, "on matrices")
    batch_size: int = arg(16, "windows an update")
    max_steps: int = arg(280, "updates")
    dtype: str = arg("bfloat16", "of the matrix products: bfloat16 or float32")
    seed: int = arg(0, "initial weights and order of the data; side by side, round r has seed + r on both sides")


def read(path):
    """(train ids, validation ids), the first 90 % and the rest, and the characters, sorted: id = place."""
    text = Path(path).read_text(encoding="utf-8")
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], dtype=np.uint16)
    return ids[: int(len(ids) * 0.9)], ids[int(len(ids) * 0.9):], chars


def windows(ids):
    """inputs and targets (N, 64): the text cut into windows, targets one character further on."""
    n = (len(ids) - 1) // T
    ids = torch.from_numpy(ids.astype(np.int64))
    return ids[: n * T].view(n, T), ids[1 : n * T + 1].view(n, T)


@torch.no_grad()
def validation_loss(logits_of, ids):
    inputs, targets = windows(ids)
    loss = sum(cross_entropy(logits_of(x), y)[0].item() for x, y in zip(inputs.split(128), targets.split(128)))
    return loss / targets.numel()


def ours(cfg):
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    train, val, chars = read(cfg.text)
    inputs, targets = windows(train)
    shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ModelArgs) if hasattr(cfg, f.name)}
    model = variants.build(ModelArgs(**shape, vocab_size=len(chars), max_seq_len=T))
    optimizer = make_optimizer(model, cfg.optimizer, cfg.learning_rate, cfg.weight_decay, muon_lr=cfg.muon_lr)
    autocast = lambda: dist.autocast(torch.device("cpu"), dist.choose_dtype(cfg.dtype, torch.device("cpu")))
    epochs = -(-cfg.max_steps * cfg.batch_size // len(inputs))
    order = torch.cat([torch.randperm(len(inputs)) for _ in range(epochs)])        # each window once, before any comes again

    seconds = 0.0
    for step in range(cfg.max_steps):
        start = time.perf_counter()
        lr = get_lr(step + 1, cfg.learning_rate, 0.0, cfg.warmup_steps, cfg.max_steps, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        rows = order[step * cfg.batch_size :][: cfg.batch_size]
        with autocast():
            logits = model(inputs[rows])
        loss, count, _ = cross_entropy(logits, targets[rows])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with autocast():                                       # Muon's products too
            optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start

    model.eval()
    return {"seconds": seconds, "updates": cfg.max_steps, "tokens": cfg.max_steps * cfg.batch_size * T,
            "loss": validation_loss(model, val), "parameters": sum(p.numel() for p in model.parameters()),
            "gflops": cfg.max_steps * cfg.batch_size * T * flops_per_token(model, T) / seconds / 1e9}


def nanogpt(cfg, seed):
    """Run their train.py in a copy of their directory (its seed, a number in its source, is replaced) and read the times that it prints, one for each update; then load the
    checkpoint that it saves after its 2,000th update. The times of iteration 0 and 2000 hold an evaluation and are left out:
    seconds = the mean of the other 1,999, times 2,000."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "nanoGPT")
        shutil.copytree(cfg.nanogpt, copy, ignore=shutil.ignore_patterns(".git", "*.bin", "*.pt"))
        train, val, chars = read(cfg.text)
        source = (copy / "train.py").read_text(encoding="utf-8")
        if "torch.manual_seed(1337 + seed_offset)" not in source:
            raise UserError(f"--nanogpt {cfg.nanogpt}: its train.py no longer sets the seed as it did; this benchmark knows the version of 2024")
        (copy / "train.py").write_text(source.replace("torch.manual_seed(1337 + seed_offset)", f"torch.manual_seed({seed})"), encoding="utf-8")
        data = copy / "data/shakespeare_char"                  # as its prepare.py writes them
        train.tofile(data / "train.bin")
        val.tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars)),
                                                      "stoi": {c: i for i, c in enumerate(chars)}}))
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *README.split(), "--eval_interval=2000"]
        output, rss = alone(command, cfg, cwd=copy)
        times = {int(i): float(ms) / 1000 for i, ms in re.findall(r"iter (\d+): .* time ([\d.]+)ms", output)}
        sys.path.insert(0, str(copy))
        from model import GPT, GPTConfig
        checkpoint = torch.load(copy / "out-shakespeare-char/ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**checkpoint["model_args"])).eval()
    model.load_state_dict(checkpoint["model"])
    seconds = 2000 * statistics.mean(times[i] for i in range(1, 2000))
    flops = 6 * sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "wpe" not in n) + 12 * 4 * 128 * T       # as ours are counted
    every_place = lambda tokens: model(tokens, tokens)[0]      # without targets it computes the last place only
    return {"seconds": seconds, "gflops": 2000 * 12 * T * flops / seconds / 1e9, "updates": checkpoint["iter_num"],
            "tokens": 2000 * 12 * T, "loss": validation_loss(every_place, val), "parameters": sum(p.numel() for p in model.parameters()),
            "rss_mb": rss}


def alone(command, cfg, cwd=None):
    """Run a command in a process of its own: (what it prints, its peak resident set in MB)."""
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads), "MKL_NUM_THREADS": str(cfg.threads)}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as f:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=f)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise UserError(f"{' '.join(command)} failed; what it says stands above")
        f.seek(0)
        return f.read(), usage.ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)         # macOS counts bytes, Linux kilobytes


def main(cfg):
    if not cfg.text:
        raise UserError("--text: name tinyshakespeare's input.txt")
    if cfg.ours:
        return print(json.dumps(ours(cfg)))
    if not Path(cfg.nanogpt, "train.py").is_file() or not cfg.nanogpt:
        raise UserError(f"--nanogpt {cfg.nanogpt}: no train.py there; give the directory of nanoGPT, or --ours")
    results = {"nanoGPT": [], "nanollm": []}
    for seed in range(cfg.seed, cfg.seed + cfg.rounds):
        results["nanoGPT"].append(nanogpt(cfg, seed))
        output, rss = alone([sys.executable, __file__, *sys.argv[1:], "--ours", "--seed", str(seed)], cfg)
        results["nanollm"].append(json.loads(output.splitlines()[-1]) | {"rss_mb": rss})
    torch.set_num_threads(cfg.threads)
    peak = matmul_peak()
    print(f"| side | parameters | updates | tokens | seconds | tokens/s | GFLOP/s of {peak:.0f} | validation loss | peak RSS |\n{'|---' * 9}|")
    for name, runs in results.items():
        for r in runs:
            print(f"| {name} | {r['parameters']:,} | {r['updates']:,} | {r['tokens']:,} | {r['seconds']:.1f} | "
                  f"{r['tokens'] / r['seconds']:,.0f} | {r['gflops']:.0f} | {r['loss']:.4f} | {r['rss_mb']:.0f} MB |")
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(results["nanoGPT"], results["nanollm"]))
    print(f"median ratio of seconds: {ratio:.3f}")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps({"ratio": ratio, "threads": cfg.threads, "matmul_peak": peak, **env.stamp(), **results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
