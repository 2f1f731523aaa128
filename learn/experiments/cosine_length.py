"""How long should the cosine be, measured in the length of the run?

    python -m learn.experiments.cosine_length              a minute and a half on one core

The rate falls along half a cosine (Loshchilov & Hutter 2017, eq. 5) to a tenth of its peak. Too short, and the rest of the run is
spent at the lowest rate; too long, and the run stops while the rate is still high. Hoffmann et al. 2022 (figure A1) see a loss as soon
as the cycle is more than a quarter longer than the run; the notes allow 1 to 1.25 times. Same run, six lengths.

Here too short is much worse and too long is better, even twice the run: after 1.3 tokens a parameter nothing has settled yet, and every
update at a high rate still pays more than bringing it down. The rule of the paper is one for runs that are long for their model.
"""
import torch

from learn import lab
from nanollm.losses import cross_entropy
from nanollm.optim import get_lr, make_optimizer

LENGTHS = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0)                    # of the cosine, as a share of the run
STEPS, PEAK, WARMUP = 170, 8e-3, 15


def train(model, batch, steps, length):
    """lab.train with a schedule that may be longer or shorter than the run."""
    optimizer = make_optimizer(model, "adamw", PEAK)
    for step in range(steps):
        rate = get_lr(step + 1, PEAK, PEAK / 10, WARMUP, round(length * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = batch(step)
        loss, count, _ = cross_entropy(model(inputs), targets)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return rate / PEAK


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, left = {}, {}
    for length in LENGTHS:
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed)
            left[length] = train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS), length)
            figures.setdefault(f"{length:g}", []).append(lab.val_loss(model, val_ids))
    gap = {x: [a - b for a, b in zip(figures[f"{x:g}"], figures["1"])] for x in LENGTHS}      # seed by seed
    figures |= {f"{x:g} minus 1": runs for x, runs in gap.items() if x != 1}
    zero = [0.0] * cfg.seeds
    claims = {"twice the run is worse than the run": lab.higher(gap[2.0], zero), "1.5 times is worse": lab.higher(gap[1.5], zero),
              "1.25 times is worse": lab.higher(gap[1.25], zero), "half the run is worse": lab.higher(gap[0.5], zero),
              "0.8 times is worse": lab.higher(gap[0.8], zero)}

    def draw(plt):
        for seed in range(cfg.seeds):
            plt.plot(LENGTHS, [gap[x][seed] for x in LENGTHS], marker="o", markersize=3, linewidth=0.8, label=f"seed {seed}")
        plt.axhline(0, color="black", linewidth=0.5)
        plt.xlabel("length of the cosine / length of the run")
        plt.ylabel("validation loss minus that at 1, nats")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
