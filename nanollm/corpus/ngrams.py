"""Hashes of n-grams over a batch of documents at once: the arithmetic under SimHash, soft deduplication and decontamination.

A *unit* is one Han or kana character, one run of letters, or one run of digits; blanks and punctuation only part units.
So 13 units are 13 words of English, and about 8 words of Chinese. Before hashing, a character is folded: lower case, no
accents, full-width forms as ASCII. Folding is for comparing only; the text itself never changes.

Everything is numpy on the flat array of a batch's characters, no Python loop over characters or n-grams. The sum
P[i] = sum_{j<i} x[j] B^j (mod 2^64) gives the polynomial hash of any slice, sum_{i<=j<e} x[j] B^(j-i), as
(P[e] - P[i]) B^-i: B is odd, hence invertible (Karp & Rabin 1987). The result depends on the slice alone, not on where it
stands, so neither on the batch.
"""
import hashlib
import unicodedata
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nanollm.sampler import GAMMA, mix64, uniform        # GAMMA is the base B of the hash

CHUNK = 1 << 17                           # characters hashed at a time: the arrays stay in the processor's cache
BLANKS = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)
HAN, LETTER, DIGIT = 1 << 24, 2 << 24, 3 << 24                                         # kind of unit, above the code point
HAN_RANGES = ((0x3005, 0x3008), (0x3041, 0x3100), (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00),
              (0xFF66, 0xFFA0), (0x20000, 0x33480))


def draws(seed, numbers, purpose):
    """A float64 in [0, 1) for each of `numbers` (N,), the same in every run: sampler.uniform. `purpose` keeps decisions with
    one seed apart: else the documents that survive one draw would be the ones that survive the next."""
    key = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return uniform(int.from_bytes(key, "little"), numbers)


@lru_cache(maxsize=1)
def folding():
    """uint32 (0x110000,): what each code point counts as, the folded character and its kind of unit; 0 parts units."""
    table = np.zeros(0x110000, dtype=np.uint32)
    for code in range(HAN_RANGES[-1][1]):                 # nothing but tags and private characters beyond
        char = chr(code)
        category = unicodedata.category(char)[0]
        if category not in "LMN":
            continue
        parts = unicodedata.normalize("NFKD", char)       # é is e and an accent, Ａ is A, ② is 2, が is か and a voice mark
        if len(parts) > 1 and all(unicodedata.combining(c) for c in parts[1:]):
            parts = parts[0]
        char = parts.lower() if len(parts.lower()) == 1 else char
        han = any(first <= ord(char) < end for first, end in HAN_RANGES)
        table[code] = ord(char) | (HAN if han else DIGIT if category == "N" else LETTER)
    return table


@lru_cache(maxsize=2)
def powers(n):
    """(B^i, B^-i) mod 2^64 for i < n, two uint64 arrays."""
    steps = np.full((2, n), [[GAMMA], [pow(GAMMA, -1, 2**64)]], dtype=np.uint64)
    steps[:, 0] = 1
    return np.cumprod(steps, axis=1, dtype=np.uint64)


class Slices:
    """Polynomial hashes of slices of one array `x` (N,) of integers."""

    def __init__(self, x):
        # Sizes are powers of two, so that the table of powers is computed a few times in a run and not for each batch.
        self.forward, self.back = powers(1 << max(18, len(x).bit_length()))
        self.sums = np.zeros(len(x) + 1, dtype=np.uint64)
        np.cumsum(x * self.forward[: len(x)], dtype=np.uint64, out=self.sums[1:])

    def hash(self, starts, ends):
        """uint64 hashes of x[starts:ends], each a pair of index arrays (M,) or of slice objects of equal length."""
        return mix64((self.sums[ends] - self.sums[starts]) * self.back[starts])


class Units(NamedTuple):
    """The units of a batch of documents, flat."""
    hashes: np.ndarray                    # uint64 (U,)
    starts: np.ndarray                    # int64 (U,): first character, in the document
    ends: np.ndarray                      # int64 (U,): one past the last
    offsets: np.ndarray                   # int64 (D + 1,): document d has the units offsets[d]:offsets[d + 1]


def code_points(texts):
    """(uint32 (N,), int64 (D + 1,)): all characters of the texts and where each document begins."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return points, np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int64)


def chunks(texts, limit=CHUNK):
    """Yield (first, end): runs of documents of about `limit` characters together."""
    first, size = 0, 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= limit:
            yield first, number + 1
            first, size = number + 1, 0
    if first < len(texts):
        yield first, len(texts)


def units(texts):
    """Units of a list of strings."""
    points, begins = code_points(texts)
    folded = np.append(folding()[points], np.uint32(0))   # a 0 at the end closes the last unit
    kinds = folded & np.uint32(0xFF000000)
    edges = kinds[1:] != kinds[:-1]                       # (N,): whether the next character is of another kind
    edges |= kinds[:-1] == HAN
    edges[begins[1:][begins[1:] > 0] - 1] = True
    ends = np.flatnonzero(edges) + 1                      # of runs of one kind; kind 0 is no unit
    starts, real = np.append(0, ends[:-1]), kinds[ends - 1] != 0
    starts, ends = starts[real], ends[real]
    offsets = np.searchsorted(ends, begins, side="right")
    shift = np.repeat(begins[:-1], np.diff(offsets))
    return Units(Slices(folded).hash(starts, ends), starts - shift, ends - shift, offsets)


def ranges(starts, counts):
    """The integers starts[i], …, starts[i] + counts[i] - 1 of each i, one after the other."""
    return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)


def windows(offsets, n, whole=False):
    """(starts, ends, counts): all slices of n consecutive units, document by document, and how many each document has.
    A document of fewer than n units has none, or with `whole` one slice of everything (and none only if it has no unit)."""
    sizes = np.diff(offsets)
    counts = np.maximum(sizes - n + 1, (sizes > 0) if whole else 0)
    starts = ranges(offsets[:-1], counts)
    ends = starts + n
    return starts, np.minimum(ends, np.repeat(offsets[1:], counts)) if whole else ends, counts


def shingles(texts, n):
    """(hashes uint64 (S,), counts int64 (D,)): the n-unit shingles of each document in order, repetitions included."""
    batch = units(texts)
    starts, ends, counts = windows(batch.offsets, n, whole=True)
    return Slices(batch.hashes).hash(starts, ends), counts


def distinct(x):
    """The different values of an integer array, sorted. np.unique says the same through a hash table, several times slower."""
    x = np.sort(x)
    return x[np.append(True, x[1:] != x[:-1])[: len(x)]]


def document_frequency(texts, n, bits=20):
    """int64 (2^bits,): in how many of the texts each n-unit shingle occurs, shingles being told apart by `bits` bits of
    their hash. Adding the arrays of two batches gives that of both."""
    total = np.zeros(1 << bits, dtype=np.int64)
    for first, end in chunks(texts):
        hashes, counts = shingles(texts[first:end], n)
        keys = (np.repeat(np.arange(end - first), counts) << bits) | (hashes >> np.uint64(64 - bits)).astype(np.int64)
        np.add.at(total, distinct(keys) & ((1 << bits) - 1), 1)
    return total


def idf(frequency, documents):
    """ln((1 + D) / (1 + df)) of each bucket, float64: 0 for what is in every one of D documents (Spärck Jones 1972)."""
    return np.log((1 + documents) / (1 + frequency))
