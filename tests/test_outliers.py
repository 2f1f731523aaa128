"""The language model, and the filters that need the whole corpus: three sigmas and percentiles of perplexity."""
import json
import math
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from nanollm import world
from nanollm.config import UserError
from nanollm.corpus import lm, outliers
from nanollm.corpus.outliers import Outliers


def corpus(n=1200, seed=0):
    """Documents of the demo world, English and Chinese: different, and of one language each."""
    return sorted({d.text for d in world.documents(n, seed)})


def noise(n, texts, seed=1):
    """Random strings of the same characters, as frequent as in the texts, and as long."""
    rng = random.Random(seed)
    pool = "".join(texts)
    return ["".join(rng.choices(pool, k=rng.randint(60, 300))) for _ in range(n)]


def table(texts, sources="s", reasons=None):
    return pa.table({"text": pa.array(texts, pa.large_string()), "source": pa.array([sources] * len(texts) if isinstance(sources, str) else sources),
                     "drop_reason": pa.array(reasons or [None] * len(texts), pa.string())})


# ------------------------------------------------------------------------------------------------ the language model

def by_hand(texts, text, order, known):
    """The formula at the top of lm.py with dictionaries, the counts of `text` left out if it is `known`."""
    counts, n = Counter(), 0
    for t in [*texts]:
        s = "\1\2" + t + "\3"
        counts.update(s[i:i + k] for k in (1, 2, 3) for i in range(len(s) - k + 1))
        n += len(t) + 1
    s = "\1\2" + text + "\3"
    if known:
        counts.subtract(Counter(s[i:i + k] for k in (1, 2, 3) for i in range(len(s) - k + 1)))
        n -= len(text) + 1
    total = 0.0
    for i in range(2, len(s)):
        p = (counts[s[i]] + 1) / (n + lm.V)
        if order >= 2:
            p = (counts[s[i - 1:i + 1]] + lm.K * p) / (counts[s[i - 1]] + lm.K)
        if order >= 3:
            p = (counts[s[i - 2:i + 1]] + lm.K * p) / (counts[s[i - 2:i]] + lm.K)
        total += math.log(p)
    return math.exp(-total / (len(text) + 1))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_perplexity_is_that_of_the_formula(order):
    """Hashed arrays against dictionaries, for texts that were counted and texts that were not."""
    texts = corpus(20) + ["", "a", "aaaa", "好好好"]
    model = lm.count(texts, bits=24)                                            # wide enough for no collision
    assert lm.perplexity(model, texts, order) == pytest.approx([by_hand(texts, t, order, True) for t in texts], rel=1e-9)
    new = ["a red cat 一只猫", "zqx", ""]
    assert lm.perplexity(model, new, order, leave_out=False) == pytest.approx([by_hand(texts, t, order, False) for t in new], rel=1e-9)


def test_probabilities_sum_to_one():
    """Over all characters that may follow a context: the model is a distribution, whatever was seen."""
    texts = ["abab", "abc", "ba"]
    model = lm.count(texts)
    for context in ("", "a", "ab", "zz", "ba"):
        nll = [math.log(lm.perplexity(model, [context + c], leave_out=False)[0]) * (len(context) + 2) for c in "abc"]
        end = math.log(lm.perplexity(model, [context], leave_out=False)[0]) * (len(context) + 1)
        seen = [by_hand(texts, context + c, 3, False) for c in "abc"]
        assert np.exp(np.array(nll) / (len(context) + 2)) == pytest.approx(seen) and end > 0
    p = {}
    for c in [*"abc", "z"]:                                                     # P(c | ab) = P(abc...) / P(ab...), end marks cancelled by hand
        s = by_hand(texts, "ab" + c, 3, False) ** -4 / step(texts, "b" + c, "\3")
        p[c] = s / (by_hand(texts, "ab", 3, False) ** -3 / step(texts, "ab", "\3"))
    ending = step(texts, "ab", "\3")
    assert p["a"] + p["b"] + p["c"] + p["z"] * (lm.V - 4) + ending == pytest.approx(1, abs=1e-4)


def step(texts, context, c):
    """p3(c | context) with dictionaries."""
    counts, n = Counter(), sum(len(t) + 1 for t in texts)
    for t in texts:
        s = "\1\2" + t + "\3"
        counts.update(s[i:i + k] for k in (1, 2, 3) for i in range(len(s) - k + 1))
    p = (counts[c] + 1) / (n + lm.V)
    p = (counts[context[-1] + c] + lm.K * p) / (counts[context[-1]] + lm.K)
    return (counts[context + c] + lm.K * p) / (counts[context] + lm.K)


def test_models_of_parts_add_up_to_the_model_of_the_whole(tmp_path, monkeypatch):
    """In any cut and any batch, and after a trip to the disk, byte for byte."""
    texts = corpus(200)
    whole = lm.count(texts, 18)
    parts = lm.merge(lm.count(texts[:70], 18), lm.count(texts[70:], 18))
    monkeypatch.setattr(lm, "BATCH", 500)
    small = lm.count(texts, 18)
    for other in (parts, small):
        assert all((a == b).all() for a, b in ((whole.one, other.one), (whole.two, other.two), (whole.three, other.three)))
    want = lm.perplexity(whole, texts)
    monkeypatch.undo()
    assert (lm.perplexity(whole, texts) == want).all()
    lm.save(whole, tmp_path / "a.npz")
    lm.save(parts, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (lm.perplexity(lm.load(tmp_path / "a.npz"), texts) == want).all()


def test_a_text_must_not_judge_itself():
    """Noise that was counted is the most probable text there is, and the least probable once its own counts are left out."""
    texts = corpus(300)
    junk = noise(15, texts)
    model = lm.count(texts + junk)
    own = lm.perplexity(model, texts + junk, leave_out=False)
    fair = lm.perplexity(model, texts + junk)
    assert np.median(fair[:-15]) < 5 and min(fair[-15:]) > 2 * max(fair[:-15])
    assert np.median(own[-15:]) < np.median(fair[-15:]) / 3


def test_a_sample_is_chosen_by_content():
    """With a share below 1 only the texts that were counted have counts to leave out, in whatever order they come."""
    texts = corpus(400)
    chosen = [t for t in texts if lm.counted(t, 0.3)]
    assert 0.2 < len(chosen) / len(texts) < 0.4
    model = lm.count(texts, share=0.3)
    assert (model.three == lm.count(chosen).three).all()
    got, fair, own = lm.perplexity(model, texts), *(lm.perplexity(lm.count(chosen), texts, leave_out=leave) for leave in (True, False))
    assert all(g == (f if t in chosen else o) for t, g, f, o in zip(texts, got, fair, own))
    assert lm.share_for(2**21) == 1 and lm.share_for(2**22) == 0.5


def test_noise_is_found_at_the_load_that_share_for_allows():
    """A full table lends noise the counts of others and finds none of it; half a character a slot is as good as a table without
    collisions. 1,500 texts of 20,000 made-up words of two characters, some frequent and most rare; noise is their characters shuffled."""
    rng, bits = np.random.default_rng(0), 14
    words = ["".join(map(chr, pair)) for pair in rng.integers(0x4E00, 0x5600, (20_000, 2))]
    texts = ["".join(words[i] for i in row) for row in np.minimum(rng.zipf(1.2, (1500, 75)), len(words)) - 1]
    junk = ["".join(rng.permutation([*text])) for text in texts[::20]]
    size = sum(map(len, texts + junk))
    found = {}
    for share in (lm.share_for(size, bits), 1.0):
        values = lm.perplexity(lm.count(texts + junk, bits, share), texts + junk)
        found[share] = (values[len(texts):] > np.quantile(values[:len(texts)], 0.99)).mean()
    assert found.pop(lm.share_for(size, bits)) > 0.95 and found[1.0] < 0.5 and 0 < lm.share_for(size, bits) < 0.1


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut off", b"no zip at all"])
def test_a_damaged_model_gets_one_sentence(tmp_path, data):
    (tmp_path / "lm.npz").write_bytes(data)
    for path in (tmp_path / "lm.npz", tmp_path / "none.npz"):
        with pytest.raises(UserError, match="run that stage again"):
            lm.load(path)


# ------------------------------------------------------------------------------------------------ perplexity as a filter

@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("high", [0.95, 0.99])
def test_five_percent_of_noise_is_found_by_its_perplexity(tmp_path, order, high):
    """Question 18 of the notes: at least 90 % of the planted noise goes, and next to nothing else; by the 95th percentile of
    the corpus with its noise, and by the 99th of a clean one. Unigrams suffice for noise of characters that no text has."""
    texts = corpus(1000)
    n = len(texts) // 20
    junk = noise(n, texts) if order == 3 else noise(n, ["".join(map(chr, range(0x4E00, 0x9000))) + "#$%^&*~"])
    everything = texts + junk
    lm.save(lm.count(everything, bits=18), tmp_path / "lm.npz")
    cfg = Outliers(lm=str(tmp_path / "lm.npz"), stats=str(tmp_path / "stats.json"), order=order, sigmas=0, high=high, low=0)
    stats = outliers.measure(table(everything if high == 0.95 else texts), cfg)
    (tmp_path / "stats.json").write_text(json.dumps(stats), encoding="utf-8")
    gone = np.array(outliers.outliers(table(everything), cfg)["drop_reason"].to_pylist()) == "perplexity_high"
    assert gone[len(texts):].sum() >= 0.9 * n and gone[:len(texts)].sum() <= 0.01 * len(texts)


def test_dropping_only_low_perplexity_keeps_all_garbage(tmp_path):
    """The notes say 丢弃低perplexity数据. Noise is never there: only the repetitive texts are, and they alone go."""
    texts = corpus(1000)
    junk, loops = noise(50, texts), [f"{i}，" + "点击这里查看更多内容。" * 12 for i in range(5)]
    everything = texts + junk + loops
    lm.save(lm.count(everything, bits=18), tmp_path / "lm.npz")
    cfg = Outliers(lm=str(tmp_path / "lm.npz"), stats=str(tmp_path / "stats.json"), sigmas=0, high=1, low=0.01)
    (tmp_path / "stats.json").write_text(json.dumps(outliers.measure(table(everything), cfg)), encoding="utf-8")
    reasons = outliers.outliers(table(everything), cfg)["drop_reason"].to_pylist()
    assert reasons[len(texts):-5] == [None] * 50 and reasons[-5:] == ["perplexity_low"] * 5
    assert set(reasons) == {None, "perplexity_low"}


# ------------------------------------------------------------------------------------------------ three sigmas

def normal_rows(n, seed=0):
    """n texts of letters with log-normal lengths around 400, none in the tail beyond 2.5 sigmas, and one 50 times as long."""
    rng = random.Random(seed)
    sizes = [math.exp(6 + 0.3 * max(-2.5, min(2.5, rng.gauss(0, 1)))) for _ in range(n)]
    make = lambda size: ". ".join("abcdefgh ijkl mnopqrs" for _ in range(int(size / 23))) + "."
    return [make(size) for size in sizes] + [make(400 * 50)]


def test_an_outlier_of_fifty_times_the_length_is_removed(tmp_path):
    """Question 25: it goes, with its reason, and at most half a percent of the normal rows with it."""
    texts = normal_rows(600)
    cfg = Outliers(stats=str(tmp_path / "stats.json"))
    (tmp_path / "stats.json").write_text(json.dumps(outliers.measure(table(texts), cfg)), encoding="utf-8")
    reasons = outliers.outliers(table(texts), cfg)["drop_reason"].to_pylist()
    assert reasons[-1] == "sigma_log_chars" and sum(r is not None for r in reasons[:-1]) <= 0.005 * 600
    assert set(outliers.outliers(table(texts), Outliers(stats=cfg.stats, sigmas=0))["drop_reason"].to_pylist()) == {None}


def test_mean_and_deviation_are_right_to_a_bin():
    """The histogram against numpy on the values themselves; quantiles drop no more than they say."""
    texts = corpus(500)
    cfg = Outliers()
    for metric, values in outliers.metrics(texts, cfg).items():
        width = (outliers.METRICS[metric][1] - outliers.METRICS[metric][0]) / outliers.BINS
        array = np.bincount(outliers.bins(metric, values), minlength=outliers.BINS)
        mean, sd = outliers.mean_and_sd(metric, array)
        assert abs(mean - values.mean()) <= width and abs(sd - values.std()) <= width
        for q in (0.005, 0.5, 0.99):
            at = outliers.quantile_bin(array, q)
            assert array[:at].sum() < q * len(texts) <= array[:at + 1].sum()


def test_statistics_merge_by_addition():
    """Any cut into tables gives the same numbers, and each source has its own."""
    texts = corpus(300)
    sources = ["web" if i % 3 else "wiki" for i in range(len(texts))]
    whole = outliers.measure(table(texts, sources), Outliers())
    merged = {}
    for i in range(0, len(texts), 37):
        merged = outliers.merge(merged, outliers.measure(table(texts[i:i + 37], sources[i:i + 37]), Outliers()))
    assert merged == whole and set(whole) == {"web", "wiki"} and json.loads(json.dumps(whole)) == whole
    assert sum(whole["wiki"]["alnum"].values()) == sources.count("wiki")


def test_each_source_is_judged_by_itself_and_a_small_one_not_at_all(tmp_path):
    """A short text is an outlier among long ones and none among short ones; five documents have no outliers."""
    long, short = normal_rows(300)[:-1], [t[:60] for t in normal_rows(300, seed=1)[:-1]]
    texts, sources = long + short + [short[0], short[0]], ["long"] * 300 + ["short"] * 300 + ["long", "few"]
    cfg = Outliers(stats=str(tmp_path / "stats.json"))
    (tmp_path / "stats.json").write_text(json.dumps(outliers.measure(table(texts, sources), cfg)), encoding="utf-8")
    reasons = outliers.outliers(table(texts, sources), cfg)["drop_reason"].to_pylist()
    assert reasons[600] == "sigma_log_chars" and reasons[601] is None and not any(reasons[300:600])


def test_a_reason_that_is_set_stays_and_is_not_measured(tmp_path):
    texts = normal_rows(200)
    reasons = [None] * 200 + ["too_short"]
    cfg = Outliers(stats=str(tmp_path / "stats.json"))
    stats = outliers.measure(table(texts, "s", reasons), cfg)
    assert sum(stats["s"]["log_chars"].values()) == 200
    (tmp_path / "stats.json").write_text(json.dumps(stats), encoding="utf-8")
    got = outliers.outliers(table(texts, "s", reasons), cfg)
    assert got["drop_reason"].to_pylist()[-1] == "too_short" and got["text"].to_pylist() == texts
    assert outliers.outliers(table([]), cfg).num_rows == 0


@pytest.mark.parametrize("content", [None, "", "[]", '{"s": {"log_chars": {"x": 1}}}', '{"s": 3}', '{"s": {"log_chars": {"99999": 500}}}'])
def test_statistics_that_are_none_get_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "stats.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="stats.json"):
        outliers.outliers(table(["a text"]), Outliers(stats=str(tmp_path / "stats.json")))
