"""Clean text is scarce: first, last or everywhere? And is clean text worth more than a larger model?

    python -m learn.experiments.anneal_data                a minute and a half on one core

MiniCPM (Hu et al. 2024, arXiv:2404.06395, section 5) lays its best data into the last phase of a WSD schedule, where the rate
falls and the weights settle. Here 30 % of the tokens are clean, the rest has a fifth of its tokens replaced by others, and the
clean part comes first, last (the phase of falling rate) or mixed in. The loss is that on clean text. Beside them: clean text
only, noised text only, and noised text only for a model of more than three times the parameters (Gunasekar et al. 2023,
arXiv:2306.11644: small models on good text rival larger ones).

Under WSD "last" means two things at once: read while the rate falls, and read most recently. These runs cannot tell which of them
helps (the same plans at a constant rate would); and in runs so short what was read last weighs much.
"""
import torch

from learn import lab

NOISE, CLEAN = 0.2, 0.3                                       # share of replaced tokens; share of clean text
STEPS = 140


def noised(ids, vocab_size, seed=0):
    """A fifth of the tokens replaced by any other ones."""
    g = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(len(ids), generator=g) < NOISE, torch.randint(vocab_size, (len(ids),), generator=g), ids)


def main(cfg):
    clean, val_ids, tok = lab.corpus()
    dirty = noised(clean, tok.vocab_size)
    steps = cfg.steps(STEPS)
    phase = round(CLEAN * steps)
    plans = {"clean last": lambda step: step >= steps - phase, "clean first": lambda step: step < phase,
             "clean everywhere": lambda step: int((step + 1) * CLEAN) > int(step * CLEAN),
             "all clean": lambda step: True, "all noised": lambda step: False, "all noised, larger model": lambda step: False}
    figures, curves = {}, {}
    for name, is_clean in plans.items():
        dim, rate = (128, 2e-3) if "larger" in name else (64, 4e-3)           # twice as wide, half the rate
        for seed in range(cfg.seeds):
            good, bad, losses = lab.windows(clean, seed=seed), lab.windows(dirty, seed=seed), []
            model = lab.tiny(tok.vocab_size, seed, dim=dim)

            def each(step, model):
                if seed == 0 and step % 20 == 19:
                    losses.append(lab.val_loss(model, val_ids, most=5000))
                    model.train()
            lab.train(model, lambda step: (good if is_clean(step) else bad)(step), steps, rate, schedule="wsd", each=each)
            figures.setdefault(name, []).append(lab.val_loss(model, val_ids))
            curves.setdefault(name, losses)
    claims = {"clean text last ends below clean text first": lab.higher(figures["clean first"], figures["clean last"]),
              "clean text last ends below clean text everywhere": lab.higher(figures["clean everywhere"], figures["clean last"]),
              "all clean ends below all noised": lab.higher(figures["all noised"], figures["all clean"]),
              "the small model on clean text beats the larger one on noised text": lab.higher(figures["all noised, larger model"], figures["all clean"])}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(range(20, 20 * len(losses) + 1, 20), losses, marker=".", linewidth=1, label=name, linestyle=":" if name.startswith("all") else "-")
        plt.axvline(steps - phase, color="grey", linewidth=0.5)
        plt.annotate("the rate falls", (steps - phase, plt.ylim()[0]), fontsize=7, va="bottom", xytext=(2, 2), textcoords="offset points")
        plt.xlabel("update")
        plt.ylabel("loss on clean text, nats")
        plt.legend(loc="upper right", fontsize=7)
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
