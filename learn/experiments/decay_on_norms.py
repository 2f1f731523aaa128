"""What if weight decay pulls on the norms, too?

    python -m learn.experiments.decay_on_norms             a minute and a half on one core

make_optimizer decays matrices and embeddings and spares everything with one dimension: a gain of RMSNorm says by how much a channel
is stretched, and 0 is no sensible prior for that (1 would be). Decoupled decay (Loshchilov & Hutter 2019, algorithm 2) multiplies a
decayed weight by 1 - lr * decay at every update, whatever the gradient says. Same runs with decay on the matrices, on everything
and on nothing; a decay of 1 in place of the usual 0.1, so that a short run shows it.

So strong a decay hurts wherever it pulls: the loss is lowest without any, higher with decay on the matrices, highest with decay on
everything. The run says what decay does to the gains, not that decay helps.
"""
import torch

from learn import lab
from nanollm.optim import make_optimizer

DECAY = 1.0
STEPS = 300
KINDS = ("matrices", "everything", "nothing")


def optimizer_of(kind, model, rate):
    optimizer = make_optimizer(model, "adamw", rate, weight_decay=DECAY if kind != "nothing" else 0.0)
    if kind == "everything":
        for group in optimizer.param_groups:
            group["weight_decay"] = DECAY
    return optimizer


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, gains = {}, {}
    for kind in KINDS:
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed)
            lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS), optimizer=optimizer_of(kind, model, 4e-3))
            gain = torch.cat([p.detach() for p in model.parameters() if p.dim() == 1])         # all gains of all norms; they begin at 1
            figures.setdefault(kind, []).append(lab.val_loss(model, val_ids))
            figures.setdefault(f"{kind} gain", []).append(gain.mean().item())
            gains.setdefault(kind, gain)                      # of the first seed
    claims = {"decay on everything leaves smaller gains": lab.higher(figures["matrices gain"], figures["everything gain"]),
              "decay on everything ends at a higher loss": lab.higher(figures["everything"], figures["matrices"]),
              "no decay at all ends lowest: so strong a one hurts on the matrices, too": lab.higher(figures["matrices"], figures["nothing"])}

    def draw(plt):
        for kind, gain in gains.items():
            plt.hist(gain.numpy(), bins=40, histtype="step", label=f"decay on {kind}")
        plt.xlabel("gains of the norms after training")
        plt.ylabel("how many")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
