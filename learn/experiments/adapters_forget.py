"""Do adapters forget less than full fine-tuning?

    python -m learn.experiments.adapters_forget            a minute and a half on one core

A base that knows English well and Chinese a little is tuned on Chinese only; how much worse does its English become? "LoRA learns
less and forgets less" (Biderman et al. 2024), and who learns less forgets less anyway. So it is not enough to compare the ends of two
runs: full fine-tuning is run at three learning rates, and for every run both losses are measured on the way. The fair question
is how high the English loss stands at the moment when the Chinese loss has come down to TARGET.

At one rate for both, full fine-tuning learns more and forgets far more. But a small rate cures that: with as much Chinese learnt, full
fine-tuning at 3e-4 and LoRA at 3e-3 have kept about as much English. Each forgets less at its smaller rate, and the smallest rate here
need not be the best, above all for LoRA, which has two: so the two do not differ beyond what the choice of rate makes.
"""
import copy

import torch

from learn import lab
from nanollm.peft import add_adapter

ARMS = {"full 1e-2": ("", 1e-2, {}), "full 1e-3": ("", 1e-3, {}), "full 3e-4": ("", 3e-4, {}),
        "lora 1e-2": ("lora", 1e-2, {"r": 32}), "lora 3e-3": ("lora", 3e-3, {"r": 32})}
BASE_STEPS, STEPS, EVERY = 500, 120, 20
CHINESE = 0.1                                            # share of the base's rows
TARGET = 1.1                                             # nats a token of Chinese


def crossing(points):
    """English loss where the Chinese loss first reaches TARGET, on the straight line between two measurements; nan if it never does."""
    for (zh0, en0), (zh1, en1) in zip(points, points[1:]):
        if zh1 <= TARGET < zh0:
            return en0 + (zh0 - TARGET) / (zh0 - zh1) * (en1 - en0)
    return float("nan")


def main(cfg):
    tok = lab.tokenizer()
    en, zh = (lab.windows(lab.stream(lab.texts(1500, 0, language), tok)) for language in ("en", "zh"))
    chinese = round(CHINESE * 16)                        # of 16 rows
    val = {language: lab.stream(lab.texts(300, 1, language), tok) for language in ("en", "zh")}
    base = lab.tiny(tok.vocab_size)
    lab.train(base, lambda step: tuple(torch.cat([a[chinese:], b[:chinese]]) for a, b in zip(en(step), zh(step))), cfg.steps(BASE_STEPS))
    new, before = lab.stream(lab.texts(1500, 2, "zh"), tok), [lab.val_loss(base, val[language], most=8000) for language in ("zh", "en")]
    figures, curves = {"base Chinese": before[0], "base English": before[1]}, {}
    for name, (method, rate, options) in ARMS.items():
        for seed in range(cfg.seeds):
            model, points = copy.deepcopy(base), [before]
            torch.manual_seed(seed)
            if method:
                add_adapter(model, method, **options)

            def each(step, model):
                if (step + 1) % EVERY == 0 or step + 1 == cfg.steps(STEPS):
                    points.append([lab.val_loss(model, val[language], most=8000) for language in ("zh", "en")])
                    model.train()
            lab.train(model, lab.windows(new, seed=seed), cfg.steps(STEPS), rate, warmup=10, each=each)
            for what, value in (("Chinese", points[-1][0]), ("English", points[-1][1]), (f"English at Chinese {TARGET:g}", crossing(points))):
                figures.setdefault(f"{name}, {what}", []).append(value)
            curves.setdefault(name, points)              # of the first seed
    end = lambda name, what: figures[f"{name}, {what}"]
    at = f"English at Chinese {TARGET:g}"
    claims = {"at the same rate LoRA forgets less than full fine-tuning": lab.higher(end("full 1e-2", "English"), end("lora 1e-2", "English")),
              "and learns less": lab.higher(end("lora 1e-2", "Chinese"), end("full 1e-2", "Chinese")),
              "at equal Chinese LoRA at 1e-2 has kept more English than full fine-tuning at 1e-2": lab.higher(end("full 1e-2", at), end("lora 1e-2", at)),
              "at equal Chinese LoRA at 3e-3 has kept more English than full fine-tuning at 3e-4": lab.higher(end("full 3e-4", at), end("lora 3e-3", at))}

    def draw(plt):
        for name, points in curves.items():
            plt.plot(*zip(*points), marker=".", label=name, linestyle="--" if name.startswith("full") else "-", linewidth=1)
        plt.scatter(*before, color="black", zorder=3)
        plt.annotate("base", before, xytext=(4, -8), textcoords="offset points")
        plt.yscale("log")
        plt.xlabel("loss on Chinese, nats (further left: more learnt)")
        plt.ylabel("loss on English, nats, log scale")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
