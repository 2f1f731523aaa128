"""The pictures of the course (docs/course/), all made again by one command.

    python -m learn.pictures                               all, half a minute on one core; needs the demo run and matplotlib
    python -m learn.pictures rope schedules                these two
    python -m learn.pictures rope --out out/mine           names first, then options
    python -m learn.pictures --out docs/images/course      for who maintains the pages: these are the pages' own pictures

One function a picture: it computes with the project's own functions, draws, and returns the numbers that it drew, which
tests/test_pictures.py holds against the code. Those that look at the trained models say so and need `bash runs/speedrun.sh` once.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from learn import lab
from nanollm import checkpoint, evaluation, plan, quant, world
from nanollm.config import UserError, arg, run
from nanollm.corpus import minhash
from nanollm.data import PreferenceRows, collate, pack, read_rows
from nanollm.generate import sample
from nanollm.losses import cross_entropy
from nanollm.model import ModelArgs, apply_rope, causal_mask, rope_table
from nanollm.optim import get_lr
from nanollm.tokenizer import render

BLUE, ORANGE, GREEN, GREY = "#4878a8", "#e08840", "#5a9e5a", "#d8d8d8"


@dataclass
class Config:
    first = "names"
    names: list = arg([], "which pictures; none = all")
    demo: str = arg("out/demo", "the finished demo run (bash runs/speedrun.sh)")
    out: str = arg("out/pictures", "directory of the PNG files; the pages show those in docs/images/course")


def of_demo(demo, part):
    """demo/part. Raises UserError where the run has not been."""
    if not (Path(demo) / part).exists():
        raise UserError(f"{Path(demo) / part} is not there: `bash runs/speedrun.sh` makes the demo run once, in about 6 minutes; --demo names one elsewhere")
    return Path(demo) / part


def records(demo, stage, key):
    """(updates, values) of one metric in a stage's log."""
    lines = [json.loads(line) for line in of_demo(demo, f"{stage}/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return zip(*[(line["step"], line[key]) for line in lines if line.get(key) is not None])


def shown(tok, i):
    """A token as a label: spaces and line ends visible, control tokens by name."""
    names = {number: name for name, number in tok.control.items()}
    text = names.get(i, tok.token_bytes(i).decode("utf-8", "backslashreplace"))
    text = "".join(c if c.isascii() else f"U+{ord(c):X}" for c in text)                       # the font may have no Chinese
    return text.replace(" ", "·").replace("\n", "↵")


def chips(ax, x, y, words, colours, size=8):
    """Words as coloured boxes side by side, from x on in line y; a letter is 1 wide."""
    for word, colour in zip(words, colours):
        ax.text(x, y, word, family="monospace", fontsize=size, va="center", bbox=dict(boxstyle="square,pad=0.25", fc=colour, ec="white"))
        x += len(word) + 0.85
    return x


# ---------------------------------------------------------------------------------------------------- 1 the road


def road(plt, demo):
    """The curve of every stage of the demo run, and the share of the time that each took."""
    axes = plt.figure(figsize=(7.5, 4)).subplots(2, 3).flat
    floor = json.loads(of_demo(demo, "eval.json").read_text(encoding="utf-8"))["pretrain"]["entropy_floor"]
    panels = (("pretrain", "train/loss"), ("sft", "train/loss"), ("rm", "train/accuracy"), ("dpo", "train/margin"), ("ppo", "train/scores"))
    for ax, (stage, key) in zip(axes, panels):
        ax.plot(*records(demo, stage, key), color=BLUE, lw=0.9)
        ax.set(title=f"{stage}: {key.removeprefix('train/')}", xlabel="update")
        if stage == "pretrain":
            ax.axhline(floor, color=ORANGE, lw=1)
            ax.text(2800, floor + 0.7, "entropy floor", color=ORANGE, ha="right")
    seconds = {}
    for line in of_demo(demo, "stages.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        seconds[record["stage"]] = seconds.get(record["stage"], 0) + record["seconds"]
    axes[5].barh(list(seconds), list(seconds.values()), color=BLUE)
    axes[5].invert_yaxis()
    axes[5].set(title="time of each stage", xlabel="seconds")
    return seconds


# ---------------------------------------------------------------------------------------------------- 2 data


def lsh(plt, demo=None, pairs=300, n=200):
    """The chance that LSH looks at a pair, as the formula says and as counted on pairs of sets whose similarity is known."""
    ax, rng, found = plt.figure().subplots(), np.random.default_rng(0), {}
    for (bands, rows), colour in (((32, 8), BLUE), ((8, 32), ORANGE), ((64, 4), GREEN)):
        s = np.linspace(0, 1, 201)
        ax.plot(s, minhash.candidate_probability(s, bands, rows), color=colour, label=f"{bands} bands of {rows} rows")
        for similarity in np.arange(0.1, 1, 0.1):
            shared = round(2 * n * similarity / (1 + similarity))               # |A| = |B| = n: J = shared / (2 n - shared)
            numbers = rng.integers(0, 2**64, (pairs, 2 * n - shared), dtype=np.uint64)
            both = np.concatenate([numbers[:, :n], numbers[:, n - shared :]], 1)
            signatures = minhash.signatures(both.ravel(), np.arange(0, 2 * pairs * n + 1, n), bands * rows)
            same = minhash.band_hashes(signatures, bands, rows).reshape(pairs, 2, bands)
            found[bands, rows, shared / (2 * n - shared)] = p = (same[:, 0] == same[:, 1]).any(1).mean()
            ax.errorbar(shared / (2 * n - shared), p, (p * (1 - p) / pairs) ** 0.5, fmt="o", ms=3.5, color=colour)
    ax.set(xlabel="Jaccard similarity s of a pair", ylabel="share of pairs looked at", title=f"line: 1 - (1 - s^r)^b; dots: {pairs} pairs each")
    ax.legend(loc="upper left")
    return found


# ---------------------------------------------------------------------------------------------------- 3 tokenizer


def tokens(plt, demo=None, sizes=(320, 384, 512, 1024), text="Tina lives near the library. The turtle is called Daisy."):
    """One sentence as vocabularies of different sizes cut it."""
    ax, cut = plt.figure(figsize=(7.6, 1.9)).subplots(), {}
    for line, size in enumerate(sizes):
        tok = lab.tokenizer(size)
        ids = cut[size] = tok.encode(text)
        ax.text(-1, -line, f"{size} ids\n{len(ids)} tokens", ha="right", va="center")
        chips(ax, 0, -line, [shown(tok, i) for i in ids], [(BLUE + "55", ORANGE + "55", GREEN + "55")[k % 3] for k in range(len(ids))])
    ax.set(xlim=(-11, 101), ylim=(-len(sizes) + 0.4, 0.6))
    ax.axis("off")
    return cut


# ---------------------------------------------------------------------------------------------------- 4 model


def rope(plt, demo=None, head_dim=32):
    """Left: three pairs of numbers turn as the position grows. Right: a rotated query and key see only their distance."""
    figure = plt.figure(figsize=(8, 2.6))
    cos, sin = rope_table(head_dim, 256, 10000.0)
    for k, pair in enumerate((0, 2, 4)):
        ax = figure.add_subplot(1, 5, k + 1)
        x, y = cos[:8, pair], sin[:8, pair]                                                   # where (1, 0) has been turned to
        ax.scatter(x, y, c=range(8), cmap="viridis", s=14, zorder=3)
        for t in range(8):
            ax.plot([0, x[t]], [0, y[t]], color=GREY, lw=0.8)
            if pair < 4 or t in (0, 7):                      # the slow pair's positions lie too close to be labelled
                ax.annotate(t, (1.2 * x[t], 1.2 * y[t]), ha="center", va="center", fontsize=6)
        ax.axis("off")
        ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title=f"pair {pair}\n{10000 ** (-2 * pair / head_dim):.3g} rad a step")
    ax, ones = figure.add_subplot(1, 5, (4, 5)), torch.ones(1, 1, 256, head_dim)
    turned = apply_rope(ones, cos, sin)[0, 0]                                                 # (T, D)
    scores = {t: (turned[t : t + 100] @ turned[t]) / head_dim for t in (0, 100)}              # key at t, queries at t … t + 99
    ax.plot(scores[0], color=BLUE, lw=3, alpha=0.5, label="key at position 0")
    ax.plot(scores[100], color=ORANGE, lw=1, ls="--", label="key at position 100")
    ax.set(xlabel="distance of query and key", title="q · k / D, q = k = all ones")
    ax.legend()
    return scores


def attention_maps(model, ids):
    """Where each head looks: (layers, H, T, T), each row sums to 1. The forward pass of model.py, the probabilities kept."""
    T, maps = len(ids), []
    cos, sin = model.rope_cos[:T], model.rope_sin[:T]
    x = model.tok_embeddings(torch.tensor([ids]))                                             # (1, T, C)
    for layer in model.layers:
        q, k, _ = layer.attention.qkv(layer.attention_norm(x))                                # (1, H, T, D)
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).transpose(-2, -1) / q.size(-1) ** 0.5
        maps.append(scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf")).softmax(-1)[0])
        x = layer(x, cos, sin, None)
    return torch.stack(maps)


@torch.no_grad()
def attention(plt, demo, text="Reading: Meet Ben. Ben has a purple turtle called Daisy. What is the turtle called? The turtle is called Daisy."):
    """Two heads of the demo model on one text: the one that looks most at the earlier place of the word that comes next, and the one
    that looks most at the first token, where a head rests that has nothing to fetch (an attention sink)."""
    model, tok, _ = checkpoint.load(of_demo(demo, "pretrain"), "cpu", "lm")
    ids = [tok.eos_id] + tok.encode(text)
    maps, T = attention_maps(model, ids), len(ids) - 1
    comes = torch.tensor([[j <= i and ids[j] == ids[i + 1] for j in range(T)] for i in range(T)])        # the next word, further up
    copy = (maps[:, :, :T, :T] * comes).sum(-1)[..., comes.any(1)].mean(-1)                   # (layers, H)
    rest = maps[:, :, 1:, 0].mean(-1)
    axes = plt.figure(figsize=(8.6, 4.6)).subplots(1, 2)
    for ax, score, what in ((axes[0], copy, "on the word that comes next"), (axes[1], rest, "on the first token")):
        (layer, head), labels = divmod(int(score.argmax()), score.size(1)), [shown(tok, i).replace("<|endoftext|>", "<end>") for i in ids]
        ax.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(T + 1), labels, rotation=90, fontsize=6)
        ax.set_yticks(range(T + 1), labels, fontsize=6)
        ax.set_title(f"layer {layer + 1}, head {head + 1}: {score[layer, head]:.0%} {what}")
    axes[0].set_ylabel("this token looks at …")
    return maps, copy, rest


# ---------------------------------------------------------------------------------------------------- 5 the training loop


def packing(plt, demo=None, T=160, rows=8):
    """Documents packed into rows, and the mask of the first row: a token looks back inside its own document only."""
    tok = lab.tokenizer(512)
    texts = [tok.encode(text.split(". ")[0]) + [tok.eos_id] for text in lab.texts(400, 0, "en") if len(text) < 400]
    bins = pack([len(ids) for ids in texts], T)[:rows]
    pieces = [[(np.array(([tok.eos_id] + texts[i])[:-1]), np.array(texts[i])) for i in row] for row in bins]
    _, _, segments = collate(pieces, tok.eos_id, T)                                           # (B, T)
    mask = causal_mask(T, None, segments, segments)[0, 0] & (segments[0] > 0)[:, None]
    axes = plt.figure(figsize=(7.5, 2.8)).subplots(1, 2, width_ratios=(1.6, 1))
    axes[0].imshow(np.where(segments > 0, segments, np.nan), cmap="Pastel1", vmin=1, vmax=9, aspect="auto", interpolation="nearest")
    axes[0].set(xlabel="position in the row", ylabel="row", title="a colour a document; white: padding")
    axes[1].imshow(mask, cmap="Blues", interpolation="nearest")
    axes[1].set(xlabel="looked at", ylabel="token", title="mask of row 0")
    return segments, mask


def loss_kinds(plt, demo, documents=120):
    """The loss of each kind of token beside its floor, in the middle of the demo's pretraining and at its end."""
    texts = [doc.text for doc in world.documents(documents, 12345)]
    ax, kinds, found = plt.figure().subplots(), ("choice", "grammar", "copy"), {}
    for path in sorted(of_demo(demo, "pretrain").glob("step_*")):
        model, tok, meta = checkpoint.load(path, "cpu", "lm")
        found[meta["step"]] = evaluation.loss_by_kind(model, tok, texts, world.parse)
    for k, (step, losses) in enumerate(found.items()):
        bars = ax.bar([i + 0.3 * k for i in range(3)], [losses[kind]["loss"] for kind in kinds], 0.28, label=f"update {step:,}", color=(ORANGE, BLUE)[k % 2])
        ax.bar_label(bars, fmt="%.3g", fontsize=7)
    bars = ax.bar([i + 0.3 * len(found) for i in range(3)], [losses[kind]["floor"] for kind in kinds], 0.28, label="floor", color=GREY)
    ax.bar_label(bars, fmt="%.3g", fontsize=7)
    ax.set_xticks([i + 0.15 * len(found) for i in range(3)], ["choice: anything may follow", "grammar: only one can", "copy: stands further up"])
    ax.set_ylabel("loss, nats a token")
    ax.legend()
    return found


# ---------------------------------------------------------------------------------------------------- 6 optimiser and precision


def schedules(plt, demo=None, peak=1e-3, low=1e-4, warmup=50, steps=1000):
    """The four learning-rate schedules, and a cosine that is longer than the run."""
    ax, lines = plt.figure().subplots(), {}
    for name, decay in (("cosine", steps), ("cosine", round(1.25 * steps)), ("wsd", steps), ("linear", steps), ("constant", steps)):
        label = name if decay == steps else f"{name}, --decay_factor {decay / steps:g}"
        lines[label] = [get_lr(step + 1, peak, low, warmup, decay, name) for step in range(steps)]
        ax.plot(lines[label], label=label, lw=1.3, ls="--" if decay != steps else "-")
    ax.set(xlabel="update", ylabel="learning rate", ylim=(0, 1.08 * peak), title=f"peak {peak:g}, min_lr {low:g}, warmup {warmup}")
    ax.legend(loc="lower left")
    return lines


def fp16_range(plt, demo=None, scale=2**16, steps=60, update=2**19):
    """The sizes of a small model's gradients at its logits, beside what fp16 can hold, without and with a loss scale. The loss is a mean
    over all tokens of the update, here half a million as in real pretraining: each gradient is that much smaller."""
    ids, _, tok = lab.corpus(512)
    model, batch = lab.tiny(512), lab.windows(ids)
    lab.train(model, batch, steps)
    inputs, targets = batch(steps)
    logits = model(inputs)
    loss, _, _ = cross_entropy(logits, targets)
    gradient = torch.autograd.grad(loss / update, logits)[0].abs().flatten()                  # (B * T * V,) |p - y| / update
    axes, lost = plt.figure(figsize=(7, 3)).subplots(1, 2, sharey=True), {}
    for ax, factor in zip(axes, (1, scale)):
        lost[factor] = ((factor * gradient).half() == 0).float().mean().item()
        ax.hist((factor * gradient).log2().clamp(-45), 60, color=BLUE, weights=np.full(len(gradient), 100 / len(gradient)))
        for left, right, colour, word in ((-46, -25, "#f4c4b4", "becomes 0"), (-25, -14, "#f8e8b8", "coarse"), (-14, 16, "#d0e8d0", "exact to 11 bits")):
            ax.axvspan(left, right, color=colour, zorder=0)
            ax.text((left + right) / 2, 0.97, word, transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=7)
        ax.set(xlim=(-46, 16), xlabel="log2 |gradient|", title=f"loss × {factor:,}: {lost[factor]:.1%} are lost")
    axes[0].set(ylabel="% of the gradients", ylim=(0, 1.2 * axes[0].get_ylim()[1]))
    return lost


# ---------------------------------------------------------------------------------------------------- 7 many processes


SHAPES = {"demo, 0.6 M": (ModelArgs(128, 2, 4, vocab_size=1280), 4), "20 M": (ModelArgs(384, 8, 8, vocab_size=6400, max_seq_len=512), 16),
          "92 M": (ModelArgs(512, 8, 8, vocab_size=64793, max_seq_len=512, tie_embeddings=False), 16),
          "124 M": (ModelArgs(768, 12, 12, vocab_size=50304, max_seq_len=1024), 16), "7 B": (ModelArgs(4096, 32, 32, vocab_size=32000, max_seq_len=4096), 1)}


def memory(plt, demo=None):
    """What fills the memory in training, for several shapes, without and with activation checkpointing (bf16 compute, fp32 weights)."""
    ax, found = plt.figure(figsize=(7, 3.2)).subplots(), {}
    for name, (args, rows) in SHAPES.items():
        for again in (False, True):
            found[name + (", checkpointing" if again else f", {rows} x {args.max_seq_len}")] = plan.memory(args, rows, torch.bfloat16, checkpointing=again)
    left = np.zeros(len(found))
    for part, colour in zip(("weights", "gradients", "optimizer", "activations", "working"), (BLUE, ORANGE, GREEN, "#b088c0", GREY)):
        share = np.array([100 * m[part] / m["total"] for m in found.values()])
        ax.barh(list(found), share, left=left, color=colour, label=part)
        left += share
    for line, m in enumerate(found.values()):
        ax.text(101, line, f"{m['total'] / 1e9:.3g} GB", va="center")
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="% of the total")
    ax.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1), frameon=False)
    return found


def zero(plt, demo=None, gpus=8):
    """Bytes that one process keeps of weights, gradients and optimizer state: DDP and the three stages of ZeRO."""
    args, ways = SHAPES["7 B"][0], {"DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3 = FSDP": "fsdp"}
    axes = plt.figure(figsize=(7.5, 2.9)).subplots(1, 2)
    found = {name: plan.memory(args, 1, torch.bfloat16, parallel=how, gpus=gpus) for name, how in ways.items()}
    bottom = np.zeros(len(ways))
    for part, colour in zip(("weights", "gradients", "optimizer"), (BLUE, ORANGE, GREEN)):
        gb = np.array([m[part] / 1e9 for m in found.values()])
        axes[0].bar(list(found), gb, bottom=bottom, color=colour, label=part)
        bottom += gb
    for at, gb in enumerate(bottom):
        axes[0].text(at, gb + 1, f"{gb:.3g}", ha="center")
    axes[0].set(ylabel="GB on each GPU", title=f"{plan.show(plan.parameter_count(plan.on_meta(args))['total'])} parameters on {gpus} GPUs")
    axes[0].tick_params(axis="x", rotation=12)
    axes[0].legend()
    many = (1, 2, 4, 8, 16, 32, 64)
    for name, how in ways.items():
        kept = [plan.memory(args, 1, torch.bfloat16, parallel=how, gpus=n) for n in many]
        axes[1].plot(many, [(m["weights"] + m["gradients"] + m["optimizer"]) / 1e9 for m in kept], marker="o", ms=3, label=name)
    axes[1].set(xscale="log", yscale="log", xlabel="GPUs", ylabel="GB on each", title="the same, by the number of GPUs")
    axes[1].set_xticks(many, many)
    axes[1].minorticks_off()
    axes[1].legend()
    return found


# ---------------------------------------------------------------------------------------------------- 8 SFT


def chat_mask(plt, demo=None):
    """A chat as the model sees it: green tokens bear loss, grey ones are only read."""
    tok = lab.tokenizer(1024)
    chat = [{"role": "user", "content": "What is the opposite of new?"}, {"role": "assistant", "content": "The opposite of new is old."},
            {"role": "user", "content": "And the opposite of hot?"}, {"role": "assistant", "content": "The opposite of hot is cold."}]
    ids, mask = render(tok, chat)
    ax, lines = plt.figure(figsize=(6.2, 1.7)).subplots(), [[]]
    for i, learnt in zip(ids, mask):
        lines[-1].append((shown(tok, i).replace("<|", "<").replace("|>", ">"), GREEN + "88" if learnt else GREY))
        if tok.token_bytes(i) == b"\n" and lines[-1][-2][0] == "<im_end>":
            lines.append([])
    for y, line in enumerate(lines):
        chips(ax, 0, -y, *zip(*line)) if line else None
    ax.set(xlim=(-1, 91), ylim=(-len(lines) + 1.4, 0.6), title=f"{sum(mask)} of {len(mask)} tokens bear loss (green)")
    ax.axis("off")
    return ids, mask


# ---------------------------------------------------------------------------------------------------- 9 reward model and DPO


@torch.no_grad()
def margins(plt, demo):
    """The demo reward model's scores of held-out pairs, and how far apart the two of a pair are."""
    model, tok, _ = checkpoint.load(of_demo(demo, "rm"), "cpu", "reward")
    rows = read_rows([of_demo(demo, "raw/prefs_val.jsonl")])
    pairs = PreferenceRows(rows, tok, model.args.max_seq_len)
    ids, lengths, *_ = pairs.scored_batch(range(len(pairs)))
    chosen, rejected = evaluation.score_table(model(ids), lengths)[:, :2].T                   # (n,) each
    wrong = torch.tensor([row["why"] == "wrong" for _, row in rows])
    margin = chosen - rejected
    axes = plt.figure(figsize=(7.5, 2.9)).subplots(1, 2)
    axes[0].hist([chosen, rejected], 30, histtype="stepfilled", alpha=0.6, color=[GREEN, ORANGE], label=["chosen", "rejected"])
    axes[0].set(xlabel="score", ylabel="answers", title="scores of the answers")
    axes[1].hist([margin[wrong], margin[~wrong]], 30, stacked=True, color=[ORANGE, BLUE], label=["rejected is wrong", "rejected is short, rude, …"])
    axes[1].axvline(0, color="black", lw=0.8)
    axes[1].set(xlabel="chosen - rejected", ylabel="pairs", title=f"margins: {(margin > 0).float().mean():.1%} above 0")
    for ax in axes:
        ax.set_ylim(0, 1.35 * ax.get_ylim()[1])
        ax.legend(loc="upper right")
    return margin, wrong


# ---------------------------------------------------------------------------------------------------- 10 PPO


def kl_reward(plt, demo):
    """The path of the demo's PPO run: how much reward it has bought with how much KL."""
    (steps, kl), (_, score) = records(demo, "ppo", "train/kl"), records(demo, "ppo", "train/scores")
    (_, val_kl), (_, val_score) = records(demo, "ppo", "val/kl"), records(demo, "ppo", "val/scores")
    figure = plt.figure(figsize=(5.5, 3.2))
    ax = figure.subplots()
    ax.plot(kl, score, color=GREY, lw=1)
    points = ax.scatter(kl, score, c=steps, cmap="viridis", s=22, zorder=3, label="rollouts in training")
    ax.plot(val_kl, val_score, "s", ms=6, mfc="none", color=ORANGE, label="held-out prompts")
    figure.colorbar(points, label="update")
    ax.set(xlabel="KL from the SFT model, nats an answer", ylabel="score of the reward model")
    ax.legend(loc="lower right")
    return kl, score


# ---------------------------------------------------------------------------------------------------- 11 quantisation


def nf4(plt, demo=None, n=2**16):
    """The 16 levels of NF4 and of 4-bit integers on normal weights, in blocks of 64, each divided by its largest."""
    weights = torch.randn(n, generator=torch.Generator().manual_seed(0))
    scaled = (weights.view(-1, 64) / weights.view(-1, 64).abs().amax(1, keepdim=True)).flatten()
    error = {"NF4": (quant.dequantize_nf4(quant.quantize_nf4(weights)) - weights).pow(2).mean().item(),
             "int4": (quant.dequantize_int(quant.quantize_int(weights, 4, 64)) - weights).pow(2).mean().item()}
    levels = {"NF4": quant.NF4_LEVELS, "int4": torch.arange(-7, 8) / 7}
    axes = plt.figure(figsize=(7, 3)).subplots(2, 1, sharex=True)
    for ax, (name, values) in zip(axes, levels.items()):
        ax.hist(scaled, 121, color=GREY)
        ax.vlines(values, 0, ax.get_ylim()[1], color=BLUE, lw=1.2)
        ax.set(yticks=[], title=f"{name}: {len(values)} levels, mean squared error {error[name]:.4f}")
    axes[1].set_xlabel("weight / largest weight of its block")
    return error


# ---------------------------------------------------------------------------------------------------- 12 generation


@torch.no_grad()
def filters(plt, demo, text="This is Kate. Kate has a brown bird called", draws=4000):
    """What temperature, top-k, top-p and min-p leave of one distribution of the demo model: shares among real draws."""
    model, tok, _ = checkpoint.load(of_demo(demo, "pretrain"), "cpu", "lm")
    logits = model(torch.tensor([[tok.eos_id] + tok.encode(text)]))[:, -1]                    # (1, V)
    probs, order = logits.softmax(-1)[0].sort(descending=True)
    ways = {"temperature 2": {"temperature": 2.0}, "top_k 5": {"top_k": 5}, "top_p 0.7": {"top_p": 0.7}, "min_p 0.5": {"min_p": 0.5}}
    axes, shares = plt.figure(figsize=(8, 2.9)).subplots(1, 4, sharey=True), {}
    for ax, (name, options) in zip(axes, ways.items()):
        drawn = sample(logits.expand(draws, -1), generator=torch.Generator().manual_seed(0), **options)
        shares[name] = torch.bincount(drawn, minlength=logits.size(-1))[order] / draws        # (V,) in the order of the bars
        ax.bar(range(14), probs[:14], color=GREY, width=0.9, label="model")
        ax.bar(range(14), shares[name][:14], color=BLUE, width=0.5, label="drawn")
        ax.set_xticks(range(14), [shown(tok, int(i)) for i in order[:14]], rotation=90, fontsize=6)
        ax.set_title(f"{name}: {1 - shares[name][:14].sum():.0%} elsewhere")
    axes[0].set_ylabel("probability")
    axes[0].legend()
    return probs, shares


PICTURES = {function.__name__: function for function in (road, lsh, tokens, rope, attention, packing, loss_kinds, schedules, fp16_range, memory, zero,
                                                         chat_mask, margins, kl_reward, nf4, filters)}


def main(cfg):
    unknown = [name for name in cfg.names if name not in PICTURES]
    if unknown:
        raise UserError(f"there is no picture {unknown[0]}; there are {' '.join(PICTURES)}")
    try:
        import matplotlib
    except ImportError:
        raise UserError('the pictures need matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "figure.figsize": (6, 3.2), "figure.constrained_layout.use": True,
                         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    missing = {}
    for name in cfg.names or PICTURES:
        try:
            PICTURES[name](plt, cfg.demo)
        except UserError as e:                               # the others need no demo run: draw them first
            missing[name] = e
            continue
        path = Path(cfg.out) / f"{name}.png"
        plt.savefig(path, dpi=90, bbox_inches="tight")
        plt.close("all")
        print(f"{path}  {path.stat().st_size / 1000:.0f} KB", flush=True)
    if missing:
        raise UserError(f"not drawn: {' '.join(missing)}. {next(iter(missing.values()))}")


if __name__ == "__main__":
    run(main, Config, __doc__)
