"""The quality column: any function of the text, checked; the built-in rules; selection by threshold and by chance."""
import pickle

import numpy as np
import pyarrow as pa
import pytest

from nanollm.config import UserError, parse
from nanollm.corpus import options, score

GOOD = ["今天天气很好，我们去公园散步。孩子们在草地上放风筝，老人坐在树下聊天，风一吹，花香就飘过来。到了傍晚，天边的云慢慢红了，"
        "大家才收拾东西，说说笑笑地往家走。路过桥头时，有人指着水里的倒影说，明天大概还是晴天，不如再来一次。",
        "The harbour was quiet. Two boats came in before noon, and the men carried their nets to the wall. Nobody spoke much; the "
        "price of fish had fallen again, and the weather would not hold. By evening the square was full of people.",
        "Photosynthesis turns light into sugar. It takes place in the leaves, where chlorophyll absorbs mostly red and blue.\n"
        "Without water it stops, and at night it does not run at all."]
BAD = {"keywords": "手机 电脑 平板 优惠 促销 打折 包邮 正品 热卖 新款 手机壳 充电宝 耳机 数据线 " * 4,
       "menu": "首页\n新闻\n体育\n财经\n登录\n注册\n关于我们\n联系我们\n" * 4,
       "repetition": "点击购买，立刻省钱！" * 40,
       "noise": "@@## $$%% ^^&& ** (( )) == ++ ~~ || <> {} [] " * 8,
       "numbers": "\n".join(f"{i} {i * 37 % 1000} {i * 91 % 1000}" for i in range(60)),
       "empty": ""}


def table_of(texts, start=0):
    return pa.table({"id": [f"d{i}" for i in range(start, start + len(texts))], "text": pa.array(texts, pa.large_string()),
                     "meta": [""] * len(texts), "docno": np.arange(start, start + len(texts))})


def scorer(tmp_path, source, name="quality"):
    path = tmp_path / "my_scorer.py"
    path.write_text(source, encoding="utf-8")
    score.load_scorer.cache_clear()
    return f"{path}:{name}"


# ---- the built-in rules ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", BAD)
def test_prose_of_both_languages_scores_above_every_kind_of_junk(kind):
    """Chinese and English alike: no rule counts words at blanks."""
    good, (bad,) = score.rule_scores(GOOD), score.rule_scores([BAD[kind]])
    assert bad < 0.5 < 0.8 < good.min() and good.max() <= 1


@pytest.mark.parametrize("rule, text, want", [
    ("letters", "ab12 ..", 2 / 6),
    ("punctuation", "好，好！ ok", 2 / 6),
    ("line_ends", "完了。\n\n没有完\n“真的？”\nyes.", 3 / 4),
    ("distinct", "一二三一二三", 3 / 4),
    ("length", "a b\n\u3000c", 3),
])
def test_each_measure_is_the_share_it_says(rule, text, want):
    """The 4 shingles of 一二三一二三 are 一二三 twice, 二三一 and 三一二."""
    assert score.measures(["x", text])[1, list(score.RULES).index(rule)] == pytest.approx(want)


def test_the_weights_add_up_to_one_and_a_perfect_text_scores_one():
    assert sum(rule[0] for rule in score.RULES.values()) == pytest.approx(1)
    assert score.rule_scores([GOOD[0]])[0] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("size", [1, 7, 1024])
def test_scores_and_draws_do_not_depend_on_the_batch(size):
    texts = (GOOD + list(BAD.values())) * 5
    cfg = score.Score(select="sample")
    parts = [score.score(table_of(texts).slice(i, size), cfg) for i in range(0, len(texts), size)]
    assert pa.concat_tables(parts).to_pylist() == score.score(table_of(texts), cfg).to_pylist()


# ---- any callable ----------------------------------------------------------------------------------------------------

def test_a_function_of_one_text_and_one_of_many_give_the_same_column(tmp_path):
    """The name of the parameter says which it is."""
    texts = ["a", "bb", "", "dddd"]
    one = score.score(table_of(texts), score.Score(scorer(tmp_path, "def quality(text):\n    return len(text)")))
    many = score.score(table_of(texts), score.Score(scorer(tmp_path, "def quality(texts):\n    return [len(t) for t in texts]")))
    assert one["quality"].to_pylist() == many["quality"].to_pylist() == [1, 2, 0, 4]
    assert one.schema.field("quality").type == pa.float32() and "drop_reason" not in one.column_names


def test_a_numpy_array_is_a_list_of_numbers(tmp_path):
    spec = scorer(tmp_path, "import numpy as np\ndef quality(texts):\n    return np.ones(len(texts), dtype=np.float32)")
    assert score.score(table_of(["a", "b"]), score.Score(spec))["quality"].to_pylist() == [1, 1]


@pytest.mark.parametrize("source, what", [
    ("import no_such_module\n", "cannot be loaded: ModuleNotFoundError"),
    ("def quality(text)\n", "cannot be loaded: SyntaxError"),
    ("raise SystemExit(3)\n", "cannot be loaded: SystemExit"),
    ("def other(text):\n    return 1\n", "has no function quality"),
    ("quality = 3\n", "has no function quality"),
    ("def quality(text):\n    return 1 / len(text.strip('b'))\n", "failed on the documents d0 to d1: ZeroDivisionError"),
    ("def quality(text):\n    return 'good'\n", "returned 'good' for the document d0"),
    ("def quality(text):\n    return None\n", "returned None for the document d0"),
    ("def quality(text):\n    return float('nan') if text == 'b' else 1.0\n", "returned nan for the document d1"),
    ("def quality(text):\n    return float('inf')\n", "returned inf"),
    ("def quality(texts):\n    return [1.0]\n", "returned 1 numbers for 2 texts"),
])
def test_a_bad_scorer_is_refused_in_a_sentence_that_says_where(tmp_path, source, what):
    spec = scorer(tmp_path, source)
    with pytest.raises(UserError, match=what) as error:
        score.score(table_of(["a", "b"]), score.Score(spec))
    assert "my_scorer.py:quality" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("spec, what", [
    ("nowhere.py:quality", "does not exist"), ("quality", "FILE.py:function"), ("file.py", "FILE.py:function"),
    ("file.py:", "FILE.py:function"), ("data.json:f", "FILE.py:function"), ("file.py:a.b", "FILE.py:function")])
def test_a_scorer_that_names_no_file_or_function_is_refused(spec, what):
    with pytest.raises(UserError, match=what):
        score.score(table_of(["a"]), score.Score(spec))


def test_a_windows_path_has_a_colon_of_its_own(tmp_path):
    """The function is what stands after the last one."""
    with pytest.raises(UserError, match=r"the file C:/my/scorer.py does not exist"):
        score.load_scorer("C:/my/scorer.py:f")


def test_the_stage_travels_to_a_worker(tmp_path):
    """Module-level and configured by a frozen dataclass: both pickle."""
    function, cfg = pickle.loads(pickle.dumps((score.score, score.Score(select="threshold"))))
    assert function(table_of(GOOD), cfg)["drop_reason"].to_pylist() == [None] * 3


# ---- selection -------------------------------------------------------------------------------------------------------

@pytest.fixture
def number(tmp_path):
    """A scorer that reads the text as a number."""
    return scorer(tmp_path, "def quality(text):\n    return float(text)")


def test_a_threshold_keeps_what_reaches_it(number):
    """0.7 as a float32 is below 0.7: numpy compares both in the column's precision."""
    out = score.score(table_of(["0.69", "0.7", "0.71"]), score.Score(number, "threshold", threshold=0.7))
    assert out["drop_reason"].to_pylist() == ["quality", None, None]


def test_a_threshold_may_be_negative(number):
    """A scorer may return any number, a log-probability for one; nan is no threshold."""
    cfg = parse(options.Score, ["--select", "threshold", "--threshold", "-3.5", "--low", "-2", "--high", "-1e-3"])
    assert (cfg.threshold, cfg.low, cfg.high) == (-3.5, -2, -0.001)
    assert score.score(table_of(["-3.6", "-3.5"]), score.Score(number, cfg.select, cfg.threshold))["drop_reason"].to_pylist() == ["quality", None]
    with pytest.raises(UserError, match="--threshold nan"):
        parse(options.Score, ["--threshold", "nan"])


def test_sampling_keeps_with_the_probability_of_the_score(number):
    """20,000 documents of each score; shares within 4 standard deviations, none at `low`, all at `high`."""
    n = 20_000
    for value, p in ((0.2, 0), (0.35, 0.25), (0.5, 0.5), (0.8, 1), (7, 1), (-1, 0)):
        kept = score.score(table_of([str(value)] * n), score.Score(number, "sample"))["drop_reason"].null_count / n
        assert abs(kept - p) <= 4 * (p * (1 - p) / n) ** 0.5 + 1e-4, value


def test_a_better_score_never_loses_a_document_that_a_worse_one_keeps(number):
    """The draw hangs on seed and document number only."""
    worse, better = (score.score(table_of([q] * 2000), score.Score(number, "sample"))["drop_reason"].to_pylist() for q in ("0.4", "0.6"))
    assert not any(b and not a for a, b in zip(worse, better)) and worse != better


def test_another_seed_draws_other_documents(number):
    draws = [score.score(table_of(["0.5"] * 200), score.Score(number, "sample", seed=s))["drop_reason"].to_pylist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_impossible_selections_and_a_table_without_numbers_are_refused(number):
    with pytest.raises(UserError, match="none, threshold or sample"):
        score.Score(select="best")
    with pytest.raises(UserError, match="below high"):
        score.Score(select="sample", low=0.8, high=0.2)
    with pytest.raises(UserError, match="docno"):
        score.score(table_of(["0.5"]).drop_columns("docno"), score.Score(number, "sample"))
