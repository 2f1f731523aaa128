"""What happens if the documents are not shuffled?

    python -m learn.experiments.no_shuffle                 about a minute on one core

A gradient step trusts that its batch looks like the whole corpus. Crawled data comes sorted: all of one source, then all of the
next. Here the same documents are read once, in the order of their kind (English first, then Chinese) or shuffled, with
the same model, schedule and number of updates. One sees the loss jump at each change of kind and the model forget what it read
first. Against expectation the kind read last is learnt worse, too: it had few updates, at a rate that had come down,
and nothing learnt in time from its neighbours.
"""
import random

from learn import lab
from nanollm import world

DOCS = 1800
ROWS, LENGTH = 16, 64


def main(cfg):
    tok = lab.tokenizer()
    generator = world.documents(10**9, 0)
    docs = sorted((next(generator) for _ in range(DOCS)), key=lambda doc: (doc.kind.endswith("zh"), doc.kind))
    sides = {"first kind": docs[0].kind, "last kind": docs[-1].kind}
    fresh = world.documents(10**9, 1)
    val = [next(fresh) for _ in range(600)]
    val_ids = {side: lab.stream([doc.text for doc in val if doc.kind == kind], tok) for side, kind in sides.items()}
    val_ids["all kinds"] = lab.stream([doc.text for doc in val[:300]], tok)
    figures, curves = {}, {}
    for order in ("sorted", "shuffled"):
        for seed in range(cfg.seeds):
            texts = [doc.text for doc in docs]
            if order == "shuffled":
                random.Random(seed).shuffle(texts)
            ids = lab.stream(texts, tok)
            n = (len(ids) - 1) // (ROWS * LENGTH)             # updates: each token is read once
            inputs, targets = (part[: n * ROWS * LENGTH].view(n, ROWS, LENGTH) for part in (ids[:-1], ids[1:]))
            model = lab.tiny(tok.vocab_size, seed)
            losses = lab.train(model, lambda step: (inputs[step], targets[step]), cfg.steps(n))
            curves.setdefault(order, losses)
            for side, part in val_ids.items():
                figures.setdefault(f"{order}, {side}", []).append(lab.val_loss(model, part))
    claims = {"shuffled ends lower on all kinds": lab.higher(figures["sorted, all kinds"], figures["shuffled, all kinds"]),
              "sorted, the kind read first is lost": lab.higher(figures["sorted, first kind"], figures["shuffled, first kind"]),
              "sorted, even the kind read last is learnt worse": lab.higher(figures["sorted, last kind"], figures["shuffled, last kind"])}

    def draw(plt):
        left, right = plt.gcf().subplots(1, 2)
        for order, losses in curves.items():
            left.plot(losses, label=order, linewidth=0.8)
        left.set_xlabel("update")
        left.set_ylabel("training loss, nats")
        left.legend()
        for i, order in enumerate(("sorted", "shuffled")):
            runs = [figures[f"{order}, {side}"] for side in val_ids]
            right.bar([x + 0.4 * i for x in range(3)], [lab.mean(r) for r in runs], 0.38, yerr=[lab.spread(r) for r in runs], capsize=2, label=order)
        right.set_xticks([x + 0.2 for x in range(3)], list(val_ids))
        right.set_ylabel("validation loss, nats")
        right.legend()
        plt.tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
