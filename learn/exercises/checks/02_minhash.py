"""What is asked of exercise 02, and the solution: nanollm.corpus.minhash.signatures."""
import numpy as np
import torch

from learn.exercises.judge import Hint, kind, on, same
from nanollm.corpus.minhash import EMPTY, fmix32, permutations, signatures

NAME = "signature"
P = 64


def reference(hashes, a, b):
    return signatures(hashes, np.array([0, len(hashes)]), len(a))[0]          # a, b are permutations(P), as the judge gives them


def document(n, seed=0):
    return np.random.RandomState(seed).randint(0, 1 << 32, n, dtype=np.uint32)


def an_array(attempt):
    """an array with one number a permutation"""
    got = attempt(document(50), *permutations(P))
    if got is None:
        raise Hint("the function returns None: is the `return` missing?")
    if not isinstance(got, np.ndarray):
        raise Hint(f"it must be a numpy array; it is {kind(got)}")
    if got.shape != (P,):
        over = "the minimum goes over the shingles, not over the permutations" if got.shape == (50,) else "one minimum for each permutation"
        raise Hint(f"wrong shape: expected ({P},), got {got.shape}: {over}")


def minima(attempt):
    """the minimum of a * fmix32(x) + b modulo 2^32"""
    hashes, (a, b) = document(50), permutations(P)
    x, raw = a[:, None] * fmix32(hashes), a[:, None] * hashes + b[:, None]
    long = a[:, None].astype(np.int64) * fmix32(hashes).astype(np.int64) + b[:, None]
    got, number = attempt(hashes, a, b), lambda v: torch.from_numpy(v.astype(np.float64))
    same(number(got), number(reference(hashes, a, b)), "the signature", "P", {
        "the minimum is wanted; this is the maximum": number((x + b[:, None]).max(1)),
        "b is missing: a x alone maps 0 to 0 for every a": number(x.min(1)),
        "the hashes are not mixed: x = fmix32(hashes) first": number(raw.min(1)),
        "the modulo is missing: stay in uint32, which wraps around, or take % 2**32 before the minimum": number(long.min(1)),
        "the modulo comes too late: first wrap around each number, then take the minimum": number(long.min(1) % 2**32),
        "that is the place of the minimum; take the minimum itself": number((x + b[:, None]).argmin(1)),
        "take the minimum of a x + b, not a times the smallest x: the permutation must come first": number(a * fmix32(hashes).min() + b)}, 1e-12)


def type_of_numbers(attempt):
    """32 bits a number"""
    got = attempt(document(50), *permutations(P))
    if got.dtype != np.uint32:
        raise Hint(f"the dtype is {got.dtype}, expected uint32: a signature has to be small, and equal signatures equal bytes")


def as_a_set(attempt):
    """order and repeats of the shingles change nothing"""
    hashes, (a, b) = document(50), permutations(P)
    if not np.array_equal(attempt(np.concatenate([hashes[::-1], hashes]), a, b), attempt(hashes, a, b)):
        raise Hint("the same shingles in another order, or twice, give another signature: a document is a set")


def empty(attempt):
    """a document without shingles"""
    with on("no shingles at all"):
        got = attempt(document(0), *permutations(P))
        if not np.array_equal(got, np.full(P, EMPTY)):
            raise Hint("every place must be EMPTY (2^32 - 1)")


def estimates(attempt):
    """the share of equal places is near the Jaccard similarity"""
    a, b = permutations(1024)
    whole = document(300)
    share = np.mean(attempt(whole[:200], a, b) == attempt(whole[100:], a, b))        # 100 of 300 in common
    if abs(share - 1 / 3) > 4 * (1 / 3 * 2 / 3 / 1024) ** 0.5:
        raise Hint(f"two documents of similarity 1/3 agree in {share:.2f} of the places")


CHECKS = [an_array, minima, type_of_numbers, as_a_set, empty, estimates]
