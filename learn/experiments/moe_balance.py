"""What happens to the experts without a balance loss?

    python -m learn.experiments.moe_balance                about a minute on one core

A gate sends each token to one of 8 feed-forwards (Switch: Fedus et al. 2021). The expert that is chosen learns, so it is chosen more:
without a second loss, balance * E * sum_i f_i P_i (eq. 4), some experts starve. The dense model beside it does the same work per token
with one feed-forward instead of eight. Counted on held-out text: how many experts are used, exp(entropy of their shares), and the loss.
What one sees: half of the experts starve without the second loss. But not what folklore promises: within 130 updates the dense model ends
lower, for each expert has learnt from an eighth of the tokens, and balance alone buys no loss yet.
"""
import torch

from learn import lab
from nanollm.losses import cross_entropy
from nanollm.model import flops_per_token, parameter_count
from nanollm.optim import get_lr, make_optimizer
from nanollm.variants.moe import MoE, add_balance

EXPERTS, STEPS, RATE = 8, 130, 4e-3
KINDS = {"dense": [], "no balance loss": [f"moe:n_experts={EXPERTS},top_k=1,balance=0"], "balance 0.01": [f"moe:n_experts={EXPERTS},top_k=1,balance=0.01"]}


def train(model, batch, steps):
    """lab.train with the balance loss added -> each expert's share in the first block, an update a row (steps, E)."""
    optimizer, shares = make_optimizer(model, "adamw", RATE), []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step + 1, RATE, RATE / 10, 20, steps)
        inputs, targets = batch(step)
        loss, count, _ = add_balance(model, *cross_entropy(model(inputs), targets))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shares += [m.use for m in model.layers[0].modules() if isinstance(m, MoE)]
    return torch.stack(shares) if shares else None


@torch.no_grad()
def used(model, inputs):
    """The number of experts in use, mean over the blocks: exp of the entropy of their shares, 8 when all are used alike."""
    model.eval()(inputs)
    use = torch.stack([m.use for m in model.modules() if isinstance(m, MoE)])               # (n_layers, E)
    return torch.special.entr(use).sum(-1).exp().mean().item()


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, shares = {}, {}
    look = lab.windows(val_ids, rows=128)(0)[0]
    for name, words in KINDS.items():
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed, variants=words)
            share = train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS))
            figures.setdefault(f"{name}, loss", []).append(lab.val_loss(model, val_ids))
            if share is not None:
                figures.setdefault(f"{name}, experts in use", []).append(used(model, look))
                shares.setdefault(name, share)               # of the first seed
        figures[f"{name}, parameters"] = parameter_count(model)["total"]
        figures[f"{name}, FLOPs a token"] = flops_per_token(model, 64)
    loss = {name: figures[f"{name}, loss"] for name in KINDS}
    in_use = {name: figures[f"{name}, experts in use"] for name in KINDS if name != "dense"}
    claims = {"without the balance loss fewer experts are in use": lab.higher(in_use["balance 0.01"], in_use["no balance loss"]),
              "the work a token is that of the dense model, to 3 %": figures["balance 0.01, FLOPs a token"] < 1.03 * figures["dense, FLOPs a token"],
              "in so short a run the experts, who share the tokens out, end above the dense model": lab.higher(loss["balance 0.01"], loss["dense"]),
              "balance does not yet show in the loss": not lab.higher(loss["no balance loss"], loss["balance 0.01"])}

    def draw(plt):
        for i, (name, share) in enumerate(shares.items()):
            plt.subplot(1, 2, i + 1)
            plt.stackplot(range(len(share)), share.T, linewidth=0.2, edgecolor="white")
            plt.title(name, fontsize=9)
            plt.xlabel("update")
            plt.ylabel("share of the tokens, by expert" if i == 0 else "")
            plt.ylim(0, 1)
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
