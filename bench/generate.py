"""Milliseconds a decoding step, ours beside transformers' generate: same weights, same prompts, greedy, fp32 on the CPU.

    python bench/generate.py                              the demo's shape and one of 28 M, batch 1 and 16
    python bench/generate.py --shapes 512x8:2             width x layers : key/value heads (GQA)

A step's time is (time for N new tokens - time for 1) / (N - 1), so reading the prompt is left out; both are timed in one turn,
and the sides take turns (A B A B …) in one process after a warm-up. A ratio is the median of the rounds' own ratios.

The limit: each step must read every weight that multiplies and every key and value once. Bytes / bandwidth is the least time a
step can take; bandwidth is what summing a large tensor reaches in the same run. At batch 16 arithmetic takes longer than that.
"""
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.peers import need
from bench.rollout import VOCAB, both
from nanollm import env
from nanollm.config import arg, run
from nanollm.generate import generate, generate_batch
from nanollm.model import parameter_count


@dataclass
class Config:
    shapes: list = arg(["128x2", "512x8"], "width x layers, :G for G key/value heads; heads of 64 (the demo's of 32)")
    batches: list = arg(["1", "16"], "prompts at a time; 1 is the stream that chat.py reads")
    prompt_tokens: int = arg(32, "length of a prompt", unit="tokens", least=1)
    new_tokens: int = arg(128, "length of an answer", unit="tokens", least=2)
    rounds: int = arg(7, "turns of both sides", least=1)
    threads: int = arg(2, "CPU threads", least=1)
    out: str = arg("out/bench/generate.json", "the results")


def bandwidth(gigabytes=0.5):
    """Bytes a second of a plain read: the sum of a tensor that no cache holds, the best of ten."""
    big, best = torch.ones(int(gigabytes * 2**28)), 0
    for _ in range(10):
        began = time.perf_counter()
        big.sum()
        best = max(best, big.nbytes / (time.perf_counter() - began))
    return best


def bytes_a_step(model, batch, length):
    """Weights that multiply, once each (a tied matrix, too), and the keys and values of `length` tokens."""
    a = model.args
    weights = sum(m.weight.nbytes for m in model.modules() if hasattr(m, "weight") and m is not model.tok_embeddings)
    return weights + 4 * 2 * a.n_layers * batch * length * a.n_kv_heads * (a.dim // a.n_heads)


def main(cfg):
    need("transformers")
    torch.set_num_threads(cfg.threads)
    results, speed = [], bandwidth()
    print(f"a plain read: {speed / 1e9:.1f} GB/s with {cfg.threads} threads")
    print("| shape | parameters | batch | transformers, ms | ours, ms | ratio | limit, ms | its share: transformers | its share: ours | tokens equal |")
    print("|---" * 10 + "|")
    for shape in cfg.shapes:
        size, _, groups = shape.partition(":")
        dim, layers = map(int, size.split("x"))
        theirs, ours = both(dim, layers, VOCAB.get(size, 6400), cfg.prompt_tokens + cfg.new_tokens, int(groups or 0))
        for batch in map(int, cfg.batches):
            prompts = torch.randint(1, ours.args.vocab_size, (batch, cfg.prompt_tokens), generator=torch.Generator().manual_seed(0))

            @torch.no_grad()
            def side_a(n):
                ids = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, do_sample=False, pad_token_id=0)
                return ids[:, prompts.size(1) :].tolist()

            def side_b(n):
                if batch == 1:
                    return [list(generate(ours, prompts[0].tolist(), n, temperature=0))]
                return generate_batch(ours, prompts.tolist(), n, 0, temperature=0)[0]

            def ms_a_step(side):
                times = []
                for n in (1, cfg.new_tokens):
                    began = time.perf_counter()
                    side(n)
                    times.append(time.perf_counter() - began)
                return 1e3 * (times[1] - times[0]) / (cfg.new_tokens - 1)

            same = (torch.tensor(side_a(cfg.new_tokens)) == torch.tensor(side_b(cfg.new_tokens))).float().mean().item()        # this warms up, too
            rounds = [(ms_a_step(side_a), ms_a_step(side_b)) for _ in range(cfg.rounds)]
            a, b = (statistics.median(side) for side in zip(*rounds))
            limit = 1e3 * bytes_a_step(ours, batch, cfg.prompt_tokens + cfg.new_tokens / 2) / speed
            r = {"shape": shape, "parameters": parameter_count(ours)["total"], "batch": batch, "transformers_ms": a, "ours_ms": b,
                 "ratio": statistics.median(x / y for x, y in rounds), "limit_ms": limit, "tokens_equal": same}
            results.append(r)
            print(f"| {shape} | {r['parameters'] / 1e6:.1f} M | {batch} | {a:.2f} | {b:.2f} | {r['ratio']:.2f} | {limit:.2f} "
                  f"| {limit / a:.0%} | {limit / b:.0%} | {same:.1%} |", flush=True)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    record = {"config": vars(cfg), **env.stamp(), "bandwidth_gb_s": speed / 1e9, "results": results}
    Path(cfg.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
