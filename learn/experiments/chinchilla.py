"""With compute for so many FLOPs: how large a model, how many tokens?

    python -m learn.experiments.chinchilla                 a minute and a half on one core

Training costs about C = 6 N D FLOPs (N parameters, D tokens). For a fixed C a small model sees many tokens and is too small
for them, a large one hardly begins to learn: the loss over N is a valley. Its floor moves to the right as C grows; Hoffmann et
al. 2022 (arXiv:2203.15556, section 3.2, "IsoFLOP profiles") found N and D to grow alike, about 20 tokens a parameter, on
web text. Here a valley each for two budgets, the second four times the first; a parabola over log N gives its floor. That the
ratio comes out near 20 is chance: it belongs to a text and a recipe (double ROWS and look again). One also sees the
smallest model still learn past 20 tokens a parameter.
"""
import math

import numpy as np

from learn import lab

ROWS = 8                                                      # few: with so little compute the updates are scarce, not the tokens
TOKENS = ROWS * 64                                            # an update
FIRST = 6 * 15_000 * 200 * TOKENS                             # FLOPs: 200 updates of 15,000 parameters
BUDGETS = {"C": FIRST, "4 C": 4 * FIRST}
WIDTHS = {"C": (8, 12, 16, 24, 32), "4 C": (8, 16, 24, 32, 48)}         # 2 layers, 2 heads


def main(cfg):
    cfg.seeds = min(cfg.seeds, 2)                             # each costs more than half a minute: two, not three
    train_ids, val_ids, tok = lab.corpus()
    figures, points = {}, {budget: [] for budget in BUDGETS}
    for budget, flops in BUDGETS.items():
        for dim in WIDTHS[budget]:
            for seed in range(cfg.seeds):
                model = lab.tiny(tok.vocab_size, seed, dim=dim, n_heads=2)
                n = sum(p.numel() for p in model.parameters())
                steps = cfg.steps(flops / (6 * n * TOKENS))
                lab.train(model, lab.windows(train_ids, ROWS, seed=seed), steps, 4e-3 * (64 / dim) ** 0.5, warmup=max(2, steps // 20))
                figures.setdefault(f"{budget}, N {n}", []).append(lab.val_loss(model, val_ids))
            points[budget].append((n, lab.mean(figures[f"{budget}, N {n}"])))
    floors = {}
    for budget, flops in BUDGETS.items():
        x, y = np.log([n for n, _ in points[budget]]), np.array([loss for _, loss in points[budget]])
        near = np.argsort(y)[:4]                              # the four lowest: a parabola holds near its floor only
        a, b, _ = np.polyfit(x[near], y[near], 2)
        floors[budget] = math.exp(min(-b / (2 * a), 50)) if a > 0 else float("nan")        # no valley: no floor
        figures[f"{budget}, best N"] = floors[budget]
        figures[f"{budget}, tokens a parameter"] = flops / 6 / floors[budget] ** 2
    figures["best N grows with C to the power"] = math.log(floors["4 C"] / floors["C"]) / math.log(4)
    least = points["C"][0][0]
    tokens = {budget: flops / 6 / least**2 for budget, flops in BUDGETS.items()}
    figures["smallest model, tokens a parameter at C"], figures["smallest model, tokens a parameter at 4 C"] = tokens.values()
    claims = {"each budget has a best size between the ends": all(points[b][0][0] < floors[b] < points[b][-1][0] for b in BUDGETS),
              "with more compute the best model is larger": floors["4 C"] > floors["C"],
              "with more compute the best model also sees more tokens": BUDGETS["4 C"] / floors["4 C"] > BUDGETS["C"] / floors["C"],
              "the smallest model goes on learning past 20 tokens a parameter": tokens["C"] > 20 and
              lab.higher(figures[f"C, N {least}"], figures[f"4 C, N {least}"])}

    def draw(plt):
        for budget, flops in BUDGETS.items():
            n = [n for n, _ in points[budget]]
            runs = [figures[f"{budget}, N {k}"] for k in n]
            line = plt.errorbar(n, [lab.mean(r) for r in runs], [lab.spread(r) for r in runs], marker="o", capsize=3, label=f"{flops:.1e} FLOPs")
            plt.axvline(floors[budget], color=line[0].get_color(), linestyle=":", linewidth=1)
            plt.annotate(f"{figures[f'{budget}, tokens a parameter']:.0f} tokens\na parameter", (floors[budget], max(loss for _, loss in points[budget])),
                         fontsize=7, va="top", xytext=(2, 0), textcoords="offset points")
        plt.xscale("log")
        plt.xticks([6e3, 1e4, 2e4, 4e4, 8e4], ["6 k", "10 k", "20 k", "40 k", "80 k"])
        plt.minorticks_off()
        plt.xlabel("parameters N")
        plt.ylabel("validation loss, nats")
        plt.legend(loc="lower left")
    lab.finish(cfg, figures, claims, draw, within={"C, best N": 0.5, "4 C, best N": 0.5, "C, tokens a parameter": 0.8, "4 C, tokens a parameter": 0.8,
                                                   "best N grows with C to the power": 0.8})


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
