"""What happens without the 1/sqrt(d) of attention?

    python -m learn.experiments.no_scaling                 a minute on one core

The dot product of two random vectors of d numbers has variance d, so attention divides by sqrt(d) before the softmax (Vaswani et al.
2017, section 3.2.1). One listing of the notes multiplies instead. Shown twice: on random vectors, where the softmax then puts all its
weight on one key; and on a model of one head with d = 64, trained as it should be, without the factor, and with the factor upside down.
"""
import torch

from learn import lab
from nanollm.model import apply_rope

POWERS = {"divided": -0.5, "left out": 0.0, "multiplied": 0.5}        # scores = q k^T * d^power
STEPS, D = 280, 64


def with_power(model, power):
    """The model divides by sqrt(d) itself; queries that are larger by d^(power + 1/2) make that d^power."""
    for block in model.layers:
        def qkv(x, plain=block.attention.qkv):
            q, k, v = plain(x)
            return q * D ** (power + 0.5), k, v
        block.attention.qkv = qkv
    return model


def entropy(scores):
    """Mean entropy of softmax(scores) along the last dimension, nats."""
    log_p = scores.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1).mean().item()


@torch.no_grad()
def attention_entropy(model, inputs):
    """Of the last query of each row in the first block: ln 64 = 4.16 if it looks at all keys alike, 0 if at one."""
    block, T = model.layers[0], inputs.size(1)
    q, k, _ = block.attention.qkv(block.attention_norm(model.tok_embeddings(inputs)))
    q, k = (apply_rope(t, model.rope_cos[:T], model.rope_sin[:T]) for t in (q, k))                      # (B, 1, T, D)
    return entropy(q[:, :, -1:] @ k.transpose(-2, -1) / D**0.5)


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    q, k = torch.randn(2, 256, D, generator=torch.Generator().manual_seed(0))
    figures = {f"{name}, random vectors, entropy": entropy(q @ k.T * D**power) for name, power in POWERS.items()}
    curves, look = {}, lab.windows(val_ids, rows=64)(0)[0]
    for name, power in POWERS.items():
        for seed in range(cfg.seeds):
            model = with_power(lab.tiny(tok.vocab_size, seed, n_heads=1), power)
            figures.setdefault(f"{name}, fresh model, entropy", []).append(attention_entropy(model, look))
            losses = lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS))
            figures.setdefault(f"{name}, trained, entropy", []).append(attention_entropy(model, look))
            figures.setdefault(f"{name}, loss", []).append(lab.val_loss(model, val_ids))
            curves.setdefault(name, losses)                  # of the first seed
    claims = {"on random vectors the product upside down leaves less than a tenth of a nat": figures["multiplied, random vectors, entropy"] < 0.1,
              "the model with the factor upside down ends above the one that divides": lab.higher(figures["multiplied, loss"], figures["divided, loss"]),
              "without any factor it ends above, too": lab.higher(figures["left out, loss"], figures["divided, loss"])}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(losses, label=f"scores {name} by sqrt(d)" if name != "left out" else "no factor", linewidth=0.8)
        plt.xlabel("update")
        plt.ylabel("training loss, nats")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
