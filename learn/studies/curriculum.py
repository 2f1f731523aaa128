"""Does it help to show easy text first? Curricula against random order on the demo world, three seeds each.

    python -m learn.studies.curriculum                 about two minutes on two CPU cores
    python -m learn.studies.curriculum --steps 600 --seeds 5

Every run has the same model, the same number of updates and the same learning rate; only the order of the rows differs.
It prints the validation loss at the end, mean and standard deviation over the seeds, and draws the curves (matplotlib).
"""
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanollm import curriculum, dist, world
from nanollm.config import UserError, arg, run
from nanollm.corpus.bpe import train_bpe
from nanollm.corpus.pack import write_tokens
from nanollm.data import TokenFile
from nanollm.losses import cross_entropy
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import get_lr, make_optimizer
from nanollm.mixture import Curriculum
from nanollm.sampler import Sampler
from nanollm.tokenizer import bpe_tokenizer, language, pattern_for

B, T, V = 16, 64, 512                                        # rows an update, tokens a row, vocabulary
CTX = dist.Context(0, 0, 1, torch.device("cpu"), True)
PLAIN = lambda: dist.autocast(CTX.device, torch.float32)
ARMS = {"shuffle": "each row once an epoch, as train_pretrain.py does it", "random": "drawn with replacement: full competence from the start",
        "length": "rows of short documents first", "unigram": "frequent words first", "trigram": "frequent trigrams first",
        "-unigram": "rare words first", "CLIMB": "unigram, from a quarter of the run on by the model's own perplexity"}


@dataclass
class Config:
    documents: int = arg(1500, "documents; a tenth of them for validation", least=1000)
    language: str = arg("en", "en, zh or both: with both, an order by frequency is mostly an order by language")
    steps: int = arg(160, "updates of each run, a multiple of 8", least=24)
    seeds: int = arg(3, "runs of each kind", least=2)
    out: str = arg("out/curriculum.png", "the picture; empty = none")


def train(arm, seed, train_rows, val_batch, orders, steps):
    """One run; returns [(update, validation loss)]."""
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=T, multiple_of=32))
    optimizer, sampler, curve = make_optimizer(model, "adamw", 5e-3), Sampler(len(train_rows), CTX, B, 1, seed), []
    if arm != "shuffle":
        order = orders["unigram" if arm in ("CLIMB", "random") else arm]
        sampler.order = Curriculum(order, seed, steps * B, start=1.0 if arm == "random" else 0.1, full_at=0.5,
                                   switch=steps // 4 * B if arm == "CLIMB" else 0)
    for step in range(steps + 1):
        if step % (steps // 8) == 0:
            with torch.no_grad():
                loss, count, _ = cross_entropy(model(val_batch[0], val_batch[2]), val_batch[1])
            curve.append((step, (loss / count).item()))
        if step == steps:
            return curve
        if arm == "CLIMB" and step == steps // 4:
            sampler.order.later = curriculum.easiest_first(curriculum.model_difficulty(model, train_rows, CTX, PLAIN, 64))
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step + 1, 5e-3, 1e-4, 10, steps) * group["lr_scale"]
        inputs, targets, segments = train_rows.batch(sampler.micro_batches(step)[0])
        loss, count, _ = cross_entropy(model(inputs, segments), targets)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def draw(curves, path):
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib, or --out= for none") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.figure(figsize=(7, 4))
    for k, (arm, runs) in enumerate(curves.items()):
        steps, loss = np.array(runs[0])[2:, 0], np.array(runs)[:, 2:, 1]
        plt.errorbar(steps + k / 2, loss.mean(0), loss.std(0, ddof=1), label=arm, capsize=2, linewidth=1)
    plt.xlabel("update")
    plt.ylabel("validation loss (nats), mean ± standard deviation")
    plt.legend()
    plt.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=90)
    print(f"-> {path}")


def main(cfg):
    if cfg.steps % 8:
        raise UserError(f"--steps {cfg.steps}: the loss is measured at each eighth of the run; take a multiple of 8")
    texts = [d.text for d in world.documents(3 * cfg.documents) if cfg.language in ("both", language(d.text))][: cfg.documents]
    if not texts:
        raise UserError(f"--language {cfg.language} is neither en, zh nor both")
    tokenizer = bpe_tokenizer(train_bpe(texts, V, pattern_for(V), say=None), pattern_for(V))
    with tempfile.TemporaryDirectory() as folder:
        held_out = cfg.documents // 10
        for split, part in (("train", texts[held_out:]), ("val", texts[:held_out])):
            write_tokens(folder, split, part, tokenizer)
        train_rows, val_rows = TokenFile(folder, "train", T, "documents"), TokenFile(folder, "val", T, "documents")
        orders = {arm: curriculum.order_of(train_rows, arm) for arm in ("length", "unigram", "trigram", "-unigram")}
        print(f"{len(train_rows):,} rows of {T} tokens, {cfg.steps} updates of {B} rows = {cfg.steps * B / len(train_rows):.2f} epochs")
        val_batch, curves = val_rows.batch(range(128)), {}
        for arm in ARMS:
            curves[arm] = [train(arm, seed, train_rows, val_batch, orders, cfg.steps) for seed in range(cfg.seeds)]
            half, last = ([c[k][1] for c in curves[arm]] for k in (4, -1))
            gap = [a[-1][1] - b[-1][1] for a, b in zip(curves[arm], curves["shuffle"])]
            shown = ["{:.4f} ± {:.4f}".format(statistics.mean(x), statistics.stdev(x)) for x in (half, last, gap)]
            print(f"{arm:<9} half-way {shown[0]}   end {shown[1]}   minus shuffle, seed by seed {shown[2]}   ({ARMS[arm]})", flush=True)
        del train_rows, val_rows                              # Windows removes no file that is still mapped
    if cfg.out:
        draw(curves, cfg.out)


if __name__ == "__main__":
    run(main, Config, __doc__)
