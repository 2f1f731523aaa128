"""Grokking: does a model that knows its training examples by heart understand them later?

    python -m learn.experiments.grokking                   a minute and a half on one core

a + b mod P, asked as three tokens; less than half of the P * P sums are for training. Power et al. 2022 (arXiv:2201.02177, figure 1):
*training* accuracy is full early, *validation* accuracy stays low and rises long after. What drives it is weight decay: among the weights
that fit the training sums, those that compute the sum are smaller than those that list it. Without decay the model keeps its list.
The low plateau is no chance (1 / P): the model soon treats a + b as b + a, and knows the sums whose mirror image was for training.
"""
import torch

from learn import lab
from nanollm.losses import cross_entropy
from nanollm.optim import make_optimizer

P, SHARE = 29, 0.45
STEPS, RATE, DECAY = 1500, 2e-3, 2.0
EVERY = 20                                                    # updates from one look at the accuracies to the next


def go(seed, decay, steps):
    """One run -> [(update, training accuracy, validation accuracy)]; it ends when the model has understood."""
    a, b = torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij")
    questions = torch.stack([a.flatten(), b.flatten(), torch.full((P * P,), P)], 1)           # "a b =", (P * P, 3)
    sums = (questions[:, 0] + questions[:, 1]) % P
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(seed))
    train, val = order.split([round(SHARE * P * P), P * P - round(SHARE * P * P)])
    targets = torch.full_like(questions, -100)
    targets[:, -1] = sums                                                                     # only the answer counts
    model = lab.tiny(P + 1, seed, n_layers=1, max_seq_len=3)
    optimizer, curve = make_optimizer(model, "adamw", RATE, weight_decay=decay, betas=(0.9, 0.98)), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 10)
        loss, count, _ = cross_entropy(model(questions[train]), targets[train])               # all training sums in every update
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                right = model(questions)[:, -1].argmax(-1) == sums
            curve.append((step, right[train].float().mean().item(), right[val].float().mean().item()))
            if curve[-1][2] > 0.99:
                break
    return curve


def first(curve, which, level):
    """The update at which an accuracy (1: training, 2: validation) first reaches a level; the last one if it never does."""
    return next((point[0] for point in curve if point[which] >= level), curve[-1][0])


def main(cfg):
    steps = cfg.steps(STEPS)
    runs = [go(seed, DECAY, steps) for seed in range(cfg.seeds)]
    without = go(0, 0.0, steps)
    known, understood = [first(run, 1, 0.99) for run in runs], [first(run, 2, 0.95) for run in runs]
    figures = {"knows training by": known, "validation then": [next(val for step, _, val in run if step == k) for run, k in zip(runs, known)],
               "knows validation by": understood, "validation at last": [run[-1][2] for run in runs],
               "no decay, training": without[-1][1], "no decay, validation": without[-1][2]}
    claims = {"every run with decay knows the validation sums in the end": min(figures["validation at last"]) > 0.95,
              "that takes more than five times as long as knowing the training sums": all(b > 5 * a for a, b in zip(known, understood)),
              "without decay it knows all training sums and less than half of the others": without[-1][1] > 0.99 and without[-1][2] < 0.5}

    def draw(plt):
        for name, curve in (("", runs[0]), (", no decay", without)):
            at, train, val = zip(*curve)
            plt.plot(at, train, ":", linewidth=0.9, label="training" + name)
            plt.plot(at, val, linewidth=0.9, label="validation" + name)
        plt.xscale("log")
        plt.xlabel("update")
        plt.ylabel("accuracy")
        plt.legend()
    lab.finish(cfg, figures, claims, draw, within={"knows validation by": 0.5, "knows training by": 0.5, "validation then": 0.2, "no decay, validation": 0.2})


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
