"""One training step (forward, backward, clip, AdamW) of ours beside other people's, same shape, same batch, same threads.

    python bench/step.py                                                     ours and transformers, vocabulary 6,400
    python bench/step.py --nanogpt DIR --minimind DIR --vocab 6400 64793     and two checked-out repositories

Every row of the table is a process of its own, started anew in each round (A B C, A B C, …), so that none inherits memory or
a warm cache from another, and slow minutes of the machine fall on all. Peak memory is that process's high-water mark after
warmup + steps updates. Each gets the same fused AdamW and the same clipping; the models are as their authors wrote them.
"""
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nanollm.config import UserError, arg, run

SIDES = ["ours", "ours, activation checkpointing", "ours, compiled", "transformers", "nanoGPT", "minimind"]


@dataclass
class Config:
    vocab: list = arg([6400], "vocabularies, one table each")
    sides: list = arg([], f"rows: {' | '.join(SIDES)}; none = all that can run")
    nanogpt: str = arg("", "a checkout of nanoGPT")
    minimind: str = arg("", "a checkout of minimind")
    dim: int = arg(512, "width")
    n_layers: int = arg(8, "blocks")
    n_heads: int = arg(8, "heads")
    seq_len: int = arg(512, "context", unit="tokens")
    batch_size: int = arg(4, "rows")
    steps: int = arg(18, "timed updates in each process", least=1)
    warmup: int = arg(2, "updates before the clock starts (the compiled one takes 3 more)")
    rounds: int = arg(2, "processes for each row", least=1)
    threads: int = arg(2, "CPU threads", least=1)
    out: str = arg("out/bench/step.json", "results are added to this file; the table is made of all in it")
    worker: str = arg("", "used by the script itself: measure this one row and print JSON")


def matmul_peak():
    """GFLOP/s of fp32 matrix products of 2048 x 2048: the best of the two libraries that PyTorch brings for the CPU."""
    a, b = torch.randn(2, 2048, 2048)
    products = [lambda: a @ b, lambda: a @ b.T]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = []
    for product in products:
        seconds = []
        for _ in range(8):
            began = time.perf_counter()
            product()
            seconds.append(time.perf_counter() - began)
        best.append(2 * 2048**3 / median(seconds[2:]) / 1e9)
    return max(best)


def build(cfg, side, vocab):
    """(model, loss(inputs, targets)) of a row. Tied matrices everywhere, which is each side's own default but transformers'."""
    ffn = 32 * -(-int(8 * cfg.dim / 3) // 32)
    if side.startswith("ours"):
        from nanollm.dist import compiled
        from nanollm.losses import linear_cross_entropy
        from nanollm.model import ModelArgs, Transformer
        raw = Transformer(ModelArgs(dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads, vocab_size=vocab, max_seq_len=cfg.seq_len))
        raw.checkpointing = side.endswith("checkpointing")
        model = compiled(raw, side.endswith("compiled"))

        def loss(inputs, targets):
            total, count, _ = model(inputs, head=lambda h, output: linear_cross_entropy(h, output.weight, targets))
            return total / count
        return raw, loss
    if side == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=cfg.dim, intermediate_size=ffn, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
            max_position_embeddings=cfg.seq_len, tie_word_embeddings=True, use_cache=False))
        return model, lambda inputs, targets: model(input_ids=inputs, labels=inputs).loss
    if side == "nanoGPT":
        sys.path.insert(0, cfg.nanogpt)
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(block_size=cfg.seq_len, vocab_size=vocab, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_embd=cfg.dim))
        return model, lambda inputs, targets: model(inputs, targets)[1]
    sys.path.insert(0, cfg.minimind)
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    model = MiniMindForCausalLM(MiniMindConfig(
        vocab_size=vocab, hidden_size=cfg.dim, intermediate_size=ffn, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_heads, max_position_embeddings=cfg.seq_len))
    return model, lambda inputs, targets: model(input_ids=inputs, labels=inputs).loss


def measure(cfg, side):
    """One row in this process -> a record. FLOPs as nanollm.model.flops_per_token counts them: 6 a multiplying weight and
    token, 12 * n_layers * dim * T for attention."""
    vocab = int(cfg.vocab[0])
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    stdout, sys.stdout = sys.stdout, sys.stderr              # what a model prints about itself is no result
    model, loss_of = build(cfg, side, vocab)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, targets = torch.randint(0, vocab, (2, cfg.batch_size, cfg.seq_len))
    seconds = []
    warmup = cfg.warmup + 3 * side.endswith("compiled")
    for _ in range(warmup + cfg.steps):
        began = time.perf_counter()
        loss_of(inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    status = Path("/proc/self/status")
    if status.exists():
        peak = int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 1024
    else:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "wpe" not in n)
    tokens = cfg.batch_size * cfg.seq_len
    flops = tokens * (6 * weights + 12 * cfg.n_layers * cfg.dim * cfg.seq_len)
    step = median(seconds[warmup:])
    record = {"side": side, "vocab": vocab, "tokens_per_s": tokens / step, "seconds": [round(s, 4) for s in seconds[warmup:]], "peak_rss_mb": peak,
              "gflops": flops / step / 1e9, "matmul_peak": matmul_peak(), "parameters": sum(p.numel() for p in model.parameters()),
              "updates": warmup + cfg.steps}
    print(json.dumps(record), file=stdout)


def table(records, vocab):
    """Markdown. Ratios are against the fastest row that is not ours; medians over rounds, the matmul peak over all processes."""
    rows = {}
    for r in records:
        if r["vocab"] == vocab:
            rows.setdefault(r["side"], []).append(r)
    mid = lambda side, key: median(r[key] for r in rows[side])
    peers = [s for s in rows if not s.startswith("ours")]
    best = max(peers, key=lambda s: mid(s, "tokens_per_s"), default=None)
    print(f"\nvocabulary {vocab:,}; matmul peak {median(r['matmul_peak'] for side in rows.values() for r in side):.0f} GFLOP/s; ratios to {best}\n")
    print("| | tokens/s | ratio | peak RSS, MB | ratio | GFLOP/s | rounds |\n|---|---|---|---|---|---|---|")
    for side in sorted(rows, key=SIDES.index):
        speed, memory = mid(side, "tokens_per_s"), mid(side, "peak_rss_mb")
        ratios = (f"{speed / mid(best, 'tokens_per_s'):.2f}", f"{memory / mid(best, 'peak_rss_mb'):.2f}") if best else ("", "")
        print(f"| {side} | {speed:.0f} | {ratios[0]} | {memory:.0f} | {ratios[1]} | {mid(side, 'gflops'):.0f} | {len(rows[side])} |")


def main(cfg):
    if cfg.worker:
        return measure(cfg, cfg.worker)
    unknown = [s for s in cfg.sides if s not in SIDES]
    if unknown:
        raise UserError(f"--sides {unknown[0]!r} is unknown; use {', '.join(map(repr, SIDES))}")
    sides = [s for s in cfg.sides or SIDES if (s != "nanoGPT" or cfg.nanogpt) and (s != "minimind" or cfg.minimind)]
    out = Path(cfg.out)
    done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"records": []}
    done |= {"torch": torch.__version__, "python": platform.python_version(), "threads": cfg.threads, "cores": os.cpu_count()}
    out.parent.mkdir(parents=True, exist_ok=True)
    shape = [f"--{name}={getattr(cfg, name)}" for name in ("nanogpt", "minimind", "dim", "n_layers", "n_heads", "seq_len", "batch_size", "steps",
                                                           "warmup", "threads")]
    for vocab in cfg.vocab:
        for i in range(cfg.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--worker", side, "--vocab", str(vocab), *shape]
                child = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads)}, encoding="utf-8")
                if child.returncode:
                    print(f"{side}: failed with code {child.returncode}, left out", flush=True)
                    continue
                record = json.loads(child.stdout.splitlines()[-1])
                done["records"].append(record)
                print(f"vocabulary {vocab}, round {i + 1}, {side}: {record['tokens_per_s']:.0f} tokens/s, {record['peak_rss_mb']:.0f} MB", flush=True)
                out.write_text(json.dumps(done, indent=1), encoding="utf-8")
    for vocab in sorted({r["vocab"] for r in done["records"]}):
        table(done["records"], vocab)


if __name__ == "__main__":
    run(main, Config, __doc__)
