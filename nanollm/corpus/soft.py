"""Soft deduplication: a repeated document is not deleted but weighs less, so that a model sees it more seldom.

(i)  tf-idf. The nearest earlier neighbour of a document among its candidate pairs (from MinHash or SimHash) has cosine s;
     the weight is 1 for s < 1/2 and falls in a straight line to 0 at s = 1, but not below 0.1. Only *earlier* neighbours
     count: else both copies of a text would weigh 0.1, and together less than a text that has none.
(ii) SoftDedup (He et al. 2024). A 4-gram model of the corpus gives each document its commonness p(x), the geometric mean
     of its units' probabilities; in K buckets of equal size the weight is proportional to 1 / p. Their model is Kneser-Ney's;
     ours interpolates with a Dirichlet prior (MacKay & Peto 1995), which needs no more than counts, and leaves each
     occurrence out of its own estimate (Ney, Essen & Kneser 1994): else a small corpus knows all its texts by heart, and
     what occurs once looks half as common as what occurs a thousand times. The rarest texts are noise: filter before.

Both write the column `weight`; `thin` turns it into how often a document is used. N-grams are counted in tables of
2^bits buckets, so memory is fixed, and the tables of two halves of a corpus add up to that of the whole. In a full table
every n-gram meets another one and looks common; so (ii) counts a sample of the documents once a corpus has more than
2^bits / 4 units.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from nanollm.config import UserError
from nanollm.corpus import columns, ngrams

ORDER = 4                                 # SoftDedup's n-grams
PRIOR = 1.0                               # strength of the shorter history in each conditional probability
FINE = 1 << 16                            # log2 p is summed in whole 1/65536 bits: exact, whatever the order


@dataclass(frozen=True)
class Soft:
    nearest: str = ""                     # (i) .npy, float32: the cosine to the nearest earlier neighbour by docno
    counts: str = ""                      # (ii) .npy: the summed count_ngrams
    buckets: str = ""                     # (ii) .npz of save_buckets
    bits: int = 24                        # (ii) 2^bits counters of 4 bytes for each of 4 orders: 256 MiB
    sample: float = 1.0                   # (ii) share of the documents that are counted
    seed: int = 0                         # of the sample and of thin


@lru_cache(maxsize=4)
def load(path):
    """An .npy or .npz file of statistics. Raises UserError if it cannot be read."""
    try:
        file = np.load(path, mmap_mode="r")             # the tables are large, and the workers share one copy
        return dict(file) if isinstance(file, np.lib.npyio.NpzFile) else file
    except (OSError, ValueError) as e:
        raise UserError(f"soft deduplication: cannot read the statistics {path}: {e}; gather them again") from None


# ---- (i) tf-idf ------------------------------------------------------------------------------------------------------

def tfidf(texts, frequency, documents, n=2):
    """(keys int64, values float64): the vectors of the texts, of length 1, as sorted document * 2^bits + bucket.

    tf * idf over n-unit shingles, with `frequency` (2^bits,) from ngrams.document_frequency of the corpus.
    """
    hashes, counts = ngrams.shingles(texts, n)
    bits = len(frequency).bit_length() - 1
    document = np.repeat(np.arange(len(texts)), counts)
    keys, tf = np.unique((document << bits) | (hashes >> np.uint64(64 - bits)).astype(np.int64), return_counts=True)
    values = tf * ngrams.idf(frequency, documents)[keys & ((1 << bits) - 1)]
    norms = np.sqrt(np.bincount(keys >> bits, values**2, minlength=len(texts)))
    return keys, values / np.maximum(norms, 1e-30)[keys >> bits]


def cosines(texts, pairs, frequency, documents, n=2):
    """float64 (M,): the cosine of the tf-idf vectors of texts[i] and texts[j] for each row (i, j) of `pairs`."""
    keys, values = tfidf(texts, frequency, documents, n)
    bits = len(frequency).bit_length() - 1
    i, j = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    first = np.searchsorted(keys, np.arange(len(texts) + 1) << bits)
    counts = np.diff(first)[i]
    left, pair = ngrams.ranges(first[i], counts), np.repeat(np.arange(len(i)), counts)
    wanted = (j[pair] << bits) | (keys[left] & ((1 << bits) - 1))          # each entry of i in the vector of j
    place = np.searchsorted(keys, wanted)
    place[place == len(keys)] = 0
    products = (keys[place] == wanted) * values[left] * values[place]
    return np.minimum(np.bincount(pair, products, minlength=len(i)), 1.0)


def nearest_earlier(pairs, similarity, documents):
    """float32 (documents,): the largest similarity (M,) of each document to one with a smaller number, 0 if there is none;
    the rows of `pairs` (M, 2) are document numbers."""
    result = np.zeros(documents, dtype=np.float32)
    np.maximum.at(result, np.max(pairs, axis=1), similarity)
    return result


def weigh_nearest(table, cfg):
    """Stage function (i): weight = 1 for s < 1/2, else (1 - s) / (1/2), at least 0.1."""
    s = load(cfg.nearest)[columns.numbers(table)]
    return columns.with_column(table, "weight", np.clip((1 - s) / 0.5, 0.1, 1.0).astype(np.float32))


# ---- (ii) commonness -------------------------------------------------------------------------------------------------

def sampled(table, cfg):
    """bool (D,): the documents whose n-grams are counted."""
    return ngrams.draws(cfg.seed, columns.numbers(table), "soft sample") < cfg.sample


def count_ngrams(table, cfg, counts=None):
    """uint32 (ORDER, 2^bits): how often each n-gram of 1 to ORDER units stands in the sampled documents of the table, added
    to `counts` in place if given. The arrays of several parts of a corpus add up."""
    counts = np.zeros((ORDER, 1 << cfg.bits), dtype=np.uint32) if counts is None else counts
    texts = table["text"].filter(pa.array(sampled(table, cfg))).to_pylist()
    for first, end in ngrams.chunks(texts):
        batch = ngrams.units(texts[first:end])
        for order in range(1, ORDER + 1):
            buckets, _ = buckets_of(batch, order, cfg.bits)
            np.add.at(counts[order - 1], buckets, np.uint32(1))
    return counts


def buckets_of(batch, order, bits):
    """(buckets int64, first units int64) of all n-grams of `order` units."""
    starts, ends, _ = ngrams.windows(batch.offsets, order)
    return (ngrams.Slices(batch.hashes).hash(starts, ends) >> np.uint64(64 - bits)).astype(np.int64), starts


def commonness_of(texts, counts, counted):
    """float32 (D,): the geometric mean of p(unit | up to 3 units before it); 0 for a text without units.

        p_0 = 1 / 2^bits        p_n(w | h) = (c(h w) + PRIOR p_{n-1}(w | h')) / (c(h) + PRIOR)

    where h' is h without its first unit, and c the number in `counts` (from count_ngrams), less one if the text was
    `counted` (D,) too.
    """
    bits, total = counts.shape[1].bit_length() - 1, float(counts[0].sum(dtype=np.int64))
    result = np.zeros(len(texts), dtype=np.float32)
    for first, end in ngrams.chunks(texts):
        batch = ngrams.units(texts[first:end])
        own = np.repeat(np.asarray(counted[first:end], dtype=np.float64), np.diff(batch.offsets))
        seen = total - own                                # c of the n-gram that ends at each unit; now n = 0
        p = np.full(len(batch.hashes), 2.0**-bits)
        for order in range(1, ORDER + 1):
            buckets, starts = buckets_of(batch, order, bits)
            last = starts + order - 1
            history = seen[last - 1] if order > 1 else seen
            others = counts[order - 1][buckets] - own[last]
            p[last] = np.minimum((others + PRIOR * p[last]) / (history + PRIOR), 1.0)
            seen[last] = others
        bits_used = np.append(0, np.cumsum(np.rint(-np.log2(p) * FINE).astype(np.int64)))
        sizes = np.diff(batch.offsets)
        mean = (bits_used[batch.offsets[1:]] - bits_used[batch.offsets[:-1]]) / FINE / np.maximum(sizes, 1)
        result[first:end] = np.where(sizes > 0, 2.0**-mean, 0.0)
    return result


def commonness(table, cfg):
    """Stage function: the column `commonness`. All its values together go into save_buckets. Raises UserError if the tables
    are too full to tell n-grams apart."""
    counts, texts = load(cfg.counts), table["text"].to_pylist()
    total, room = int(counts[0].sum(dtype=np.int64)), counts.shape[1] // 4
    if total > room:
        raise UserError(f"soft deduplication: {total:,} units were counted in tables for {room:,}; count again with a sample "
                        f"of {cfg.sample * room / total:.2g} of the documents, or with more bits")
    return columns.with_column(table, "commonness", commonness_of(texts, counts, sampled(table, cfg)), pa.float32())


def save_buckets(values, out, buckets=20, ratio=10.0, largest=0.0):
    """Write {"edges", "weights"} of the commonness `values` (D,) of a corpus to the .npz file `out`.

    Buckets of equal size by quantiles; the weight is proportional to 1 / mean p of the bucket, the largest at most `ratio`
    times the smallest, and 1 on the average over documents, so that the corpus keeps its size; or at most `largest`, if
    given: with 1, `thin` never repeats a document.
    """
    values = np.sort(np.asarray(values, dtype=np.float64))
    parts = np.array_split(values, min(buckets, len(values)))
    means = np.maximum([part.mean() for part in parts], 1e-30)
    weights = np.clip(np.median(means) / means, ratio**-0.5, ratio**0.5)
    weights /= weights.max() / largest if largest else np.average(weights, weights=[len(part) for part in parts])
    np.savez(out, edges=np.array([part[0] for part in parts[1:]], dtype=np.float32), weights=weights)


def weigh_commonness(table, cfg):
    """Stage function (ii): the weight of the bucket in which the column `commonness` lies."""
    buckets = load(cfg.buckets)
    place = np.searchsorted(buckets["edges"], table["commonness"].to_numpy(), side="right")
    return columns.with_column(table, "weight", buckets["weights"][place].astype(np.float32))


# ---- using the weights -----------------------------------------------------------------------------------------------

def thin(table, cfg):
    """Stage function: the column `repeats` (int32), how often a document is used: weight 2.3 means twice, and a third time
    with probability 0.3, drawn by splitmix64(seed, docno). With 0 the document is dropped as "thinned"."""
    weight = table["weight"].to_numpy().astype(np.float64)
    if not (np.isfinite(weight) & (weight >= 0)).all():
        raise UserError("soft deduplication: a weight that is negative or not a number; gather the statistics again")
    whole = np.floor(weight)
    repeats = whole + (ngrams.draws(cfg.seed, columns.numbers(table), "thin") < weight - whole)
    return columns.drop(columns.with_column(table, "repeats", repeats.astype(np.int32)), repeats == 0, "thinned")
