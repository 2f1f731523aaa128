"""What is a test worth whose texts were in the training data?

    python -m learn.experiments.contaminated_eval          about a minute on one core

A leaked test measures memory instead of ability, and rewards whoever leaked it. Two models, one a little smaller than the
other, are trained twice: with 60 copies of each test text in the corpus (a popular exam lies in a crawl as often), and after
decontamination, which drops every document that shares half of a test text's 13-grams (after Brown et al. 2020, arXiv:2005.14165,
appendix C). They are judged by the loss on the test and on fresh texts of the same kind. One sees the small model
with the leak beat the large one without on the test, and lose on fresh text.
"""
from learn import lab
from nanollm.corpus.minhash import shingles

TEST, COPIES = 50, 60
MODELS = {"small": 56, "large": 64}                           # width
STEPS = 250


def decontaminated(docs, test, n=13):
    """The documents that do not hold half of the character n-grams of any test text."""
    held = {i: set(shingles(text, n)) for i, text in enumerate(test)}
    where = {}
    for i, grams in held.items():
        for gram in grams:
            where.setdefault(gram, []).append(i)
    kept = []
    for text in docs:
        shared = [i for gram in set(shingles(text, n)) for i in where.get(gram, [])]
        if not any(shared.count(i) >= len(held[i]) / 2 for i in set(shared)):
            kept.append(text)
    return kept


def main(cfg):
    tok = lab.tokenizer()
    test, fresh, clean = lab.texts(TEST, 3), lab.texts(300, 1), lab.texts(3000, 0)
    leaked = clean + test * COPIES
    repaired = decontaminated(leaked, test)
    corpora = {"leaked": lab.stream(leaked, tok), "decontaminated": lab.stream(repaired, tok)}
    figures = {"test texts found": 1 - len(set(repaired) & set(test)) / TEST,
               "clean texts lost": 1 - len(set(repaired) & set(clean)) / len(set(clean))}
    on = {"test": lab.stream(test, tok), "fresh": lab.stream(fresh, tok)}
    for size, dim in MODELS.items():
        for corpus, ids in corpora.items():
            for seed in range(cfg.seeds):
                model = lab.tiny(tok.vocab_size, seed, dim=dim)
                lab.train(model, lab.windows(ids, seed=seed), cfg.steps(STEPS))
                for part, held in on.items():
                    figures.setdefault(f"{size} {corpus}, {part}", []).append(lab.val_loss(model, held))
    kinds = [(size, corpus) for size in MODELS for corpus in corpora]
    gap = {(size, corpus): [a - b for a, b in zip(figures[f"{size} {corpus}, fresh"], figures[f"{size} {corpus}, test"])] for size, corpus in kinds}
    for (size, corpus), runs in gap.items():
        figures[f"{size} {corpus}, fresh - test"] = runs
    claims = {"every copied test text is found": figures["test texts found"] == 1,
              "with the leak the test looks easier than fresh text": lab.higher(gap["large", "leaked"], gap["large", "decontaminated"]),
              "the larger model gains more from the leak": lab.higher(gap["large", "leaked"], gap["small", "leaked"]),
              "on the test the small model with the leak beats the large one without": lab.higher(
                  figures["large decontaminated, test"], figures["small leaked, test"]),
              "on fresh text it does not": lab.higher(figures["small leaked, fresh"], figures["large decontaminated, fresh"])}

    def draw(plt):
        for i, part in enumerate(on):
            runs = [figures[f"{size} {corpus}, {part}"] for size, corpus in kinds]
            plt.bar([x + 0.4 * i for x in range(4)], [lab.mean(r) for r in runs], 0.38, yerr=[lab.spread(r) for r in runs], capsize=3,
                    label=f"on the {part} texts")
        plt.xticks([x + 0.2 for x in range(4)], [f"{size}\n{corpus}" for size, corpus in kinds])
        plt.ylabel("loss, nats a token")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
