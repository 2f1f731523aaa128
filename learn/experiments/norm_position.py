"""Where does the norm belong, before a sub-layer or after the sum, and does depth matter?

    python -m learn.experiments.norm_position              two minutes on one core

Pre-norm, x + f(norm(x)), leaves a path from the output to the first block on which nothing is scaled; post-norm, norm(x + f(x)), the
first transformer's, scales the gradient once more at every block. Both at two depths, with the initialisation of that time (Glorot &
Bengio 2010) and without warmup: Xiong et al. 2020, arXiv:2002.04745, figures 2 and 3. What one sees: with 2 blocks post-norm learns
faster, with 16 it falls behind. In a fresh model nothing vanishes or explodes; but pre-norm's later blocks get smaller gradients the
deeper the model is, post-norm's last block does not, and at this rate without warmup it gets stuck.
"""
import torch

from learn import lab
from nanollm.losses import cross_entropy
from nanollm.model import TransformerBlock

DEPTHS, STEPS, RATE = (2, 16), 150, 4e-3


class PostNormBlock(TransformerBlock):
    def forward(self, x, cos, sin, mask, cache=None):
        x = self.attention_norm(x + self.attention(x, cos, sin, mask, cache))
        return self.ffn_norm(x + self.feed_forward(x))


def model_of(kind, depth, vocab_size, seed):
    model = lab.tiny(vocab_size, seed, dim=32, n_heads=2, n_layers=depth)
    for block in model.layers:
        block.__class__ = PostNormBlock if kind == "post" else TransformerBlock
        for p in block.parameters():
            if p.dim() == 2:
                torch.nn.init.xavier_uniform_(p)
    return model


def gradients(model, inputs, targets):
    """Norm of the gradient of each block's down projection w2, in a fresh model."""
    loss, count, _ = cross_entropy(model(inputs), targets)
    (loss / count).backward()
    norms = [block.feed_forward.w2.weight.grad.norm().item() for block in model.layers]
    model.zero_grad()
    return norms


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, profile, curves = {}, {}, {}
    for depth in DEPTHS:
        for kind in ("pre", "post"):
            name = f"{kind}, {depth} blocks"
            for seed in range(cfg.seeds):
                model, batch = model_of(kind, depth, tok.vocab_size, seed), lab.windows(train_ids, rows=8, length=32, seed=seed)
                norms = gradients(model, *batch(10**6))
                losses = lab.train(model, batch, cfg.steps(STEPS), RATE, warmup=0)
                figures.setdefault(f"{name}, gradient of the first block", []).append(norms[0])
                figures.setdefault(f"{name}, gradient of the last block", []).append(norms[-1])
                figures.setdefault(f"{name}, loss", []).append(lab.val_loss(model, val_ids, length=32))
                profile.setdefault(name, norms)              # of the first seed
                curves.setdefault(name, losses)
    deep = DEPTHS[-1]
    last = {name: lab.mean(figures[f"{name}, gradient of the last block"]) for name in profile}
    figures["post over pre, last of 16 blocks"] = last[f"post, {deep} blocks"] / last[f"pre, {deep} blocks"]
    figures["post over pre, last of 2 blocks"] = last[f"post, {DEPTHS[0]} blocks"] / last[f"pre, {DEPTHS[0]} blocks"]
    claims = {"at depth the last block's gradient is more than twice as large with post-norm": figures["post over pre, last of 16 blocks"] > 2,
              "with 2 blocks it is not": figures["post over pre, last of 2 blocks"] < 2,
              "at depth post-norm ends above pre-norm": lab.higher(figures[f"post, {deep} blocks, loss"], figures[f"pre, {deep} blocks, loss"]),
              "with 2 blocks it does not": not lab.higher(figures[f"post, {DEPTHS[0]} blocks, loss"], figures[f"pre, {DEPTHS[0]} blocks, loss"])}

    def draw(plt):
        plt.figure(figsize=(8, 3.2))
        plt.subplot(1, 2, 1)
        for kind in ("pre", "post"):
            plt.semilogy(range(1, deep + 1), profile[f"{kind}, {deep} blocks"], label=f"{kind}-norm")
        plt.xlabel("block of a fresh model")
        plt.ylabel("gradient of w2, norm")
        plt.legend()
        plt.subplot(1, 2, 2)
        for name, losses in curves.items():
            plt.plot(losses, label=name, linewidth=0.8, linestyle=":" if "post" in name else "-")
        plt.xlabel("update")
        plt.ylabel("training loss, nats")
        plt.legend()
        plt.tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
