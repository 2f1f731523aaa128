"""What quantised weights take and cost on this CPU: bytes, resident memory, milliseconds a token; prints a table, writes a JSON.

    python bench/quant.py                              the demo's shape and one of 28 M, about five minutes
    python bench/quant.py --shapes 128x2 --rounds 1

Random weights (neither memory nor speed depends on what they are), each measurement in a fresh process that loads, as chat.py does, a
checkpoint that holds the side's weights (nanollm/tools/quantize.py); the sides take turns, times are the median over the rounds. Memory
is taken in one process more, whose allocator gives back at once what is freed.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from nanollm import checkpoint, env, quant
from nanollm.config import arg, run
from nanollm.generate import generate
from nanollm.model import ModelArgs, Transformer, parameter_count
from nanollm.tokenizer import bpe_tokenizer, pattern_for

SIDES = ("fp32", "int8", "int4", "nf4")


@dataclass
class Config:
    shapes: list = arg(["128x2", "512x8"], "width x layers, heads of 32; vocabulary 1280 up to 128 wide, 6400 beyond")
    new_tokens: int = arg(64, "written one by one after a prompt of 64", unit="tokens", least=1)
    rounds: int = arg(5, "fresh processes for each side", least=1)
    out: str = arg("out/bench/quant.json", "the results")
    worker: list = arg([], "used by the script itself: a checkpoint and its side")


def resident_mb():
    """Memory of this process now, not at its peak; None where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096 / 2**20
    except OSError:
        return None


def measure(cfg, path, side):
    torch.set_num_threads(1)
    before = resident_mb()
    model, _, _ = checkpoint.load(path, quantize="" if side == "fp32" else side)
    after, peak = resident_mb(), env.peak_rss_mb()
    prompt, times = list(range(64)), []
    for new in (1, 1, 1 + cfg.new_tokens):                   # a warm-up; then the third less the second is without the prompt
        began = time.perf_counter()
        for _ in generate(model, prompt, new, temperature=0):
            pass
        times.append(time.perf_counter() - began)
    print(json.dumps({"weights_mb": quant.weight_bytes(model) / 2**20, "resident_mb": after and after - before, "peak_mb": peak,
                      "ms_a_token": 1000 * (times[2] - times[1]) / cfg.new_tokens}))


def ask(path, side, new_tokens, **variables):
    """What a fresh process says; variables: of its environment."""
    words = [sys.executable, __file__, "--new_tokens", str(new_tokens), "--worker", str(path), side]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **variables})
    return json.loads(done.stdout.splitlines()[-1])


def main(cfg):
    if cfg.worker:
        return measure(cfg, *cfg.worker)
    results = {}
    for shape in cfg.shapes:
        dim, layers = map(int, shape.split("x"))
        vocab, found = 1280 if dim <= 128 else 6400, {side: [] for side in SIDES}
        with tempfile.TemporaryDirectory() as folder:
            model = Transformer(ModelArgs(dim=dim, n_layers=layers, n_heads=dim // 32, vocab_size=vocab, max_seq_len=64 + cfg.new_tokens + 1))
            parameters = parameter_count(model)["total"]
            tok = bpe_tokenizer([], pattern_for(vocab))
            paths = {"fp32": checkpoint.save(f"{folder}/fp32", 0, model, tok, "pretrain", None)}
            for side in set(SIDES) - {"fp32"}:
                smaller, *_ = checkpoint.load(paths["fp32"], quantize=side)
                paths[side] = checkpoint.save(f"{folder}/{side}", 0, smaller, tok, "pretrain", None, quantize=side)
            memory = {side: ask(paths[side], side, 1, MALLOC_MMAP_THRESHOLD_="65536") for side in SIDES}
            for _ in range(cfg.rounds):
                for side in SIDES:
                    found[side].append(ask(paths[side], side, cfg.new_tokens)["ms_a_token"])
        table = {side: {**memory[side], "ms_a_token": statistics.median(found[side])} for side in SIDES}
        results[shape] = table
        print(f"\n{shape}, {parameters:,} parameters\n\n| | weights, MB | resident after loading, MB | peak, MB | ms a token |\n|---|---|---|---|---|")
        for side, r in table.items():
            print(f"| {side} | {r['weights_mb']:.1f} | {r['resident_mb'] or 0:.0f} | {r['peak_mb'] or 0:.0f} | {r['ms_a_token']:.2f} |", flush=True)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps({"config": vars(cfg), **env.stamp(), "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
