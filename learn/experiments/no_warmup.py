"""What happens without warmup?

    python -m learn.experiments.no_warmup                  a minute and a half on one core

Adam divides by the root of a running mean of squares. After one update that mean knows one gradient, so every weight moves by the
whole learning rate whatever its gradient was (Adam's first step is lr * sign(g)), when the gradients of a fresh model are at
their most misleading. Warmup keeps the rate low until the mean knows more. Same model, data and peak rate, with and without.
"""
from learn import lab

RATES = (8e-3, 3.2e-2)
STEPS = 250


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, curves = {}, {}
    for rate in RATES:
        for warmup in (0, 25):
            name = f"{rate:g} {'warmup' if warmup else 'none'}"
            for seed in range(cfg.seeds):
                model = lab.tiny(tok.vocab_size, seed)
                losses = lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS), rate, warmup=warmup)
                figures.setdefault(name, []).append(lab.val_loss(model, val_ids))
                curves.setdefault(name, losses)              # of the first seed
    gap = {rate: lab.mean(figures[f"{rate:g} none"]) - lab.mean(figures[f"{rate:g} warmup"]) for rate in RATES}
    claims = {"at the highest rate the run without warmup ends higher": lab.higher(figures[f"{RATES[-1]:g} none"], figures[f"{RATES[-1]:g} warmup"]),
              "the gap grows with the rate": gap[RATES[-1]] > gap[RATES[0]]}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(losses, label=name, linewidth=0.8, linestyle="-" if "warmup" in name else ":")
        plt.xlabel("update")
        plt.ylabel("training loss, nats")
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
