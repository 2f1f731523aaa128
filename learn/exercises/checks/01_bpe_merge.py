"""What is asked of exercise 01, and the solution: nanollm.tokenizer.merge, nanollm.corpus.bpe.learn_merges_plain."""
from collections import Counter

from learn.exercises.judge import Hint, equal, on, parts
from nanollm.corpus.bpe import learn_merges_plain
from nanollm.tokenizer import merge

NAME = "merge_step"


def reference(words, counts, new):
    total = Counter()
    for ids, n in zip(words, counts):
        for pair in zip(ids, ids[1:]):
            total[pair] += n
    if not total:
        return None, words
    pair = min(total, key=lambda pair: (-total[pair], pair))
    return pair, [merge(ids, pair, new) for ids in words]


def step(attempt, words, counts):
    pair, merged = parts(attempt(words, counts, 99), ("the pair", "the merged words"))
    return pair and tuple(pair), [list(ids) for ids in merged]


def most_frequent(attempt):
    """the most frequent pair, words counted as often as they occur"""
    pair, _ = step(attempt, [[1, 2], [1, 2, 5], [3, 4]], [1, 1, 5])
    equal(pair, (3, 4), "the pair", {"every word was counted once: a pair in a word that occurs 5 times counts 5 times": (1, 2),
                                     "that is the rarest pair; take the most frequent": (2, 5)})


def inside_words(attempt):
    """no pair across two words"""
    pair, _ = step(attempt, [[8, 9, 3], [4, 8, 9], [3], [4], [3], [4], [3], [4]], [1] * 8)
    equal(pair, (8, 9), "the pair", {"3 and 4 are neighbours only across words: count the pairs inside each word": (3, 4),
                                     "4 and 3 are neighbours only across words: count the pairs inside each word": (4, 3)})


def ties(attempt):
    """of equally frequent pairs the smaller"""
    pair, _ = step(attempt, [[5, 6], [1, 7], [1, 4], [8, 3]], [3, 3, 3, 3])
    equal(pair, (1, 4), "the pair", {"all pairs are equally frequent: take the smallest, (1, 4), not the first that you met": (5, 6),
                                     "all pairs are equally frequent: take the smallest, (1, 4), not the largest": (8, 3)})


def everywhere(attempt):
    """the pair is replaced wherever it stands"""
    _, merged = step(attempt, [[1, 2, 1, 2, 3], [3, 1, 2], [2, 1]], [2, 2, 1])
    equal(merged, [[99, 99, 3], [3, 99], [2, 1]], "the merged words",
          {"only the first place in each word was replaced": [[99, 1, 2, 3], [3, 99], [2, 1]],
           "the right half of the pair is still there: after a hit go on by two": [[99, 2, 99, 2, 3], [3, 99, 2], [2, 1]],
           "the pair (1, 2) is not (2, 1): its order counts": [[99, 99, 3], [3, 99], [99]],
           "the words came back without the merge": [[1, 2, 1, 2, 3], [3, 1, 2], [2, 1]],
           "only the words that hold the pair came back: keep the others, in their places": [[99, 99, 3], [3, 99]]})


def from_the_left(attempt):
    """7 7 7 becomes (7 7) 7"""
    _, merged = step(attempt, [[7, 7, 7]], [1])
    equal(merged, [[99, 7]], "[7, 7, 7] after the merge of (7, 7)",
          {"replace from left to right: 7 7 7 becomes (7 7) 7": [[7, 99]],
           "pairs overlap in 7 7 7, and each token may be used only once: after a hit go on by two": [[99, 99]]})


def nothing_left(attempt):
    """words of one token"""
    with on("words without neighbours"):
        pair, merged = step(attempt, [[1], [2], []], [1, 1, 1])
        equal(pair, None, "the pair")
        equal(merged, [[1], [2], []], "the list of words")


def twenty_steps(attempt):
    """twenty steps learn the merges of nanollm.corpus.bpe"""
    text = "the cat and the other cat sat on the mat then that hat banana bandana".split()
    counts = Counter(text)
    words, want = [list(word.encode()) for word in counts], learn_merges_plain(counts, 20, min_count=1)
    for i, pair in enumerate(want):
        got, words = parts(attempt(words, list(counts.values()), 256 + i), ("the pair", "the merged words"))
        if got is None or tuple(got) != pair:
            raise Hint(f"step {i + 1} on a small text joins {got}, the project's tokenizer joins {pair}")


CHECKS = [inside_words, most_frequent, ties, everywhere, from_the_left, nothing_left, twenty_steps]
