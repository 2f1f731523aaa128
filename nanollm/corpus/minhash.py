"""MinHash and locality-sensitive hashing, in numpy: from texts to signatures to band hashes.

A document is the set of its character n-grams (its shingles). How alike two sets are is the Jaccard similarity
J(A, B) = |A∩B| / |A∪B|. Under a random permutation pi of all shingles, min pi(A) = min pi(B) with probability J(A, B)
(Broder 1997), so the share of P independent permutations with equal minima estimates J with a standard deviation of
sqrt(J (1 - J) / P). The P minima are the signature: a fixed P * 4 bytes for a text of any length.

To find alike pairs among millions without comparing all, the signature is cut into b bands of r rows, and two documents
are candidates if one whole band is equal, which happens with probability 1 - (1 - J^r)^b: an S-curve in J (Leskovec,
Rajaraman & Ullman, Mining of Massive Datasets, chapter 3.4). A candidate is not yet a duplicate: dedup.py verifies.

Many documents are worked on at once. They lie in one flat array, document i at [offsets[i], offsets[i + 1]). Arithmetic
on unsigned integers wraps around, which is the modulo 2^32 or 2^64 that is meant.
"""
import hashlib
import re
import unicodedata
from functools import lru_cache

import numpy as np

from nanollm.config import UserError

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)       # odd; 2^64 / golden ratio, the usual choice for multiplicative hashing
EMPTY = np.uint32(0xFFFFFFFF)                    # the minimum over no shingles at all

# ---- the definitions, as short as they can be ------------------------------------------------------------------------


def shingles(text, n=5):
    """The set of character n-grams of `text`; a shorter text is one shingle, so that short texts match only if equal."""
    return {text[i:i + n] for i in range(max(len(text) - n, 0) + 1)} if text else set()


def jaccard(a, b):
    """|A∩B| / |A∪B| of two sets; 0 if both are empty."""
    both = len(a & b)
    return both / max(len(a) + len(b) - both, 1)


# ---- texts -> units --------------------------------------------------------------------------------------------------

DROPPED, SIGN, MARK, KEPT, DIGIT = range(5)
SIGNS = "*%‰％&@#\\_[]{}"                      # of arithmetic and code; + = < > and their like are symbols, which always stay
TABLE = 0x20000                                  # planes 0 and 1; nothing above is a blank, a mark or an upper case letter


@lru_cache(maxsize=1)
def character_tables():
    """(what becomes of each code point, uint8; what to add to get its lower case, int32)."""
    kind, shift = np.full(TABLE, KEPT, dtype=np.uint8), np.zeros(TABLE, dtype=np.int32)
    for code in range(TABLE):
        category, lower = unicodedata.category(chr(code)), chr(code).lower()
        if category[0] in "ZP" or category in ("Cc", "Cf"):
            kind[code] = DROPPED                 # blanks, punctuation, control and invisible characters
        elif category == "Nd":
            kind[code] = DIGIT
        if len(lower) == 1:
            shift[code] = ord(lower) - code
    kind[[ord(sign) for sign in SIGNS]] = SIGN
    kind[[ord(mark) for mark in "-./:"]] = MARK
    return kind, shift


def characters(texts, signs=False):
    """Code points of many texts as they are compared: NFC, lower case, without blanks and punctuation.

    Of the marks - . / : those directly before a digit stay: 1.5 is not 15, -5 is not 5 and 3/4 is not 34. With `signs` so do
    SIGNS, and one blank where anything else parts two digits: 50% is not 50, and 1 23 is not 12 3.
    Returns (uint32 array, int64 offsets of length len(texts) + 1).
    """
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    kind, shift = character_tables()
    # A line feed between the texts keeps one text's last mark from meeting the next one's first digit.
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = kind.take(codes, mode="clip")
    keep = kinds >= KEPT
    keep[:-1] |= (kinds[:-1] == MARK) & (kinds[1:] == DIGIT)
    if signs:
        keep |= kinds == SIGN
    kept = np.flatnonzero(keep)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts)], dtype=np.int64)
    offsets, codes = np.searchsorted(kept, starts), codes[kept]
    codes += shift.take(codes, mode="clip").astype(np.uint32)
    if signs:
        digit = kinds[kept] == DIGIT
        parted = np.flatnonzero(digit[1:] & digit[:-1] & (np.diff(kept) > 1)) + 1
        parted = parted[~np.isin(parted, offsets)]                          # two digits of one text
        codes, offsets = np.insert(codes, parted, ord(" ")), offsets + np.searchsorted(parted, offsets)
    return codes, offsets


WORD = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|"           # one kana, one Han
                  "[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")      # or a run of others


def words(text):
    """The words of a text, lower case: runs of letters and digits; each Han or kana character is one of its own."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def jieba_words(text):
    """The words of a text as jieba segments it (extra `jieba`), lower case, without blanks and punctuation."""
    try:
        import jieba
    except ImportError:
        raise UserError("shingle = jieba needs the package jieba: pip install -e '.[jieba]'") from None
    jieba.setLogLevel("WARNING")
    return [word for word in jieba.cut(unicodedata.normalize("NFC", text).lower()) if WORD.match(word)]


@lru_cache(maxsize=1 << 18)
def word_number(word):
    """64 bits that stand for a word in every process; Python's own hash() is salted."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def units(texts, shingle="char"):
    """What a shingle is made of: "char" characters, "word" words, "jieba" segmented words.

    Returns (uint64 numbers that stand for them, int64 offsets of length len(texts) + 1).
    """
    if shingle == "char":
        codes, offsets = characters(texts)
        return codes.astype(np.uint64), offsets
    if shingle not in ("word", "jieba"):
        raise UserError(f"--shingle: {shingle!r} is none of char, word, jieba")
    rows = [[word_number(word) for word in (words if shingle == "word" else jieba_words)(text)] for text in texts]
    flat = np.array([number for row in rows for number in row], dtype=np.uint64)
    return flat, np.cumsum([0, *map(len, rows)], dtype=np.int64)


# ---- units -> shingles -----------------------------------------------------------------------------------------------

def fmix64(h):
    """The finalizer of MurmurHash3, in place: a bijection of 64 bits after which every bit depends on every other."""
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1)):
        h ^= h >> np.uint64(shift)
        h *= np.uint64(factor)
    return h


def fmix32(h):
    """The same for 32 bits: what datasketch's affine32 does to each hash before it permutes (h is not changed)."""
    h = h ^ (h >> np.uint32(16))
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def ngrams(numbers, offsets, n=5):
    """The n-grams of each document's units as 64-bit hashes, repeats and all: (uint64 hashes, int64 offsets).

    The hash of the n-gram u_1 .. u_n is the polynomial u_1 x^(n-1) + ... + u_n at x = MULTIPLIER, mixed. A document of
    fewer than n units has one shingle, all of it; one without units has none.
    """
    lengths, places = np.diff(offsets), max(len(numbers) - n + 1, 0)
    h = np.zeros(len(numbers), dtype=np.uint64)
    for k in range(n):                                                      # Horner's rule, at all places at once
        h[:places] *= MULTIPLIER
        h[:places] += numbers[k:k + places]
    near_end = (offsets[1:, None] - np.arange(1, n)).ravel()                # here the n-gram would run into the next document
    whole = np.ones(len(numbers), dtype=bool)
    whole[near_end[near_end >= 0]] = False
    short = np.flatnonzero((lengths > 0) & (lengths < n))
    first = offsets[short]
    h[first], whole[first] = 0, True
    for k in range(n - 1):
        longer = first[lengths[short] > k]
        h[longer] = h[longer] * MULTIPLIER + numbers[longer + k]
    counts = np.maximum(lengths - n + 1, lengths > 0)
    return fmix64(h[whole]), np.concatenate([[0], np.cumsum(counts)])


def upper_half(hashes):
    """The upper 32 bits of 64-bit hashes, as uint32: what MinHash is fed with."""
    return (hashes >> np.uint64(32)).astype(np.uint32)


# ---- shingles -> signatures ------------------------------------------------------------------------------------------

@lru_cache(maxsize=8)
def permutations(num_perm, seed=1):
    """(a, b), uint32, of the permutations h -> a h + b mod 2^32 with a odd: those of datasketch.MinHash(scheme="affine32").

    An odd a has an inverse modulo 2^32, so each map is a bijection. (The older a h + b mod (2^61 - 1), computed in uint64,
    overflows before the modulo and is then not the universal family that it is taken for.) RandomState, because its
    stream is frozen: the same numbers with every version of numpy.
    """
    random = np.random.RandomState(seed)
    a = random.randint(0, 1 << 31, num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, random.randint(0, 1 << 32, num_perm, dtype=np.uint32)


COLUMNS, ROWS = 16_384, 8                        # of the work buffer: 512 KB, which a core's second cache holds


def signatures(hashes, offsets, num_perm=256, seed=1):
    """MinHash signatures, (documents, num_perm) uint32, of the 32-bit hashes of each document's shingles.

    sig[i, k] = min over the shingles x of document i of a_k fmix32(x) + b_k mod 2^32; equal to datasketch's, bit for bit.
    Repeated shingles change no minimum, so nothing needs to be made a set. Instead of document by document, the flat
    array is walked in blocks of COLUMNS shingles x ROWS permutations, in one buffer that stays in the cache; the minimum
    of each document's stretch of a block is one `reduceat`. A document may lie across blocks.
    """
    a, b = (x[:, None] for x in permutations(num_perm, seed))
    full = np.flatnonzero(np.diff(offsets))                                 # reduceat knows no empty stretch
    starts, x = offsets[full], fmix32(hashes)
    minima = np.full((num_perm, len(full)), EMPTY)
    buffer = np.empty(COLUMNS * ROWS, dtype=np.uint32)
    for left in range(0, len(x), COLUMNS):
        block = x[left:left + COLUMNS]
        first = np.searchsorted(starts, left, "right") - 1                  # the document that the block begins in
        last = np.searchsorted(starts, left + len(block))
        cuts = np.maximum(starts[first:last] - left, 0)
        for k in range(0, num_perm, ROWS):
            work = buffer[:len(a[k:k + ROWS]) * len(block)].reshape(-1, len(block))
            np.multiply(a[k:k + ROWS], block, out=work)
            np.add(work, b[k:k + ROWS], out=work)
            rows = minima[k:k + ROWS, first:last]
            np.minimum(rows, np.minimum.reduceat(work, cuts, axis=1), out=rows)
    result = np.full((len(offsets) - 1, num_perm), EMPTY)
    result[full] = minima.T
    return result


@lru_cache(maxsize=8)
def probes(num_perm, seed=1):
    """For each bin, all bins in a random order: where an empty bin looks for a value. (num_perm, num_perm) int64."""
    return np.argsort(np.random.RandomState(seed).random_sample((num_perm, num_perm)), axis=1, kind="stable")


def one_permutation(hashes, offsets, num_perm=256, seed=1):
    """Signatures from one permutation instead of num_perm: each 64-bit shingle hash falls into the bin that its high bits
    name, and competes there with its low bits (Li, Owen & Zhang 2012).

    A bin that stays empty takes the minimum of the first full bin in an order of its own, the same order in every
    document; then again P[sig_k(A) = sig_k(B)] = J(A, B) (optimal densification: Shrivastava 2017). The work per shingle
    does not grow with num_perm. Not comparable with the signatures of `signatures`.
    """
    documents = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    bins = ((hashes >> np.uint64(32)) * np.uint64(num_perm) >> np.uint64(32)).astype(np.int64)
    flat = np.full((len(offsets) - 1) * num_perm, EMPTY)
    np.minimum.at(flat, documents * num_perm + bins, hashes.astype(np.uint32))
    minima = flat.reshape(-1, num_perm)
    result, order = minima.copy(), probes(num_perm, seed)
    rows, columns = np.nonzero((minima == EMPTY) & (np.diff(offsets) > 0)[:, None])
    for k in range(num_perm):
        found = minima[rows, order[columns, k]]
        result[rows, columns] = found
        rows, columns = rows[found == EMPTY], columns[found == EMPTY]
        if not len(rows):
            break
    return result


# ---- signatures -> bands ---------------------------------------------------------------------------------------------

def band_hashes(signature, bands, rows):
    """(documents, bands) uint64: one number for each band of `rows` values, equal if the bands are."""
    values = signature[:, :bands * rows].reshape(-1, bands, rows)
    h = np.zeros(values.shape[:2], dtype=np.uint64)
    for k in range(rows):
        h *= MULTIPLIER
        h += values[:, :, k]
    return fmix64(h)


def candidate_probability(similarity, bands, rows):
    """1 - (1 - s^r)^b: the chance that a pair of Jaccard similarity s has a band in common and so is looked at."""
    return 1 - (1 - similarity ** rows) ** bands


def miss(similarity, bands, rows):
    """The chance that a pair is never looked at."""
    return (1 - similarity ** rows) ** bands


@lru_cache(maxsize=64)
def bands_and_rows(threshold, num_perm, fp_weight=0.5, fn_weight=0.5):
    """(bands, rows) with bands * rows <= num_perm that make the weighted area of the two errors smallest:

        fp_weight * integral_0^t P(s) ds + fn_weight * integral_t^1 (1 - P(s)) ds,      P(s) = 1 - (1 - s^r)^b

    datasketch.MinHashLSH's rule. P is a polynomial of degree b r, which Gauss-Legendre integrates exactly with
    (b r + 1) / 2 nodes. With equal weights about half of the pairs right at the threshold are found: the "threshold" is
    where the curve is steep, not a promise.
    """
    nodes, weights = np.polynomial.legendre.leggauss(num_perm // 2 + 1)     # for the interval [-1, 1]
    below, above = threshold * (nodes + 1) / 2, threshold + (1 - threshold) * (nodes + 1) / 2
    best, choice = np.inf, None
    for bands in range(1, num_perm + 1):
        for rows in range(1, num_perm // bands + 1):
            false_positive = threshold / 2 * weights @ candidate_probability(below, bands, rows)
            false_negative = (1 - threshold) / 2 * weights @ miss(above, bands, rows)
            if (error := fp_weight * false_positive + fn_weight * false_negative) < best:
                best, choice = error, (bands, rows)
    return choice


def expected_candidates(sample, bands, rows, threshold):
    """From the signatures of a random sample, (n, P): how often a pair of documents is a candidate although it lies below
    the threshold. (mean over the n (n - 1) / 2 pairs, by the signatures' own estimate of J.)

    Of a pair whose signatures agree in m of P places, a band of r random places agrees with probability
    C(m, r) / C(P, r): an unbiased estimate of J^r even where J is tiny, unlike (m / P)^r. Pairs that are rare and far above
    the rest (a series of texts with one preface) may be absent from a sample; then there will be more than this.
    """
    n, num_perm = sample.shape
    agree = np.zeros(num_perm + 1, dtype=np.int64)                          # how many pairs agree in m places
    for i in range(n - 1):
        agree += np.bincount(np.count_nonzero(sample[i + 1:] == sample[i], axis=1), minlength=num_perm + 1)
    m = np.arange(num_perm + 1)
    band = np.prod([np.maximum(m - k, 0) / (num_perm - k) for k in range(rows)], axis=0)
    chance = np.where(m < threshold * num_perm, 1 - (1 - band) ** bands, 0)
    return float(agree @ chance) / max(n * (n - 1) / 2, 1)


def plot_s_curve(path, settings):
    """Draw 1 - (1 - s^r)^b over s for `settings`, {label: (bands, rows)}, into the picture `path` (extra `plot`)."""
    try:
        from matplotlib.figure import Figure                                # without pyplot: no window system is asked for
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install -e '.[plot]'") from None
    similarity, axes = np.linspace(0, 1, 501), Figure(figsize=(7, 4.5)).subplots()
    for label, (bands, rows) in settings.items():
        axes.plot(similarity, candidate_probability(similarity, bands, rows), label=f"{label}: {bands} x {rows}")
    axes.set(xlabel="Jaccard similarity s of a pair", ylabel="P(candidate) = 1 - (1 - s^r)^b", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=120)
