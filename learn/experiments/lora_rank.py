"""What do LoRA's rank r and its alpha do?

    python -m learn.experiments.lora_rank                  a minute and a half on one core

A base that has read little Chinese is tuned on Chinese only, with W frozen and an update (alpha / r) B A beside it (Hu et al. 2021,
eq. 3). The rank bounds what the update can be: at most r directions a matrix. alpha only multiplies it, so where the rank changes,
alpha = 4 r keeps the scale alpha / r at 4; where alpha changes, the rank stays 4. One sees whether more rank comes nearer to full
fine-tuning, and how far the weights have moved, |change of W|, after the same number of updates.

More rank helps each time, and full fine-tuning is still better. It also moves the weights further at the same scale; but rank 4 with
alpha 64 has moved them about as far as rank 16 and is hardly better for it: what helps are the directions.

A larger alpha moves the weights further, but far less than in proportion: 64 times the alpha moves them some five times as far.
"""
import copy

import torch

from learn import lab
from nanollm.peft import TARGETS, add_adapter

RANKS, ALPHAS = (1, 4, 16), (1.0, 8.0, 64.0)             # alpha is 4 r where the rank changes, the rank 4 where alpha changes
RATE = 1e-2                                              # the best of 1e-3, 3e-3, 1e-2, 3e-2, for full fine-tuning and for rank 4 alike
BASE_STEPS, STEPS = 500, 100
CHINESE = 0.1                                            # share of the base's rows


def matrices(model):
    """{name: W with the adapter's update in it} of all matrices that LoRA may adapt."""
    found = {n: m for n, m in model.named_modules() if n.split(".")[-1] in TARGETS}
    return {n: m.merged_weight() if hasattr(m, "merged_weight") else m.weight.detach() for n, m in found.items()}


def moved(model, base):
    """|change of W| / |W| over all adapted matrices, Frobenius norms."""
    now, before = matrices(model), matrices(base)
    return (sum((now[n] - before[n]).norm() ** 2 for n in now) / sum(w.norm() ** 2 for w in before.values())).sqrt().item()


def pretrained(cfg, tok, length=64, rows=16):
    """The base: 90 % English rows, 10 % Chinese ones, so that all embeddings have been learnt."""
    en, zh = (lab.windows(lab.stream(lab.texts(1500, 0, language), tok), rows, length) for language in ("en", "zh"))
    chinese = round(CHINESE * rows)

    def batch(step):
        return tuple(torch.cat([a[chinese:], b[:chinese]]) for a, b in zip(en(step), zh(step)))
    model = lab.tiny(tok.vocab_size)
    lab.train(model, batch, cfg.steps(BASE_STEPS))
    return model


def main(cfg):
    tok = lab.tokenizer()
    base, zh, val = pretrained(cfg, tok), lab.stream(lab.texts(1500, 2, "zh"), tok), lab.stream(lab.texts(300, 1, "zh"), tok)
    arms = {**{f"r {r}": dict(r=r, alpha=4.0 * r) for r in RANKS}, "full": None, **{f"alpha {a:g}": dict(r=4, alpha=a) for a in ALPHAS}}
    figures = {"before": lab.val_loss(base, val)}
    for name, options in arms.items():
        for seed in range(cfg.seeds):
            model = copy.deepcopy(base)
            torch.manual_seed(seed)
            if options:
                add_adapter(model, "lora", **options)
            lab.train(model, lab.windows(zh, seed=seed), cfg.steps(STEPS), RATE, warmup=10)
            figures.setdefault(name, []).append(lab.val_loss(model, val))
            figures.setdefault(f"{name} moved", []).append(moved(model, base))
    low, middle, high = (f"r {r}" for r in RANKS)
    claims = {f"rank {RANKS[1]} ends lower than rank {RANKS[0]}": lab.higher(figures[low], figures[middle]),
              f"rank {RANKS[2]} ends lower than rank {RANKS[1]}": lab.higher(figures[middle], figures[high]),
              f"full fine-tuning ends lower than rank {RANKS[2]}": lab.higher(figures[high], figures["full"]),
              "the larger alpha, the further the weights move": all(lab.higher(figures[f"alpha {b:g} moved"], figures[f"alpha {a:g} moved"])
                                                                    for a, b in zip(ALPHAS, ALPHAS[1:])),
              f"at alpha {ALPHAS[2]:g} they have moved {ALPHAS[2] / ALPHAS[0]:g} times as far as at alpha {ALPHAS[0]:g}, within a fifth":
                  0.8 < lab.mean(figures[f"alpha {ALPHAS[2]:g} moved"]) / lab.mean(figures[f"alpha {ALPHAS[0]:g} moved"]) * ALPHAS[0] / ALPHAS[2] < 1.2}

    def draw(plt):
        left, right = plt.gcf().subplots(1, 2)
        plt.sca(left)
        lab.bars(plt, {name: figures[name] for name in arms if not name.startswith("alpha")}, "loss on Chinese, nats")
        for name, marker in (("r 1", "o"), ("r 4", "s"), ("r 16", "^"), ("full", "*"), *((f"alpha {a:g}", "x") for a in ALPHAS)):
            right.scatter(figures[f"{name} moved"], figures[name], marker=marker, label=name)
        right.set_xlabel("|change of W| / |W|")
        right.set_ylabel("loss on Chinese, nats")
        right.legend(fontsize=7)
        plt.gcf().tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
