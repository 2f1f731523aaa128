"""What do copies in the training text do?

    python -m learn.experiments.duplicates                 about a minute on one core

A text that stands in the corpus many times is learnt by heart (Carlini et al. 2022, arXiv:2202.07646: the more copies, the more
is recited), and the updates spent on it are missing elsewhere (Lee et al. 2021, arXiv:2107.06499). Eight texts each are laid into
the corpus 1, 4, 16, 64 and 256 times, so that half of it are copies; a second model reads the same corpus with one copy of each and
fresh texts in place of the rest: as many texts. Some texts are easier than others, so each group is compared with itself: its loss
under the model with copies minus that under the model without. Each seed plants texts of its own, so the error bars hold both.
"""
import torch

from learn import lab

COPIES = (1, 4, 16, 64, 256)
EACH = 8                                                      # texts for every number of copies
STEPS = 400
NAMES = {k: f"text with {k} {'copy' if k == 1 else 'copies'}" for k in COPIES}


def main(cfg):
    tok = lab.tokenizer()
    n, val_ids, figures = EACH * len(COPIES), lab.stream(lab.texts(300, 1), tok), {}
    rest = EACH * sum(COPIES) - n                             # copies beyond the first
    fresh, more = (lab.stream(texts, tok) for texts in (lab.texts(2600 + rest)[:2600], lab.texts(2600 + rest)[2600:]))
    for seed in range(cfg.seeds):
        planted = lab.texts(n * cfg.seeds, 2)[seed * n : (seed + 1) * n]
        groups = {k: lab.stream(planted[i * EACH : (i + 1) * EACH], tok) for i, k in enumerate(COPIES)}
        corpora = {"copies": [fresh, *(ids.repeat(k) for k, ids in groups.items())], "no copies": [fresh, more, *groups.values()]}
        for name, parts in corpora.items():
            model = lab.tiny(tok.vocab_size, seed)
            lab.train(model, lab.windows(torch.cat(parts), seed=seed), cfg.steps(STEPS))
            figures.setdefault(f"fresh text, {name}", []).append(lab.val_loss(model, val_ids))
            for k, ids in groups.items():
                figures.setdefault(NAMES[k] if name == "copies" else f"{NAMES[k]}, read once", []).append(lab.val_loss(model, ids))
    difference = lambda a, b: [x - y for x, y in zip(figures[a], figures[b])]
    changes = {k: difference(NAMES[k], f"{NAMES[k]}, read once") for k in COPIES}
    figures |= {f"{NAMES[k]}, change": change for k, change in changes.items()}
    figures["fresh text, change"] = difference("fresh text, copies", "fresh text, no copies")
    figures["share of copies"] = rest / (2600 + rest + n)
    heart = {k: [a - b for a, b in zip(change, figures["fresh text, change"])] for k, change in changes.items()}
    figures |= {f"{NAMES[k]}, change beyond fresh text": runs for k, runs in heart.items()}
    once, many, none = figures[f"{NAMES[256]}, read once"], figures[NAMES[256]], [0.0] * cfg.seeds
    claims = {"without copies the same updates give a better model of fresh text": lab.higher(figures["fresh text, change"], none),
              "a text with one copy suffers as fresh text does, within noise": not lab.higher(none, heart[1]) and not lab.higher(heart[1], none),
              "from 16 copies on a text is known by heart beyond noise": all(lab.higher(none, heart[k]) for k in (16, 64, 256)),
              "from 64 copies on its loss is below that of reading it once": all(lab.higher(none, changes[k]) for k in (64, 256)),
              "with 256 copies it is under half of that": lab.mean(many) < lab.mean(once) / 2}

    def draw(plt):
        for runs, label, style in ((changes, "its loss, against reading it once", "o-"), (heart, "the same, minus the change of fresh text", "s:")):
            plt.errorbar(COPIES, [lab.mean(r) for r in runs.values()], [lab.spread(r) for r in runs.values()], fmt=style, capsize=3, label=label)
        plt.axhline(lab.mean(figures["fresh text, change"]), color="black", linestyle="--", linewidth=1, label="fresh text")
        plt.axhline(0, color="grey", linewidth=0.5)
        plt.xscale("log", base=2)
        plt.xticks(COPIES, COPIES)
        plt.xlabel("copies of a text in the corpus")
        plt.ylabel("change by the copies, nats a token")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
