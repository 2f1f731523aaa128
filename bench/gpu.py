"""A training step on one CUDA GPU: tokens per second, MFU and memory for the notes' shapes and GPT-2 124M.

    python bench/gpu.py                              all shapes, eager and compiled; a table and out/bench/gpu.json
    python bench/gpu.py --shapes llama_124m --modes compile --batch_size 64
    python bench/gpu.py --device cpu --tiny          the same code on toy shapes and the CPU, in seconds: no figure of it means anything

The step is the training scripts' own: autocast (bf16 where the GPU has it), SDPA, the loss, backward, clip, fused AdamW; the
next batch is made on the CPU, pinned and sent while the GPU works. The timed steps run under
torch.cuda.set_sync_debug_mode("error"), so a step that makes the CPU wait for the GPU fails instead of being slow, and under
torch.compiler.set_stance("fail_on_recompile").

MFU = model FLOPs a second / peak (Chowdhery et al. 2022, appendix B): 6 a weight and token plus 12 * n_layers * dim * T, the
causal half not subtracted, recomputation not counted. Peaks: the fastest of several square matrix products in the same run, and
the data sheet's dense figure. The H200's sheet peak needs its full clock and power, which no long run has.
"""
import contextlib
import functools
import gc
import itertools
import json
import re
import statistics
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanollm import dist, env
from nanollm.config import UserError, arg, run
from nanollm.losses import cross_entropy, linear_cross_entropy
from nanollm.model import ModelArgs, flops_per_token, parameter_count
from nanollm.optim import make_optimizer, update
from nanollm.plan import HARDWARE, memory
from nanollm.variants import build

# name: (vocabulary, rows a step, where the shape stands or the shape). Equal blocks, ours against GPT-2's: the last two.
SHAPES = {
    "baby_llama2_92m": (64793, 64, "configs/notes/baby_llama2_92m.toml"),
    "baby_llama2_218m": (64793, 24, "configs/notes/baby_llama2_218m.toml"),
    "zero_chatgpt_159m": (32006, 32, "configs/notes/zero_chatgpt_159m.toml"),
    "llama_124m": (50304, 32, dict(dim=768, n_layers=12, n_heads=12, hidden_dim=2048, max_seq_len=1024)),
    "gpt2_124m": (50304, 32, "configs/notes/gpt2_124m.toml"),
}
TINY = {"toy": (512, 2, dict(dim=32, n_layers=2, n_heads=2, max_seq_len=64))}


@dataclass
class Config:
    device: str = arg("cuda", "cuda, cuda:N; cpu only with --tiny")
    tiny: bool = arg(False, "toy shapes and few steps: does the code run?")
    shapes: list = arg([], f"which of {', '.join(SHAPES)}; none = all")
    modes: list = arg(["eager", "compile"], "eager, compile")
    attention: str = arg("auto", "auto: PyTorch chooses the kernel; flash, cudnn or efficient: that one or an error")
    dtype: str = arg("auto", "auto: bf16 where native, else fp16 with GradScaler")
    batch_size: int = arg(0, "rows a step; 0 = what suits 80 GB or more", unit="rows")
    steps: int = arg(40, "timed steps", least=2)
    warmup: int = arg(10, "steps before, in which kernels are chosen and compiled", least=1)
    losses: list = arg(["chunked", "plain"], "chunked: the scripts' own, which never holds all logits; plain: logits, then cross-entropy")
    grad_clip: float = arg(1.0, "largest L2 norm of the gradient")
    out: str = arg("out/bench/gpu.json", "where the figures go")


def shape_args(shape, vocab_size):
    """ModelArgs of a row of SHAPES."""
    if isinstance(shape, str):
        preset = tomllib.loads((ROOT / shape).read_text(encoding="utf-8"))
        shape = {k: v for k, v in preset.items() if k in ModelArgs.__dataclass_fields__}
    return ModelArgs(**shape, vocab_size=vocab_size)


def matmul_peak(device, dtype, tiny):
    """The fastest FLOP/s of square matrix products in dtype, over a few sizes, 20 in a row each."""
    best = 0.0
    for n in (256,) if tiny else (4096, 8192, 12288, 16384):
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        for repeat in range(4):                              # the first warms up
            wait(device)
            began = time.perf_counter()
            for _ in range(20):
                a @ b
            wait(device)
            best = max(best, 20 * 2 * n**3 / (time.perf_counter() - began)) if repeat else best
    return best


def wait(device):
    """Until the GPU has done all it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def no_waiting(device):
    """Inside, anything that makes the CPU wait for the GPU (.item(), a copy from pageable memory …) raises RuntimeError."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def attention_kernel(model, tokens, autocast):
    """Which of SDPA's kernels one forward pass ran, by the operators that the profiler saw: flash, cudnn, efficient or math."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, autocast():
        model(tokens)
    ran = {event.key for event in profile.key_averages()}
    found = [name for name in ("flash", "cudnn", "efficient") if any(f"_scaled_dot_product_{name}_attention" in key for key in ran)]
    return "+".join(found) or "math"


def sent(batch, device):
    """The batch on its way to the device: from pinned memory the copy needs no waiting."""
    return [t.pin_memory().to(device, non_blocking=True) for t in batch] if device.type == "cuda" else [t.to(device) for t in batch]


def train_step(model, raw, optimizer, scaler, autocast, chunked, grad_clip, inputs, targets):
    """One update as the training loops make it; the loss stays on the device: reading it would be a wait."""
    head = lambda h, output: linear_cross_entropy(h, output.weight, targets)
    with autocast():
        loss, count, _ = model(inputs, head=head) if chunked else cross_entropy(model(inputs), targets)
    scaler.scale(loss / count).backward()
    model.wait()
    update(raw, optimizer, scaler, grad_clip, loss.detach())
    model.zero_grad()
    return (loss / count).detach()


def measure(name, mode, loss, ctx, dtype, cfg):
    """One row of the table: a fresh model, warm-up, timed steps. -> dict."""
    vocab_size, rows, shape = (TINY if cfg.tiny else SHAPES)[name]
    args, device, rows = shape_args(shape, vocab_size), ctx.device, cfg.batch_size or rows
    T, autocast = args.max_seq_len, lambda: dist.autocast(device, dtype)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    raw = build(args).to(device).train()
    model = dist.wrap(raw, ctx, mode == "compile")
    optimizer = make_optimizer(raw)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    kernel = attention_kernel(raw, torch.zeros(1, T, dtype=torch.long, device=device), autocast)

    def fetch():
        tokens = torch.randint(vocab_size, (rows, T + 1))    # what the tokens are costs nothing
        return sent((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), device)

    step = functools.partial(train_step, model, raw, optimizer, scaler, autocast, loss == "chunked", cfg.grad_clip)
    losses, batch = [], fetch()
    for _ in range(cfg.warmup):
        losses.append(step(*batch))
        batch = fetch()
    wait(device)
    repeats, steps = (1, cfg.steps) if cfg.tiny else (4, max(1, cfg.steps // 4))
    seconds = []
    for _ in range(repeats):                                 # the median of a few stretches
        began = time.perf_counter()
        with no_waiting(device), torch.compiler.set_stance("fail_on_recompile" if mode == "compile" else "default"):
            for _ in range(steps):
                losses.append(step(*batch))
                batch = fetch()
        wait(device)
        seconds.append((time.perf_counter() - began) / steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    planned = memory(args, rows, dtype, device=device.type)["total"] if loss == "chunked" else None        # it knows the chunked loss only
    assert torch.stack(losses).isfinite().all()
    per_s = rows * T / statistics.median(seconds)
    return {"shape": name, "mode": mode, "parameters": parameter_count(raw)["total"], "loss": loss, "rows": rows, "T": T, "vocab_size": vocab_size,
            "ms_a_step": 1e3 * statistics.median(seconds), "tokens_per_s": per_s, "flops_per_s": per_s * flops_per_token(raw, T),
            "attention": kernel, "peak_bytes": peak, "planned_bytes": planned}


def table(rows, peak, sheet):
    lines = ["| shape | loss | mode | parameters | rows x T | ms a step | tokens/s | TFLOP/s | of peak | of sheet | attention | peak GiB | planned |",
             "|" + "---|" * 13]
    for r in rows:
        percent = lambda p: f"{100 * r['flops_per_s'] / p:.1f} %" if p else "-"
        peak_gib, planned_gib = (f"{r[k] / 2**30:.2f}" if r[k] else "-" for k in ("peak_bytes", "planned_bytes"))
        lines.append(f"| {r['shape']} | {r['loss']} | {r['mode']} | {r['parameters']:,} | {r['rows']} x {r['T']} | {r['ms_a_step']:.1f} "
                     f"| {r['tokens_per_s']:,.0f} | {r['flops_per_s'] / 1e12:.2f} | {percent(peak)} | {percent(sheet)} | {r['attention']} | {peak_gib} | {planned_gib} |")
    return "\n".join(lines)


def main(cfg):
    if cfg.device == "cpu" and not cfg.tiny:
        raise UserError("bench/gpu.py measures GPUs; on the CPU it only shows that it runs: add --tiny")
    if cfg.device != "cpu" and not torch.cuda.is_available():
        raise UserError("bench/gpu.py needs a CUDA GPU and PyTorch sees none here; --device cpu --tiny runs the same code on toy shapes")
    kernels = {"auto": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    shapes = TINY if cfg.tiny else {name: SHAPES.get(name) for name in cfg.shapes or SHAPES}
    for option, given, known in (("shapes", shapes, {**SHAPES, **TINY}), ("modes", cfg.modes, ("eager", "compile")),
                                 ("losses", cfg.losses, ("chunked", "plain")), ("attention", [cfg.attention], kernels)):
        if bad := [word for word in given if word not in known]:
            raise UserError(f"--{option} {bad[0]} is unknown; use {', '.join(known)}")
    ctx = dist.init(cfg.device)
    dtype = dist.choose_dtype("bfloat16" if cfg.device == "cpu" and cfg.dtype == "auto" else cfg.dtype, ctx.device)
    machine = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "CPU"
    sheet = next((1e12 * tflops for name, (tflops, *_) in HARDWARE.items() if re.search(rf"\b{name}\b", machine.lower())), None)
    peak = matmul_peak(ctx.device, dtype, cfg.tiny)
    print(f"{machine}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {dtype}; matmul peak {peak / 1e12:.1f} TFLOP/s, data sheet "
          f"{sheet / 1e12 if sheet else float('nan'):.0f}", flush=True)
    if cfg.tiny:
        cfg.steps, cfg.warmup = 2, 1
    rows = []
    for name, loss, mode in itertools.product(shapes, cfg.losses, cfg.modes):
        with sdpa_kernel(kernels[cfg.attention]) if kernels[cfg.attention] else contextlib.nullcontext():
            rows.append(measure(name, mode, loss, ctx, dtype, cfg))
        print(f"{name} {loss} {mode}: {rows[-1]['tokens_per_s']:,.0f} tokens/s", flush=True)
    print(table(rows, peak, sheet))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    figures = {"machine": machine, **env.stamp(), "cuda": torch.version.cuda, "dtype": str(dtype), "matmul_peak": peak, "sheet_peak": sheet,
               "rows": rows}
    Path(cfg.out).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    dist.finish(ctx)


if __name__ == "__main__":
    run(main, Config, __doc__)
