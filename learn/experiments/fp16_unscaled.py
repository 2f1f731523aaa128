"""fp16 without a loss scale: when do gradients vanish?

    python -m learn.experiments.fp16_unscaled              a minute and a quarter on one core

In fp16 the smallest number above zero is 2^-24 = 6e-8. What the backward pass carries is a gradient per token, and it is divided
by the number of tokens in an update: so a toy batch of 256 tokens proves nothing about a batch of half a million. Here a model
trains under fp16 autocast on 256 tokens an update, but its loss is divided as if they were one of 1, 64 or 2,048 micro-batches
(2,048: 524,288 tokens); before the update the fp32 gradients are multiplied back, so in exact numbers all runs would be one.
GradScaler (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2) multiplies the loss by 65,536 and lifts all gradients.

One sees whether bf16, and fp16 with a scale, can be told from fp32, and how much of the gradient is exactly zero without one.
"""
import torch

from learn import lab
from nanollm.dist import autocast
from nanollm.losses import cross_entropy
from nanollm.optim import get_lr, make_optimizer

STEPS, ROWS, RATE, WARMUP = 90, 4, 4e-3, 10
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# name -> type of the products, loss scale, micro-batches that an update is said to have
KINDS = {"fp32": (FP32, 1, 1), "bf16, 2048": (BF16, 1, 2048), "fp16 scaled, 2048": (FP16, 65536, 2048), "fp16, 1": (FP16, 1, 1), "fp16, 64": (FP16, 1, 64),
         "fp16, 2048": (FP16, 1, 2048)}


def train(model, batch, steps, compute, scale, parts):
    """-> (training losses, share of the gradient's numbers in the blocks' matrices that are exactly zero in the last update)."""
    optimizer, losses = make_optimizer(model, "adamw", RATE), []
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step + 1, RATE, RATE / 10, WARMUP, steps)
        inputs, targets = batch(step)
        with autocast(torch.device("cpu"), compute):
            loss, count, _ = cross_entropy(model(inputs), targets)
        scaler.scale(loss / count / parts).backward()
        scaler.unscale_(optimizer)
        for p in model.parameters():
            p.grad *= parts
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item() / count.item())
        zeros = [(p.grad == 0).float().mean().item() for name, p in model.named_parameters() if "layers." in name and p.dim() > 1]
        optimizer.zero_grad(set_to_none=True)
    return losses, lab.mean(zeros)


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, curves = {}, {}
    for name, (compute, scale, parts) in KINDS.items():
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed)
            losses, zeros = train(model, lab.windows(train_ids, ROWS, seed=seed), cfg.steps(STEPS), compute, scale, parts)
            figures.setdefault(name, []).append(lab.val_loss(model, val_ids))
            figures.setdefault(f"{name}, zeros", []).append(zeros)
            curves.setdefault(name, losses)
    near = lambda name: abs(lab.mean(figures[name]) / lab.mean(figures["fp32"]) - 1) < 0.02
    claims = {"bf16, and fp16 with a scale, end within 2 % of fp32": near("bf16, 2048") and near("fp16 scaled, 2048"),
              "without a scale, an update of 256 tokens ends within 2 % of fp32": near("fp16, 1"),
              "without a scale, an update of half a million tokens loses more than a tenth of the gradient's numbers": min(figures["fp16, 2048, zeros"]) > 0.1,
              "and ends higher than with one": lab.higher(figures["fp16, 2048"], figures["fp16 scaled, 2048"])}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(losses, label=name, linewidth=0.9, linestyle="--" if name in ("fp32", "bf16, 2048", "fp16 scaled, 2048") else "-")
        plt.xlabel("update")
        plt.ylabel("training loss, nats")
        plt.legend(title="products, micro-batches", ncols=2, loc="lower left")
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
