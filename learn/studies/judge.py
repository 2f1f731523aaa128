"""How many labelled rows does a judge of texts need, and what does pretraining buy it? Files as labels, cut into passages.

    python -m learn.studies.judge --input encyclopedia=wiki.txt web=c4.jsonl play=shakespeare.txt --init_from out/base

Each file is a label. Passages of the first two thirds of its documents are for training, of the rest for testing, so that no document
is on both sides. Arms: all weights of the pretrained body, the head alone (--freeze), and the same shape with random weights. The last
lines say how well the rules of nanollm/corpus/score.py rank the first two labels, beside the classifier. The rows stay in --out_dir.
"""
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import train_classify
from nanollm import checkpoint, classify, env
from nanollm.config import UserError, arg, run
from nanollm.corpus import io
from nanollm.corpus.score import rule_scores
from nanollm.variants import build


@dataclass
class Config:
    input: list = arg([], "LABEL=FILE for each label, at least two")
    init_from: str = arg("out/base", "the pretrained model")
    sizes: list = arg(["10", "25", "50", "100"], "rows a label to train on")
    test_rows: int = arg(100, "rows a label to test on", least=2)
    chars: int = arg(500, "longest passage", unit="characters", least=20)
    steps: int = arg(100, "updates of 16 rows, the same for every number of rows", unit="updates", least=11)
    seed: int = arg(0, "of the runs")
    out_dir: str = arg("out/judge", "rows, runs and results.json")


def passages(path, chars):
    """[[passage, …] of each document]: whole sentences or lines up to so many characters; a longer one is cut at a blank."""
    rows = (row for task in io.plan(io.find_files([path], exclude=os.devnull)[0]) for row in io.documents(task, lambda *why: None) if not row["drop_reason"])
    documents = []
    for row in rows:
        parts, text = [], row["text"].strip()
        while len(text) > chars:
            cut = max([m.end() for m in re.finditer(r"[.!?](?=\s)|[。！？\n]", text[:chars])], default=0) or text.rfind(" ", 0, chars) + 1 or chars
            parts, text = parts + [text[:cut].strip()], text[cut:].strip()
        documents.append([p for p in parts + [text] if len(p) >= min(chars // 5, 40)])
    return documents


def spread(documents, n):
    """n passages, as evenly from all documents as they allow: the first of each, the second of each, …"""
    deepest = max(map(len, documents), default=0)
    return [d[i] for i in range(deepest) for d in documents if i < len(d)][:n]


def auc(values, good):
    """The probability that a good text stands above a bad one, ties counted half."""
    pairs = [(a > b) + 0.5 * (a == b) for a, g in zip(values, good) if g for b, h in zip(values, good) if not h]
    return sum(pairs) / len(pairs)


def main(cfg):
    words, root = [word.partition("=") for word in cfg.input], Path(cfg.out_dir)
    if len(words) < 2 or not all(path for _, _, path in words):
        raise UserError("--input wants LABEL=FILE at least twice")
    sizes, parts = sorted(map(int, cfg.sizes)), {"train": [], "test": []}
    for label, _, path in words:
        documents = passages(path, cfg.chars)
        cut = max(1, 2 * len(documents) // 3)
        for name, own, n in (("train", documents[:cut], sizes[-1]), ("test", documents[cut:], cfg.test_rows)):
            rows = [{"text": text, "label": label} for text in spread(own, n)]
            if len(rows) < n:
                raise UserError(f"--input {label}: {len(rows)} passages to {name} on, {n} are wanted; give more text or lower --sizes or --test_rows")
            parts[name].append(rows)
    root.mkdir(parents=True, exist_ok=True)
    write = lambda path, rows: path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    test = [row for rows in parts["test"] for row in rows]
    write(root / "test.jsonl", test)
    lm, tok, _ = checkpoint.load(cfg.init_from, expect="lm")
    torch.manual_seed(cfg.seed)
    shutil.rmtree(root / "random", ignore_errors=True)
    checkpoint.save(root / "random", 0, build(lm.args), tok, "pretrain", None)
    arms, results = {"all weights": {}, "head alone": {"freeze": True, "learning_rate": 3e-3, "min_lr": 3e-4}, "random weights": {"init_from": str(root / "random")}}, {}
    for size in sizes:
        data = root / f"train_{size}.jsonl"
        write(data, [row for rows in parts["train"] for row in rows[:size]])
        for arm, changes in arms.items():
            out = root / f"{arm.replace(' ', '_')}_{size}"
            shutil.rmtree(out, ignore_errors=True)
            own = {"data": [str(data)], "val_data": [str(root / "test.jsonl")], "init_from": cfg.init_from, "out_dir": str(out), "max_steps": cfg.steps,
                   "eval_every": 10**6, "log_every": 10**6, "save_every": 10**6, "seed": cfg.seed, "device": "cpu"}
            train_classify.main(train_classify.Config(**own | changes))
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            last = [line for line in lines if "val/accuracy" in line][-1]
            results.setdefault(arm, {})[size] = {"accuracy": last["val/accuracy"], "macro_f1": last["val/macro_f1"]}
    print(f"\naccuracy on {len(test)} passages of other documents, {len(words)} labels\n\n| rows a label | {' | '.join(arms)} |\n|---|---|---|---|")
    for size in sizes:
        print(f"| {size} | " + " | ".join(f"{results[arm][size]['accuracy']:.3f}" for arm in arms) + " |")
    good, two = words[0][0], [row for row in test if row["label"] in (words[0][0], words[1][0])]
    model, tok, _ = checkpoint.load(root / f"all_weights_{sizes[-1]}", expect="classifier")
    p = classify.probabilities(model, tok, [row["text"] for row in two])[:, model.labels.index(good)].tolist()
    truth = [row["label"] == good for row in two]
    ranks = {"classifier": auc(p, truth), "rules": auc(rule_scores([row["text"] for row in two]).tolist(), truth)}
    print(f"\nAUC, {good} above {words[1][0]}: " + ", ".join(f"{name} {value:.3f}" for name, value in ranks.items()))
    (root / "results.json").write_text(json.dumps({"config": vars(cfg), **env.stamp(), "results": results, "auc": ranks}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
