"""What happens beyond the length that RoPE was trained on?

    python -m learn.experiments.rope_length                about a minute on one core

Positions are rotations; beyond the trained length the slow pairs reach angles that the model has never seen. A model trained on rows of
64 tokens reads rows of 256, as it is and with the frequencies squeezed by 4: linear (Chen et al. 2023, arXiv:2306.15595), ntk and yarn
(Peng et al. 2023, arXiv:2309.00071); no weight is changed. Then plain and linear are trained on for a few updates at 256.
"""
import dataclasses

import torch
import torch.nn.functional as F

from learn import lab
from nanollm.model import ModelArgs
from nanollm.variants import build

SHORT, LONG = 64, 256
STEPS, MORE = 500, 40
KINDS = {"plain": [], "linear": ["kind=linear"], "ntk": ["kind=ntk"], "yarn": ["kind=yarn"]}
EDGES = (0, 64, 128, 192, 256)


def stretched(model, words):
    """The trained weights with room for LONG tokens and another table of rotations."""
    variants = [f"rope_scaling:{words[0]},factor={LONG / SHORT},original={SHORT}"] if words else []
    other = build(ModelArgs(**{**dataclasses.asdict(model.args), "max_seq_len": LONG, "variants": variants}))
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def by_position(model, ids, rows=64):
    """Loss at each of the LONG positions, mean over the rows: (LONG,)."""
    model.eval()
    inputs, targets = lab.windows(ids, rows, LONG)(0)
    return F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none").mean(0)


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, curves = {}, {}
    for seed in range(cfg.seeds):
        model = lab.tiny(tok.vocab_size, seed, max_seq_len=SHORT)
        lab.train(model, lab.windows(train_ids, seed=seed), cfg.steps(STEPS))
        for name, words in KINDS.items():
            long = stretched(model, words)
            runs = {name: by_position(long, val_ids)}
            if name in ("plain", "linear"):
                lab.train(long, lab.windows(train_ids, 4, LONG, seed=seed + 100), cfg.steps(MORE), 1e-3, warmup=0)
                runs[f"{name}, {MORE} updates later"] = by_position(long, val_ids)
            for label, losses in runs.items():
                for a, b in zip(EDGES, EDGES[1:]):
                    figures.setdefault(f"{label}, {a}-{b - 1}", []).append(losses[a:b].mean().item())
                curves.setdefault(label, losses)             # of the first seed
    last = "192-255"
    claims = {"plain RoPE fails in the last quarter": lab.higher(figures[f"plain, {last}"], figures["plain, 0-63"]),
              "ntk and yarn fail less there": all(lab.higher(figures[f"plain, {last}"], figures[f"{k}, {last}"]) for k in ("ntk", "yarn")),
              "linear, untrained, is above plain at every length": all(
                  lab.higher(figures[f"linear, {a}-{b - 1}"], figures[f"plain, {a}-{b - 1}"]) for a, b in zip(EDGES, EDGES[1:])),
              "every scaling costs something within the old length": all(
                  lab.mean(figures[f"{k}, 0-63"]) > lab.mean(figures["plain, 0-63"]) for k in list(KINDS)[1:]),
              "a few updates at the new length mend plain RoPE in part": lab.higher(figures[f"plain, {last}"], figures[f"plain, {MORE} updates later, {last}"])}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(losses.unfold(0, 16, 8).mean(-1), label=name, linewidth=1, linestyle="--" if "later" in name else "-")
        plt.axvline(SHORT / 8, color="grey", linewidth=0.5)
        plt.xticks(range(0, LONG // 8 + 1, 8), range(0, LONG + 1, 64))
        plt.xlabel("position; trained up to the line")
        plt.ylabel("loss, nats")
        plt.legend(fontsize=7)
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
