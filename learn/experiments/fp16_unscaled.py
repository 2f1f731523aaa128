"""fp16 without a loss scale: when do gradients vanish?

    python -m learn.experiments.fp16_unscaled              a minute and a quarter on one core

In fp16 the smallest number above zero is 2^-24 = 6e-8. What the backward pass carries is a gradient per token, and it is divided
by the number of tokens in an update: so a toy batch of 1,024 tokens proves nothing about a batch of half a million. Here a model
trains under fp16 autocast on 1,024 tokens an update, but its loss is divided as if they were one of 1, 32 or 512 micro-batches
(512: 524,288 tokens, GPT-3's batch for its smallest model); before the update the fp32 gradients are multiplied back, so in exact numbers
all runs would be one. GradScaler (Micikevicius et al. 2018, section 3.2) multiplies the loss by 65,536 and needs no such luck.

One sees whether bf16, and fp16 with a scale, can be told from fp32; how much of the gradient is exactly zero without a scale; and what
happens where the weights themselves are fp16.
"""
import torch

from learn import lab
from nanollm.dist import autocast
from nanollm.losses import cross_entropy
from nanollm.optim import get_lr, make_optimizer

STEPS, RATE, WARMUP = 80, 4e-3, 10
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# name -> type of the products, type of the weights, loss scale, micro-batches that an update is said to have
KINDS = {"fp32": (FP32, FP32, 1, 1), "bf16, 512": (BF16, FP32, 1, 512), "fp16 scaled, 512": (FP16, FP32, 65536, 512), "fp16, 1": (FP16, FP32, 1, 1),
         "fp16, 32": (FP16, FP32, 1, 32), "fp16, 512": (FP16, FP32, 1, 512), "fp16 weights": (FP32, FP16, 1, 1)}


def train(model, batch, steps, compute, scale, parts):
    """-> (training losses, share of the gradient's numbers that are exactly zero in the last update; embedding left out)."""
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
    for name, (compute, weights, scale, parts) in KINDS.items():
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed).to(weights)
            losses, zeros = train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS), compute, scale, parts)
            figures.setdefault(name, []).append(lab.val_loss(model.float(), val_ids))
            figures.setdefault(f"{name}, zeros", []).append(zeros)
            curves.setdefault(name, losses)
    near = lambda name: abs(lab.mean(figures[name]) / lab.mean(figures["fp32"]) - 1) < 0.02
    claims = {"bf16, and fp16 with a scale, end within 2 % of fp32": near("bf16, 512") and near("fp16 scaled, 512"),
              "without a scale, a batch of 1,024 tokens ends within 2 % of fp32": near("fp16, 1"),
              "without a scale, a batch of half a million tokens ends higher": lab.higher(figures["fp16, 512"], figures["fp32"]) and not near("fp16, 512"),
              "fp16 weights end higher": lab.higher(figures["fp16 weights"], figures["fp32"]) and not near("fp16 weights")}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(losses, label=name, linewidth=0.9, linestyle="--" if name in ("fp32", "bf16, 512", "fp16 scaled, 512") else "-")
        plt.xlabel("update")
        plt.ylabel("training loss, nats")
        plt.legend(title="products, micro-batches", ncols=2)
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
