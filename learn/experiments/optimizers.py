"""SGD, AdamW, Muon: how far does each come in the same number of updates?

    python -m learn.experiments.optimizers                 about a minute and a half on one core

SGD moves every weight by lr times its gradient, and gradients of a transformer differ by orders of magnitude from part to part.
Adam (Kingma & Ba 2015, algorithm 1) divides each by the root of its own running mean square. Muon (Jordan et al. 2024) sets all
singular values of a matrix' momentum near 1. A rate that suits one is useless for another: each optimizer gets the best of its three
RATES, found on a seed of its own, and is then judged on others. It costs memory: the numbers that are kept for each weight.
"""
import torch

from learn import lab
from nanollm.optim import make_optimizer

RATES = {"SGD": (0.1, 0.3, 1.0), "AdamW": (3e-3, 1e-2, 3e-2), "Muon": (1e-2, 3e-2, 1e-1)}
STEPS = 150


def optimizer_of(kind, model, rate):
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    if kind == "AdamW":
        return make_optimizer(model, "adamw", rate)
    return make_optimizer(model, "muon", 1e-2, muon_lr=rate)      # embedding and norms stay with AdamW, at 1e-2


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, curves = {}, {}

    def go(kind, rate, seed):
        """One run -> (validation loss, losses, numbers kept per parameter)."""
        model = lab.tiny(tok.vocab_size, seed)
        optimizer = optimizer_of(kind, model, rate)
        peak = rate if kind != "Muon" else 1e-2                   # its groups multiply by lr_scale
        losses = lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS), peak, optimizer=optimizer)
        kept = sum(x.numel() for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim())
        return lab.val_loss(model, val_ids), losses, kept / sum(p.numel() for p in model.parameters())

    for kind, rates in RATES.items():
        rate = min(rates, key=lambda r: go(kind, r, seed=99)[0])
        runs = [go(kind, rate, seed) for seed in range(cfg.seeds)]
        figures[kind] = [loss for loss, _, _ in runs]
        figures[f"{kind} rate"], figures[f"{kind} kept"] = rate, runs[0][2]
        curves[f"{kind}, rate {rate:g}"] = runs[0][1]
    claims = {"AdamW ends below SGD": lab.higher(figures["SGD"], figures["AdamW"]),
              "Muon ends below AdamW": lab.higher(figures["AdamW"], figures["Muon"])}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(losses, label=name, linewidth=0.8)
        plt.xlabel("update")
        plt.ylabel("training loss, nats")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
