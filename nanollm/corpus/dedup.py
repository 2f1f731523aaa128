"""Deduplication: exact copies by a hash of the text, near copies by MinHash-LSH with every candidate verified.

A document is the set of its character n-grams. MinHash estimates the Jaccard similarity J = |A∩B| / |A∪B| of two sets
by the share of equal minima under many random permutations (Broder 1997); LSH cuts the signature into b bands of r
rows and calls two documents candidates if one band is equal, which happens with probability 1 - (1 - J^r)^b
(Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, chapter 3).

Candidates are not duplicates: at J = 0.4 a large corpus yields many of them by chance. So J itself is computed for
each, and b and r are chosen to miss next to nothing instead of to balance the two errors, as the library would.

Greedy, keep first: a document goes if a *kept* document before it has J >= threshold. Hence every removed document
names a kept one that is as similar as promised, and chains A~B~C do not remove C for the sake of B.
The index lives in memory, about 10 KB a document.
"""
import hashlib
import zlib
from collections import Counter
from functools import lru_cache

import numpy as np
from datasketch import MinHash, MinHashLSH

from nanollm.corpus.io import progress, write_row

MAX_MISS = 1e-3                           # chance to overlook a pair that stands exactly at the threshold


def shingles(text, n=5):
    """The set of character n-grams, as UTF-32 bytes (4 a character, so slicing is cheap); a shorter text is one."""
    data, width = text.encode("utf-32-le"), 4 * n
    return {data[i:i + width] for i in range(0, max(len(data) - width, 0) + 1, 4)}


def jaccard(a, b):
    """|A∩B| / |A∪B| of two sets."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def bands_and_rows(threshold, num_perm):
    """(b, r): the most rows, so the fewest false candidates, with a miss (1 - threshold^r)^b of at most MAX_MISS."""
    for r in range(num_perm // 2, 1, -1):
        b = num_perm // r
        if miss(threshold, b, r) <= MAX_MISS:
            return b, r
    return num_perm, 1


def miss(similarity, b, r):
    """Probability that no band of r rows agrees, so that the pair is never looked at."""
    return (1 - similarity ** r) ** b


def deduplicate(documents, threshold=0.7, n=5, num_perm=128, counts=None):
    """Decide on each of `documents`, a sequence of {"id", "text"}: read once in order, candidates again by number.

    Yields in order (document, None) to keep it or (document, {"id", "dup_of", "jaccard", "kind"}) to remove it, kind
    "exact" or "near". `counts` (a Counter) learns how many pairs were candidates, computed exactly, and found.
    """
    counts = Counter() if counts is None else counts
    index = MinHashLSH(num_perm=num_perm, params=bands_and_rows(threshold, num_perm))
    empty = MinHash(num_perm=num_perm, hashfunc=zlib.crc32)
    signatures = np.zeros((len(documents), num_perm), dtype=np.uint32)
    seen = {}                                             # blake2b of a text -> (number of the kept document, Jaccard)
    grams = lru_cache(maxsize=256)(lambda number: shingles(documents[number]["text"], n))
    # Most candidates are far off. The signatures' estimate of J has a standard deviation of sqrt(J(1-J)/num_perm):
    # four of them below the threshold is a safe no, and saves reading the other document.
    hopeless = threshold - 4 * (threshold * (1 - threshold) / num_perm) ** 0.5

    for number, document in enumerate(documents):
        digest = hashlib.blake2b(document["text"].encode("utf-8"), digest_size=16).digest()
        if digest in seen:
            original, similarity = seen[digest]
            yield document, removal(document, documents[original], similarity)
            continue
        own, minhash = shingles(document["text"], n), empty.copy()
        minhash.update_batch(own)
        signatures[number] = minhash.hashvalues
        candidates = np.array(sorted(index.query(minhash)), dtype=np.int64)
        estimates = (signatures[candidates] == minhash.hashvalues).mean(axis=1)
        counts["candidates"] += len(candidates)
        original, similarity = number, 1.0
        for at in np.argsort(-estimates, kind="stable"):  # the likeliest first
            if estimates[at] < hopeless:
                break
            counts["verified"] += 1
            other = int(candidates[at])
            if (true := jaccard(own, grams(other))) >= threshold:
                original, similarity = other, true
                break
        seen[digest] = original, similarity
        if original == number:
            index.insert(number, minhash, check_duplication=False)
            yield document, None
        else:
            yield document, removal(document, documents[original], similarity)


def removal(document, original, similarity):
    """The line of removed.jsonl. An exact copy of a near copy is as near to the original as the first one was."""
    return {"id": document["id"], "dup_of": original["id"], "jaccard": round(similarity, 4),
            "kind": "exact" if document["text"] == original["text"] else "near"}


def dedup_corpus(documents, out, threshold=0.7, n=5, num_perm=128):
    """Write the kept `documents` to OUT/documents.jsonl and the removals to OUT/removed.jsonl; returns the report."""
    counts, kinds, copies, examples = Counter(candidates=0, verified=0), Counter(exact=0, near=0), Counter(), []
    with (open(out / "documents.jsonl", "w", encoding="utf-8", newline="\n") as kept,
          open(out / "removed.jsonl", "w", encoding="utf-8", newline="\n") as removed):
        decisions = deduplicate(documents, threshold, n, num_perm, counts)
        for document, gone in progress(decisions, total=len(documents), desc="dedup", unit=" docs"):
            if gone is None:
                write_row(kept, document)
                continue
            kinds[gone["kind"]] += 1
            copies[gone["dup_of"]] += 1
            write_row(removed, gone)
            if gone["kind"] == "near" and len(examples) < 3:
                examples.append(gone | {"text": document["text"]})
    return {"in": len(documents), "kept": len(documents) - kinds.total(), "removed": kinds.total(), **kinds, **counts,
            "examples": examples, "most_copied": copies.most_common(3)}
