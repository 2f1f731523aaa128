"""How much do the architecture options matter? Each against SwiGLU at the same size, data and number of updates, three seeds.

    python prepare_data.py demo                            the corpus, once (runs/speedrun.sh has it too)
    python -m learn.studies.architectures              about ten minutes on one CPU core; goes on where it was stopped

It prints the validation loss of every arm, mean and standard deviation over the seeds, and the difference from SwiGLU seed
by seed, and writes both to --out. Only differences between rows with equal FLOPs per token are a fair comparison.
"""
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import dist
from nanollm.config import arg, run
from nanollm.data import TokenFile, tokenizer_of
from nanollm.losses import cross_entropy
from nanollm.model import ModelArgs, flops_per_token, parameter_count
from nanollm.optim import get_lr, make_optimizer
from nanollm.sampler import Sampler
from nanollm.variants import add_balance, build

CTX = dist.Context(0, 0, 1, torch.device("cpu"), True)
ARMS = {                                                     # name: (variants, changes of the shape)
    "SwiGLU": ([], {}), "GeGLU": (["geglu"], {}), "GELU": (["gelu"], {}), "ReLU": (["relu"], {}),
    "QK-norm": (["qk_norm"], {}), "GPT-2": (["gpt2"], {}),
    "MoE 2 of 8": (["moe:n_experts=8,top_k=2"], {}), "the same, no balance loss": (["moe:n_experts=8,top_k=2,balance=0"], {}),
    "SwiGLU, 4 times as wide": ([], {"hidden_dim": 680}),    # as many parameters as the eight experts
}


@dataclass
class Config:
    data: str = arg("out/demo/tokens", "directory of token files")
    steps: int = arg(500, "updates of each run", least=20)
    seeds: int = arg(3, "runs of each kind", least=2)
    out: str = arg("out/architectures.json", "the results; runs found there are not repeated")


def train(model, rows, steps, seed=0, batch=8, learning_rate=4e-3):
    """AdamW with warmup and cosine; returns the model."""
    optimizer, sampler = make_optimizer(model.train(), "adamw", learning_rate), Sampler(len(rows), CTX, batch, 1, seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step + 1, learning_rate, learning_rate / 40, 20, steps) * group["lr_scale"]
        inputs, targets, segments = rows.batch(sampler.micro_batches(step)[0])
        loss, count, _ = add_balance(model, *cross_entropy(model(inputs, segments), targets))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.no_grad()
def evaluate(model, rows):
    """Mean loss over the whole validation split, and the use of the experts there: (loss, [share of each] or None)."""
    total, tokens, use = 0.0, 0, []
    for i in range(0, len(rows), 64):
        inputs, targets, segments = rows.batch(range(i, min(i + 64, len(rows))))
        loss, count, _ = cross_entropy(model(inputs, segments), targets)
        total, tokens = total + loss.item(), tokens + count.item()
        use += [torch.stack([m.use for m in model.modules() if hasattr(m, "use")])] if hasattr(model.layers[0].feed_forward, "use") else []
    return total / tokens, torch.stack(use).mean(0).tolist() if use else None              # per layer, per expert


def one_run(arm, seed, cfg, train_rows, val_rows, vocab):
    words, shape = ARMS[arm]
    torch.manual_seed(seed)
    args = ModelArgs(**{**dict(dim=64, n_layers=3, n_heads=4, vocab_size=vocab, max_seq_len=128, multiple_of=2, variants=words), **shape})
    model, start = build(args), time.time()
    train(model, train_rows, cfg.steps, seed)
    seconds = time.time() - start
    loss, use = evaluate(model, val_rows)
    result = {"arm": arm, "seed": seed, "steps": cfg.steps, "loss": loss, "seconds": seconds, "use": use,
              "parameters": parameter_count(model)["total"], "mflop": flops_per_token(model, 128) / 1e6}
    if arm == "SwiGLU":                                      # its trained weights with another activation, which they fit
        args.variants = ["geglu"]
        swapped = build(args).eval()
        swapped.load_state_dict(model.state_dict())
        result["loss as GeGLU"] = evaluate(swapped, val_rows)[0]
    return result


def table(results):
    base = {r["seed"]: r["loss"] for r in results if r["arm"] == "SwiGLU"}
    print(f"{'':<28}{'parameters':>11}{'MFLOP/token':>13}   {'validation loss':<18}{'minus SwiGLU':<20}{'s/run':>6}")
    for arm in ARMS:
        mine = [r for r in results if r["arm"] == arm]
        if len(mine) < 2:
            continue
        spread = lambda x: f"{statistics.mean(x):.4f} ± {statistics.stdev(x):.4f}"
        gaps = [r["loss"] - base[r["seed"]] for r in mine]
        print(f"{arm:<28}{mine[0]['parameters']:>11,}{mine[0]['mflop']:>13.2f}   {spread([r['loss'] for r in mine]):<18}{spread(gaps):<20}"
              f"{statistics.median(r['seconds'] for r in mine):>6.1f}")
        if "loss as GeGLU" in mine[0]:
            print(f"{'   its weights as GeGLU':<55}{spread([r['loss as GeGLU'] for r in mine])}")
        if mine[0]["use"]:
            entropy = [statistics.mean(-(u * u.clamp(min=1e-9).log()).sum().item() for u in torch.tensor(r["use"])) for r in mine]
            most = max(max(layer) for r in mine for layer in r["use"])
            least = min(min(layer) for r in mine for layer in r["use"])
            print(f"   experts: use between {least:.3f} and {most:.3f} (even: 0.125); entropy {spread(entropy)} (even: {torch.tensor(8.0).log():.4f})")


def main(cfg):
    tokenizer, out = tokenizer_of(cfg.data), Path(cfg.out)
    train_rows, val_rows = (TokenFile(cfg.data, split, 128, "documents", tokenizer.hash) for split in ("train", "val"))
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    done = {(r["arm"], r["seed"], r["steps"]) for r in results}
    for seed in range(cfg.seeds):
        for arm in ARMS:
            if (arm, seed, cfg.steps) not in done:
                results.append(one_run(arm, seed, cfg, train_rows, val_rows, tokenizer.vocab_size))
                print(f"{arm:<28} seed {seed}: {results[-1]['loss']:.4f} in {results[-1]['seconds']:.0f} s", flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    table([r for r in results if r["steps"] == cfg.steps])


if __name__ == "__main__":
    run(main, Config, __doc__)
