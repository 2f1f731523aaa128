"""SimHash: 64 bits for a document, in which similar documents differ in few places (Charikar 2002; Manku et al. 2007).

    features    the n-unit shingles of the text, each with a weight w: 1 for each occurrence, or tf-idf
    hash        64 bits for each feature, the same in every process (Python's hash() of a str is salted)
    accumulate  for each of the 64 positions: + w if the feature's bit is 1, - w if it is 0
    sign        bit i of the fingerprint is 1 where the sum is positive

The bit of a random hyperplane differs between two feature vectors with probability angle / pi, so the Hamming distance of
two fingerprints estimates the angle between the documents. Two documents count as near if it is at most k.

Pairs within k are found without comparing all: cut the 64 bits into k + 1 blocks. k differing bits touch at most k blocks,
so at least one block is equal (pigeonhole); and cutting the other bits again, one of their k + 1 blocks is equal, too. Sort
by each such pair of blocks and compare inside the runs of equal values (dedup.simhash_edges).
"""
import numpy as np

from nanollm.corpus import ngrams

IDF_STEPS = 16                            # idf weights are whole numbers of 1/16: integer sums do not depend on their order


def fingerprints(texts, n=3, frequency=None, documents=0):
    """uint64 (D,): the SimHash of each text over its n-unit shingles; a text without letters or digits has 0.

    Each occurrence of a shingle adds 1 or, given the corpus' `frequency` (ngrams.document_frequency with the same n) and
    its number of `documents`, the shingle's idf: so the weight is tf or tf-idf.
    """
    scale = None
    if frequency is not None:
        scale = np.rint(IDF_STEPS * ngrams.idf(frequency, documents)).astype(np.int64)
    parts = [np.zeros(0, dtype=np.uint64)]
    for first, end in ngrams.chunks(texts):
        hashes, counts = ngrams.shingles(texts[first:end], n)
        weights = 1 if scale is None else scale[hashes >> np.uint64(64 - len(scale).bit_length() + 1)]
        parts.append(signs(hashes, weights, counts))
    return np.concatenate(parts)


def signs(hashes, weights, counts):
    """uint64 (D,): accumulate and take signs; document d owns the next counts[d] of `hashes` (S,) and `weights` (S,) or 1.

    sum of +w and -w > 0 is the same as: twice the sum of w over the features with that bit > the sum of all w.
    """
    result, full = np.zeros(len(counts), dtype=np.uint64), counts > 0
    if not full.any():
        return result
    starts = (np.cumsum(counts) - counts)[full]
    weights = np.broadcast_to(np.asarray(weights, dtype=np.int64), hashes.shape)
    total = np.add.reduceat(weights, starts)
    for bit in range(64):
        ones = np.add.reduceat(((hashes >> np.uint64(bit)) & np.uint64(1)).view(np.int64) * weights, starts)
        result[full] |= (2 * ones > total).astype(np.uint64) << np.uint64(bit)
    return result


def hamming(a, b):
    """Number of differing bits of uint64 arrays, int64. Bits are summed in pairs, fours and bytes (Warren, Hacker's
    Delight, section 5-1)."""
    x = a ^ b
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def blocks(k, bits=range(64)):
    """k + 1 uint64 masks that part the given bits as evenly as possible: four of 16 bits for k = 3."""
    cuts = [len(bits) * i // (k + 1) for i in range(k + 2)]
    return [np.uint64(sum(1 << bit for bit in bits[start:end])) for start, end in zip(cuts, cuts[1:])]


def tables(k):
    """(k + 1)^2 uint64 masks, each one block and one of the k + 1 blocks of the other bits: 16 of 28 bits for k = 3. Two
    fingerprints that differ in at most k bits agree under one of them. Raises ValueError for a k outside 0..63."""
    if not 0 <= k < 64:
        raise ValueError(f"k = {k}: a distance between 64-bit fingerprints, from 0 to 63")
    return [block | part for block in blocks(k)
            for part in blocks(k, [bit for bit in range(64) if not int(block) >> bit & 1])]
