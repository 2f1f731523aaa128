"""Sentence-level deduplication: lines or sentences that stand in many documents (headers, footers, notices) stay in the
first of them only.

    pass 1    `segments_of` a table: for each long enough segment its hash, in how many documents it stands, and the first
              of those; sorted, so that `merge` adds tables up and `merge_files` joins the parts of a corpus
    pass 2    `cut_repeated`: a segment found in at least min_documents goes from every document but that first one

Blanks do not count, so indentation and line ends do not hide a copy; otherwise a segment must be equal to the character.
A segment is a line, a sentence, or `span` of them in a row, as C4 does with three sentences (Raffel et al. 2020, section
2.2; there from 2 documents on). Memory: 20 bytes a segment of one part, then of one slice of the hash range, and at the
end only the repeated ones.
"""
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from nanollm.config import UserError
from nanollm.corpus import columns, ngrams

SEGMENT = np.dtype([("hash", "<u8"), ("documents", "<u4"), ("first", "<i8")])
ENDERS, CLOSERS = [ord(c) for c in "。！？!?…"], [ord(c) for c in "”’」』）)\"'"]


@dataclass(frozen=True)
class Sentences:
    unit: str = "line"                    # or "sentence"
    span: int = 1                         # so many units in a row
    min_chars: int = 30                   # that are not blank; shorter segments are left alone
    min_documents: int = 10
    repeated: str = ""                    # .npy of merge_files, for pass 2

    def __post_init__(self):
        if self.unit not in ("line", "sentence"):
            raise UserError(f"unit {self.unit!r}: line or sentence")


def segments(texts, cfg):
    """(hash uint64, document, start, end), arrays (S,): the segments of at least min_chars characters, in order;
    text[start:end] has no blank at either end."""
    found = [(np.zeros(0, dtype=np.uint64), *np.zeros((3, 0), dtype=np.int64))]
    for first, end in ngrams.chunks(texts):
        points, begins = ngrams.code_points(texts[first:end])
        seen = np.flatnonzero(~np.isin(points, ngrams.BLANKS))                    # places of the characters that are not blank
        document = np.searchsorted(begins, seen, side="right") - 1
        line = np.cumsum(points == ord("\n"))[seen]
        last = np.ones(len(seen), dtype=bool)                              # the last character of its unit
        last[:-1] = (document[1:] != document[:-1]) | (line[1:] != line[:-1])
        if cfg.unit == "sentence":
            last |= sentence_ends(points, seen, last)
        ends = np.flatnonzero(last) + 1
        starts = np.append(0, ends[:-1])[: len(ends)]
        starts, ends = starts[: len(starts) - cfg.span + 1], ends[cfg.span - 1:]
        whole = (document[starts] == document[ends - 1]) & (ends - starts >= cfg.min_chars)
        starts, ends = starts[whole], ends[whole]
        own = document[starts]
        found.append((ngrams.Slices(points[seen]).hash(starts, ends), own + first, seen[starts] - begins[own],
                      seen[ends - 1] + 1 - begins[own]))
    return [np.concatenate(part) for part in zip(*found)]


def sentence_ends(points, seen, last):
    """bool (len(seen),): after 。！？!?… and after a full stop before a blank, each with the quotes and brackets that close
    directly behind it. A mark followed by another mark is not the end yet. last: bool, the last characters of lines."""
    marks, joined = points[seen], np.append(np.diff(seen) == 1, False)[: len(seen)] & ~last       # to the next character
    closes = np.isin(marks, CLOSERS)
    closes[1:] &= joined[:-1]
    heads = np.flatnonzero(~closes)                       # each character and the closers behind it, up to its tail
    tails = np.append(heads[1:], len(seen))[: len(heads)] - 1
    ender = np.isin(marks[heads], ENDERS) | (marks[heads] == ord(".")) & ~joined[tails]
    ends = np.zeros(len(seen), dtype=bool)
    ends[tails] = ender & ~np.append(ender[1:], False)[: len(ender)]
    return ends


def segments_of(table, cfg):
    """SEGMENT array of one table, sorted by hash, one row a distinct segment: pass 1. Chats are left out."""
    numbers, texts = columns.numbers(table), plain_texts(table)
    hashes, document, _, _ = segments(texts, cfg)
    order = np.lexsort((document, hashes))
    hashes, document = hashes[order], document[order]
    once = np.append(True, (hashes[1:] != hashes[:-1]) | (document[1:] != document[:-1]))[: len(hashes)]
    rows = np.zeros(once.sum(), dtype=SEGMENT)
    rows["hash"], rows["documents"], rows["first"] = hashes[once], 1, numbers[document[once]]
    return merge([rows])


def merge(parts):
    """One SEGMENT array of several: documents added, the smallest first."""
    rows = np.concatenate(parts) if parts else np.zeros(0, dtype=SEGMENT)
    rows = rows[np.lexsort((rows["first"], rows["hash"]))]
    starts = np.flatnonzero(np.append(True, rows["hash"][1:] != rows["hash"][:-1])[: len(rows)])
    result = rows[starts]
    if len(rows):
        result["documents"] = np.add.reduceat(rows["documents"], starts)
    return result


def merge_files(paths, out, min_documents, limit=1 << 22):
    """Merge the .npy files of the parts' SEGMENT arrays, sorted by hash, into `out`: the segments of at least
    min_documents documents. Slice by slice of the hash range, about `limit` rows at a time."""
    parts = [np.load(path, mmap_mode="r") for path in paths]
    slices = 1 + sum(map(len, parts)) // limit
    edges = [np.uint64(2**64 * i // slices) for i in range(1, slices)]
    cuts = [np.concatenate([[0], np.searchsorted(part["hash"], np.array(edges, dtype=np.uint64)), [len(part)]]).astype(int)
            for part in parts]
    kept = [np.zeros(0, dtype=SEGMENT)]
    for i in range(slices):
        rows = merge([np.asarray(part[cut[i]:cut[i + 1]]) for part, cut in zip(parts, cuts)])
        kept.append(rows[rows["documents"] >= min_documents])
    aside = f"{out}.tmp"
    with open(aside, "wb") as f:
        np.save(f, np.concatenate(kept))
    os.replace(aside, out)


@lru_cache(maxsize=4)
def load_repeated(path):
    """The SEGMENT array that merge_files wrote. Raises UserError if it is none."""
    try:
        rows = np.load(path)
    except (OSError, ValueError) as e:
        raise UserError(f"repeated sentences: cannot read {path}: {e}; run the first pass again") from None
    if rows.dtype != SEGMENT:
        raise UserError(f"repeated sentences: {path} holds {rows.dtype}, not what merge_files writes; run the first pass again")
    return rows


def plain_texts(table):
    """The texts, chats and preference rows as "": a sentence cut out of an answer would spoil it."""
    rows = zip(table["text"].to_pylist(), table["meta"].to_pylist())
    return ["" if columns.is_conversation(meta) else text for text, meta in rows]


def cut_repeated(table, cfg):
    """Stage function, pass 2: `text` without the repeated segments, except in the document that had them first. A document
    of which nothing is left keeps its text and gets the drop_reason "repeated_sentences"."""
    repeated, numbers = load_repeated(cfg.repeated), columns.numbers(table)
    hashes, document, start, end = segments(plain_texts(table), cfg)
    place = np.searchsorted(repeated["hash"], hashes)
    place[place == len(repeated)] = 0
    gone = (repeated["hash"][place] == hashes) if len(repeated) else np.zeros(len(hashes), dtype=bool)
    gone[gone] = repeated["first"][place[gone]] != numbers[document[gone]]
    texts, changed = table["text"].to_pylist(), np.zeros(len(table), dtype=bool)
    empty = changed.copy()
    for d in np.unique(document[gone]):
        of = gone & (document == d)
        rest = without(texts[d], zip(start[of].tolist(), end[of].tolist()))
        empty[d], changed[d] = not rest, bool(rest)
        texts[d] = rest or texts[d]
    table = columns.with_text(table, texts, changed, "repeated_sentences")
    return columns.drop(table, empty, "repeated_sentences")


def without(text, spans):
    """`text` without the sorted `spans` (start, end), which may overlap; a line that is cut leaves no empty line."""
    kept, at = "", 0
    for start, end in [*spans, (len(text), len(text))]:
        piece = text[at:max(start, at)]
        kept += piece.lstrip() if not kept or kept.endswith("\n") else piece
        at = max(at, end)
    return kept.strip()
