"""BPE training as the tutorials write it: for each merge count all pairs of all pieces anew, then rewrite all pieces."""
from collections import Counter


def most_frequent(pieces):
    """The pair of adjacent ids that occurs most in a list of lists."""
    pairs = Counter()
    for ids in pieces:
        pairs.update(zip(ids, ids[1:]))
    return max(pairs, key=pairs.get)


def join(ids, pair, new):
    """`ids` with each `pair` replaced by `new`."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train(pieces, n_merges, first=256):
    """The first `n_merges` merges of `pieces`, lists of ids below `first`."""
    merges = []
    for new in range(first, first + n_merges):
        merges.append(most_frequent(pieces))
        pieces = [join(ids, merges[-1], new) for ids in pieces]
    return merges
