"""MinHash and LSH: the definitions, their fast form, the mathematics of the curve, and the examples of the notes."""
import hashlib
import itertools
import math
import random
import sys

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from nanollm.config import UserError
from nanollm.corpus import minhash
from nanollm.corpus.minhash import candidate_probability, jaccard, shingles

ZH = ("小镇的早市从五点半开始，卖豆腐的老人总是第一个到。他把木桶放在桥头，桶上盖着一块洗得发白的布。天亮以后，桥上慢慢热闹起来，有人买菜，有人只是来看看河水涨了多少。",
      "这本书讲的是一条船怎样从设计图变成真正能出海的东西。作者在船厂工作了三十年，写到铆钉、油漆和潮水的时候，句子里几乎能闻到海的味道。")
EN = ("The library closes at nine, but the lamp over the map table stays on. Whoever leaves last turns the page of the atlas, "
      "so that every morning opens on a different country.",
      "Bread rises twice: once in the bowl and once in the tin. Between the two, press the air out gently, or the holes will be "
      "too large to hold any butter.")


def pairs_of_sets(rng, similarity, n, size=200):
    """n pairs of sets of random 64-bit numbers, each with a Jaccard similarity of `similarity`, as (hashes, offsets)."""
    common = round(2 * size * similarity / (1 + similarity))
    blocks = rng.integers(0, 1 << 64, (n, 2 * size - common), dtype=np.uint64)
    one, two = blocks[:, :size], blocks[:, size - common:]
    return np.stack([one, two], axis=1).ravel(), np.arange(2 * n + 1) * size


# ---- what the notes say ----------------------------------------------------------------------------------------------

def test_the_estimate_of_two_signatures_is_the_share_of_equal_places():
    """The notes' [1,2,3] against [3,2,1] gives 1/3, if these are signatures. If they are the documents, as sets, they are
    equal: the example shows the estimator, not what it estimates."""
    assert (np.array([1, 2, 3]) == np.array([3, 2, 1])).mean() == pytest.approx(1 / 3)
    assert jaccard({1, 2, 3}, {3, 2, 1}) == 1


def test_equal_minima_have_exactly_the_probability_jaccard():
    """Over all 720 permutations of a universe of six, for all pairs of sets: MinHash's theorem, by counting."""
    orders = list(itertools.permutations(range(6)))
    for a in ({0, 1, 2, 3}, {0, 1}, {5}):
        for b in ({2, 3, 4}, {0, 1, 5}, {1, 2, 3, 4, 5}):
            equal = sum(min(order[x] for x in a) == min(order[x] for x in b) for order in orders)
            assert equal * len(a | b) == len(orders) * len(a & b)


def test_a_set_of_characters_forgets_the_order():
    """The notes' characters one by one: a sentence and its shuffle are the same set. n-grams see the difference, the longer
    the clearer."""
    sentence, shuffled = "今天天气很好我们去公园散步吧", "散步吧公园去我们很好今天天气"
    similarity = [jaccard(shingles(sentence, n), shingles(shuffled, n)) for n in (1, 2, 3, 5)]
    assert similarity[0] == 1 and similarity[1] == pytest.approx(0.44, abs=0.005)
    assert similarity == sorted(similarity, reverse=True) and similarity[3] == 0


def test_unrelated_chinese_texts_look_alike_to_single_characters_only():
    """Similarity of two paragraphs on different topics: characters far above 2-grams above 5-grams."""
    one, two = ("".join(t for t in text if t.isalnum()) for text in ZH)
    single, double, five = (jaccard(shingles(one, n), shingles(two, n)) for n in (1, 2, 5))
    assert single > 0.05 and single > 3 * double and five == 0


def test_the_notes_lsh_example_returns_the_worst_match_by_a_collision():
    """Four documents, signatures of six, two bands, H = sum mod 10: the notes' table and candidate [C], reproduced. But Q
    agrees with A and B in 4 of 6 places and with C in 3: C comes back because [2, 5, 6] and [2, 4, 7] have the same sum,
    which is a collision and not its avoidance. With the bands themselves as keys nothing is returned: at s = 0.5 two bands
    of three find a pair with probability 0.23 only."""
    documents = {"A": [1, 3, 5, 2, 4, 6], "B": [2, 3, 4, 1, 5, 6], "C": [1, 3, 5, 2, 4, 7], "D": [2, 4, 6, 1, 3, 5]}
    query = [1, 3, 4, 2, 5, 6]

    def candidates(key):
        return sorted({name for name, row in documents.items() for band in (slice(0, 3), slice(3, 6)) if key(row[band]) == key(query[band])})

    def total(band):
        return sum(band) % 10
    assert {name: (total(row[:3]), total(row[3:])) for name, row in documents.items()} == {"A": (9, 2), "B": (9, 2), "C": (9, 3), "D": (2, 9)}
    assert (total(query[:3]), total(query[3:])) == (8, 3) and candidates(total) == ["C"]
    assert {name: sum(x == y for x, y in zip(row, query)) for name, row in documents.items()} == {"A": 4, "B": 4, "C": 3, "D": 0}
    assert documents["A"][:3] != documents["B"][:3] and total(documents["A"][:3]) == total(documents["B"][:3])
    assert candidates(tuple) == [] and candidate_probability(0.5, 2, 3) == pytest.approx(0.234, abs=1e-3)


def test_hash_functions_want_bytes_and_the_encoding_matters():
    """Why the notes write .encode('utf8'): a str is refused, and the same character in GBK has another hash."""
    with pytest.raises(TypeError):
        hashlib.sha1("例")
    assert hashlib.sha1("例".encode("utf-8")).digest() != hashlib.sha1("例".encode("gbk")).digest()


# ---- texts -> shingles -----------------------------------------------------------------------------------------------

def compared(text):
    """A text as it is compared, as a string."""
    return minhash.characters([text])[0].astype("<u4").tobytes().decode("utf-32-le")


def test_texts_are_compared_without_case_blanks_and_punctuation():
    """In both languages, composed and decomposed, and on every plane; letters, symbols, digits and emoji stay."""
    assert compared("Hello,  World!\n") == "helloworld" and compared("你好，　世界……（真的）") == "你好世界真的"
    assert compared("cafe\u0301") == compared("CAFÉ") == "café" and compared("𠀀😀\u200b\ufeff") == "𠀀😀"
    assert compared("E = m·c^2 + 1") == "e=mc^2+1" and compared("，。！") == compared("") == ""


def test_numbers_keep_their_marks():
    """1.5 is no 15 and -5 no 5; a full stop after a number is only a full stop, and marks of two texts never meet."""
    for one, two in (("1.5", "15"), ("-5", "5"), ("3/4", "34"), ("12:30", "1230")):
        assert compared(one) != compared(two)
    assert compared("in 2020.") == "in2020" and compared("well-known") == "wellknown"
    codes, offsets = minhash.characters(["a-", "5b"])
    assert offsets.tolist() == [0, 1, 3] and "".join(map(chr, codes)) == "a5b"


def test_the_hashed_n_grams_are_the_sets_of_the_definition():
    """As many distinct hashes as distinct n-grams, and the same Jaccard similarity, for texts of every length from none."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcde", k=rng.choice([0, 1, 2, 3, 4, 5, 6, 9, 40, 200]))) for _ in range(150)]
    for n in (1, 2, 5):
        hashes, offsets = minhash.ngrams(*minhash.units(texts), n)
        ours = [set(hashes[a:b].tolist()) for a, b in zip(offsets, offsets[1:])]
        theirs = [shingles(text, n) for text in texts]
        assert list(map(len, ours)) == list(map(len, theirs))
        for i, j in itertools.combinations(range(150), 2):
            assert jaccard(ours[i], ours[j]) == jaccard(theirs[i], theirs[j])


@pytest.mark.parametrize("kind", ["char", "word", "jieba"])
def test_shingles_do_not_depend_on_the_batch(kind):
    """Each text alone gives what it gives among others."""
    texts = [*ZH, "", "短", *EN, "。", "Mixed 中文 and 123"]
    hashes, offsets = minhash.ngrams(*minhash.units(texts, kind), 3)
    for i, text in enumerate(texts):
        alone, _ = minhash.ngrams(*minhash.units([text], kind), 3)
        assert alone.tolist() == hashes[offsets[i]:offsets[i + 1]].tolist()


def test_a_short_text_is_one_shingle():
    """So "cat" and "dog" are no more alike than they look, and 我喜欢健身 is not 我喜欢普洱茶."""
    texts = ["cat", "dog", "Cat!", "我喜欢健身", "我喜欢普洱茶", "ab", "ba", ""]
    hashes, offsets = minhash.ngrams(*minhash.units(texts), 7)
    assert np.diff(offsets).tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert len(set(hashes.tolist())) == 6 and hashes[0] == hashes[2]


def test_words_are_runs_of_letters_or_single_han_characters():
    """And jieba's are those of its dictionary."""
    assert minhash.words("The CAT sat, 3 times: 你好カ!") == ["the", "cat", "sat", "3", "times", "你", "好", "カ"]
    assert minhash.jieba_words("今天天气很好，我们去公园。") == ["今天天气", "很", "好", "我们", "去", "公园"]
    with pytest.raises(UserError, match="--shingle"):
        minhash.units(["x"], "letters")


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="jieba"):
        minhash.jieba_words("今天")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="matplotlib"):
        minhash.plot_s_curve(tmp_path / "curve.png", {"": (1, 1)})


# ---- signatures ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_perm, seed", [(256, 1), (128, 7), (100, 1), (1, 3)])
def test_signatures_equal_datasketch_bit_for_bit(num_perm, seed):
    """datasketch is the oracle: the same permutations, the same 32-bit hashes, documents of 0 to 20,000 shingles."""
    rng = np.random.default_rng(seed)
    lengths = [0, 1, 2, 7, 900, 0, 20_000, 3, 16_384, 1, 0]
    hashes, offsets = rng.integers(0, 1 << 32, sum(lengths), dtype=np.uint32), np.cumsum([0, *lengths])
    ours = minhash.signatures(hashes, offsets, num_perm, seed)
    assert ours.dtype == np.uint32 and ours.shape == (len(lengths), num_perm)
    for i in range(len(lengths)):
        theirs = MinHash(num_perm=num_perm, seed=seed, hashfunc=int, scheme="affine32")
        theirs.update_batch(hashes[offsets[i]:offsets[i + 1]].tolist())
        assert (theirs.hashvalues == ours[i]).all()
    assert (np.array(minhash.permutations(num_perm, seed)) == theirs.permutations).all()


@pytest.mark.parametrize("columns, rows", [(1, 1), (3, 2), (5, 8), (64, 3), (1000, 100)])
def test_signatures_equal_the_formula_for_any_size_of_the_buffer(monkeypatch, columns, rows):
    """min over x of a x + b mod 2^32 in plain Python, wherever the blocks cut a document."""
    monkeypatch.setattr(minhash, "COLUMNS", columns)
    monkeypatch.setattr(minhash, "ROWS", rows)
    rng = random.Random(columns)
    documents = [[rng.getrandbits(32) for _ in range(rng.choice([0, 1, 4, 20, 70]))] for _ in range(12)]
    hashes = np.array([x for d in documents for x in d], dtype=np.uint32)
    a, b = (x.tolist() for x in minhash.permutations(10, 5))
    mixed = iter(minhash.fmix32(hashes).tolist())
    want = [[min(((p * x + q) % 2**32 for x in row), default=2**32 - 1) for p, q in zip(a, b)] for row in ([next(mixed) for _ in d] for d in documents)]
    assert minhash.signatures(hashes, np.cumsum([0, *map(len, documents)]), 10, 5).tolist() == want


def test_each_permutation_is_one():
    """a is odd, so a x + b takes every value modulo 2^32 once; shown modulo 2^16, where it can be counted. The older family
    a h + b mod (2^61 - 1) in uint64 overflows before the modulo: it is not the family whose theory it borrows."""
    a, b = minhash.permutations(256)
    assert (a % 2 == 1).all()
    for p, q in zip(a[:4].tolist(), b[:4].tolist()):
        assert len({(p * x + q) % 2**16 for x in range(2**16)}) == 2**16
    prime, x, h = 2**61 - 1, 2**60 + 12345, 2**31 + 7
    assert int((np.array([x], np.uint64) * np.array([h], np.uint64) % np.uint64(prime))[0]) != x * h % prime


@pytest.mark.parametrize("sketch", ["affine", "one permutation"])
def test_estimates_lie_within_four_standard_deviations(sketch):
    """Of sqrt(J (1 - J) / P) for single pairs, and without bias over 300; a longer signature is as much more exact as it
    should be: half the error for four times the length."""
    rng = np.random.default_rng(0)
    for similarity in (0.1, 0.5, 0.9):
        hashes, offsets = pairs_of_sets(rng, similarity, 300)
        true = round(400 * similarity / (1 + similarity)) / (400 - round(400 * similarity / (1 + similarity)))
        error = {}
        for num_perm in (64, 256):
            s = (minhash.signatures(minhash.upper_half(hashes), offsets, num_perm) if sketch == "affine" else
                 minhash.one_permutation(hashes, offsets, num_perm))
            estimates = (s[::2] == s[1::2]).mean(axis=1)
            sd = math.sqrt(true * (1 - true) / num_perm)
            assert np.abs(estimates - true).max() < 4.5 * sd and abs(estimates.mean() - true) < 4 * sd / math.sqrt(300)
            error[num_perm] = np.sqrt(np.mean((estimates - true) ** 2))
        assert 1.5 < error[64] / error[256] < 2.7


def test_one_permutation_fills_every_bin_in_the_same_way_in_equal_documents():
    """Down to a document of a single shingle, and for a number of bins that is no power of two; no shingle, no values."""
    hashes = np.array([5 << 60, 7, 5 << 60, 1 << 63], dtype=np.uint64)
    s = minhash.one_permutation(hashes, np.array([0, 1, 1, 4]), 100)
    assert (s[0] == s[0, 0]).all() and (s[1] == minhash.EMPTY).all() and (s[2] != minhash.EMPTY).all()
    again = minhash.one_permutation(hashes[::-1].copy(), np.array([0, 3, 4]), 100)
    assert (again[0] != minhash.EMPTY).all() and (again[1] == s[0]).all()
    alone = minhash.one_permutation(hashes[1:], np.array([0, 3]), 100)
    assert (alone[0] == s[2]).all()


# ---- bands -----------------------------------------------------------------------------------------------------------

def test_band_hashes_are_equal_where_bands_are():
    """And, of 2,000 random bands, nowhere else; places past bands * rows are not looked at."""
    s = np.random.default_rng(0).integers(0, 1 << 32, (200, 32), dtype=np.uint32)
    s[1, :9], s[1, 31] = s[0, :9], s[0, 31] + 1
    values = minhash.band_hashes(s, 10, 3)
    assert (values[0] == values[1]).tolist() == [True] * 3 + [False] * 7 and len(np.unique(values)) == 2000 - 3


@pytest.mark.parametrize("sketch", ["affine", "one permutation"])
@pytest.mark.parametrize("similarity, bands, rows", [(0.5, 32, 4), (0.7, 25, 10), (0.85, 13, 19)])
def test_pairs_become_candidates_as_often_as_the_s_curve_says(sketch, similarity, bands, rows):
    """1,500 planted pairs of one similarity; the share found lies within 3 standard deviations of 1 - (1 - s^r)^b."""
    hashes, offsets = pairs_of_sets(np.random.default_rng(7), similarity, 1500, size=400)
    common = round(800 * similarity / (1 + similarity))
    promise = candidate_probability(common / (800 - common), bands, rows)
    s = (minhash.signatures(minhash.upper_half(hashes), offsets, bands * rows) if sketch == "affine" else
         minhash.one_permutation(hashes, offsets, bands * rows))
    values = minhash.band_hashes(s, bands, rows)
    found = (values[::2] == values[1::2]).any(axis=1).mean()
    assert abs(found - promise) < 3 * math.sqrt(promise * (1 - promise) / 1500)


@pytest.mark.parametrize("num_perm, threshold, want", [(128, 0.4, (32, 4)), (128, 0.6, (18, 7)), (256, 0.7, (25, 10)), (256, 0.85, (13, 19)),
                                                       (256, 0.4, (51, 5))])
def test_bands_and_rows_are_those_of_datasketchs_optimiser(num_perm, threshold, want):
    index = MinHashLSH(threshold=threshold, num_perm=num_perm)
    assert minhash.bands_and_rows(threshold, num_perm) == (index.b, index.r) == want


def test_more_weight_on_missed_pairs_gives_more_bands_of_fewer_rows():
    """With other weights too the choice is datasketch's; the pair at the threshold is then missed less often."""
    index = MinHashLSH(threshold=0.7, num_perm=128, weights=(0.1, 0.9))
    choice = minhash.bands_and_rows(0.7, 128, 0.1, 0.9)
    assert choice == (index.b, index.r) and minhash.miss(0.7, *choice) < minhash.miss(0.7, *minhash.bands_and_rows(0.7, 128))


def test_a_threshold_is_where_the_curve_is_steep_and_no_promise():
    """The notes say that a query returns the documents above the threshold. At 0.4 with 256 permutations every ninth pair of
    similarity 0.3 is returned too and three fifths of those at 0.4 are not; at 0.85 a sixth of the pairs at 0.8 is, and a
    seventh of those at 0.9 is not. And 5 % of chance add up: with 100 partners at 0.2, believing the candidates removes a
    document with probability 99.4 %."""
    assert [round(candidate_probability(s, 51, 5), 2) for s in (0.3, 0.4, 0.6)] == [0.12, 0.41, 0.98]
    assert [round(candidate_probability(s, 13, 19), 2) for s in (0.8, 0.9)] == [0.17, 0.85]
    assert 1 - minhash.miss(0.2, 32, 4) ** 100 == pytest.approx(0.994, abs=5e-4)
    for bands, rows in ((25, 10), (32, 4), (14, 8)):
        s = np.linspace(0.001, 0.999, 999)
        slope = np.diff(candidate_probability(s, bands, rows))
        steepest = ((rows - 1) / (bands * rows - 1)) ** (1 / rows)                  # where the second derivative is zero
        assert abs(s[slope.argmax()] - steepest) < 0.002 and abs(steepest - (1 / bands) ** (1 / rows)) < 0.03


def test_expected_candidates_match_what_lsh_then_finds():
    """The estimate from the signatures alone, against the pairs below the threshold that do share a band, over 30 choices of
    the permutations."""
    rng = np.random.default_rng(3)
    pool = rng.integers(0, 1 << 32, 600, dtype=np.uint32)
    sets = [rng.choice(pool, 200, replace=False) for _ in range(60)]                   # J is about 0.2 for all pairs
    hashes, offsets = np.concatenate(sets), np.arange(61) * 200
    estimates, found = [], []
    for seed in range(30):
        s = minhash.signatures(hashes, offsets, 128, seed)
        values = minhash.band_hashes(s, 32, 4)
        estimates.append(minhash.expected_candidates(s, 32, 4, 0.4))
        found.append(np.mean([(values[i] == values[j]).any() for i, j in itertools.combinations(range(60), 2)]))
    assert np.mean(estimates) == pytest.approx(np.mean(found), rel=0.1) and 0.02 < np.mean(found) < 0.1
    assert minhash.expected_candidates(s[:1], 32, 4, 0.4) == 0


def test_the_curve_can_be_drawn(tmp_path):
    minhash.plot_s_curve(tmp_path / "curve.png", {"0.7": (25, 10), "0.4": (32, 4)})
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
