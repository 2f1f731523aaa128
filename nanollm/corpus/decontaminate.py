"""Decontamination: documents that contain evaluation questions are cut or dropped ("set-level" deduplication).

    index       hashes of all n-unit n-grams of the evaluation items, n = 13 (GPT-3, Brown et al. 2020, appendix C), a
                unit being a Chinese character, a word or a number (see ngrams: case, blanks and punctuation do not count)
    generic     an n-gram that two items share ("下列关于…的说法正确的是") proves nothing, nor does one that stands in more
                than 10 documents: both are left out. The second rule needs a pass of its own that counts documents.
    short       a question of 8 to n - 1 units is looked for as a whole; a shorter one cannot be told from chance
    cut         a hit goes with 200 characters on both sides; of the pieces that are left, those of 200 characters and
                more stay; a document in more than 10 pieces is dropped. Chat and preference rows are always dropped:
                half an answer is no answer.

An item is its question and, as such questions are printed, its options behind "A.", "B." …; after folding, (A) and A、 are
the same. Items that are equal throughout count once.
"""
import csv
import json
import os
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nanollm.config import UserError
from nanollm.corpus import columns, ngrams

MIN_UNITS = 8                             # the shortest question that is looked for as a whole
LABELS = "abcdefghij"
KINDS = (".csv", ".jsonl", ".txt")
QUESTION = ("question", "prompt", "instruction", "text")


@dataclass(frozen=True)
class Decontaminate:
    index: str                            # the .npz of build_index
    frequency: str = ""                   # .npy of the summed document_counts; without it the second rule does not apply
    max_documents: int = 10               # an n-gram found in more documents than these is no evidence
    policy: str = "cut"                   # or "drop"
    window: int = 200                     # characters that go on each side of a hit
    min_piece: int = 200                  # characters; shorter pieces go too
    max_pieces: int = 10                  # a document in more pieces goes as a whole

    def __post_init__(self):
        if self.policy not in ("cut", "drop"):
            raise UserError(f"decontamination policy {self.policy!r}: cut or drop")


class Item(NamedTuple):
    task: str                             # the file's name without its ending
    line: int                             # in the file, from 1 (a CSV row of several lines: its last)
    question: str
    text: str                             # the question and its options


class Index(NamedTuple):
    """A key is an n-gram of an item, or a whole short question; keys are sorted by hash, and a key's place is its number."""
    n: int
    keys: np.ndarray                      # uint64 (K,)
    owner: np.ndarray                     # int64 (K,): an item that has it
    shared: np.ndarray                    # bool (K,): whether another item has it too
    short: np.ndarray                     # uint64, sorted: the first MIN_UNITS units of each whole question
    lengths: np.ndarray                   # int64: the lengths in units of whole questions, each once
    items: np.ndarray                     # str (I,): "task:line"
    task: np.ndarray                      # int64 (I,)
    tasks: np.ndarray                     # str (T,)
    copies: np.ndarray                    # int64 (T,): items left out because an earlier one is equal


# ---- the index -------------------------------------------------------------------------------------------------------

def build_index(paths, out, n=13):
    """Write the Index of the items in `paths`, files or directories of .csv, .jsonl and .txt, to the .npz file `out`.

    Raises UserError if a path is missing, a file is not of a known form, or there is no item.
    """
    if n <= MIN_UNITS:
        raise UserError(f"n-grams of {n} units: take at least {MIN_UNITS + 1}, fewer tell no copy from chance")
    items = [item for task, path in evaluation_files(paths) for item in read_items(task, path)]
    if not items:
        raise UserError(f"evaluation items: none in {', '.join(map(str, paths))}")
    tasks = list(dict.fromkeys(item.task for item in items))
    batch = ngrams.units([item.text for item in items])
    contents = ngrams.Slices(batch.hashes).hash(batch.offsets[:-1], batch.offsets[1:])
    first = np.sort(np.unique(contents, return_index=True)[1])             # of items that are equal throughout
    count = Counter(item.task for item in items)
    items = [items[i] for i in first]
    copies = [count[task] - sum(item.task == task for item in items) for task in tasks]

    texts = [item.text for item in items]
    batch = ngrams.units(texts)
    starts, ends, counts = ngrams.windows(batch.offsets, n)
    length = np.diff(ngrams.units([item.question for item in items]).offsets)
    whole = np.flatnonzero((MIN_UNITS <= length) & (length < n))           # a question's units are the first of its item
    begin, slices = batch.offsets[whole], ngrams.Slices(batch.hashes)
    hashes = np.concatenate([slices.hash(starts, ends), slices.hash(begin, begin + length[whole])])
    owner = np.concatenate([np.repeat(np.arange(len(items)), counts), whole])
    keys, at = np.unique(hashes, return_index=True)
    index = Index(n, keys, owner[at], np.zeros(len(keys), dtype=bool), np.unique(slices.hash(begin, begin + MIN_UNITS)),
                  np.unique(length[whole]), np.array([f"{item.task}:{item.line}" for item in items]),
                  np.array([tasks.index(item.task) for item in items]), np.array(tasks), np.array(copies))
    # A short question may also stand inside a longer one: so the items are searched as documents are.
    item, key, _, _ = search(index, texts)
    holders = np.bincount(np.unique(item * len(keys) + key) % len(keys), minlength=len(keys)) if len(keys) else keys
    index = index._replace(shared=holders > 1)
    aside = f"{out}.tmp"
    with open(aside, "wb") as f:
        np.savez(f, **index._asdict())
    os.replace(aside, out)


@lru_cache(maxsize=4)
def load_index(path):
    """The Index of an .npz file. Raises UserError if it is none."""
    try:
        with np.load(path) as file:
            return Index(int(file["n"]), *(file[name] for name in Index._fields[1:]))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"decontamination index {path}: not written by build_index ({e}); build it again") from None


def evaluation_files(paths):
    """[(task, path)] of files and directories; inside a directory sorted, the task named by the path below it."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"evaluation items: {path} does not exist")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS) if path.is_dir() else [path]
        files += [(p.relative_to(path if path.is_dir() else p.parent).with_suffix("").as_posix(), p) for p in inside]
    return files


def read_items(task, path):
    """Items of one file: a CSV with a column Question and perhaps A, B, C …; JSON lines with a field question, prompt,
    instruction or text and perhaps options or choices (a list, or A, B, C …) or an answer; or a text with one item a
    line. Names of fields in any case. Raises UserError with file and line for what is none of these."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            if path.suffix.lower() == ".txt":
                rows = [(number, {"text": line}) for number, line in enumerate(f, 1) if line.strip()]
            elif path.suffix.lower() == ".jsonl":
                rows = [(number, json.loads(line)) for number, line in enumerate(f, 1) if line.strip()]
            else:
                reader = csv.DictReader(f)
                rows = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as e:        # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"evaluation items: cannot read {path}: {e}; known are CSV, JSON lines and text in UTF-8") from None
    items = []
    for line, row in rows:
        row = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        question = next((row[key] for key in QUESTION if isinstance(row.get(key), str)), None)
        if question is None:
            raise UserError(f"evaluation items: {path}:{line} has no text under any of {', '.join(QUESTION)}")
        items.append(Item(task, line, question, "\n".join([question, *options_of(row)])))
    return items


def options_of(row):
    """The options of a row (its names in lower case) as they are printed; without options, its answer."""
    given = row.get("options") or row.get("choices") or row
    if isinstance(given, dict):                           # {"A": …, "B": …}, or {"text": […], "label": […]}
        given = {str(key).lower(): value for key, value in given.items()}
        given = given.get("text") if isinstance(given.get("text"), list) else [given[x] for x in LABELS if x in given]
    given = [option for option in given if isinstance(option, (str, int, float)) and option != ""]
    return [f"{label}. {option}" for label, option in zip(LABELS, given)] or [a for a in [row.get("answer")] if isinstance(a, str)]


# ---- searching -------------------------------------------------------------------------------------------------------

def prefix_table(hashes):
    """(bool (2^b,), 64 - b): whether any of the hashes begins with these b bits; 2^b is 16 to 32 times their number."""
    shift = np.uint64(64 - 4 - len(hashes).bit_length())
    table = np.zeros(1 << (64 - int(shift)), dtype=bool)
    table[hashes >> shift] = True
    return table, shift


def search(index, texts):
    """Every key in every text: (document, key, start, end), int64 arrays (H,), start and end in characters.

    Nearly all windows are in no item. A table 16 times as large as the index says so with one look for 15 of 16; only
    the rest is searched for by bisection.
    """
    key_table, short_table = prefix_table(index.keys), prefix_table(index.short)
    found = [np.zeros((4, 0), dtype=np.int64)]
    for first, end in ngrams.chunks(texts):
        batch = ngrams.units(texts[first:end])
        slices = ngrams.Slices(batch.hashes)

        def likely(size, table, shift):
            """First units of the windows of `size` units whose hashes are in the table."""
            windows = max(len(batch.hashes) - size + 1, 0)
            return np.flatnonzero(table[slices.hash(slice(0, windows), slice(size, size + windows)) >> shift])

        def hits(starts, size):
            """(document, key, start, end) of the windows of `size` units at `starts` that are keys."""
            document = np.searchsorted(batch.offsets, starts, side="right") - 1
            inside = starts + size <= batch.offsets[document + 1]          # not on into the next document
            starts, document = starts[inside], document[inside]
            hashes = slices.hash(starts, starts + size)
            key = np.minimum(np.searchsorted(index.keys, hashes), max(len(index.keys) - 1, 0))
            real = index.keys[key] == hashes if len(index.keys) else np.zeros(len(hashes), dtype=bool)
            starts, document, key = starts[real], document[real], key[real]
            return np.stack([document + first, key, batch.starts[starts], batch.ends[starts + size - 1]])

        found.append(hits(likely(index.n, *key_table), index.n))
        begins = likely(MIN_UNITS, *short_table)
        found += [hits(begins, size) for size in index.lengths.tolist()]
    return np.concatenate(found, axis=1)


def evidence(cfg):
    """bool (K,): the keys that prove something, neither shared by items nor found in more than max_documents."""
    index = load_index(cfg.index)
    if not cfg.frequency:
        return ~index.shared
    try:
        frequency = np.load(cfg.frequency)
    except (OSError, ValueError) as e:
        raise UserError(f"decontamination: cannot read the counts {cfg.frequency}: {e}; count the documents again") from None
    if frequency.shape != index.keys.shape:
        raise UserError(f"decontamination: {cfg.frequency} counts {len(frequency):,} n-grams, the index {cfg.index} has "
                        f"{len(index.keys):,}; count the documents again")
    return ~index.shared & (frequency <= cfg.max_documents)


# ---- the stage -------------------------------------------------------------------------------------------------------

def document_counts(table, cfg):
    """int64 (K,): in how many documents of the table each key stands. The sum over all tables, saved as .npy, is
    cfg.frequency of the second pass."""
    index = load_index(cfg.index)
    document, key, _, _ = search(index, table["text"].to_pylist())
    pairs = np.unique(document * len(index.keys) + key)
    return np.bincount(pairs % max(len(index.keys), 1), minlength=len(index.keys))


def decontaminate(table, cfg):
    """Stage function: `text` loses what stands in evaluation items, or drop_reason is "contaminated" (and the text stays).
    The new column `hits` (list<int64>) holds the keys found in each document, for `tally`."""
    index, proof = load_index(cfg.index), evidence(cfg)
    texts, metas = table["text"].to_pylist(), table["meta"].to_pylist()
    found = search(index, texts)
    document, key, start, end = found[:, proof[found[1]]]
    hits, gone, changed = [[]] * len(texts), np.zeros(len(texts), dtype=bool), np.zeros(len(texts), dtype=bool)
    for d in np.unique(document):
        of = document == d
        hits[d] = np.unique(key[of]).tolist()
        rest = None
        if cfg.policy == "cut" and not columns.is_conversation(metas[d]):
            rest = cut(texts[d], sorted(zip(start[of].tolist(), end[of].tolist())), cfg)
        gone[d], changed[d] = rest is None, rest is not None
        texts[d] = texts[d] if rest is None else rest
    table = columns.with_column(table, "hits", hits, pa.list_(pa.int64()))
    table = columns.with_text(table, texts, changed, "decontaminate")
    return columns.drop(table, gone, "contaminated")


def cut(text, hits, cfg):
    """`text` without the `hits`, sorted (start, end), and their surroundings; the pieces as paragraphs. None if nothing
    is left or if there are more than max_pieces."""
    pieces, at = [], 0
    for start, end in hits:
        pieces.append(text[at:max(start - cfg.window, at)])
        at = max(at, end + cfg.window)
    pieces = [piece for piece in [*pieces, text[at:]] if piece.strip()]
    long = [piece.strip() for piece in pieces if len(piece) >= cfg.min_piece]
    return "\n\n".join(long) if long and len(pieces) <= cfg.max_pieces else None


# ---- the report ------------------------------------------------------------------------------------------------------

def tally(table, cfg):
    """(Counter {key: documents}, Counter {task: documents}) of a table that `decontaminate` returned; both add up over
    tables with +."""
    index, keys, tasks = load_index(cfg.index), Counter(), Counter()
    for hits in table["hits"].to_pylist():
        keys.update(hits)
        tasks.update(set(index.tasks[index.task[index.owner[hits]]].tolist()) if hits else ())
    return keys, tasks


def report(cfg, keys, tasks):
    """[{task, items, copies, unfindable, items_hit, coverage, ngrams, shared, common, documents}], a dict for each task.

    items counts those that differ, copies the equal ones left out; unfindable are items without a key that proves
    anything; coverage is the mean share of an item's keys that were found, over the items hit; ngrams are all keys, of which
    `shared` and `common` (in too many documents) prove nothing. `keys` and `tasks` are the summed tallies.
    """
    index, proof = load_index(cfg.index), evidence(cfg)
    found = np.zeros(len(index.keys), dtype=bool)
    found[sorted(keys)] = True
    size = np.bincount(index.owner[proof], minlength=len(index.items))                 # (I,): keys that prove something
    share = np.bincount(index.owner[found & proof], minlength=len(index.items)) / np.maximum(size, 1)
    owner_task, rows = index.task[index.owner], []
    for t, name in enumerate(index.tasks.tolist()):
        of, own = index.task == t, owner_task == t
        hit = of & (share > 0)
        rows.append({"task": name, "items": int(of.sum()), "copies": int(index.copies[t]),
                     "unfindable": int((size[of] == 0).sum()), "items_hit": int(hit.sum()),
                     "coverage": round(float(share[hit].mean()), 4) if hit.any() else 0.0, "ngrams": int(own.sum()),
                     "shared": int(index.shared[own].sum()), "common": int((~proof & ~index.shared)[own].sum()),
                     "documents": tasks[name]})
    return rows
