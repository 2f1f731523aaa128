"""How much domain text may continued pretraining hold before the model forgets?

    python -m learn.experiments.domain_share               about a minute on one core

Gradients on the new domain move weights that the old text needs, and nothing pulls them back unless old text is replayed
(Ibrahim et al. 2024, arXiv:2403.08763: a few percent suffice). A model that has learnt stories and reports (general) goes on with
lessons and facts (domain: sums, translations, opposites) in five shares; the rest of each update is general text; one more model
learns the domain from scratch. One sees the domain learnt even at a small share, and the general text lost when none is left.
The threshold is not universal: change SHARES, STEPS and RATE and look again.
"""
import torch

from learn import lab
from nanollm import world

SHARES = (0.0, 0.15, 0.5, 0.85, 1.0)
FIRST, STEPS, RATE = 200, 100, 2e-3
ROWS = 20                                                     # 15 % of 20 rows are 3


def split(seed, n):
    """(general, domain): the texts among n documents."""
    documents = world.documents(10**9, seed)
    docs = [next(documents) for _ in range(n)]
    domain = [doc.text for doc in docs if doc.kind.startswith(("lesson", "facts"))]
    return [doc.text for doc in docs if not doc.kind.startswith(("lesson", "facts"))], domain


def mixed(general, domain, share, seed):
    """batch(step): `share` of the rows from the domain."""
    k = round(share * ROWS)
    parts = [lab.windows(ids, rows, seed=seed) for ids, rows in ((domain, k), (general, ROWS - k)) if rows]

    def batch(step):
        inputs, targets = zip(*(part(step) for part in parts))
        return torch.cat(inputs), torch.cat(targets)
    return batch


def main(cfg):
    tok = lab.tokenizer()
    general, domain = (lab.stream(texts, tok) for texts in split(0, 3000))
    val = dict(zip(("general", "domain"), (lab.stream(texts, tok) for texts in split(1, 400))))
    figures = {}
    for seed in range(cfg.seeds):
        model = lab.tiny(tok.vocab_size, seed)
        lab.train(model, mixed(general, domain, 0.0, seed), cfg.steps(FIRST))
        scratch = lab.tiny(tok.vocab_size, seed + 10)         # domain text only, at twice the rate: it has more to learn
        lab.train(scratch, mixed(general, domain, 1.0, seed + 100), cfg.steps(STEPS))
        figures.setdefault("from scratch, domain", []).append(lab.val_loss(scratch, val["domain"]))
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        for part, ids in val.items():
            figures.setdefault(f"before, {part}", []).append(lab.val_loss(model, ids))
        for share in SHARES:
            model.load_state_dict(before)
            lab.train(model, mixed(general, domain, share, seed + 100), cfg.steps(STEPS), RATE)
            for part, ids in val.items():
                figures.setdefault(f"{share:.0%} domain, {part}", []).append(lab.val_loss(model, ids))
    loss = {(share, part): figures[f"{share:.0%} domain, {part}"] for share in SHARES for part in val}
    claims = {"what was learnt before helps: from scratch the domain's loss ends higher": lab.higher(figures["from scratch, domain"], loss[1.0, "domain"]),
              "without replay the general loss rises above where it was": lab.higher(loss[1.0, "general"], figures["before, general"]),
              "the larger the domain's share, the higher the general loss": all(
                  lab.mean(loss[a, "general"]) < lab.mean(loss[b, "general"]) for a, b in zip(SHARES, SHARES[1:])),
              "at 15 % the general loss is no higher than before": not lab.higher(loss[0.15, "general"], figures["before, general"]),
              "at 50 % the general loss is no higher than before": not lab.higher(loss[0.5, "general"], figures["before, general"]),
              "15 % already take over half of what 100 % take off the domain's loss": lab.mean(loss[0.0, "domain"]) - lab.mean(loss[0.15, "domain"]) >
              (lab.mean(loss[0.0, "domain"]) - lab.mean(loss[1.0, "domain"])) / 2}

    def draw(plt):
        for part, colour in (("general", "#4878a8"), ("domain", "#c06030")):
            runs = [loss[share, part] for share in SHARES]
            plt.errorbar([100 * s for s in SHARES], [lab.mean(r) for r in runs], [lab.spread(r) for r in runs], marker="o", capsize=3, color=colour, label=part)
        plt.axhline(lab.mean(figures["before, general"]), color="#4878a8", linestyle=":", linewidth=1, label="general, before")
        plt.xlabel("domain text in continued pretraining, %")
        plt.ylabel("validation loss, nats")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
