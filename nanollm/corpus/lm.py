"""A character language model that fits one screen: interpolated trigrams from hashed counts in fixed memory.

    p1(c)     = (N(c)   + 1)           / (N + V)              V = number of code points
    p2(c|b)   = (N(bc)  + K * p1(c))   / (N(b)  + K)
    p3(c|ab)  = (N(abc) + K * p2(c|b)) / (N(ab) + K)
    perplexity(text) = exp(-1/n * sum of log p3 over its n characters and its end)

Each order leans on the one below with the weight of K imagined observations (MacKay & Peto 1995), so it needs no
held-out data for its weights. A context that is seen often trusts its own counts, a new one the lower order.

Counts live in arrays indexed by a hash of the n-gram, so memory does not grow with the corpus, models of two parts merge by
addition, and all texts of a batch are scored at once. A collision lends one n-gram the counts of another. Noise gains most
by it, since all its n-grams are rare: with four characters a slot most of it passes for text. So of a large corpus only
a sample is counted, at most half a character a slot (`share_for`).

A text that was counted knows itself: each trigram of random characters follows its context every single time, which would
make noise the most probable text of the corpus. So `perplexity` leaves the text's own counts out.
"""
import hashlib
import zipfile
from dataclasses import dataclass

import numpy as np

from nanollm.config import UserError
from nanollm.corpus import ngrams

V, K = 0x110000, 20.0
START, OPEN, CLOSE = 1, 2, 3                              # code points around each text; no clean text has them
BATCH = 2**15                                             # characters at once, about: what fits into the cache is three times faster


@dataclass(frozen=True, eq=False)
class CharLM:
    """Counts: `one` (V,), `two` and `three` (2^bits,) int64; `share` of the texts that were counted, chosen by content."""
    one: np.ndarray
    two: np.ndarray
    three: np.ndarray
    share: float = 1.0


def counted(text, share):
    """Does this text belong to the share that is counted? By its content, so that it does not depend on the order."""
    return share >= 1 or int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") < share * 2**64


def share_for(n_chars, bits=22):
    """The share of a corpus of `n_chars` characters that has half a character a slot of a table of 2^bits slots."""
    return min(1.0, 2**bits / 2 / max(n_chars, 1))


def grams(texts, bits):
    """(codes, pairs, triples, predicted, text_of), one entry a position of the joined texts, START OPEN text CLOSE each: the
    code point, the hashes (below 2^bits) of the two and three characters that end there, whether it is predicted (the text
    and its CLOSE are), and the number of its text."""
    joined = "".join(f"{chr(START)}{chr(OPEN)}{text}{chr(CLOSE)}" for text in texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    lengths = np.array([len(text) + 3 for text in texts])
    starts = np.cumsum(lengths) - lengths
    before, before2 = np.roll(codes, 1), np.roll(codes, 2)
    before[starts] = before2[starts] = before2[starts + 1] = 0          # nothing reaches into the text before
    predicted = np.ones(len(codes), bool)
    predicted[starts] = predicted[starts + 1] = False
    pairs = before << np.uint64(21) | codes               # a code point has 21 bits, so three of them fit exactly
    triples = before2 << np.uint64(42) | pairs
    return codes.astype(np.int64), slots(pairs, bits), slots(triples, bits), predicted, np.repeat(np.arange(len(texts)), lengths)


def slots(keys, bits):
    """uint64 keys as table indices below 2^bits (the mixing steps of splitmix64, Steele et al. 2014)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (keys >> np.uint64(64 - bits)).astype(np.int64)


def count(texts, bits=22, share=1.0):
    """The CharLM of a list of texts: 76 MB at 22 bits, whatever their number."""
    lm = CharLM(np.zeros(V, np.int64), np.zeros(2**bits, np.int64), np.zeros(2**bits, np.int64), share)
    texts = [text for text in texts if counted(text, share)]
    for first, end in ngrams.chunks(texts, BATCH):
        for table, keys in zip((lm.one, lm.two, lm.three), grams(texts[first:end], bits)):
            np.add.at(table, keys, 1)
    return lm


def merge(a, b):
    """The model of the texts of both, which must have been counted with the same bits and share."""
    return CharLM(a.one + b.one, a.two + b.two, a.three + b.three, a.share)


def own_counts(keys, text_of):
    """For each position, how often its key occurs in its text."""
    _, which, times = np.unique(text_of.astype(np.int64) << 32 | keys, return_inverse=True, return_counts=True)
    return times[which]


def perplexity(lm, texts, order=3, leave_out=True):
    """(len(texts),) float64: the perplexity of each text a character, by the formula on top, up to p1, p2 or p3 (`order`).

    `leave_out` takes the text's own counts off first; say False for texts that were not counted (held out).
    """
    bits, results = len(lm.two).bit_length() - 1, []
    total = int(lm.one.sum() - lm.one[START] - lm.one[OPEN])            # those two are never predicted
    for first, end in ngrams.chunks(texts, BATCH):
        batch = texts[first:end]
        codes, pairs, triples, predicted, text_of = grams(batch, bits)
        n1, n2, n3, n = lm.one[codes], lm.two[pairs], lm.three[triples], np.full(len(codes), total)
        lengths = np.array([len(text) + 1 for text in batch])
        if leave_out:
            mine = np.array([counted(text, lm.share) for text in batch])[text_of]
            n1, n2, n3 = (np.maximum(table - mine * own_counts(keys, text_of), 0) for table, keys in ((n1, codes), (n2, pairs), (n3, triples)))
            n = n - mine * lengths[text_of]
        at = np.flatnonzero(predicted)
        p = (n1[at] + 1) / (n[at] + V)
        if order >= 2:
            p = (n2[at] + K * p) / (n1[at - 1] + K)
        if order >= 3:
            p = (n3[at] + K * p) / (n2[at - 1] + K)
        sums = np.bincount(text_of[at], np.log(np.minimum(p, 1)), minlength=len(batch))       # > 1 only by a collision
        results.append(np.exp(-sums / lengths))
    return np.concatenate(results) if results else np.zeros(0)


def save(lm, path):
    """Compressed .npz; the same counts give the same bytes."""
    with open(path, "wb") as f:
        np.savez_compressed(f, one=lm.one, two=lm.two, three=lm.three, share=lm.share)


def load(path):
    """The CharLM that `save` has written; raises UserError if it is missing or damaged."""
    try:
        with np.load(path) as data:
            return CharLM(data["one"], data["two"], data["three"], float(data["share"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is no language model of the outliers stage ({type(e).__name__}: {e}); run that stage again") from None
