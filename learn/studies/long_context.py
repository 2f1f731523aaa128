"""Past the trained context: RoPE scaling, and streaming with and without sink tokens.

    python prepare_data.py demo                            the corpus, once (runs/speedrun.sh has it too)
    python -m learn.studies.long_context               about four minutes on one CPU core

A small model is trained on rows of 128 tokens. Then, on the validation text as one stream:
1. the loss by position in rows of 512, for plain RoPE and each kind of scaling, before and after a few updates at 512;
2. the loss while reading 1,024 tokens one by one, with a cache that keeps all (and recomputes nothing), a window of 124
   alone, and a window of 120 with 4 sinks; and how much attention falls on the very first token.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from learn.studies.architectures import train
from nanollm.config import arg, run
from nanollm.data import TokenFile, tokenizer_of
from nanollm.model import ModelArgs, apply_rope
from nanollm.variants import build

SHORT, LONG = 128, 512


@dataclass
class Config:
    data: str = arg("out/demo/tokens", "directory of token files")
    steps: int = arg(1500, "updates at 128 tokens", least=20)
    more: int = arg(60, "updates at 512 tokens")
    out: str = arg("out/long_context.json", "the results")


def grown(model, words, length=SHORT):
    """The trained weights under other variants and another context."""
    args = ModelArgs(**{**vars(model.args), "variants": words, "max_seq_len": length})
    other = build(args).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def loss_by_position(model, rows, edges=(0, 64, 128, 192, 256, 384, 512)):
    """[mean loss of the tokens at positions edges[i] … edges[i + 1] - 1]"""
    inputs, targets, _ = rows.batch(range(min(len(rows), 96)))
    loss = torch.cat([F.cross_entropy(model(x).transpose(1, 2), y, reduction="none") for x, y in zip(inputs.split(16), targets.split(16))])    # (B, T)
    return [loss[:, a:b].mean().item() for a, b in zip(edges, edges[1:])]


@torch.no_grad()
def stream_loss(model, inputs, targets, edges=(0, 64, 120, 128, 136, 256, 512, 1024)):
    """The same, reading column by column through the model's own cache. inputs (B, T)."""
    cache = model.cache(model)
    loss = torch.stack([F.cross_entropy(model(inputs[:, t : t + 1], cache=cache)[:, 0], targets[:, t], reduction="none")
                        for t in range(inputs.size(1))], 1)                                # (B, T)
    return [loss[:, a:b].mean().item() for a, b in zip(edges, edges[1:])]


@torch.no_grad()
def attention_on_the_first(model, inputs):
    """[for each layer: mean attention of the tokens from position 64 on to position 0]"""
    x, shares = model.tok_embeddings(inputs), []
    cos, sin = model.rope_cos[: inputs.size(1)], model.rope_sin[: inputs.size(1)]
    causal = torch.ones(inputs.size(1), inputs.size(1), dtype=torch.bool).tril()
    for block in model.layers:
        q, k, _ = block.attention.qkv(block.attention_norm(x))
        scores = apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).transpose(-2, -1) / math.sqrt(q.size(-1))       # (B, H, T, T)
        shares.append(scores.masked_fill(~causal, -math.inf).softmax(-1)[:, :, 64:, 0].mean().item())
        x = block(x, cos, sin, None)
    return shares


def main(cfg):
    tokenizer = tokenizer_of(cfg.data)
    files = {(split, T): TokenFile(cfg.data, split, T, "stream", tokenizer.hash) for split in ("train", "val") for T in (SHORT, LONG, 1024)}
    torch.manual_seed(0)
    model = build(ModelArgs(dim=64, n_layers=3, n_heads=4, vocab_size=tokenizer.vocab_size, max_seq_len=SHORT, multiple_of=2))
    train(model, files["train", SHORT], cfg.steps)
    results = {"steps": cfg.steps, "more": cfg.more, "scaling": {}, "streaming": {}}

    show = lambda name, values: print(f"{name:<34}" + "".join(f"{v:9.3f}" for v in values), flush=True)
    print(f"{'loss at positions':<34}" + "".join(f"{s:>9}" for s in ("0-63", "-127", "-191", "-255", "-383", "-511")))
    for kind in ("none", "linear", "ntk", "yarn"):
        longer = grown(model, [] if kind == "none" else [f"rope_scaling:kind={kind},factor=4"], LONG)
        before = loss_by_position(longer, files["val", LONG])
        after = loss_by_position(train(longer, files["train", LONG], cfg.more, batch=4, learning_rate=1e-3), files["val", LONG])
        results["scaling"][kind] = {"before": before, "after": after}
        show(f"{kind}, as it is", before)
        show(f"{kind}, {cfg.more} updates later", after)

    inputs, targets, _ = files["val", 1024].batch(range(16))
    print(f"\n{'streaming, loss at positions':<34}" + "".join(f"{s:>9}" for s in ("0-63", "-119", "-127", "-135", "-255", "-511", "-1023")))
    for name, words, length in (("all kept, positions grow", [], 1024), ("window 124, no sinks", ["sliding_window:window=124,sinks=0"], SHORT),
                                ("window 120, 4 sinks", ["sliding_window:window=120,sinks=4"], SHORT)):
        results["streaming"][name] = stream_loss(grown(model, words, length), inputs, targets)
        show(name, results["streaming"][name])
    results["attention on the first token"] = attention_on_the_first(model, inputs[:, :SHORT])
    show("attention on token 0, by layer", results["attention on the first token"])
    print(f"an even share would be about {sum(1 / (t + 1) for t in range(64, SHORT)) / 64:.3f}")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
