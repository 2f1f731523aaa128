"""Does a window of attention need the first tokens?

    python -m learn.experiments.sinks                      about a minute on one core

Softmax weights add up to 1, so a head with nothing to say must put its weight somewhere; large models put it on the first tokens and
break when a sliding window drops them (StreamingLLM, Xiao et al. 2023, arXiv:2309.17453). Here: how much attention a small model pays
to its first token, as a multiple of an even share; and its loss while it reads 256 tokens with 64 positions, a window of 60 with 4 sinks
against a window of 64 without. Trained twice: rows cut anywhere, as usual, and rows that all begin with <|endoftext|>. What one sees is
not what the paper saw: a model this small has no sinks, and the window alone costs next to nothing. That large models have them is the
paper's finding; whether size or training brings them is not measured here.
"""
import dataclasses

import torch
import torch.nn.functional as F

from learn import lab
from nanollm.model import ModelArgs, apply_rope
from nanollm.variants import build

T, LONG, STEPS = 64, 256, 260
WINDOWS = {"window": "sliding_window:window=64,sinks=0", "window + sinks": "sliding_window:window=60,sinks=4"}


def first(batch, eos_id):
    """The same rows, the first input token <|endoftext|> in each."""
    def marked(step):
        inputs, targets = batch(step)
        return torch.cat((torch.full_like(inputs[:, :1], eos_id), inputs[:, 1:]), 1), targets
    return marked


@torch.no_grad()
def on_first(model, inputs):
    """Mean attention that the last query pays to token 0, in the block where it is most, times T: 1 = no more than an even share."""
    x, shares = model.tok_embeddings(inputs), []
    cos, sin = model.rope_cos[:T], model.rope_sin[:T]
    for block in model.layers:
        q, k, _ = block.attention.qkv(block.attention_norm(x))                            # (B, H, T, D)
        q, k = apply_rope(q[:, :, -1:], cos[-1:], sin[-1:]), apply_rope(k, cos, sin)
        shares.append((q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).softmax(-1)[..., 0].mean().item())
        x = block(x, cos, sin, None)
    return max(shares) * T


@torch.no_grad()
def streamed(model, variant, inputs, targets):
    """Loss at each position, one token at a time through a cache that forgets: (LONG,)."""
    other = build(ModelArgs(**{**dataclasses.asdict(model.args), "variants": [variant]})).eval()
    other.load_state_dict(model.state_dict())
    cache = other.cache(other)
    return torch.stack([F.cross_entropy(other(inputs[:, t : t + 1], cache=cache)[:, 0], targets[:, t]) for t in range(inputs.size(1))])


def main(cfg):
    train_ids, val_ids, tok = lab.corpus()
    figures, curves = {}, {}
    for kind in ("cut anywhere", "marked first"):
        view = (lambda batch: first(batch, tok.eos_id)) if kind == "marked first" else (lambda batch: batch)
        for seed in range(cfg.seeds):
            model = lab.tiny(tok.vocab_size, seed)
            lab.train(model, view(lab.windows(train_ids, seed=seed)), cfg.steps(STEPS))
            inputs, targets = view(lab.windows(val_ids, 32, LONG))(0)
            figures.setdefault(f"{kind}, attention on the first token", []).append(on_first(model.eval(), inputs[:, :T]))
            for name, variant in WINDOWS.items():
                losses = streamed(model, variant, inputs, targets)
                figures.setdefault(f"{kind}, {name}, loss before", []).append(losses[16:T].mean().item())
                figures.setdefault(f"{kind}, {name}, loss beyond", []).append(losses[T:].mean().item())
                curves.setdefault(f"{kind}, {name}", losses)                              # of the first seed
    beyond = {kind: [b - a for a, b in zip(figures[f"{kind}, window + sinks, loss beyond"], figures[f"{kind}, window, loss beyond"])]
              for kind in ("cut anywhere", "marked first")}
    figures |= {f"{kind}, what sinks save beyond": gaps for kind, gaps in beyond.items()}
    first_share = max(lab.mean(figures[f"{kind}, attention on the first token"]) for kind in beyond)
    claims = {"this small model pays its first token less than twice an even share": first_share < 2,
              "a window that forgets it does not break: it costs less than 3 %": all(
                  lab.mean(gaps) < 0.03 * lab.mean(figures[f"{kind}, window + sinks, loss beyond"]) for kind, gaps in beyond.items()),
              "sinks save more where the first token was marked in training": lab.higher(beyond["marked first"], beyond["cut anywhere"])}

    def draw(plt):
        for name, losses in curves.items():
            plt.plot(losses.unfold(0, 16, 8).mean(-1), label=name, linewidth=1, linestyle="-" if "sinks" in name else ":",
                     color="#c44e52" if "marked" in name else "#4878a8")
        plt.axvline(T / 8, color="grey", linewidth=0.5)
        plt.xticks(range(0, LONG // 8 + 1, 8), range(0, LONG + 1, 64))
        plt.xlabel("position; from the line on the window forgets")
        plt.ylabel("loss, nats")
        plt.legend(fontsize=7)
    lab.finish(cfg, figures, claims, draw, within={f"{kind}, what sinks save beyond": 0.5 for kind in beyond})


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
