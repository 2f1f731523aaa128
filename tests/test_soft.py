"""Soft deduplication: the more a document resembles others, the less it weighs; and weights become counts by chance."""
import math
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from test_ngrams import MIXED, slow_units

from nanollm.config import UserError
from nanollm.corpus import ngrams, soft
from nanollm.corpus.soft import Soft

WORDS = "river stone cloud bread light paper window garden silver morning 山 水 风 云 花 鸟 人 家 天 地".split()


def sentence(rng, n=60):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def texts_of(count, seed=0):
    rng = random.Random(seed)
    return [sentence(rng, rng.choice([0, 1, 3, 60])) for _ in range(count)] + MIXED


def table_of(texts, start=0):
    return pa.table({"text": pa.array(texts, pa.large_string()), "docno": np.arange(start, start + len(texts))})


# ---- (i) tf-idf ------------------------------------------------------------------------------------------------------

def test_cosines_are_those_of_the_textbook():
    """tf * ln((1 + D) / (1 + df)) over pairs of units, by dictionaries."""
    texts = texts_of(40)
    grams = [Counter(tuple(u for u, _, _ in slow_units(t)[i:i + 2]) for i in range(max(len(slow_units(t)) - 1, bool(slow_units(t)))))
             for t in texts]
    df = Counter(g for own in grams for g in own)
    vectors = [{g: tf * math.log((1 + len(texts)) / (1 + df[g])) for g, tf in own.items()} for own in grams]

    def cosine(a, b):
        norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        return sum(v * b.get(g, 0) for g, v in a.items()) / norms if norms else 0.0
    pairs = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts))]
    found = soft.cosines(texts, pairs, ngrams.document_frequency(texts, 2), len(texts))
    assert np.allclose(found, [cosine(vectors[i], vectors[j]) for i, j in pairs], atol=1e-9)


def test_a_copy_has_cosine_one_and_no_pair_is_fine():
    texts = [sentence(random.Random(1)), sentence(random.Random(2)), sentence(random.Random(1))]
    frequency = ngrams.document_frequency(texts, 2)
    a, b = soft.cosines(texts, [(0, 2), (0, 1)], frequency, 3)
    assert a == pytest.approx(1) and b < 0.6 and len(soft.cosines(texts, np.zeros((0, 2), dtype=int), frequency, 3)) == 0


@pytest.mark.parametrize("s, weight", [(0.0, 1.0), (0.49, 1.0), (0.5, 1.0), (0.75, 0.5), (0.9, 0.2), (0.95, 0.1), (1.0, 0.1)])
def test_the_weight_falls_from_one_at_one_half_to_a_tenth(tmp_path, s, weight):
    np.save(tmp_path / "nearest.npy", np.full(3, s, dtype=np.float32))
    soft.load.cache_clear()
    out = soft.weigh_nearest(table_of(["a"], start=2), Soft(nearest=str(tmp_path / "nearest.npy")))
    assert out["weight"].to_pylist() == [pytest.approx(weight, abs=1e-6)] and out.schema.field("weight").type == pa.float32()


def test_the_first_of_several_copies_keeps_its_weight(tmp_path):
    """Only earlier neighbours count: five copies weigh 1 + 4 * 0.1 together, never less than one document."""
    one = sentence(random.Random(1))
    texts = [one, sentence(random.Random(2)), one, one, one, one]
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    cosine = soft.cosines(texts, pairs, ngrams.document_frequency(texts, 2), 6)
    np.save(tmp_path / "nearest.npy", soft.nearest_earlier(np.array(pairs), cosine, 6))
    soft.load.cache_clear()
    weights = soft.weigh_nearest(table_of(texts), Soft(nearest=str(tmp_path / "nearest.npy")))["weight"].to_pylist()
    assert weights == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1])


def test_the_nearest_of_several_neighbours_counts_whatever_the_order_of_the_pairs():
    """A pair may be written either way round; the later document gets the value."""
    pairs = np.array([(0, 3), (3, 1), (2, 3), (4, 0)])
    assert soft.nearest_earlier(pairs, np.array([0.2, 0.9, 0.5, 0.7]), 5).tolist() == pytest.approx([0, 0, 0, 0.9, 0.7])


# ---- (ii) commonness -------------------------------------------------------------------------------------------------

def slow_commonness(text, corpus, bits):
    """The recursion of the docstring with dictionaries instead of tables; one less of everything for a text of the corpus."""
    units, own = [[u for u, _, _ in slow_units(t)] for t in corpus], [u for u, _, _ in slow_units(text)]
    count = Counter(tuple(u[i:i + n]) for u in units for n in range(1, 5) for i in range(len(u) - n + 1))
    count[()], less, logs = sum(map(len, units)), text in corpus, []
    for at, word in enumerate(own):
        p = 2.0**-bits
        for n in range(min(at, 3) + 1):
            history = tuple(own[at - n:at])
            p = min((count[(*history, word)] - less + soft.PRIOR * p) / (count[history] - less + soft.PRIOR), 1)
        logs.append(math.log(p))
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def test_commonness_is_the_geometric_mean_of_the_interpolated_four_gram_model():
    """Tables of 2^20 counters have no collision here, so the dictionaries say the same; of texts that were not counted too."""
    corpus = texts_of(30)
    counts = soft.count_ngrams(table_of(corpus), Soft(bits=20))
    for text in corpus + ["a quite different text", "山 水 bread 风"]:
        assert soft.commonness_of([text], counts, [text in corpus])[0] == pytest.approx(slow_commonness(text, corpus, 20), rel=1e-4)


def test_a_sample_of_the_documents_is_counted_and_only_its_own_documents_leave_themselves_out():
    """The counts of a sample are those of its documents alone, and a document outside reads them as they are."""
    texts = texts_of(200)
    cfg = Soft(bits=14, sample=0.3, seed=5)
    chosen = soft.sampled(table_of(texts), cfg)
    inside = [t for t, yes in zip(texts, chosen) if yes]
    counts = soft.count_ngrams(table_of(texts), cfg)
    assert 0.15 < chosen.mean() < 0.45 and np.array_equal(counts, soft.count_ngrams(table_of(inside), Soft(bits=14)))
    first = int(np.flatnonzero([len(t) > 100 for t in texts] & chosen)[0])
    member, stranger = (soft.commonness_of([texts[first]], counts, [own])[0] for own in (True, False))
    assert member < stranger


def test_counts_can_be_gathered_in_place():
    texts, cfg = texts_of(50), Soft(bits=12)
    counts = soft.count_ngrams(table_of(texts[:9]), cfg)
    assert soft.count_ngrams(table_of(texts[9:]), cfg, counts) is counts
    assert np.array_equal(counts, soft.count_ngrams(table_of(texts), cfg))


def test_tables_that_are_too_full_are_refused_with_the_sample_that_fits(tmp_path):
    """1,000 units in 1,024 counters: every n-gram would meet another one and look common."""
    table = table_of(["山水风云花鸟人家天地" * 10] * 10)
    np.save(tmp_path / "counts.npy", soft.count_ngrams(table, Soft(bits=10)))
    soft.load.cache_clear()
    with pytest.raises(UserError, match=r"1,000 units were counted in tables for 256; count again with a sample of 0.26"):
        soft.commonness(table, Soft(counts=str(tmp_path / "counts.npy"), bits=10))


def test_counts_of_two_halves_add_up():
    texts = texts_of(50)
    whole, parts = soft.count_ngrams(table_of(texts), Soft(bits=12)), [soft.count_ngrams(table_of(t), Soft(bits=12)) for t in (texts[:9], texts[9:])]
    assert np.array_equal(whole, parts[0] + parts[1]) and whole.shape == (4, 4096)


def test_full_tables_still_give_probabilities():
    """16 counters an order, everything collides: p stays in (0, 1]."""
    texts = texts_of(30)
    values = soft.commonness_of(texts, soft.count_ngrams(table_of(texts), Soft(bits=4)), [True] * len(texts))
    assert (values >= 0).all() and (values <= 1).all() and values.max() > 0


@pytest.mark.parametrize("size", [1, 7, 1024])
def test_commonness_does_not_depend_on_the_batch(tmp_path, size):
    texts = texts_of(60)
    np.save(tmp_path / "counts.npy", soft.count_ngrams(table_of(texts), Soft(bits=14)))
    cfg = Soft(counts=str(tmp_path / "counts.npy"))
    soft.load.cache_clear()
    parts = [soft.commonness(table_of(texts).slice(i, size), cfg) for i in range(0, len(texts), size)]
    assert pa.concat_tables(parts).to_pylist() == soft.commonness(table_of(texts), cfg).to_pylist()


def test_repeated_documents_are_common_and_weigh_less(tmp_path):
    """A template in 50 of 150 documents has the least weights; what occurs once, the most, however small the corpus.
    Weights fall as commonness rises, by at most the ratio, and are 1 on the average."""
    rng = random.Random(4)
    vocabulary = ["".join(rng.choice("abcdefghij") for _ in range(6)) for _ in range(3000)]
    fresh = [" ".join(rng.choice(vocabulary) for _ in range(50)) for _ in range(100)]
    template = " ".join(rng.choice(vocabulary) for _ in range(45))
    texts = [text for i, text in enumerate(fresh) for text in [text] + [f"{template} {i} " + text[:20]] * (i % 2)]
    table = table_of(texts)
    np.save(tmp_path / "counts.npy", soft.count_ngrams(table, Soft(bits=16)))
    cfg = Soft(counts=str(tmp_path / "counts.npy"), buckets=str(tmp_path / "buckets.npz"))
    soft.load.cache_clear()
    table = soft.commonness(table, cfg)
    soft.save_buckets(table["commonness"].to_numpy(), cfg.buckets, buckets=10, ratio=10)
    weights = soft.weigh_commonness(table, cfg)["weight"].to_numpy()
    copied = np.array([template in text for text in texts])
    assert 3 * weights[copied].max() < np.median(weights[~copied]) and weights.mean() == pytest.approx(1, abs=1e-6)
    order = np.argsort(table["commonness"].to_numpy(), kind="stable")
    assert (np.diff(weights[order]) <= 1e-7).all() and weights.max() / weights.min() <= 10.001


def test_fewer_documents_than_buckets_are_a_bucket_each(tmp_path):
    """And values that are all equal weigh the same."""
    soft.save_buckets([0.1, 0.4, 0.2], tmp_path / "b.npz")
    soft.load.cache_clear()
    table = soft.weigh_commonness(pa.table({"commonness": pa.array([0.1, 0.2, 0.4], pa.float32())}), Soft(buckets=str(tmp_path / "b.npz")))
    assert np.allclose(table["weight"].to_numpy(), np.array([2, 1, 0.5]) / (3.5 / 3))


# ---- using the weights -----------------------------------------------------------------------------------------------

def thinned(weights, seed=0, start=0):
    table = table_of([""] * len(weights), start).append_column("weight", pa.array(weights, pa.float32()))
    return soft.thin(table, Soft(seed=seed))


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 1.0, 2.3])
def test_a_document_is_used_as_often_as_it_weighs_on_the_average(weight):
    """20,000 draws: the floor or one more, the mean within 4 standard deviations; dropped exactly where the count is 0."""
    out, n = thinned([weight] * 20_000), 20_000
    repeats, p = out["repeats"].to_numpy(), weight % 1
    assert set(repeats) <= {math.floor(weight), math.floor(weight) + 1}
    assert abs(repeats.mean() - weight) <= 4 * (p * (1 - p) / n) ** 0.5 + 1e-6
    assert out["drop_reason"].to_pylist() == ["thinned" if r == 0 else None for r in repeats]


def test_the_draw_hangs_on_the_document_number_and_the_seed_only():
    whole = thinned([0.5] * 100)["repeats"].to_pylist()
    assert whole[40:50] == thinned([0.5] * 10, start=40)["repeats"].to_pylist()
    assert whole != thinned([0.5] * 100, seed=1)["repeats"].to_pylist()


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_an_impossible_weight_is_refused(weight):
    with pytest.raises(UserError, match="weight"):
        thinned([1.0, weight])


def test_missing_statistics_are_refused(tmp_path):
    with pytest.raises(UserError, match="gather them again"):
        soft.weigh_nearest(table_of(["a"]), Soft(nearest=str(tmp_path / "none.npy")))
