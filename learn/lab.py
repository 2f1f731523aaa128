"""What the experiments share: a small text whose entropy is known, a plain training loop, error bars, and the stored result.

An experiment is a file learn/experiments/NAME.py with a function main(cfg) that ends in `lab.finish(…)`. It prints a table, says
whether each claim holds, writes out/learn/NAME.json and NAME.png, and compares its figures with learn/results/NAME.json,
the run that the pages quote. `--record true` stores the run as that one.
"""
import functools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanollm import env, world
from nanollm.config import UserError, arg, run
from nanollm.corpus.train_tokenizer import train_tokenizer
from nanollm.losses import cross_entropy
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import get_lr, make_optimizer
from nanollm.variants import build

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = ROOT / "learn" / "results", ROOT / "docs" / "images" / "learn"


@dataclass
class Config:
    seeds: int = arg(3, "runs of each kind", least=1)
    scale: float = arg(1.0, "share of the updates; small: does it run at all")
    out: str = arg("out/learn", "directory of the result and the picture")
    record: bool = arg(False, "store the result as the one that the pages quote")

    def steps(self, n):
        """n updates, or as many as --scale leaves, at least 2."""
        return max(2, round(n * self.scale))


def start(main, file, doc, cls=Config):
    """The last line of an experiment: options, then main(cfg)."""
    def named(cfg):
        if cfg.record and (cfg.scale, cfg.seeds) != (1, cls().seeds):
            raise UserError("--record stores the whole run: leave out --scale and --seeds")
        cfg.name = Path(file).stem
        main(cfg)
    run(named, cls, doc)


@functools.cache
def texts(n=3000, seed=0, language=""):
    """n documents of the demo world (about 270 bytes each); language: en, zh, or both."""
    docs = (doc for doc in world.documents(10**9, seed) if doc.kind.endswith(language))
    return [next(docs).text for _ in range(n)]


@functools.cache
def tokenizer(vocab_size=512, language=""):
    """Byte-level BPE learnt from the texts; vocab_size 0: characters."""
    return train_tokenizer("bpe" if vocab_size else "char", texts(3000, 0, language), vocab_size, say=lambda *_: None)


def stream(docs, tok):
    """All documents after one another, each with its <|endoftext|>: (N,) int64."""
    return torch.tensor([token for text in docs for token in [*tok.encode(text), tok.eos_id]], dtype=torch.long)


@functools.cache
def corpus(vocab_size=512, language="", n=3000):
    """(training tokens, validation tokens, tokenizer)."""
    tok = tokenizer(vocab_size, language)
    return stream(texts(n, 0, language), tok), stream(texts(300, 1, language), tok), tok


def windows(ids, rows=16, length=64, seed=0):
    """batch(step) -> inputs, targets (rows, length): random windows, the same for the same seed and step."""
    def batch(step):
        at = torch.randint(len(ids) - length, (rows, 1), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        window = ids[at + torch.arange(length + 1)]                                           # (rows, length + 1)
        return window[:, :-1], window[:, 1:]
    return batch


def tiny(vocab_size=512, seed=0, **shape):
    """A small LLaMA, 0.1 M parameters; shape: fields of ModelArgs, variants=[…] among them."""
    torch.manual_seed(seed)
    args = ModelArgs(**{**dict(dim=64, n_layers=2, n_heads=4, vocab_size=vocab_size, max_seq_len=64, multiple_of=8), **shape})
    return build(args) if args.variants else Transformer(args)


def train(model, batch, steps, learning_rate=4e-3, warmup=20, schedule="cosine", optimizer=None, clip=1.0, each=None):
    """The loop of train_pretrain.py without its comforts -> the training losses, one an update. batch(step) -> inputs, targets.
    optimizer: default AdamW of make_optimizer. each(step, model): called after every update."""
    optimizer, losses = optimizer or make_optimizer(model, "adamw", learning_rate), []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step + 1, learning_rate, learning_rate / 10, warmup, steps, schedule) * group.get("lr_scale", 1.0)
        inputs, targets = batch(step)
        loss, count, _ = cross_entropy(model(inputs), targets)
        (loss / count).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / count.item())
        if each:
            each(step, model)
    return losses


@torch.no_grad()
def val_loss(model, ids, length=64, rows=64, most=20000):
    """Mean loss a token, nats, over consecutive windows of `ids`."""
    model.eval()
    n = min(len(ids) - 1, most) // length
    inputs, targets = ids[: n * length].view(n, length), ids[1 : n * length + 1].view(n, length)
    total, tokens = 0.0, 0
    for i in range(0, n, rows):
        loss, count, _ = cross_entropy(model(inputs[i : i + rows]), targets[i : i + rows])
        total, tokens = total + loss.item(), tokens + count.item()
    return total / tokens


def mean(runs):
    return statistics.fmean(runs)


def spread(runs):
    """Standard deviation over the seeds, 0 for a single run."""
    return float(np.std(runs, ddof=1)) if len(runs) > 1 else 0.0


def higher(a, b, by=2.0):
    """Is a's mean above b's by more than `by` standard errors of their difference?"""
    error = (spread(a) ** 2 / len(a) + spread(b) ** 2 / len(b)) ** 0.5
    return mean(a) - mean(b) > by * error


def finish(cfg, figures, claims, draw=None, within=None):
    """The end of an experiment. figures: {name: number, or one number a seed}. claims: {sentence: does it hold}. draw(plt) makes the
    picture. within: {name: share}: how far from the stored mean a figure may lie, as a share of it (default: three standard
    deviations and 2 %; for what depends on the machine, seconds above all, say 9: it is shown and not judged)."""
    figures = {name: [float(x) for x in runs] if isinstance(runs, (list, tuple)) else [float(runs)] for name, runs in figures.items()}
    width = max(map(len, figures))
    for name, runs in figures.items():
        several = f" ± {spread(runs):.4g}   ({', '.join(f'{x:.4g}' for x in runs)})" if len(runs) > 1 else ""
        print(f"  {name:<{width}}  {mean(runs):.4g}{several}")
    for sentence, holds in claims.items():
        print(f"  {'yes' if holds else 'NO '}  {sentence}")
    if cfg.record and not all(np.isfinite(runs).all() for runs in figures.values()):
        raise UserError("a figure is not finite: this run is not one to store")
    record = {"experiment": cfg.name, "scale": cfg.scale, "seeds": cfg.seeds, "seconds": round(time.process_time(), 1), **env.stamp(),       # of processor time
              "figures": {name: {"mean": mean(runs), "std": spread(runs), "runs": runs,
                                 "within": (within or {}).get(name, 0.02) * abs(mean(runs)) + 3 * spread(runs)} for name, runs in figures.items()},
              "claims": {sentence: bool(holds) for sentence, holds in claims.items()}}
    for folder, pictures in [(Path(cfg.out), Path(cfg.out))] + ([(RESULTS, PICTURES)] if cfg.record else []):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{cfg.name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if draw:
            picture(draw, pictures / f"{cfg.name}.png")
    stored = RESULTS / f"{cfg.name}.json"
    if cfg.scale == 1 and stored.exists() and not cfg.record:
        judge(record, json.loads(stored.read_text(encoding="utf-8")))


def judge(new, stored):
    """Says which figures and claims differ from the stored run; exit code 1 if any. (NaN is near nothing.)"""
    apart = [f"{name} is {new['figures'][name]['mean']:.4g}, stored {old['mean']:.4g} ± {old['within']:.2g}" for name, old in stored["figures"].items()
             if name in new["figures"] and not abs(new["figures"][name]["mean"] - old["mean"]) <= old["within"]]
    apart += [f"not there: {name}" for name in stored["figures"].keys() ^ new["figures"].keys()]
    apart += [f"claim: {sentence}" for sentence in stored["claims"].keys() | new["claims"].keys()
              if stored["claims"].get(sentence) != new["claims"].get(sentence)]
    print("as in the stored run" if not apart else "apart from the stored run: " + "; ".join(apart))
    if apart:
        sys.exit(1)


def picture(draw, path):
    try:
        import matplotlib
    except ImportError:
        print('no picture: it needs matplotlib, pip install -e ".[plot]"')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 8, "figure.figsize": (6, 3.2), "axes.spines.top": False, "axes.spines.right": False})
    plt.figure()
    draw(plt)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=100, bbox_inches="tight")
    plt.close("all")
    print(f"picture: {path if path.is_relative_to(ROOT) is False else path.relative_to(ROOT)}")


def bars(plt, figures, label=""):
    """A bar a figure with its standard deviation: {name: runs}."""
    for i, (name, runs) in enumerate(figures.items()):
        runs = runs if isinstance(runs, (list, tuple)) else [runs]
        plt.bar(i, mean(runs), yerr=spread(runs), capsize=3, color="#4878a8")
        plt.annotate(f"{mean(runs):.3g}", (i, mean(runs) + spread(runs)), ha="center", va="bottom", fontsize=8)
    plt.xticks(range(len(figures)), figures, rotation=20 if len(figures) > 4 else 0)
    plt.ylabel(label)
