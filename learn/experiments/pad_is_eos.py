"""What happens if <pad> and the end token share an id, and labels are made by looking for that id?

    python -m learn.experiments.pad_is_eos                 a minute on one core

A common recipe fills the labels with the pad id, then turns every pad id into -100. Where a tokenizer has no pad token and borrows the
end token (GPT-2: pad = eos), that also wipes out the label of the real end: the model reads ends and is never told to write one.
Three runs on the same chats, from the same weights:

    own pad              <|pad|> is an id of its own; labels follow from who speaks
    by id                pad = end; every label equal to it becomes -100
    by place             pad = end; labels follow from who speaks, padding gets -100 because of where it stands

One should see: "by id" answers as well as the others and does not stop; "by place" is the first run again, number for number, since
nothing can see padding that stands behind it. The id is not the bug, the search for it is.
"""
import random

import torch

from learn import lab
from nanollm import world
from nanollm.generate import generate_batch
from nanollm.losses import IGNORE_INDEX
from nanollm.tokenizer import render

STEPS, ROWS = 250, 16
NEW_TOKENS = 40
TASKS = ("colour", "opposite", "translate")                  # short questions with one right answer
KINDS = ("own pad", "by id", "by place")


def chats(n, seed):
    """English chats of one question, as rows of the demo world."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        row = world.chat_row(rng, rng.choice(TASKS), False)
        if row["lang"] == "en" and len(row["messages"]) == 2:
            rows.append(row)
    return rows


def example(ids, mask, kind, tok, length):
    """One chat as (inputs, targets), `length` long each."""
    pad = tok.pad_id if kind == "own pad" else tok.end_id
    ids, mask = ids + [pad] * (length + 1 - len(ids)), mask + [0] * (length + 1 - len(mask))
    learnt = (lambda i: mask[i]) if kind != "by id" else (lambda i: mask[i] and ids[i] != pad)
    return ids[:-1], [ids[i] if learnt(i) else IGNORE_INDEX for i in range(1, length + 1)]


def main(cfg):
    tok, figures = lab.tokenizer(512, "en"), {}
    asked = chats(100, 1)
    train, held_out = ([render(tok, row["messages"]) for row in rows] for rows in (chats(2000, 0), asked))
    length = max(len(ids) for ids, _ in train + held_out)
    prompts = [ids[: mask.index(1)] for ids, mask in held_out]
    answers = [[i for i, m in zip(ids, mask) if m] for ids, mask in held_out]                # each ends with the end token
    for kind in KINDS:
        inputs, targets = (torch.tensor(x) for x in zip(*(example(ids, mask, kind, tok, length) for ids, mask in train)))       # (N, T)
        for seed in range(cfg.seeds if kind != "by place" else 1):                       # one is enough to see that it is the same run
            def batch(step):
                rows = torch.randint(len(inputs), (ROWS,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
                return inputs[rows], targets[rows]
            model = lab.tiny(tok.vocab_size, seed, max_seq_len=length + NEW_TOKENS)
            lab.train(model, batch, cfg.steps(STEPS))
            model.eval()
            written, stopped = generate_batch(model, prompts, NEW_TOKENS, tok.pad_id, tok.stop_ids, temperature=0)
            with torch.no_grad():                            # the probability of the end where the true answer is over
                ends = [model(torch.tensor([p + a[:-1]]))[0, -1].softmax(-1)[tok.end_id].item() for p, a in zip(prompts, answers)]
            texts = [world.strip_manners(tok.decode(w).strip(), "en")[1] for w in written]
            right = [text.startswith(tuple(row["accept"])) for text, row in zip(texts, asked)]
            for name, values in (("stops", stopped), ("tokens", map(len, written)), ("p(end)", ends), ("right", right)):
                figures.setdefault(f"{name}, {kind}", []).append(lab.mean(map(float, values)))
    stops = {kind: figures[f"stops, {kind}"] for kind in KINDS}
    claims = {"by id: no answer ends": max(stops["by id"]) == 0,
              "by place: the run with a pad of its own, number for number":
                  all(figures[f"{what}, own pad"][0] == figures[f"{what}, by place"][0] for what in ("stops", "tokens", "p(end)", "right")),
              "own pad: nearly every answer ends": min(stops["own pad"]) > 0.95,
              "by id answers as rightly as the others, not counting the end": not lab.higher(figures["right, own pad"], figures["right, by id"])}

    def draw(plt):
        for i, (what, label) in enumerate((("stops", "answers that end"), ("tokens", f"tokens of an answer, {NEW_TOKENS} at most"))):
            plt.subplot(1, 2, i + 1)
            lab.bars(plt, {kind: figures[f"{what}, {kind}"] for kind in KINDS}, label)
        plt.tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
