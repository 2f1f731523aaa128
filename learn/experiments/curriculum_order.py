"""Easy text first, hard text first, or shuffled?

    python -m learn.experiments.curriculum_order           a minute and a half on one core

Competence-based curriculum (Platanios et al. 2019; Campos 2021, algorithm 1): rows stand in the order of a difficulty, here the rarity
of their words, -sum log p(w), or the length of their documents; sample t is drawn from the easiest c(t) of them, and c grows to 1 by the
middle of the run. "random" is the same with c = 1 from the start. Campos finds no proxy better than chance on a larger corpus; CLIMB
(Martinez et al. 2023) finds no consistent gain. So: is any order further from random than the seeds are from each other?
English texts only: with two languages an order by rarity is mostly an order by language.

What one sees: both orders from easy to hard end above random, and hard to easy is not told apart from it. Perhaps
because an easy beginning is a narrow one, the same few rows again and again while the rate is highest.
"""
import numpy as np
import torch

from learn import lab
from nanollm.mixture import Curriculum

STEPS, T, B = 250, 64, 16
KINDS = ("random", "rare words last", "rare words first", "long last")


def rows_of(texts, tok):
    """Windows of T + 1 tokens over all texts, (n, T + 1), and how long the documents are that their tokens come from, (n,)."""
    ids = [tok.encode(text) + [tok.eos_id] for text in texts]
    stream, lengths = torch.tensor(sum(ids, [])), torch.tensor([len(doc) for doc in ids for _ in doc], dtype=torch.float)
    n = (len(stream) - 1) // T
    return torch.stack([stream[i * T : i * T + T + 1] for i in range(n)]), lengths[: n * T].view(n, T).mean(1)


def main(cfg):
    tok = lab.tokenizer(512, "en")
    rows, length = rows_of(lab.texts(3000, 0, "en"), tok)
    val_ids = lab.stream(lab.texts(300, 1, "en"), tok)
    counts = torch.bincount(rows.flatten(), minlength=tok.vocab_size).float()
    rarity = -(counts / counts.sum()).log()[rows].sum(1)                                       # (n,)
    easiest = {"rare words last": rarity.argsort(), "rare words first": (-rarity).argsort(), "long last": length.argsort(), "random": rarity.argsort()}
    figures, curves, steps = {}, {}, cfg.steps(STEPS)
    for kind in KINDS:
        for seed in range(cfg.seeds):
            order = Curriculum(easiest[kind].numpy(), seed, steps * B, start=1.0 if kind == "random" else 0.1, full_at=0.5)
            curve = []

            def batch(step):
                chosen = rows[torch.from_numpy(order(np.arange(step * B, step * B + B)))]
                return chosen[:, :-1], chosen[:, 1:]

            def each(step, model):
                if (step + 1) % (steps // 5 or 1) == 0:
                    curve.append(lab.val_loss(model, val_ids, most=8000))
                    model.train()
            model = lab.tiny(tok.vocab_size, seed)
            lab.train(model, batch, steps, each=each)
            figures.setdefault(kind, []).append(lab.val_loss(model, val_ids))
            curves.setdefault(kind, []).append(curve)
    apart = lambda kind: lab.higher(figures[kind], figures["random"]), lambda kind: lab.higher(figures["random"], figures[kind])
    claims = {f"{kind}: {word} random": test(kind) for kind in KINDS[1:] for word, test in zip(("worse than", "better than"), apart)}

    def draw(plt):
        for i, kind in enumerate(KINDS):
            runs = np.array(curves[kind])[:, 1:]                                               # (seeds, times): the first fifth would hide the rest
            at = np.arange(2, 2 + runs.shape[1]) * (steps // 5)
            plt.errorbar(at + 2 * i, runs.mean(0), runs.std(0), label=kind, linewidth=0.8, capsize=2)
        plt.xlabel("update")
        plt.ylabel("validation loss, nats")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
