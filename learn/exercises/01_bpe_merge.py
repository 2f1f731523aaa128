"""01  BPE merge step: join the most frequent pair of neighbours into one token.

中文：实现 BPE 训练的一步：找出最常见的相邻词元对，把它在所有词里合并成一个新词元。

A byte-level tokenizer starts from the 256 bytes. One step of its training counts all pairs of neighbours inside the words, takes
the most frequent one and writes a new token wherever that pair stands. Repeated n times this gives 256 + n tokens: "t" "h" becomes
"th", "th" "e" becomes "the". Words are counted once and carry how often they occur; no merge crosses from one word to the next.

    count(pair) = sum over the words of (times the pair stands in the word) * (times the word occurs)
    the most frequent pair wins; of equally frequent ones the smaller, so that everybody gets the same tokenizer

Sennrich, Haddow & Birch 2016, algorithm 1 (arXiv:1508.07909). The solution: `merge` in nanollm/tokenizer.py and
`learn_merges_plain` in nanollm/corpus/bpe.py. Judge:  python -m learn.exercises 01
"""


def merge_step(words, counts, new):
    """words: list of words, each a list of token ids. counts: how often each word occurs. new: the id of the token to make.

    -> (pair, merged): the pair (left id, right id) that was joined, and all words after the merge, as new lists. Where no word has
    two tokens left: (None, the words as they are).

    merge_step([[1, 2, 3], [1, 2]], [1, 4], new=9) -> ((1, 2), [[9, 3], [9]])
    """
    # Hint 1: two parts: find the pair (a Counter), then rewrite every word.
    # Hint 2: the neighbours of a list are zip(ids, ids[1:]).
    # Hint 3: min(total, key=lambda pair: (-total[pair], pair)) is the most frequent pair, of equals the smaller.
    # Hint 4: to rewrite, walk with an index from left to right: on a hit append `new` and go on by 2, otherwise copy and go on by 1.
    raise NotImplementedError("write merge_step")
