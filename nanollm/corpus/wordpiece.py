"""Learn a WordPiece vocabulary, a teaching trainer: slower than BPE's and worse at compressing; BERT made it known.

The pieces of a word are its first character and, marked ##, the others. As in BPE the best adjacent pair is joined
again and again, but the best is not the one that occurs most, it is the one that occurs most compared with its parts:

    score(a, b) = count(ab) / (count(a) count(b))

Joining it raises the likelihood of the corpus under a unigram model of the pieces most (Schuster & Nakajima 2012).
Google never published its trainer; the one in Hugging Face `tokenizers` is its BPE trainer with the mark ## added.
"""
from collections import Counter, defaultdict

from nanollm.config import UserError
from nanollm.corpus.bpe import count_pieces, sample
from nanollm.tokenizer import CONTINUED, CONTROL, UNKNOWN, merge, pattern_for

MIN_COUNT = 5             # the score alone prefers two characters that met once and occur nowhere else


def learn_pieces(counts, n_pieces, min_count=MIN_COUNT):
    """At most `n_pieces` pieces from words {str: count}: [UNK], then characters, then what was joined, in this order.

    Characters get at most half of the room, the most frequent first; a word with another one is left out, for it will
    be [UNK]. A pair must occur `min_count` times; of equal scores the alphabetically first pair wins.
    """
    words = [([word[0], *(CONTINUED + c for c in word[1:])], n) for word, n in sorted(counts.items())]
    count, pairs, where = Counter(), Counter(), defaultdict(set)
    for symbols, n in words:
        for symbol in symbols:
            count[symbol] += n
    alphabet = sorted(count, key=lambda symbol: (-count[symbol], symbol))[:n_pieces // 2]
    pieces = dict.fromkeys([UNKNOWN, *alphabet])
    words = [(symbols, n) for symbols, n in words if pieces.keys() >= set(symbols)]
    count.clear()

    def tally(k, sign):
        symbols, n = words[k]
        for symbol in symbols:
            count[symbol] += sign * n
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += sign * n
            where[pair].add(k)

    for k in range(len(words)):
        tally(k, +1)
    while len(pieces) < n_pieces:
        frequent = [pair for pair, n in pairs.items() if n >= min_count]
        if not frequent:
            break
        a, b = min(frequent, key=lambda pair: (-pairs[pair] / (count[pair[0]] * count[pair[1]]), pair))
        joined = a + b.removeprefix(CONTINUED)
        pieces[joined] = None
        for k in where.pop((a, b)):
            tally(k, -1)
            words[k] = merge(words[k][0], (a, b), joined), words[k][1]
            tally(k, +1)
    return list(pieces)


def train_wordpiece(texts, vocab_size, max_bytes=1 << 20, say=print):
    """(pieces, pattern) for `tokenizer.wordpiece_tokenizer`, from a sample of `max_bytes`; `vocab_size` counts the
    control tokens. UserError if there is no text, or hardly any room.

    The words are those of BPE's pre-tokenizer, but each Han character is a word, as in BERT, and so is each #: then no
    word of the text begins with the mark ##."""
    if vocab_size < 64:
        raise UserError(f"--vocab_size {vocab_size} is too small for WordPiece; Chinese alone wants thousands of characters")
    pattern = "#|" + pattern_for(vocab_size, han_run=1)
    counts = count_pieces(sample(texts, max_bytes, say), pattern)
    if not counts:
        raise UserError("the tokenizer needs text to learn from, and there was none; check the input files")
    pieces = learn_pieces(counts, vocab_size - len(CONTROL))
    if say:
        say(f"tokenizer: {len(counts):,} distinct words, {len(pieces):,} pieces")
    return pieces, pattern
