"""Learn a tokenizer from text: byte-level BPE from scratch, and the character table that is its baseline.

BPE (Sennrich et al. 2016, on bytes as in GPT-2): start from the 256 bytes, again and again join the most frequent
adjacent pair. Recounting all pairs for every merge costs (merges x corpus). Here each distinct piece is counted once,
and a merge touches only the pieces that hold its pair. `learn_merges_plain` says it in thirty lines of Python;
`learn_merges` computes the same some twenty times faster: the text is a doubly linked list in numpy arrays, with an
index pair -> places.
"""
import hashlib
import heapq
from collections import Counter, defaultdict

import numpy as np
import regex

from nanollm.config import UserError
from nanollm.foreign_tokenizers import BYTE_CHAR, no_surrogates
from nanollm.tokenizer import CONTROL, merge

PASSAGE = 10_000          # characters; a book enters the sample as many passages, not all or nothing
MAX_PIECE = 256           # bytes; longer pieces are no words (rulers, base64) and would only teach themselves


def sample(texts, max_bytes, say=print):
    """Passages of `texts`, in all at most `max_bytes` of UTF-8 and never more in memory, in the order of the stream.

    Those whose content has the smallest hashes: whenever the sample grows too large, the largest hash goes, of equal
    passages the last one. So the whole stream is represented evenly, whatever its order and length, and twice the same
    input gives the same sample.
    """
    kept, size, seen, limit = [], 0, 0, (1 << 64, 0)                   # kept: a heap, the largest (hash, place) on top
    for text in texts:
        text = no_surrogates(text)
        for start in range(0, len(text), PASSAGE):
            data = text[start:start + PASSAGE].encode("utf-8")
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            if (key, seen) < limit:
                heapq.heappush(kept, (-key, -seen, data))
                size += len(data)
            seen += len(data)
            while size > max_bytes:
                key, place, data = heapq.heappop(kept)
                limit, size = (-key, -place), size - len(data)
    kept.sort(key=lambda passage: -passage[1])
    if say:
        say(f"tokenizer: sample of {size / 1e6:.1f} MB out of {seen / 1e6:.1f} MB in {len(kept):,} passages")
    return [data.decode("utf-8") for _, _, data in kept]


def count_pieces(texts, pattern):
    """How often each piece (word) of the pre-tokenizer occurs; merges never cross a piece."""
    find, counts = regex.compile(pattern).findall, Counter()
    for text in texts:
        counts.update(find(text))
    return Counter({p: n for p, n in counts.items() if len(p.encode("utf-8")) <= MAX_PIECE})


def learn_merges_plain(counts, n_merges, min_count=2):
    """The first `n_merges` merges [(left id, right id)] of pieces {str: count}; fewer if no pair occurs `min_count`
    times any more. Bytes are ids 0..255, merge i makes id 256 + i.

    Sennrich et al. 2016, algorithm 1, but `where` remembers which pieces hold a pair: a merge recounts only these. The
    heap may hold outdated counts (they only fall); one that comes up is sorted in again.

    Of equally frequent pairs the smaller wins, with bytes ranked in GPT-2's byte-to-unicode order: then the merges
    equal those of Hugging Face's BpeTrainer. So the work is done on ranks, and translated to bytes at the end.
    """
    by_rank = sorted(range(256), key=BYTE_CHAR.get)                    # rank -> byte
    words = [([by_rank.index(b) for b in piece.encode("utf-8")], n) for piece, n in counts.items()]
    total, where, merges = Counter(), defaultdict(set), []
    for k, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            total[pair] += n
            where[pair].add(k)
    heap = [(-n, pair) for pair, n in total.items()]
    heapq.heapify(heap)
    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if -n != total[pair] or -n < min_count:
            if total[pair] >= min_count:
                heapq.heappush(heap, (-total[pair], pair))
            continue
        new, made = 256 + len(merges), set()
        merges.append(pair)
        for k in where.pop(pair):
            ids, n = words[k]
            for p in zip(ids, ids[1:]):
                total[p] -= n
            words[k] = ids, n = merge(ids, pair, new), n
            for p in zip(ids, ids[1:]):
                total[p] += n
                where[p].add(k)
                if new in p:
                    made.add(p)
        for p in made:
            heapq.heappush(heap, (-total[p], p))
    return [tuple(by_rank[i] if i < 256 else i for i in pair) for pair in merges]


def changes(x):
    """True where x[i] differs from x[i - 1], and at i = 0: the first of each run of equals."""
    out = np.ones(len(x), dtype=bool)
    np.not_equal(x[1:], x[:-1], out=out[1:])
    return out


def learn_merges(counts, n_merges, min_count=2):
    """What `learn_merges_plain` returns, from numpy arrays: all pieces stand in one array of tokens, linked to their
    neighbours; a merge looks at the stored places of its pair only, subtracts the links that vanish and adds the new.
    """
    by_rank = sorted(range(256), key=BYTE_CHAR.get)                    # rank -> byte
    rank = np.argsort(by_rank).astype(np.int32)                        # byte -> rank
    pieces = list(counts)                                              # in any order: ties leave nothing to chance
    # all pieces in one array with 0xff, which UTF-8 never contains, as walls of token -1 between them
    flat = np.frombuffer(b"\xff" + b"".join(p.encode("utf-8") + b"\xff" for p in pieces), dtype=np.uint8)
    wall = flat == 0xFF
    tok = np.where(wall, np.int32(-1), rank[flat])
    nxt = np.arange(1, len(tok) + 1, dtype=np.int32)
    prv = np.arange(-1, len(tok) - 1, dtype=np.int32)
    weight = np.array([*counts.values(), 0], dtype=np.min_scalar_type(max(counts.values(), default=0)))    # of pieces …
    weight = weight[np.cumsum(wall, dtype=np.int32) - 1]                                                   # … of places
    count, places, heap, merges = {}, {}, [], []

    def by_pair(at):
        """Group places (ascending) by the pair that starts there, if one does: for each pair (as one int) its total
        weight, and from where to where its places stand in the array that comes second."""
        at = at[tok[at] >= 0]
        right = tok[nxt[at]]
        at, right = at[right >= 0], right[right >= 0]
        pair = tok[at].astype(np.int64) << 32 | right
        order = np.argsort(pair, kind="stable")
        at, pair = at[order], pair[order]
        start = np.flatnonzero(changes(pair))
        total = np.add.reduceat(weight[at], start, dtype=np.int64) if len(at) else start
        return zip(pair[start].tolist(), total.tolist(), start.tolist(), [*start[1:].tolist(), len(at)]), at

    def add(at):
        groups, at = by_pair(at)
        for pair, total, start, end in groups:
            if total >= min_count:                                     # a count only ever falls after this
                count[pair], places[pair] = total, at[start:end].copy()
                heapq.heappush(heap, (-total, pair))

    def side_by_side(*columns):
        """Rows of neighbouring places as one ascending array; two merges in a row share a place, kept once."""
        at = np.stack(columns, axis=1).ravel()
        return at[changes(at)]

    add(np.flatnonzero(~wall).astype(np.int32))
    while heap and len(merges) < n_merges:
        total, pair = heapq.heappop(heap)
        if -total != count[pair]:                                      # it has lost places since: back into the queue
            if count[pair] >= min_count:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        left, right = pair >> 32, pair & 0xFFFFFFFF
        at = places.pop(pair)
        at = at[(tok[at] == left) & (tok[nxt[at]] == right)]           # places that other merges have not eaten
        if left == right:                                              # in a run, aaaa, every second place: (aa)(aa)
            first = np.r_[True, nxt[at[:-1]] != at[1:]]
            index = np.arange(len(at))
            at = at[(index - np.maximum.accumulate(np.where(first, index, 0))) % 2 == 0]
        gone = nxt[at]
        groups, _ = by_pair(side_by_side(prv[at], at, gone))
        for neighbour, lost, _, _ in groups:
            if neighbour in count:
                count[neighbour] -= lost
        tok[at], tok[gone] = 256 + len(merges), -1
        nxt[at] = nxt[gone]
        prv[nxt[at]] = at
        merges.append((left, right))
        add(side_by_side(prv[at], at))
    return [tuple(by_rank[i] if i < 256 else i for i in pair) for pair in merges]


def train_bpe(texts, vocab_size, pattern, max_bytes=16 << 20, say=print):
    """Merges [(left id, right id)] for a vocabulary of `vocab_size` ids, the 256 bytes and the control tokens included.

    Learned from a sample of `max_bytes`: about 60 bytes of memory for each byte of distinct pieces (Chinese verse is
    nearly all distinct: 1 GB for 16 MiB; English prose repeats its words and needs a tenth of that).

    A corpus too small for that many returns fewer merges and says so; the tokenizer is then smaller than asked for
    (rather than full of dead ids). UserError if there is no text, or no room even for the bytes.
    """
    room = vocab_size - 256 - len(CONTROL)
    if room < 0:
        raise UserError(f"--vocab_size {vocab_size} is too small: 256 bytes and {len(CONTROL)} control tokens come "
                        "first; 512 is a sensible least")
    counts = count_pieces(sample(texts, max_bytes, say), pattern)
    if not counts:
        raise UserError("the tokenizer needs text to learn from, and there was none; check the input files")
    merges = learn_merges(counts, room)
    if say:
        say(f"tokenizer: {len(counts):,} distinct pieces, {len(merges):,} merges")
        if len(merges) < room:
            say(f"tokenizer: only {len(merges):,} of {room:,} merges occur twice or more in this corpus; "
                "the vocabulary is smaller than asked for")
    return merges


def train_char(texts):
    """The characters that occur, sorted, as one string; U+FFFD, which stands for every other one, among them."""
    characters = {"\ufffd"}
    for text in texts:
        characters.update(no_surrogates(text))
    return "".join(sorted(characters))
