"""Where the seconds of a training step on a CPU go, part by part: prints tables, writes a JSON. Less than a minute.

    python bench/parts.py                                    2 threads, the shape of bench/step.py
    python bench/parts.py --threads 1 --what products        one of: products, formulas, attention, step

products: y = x W^T, d x and d W by the two matrix libraries in PyTorch's CPU build. formulas: RMSNorm, RoPE and SwiGLU with autograd's
derivatives and with those by hand. attention: PyTorch's kernel in fp32 and bf16. step: a whole update under the profiler.
Sides take turns (A B, A B, …); times are medians.
"""
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from nanollm import env, model
from nanollm.by_hand import ONEDNN
from nanollm.config import UserError, arg, run
from nanollm.losses import cross_entropy, linear_cross_entropy
from nanollm.model import ModelArgs, RMSNorm, Transformer, apply_rope, rope_table, swiglu
from nanollm.plan import kept_by_autograd


@dataclass
class Config:
    what: list = arg(["products", "formulas", "attention", "step"], "which parts")
    dim: int = arg(512, "width")
    n_layers: int = arg(8, "blocks")
    n_heads: int = arg(8, "heads")
    vocab_size: int = arg(6400, "vocabulary")
    seq_len: int = arg(512, "context", unit="tokens")
    batch_size: int = arg(4, "rows")
    repeats: int = arg(9, "rounds; each runs every side once", least=1)
    threads: int = arg(2, "CPU threads", least=1)
    out: str = arg("out/bench/parts.json", "where the results go")


BY_HAND = model.by_hand


def derivatives(by_hand):
    """From here on the model's formulas have their derivatives by hand, or autograd's."""
    model.by_hand = BY_HAND if by_hand else lambda x: False


def in_turns(sides, repeats):
    """Seconds of each function in {name: function}, the median of `repeats` rounds; one more round before them warms up."""
    seconds = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, function in sides.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: median(s[1:]) for name, s in seconds.items()}


def table(title, rows):
    """Markdown of [{column: value}], numbers with three digits."""
    show = lambda v: v if isinstance(v, str) else f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}"
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(show, row.values()))} |", flush=True)
    return rows


def products(cfg):
    """GFLOP/s of the three products of a linear layer from dim to each width. The last width is the notes' vocabulary, with as many
    tokens as the chunked loss takes at a time; there d W is added to what is there already, after the product or inside it (addmm_)."""
    rows = []
    for width, tokens in ((512, 2048), (1376, 2048), (6400, 2048), (64793, 259)):
        x, w, g, before = torch.randn(tokens, cfg.dim), torch.randn(width, cfg.dim), torch.randn(tokens, width), torch.zeros(width, cfg.dim)
        sides = {("y", "MKL"): lambda: x @ w.t(), ("d x", "MKL"): lambda: g @ w, ("d W", "MKL"): lambda: g.t() @ x}
        if ONEDNN:                                           # it computes a b^T
            onednn = lambda a, b: ONEDNN(a.contiguous(), b, None, "none", [], "")
            sides |= {("y", "oneDNN"): lambda: onednn(x, w), ("d x", "oneDNN"): lambda: onednn(g, w.t()), ("d W", "oneDNN"): lambda: onednn(g.t(), x.t())}
        if tokens < 2048:
            sides |= {("d W added after", "MKL"): lambda: before.add_(g.t() @ x), ("d W added inside", "MKL"): lambda: before.addmm_(g.t(), x)}
        seconds = in_turns(sides, cfg.repeats if tokens == 2048 else min(3, cfg.repeats))
        for name in dict.fromkeys(name for name, _ in sides):
            rate = {lib: 2 * tokens * cfg.dim * width / seconds[name, lib] / 1e9 if (name, lib) in seconds else "" for lib in ("MKL", "oneDNN")}
            rows.append({"product": name, "tokens": f"{tokens:,}", "width": f"{width:,}"} | rate)
    return table(f"Products from dim {cfg.dim}, GFLOP/s", rows)


def formulas(cfg):
    """Milliseconds of forward and backward together, and what waits in between."""
    B, T, C, H = cfg.batch_size, cfg.seq_len, cfg.dim, cfg.n_heads
    ffn, norm, (cos, sin) = ModelArgs(dim=C, n_heads=H).ffn_dim, RMSNorm(C, 1e-5), rope_table(C // H, T, 10000.0)
    parts = {"RMSNorm": (norm, [(B, T, C)]), "RoPE": (lambda x: apply_rope(x, cos, sin), [(B, H, T, C // H)]), "SwiGLU": (swiglu, [(B, T, ffn)] * 2)}
    rows = []
    for name, (function, shapes) in parts.items():
        inputs, g = [torch.randn(s, requires_grad=True) for s in shapes], torch.randn(shapes[0])

        def once(by_hand):
            derivatives(by_hand)
            torch.autograd.grad(function(*inputs), inputs, g)
        seconds = in_turns({"autograd": lambda: once(False), "by hand": lambda: once(True)}, cfg.repeats)
        for side in seconds:
            derivatives(side == "by hand")
            rows.append({"formula": name, "derivative": side, "ms": 1e3 * seconds[side],
                         "kept, MB": kept_by_autograd(norm, lambda: function(*inputs))[1] / 1e6})
    return table("Formulas, forward and backward", rows)


def attention(cfg):
    """PyTorch's fused kernel, causal, at the model's shape and at a small one."""
    rows = []
    for B, H, T, D in ((cfg.batch_size, cfg.n_heads, cfg.seq_len, cfg.dim // cfg.n_heads), (24, 4, 64, 32)):
        made = {}
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, g = torch.randn(4, B, H, T, D, dtype=dtype)
            made[str(dtype)[6:]] = [t.requires_grad_() for t in (q, k, v)], g

        def forward(name):
            return F.scaled_dot_product_attention(*made[name][0], is_causal=True)

        def backward(name, out):
            torch.autograd.grad(out, made[name][0], made[name][1], retain_graph=True)
        there = in_turns({name: lambda name=name: forward(name) for name in made}, cfg.repeats)
        back = in_turns({name: lambda name=name, out=forward(name): backward(name, out) for name in made}, cfg.repeats)
        rows += [{"B, H, T, D": f"{B}, {H}, {T}, {D}", "type": name, "forward, ms": 1e3 * there[name], "backward, ms": 1e3 * back[name]} for name in made]
    return table("Attention", rows)


KINDS = {"attention kernel, backward": "attention.*backward", "attention kernel, forward": "attention", "AdamW": "adam",
         "log-softmax, loss": "softmax|nll|exp", "SiLU": "silu|sigmoid", "matrix products": "mm|matmul|linear",
         "norms, sums, means": "norm|sum|mean|rsqrt|pow", "multiplications and additions": "mul|add|sub|div|neg",
         "copies": "copy|cat|clone|fill|zero|contiguous|scatter|index|embedding"}


def step(cfg):
    """One update (forward, backward, clip, AdamW) by kind of operation, in each operation's own time."""
    from torch.profiler import ProfilerActivity, profile
    lm = Transformer(ModelArgs(dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads, vocab_size=cfg.vocab_size, max_seq_len=cfg.seq_len))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-4, fused=True)
    inputs, targets = torch.randint(0, cfg.vocab_size, (2, cfg.batch_size, cfg.seq_len))
    heads = {"plain": lambda h, output: cross_entropy(output(h), targets), "by hand": lambda h, output: linear_cross_entropy(h, output.weight, targets)}

    def update(side):
        derivatives(side == "by hand")
        total, count, _ = lm(inputs, head=heads[side])
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = in_turns({side: lambda side=side: update(side) for side in heads}, min(2, cfg.repeats))
    spent = {}
    for side in heads:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            update(side)
        spent[side] = dict.fromkeys([*KINDS, "all else"], 0.0)
        for event in found.key_averages():
            kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key.lower())), "all else")
            spent[side][kind] += event.self_cpu_time_total / 1e6
    rows = [{"kind": kind} | {f"{side}{unit}": spent[side][kind] * factor for side in heads for unit, factor in ((", s", 1), (", %", 100 / sum(spent[side].values())))}
            for kind in sorted(spent["plain"], key=spent["plain"].get, reverse=True)]
    print("\nwithout the profiler: " + ", ".join(f"{side} {seconds:.2f} s" for side, seconds in whole.items()))
    return {"seconds": whole, "rows": table("A whole step", rows)}


def main(cfg):
    parts = {"products": products, "formulas": formulas, "attention": attention, "step": step}
    for what in cfg.what:
        if what not in parts:
            raise UserError(f"--what {what} is unknown; use {', '.join(parts)}")
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    about = {"date": time.strftime("%Y-%m-%d"), "threads": cfg.threads} | {k: v for k, v in env.describe() if k in ("cpu", "python", "torch")}
    print("\n".join(f"{k}: {v}" for k, v in about.items()))
    found = {what: parts[what](cfg) for what in cfg.what}
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps(about | found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
