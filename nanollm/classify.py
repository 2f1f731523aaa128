"""Rows with labels, what is measured on them, and a classifier as a judge of a corpus (`prepare_data.py score --classifier`).

    {"text": "…", "label": "good"}                                            sequence
    {"tokens": ["Anna", "likes", "Ben"], "labels": ["B-PER", "O", "B-PER"]}   token
    {"context": "…", "question": "…", "answer": "…", "answer_start": 17}      answer (answer_start: in characters, may be missing; SQuAD's
                                                                              {"answers": {"text": […], "answer_start": […]}} too)
"""
import json
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch

from nanollm import checkpoint
from nanollm.config import UserError
from nanollm.corpus import columns
from nanollm.data import collate, report_bad, split_rows
from nanollm.heads import BEGINS, ENDS, decide
from nanollm.losses import IGNORE_INDEX
from nanollm.variants import mark_prefix

HAN = re.compile(r"[\u3400-\u9fff]")


# ----------------------------------------------------------------------------------------------------------------
# Rows


def task_of(row):
    """The task that a row's keys belong to, or ""."""
    keys = {"sequence": {"text", "label"}, "token": {"tokens", "labels"}, "answer": {"context", "question"}}
    return next((task for task, needed in keys.items() if needed <= row.keys()), "")


def label_of(value):
    if not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"a label is a word or a whole number, not {value!r}")
    return str(value)


def beginning(tok, text, T):
    """The ids of a text, of a long one no more than is needed: 64 characters hold a token of anything that people write."""
    return tok.encode(text[: 64 * T])


def read_sequence(row, tok, T):
    """(ids, [label of each id or None], cut off?). Between two <|endoftext|>, as in pretraining: the last one stands for the text."""
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise ValueError("empty or no text")
    inside = beginning(tok, row["text"], T)
    ids = [tok.eos_id, *inside[: T - 2], tok.eos_id]
    return ids, [None] * (len(ids) - 1) + [label_of(row["label"])], len(inside) > T - 2


def read_tokens(row, tok, T):
    """A word's label stands at its last piece. Blanks between words, none before punctuation or around Chinese."""
    words, labels = row["tokens"], row["labels"]
    if not (isinstance(words, list) and isinstance(labels, list) and len(words) == len(labels) > 0):
        raise ValueError("tokens and labels are not two lists of one length")
    ids, targets = [tok.eos_id], [None]
    for before, word, label in zip(["", *words], words, labels):
        if not isinstance(word, str) or not word.strip():
            raise ValueError("a token is empty or no text")
        blank = before and word[0].isalnum() and not HAN.match(word) and not HAN.match(before[-1])
        piece = tok.encode(" " + word if blank else word)
        if len(ids) + len(piece) > T:
            break
        ids, targets = ids + piece, targets + [None] * (len(piece) - 1) + [label_of(label)]
    if len(ids) == 1:
        raise ValueError("not even its first token fits into --max_seq_len")
    return ids, targets, sum(t is not None for t in targets) < len(words)


def read_answer(row, tok, T):
    """The question stands first, so that a decoder knows it when it reads the context. The label of a place is BEGINS, ENDS, both or 0."""
    context, question = row["context"], row["question"]
    answers = row.get("answers") or {"text": [row.get("answer")], "answer_start": [row.get("answer_start")]}
    answer, start = answers["text"][0] if answers["text"] else None, (answers.get("answer_start") or [None])[0]
    if not all(isinstance(text, str) and text.strip() for text in (context, question, answer)):
        raise ValueError("context, question or answer is empty or no text")
    start = context.find(answer) if start is None else start
    if start < 0 or context[start : start + len(answer)] != answer:
        raise ValueError("the answer does not stand in its context" + (" where answer_start says" if start >= 0 else ""))
    ids = [tok.eos_id] + tok.encode(question + "\n")
    inside = tok.encode(context)
    ends = np.cumsum([len(tok.token_bytes(i)) for i in inside]) - tok.added_blank        # of each token, in bytes
    if not inside or ends[-1] != len(context.encode("utf-8")):
        raise ValueError("this tokenizer does not keep the bytes of the context, so places in it cannot be told")
    first, last = (int(np.searchsorted(ends, len(context[:at].encode("utf-8")), side)) for at, side in ((start, "right"), (start + len(answer), "left")))
    if len(ids) + last >= T:
        raise ValueError("its answer lies beyond --max_seq_len")
    inside = inside[: T - len(ids)]
    targets = [BEGINS * (i == first) + ENDS * (i == last) for i in range(len(inside))]
    return ids + inside, [None] * len(ids) + targets, len(inside) < len(ends)


READ = {"sequence": read_sequence, "token": read_tokens, "answer": read_answer}


class LabelledRows:
    """Rows of one task as (inputs, targets): a target wherever something is asked, IGNORE_INDEX elsewhere."""

    @classmethod
    def load(cls, cfg, tok, T):
        """(train, val) as a script's config names them. Labels are those of the training rows."""
        train, val = split_rows(cfg)
        train = cls(train, tok, T, "", None, cfg.out_dir, cfg.max_bad)
        return train, cls(val, tok, T, train.task, train.labels, cfg.out_dir, cfg.max_bad)

    def __init__(self, rows, tok, T, task="", labels=None, out_dir=None, max_bad=0.1):
        """rows: [(where, row)] as read_rows returns them. task and labels: those of the training rows, for others. Raises UserError."""
        self.tok, self.task = tok, task or next(filter(None, (task_of(row) for _, row in rows)), "")
        if not self.task:
            raise UserError(f"--data: {rows[0][0]} has the keys {sorted(rows[0][1])[:8]}; wanted are text and label, tokens and labels, "
                            "or context and question")
        bad, found, shortened = [], [], 0
        for where, row in rows:
            try:
                if task_of(row) != self.task:
                    raise ValueError(f"not a row of the task {self.task}")
                ids, targets, cut = READ[self.task](row, tok, T)
                if labels and self.task != "answer" and (unknown := {t for t in targets if t is not None} - set(labels)):
                    raise ValueError(f"a label that no training row has: {min(unknown)}")
                found.append((ids, targets))
                shortened += cut
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
                reason = str(e) if type(e) is ValueError else "not of the form that its keys promise"
                bad.append((where, reason, json.dumps(row, ensure_ascii=False, default=str)[:200]))
        report_bad(bad, len(rows), out_dir, max_bad)
        if shortened:
            print(f"shortened {shortened} of {len(rows)} rows to --max_seq_len {T}: their ends are left out", flush=True)
        seen = {t for _, targets in found for t in targets if t is not None}
        self.labels = ["begins", "ends"] if self.task == "answer" else labels or sorted(seen)
        if not found or len(self.labels) < 2:
            raise UserError(f"{len(found)} usable rows with the labels {self.labels}: nothing to tell apart; give rows of at least two labels")
        number = {label: i for i, label in enumerate(self.labels)} if self.task != "answer" else {t: t for t in range(BEGINS + ENDS + 1)}
        self.examples = [(ids, [IGNORE_INDEX if t is None else number[t] for t in targets]) for ids, targets in found]
        asked = [2 if self.task == "answer" else sum(t != IGNORE_INDEX for t in targets) for _, targets in self.examples]
        self.ends = np.cumsum(asked)                         # where each row's decisions end in a list of all

    def __len__(self):
        return len(self.examples)

    def lengths(self):
        return [len(ids) for ids, _ in self.examples]

    def batch(self, rows):
        """inputs, targets (B, T)."""
        return collate([[self.examples[r]] for r in rows], self.tok.pad_id)[:2]

    def where(self, rows):
        """Where the decisions of these rows belong in a list of all rows' decisions."""
        return np.concatenate([np.arange(self.ends[r - 1] if r else 0, self.ends[r]) for r in rows])

    def report(self, decisions):
        """decisions (n,) of all rows -> metrics."""
        if self.task == "answer":
            text = lambda ids, first, last: self.tok.decode(ids[first : last + 1])
            true = [(next(i for i, t in enumerate(y) if t in (BEGINS, BEGINS + ENDS)), next(i for i, t in enumerate(y) if t >= ENDS)) for _, y in self.examples]
            pairs = [(text(ids, *a), text(ids, *b)) for (ids, _), a, b in zip(self.examples, decisions.view(-1, 2).tolist(), true)]
            return {"exact_match": sum(normal(a) == normal(b) for a, b in pairs) / len(pairs), "f1": sum(overlap(a, b) for a, b in pairs) / len(pairs)}
        true = [[t for t in targets if t != IGNORE_INDEX] for _, targets in self.examples]
        said = [part.tolist() for part in np.split(decisions.numpy(), self.ends[:-1])]
        flat = [(a, b) for s, t in zip(said, true) for a, b in zip(s, t)]
        metrics = {"accuracy": sum(a == b for a, b in flat) / len(flat), "macro_f1": macro_f1(flat)}
        if self.task == "token" and any(label.startswith("B-") for label in self.labels):
            name = lambda rows: {(r, *e) for r, row in enumerate(rows) for e in entities([self.labels[i] for i in row])}
            metrics |= f1_of(name(said), name(true), "entity_")
        return metrics


# ----------------------------------------------------------------------------------------------------------------
# What is measured


def f1_of(said, true, prefix=""):
    """Precision, recall and their harmonic mean of two sets."""
    hits = len(said & true)
    found = {"precision": hits / max(len(said), 1), "recall": hits / max(len(true), 1), "f1": 2 * hits / max(len(said) + len(true), 1)}
    return {prefix + name: value for name, value in found.items()}


def macro_f1(pairs):
    """[(said, true)] -> the mean of each label's F1, so that a rare label counts as much as a frequent one."""
    labels = {label for pair in pairs for label in pair}
    of = lambda label, side: {i for i, pair in enumerate(pairs) if pair[side] == label}
    return sum(f1_of(of(label, 0), of(label, 1))["f1"] for label in labels) / len(labels)


def entities(tags):
    """{(type, first, last)} of BIO tags; an I- that continues nothing begins an entity, as in CoNLL's own script."""
    found, open_ = set(), None
    for i, tag in enumerate([*tags, "O"]):
        kind = tag[2:] if tag[:2] in ("B-", "I-") else None
        if open_ and (kind != open_[0] or tag.startswith("B-")):
            found.add((*open_, i - 1))
            open_ = None
        if kind and not open_:
            open_ = (kind, i)
    return found


def normal(text):
    """SQuAD's measure of sameness (Rajpurkar et al. 2016, section 6.1): no case, punctuation or English article; and for Chinese its own
    punctuation, and each character for itself. -> [word, …]"""
    text = "".join(" " if (kind := unicodedata.category(c)[0]) in "ZC" else "" if kind == "P" or c in string.punctuation else c for c in text.lower())
    return [word for word in HAN.sub(lambda m: f" {m[0]} ", text).split() if word not in ("a", "an", "the")]


def overlap(said, true):
    """F1 of the words that two texts share."""
    a, b = normal(said), normal(true)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


# ----------------------------------------------------------------------------------------------------------------
# Using a classifier


def logits_of(model, inputs, pad_id):
    """(B, T, labels). A decoder needs no mask against padding on the right; with the variant prefix_lm all of a row is a prefix, read
    in both directions."""
    segments = (inputs != pad_id).long()
    marked = mark_prefix(model, segments, torch.full_like(inputs, IGNORE_INDEX))
    return model(inputs, None if marked is segments else marked)


@torch.no_grad()
def probabilities(model, tok, texts, max_tokens=4096):
    """p of each label for each text, (texts, labels) fp32; a text beyond the context is judged by its beginning. Rows of like length
    are read together, at most max_tokens at once."""
    rows = [beginning(tok, text, model.args.max_seq_len)[: model.args.max_seq_len - 2] for text in texts]
    order, out, device = sorted(range(len(rows)), key=lambda i: -len(rows[i])), torch.zeros(len(rows), len(model.labels)), next(model.parameters()).device
    while order:
        n = max(1, max_tokens // (len(rows[order[0]]) + 2))
        part, order = order[:n], order[n:]
        ids = [[tok.eos_id, *rows[i], tok.eos_id] for i in part]
        inputs = collate([[(x, x)] for x in ids], tok.pad_id)[0].to(device)
        last = torch.tensor([len(x) - 1 for x in ids], device=device)
        out[part] = logits_of(model, inputs, tok.pad_id)[torch.arange(len(part)), last].softmax(-1).cpu()
    return out


@dataclass(frozen=True)
class Judge:
    """What a worker of `prepare_data.py score` needs to know."""
    path: str
    label: str                 # its probability is the quality
    as_source: bool = False    # the likeliest label becomes the document's source


@lru_cache(maxsize=2)
def load(path):
    model, tok, meta = checkpoint.load(path, expect="classifier")
    if model.task != "sequence":
        raise UserError(f"{path} labels {'words' if model.task == 'token' else 'answers'}, not texts; train it with rows of text and label")
    return model, tok, meta


def judge_of(cfg):
    """(Judge, what tells this classifier from another) of --classifier RUN:LABEL. With --as_source the label may be left out: the
    quality is then the likeliest label's probability. Raises UserError."""
    spec = cfg.classifier
    if not spec or cfg.scorer:
        raise UserError("--as_source needs --classifier" if not spec else "--scorer and --classifier both say what quality is; give one of them")
    path, _, label = spec.rpartition(":") if ":" in spec else (spec, "", "")
    model, _, meta = load(path)
    if label not in model.labels and (label or not cfg.as_source):
        raise UserError(f"--classifier {spec}: whose probability is the quality? write {path}:LABEL with one of {', '.join(model.labels)}")
    return Judge(path, label, cfg.as_source), {"classifier_hash": meta["files"]["model.pt"]["sha256"]}


def judge(table, cfg):
    """Stage function: the column `quality`, and with as_source the column `source`."""
    torch.set_num_threads(1)                                 # one process a core as it is
    model, tok, _ = load(cfg.path)
    p = probabilities(model, tok, table["text"].to_pylist())
    if not p.isfinite().all():                               # nan lies below no threshold: all would be kept
        raise UserError(f"--classifier {cfg.path} gives probabilities that are no numbers: its weights are broken, take another checkpoint")
    quality = p[:, model.labels.index(cfg.label)] if cfg.label else p.amax(1)
    table = columns.with_column(table, "quality", quality.numpy(), pa.float32())
    return columns.with_column(table, "source", [model.labels[i] for i in p.argmax(1).tolist()], pa.string()) if cfg.as_source else table
