"""How large should the vocabulary be?

    python -m learn.experiments.vocab_size                 a minute and a half on one core

A larger vocabulary writes the same text in fewer tokens, so a step is cheaper in the blocks; but its embedding and its output
grow with it. The same text goes to every model: rows of the same 340 bytes, however many tokens that makes. Losses per token cannot
be compared, since a token of 512 ids says less than one of 4,096; bits per byte can (nats a token * tokens / bytes / ln 2). Last
row: 4,096 ids again, in a model so narrow that all its parameters are as many as those of 512 ids.

One sees the loss per token rise with the vocabulary while bits per byte are best in the middle: a note that blames its loss of 3.2 on
a small vocabulary has it backwards, a smaller one makes that number smaller. 4,096 ids scatter most from seed to seed (most of them are
rare), and what they gain with wide blocks they lose in narrow ones.
"""
import math
import time

from learn import lab
from nanollm import world
from nanollm.model import parameter_count

SIZES = (512, 1024, 2048, 4096)
ROWS, ROW_BYTES = 8, 340
STEPS = 200


def floor():
    """Bits per byte of the validation text's own probability: no model can be better in the long run."""
    docs = list(world.documents(300, 1))
    return sum(doc.nll for doc in docs) / math.log(2) / sum(len(doc.text.encode("utf-8")) for doc in docs)


def main(cfg):
    kinds = [(f"{size:,} ids", size, {}) for size in SIZES] + [("4,096 ids, narrow", 4096, dict(dim=28, n_heads=2))]
    figures, bytes_of_val = {}, sum(len(text.encode("utf-8")) for text in lab.texts(300, 1))
    for name, size, shape in kinds:
        train_ids, val_ids, tok = lab.corpus(size)
        length = round(ROW_BYTES / (bytes_of_val / len(val_ids)))                  # tokens in 340 bytes
        for seed in range(cfg.seeds):
            model, began = lab.tiny(tok.vocab_size, seed, max_seq_len=length, **shape), time.process_time()
            lab.train(model, lab.windows(train_ids, ROWS, length, seed), cfg.steps(STEPS))
            seconds = (time.process_time() - began) / cfg.steps(STEPS)
            loss = lab.val_loss(model, val_ids, length, most=10**9)                # nats a token
            for what, x in {"nats a token": loss, "bits a byte": loss * len(val_ids) / bytes_of_val / math.log(2), "ms an update": 1000 * seconds}.items():
                figures.setdefault(f"{name}, {what}", []).append(x)
        count = parameter_count(model)
        figures[f"{name}, parameters"] = count["total"]
        figures[f"{name}, vocabulary's share"] = count["embedding"] / count["total"]
        figures[f"{name}, bytes a token"] = bytes_of_val / len(val_ids)
    figures["floor, bits a byte"] = floor()
    small, middle, large, narrow = ([figures[f"{name}, {what}"] for what in ("nats a token", "bits a byte")]
                                    for name in ("512 ids", "1,024 ids", "4,096 ids", "4,096 ids, narrow"))
    claims = {"loss per token is lowest with the smallest vocabulary": lab.higher(middle[0], small[0]) and lab.higher(large[0], small[0]),
              "bits per byte say otherwise: 1,024 ids are better than 512": lab.higher(small[1], middle[1]),
              "narrow blocks pay for a large vocabulary: 4,096 ids are worse in them than in wide ones": lab.higher(narrow[1], large[1]),
              "with as many parameters in all, 4,096 ids are worse than 512": lab.higher(narrow[1], small[1])}

    def draw(plt):
        left, names = plt.gca(), [name for name, _, _ in kinds]
        for ax, what in ((left, "nats a token"), (left.twinx(), "bits a byte")):
            runs = [figures[f"{name}, {what}"] for name in names]
            colour = "#4878a8" if ax is left else "#c05020"
            ax.errorbar(range(len(SIZES)), [lab.mean(r) for r in runs[:-1]], [lab.spread(r) for r in runs[:-1]], marker="o", capsize=3, color=colour)
            ax.errorbar(len(SIZES), lab.mean(runs[-1]), lab.spread(runs[-1]), marker="s", capsize=3, color=colour)
            ax.set_ylabel(what, color=colour)
            ax.spines["right"].set_visible(True)
        left.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    lab.finish(cfg, figures, claims, draw, within={name: 9 for name in figures if "ms an update" in name})


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
