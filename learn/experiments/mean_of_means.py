"""What happens if the loss of an update is the mean of its micro-batches' means?

    python -m learn.experiments.mean_of_means              a minute on one core

The right loss of an update is the sum over all answer tokens divided by their number. A loop that calls loss.mean().backward() for
each micro-batch and divides by the number of micro-batches computes something else as soon as answers differ in length: with one
chat in a micro-batch, a token of a 5-token answer weighs 12 times as much as one of a 60-token answer. It also depends on the
split: the same 16 chats make another update as 16 x 1, as 4 x 4 and as 1 x 16 (the bug of October 2024 in several libraries).

Here chats with short and long answers, 16 an update. The gradient is linear, so each split needs no passes of its own: it is a
weight for each token's loss, and that is how it is computed. Held-out loss a token tells what was learnt, apart for short and long answers.
"""
import random

import torch
import torch.nn.functional as F

from learn import lab
from nanollm import world
from nanollm.losses import IGNORE_INDEX
from nanollm.optim import get_lr, make_optimizer
from nanollm.tokenizer import render

STEPS, ROWS, RATE = 120, 16, 4e-3
SHORT, LONG = 20, 40                                         # tokens: at most, at least
SPLITS = {"sum / tokens": 0, "means of 4 chats": 4, "means of 1 chat": 1}


def chats(n, seed, tok, length):
    """inputs, targets (n, T): half short answers to questions, half stories, cut to `length` tokens; targets on the answers only."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        row = world.chat_row(rng, "story" if len(rows) % 2 else rng.choice(("colour", "opposite", "sum", "translate")), False)
        ids, mask = render(tok, row["messages"])
        if row["lang"] == "en" and len(row["messages"]) == 2:
            rows.append((ids[:length] + [tok.pad_id] * (length - len(ids)), mask[:length] + [0] * (length - len(ids))))
    ids, mask = (torch.tensor(x) for x in zip(*rows))
    return ids[:, :-1], ids.masked_fill(mask == 0, IGNORE_INDEX)[:, 1:]


def losses_of(model, inputs, targets):
    """The loss of each token, 0 where none is asked: (B, T)."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(targets.shape)


def weights(targets, size):
    """What each token's loss is multiplied by, (B, T), so that the sum is the update's loss. size: chats in a micro-batch, 0: no means."""
    asked = (targets != IGNORE_INDEX).float()
    if not size:
        return asked / asked.sum()
    parts = asked.view(-1, size, asked.size(1))                                            # (micro-batches, size, T)
    return (parts / parts.sum((1, 2), keepdim=True) / len(parts)).view_as(asked)


def main(cfg):
    tok, length = lab.tokenizer(512, "en"), 88
    (inputs, targets), (val_inputs, val_targets) = (chats(n, seed, tok, length) for n, seed in ((1200, 0), (200, 1)))
    size = (val_targets != IGNORE_INDEX).sum(1)
    kinds = {"all": size > 0, "short": size <= SHORT, "long": size >= LONG}
    figures = {"tokens of a short answer": size[kinds["short"]].float().mean(), "tokens of a long answer": size[kinds["long"]].float().mean()}
    for name, split in SPLITS.items():
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed, max_seq_len=length)
            optimizer, steps = make_optimizer(model, "adamw", RATE), cfg.steps(STEPS)
            for step in range(steps):
                rows = torch.randint(len(inputs), (ROWS,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
                for group in optimizer.param_groups:
                    group["lr"] = get_lr(step + 1, RATE, RATE / 10, 20, steps)
                (losses_of(model, inputs[rows], targets[rows]) * weights(targets[rows], split)).sum().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.eval()
            with torch.no_grad():
                losses = torch.cat([losses_of(model, val_inputs[i : i + 50], val_targets[i : i + 50]) for i in range(0, len(val_inputs), 50)])
            for kind, rows in kinds.items():
                figures.setdefault(f"{kind}, {name}", []).append((losses[rows].sum() / size[rows].sum()).item())
    right, wrong = "sum / tokens", "means of 1 chat"
    claims = {"means of 1 chat: a token of long answers is learnt worse": lab.higher(figures[f"long, {wrong}"], figures[f"long, {right}"]),
              "means of 1 chat: a token of short answers is learnt better": lab.higher(figures[f"short, {right}"], figures[f"short, {wrong}"]),
              "means of 1 chat: the loss a token is higher in all": lab.higher(figures[f"all, {wrong}"], figures[f"all, {right}"]),
              "another split is another run: means of 4 lie between": lab.mean(figures[f"all, {right}"]) < lab.mean(figures["all, means of 4 chats"])
                                                                      < lab.mean(figures[f"all, {wrong}"])}

    def draw(plt):
        for i, kind in enumerate(kinds):
            plt.subplot(1, 3, i + 1)
            lab.bars(plt, {name.replace(" of ", "\nof "): figures[f"{kind}, {name}"] for name in SPLITS}, "nats a token" if not i else "")
            plt.title({"all": "all answers", "short": f"answers of at most {SHORT} tokens", "long": f"of at least {LONG}"}[kind])
        plt.gcf().set_size_inches(9, 3.2)
        plt.tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
