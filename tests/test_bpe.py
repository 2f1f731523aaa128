"""The BPE trainer, held against the textbook algorithm and against Hugging Face's `tokenizers`."""
import json
import random
import tracemalloc
from collections import Counter

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from nanollm.config import UserError
from nanollm.corpus.bpe import PASSAGE, count_pieces, learn_merges, learn_merges_plain, sample, train_bpe, train_char
from nanollm.foreign_tokenizers import BYTE_CHAR
from nanollm.tokenizer import bpe_tokenizer, merge, pattern_for


def bilingual(n, seed=0):
    """n short texts of invented English and Chinese words; few words, so equal counts (ties) abound."""
    r = random.Random(seed)
    english = ["".join(r.choices("aeinorstl", k=r.randint(1, 7))) for _ in range(80)]
    chinese = [chr(r.randrange(0x4E00, 0x4E80)) for _ in range(60)]
    return [f"{' '.join(r.choices(english, k=9)).capitalize()}, {r.randrange(2000)}!\n\n"
            f"{''.join(r.choices(chinese, k=r.randint(5, 25)))}，{''.join(r.choices(chinese, k=4))}。I'll {i}  x\t😀" for i in range(n)]


def rescan(counts, n_merges, min_count=2):
    """BPE as one would write it first: count all pairs anew for each merge."""
    rank = {b: i for i, b in enumerate(sorted(range(256), key=BYTE_CHAR.get))}
    words, merges = {p: list(p.encode("utf-8")) for p in counts}, []
    while len(merges) < n_merges:
        pairs = Counter()
        for p, ids in words.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += counts[p]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], [rank.get(i, i) for i in pair]))
        if pairs[best] < min_count:
            break
        merges.append(best)
        words = {p: merge(ids, best, 255 + len(merges)) for p, ids in words.items()}
    return merges


@pytest.mark.parametrize("vocab_size, han_run", [(700, 16), (10_000, 16), (700, 1)])
def test_merges_equal_those_of_hugging_face(vocab_size, han_run):
    """Same pieces, same counts, same tie rule: BpeTrainer learns the same list in the same order, English and Chinese,
    with single digits and with pairs of digits, Chinese by runs and by character."""
    texts, pattern = bilingual(400), pattern_for(vocab_size, han_run)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), min_frequency=2, show_progress=False))
    ours = bpe_tokenizer(merges := learn_merges(count_pieces(texts, pattern), 2000 - 256), pattern)
    name = ["".join(BYTE_CHAR[b] for b in piece) for piece in ours.pieces]
    assert len(merges) > (500 if han_run > 1 else 300)       # by character there is less to merge
    assert [[name[a], name[b]] for a, b in merges] == [list(m) for m in json.loads(theirs.to_str())["model"]["merges"]]


def test_merges_equal_a_full_recount():
    """The incremental counts never drift, also in runs (aaaa), where places of a pair overlap."""
    for seed in range(60):
        r = random.Random(seed)
        counts = {"".join(r.choices("ab中" if seed % 2 else "a b", k=r.randint(1, 30))): r.randint(1, 5) for _ in range(12)}
        assert learn_merges(counts, 60) == learn_merges_plain(counts, 60) == rescan(counts, 60), f"seed {seed}"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(st.sampled_from("aab中国🙂 "), min_size=1, max_size=14), st.integers(1, 6), max_size=12),
       st.integers(0, 40), st.integers(1, 4))
def test_the_fast_trainer_equals_the_plain_one(counts, n_merges, min_count):
    """Thirty lines of Python and the numpy version: the same list for any pieces, runs and ties and no pieces included."""
    assert learn_merges(counts, n_merges, min_count) == learn_merges_plain(counts, n_merges, min_count)


def test_the_fast_trainer_equals_the_plain_one_on_prose():
    """And on a corpus that gives a thousand merges."""
    counts = count_pieces(bilingual(600), pattern_for(512))
    merges = learn_merges(counts, 5000)
    assert merges == learn_merges_plain(counts, 5000) and len(merges) > 1000


def test_counts_beyond_32_bits_do_not_wrap():
    """C8: in a huge corpus a pair occurs more than 2^32 times; wrapped around it would look rare, or negative."""
    counts = {"ab": 2**33 + 1, "cd": 5, "abcd": 2**31, "ee": 2**33}
    assert learn_merges(counts, 9) == learn_merges_plain(counts, 9) == rescan(counts, 9)
    assert learn_merges(counts, 2) == [(ord("a"), ord("b")), (ord("e"), ord("e"))]


def test_memory_depends_on_the_sample_not_on_the_stream():
    """C1, C7: eight times the text, the same peak. (Training again on each part would not do it: each time starts anew
    and forgets the part before.)"""
    book = "".join(bilingual(600))

    def peak(n):
        tracemalloc.start()
        train_bpe((f"{i}{book}" for i in range(n)), 400, pattern_for(400), max_bytes=50_000, say=None)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    assert peak(16) < 1.3 * peak(2)


def test_every_merge_joins_known_tokens_and_makes_a_new_one():
    """No token has two origins; so ranks by bytes (tiktoken) and merges by pair (the textbook) mean the same."""
    merges = learn_merges(count_pieces(bilingual(300), pattern_for(512)), 1500)
    pieces = [bytes([b]) for b in range(256)]
    for a, b in merges:
        assert max(a, b) < len(pieces)
        pieces.append(pieces[a] + pieces[b])
    assert len(set(pieces)) == len(pieces)


def test_the_order_of_the_documents_does_not_matter():
    """Same texts, shuffled: same merges. Different texts: other merges."""
    texts, pattern = bilingual(200), pattern_for(600)
    shuffled = random.Random(1).sample(texts, len(texts))
    first = train_bpe(texts, 600, pattern, say=None)
    assert first == train_bpe(iter(shuffled), 600, pattern, say=None)
    assert first != train_bpe(bilingual(200, seed=1), 600, pattern, say=None)


def test_a_small_corpus_gives_a_small_vocabulary_and_says_so():
    """Pairs that occur once are not learned; the tokenizer is smaller than asked for, and works."""
    lines, pattern = [], pattern_for(4096)
    merges = train_bpe(["the cat and the dog and the 猫"], 4096, pattern, say=lines.append)
    tok = bpe_tokenizer(merges, pattern)
    assert 0 < len(merges) < 20 and tok.vocab_size == 320
    assert f"only {len(merges):,} of 3,836 merges" in lines[-1]
    assert tok.decode(tok.encode("a whole other 话题")) == "a whole other 话题"


@pytest.mark.parametrize("texts, vocab_size, match", [
    ([], 512, "needs text"), (["", ""], 512, "needs text"), (["plenty of text"], 259, "--vocab_size 259 is too small")])
def test_no_text_and_no_room_are_refused(texts, vocab_size, match):
    """One sentence instead of a tokenizer that knows nothing."""
    with pytest.raises(UserError, match=match):
        train_bpe(texts, vocab_size, pattern_for(512), say=None)


def test_the_sample_is_bounded_and_spread_over_the_stream():
    """At most max_bytes whatever comes, taken evenly from beginning to end; all of it when it fits; and reported."""
    stream = [f"text number {i} " * 5 for i in range(20_000)]
    lines = []
    kept = sample(iter(stream), 200_000, say=lines.append)
    assert 199_000 < sum(len(t.encode("utf-8")) for t in kept) <= 200_000
    numbers = [int(t.split()[2]) for t in kept]
    assert all(len([n for n in numbers if start <= n < start + 5000]) > len(numbers) / 6 for start in range(0, 20_000, 5000))
    assert kept == sample(stream, 200_000, say=None) and kept == sample(stream[::-1], 200_000, say=None)[::-1]
    assert lines == [f"tokenizer: sample of 0.2 MB out of 1.7 MB in {len(kept):,} passages"]
    assert sample(stream[:9], 200_000, say=None) == stream[:9]
    book = "长" * (3 * PASSAGE + 7)
    assert "".join(sample([book], 1 << 20, say=None)) == book            # a long document is cut, not cut off


def test_a_passage_that_stands_everywhere_does_not_empty_the_sample():
    """Its copies alone exceed max_bytes: as many of them stay as fit, in whatever order the stream comes. (If it went with all
    its copies, nothing would be left to learn from.)"""
    page = "the same page again and again " * 10                              # 300 bytes
    assert sample([page] * 100, 1000, say=None) == [page] * 3
    assert train_bpe([page] * 100, 400, pattern_for(400), max_bytes=1000, say=None)
    stream = [*(f"another page, number {i}" for i in range(50)), *[page] * 100]
    kept = sample(stream, 5000, say=None)
    assert page in kept and 4700 < sum(map(len, kept)) <= 5000 and sorted(kept) == sorted(sample(stream[::-1], 5000, say=None))


def test_pieces_that_are_no_words_teach_nothing():
    """A ruler of 300 signs or a base64 block would otherwise fill the vocabulary with itself."""
    counts = count_pieces(["=" * 300 + " word word"] * 5, r"\S+|\s+")
    assert set(counts) == {" ", "word"} and counts["word"] == 10


def test_half_characters_do_not_stop_training():
    """A lone surrogate, as JSON escapes can carry, is read as U+FFFD."""
    assert train_bpe(["broken \ud83d end"] * 3, 300, pattern_for(300), say=None)
    assert train_char(["a\ud83d", "ba"]) == "ab\ufffd"


def test_characters_are_the_sorted_set_of_the_text():
    """The baseline of the listings, `sorted(set(text))`, and one more for all that was not seen."""
    assert train_char(["hello ", "世界"]) == "".join(sorted(set("hello 世界"))) + "\ufffd"
