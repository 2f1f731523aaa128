"""02  MinHash signature: a few numbers that tell how alike two documents are.

中文：实现 MinHash 签名：对每个随机置换取文档所有片段的最小值，两个签名相同的比例就是 Jaccard 相似度的估计。

A document is the set of its shingles (all runs of five characters, say), each hashed to 32 bits. Shuffle all possible hashes by a
random permutation: the shingle that comes first is the same in two documents with probability |A and B| / |A or B|, their Jaccard
similarity. So P permutations give P minima, the signature, and the share of equal places estimates the similarity, whatever the
length of the texts. As permutation serves h -> a h + b with an odd a: modulo 2^32 it maps no two hashes to the same.

    signature_k = min over the shingles x of (a_k * fmix32(x) + b_k) mod 2^32          k = 0 … P - 1

Broder 1997, "On the resemblance and containment of documents". The solution: `signatures` in nanollm/corpus/minhash.py.
Judge:  python -m learn.exercises 02
"""
import numpy as np

from nanollm.corpus.minhash import EMPTY, fmix32  # fmix32 mixes the bits of hashes (N,) uint32; EMPTY = 2^32 - 1


def signature(hashes, a, b):
    """hashes (N,) uint32: of the document's shingles, repeats and all. a, b (P,) uint32: the permutations. -> (P,) uint32.

    A document without shingles (N = 0) has EMPTY in all places.
    """
    # Hint 1: numpy's unsigned integers wrap around: modulo 2^32 is what uint32 does by itself, so never leave uint32.
    # Hint 2: a[:, None] * x makes a table (P, N): permutations down, shingles across. Over which axis goes the minimum?
    # Hint 3: x = fmix32(hashes) first; the minimum of an empty axis is an error, so look at N = 0 before.
    raise NotImplementedError("write signature")
