"""Absmax, zero point and NF4 against each other on the weights of a trained model: how far they move, and what the loss says.

    python -m learn.studies.quantization --init_from out/demo/pretrain --data out/demo/tokens --picture out/quantization.png

Every way of nanollm/quant.py with every size of block, on all matrices of the blocks; embedding and output stay as they are. The
weights are rounded to what the codes say and put back, which computes what a QuantLinear does.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import checkpoint, env, evaluation, quant
from nanollm.config import arg, run
from nanollm.data import TokenFile

ROWS = {f"int{bits}, {'zero point' if zero else 'absmax'}, {f'{block} weights' if block == 64 else block}":
        (lambda W, bits=bits, block=block, zero=zero: quant.quantize_int(W, bits, block, zero))
        for bits in (8, 4) for zero in (False, True) for block in ("tensor", "row", 64)}
ROWS |= {"NF4, 64 weights": quant.quantize_nf4, "NF4, 64 weights, double": lambda W: quant.quantize_nf4(W, double=True)}


@dataclass
class Config:
    init_from: str = arg("out/demo/pretrain", "checkpoint or run directory")
    data: str = arg("out/demo/tokens", "directory of token files; its validation split is measured")
    max_tokens: int = arg(0, "stop after so many tokens; 0 = all", unit="tokens")
    out: str = arg("out/quantization.json", "the results")
    picture: str = arg("", "also draw levels and weights into this .png (extra: plot)")


def restored(q):
    return quant.dequantize_nf4(q) if isinstance(q, quant.NF4) else quant.dequantize_int(q)


def bits_of(q):
    """Bits of all that is stored for a weight."""
    return 8 * sum(t.numel() * t.element_size() for t in vars(q).values() if isinstance(t, torch.Tensor)) / q.shape.numel()


def main(cfg):
    model, tok, _ = checkpoint.load(cfg.init_from, expect="lm")
    val = TokenFile(cfg.data, "val", model.args.max_seq_len, "documents", tok.hash)
    layers = quant.matrices(model)
    weights = {name: m.weight.detach().clone() for name, m in layers.items()}
    plain = evaluation.lm_loss(model, tok, val, cfg.max_tokens)
    total = sum(W.square().sum() for W in weights.values())
    results = {"fp32": {"bits": 32.0, "error": 0.0, "loss": plain["loss"], "ppl": plain["ppl"], "ppl_ratio": 1.0}}
    print(f"{len(weights)} matrices, {sum(W.numel() for W in weights.values()):,} weights | {plain['tokens']:,} validation tokens\n\n"
          f"| | bits a weight | error, % of the weights | loss | perplexity | more |\n|---|---|---|---|---|---|")
    for name, method in {"fp32": None, **ROWS}.items():
        if method:
            qs = {n: method(W) for n, W in weights.items()}
            error = (sum((restored(q) - weights[n]).square().sum() for n, q in qs.items()) / total).sqrt()
            for n, q in qs.items():
                layers[n].weight.data = restored(q)
            found = evaluation.lm_loss(model, tok, val, cfg.max_tokens)
            results[name] = {"bits": sum(bits_of(q) * q.shape.numel() for q in qs.values()) / sum(q.shape.numel() for q in qs.values()),
                             "error": float(error), "loss": found["loss"], "ppl": found["ppl"], "ppl_ratio": found["ppl"] / plain["ppl"]}
        r = results[name]
        print(f"| {name} | {r['bits']:.2f} | {100 * r['error']:.2f} | {r['loss']:.4f} | {r['ppl']:.4f} | {100 * (r['ppl_ratio'] - 1):+.2f} % |", flush=True)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps({"config": vars(cfg), **env.stamp(), "results": results}, indent=1) + "\n", encoding="utf-8")
    if cfg.picture:
        draw(weights, cfg.picture)


def draw(weights, path):
    """What 4 bits can say: a histogram of the weights in units of their block's range, and the 16 levels of each way."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    x = torch.cat([quant.blocks_of(W, 64) for W in weights.values()])                                # (blocks, 64)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    symmetric, stretched = x / x.abs().amax(1, keepdim=True), (x - low) / (high - low) * 2 - 1
    equal = torch.linspace(-1, 1, 15), torch.linspace(-1, 1, 16)
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharey=True)
    for ax, values, levels, title in zip(axes, (symmetric, stretched, symmetric), (*equal, quant.NF4_LEVELS),
                                         ("absmax: 15 equal steps", "zero point: 16, from least to largest", "NF4: 16 quantiles")):
        ax.hist(values.flatten().numpy(), bins=120, range=(-1, 1), color="#9db4d0")
        for level in levels.tolist():
            ax.axvline(level, color="#c0392b", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_yticks([])
        ax.tick_params(labelsize=7)
        ax.set_xlabel("weight / range of its block of 64", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    run(main, Config, __doc__)
