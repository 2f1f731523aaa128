"""Filters that need the whole corpus: three standard deviations from the mean, and percentiles of perplexity.

No number fits all corpora, so nothing here is a constant of the program. A first pass counts (`lm.count`), a second
measures, a third drops:

    model   = lm.count(texts)                                     merged over the parts by lm.merge, saved with lm.save
    stats   = measure(table, cfg)                                 merged by `merge`, saved as stats.json
    dropped = outliers(table, cfg)

Measured are, for each source by itself, the metrics of METRICS as histograms of integers. Their merge is an addition, so
mean, standard deviation and percentiles do not depend on how the corpus was cut, and are exact up to the width of a bin.

The notes print the rule as 均值±30; it is ±3σ. They also say to drop *low* perplexity: noise has a high one (dropping only
the low end keeps all garbage), while the lowest half percent is boilerplate.
"""
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from nanollm.config import UserError
from nanollm.corpus import columns, filters, lm

# metric -> (low, high) of its histogram; lengths and perplexity as logarithms, because on the plain scale their tail is long
# and the mean says nothing about the typical text.
BINS = 1024
METRICS = {"log_chars": (0.0, 16.0), "alnum": (0.0, 1.0), "punctuation": (0.0, 1.0), "log_line": (0.0, 16.0), "log_perplexity": (0.0, 16.0)}
SIGMA = ("log_chars", "alnum", "punctuation", "log_line")


@dataclass(frozen=True)
class Outliers:
    """Where the model and the statistics lie, and what is an outlier."""
    lm: str = ""                                          # lm.npz; "" leaves perplexity out
    stats: str = ""                                       # stats.json; only `outliers` reads it
    order: int = 3                                        # 1: unigrams, 3: trigrams
    sigmas: float = 3.0                                   # 0 turns the rule off
    high: float = 0.99                                    # drop perplexity above this quantile of the source, 1 turns it off
    low: float = 0.005                                    # and below this one, 0 turns it off
    least: int = 100                                      # documents a source needs before it has outliers


@functools.lru_cache(maxsize=1)
def model(path):
    return lm.load(path)


def metrics(texts, cfg):
    """{metric: (len(texts),) float64}. alnum and punctuation are shares of the visible characters; log_line is the log of the
    mean length of a line that is not blank."""
    docs = [filters.Doc(text) for text in texts]
    visible = np.array([max(d.visible, 1) for d in docs], float)
    letters = np.array([sum(d.counts[filters.HAN:filters.DIGIT + 1]) for d in docs], float)
    lines = np.array([sum(map(len, d.lines)) / max(len(d.lines), 1) for d in docs], float)
    found = {"log_chars": np.log(np.maximum([len(t) for t in texts], 1)), "alnum": letters / visible,
             "punctuation": np.array([d.counts[filters.MARK] for d in docs], float) / visible, "log_line": np.log(np.maximum(lines, 1))}
    if cfg.lm:
        found["log_perplexity"] = np.log(lm.perplexity(model(cfg.lm), texts, cfg.order))
    return found


def bins(metric, values):
    """(n,) integers 0 .. BINS - 1; what lies outside of the range counts as its end."""
    low, high = METRICS[metric]
    return np.clip((np.asarray(values) - low) / (high - low) * BINS, 0, BINS - 1).astype(np.int64)


def measure(table, cfg):
    """{source: {metric: {"bin": documents}}} for the rows that no stage has dropped; ready for JSON, merged by `merge`."""
    stats = {}
    texts, sources, rows = kept_rows(table)
    found = metrics(texts, cfg) if texts else {}
    for source in sorted(set(sources)):
        chosen = np.array([s == source for s in sources])
        stats[source] = {}
        for metric, values in found.items():
            which, times = np.unique(bins(metric, values[chosen]), return_counts=True)
            stats[source][metric] = dict(zip(map(str, which.tolist()), times.tolist()))
    return stats


def merge(a, b):
    """The sum of two results of `measure`."""
    result = {source: {metric: dict(counts) for metric, counts in of_source.items()} for source, of_source in a.items()}
    for source, of_source in b.items():
        for metric, counts in of_source.items():
            into = result.setdefault(source, {}).setdefault(metric, {})
            for key, times in counts.items():
                into[key] = into.get(key, 0) + times
    return result


def histogram(counts):
    """(BINS,) int64 from {"bin": documents}."""
    array = np.zeros(BINS, np.int64)
    for key, times in counts.items():
        array[int(key)] = times
    return array


def mean_and_sd(metric, array):
    """Mean and standard deviation of a histogram, each document in the middle of its bin."""
    low, high = METRICS[metric]
    middle = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    mean = float((array * middle).sum() / array.sum())
    return mean, math.sqrt(float((array * (middle - mean) ** 2).sum() / array.sum()))


def quantile_bin(array, q):
    """The first bin at which a share of at least q of the documents lies in it or below."""
    return int(np.searchsorted(np.cumsum(array), q * array.sum()))


def limits(stats, cfg):
    """{source: {metric: (lowest kept, highest kept)}}: values for SIGMA, bins for log_perplexity. A source with fewer than
    cfg.least documents has none."""
    result = {}
    for source, of_source in stats.items():
        result[source] = {}
        for metric, counts in of_source.items():
            array = histogram(counts)
            if array.sum() < cfg.least:
                continue
            if metric in SIGMA and cfg.sigmas:
                mean, sd = mean_and_sd(metric, array)
                width = (METRICS[metric][1] - METRICS[metric][0]) / BINS
                reach = cfg.sigmas * max(sd, width)       # equal values differ by rounding only
                result[source][metric] = (mean - reach, mean + reach)
            elif metric == "log_perplexity":
                result[source][metric] = (quantile_bin(array, cfg.low) if cfg.low else 0, quantile_bin(array, cfg.high))
    return result


@functools.lru_cache(maxsize=4)
def limits_of(cfg):
    """`limits` of the file cfg.stats; raises UserError if it is missing or no result of `measure`."""
    try:
        return limits(json.loads(Path(cfg.stats).read_text(encoding="utf-8")), cfg)
    except (OSError, ValueError, AttributeError, KeyError, IndexError) as e:
        raise UserError(f"{cfg.stats}: no statistics of the outliers stage ({type(e).__name__}: {e}); measure first") from None


def kept_rows(table):
    """(texts, sources, row numbers) of the rows that have no drop_reason."""
    reasons = table["drop_reason"].to_pylist() if "drop_reason" in table.column_names else [None] * table.num_rows
    rows = [i for i, reason in enumerate(reasons) if reason is None]
    texts, sources = table["text"].to_pylist(), table["source"].to_pylist()
    return [texts[i] or "" for i in rows], [sources[i] or "" for i in rows], rows


def outliers(table, cfg):
    """Stage function: sets drop_reason of the rows that lie outside of their source's limits, to sigma_METRIC,
    perplexity_high or perplexity_low, the first that holds in the order of METRICS. A reason that is set stays."""
    texts, sources, rows = kept_rows(table)
    reasons = table["drop_reason"].to_pylist() if "drop_reason" in table.column_names else [None] * table.num_rows
    found, bounds = metrics(texts, cfg) if texts else {}, limits_of(cfg)
    for metric, values in found.items():
        measured = bins(metric, values) if metric == "log_perplexity" else values
        for i, row, source in zip(range(len(rows)), rows, sources):
            low, high = bounds.get(source, {}).get(metric, (-math.inf, math.inf))
            if reasons[row] is None and not low <= measured[i] <= high:
                reasons[row] = f"sigma_{metric}" if metric in SIGMA else "perplexity_high" if measured[i] > high else "perplexity_low"
    return columns.with_column(table, "drop_reason", reasons, pa.string())
