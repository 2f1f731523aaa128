"""One matrix for input and output, or two?

    python -m learn.experiments.tied_embeddings            a minute and a quarter on one core

The embedding turns an id into a vector, the output turns a vector into a score for each id. Both are (V, dim), and tied they are one
(Press & Wolf 2017, arXiv:1608.05859): a token's vector is then learnt from where it is read and from where it is predicted. Three
models: tied; untied, so a second matrix more with the same blocks; and tied again with the parameters of that matrix spent on wider
blocks. In a small model the matrix is a large share of all parameters, so the last is the fair comparison.

One sees the second matrix help. That the same parameters do more good in the blocks, as folklore has it for small models, is not to be seen:
three seeds do not tell the two apart. Tying is a way to spend less, no gain in itself.
"""
from learn import lab
from nanollm.model import parameter_count

IDS = 1024
KINDS = {"tied": {}, "untied": dict(tie_embeddings=False), "tied, wider": dict(dim=80, hidden_dim=204)}       # 64 wide where nothing is said
STEPS = 250


def main(cfg):
    train_ids, val_ids, tok = lab.corpus(IDS)
    figures, curves = {}, {}
    for name, shape in KINDS.items():
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed, **shape)
            losses = lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS))
            figures.setdefault(name, []).append(lab.val_loss(model, val_ids))
            curves.setdefault(name, losses)
        count = parameter_count(model)
        figures[f"{name}, parameters"] = count["total"]
        figures[f"{name}, vocabulary's share"] = (count["embedding"] + count["output"]) / count["total"]
    claims = {"untied, with a matrix more, is better than tied": lab.higher(figures["tied"], figures["untied"]),
              "the same parameters in wider blocks are better than a second matrix": lab.higher(figures["untied"], figures["tied, wider"])}
    lab.finish(cfg, figures, claims, lambda plt: lab.bars(plt, {name: figures[name] for name in KINDS}, "validation loss, nats a token"))


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
