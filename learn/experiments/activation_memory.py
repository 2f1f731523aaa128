"""Where does the memory of a training step go, and what makes it smaller?

    python -m learn.experiments.activation_memory          half a minute on one core

Weights, gradients and Adam's two moments are counted quickly: 16 bytes a parameter. The rest is what autograd keeps between forward
and backward. A note says dim * rows * length * 2 bytes a layer; a block keeps a dozen tensors of that size (Korthikanti et al. 2022,
arXiv:2205.05198, eq. 1: 34 bytes a number plus the attention scores), and the plain loss keeps the logits, as wide as the vocabulary. Counted
here by hooks on every tensor that autograd saves, along the path that a GPU takes, and timed on this CPU: half the rows (accumulation),
bf16 autocast, activation checkpointing (Chen et al. 2016, arXiv:1604.06174), the loss chunk by chunk, and all of them.

One sees that accumulation halves all of it, checkpointing takes away most of the blocks' share and costs a second forward pass, the
chunked loss takes away the logits, and autocast a quarter, not a half: so "mixed precision saves no memory" is wrong, and so is "half".
The milliseconds are this machine's: they are shown, and no claim rests on them.
"""
import contextlib
import statistics
import time
from unittest import mock

import torch

import nanollm.model
from learn import lab
from nanollm.dist import autocast
from nanollm.losses import cross_entropy, linear_cross_entropy
from nanollm.model import ModelArgs, Transformer
from nanollm.plan import kept_by_autograd

ARGS = ModelArgs(dim=128, n_layers=6, n_heads=4, vocab_size=2048, max_seq_len=128)
ROWS, ROUNDS = 8, 9
HALF, CHECKPOINT, CHUNKED = "half the rows", "checkpointing", "chunked loss"
KINDS = {"fp32": (), HALF: (HALF,), "bf16": ("bf16",), CHUNKED: (CHUNKED,), CHECKPOINT: (CHECKPOINT,), "all": (HALF, "bf16", CHECKPOINT, CHUNKED)}


def forward(model, how, rows):
    """The loss a token, with the means that `how` names switched on."""
    model.checkpointing = CHECKPOINT in how
    ids = torch.randint(0, ARGS.vocab_size, (rows, ARGS.max_seq_len), generator=torch.Generator().manual_seed(0))
    with autocast(torch.device("cpu"), torch.bfloat16 if "bf16" in how else torch.float32):
        if CHUNKED in how:
            return model(ids, head=lambda hidden, output: linear_cross_entropy(hidden, output.weight, ids, 256))[0] / ids.numel()
        return cross_entropy(model(ids), ids)[0] / ids.numel()


def gpu_path():
    """The plain formulas: no derivatives by hand, attention in the type of autocast (both are what a CPU does otherwise)."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(nanollm.model, "by_hand", lambda x: False))
    stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda *kind: False))
    return stack


def kept_mb(model, how):
    model.zero_grad()
    with gpu_path():
        loss, size = kept_by_autograd(model, lambda: forward(model, how, ROWS // 2 if HALF in how else ROWS))
    if CHUNKED in how:                                        # its gradients are computed already, and that of the hidden states waits
        size += loss.grad_fn.next_functions[0][0].kept[0].nbytes
    return size / 1e6


def milliseconds(model, sides, rounds):
    """{name: ms a row of forward and backward}: CPU time, the median of several rounds in which each side runs once. sides: {name: (how, rows)}"""
    found = {name: [] for name in sides}
    for _ in range(rounds + 1):                               # the first warms up
        for name, (how, rows) in sides.items():
            began = time.process_time()
            forward(model, how, rows).backward()
            found[name].append(1000 * (time.process_time() - began) / rows)
            model.zero_grad()
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def main(cfg):
    torch.manual_seed(0)
    model = Transformer(ARGS).train()
    tokens = ROWS * ARGS.max_seq_len
    kept = {name: kept_mb(model, how) for name, how in KINDS.items()}
    ms = milliseconds(model, {name: (how, ROWS // 2 if HALF in how else ROWS) for name, how in KINDS.items()}, cfg.steps(ROUNDS))
    sizes = milliseconds(model, {rows: ((), rows) for rows in (15, 16, 17, 20)}, cfg.steps(ROUNDS))
    figures = {f"{name}, MB": mb for name, mb in kept.items()} | {f"{name}, of fp32": mb / kept["fp32"] for name, mb in kept.items()}
    figures["the note's formula, MB"] = ARGS.n_layers * ARGS.dim * tokens * 2 / 1e6
    figures["logits, MB"] = tokens * ARGS.vocab_size * 4 / 1e6
    figures["weights, gradients and moments, MB"] = 16 * sum(p.numel() for p in model.parameters()) / 1e6
    figures |= {f"{name}, ms a row": t for name, t in ms.items()} | {f"{rows} rows, ms a row": t for rows, t in sizes.items()}
    share = {name: mb / kept["fp32"] for name, mb in kept.items()}
    claims = {"the note's formula is at least 20 times too small": kept["fp32"] > 20 * figures["the note's formula, MB"],
              "half the rows keep half": abs(share[HALF] - 0.5) < 0.01,
              "autocast saves, but less than half": 0.55 < share["bf16"] < 0.95,
              "checkpointing keeps less than 40 %": share[CHECKPOINT] < 0.4,
              "all together keep less than a tenth": share["all"] < 0.1}

    def draw(plt):
        plt.barh(list(kept)[::-1], list(kept.values())[::-1], color="#4878a8")
        for i, (name, mb) in enumerate(list(kept.items())[::-1]):
            plt.annotate(f" {mb:.0f} MB, {ms[name]:.1f} ms a row", (mb, i), va="center")
        plt.axvline(figures["the note's formula, MB"], color="#c05020", linestyle=":", label="the note's formula")
        plt.xlim(0, 1.3 * kept["fp32"])
        plt.xlabel("kept for the backward pass, MB")
        plt.legend()
    lab.finish(cfg, figures, claims, draw, within={name: 9 for name in figures if "ms a row" in name})


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
