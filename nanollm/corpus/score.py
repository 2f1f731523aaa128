"""Quality: a column of numbers from any function of the text, and a selection by threshold or by chance.

A scorer is `FILE.py:function`. A function whose parameter is called `texts` gets a list of strings and returns as many
numbers; any other gets one string and returns one number. No scorer means `rule_scores` below. A classifier fits behind
the same door.

Selection: keep what reaches `threshold`, or draw: keep with a probability that rises from 0 at `low` to 1 at `high`. The
draw keeps some of the middling texts, so that the corpus does not lose a genre at a stroke (GPT-3 drew by its classifier's
score too; Brown et al. 2020, appendix A).
"""
import importlib.util
import inspect
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from nanollm.config import UserError
from nanollm.corpus import columns, ngrams

# What rule_scores looks at: weight, then a, b, c, d: bad (0) up to a, rising to good (1) at b, good until c, bad from d on.
# The weights add up to 1. Chosen by hand to tell prose from menus, lists of keywords and repeated text; nothing was fitted.
RULES = {
    "letters":     (0.2, 0.50, 0.75, 1.00, 1.01),         # share of visible characters that are letters or Han
    "punctuation": (0.2, 0.00, 0.02, 0.20, 0.40),         # share that are neither letters nor digits: 0 in a list of keywords
    "line_ends":   (0.2, 0.00, 0.50, 1.00, 1.01),         # share of lines that end in a mark that ends a sentence
    "distinct":    (0.3, 0.20, 0.60, 1.00, 1.01),         # distinct 3-unit shingles / all: low if it repeats itself
    "length":      (0.1, 0, 100, 1e9, 2e9),               # visible characters
}
WORST = 0.01                              # a rule's value is at least this, so that no single one decides alone
ENDS = "。！？!?….；;”」』\"')）"


@dataclass(frozen=True)
class Score:
    scorer: str = ""                      # "FILE.py:function"; empty: rule_scores
    select: str = "none"                  # "threshold", "sample", or "none": only the column
    threshold: float = 0.5                # keep quality >= threshold
    low: float = 0.2                      # sample: never kept at or below
    high: float = 0.8                     # sample: always kept at or above
    seed: int = 0

    def __post_init__(self):
        if self.select not in ("none", "threshold", "sample"):
            raise UserError(f"selection by quality {self.select!r}: none, threshold or sample")
        if self.select == "sample" and not self.low < self.high:
            raise UserError(f"selection by quality: low {self.low:g} must be below high {self.high:g}")


def measures(texts):
    """float64 (D, 5): the statistics in the order of RULES; 0 where there is nothing to divide by."""
    parts = [np.zeros((0, len(RULES)))]
    for first, end in ngrams.chunks(texts):
        points, begins = ngrams.code_points(texts[first:end])
        kinds = ngrams.folding()[points] >> np.uint32(24) << np.uint32(24)

        def per_document(mask):
            return np.diff(np.append(0, np.cumsum(mask))[begins])
        visible = per_document((kinds != 0) | ~np.isin(points, ngrams.BLANKS))
        letters = per_document((kinds == ngrams.HAN) | (kinds == ngrams.LETTER))
        marks = visible - per_document(kinds != 0)
        lines = [[line[-1] in ENDS for line in map(str.rstrip, text.split("\n")) if line] for text in texts[first:end]]
        hashes, shingles = ngrams.shingles(texts[first:end], 3)
        of = np.repeat(np.arange(end - first, dtype=np.uint64), shingles)
        different = ngrams.distinct((of << np.uint64(40)) | (hashes >> np.uint64(24))) >> np.uint64(40)
        distinct = np.bincount(different.astype(np.int64), minlength=end - first)
        count = [visible, visible, [len(own) for own in lines], shingles, np.ones(end - first)]
        share = [letters, marks, [sum(own) for own in lines], distinct, visible]
        parts.append((np.array(share) / np.maximum(count, 1)).T)
    return np.concatenate(parts)


def rule_scores(texts):
    """float64 (D,) in (0, 1]: the weighted geometric mean of what RULES say, so that a text that is good in one respect
    does not buy itself out of another."""
    logs = np.zeros(len(texts))
    for values, (weight, a, b, c, d) in zip(measures(texts).T, RULES.values()):
        logs += weight * np.log(np.maximum(np.interp(values, [a, b, c, d], [0.0, 1.0, 1.0, 0.0]), WORST))
    return np.exp(logs)


@lru_cache(maxsize=4)
def load_scorer(spec):
    """The function of "FILE.py:function" as texts -> list. Raises UserError if there is none; the file's own errors too."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"scorer {spec!r}: write FILE.py:function")
    if not Path(path).is_file():
        raise UserError(f"scorer {spec!r}: the file {path} does not exist")
    module_spec = importlib.util.spec_from_file_location("nanollm_scorer", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:                  # a script that parses the command line exits
        raise UserError(f"scorer {spec!r}: {path} cannot be loaded: {type(e).__name__}: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"scorer {spec!r}: {path} has no function {name}")
    try:
        parameters = list(inspect.signature(function).parameters)
    except ValueError:                                    # some functions written in C do not tell
        parameters = []
    return function if parameters[:1] == ["texts"] else lambda texts: [function(text) for text in texts]


def score(table, cfg):
    """Stage function: the column `quality` (float32), and by cfg.select the drop_reason "quality".

    Raises UserError if the scorer fails or does not return one finite number a text.
    """
    texts = table["text"].to_pylist()
    values = checked(cfg.scorer, table, texts) if cfg.scorer else rule_scores(texts)
    values = np.asarray(values, dtype=np.float32)
    return select(columns.with_column(table, "quality", values, pa.float32()), cfg)


def select(table, cfg):
    """Stage function: what the column `quality` means for each document, by cfg.select."""
    values = table["quality"].to_numpy()
    if cfg.select == "none":
        return table
    if cfg.select == "threshold":
        return columns.drop(table, values < cfg.threshold, "quality")
    keep = np.clip((values.astype(np.float64) - cfg.low) / (cfg.high - cfg.low), 0.0, 1.0)
    return columns.drop(table, ngrams.draws(cfg.seed, columns.numbers(table), "quality") >= keep, "quality")


def checked(scorer, table, texts):
    """float64 (D,): what the scorer says, one finite number a text."""
    function = load_scorer(scorer)
    try:
        values = list(function(texts))
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"scorer {scorer!r} failed on the documents {table['id'][0]} to {table['id'][-1]}: "
                        f"{type(e).__name__}: {e}") from e
    if len(values) != len(texts):
        raise UserError(f"scorer {scorer!r} returned {len(values)} numbers for {len(texts)} texts")
    for number, value in enumerate(values):
        if not isinstance(value, (int, float, np.integer, np.floating)) or not math.isfinite(value):
            raise UserError(f"scorer {scorer!r} returned {value!r} for the document {table['id'][number]}; a finite number is wanted")
    return np.array(values, dtype=np.float64)
