"""Gradients added up in 16 bits: what does accumulation lose?

    python -m learn.experiments.fp16_accumulation          a minute and a half on one core

N micro-batches of equal size are one batch: the gradient of a mean is the mean of the gradients, each divided by N before it is
added. The sum is exact up to rounding, and rounding depends on the type of the numbers that are added up. In 16 bits each
addition rounds to 8 (bf16) or 11 (fp16) binary digits, so a small term beside a large sum is rounded away (swamping), and in fp16
g / N may fall below 6e-8, the smallest number there is; multiplied by a loss scale it does not. Our scripts accumulate in fp32.

One sees the error of the sum, ||sum - exact|| / ||exact||, grow with N in each type, and then whether training notices it.
"""
import torch

from learn import lab
from nanollm.losses import cross_entropy
from nanollm.optim import get_lr, make_optimizer

# name -> type of the sum, factor that the terms are multiplied by before they are rounded
KINDS = {"fp32": (torch.float32, 1), "fp16, scaled": (torch.float16, 4096), "fp16": (torch.float16, 1), "bf16": (torch.bfloat16, 1)}
COUNTS = (1, 4, 16, 64, 256)
STEPS, PARTS, RATE = 60, 16, 4e-3


def gradient(model, inputs, targets):
    """The gradient of the mean loss of one micro-batch, all weights in one row: (P,) fp32."""
    loss, count, _ = cross_entropy(model(inputs), targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss / count, list(model.parameters()))])


def added_up(gradients, n, dtype, factor):
    total = 0
    for g in gradients:
        total = total + (g * (factor / n)).to(dtype)
    return total.float() / factor


def errors(model, batch):
    """{(kind, N): error} of the sum of N micro-batches of one row, against a sum in fp64."""
    gradients = [gradient(model, *batch(i)) for i in range(max(COUNTS))]
    found = {}
    for n in COUNTS:
        exact = sum(g.double() for g in gradients[:n]) / n
        for name, kind in KINDS.items():
            found[name, n] = ((added_up(gradients[:n], n, *kind) - exact).norm() / exact.norm()).item()
    return found


def train(model, batch, steps, kind):
    optimizer, parameters = make_optimizer(model, "adamw", RATE), list(model.parameters())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step + 1, RATE, RATE / 10, 10, steps)
        inputs, targets = batch(step)                                                       # (16, T): 16 micro-batches of one row
        total = added_up([gradient(model, x[None], y[None]) for x, y in zip(inputs, targets)], PARTS, *kind)
        for p, g in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures = {}
    for seed in range(cfg.seeds):
        trained = lab.tiny(tok.vocab_size, seed)
        lab.train(trained, lab.windows(train_ids, seed=seed), cfg.steps(100))               # gradients of a model on its way
        for (name, n), error in errors(trained, lab.windows(train_ids, rows=1, seed=100 + seed)).items():
            figures.setdefault(f"error, {name}, {n}", []).append(error)
        for name, kind in KINDS.items():
            model = lab.tiny(tok.vocab_size, seed)
            train(model, lab.windows(train_ids, rows=PARTS, seed=seed), cfg.steps(STEPS), kind)
            figures.setdefault(f"loss, {name}", []).append(lab.val_loss(model, val_ids))
    last = {name: figures[f"error, {name}, {COUNTS[-1]}"] for name in KINDS}
    claims = {"fp32 adds up 256 micro-batches to one part in a million": max(last["fp32"]) < 1e-6,
              "in bf16 the error grows with the number of micro-batches": lab.higher(last["bf16"], figures["error, bf16, 4"]),
              "fp16 loses to rounding and not to underflow: a scale of 4,096 does not halve its error":
                  lab.mean(last["fp16, scaled"]) > 0.5 * lab.mean(last["fp16"]),
              "training with 16 micro-batches ends within 1 % of fp32 in every type":
                  all(abs(lab.mean(figures[f"loss, {name}"]) / lab.mean(figures["loss, fp32"]) - 1) < 0.01 for name in KINDS)}

    def draw(plt):
        for name in KINDS:
            plt.plot(COUNTS, [lab.mean(figures[f"error, {name}, {n}"]) for n in COUNTS], marker="o", label=name)
        plt.xscale("log", base=2)
        plt.yscale("log")
        plt.xticks(COUNTS, COUNTS)
        plt.xlabel("micro-batches added up")
        plt.ylabel("relative error of the sum")
        plt.legend()
    lab.finish(cfg, figures, claims, draw, within={name: 1 for name in figures if name.startswith("error")})


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
