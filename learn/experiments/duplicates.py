"""What do copies in the training text do?

    python -m learn.experiments.duplicates                 about a minute on one core

A text that stands in the corpus many times is learnt by heart (Carlini et al. 2022, arXiv:2202.07646: the more copies, the more
is recited), and the updates spent on it are missing elsewhere (Lee et al. 2021, arXiv:2107.06499). Eight texts each are laid into
the corpus 1, 4, 16, 64 and 256 times, so that half of it are copies; a second model reads the same corpus with one copy of each and
fresh texts in place of the rest: as many tokens. One sees the loss on a copied text fall with its copies, far below that on
a fresh text: the model recites; and the model without copies is the better one on fresh text.
"""
from learn import lab

COPIES = (1, 4, 16, 64, 256)
EACH = 8                                                      # texts for every number of copies
STEPS = 400


def main(cfg):
    tok = lab.tokenizer()
    planted = {k: lab.texts(EACH * len(COPIES), 2)[i * EACH : (i + 1) * EACH] for i, k in enumerate(COPIES)}
    copies = [text for k, texts in planted.items() for text in texts for _ in range(k)]
    fresh = lab.texts(2600 + len(copies), 0)
    once = [text for texts in planted.values() for text in texts]
    corpora = {"copies": fresh[:2600] + copies, "no copies": fresh[: 2600 + len(copies) - len(once)] + once}
    val_ids = lab.stream(lab.texts(300, 1), tok)
    figures = {}
    for name, docs in corpora.items():
        ids = lab.stream(docs, tok)
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed)
            lab.train(model, lab.windows(ids, seed=seed), cfg.steps(STEPS))
            figures.setdefault(f"fresh text, {name}", []).append(lab.val_loss(model, val_ids))
            if name == "copies":
                for k, texts in planted.items():
                    figures.setdefault(f"text with {k} {'copy' if k == 1 else 'copies'}", []).append(lab.val_loss(model, lab.stream(texts, tok)))
    figures["share of copies"] = 1 - (len(fresh[:2600]) + len(once)) / len(corpora["copies"])
    many, unseen = figures[f"text with {COPIES[-1]} copies"], figures["fresh text, copies"]
    claims = {f"a text with {COPIES[-1]} copies is known by heart: its loss is under half of that on fresh text": lab.mean(many) < lab.mean(unseen) / 2,
              f"{COPIES[-2]} copies lie between": lab.higher(unseen, figures[f"text with {COPIES[-2]} copies"]) and
              lab.higher(figures[f"text with {COPIES[-2]} copies"], many),
              "without copies the same updates give a better model of fresh text": lab.higher(unseen, figures["fresh text, no copies"])}

    def draw(plt):
        runs = [figures[f"text with {k} {'copy' if k == 1 else 'copies'}"] for k in COPIES]
        plt.errorbar(COPIES, [lab.mean(r) for r in runs], [lab.spread(r) for r in runs], marker="o", capsize=3, label="the copied texts")
        for name, style in (("copies", "--"), ("no copies", ":")):
            plt.axhline(lab.mean(figures[f"fresh text, {name}"]), color="black", linestyle=style, linewidth=1, label=f"fresh text, corpus with {name}")
        plt.xscale("log", base=2)
        plt.xticks(COPIES, COPIES)
        plt.xlabel("copies of a text in the corpus")
        plt.ylabel("loss, nats a token")
        plt.ylim(0)
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
