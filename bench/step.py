"""One training step (forward, backward, clip, AdamW) of ours beside other people's, same shape, same batch, same threads.

    python bench/step.py                                                     ours and transformers, vocabulary 6,400
    python bench/step.py --nanogpt DIR --minimind DIR --vocab 6400 64793     and two checked-out repositories
    python bench/step.py --vocab 64793 --updates 18 --rounds 1               one round; 2 + 18 updates, after which memory has settled

Every row of the table is a process of its own, started anew in each round (A B C, A B C, …), so that none inherits memory or
a warm cache from another, and slow minutes of the machine fall on all: a ratio is the median of the rounds' own ratios. Peak
memory is that process's high-water mark after warmup + timed updates. Each gets the same fused AdamW and the same clipping; the
models are as their authors wrote them. A record says its shape, machine and versions; only equal ones share a table.
"""
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.peers import need
from nanollm import env
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
    updates: list = arg([], "timed updates in each process, a number for each vocabulary; none = 8 below a vocabulary of 32,000, else 18")
    warmup: int = arg(2, "updates before the clock starts (the compiled one takes 3 more)")
    rounds: int = arg(2, "processes for each row", least=1)
    threads: int = arg(2, "CPU threads", least=1)
    out: str = arg("out/bench/step.json", "results are added to this file; the tables are made of all in it that were measured alike")
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
    updates = int(cfg.updates[0])
    for _ in range(warmup + updates):
        began = time.perf_counter()
        loss_of(inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    peak = env.peak_rss_mb()
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "wpe" not in n)
    tokens = cfg.batch_size * cfg.seq_len
    flops = tokens * (6 * weights + 12 * cfg.n_layers * cfg.dim * cfg.seq_len)
    step = median(seconds[warmup:])
    record = {"side": side, "vocab": vocab, "tokens_per_s": tokens / step, "seconds": [round(s, 4) for s in seconds[warmup:]], "peak_rss_mb": peak,
              "gflops": flops / step / 1e9, "matmul_peak": matmul_peak(), "parameters": sum(p.numel() for p in model.parameters()), "updates": warmup + updates}
    print(json.dumps(record), file=stdout)


def setting(cfg, vocab):
    """What must be equal for two records to be compared: vocabulary, shape, timed updates, threads, machine, versions, day."""
    shape = {key: getattr(cfg, key) for key in ("dim", "n_layers", "n_heads", "seq_len", "batch_size", "warmup", "threads")}
    versions = {"transformers": importlib.metadata.version("transformers")} if "transformers" in {d.name for d in importlib.metadata.distributions()} else {}
    return {"vocab": vocab, "updates": timed(cfg, vocab), **shape, **env.stamp(), **versions}


def timed(cfg, vocab):
    return int(dict(zip(cfg.vocab, cfg.updates)).get(str(vocab), 8 if vocab < 32_000 else 18))


def summary(records):
    """{side: figures} of the records of one setting: medians over rounds; ratios to the fastest row that is not ours, each the
    median of the ratios within a round."""
    rows = {}
    for r in records:
        rows.setdefault(r["side"], {})[r["round"]] = r
    mid = lambda side, key: median(r[key] for r in rows[side].values())
    best = max((s for s in rows if not s.startswith("ours")), key=lambda s: mid(s, "tokens_per_s"), default=None)

    def ratio(side, key):
        both = [i for i in rows[side] if best and i in rows[best]]
        return median(rows[side][i][key] / rows[best][i][key] for i in both) if both else None
    return {side: {**{key: mid(side, key) for key in ("tokens_per_s", "peak_rss_mb", "gflops", "matmul_peak")}, "speed_ratio": ratio(side, "tokens_per_s"),
                   "rss_ratio": ratio(side, "peak_rss_mb"), "rounds": len(rows[side]), "best": side == best} for side in sorted(rows, key=SIDES.index)}


def table(how, found):
    """Markdown of a summary."""
    best = next((side for side, f in found.items() if f["best"]), "nobody")
    print(f"\nvocabulary {how['vocab']:,}; matmul peak {median(f['matmul_peak'] for f in found.values()):.0f} GFLOP/s; ratios to {best}; {how['cpu']}, "
          f"{how['threads']} threads, PyTorch {how['torch']}, {how['date']}\n")
    print("| | tokens/s | ratio | peak RSS, MB | ratio | GFLOP/s | rounds |\n|---|---|---|---|---|---|---|")
    for side, f in found.items():
        speed, rss = ("" if f[key] is None else f"{f[key]:.2f}" for key in ("speed_ratio", "rss_ratio"))
        print(f"| {side} | {f['tokens_per_s']:.0f} | {speed} | {f['peak_rss_mb']:.0f} | {rss} | {f['gflops']:.0f} | {f['rounds']} |")


def main(cfg):
    if cfg.worker:
        return measure(cfg, cfg.worker)
    unknown = [s for s in cfg.sides if s not in SIDES]
    if unknown:
        raise UserError(f"--sides {unknown[0]!r} is unknown; use {', '.join(map(repr, SIDES))}")
    if not all(str(n).isdecimal() and int(n) for n in [*cfg.vocab, *cfg.updates]) or len(cfg.updates) not in (0, len(cfg.vocab)):
        raise UserError("--vocab and --updates want whole numbers, one number of updates for each vocabulary")
    cfg = dataclasses.replace(cfg, vocab=[str(v) for v in cfg.vocab])
    sides = [s for s in cfg.sides or SIDES if (s != "nanoGPT" or cfg.nanogpt) and (s != "minimind" or cfg.minimind)]
    if "transformers" in sides:
        need("transformers")
    out = Path(cfg.out)
    done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"records": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    shape = [f"--{name}={getattr(cfg, name)}" for name in ("nanogpt", "minimind", "dim", "n_layers", "n_heads", "seq_len", "batch_size", "warmup", "threads")]
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    for vocab in cfg.vocab:
        how = setting(cfg, int(vocab))
        for i in range(cfg.rounds):
            for side in sides:
                command = [sys.executable, __file__, "--worker", side, "--vocab", vocab, "--updates", str(how["updates"]), *shape]
                child = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads)}, encoding="utf-8")
                if child.returncode:
                    print(f"{side}: failed with code {child.returncode}, left out", flush=True)
                    continue
                record = json.loads(child.stdout.splitlines()[-1]) | {"round": f"{began}, {i + 1}", "setting": how}
                done["records"].append(record)
                print(f"vocabulary {vocab}, round {i + 1}, {side}: {record['tokens_per_s']:.0f} tokens/s, {record['peak_rss_mb']:.0f} MB", flush=True)
                out.write_text(json.dumps(done, indent=1), encoding="utf-8")
        if alike := [r for r in done["records"] if r.get("setting") == how]:
            found = summary(alike)
            table(how, found)
            done["tables"] = [t for t in done.get("tables", []) if t["setting"] != how] + [{"setting": how, "sides": found}]
            out.write_text(json.dumps(done, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
