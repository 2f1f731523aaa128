"""Decontamination: a question of an evaluation set is found in a document however it is printed, a generic stem is not, and
what was found is cut or dropped and reported."""
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from nanollm.config import UserError
from nanollm.corpus import decontaminate as dc

STEM = "下列关于我国古代科举制度及其影响的各种说法中正确的是"                 # two items begin so
BIOLOGY = [
    ("在温度适宜而光照逐渐增强的条件下，水稻叶片的光合速率先升高后保持不变，此时的限制因素最可能是",
     ["二氧化碳浓度", "叶绿素含量", "土壤水分", "环境温度"]),
    ("What is the name of the process by which green plants turn sunlight, water and carbon dioxide into sugar?",
     ["Respiration", "Photosynthesis", "Fermentation", "Transpiration"]),
    ("细胞膜的主要成分是什么物质", ["脂质和蛋白质", "糖类", "核酸", "无机盐"]),                 # 13 units
    ("人体最大的内脏器官是", ["肝脏", "肺", "胃", "脾"]),                                   # 10: sought as a whole
    ("DNA的全称", ["脱氧核糖核酸", "核糖核酸", "蛋白质", "多糖"]),                             # 4: too short by itself
]
HISTORY = [(STEM, ["始于隋朝，废于清末光绪三十一年", "始于汉朝", "只考诗赋", "从未中断"]),
           (STEM, ["殿试由皇帝亲自主持，不黜落考生", "乡试在京城举行", "会试由县令主持", "童生即为举人"]),
           ("某地新出土的一批竹简记载了秦代的户籍登记方式和赋税征收的数量，这批竹简属于", ["第一手史料", "第二手史料", "口述史料", "文学史料"])]
TOKENS = ["山", "水", "风", "云", "花", "鸟", "鱼", "虫", "river", "stone", "cloud", "42", "，", "。", " "]


def filler(length, seed):
    """`length` characters that are in no item."""
    rng = np.random.default_rng(seed)
    return "".join(TOKENS[i] for i in rng.integers(0, len(TOKENS), length))[:length]


def write_csv(path, items):
    quoted = [[q, *options, "A"] for q, options in items]
    rows = [",Question,A,B,C,D,Answer"] + [f"{i}," + ",".join(f'"{x}"' for x in row) for i, row in enumerate(quoted)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8-sig")


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "cmmlu"
    folder.mkdir()
    write_csv(folder / "biology.csv", BIOLOGY)
    write_csv(folder / "history.csv", HISTORY)
    path = str(tmp_path / "index.npz")
    dc.build_index([folder], path)
    return path


def table_of(texts, metas=None):
    return pa.table({"id": [str(i) for i in range(len(texts))], "text": pa.array(texts, pa.large_string()),
                     "meta": metas or [""] * len(texts)})


def found_items(path, text):
    """The names of the items whose keys prove something about the text."""
    index, proof = dc.load_index(path), dc.evidence(dc.Decontaminate(path))
    return sorted(set(index.items[index.owner[[k for k in dc.search(index, [text])[1] if proof[k]]]].tolist()))


# ---- what is found ---------------------------------------------------------------------------------------------------

QUESTION = BIOLOGY[0][0]


@pytest.mark.parametrize("printed", [
    QUESTION,
    QUESTION.replace("，", ""),
    QUESTION.replace("，", ",\n"),
    " ".join(QUESTION),
    "“" + "—".join(QUESTION) + "”",
    "1．（2021·全国卷）" + QUESTION + "（　　）",
])
def test_a_chinese_question_is_found_through_blanks_and_punctuation(index, printed):
    assert found_items(index, filler(500, 1) + printed + filler(500, 2)) == ["biology:2"]


@pytest.mark.parametrize("change", [str.upper, str.title, lambda q: q.replace(" ", "\n"), lambda q: q.replace(",", " --"),
                                    lambda q: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in q)])
def test_an_english_question_is_found_through_case_width_and_punctuation(index, change):
    """The last one is set in full-width letters."""
    assert found_items(index, "It goes like this: " + change(BIOLOGY[1][0])) == ["biology:3"]


def test_half_a_question_is_enough_and_a_dozen_units_are_not(index):
    """n = 13: thirteen units in a row are evidence, twelve are not."""
    units = "温度适宜而光照逐渐增强的条件下"[:14]
    assert found_items(index, "山" + units[:13] + "水") == ["biology:2"] and found_items(index, "山" + units[:12] + "水") == []


def test_a_short_question_is_found_as_a_whole_and_a_shorter_one_only_with_its_options(index):
    """10 units: whole; 4 units ("DNA的全称"): only as printed with its options, whatever the marks of the options."""
    assert found_items(index, "请问，人体最大的内脏器官是？") == ["biology:5"]
    assert found_items(index, "请问，人体最大的内脏器官") == []
    assert found_items(index, "DNA的全称是什么？") == []
    assert found_items(index, "DNA的全称 (A) 脱氧核糖核酸 (B) 核糖核酸 (C) 蛋白质") == ["biology:6"]
    assert found_items(index, "DNA的全称\nA、脱氧核糖核酸\nB、核糖核酸\nC、蛋白质") == ["biology:6"]


def test_a_stem_that_two_questions_share_is_no_evidence(index):
    """下列关于…的说法正确的是: the stem alone is nothing, the stem with the options of one item is that item."""
    assert found_items(index, "考试技巧：" + STEM + "，这类题目要看清题干") == []
    assert found_items(index, STEM + "（A）始于隋朝，废于清末光绪三十一年") == ["history:2"]


def test_a_short_question_inside_a_longer_one_is_no_evidence(tmp_path):
    """Shared does not only mean that two items have the same n-gram."""
    (tmp_path / "items.txt").write_text("下列说法中不正确的是\n阅读上面这段材料，下列说法中不正确的是哪一项，并说明你的理由\n", encoding="utf-8")
    dc.build_index([tmp_path / "items.txt"], tmp_path / "index.npz")
    assert found_items(str(tmp_path / "index.npz"), "选出下列说法中不正确的是（　）") == []


def test_items_that_are_equal_throughout_count_once_and_stay_findable(tmp_path):
    """A question that two files have would otherwise be "shared" and pass for ever."""
    write_csv(tmp_path / "a.csv", BIOLOGY[:1])
    write_csv(tmp_path / "b.csv", [(BIOLOGY[0][0].replace("，", " "), BIOLOGY[0][1]), BIOLOGY[1]])
    path = str(tmp_path / "index.npz")
    dc.build_index([tmp_path / "a.csv", tmp_path / "b.csv"], path)
    assert found_items(path, QUESTION) == ["a:2"]
    rows = dc.report(dc.Decontaminate(path), Counter(), Counter())
    assert [(row["task"], row["items"], row["copies"]) for row in rows] == [("a", 1, 0), ("b", 1, 1)]


def test_search_finds_every_window_that_brute_force_finds(index):
    """All 13-grams of units of every item in a long random text with scraps of items in it."""
    from test_ngrams import slow_units
    items = [q + "\n" + "\n".join(f"{label}. {o}" for label, o in zip("abcd", options)) for q, options in BIOLOGY + HISTORY]
    grams = {tuple(u for u, _, _ in slow_units(text)[i:i + 13]) for text in items for i in range(len(slow_units(text)) - 12)}
    rng = np.random.default_rng(0)
    texts = []
    for seed in range(30):
        text = filler(200, seed)
        for item in rng.choice(len(items), 3):
            at, length = rng.integers(0, 20), rng.integers(5, 40)
            text += items[item][at:at + length] + filler(30, seed + 100)
        texts.append(text)
    want = {(d, units[i][1], units[i + 12][2]) for d, units in enumerate(map(slow_units, texts)) for i in range(len(units) - 12)
            if tuple(u for u, _, _ in units[i:i + 13]) in grams}
    index = dc.load_index(index)
    document, key, start, end = dc.search(index._replace(short=index.short[:0], lengths=index.lengths[:0]), texts)
    assert len(want) > 50 and set(zip(document.tolist(), start.tolist(), end.tolist())) == want


@pytest.mark.parametrize("size", [1, 7, 1024])
def test_the_stage_does_not_depend_on_the_batch(index, size):
    """Rows in = rows out, in order, the same whatever the tables."""
    texts = [filler(300, i) + (BIOLOGY[i % 5][0] if i % 3 else "") + filler(300, i + 50) for i in range(40)]
    table, cfg = table_of(texts), dc.Decontaminate(index)
    parts = [dc.decontaminate(table.slice(i, size), cfg) for i in range(0, 40, size)]
    assert pa.concat_tables(parts).to_pylist() == dc.decontaminate(table, cfg).to_pylist()


# ---- the second rule -------------------------------------------------------------------------------------------------

def test_an_ngram_in_more_than_ten_documents_is_no_evidence(index, tmp_path):
    """Counted in a first pass, table by table; 11 documents quote one item, 10 another."""
    common, rare = HISTORY[2][0], BIOLOGY[0][0]
    texts = [common] * 11 + [rare] * 10
    counts = sum(dc.document_counts(table_of(texts[i:i + 4]), dc.Decontaminate(index)) for i in range(0, 21, 4))
    assert np.array_equal(counts, dc.document_counts(table_of(texts), dc.Decontaminate(index)))
    np.save(tmp_path / "counts.npy", counts)
    cfg = dc.Decontaminate(index, frequency=str(tmp_path / "counts.npy"))
    reasons = dc.decontaminate(table_of(texts), cfg)["drop_reason"].to_pylist()
    assert reasons == [None] * 11 + ["contaminated"] * 10
    report = {row["task"]: row for row in dc.report(cfg, *dc.tally(dc.decontaminate(table_of(texts), cfg), cfg))}
    assert report["history"]["common"] > 0 and report["history"]["items_hit"] == 0 and report["biology"]["items_hit"] == 1


def test_a_document_counts_once_however_often_it_repeats_an_ngram(index):
    assert dc.document_counts(table_of([QUESTION * 5]), dc.Decontaminate(index)).max() == 1


# ---- what happens to the document ------------------------------------------------------------------------------------

def test_a_cut_takes_two_hundred_characters_on_both_sides_and_leaves_nothing_behind(index):
    """The rest is the text before and after, character by character, and is clean when searched again."""
    before, after = "东" * 600, "西" * 700
    out = dc.decontaminate(table_of([before + QUESTION + after]), dc.Decontaminate(index)).to_pylist()[0]
    assert out["drop_reason"] is None and out["edits"] == "decontaminate"
    assert out["text"] == "东" * 400 + "\n\n" + "西" * 500
    again = dc.decontaminate(table_of([out["text"]]), dc.Decontaminate(index)).to_pylist()[0]
    assert again["text"] == out["text"] and again["hits"] == []


def test_pieces_under_two_hundred_characters_go(index):
    """199 are left before the window and 200 after it."""
    out = dc.decontaminate(table_of(["东" * 399 + QUESTION + "西" * 400]), dc.Decontaminate(index)).to_pylist()[0]
    assert out["text"] == "西" * 200


def test_a_document_that_is_little_more_than_the_question_is_dropped_and_keeps_its_text(index):
    out = dc.decontaminate(table_of(["东" * 300 + QUESTION]), dc.Decontaminate(index)).to_pylist()[0]
    assert out["drop_reason"] == "contaminated" and out["text"].startswith("东") and out["edits"] == ""


@pytest.mark.parametrize("between", [650, 450])
@pytest.mark.parametrize("hits, reason", [(9, None), (10, "contaminated")])
def test_a_document_in_more_than_ten_pieces_is_dropped(index, hits, reason, between):
    """Nine hits leave ten pieces, ten hits eleven; those too short to stay (450 characters less two windows) count too."""
    text = "东" * 650 + (QUESTION + "东" * between) * (hits - 1) + QUESTION + "东" * 650
    assert dc.decontaminate(table_of([text]), dc.Decontaminate(index))["drop_reason"].to_pylist() == [reason]


def test_the_policy_drop_never_cuts(index):
    text = "东" * 900 + QUESTION + "西" * 900
    out = dc.decontaminate(table_of([text]), dc.Decontaminate(index, policy="drop")).to_pylist()[0]
    assert out["drop_reason"] == "contaminated" and out["text"] == text


def test_chats_and_preference_rows_are_dropped_and_never_cut(index):
    """A clean one passes with its text and meta as they were."""
    long = "东" * 900 + QUESTION + "西" * 900
    metas = [json.dumps({"messages": [{"role": "user", "content": long}]}), json.dumps({"prompt": [], "chosen": long, "rejected": "不"}),
             json.dumps({"messages": [{"role": "user", "content": "你好"}]}), json.dumps({"url": "x"})]
    table = table_of([long, long, "你好", long], metas)
    out = dc.decontaminate(table, dc.Decontaminate(index))
    assert out["drop_reason"].to_pylist() == ["contaminated", "contaminated", None, None]
    assert out["text"].to_pylist()[:3] == [long, long, "你好"] and len(out["text"][3].as_py()) < len(long)
    assert out["meta"].to_pylist() == metas


def test_an_earlier_drop_reason_stands(index):
    table = table_of([QUESTION, QUESTION]).append_column("drop_reason", pa.array(["too_short", None]))
    assert dc.decontaminate(table, dc.Decontaminate(index))["drop_reason"].to_pylist() == ["too_short", "contaminated"]


def test_an_empty_table_passes(index):
    """The last task of a corpus may hold nothing."""
    table = table_of(["x"]).slice(0, 0)
    assert len(dc.decontaminate(table, dc.Decontaminate(index))) == 0 and dc.document_counts(table, dc.Decontaminate(index)).sum() == 0


def test_clean_documents_pass_unchanged(index):
    texts = [filler(800, i) for i in range(50)] + ["", "。", "短"]
    out = dc.decontaminate(table_of(texts), dc.Decontaminate(index))
    assert out["text"].to_pylist() == texts and set(out["drop_reason"].to_pylist()) == {None} and set(out["edits"].to_pylist()) == {""}


def test_test_questions_planted_among_training_documents_are_all_found_and_nothing_else(tmp_path):
    """Q28 asks for nine of ten; here all 40, each with a different disguise, and none of 200 innocent documents."""
    rng = np.random.default_rng(3)
    questions = ["".join(chr(c) for c in rng.integers(0x4E00, 0x5E00, 30)) for _ in range(40)]
    (tmp_path / "quiz.txt").write_text("\n".join(questions), encoding="utf-8")
    path = str(tmp_path / "index.npz")
    dc.build_index([tmp_path / "quiz.txt"], path)
    disguises = [str, " ".join, lambda q: q[:15] + "——" + q[15:], lambda q: q[4:27]]
    planted = [filler(400, i) + disguises[i % 4](q) + filler(400, i + 99) for i, q in enumerate(questions)]
    innocent = ["".join(chr(c) for c in rng.integers(0x4E00, 0x5E00, 500)) for _ in range(200)]
    out = dc.decontaminate(table_of(planted + innocent), dc.Decontaminate(path, policy="drop"))
    assert out["drop_reason"].to_pylist() == ["contaminated"] * 40 + [None] * 200


def test_tallies_add_up_and_the_report_names_items_and_coverage(index):
    """One whole question of biology in one document, a scrap of another in a second: 2 of 5 items, coverage between."""
    cfg = dc.Decontaminate(index)
    texts = [BIOLOGY[0][0] + "\n" + "\n".join(f"{x}. {o}" for x, o in zip("ABCD", BIOLOGY[0][1])), BIOLOGY[1][0][:80], "山水"]
    tallies = [dc.tally(dc.decontaminate(table_of([text]), cfg), cfg) for text in texts]
    keys, tasks = tallies[0][0] + tallies[1][0] + tallies[2][0], tallies[0][1] + tallies[1][1] + tallies[2][1]
    assert (keys, tasks) == dc.tally(dc.decontaminate(table_of(texts), cfg), cfg)
    biology, history = dc.report(cfg, keys, tasks)
    assert (biology["items"], biology["items_hit"], biology["documents"], biology["unfindable"]) == (5, 2, 2, 0)
    assert 0.5 < biology["coverage"] < 1                  # the mean of all of one item and a part of the other
    assert (history["items"], history["items_hit"], history["coverage"], history["documents"]) == (3, 0, 0.0, 0)
    assert history["shared"] > 0 and history["ngrams"] > history["shared"]


# ---- reading the items -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", [
    {"question": BIOLOGY[1][0], "options": BIOLOGY[1][1]},
    {"Question": BIOLOGY[1][0], "A": "Respiration", "B": "Photosynthesis", "C": "Fermentation", "D": "Transpiration"},
    {"question": BIOLOGY[1][0], "choices": {"text": BIOLOGY[1][1], "label": ["A", "B", "C", "D"]}},
    {"prompt": BIOLOGY[1][0], "options": dict(zip("ABCD", BIOLOGY[1][1]))},
])
def test_json_items_of_the_usual_shapes_are_the_same_item(tmp_path, row):
    path = tmp_path / "quiz.jsonl"
    path.write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    (item,) = dc.read_items("quiz", path)
    assert item == dc.Item("quiz", 1, BIOLOGY[1][0], BIOLOGY[1][0] + "\na. Respiration\nb. Photosynthesis\nc. Fermentation\nd. Transpiration")


def test_an_answer_in_words_belongs_to_the_item(tmp_path):
    """Mathematics problems come with their solution; a label such as "B" beside options does not count."""
    path = tmp_path / "math.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "Twice three is six."}) + "\n", encoding="utf-8")
    assert dc.read_items("math", path)[0].text == "How many?\nTwice three is six."


@pytest.mark.parametrize("name, content, what", [
    ("x.csv", "id,frage\n1,warum\n", "x.csv:2 has no text"),
    ("x.jsonl", '{"question": 3}\n', "x.jsonl:1 has no text"),
    ("x.jsonl", "[1]\n", "x.jsonl:1 has no text"),
    ("x.jsonl", "{broken\n", "cannot read"),
    ("x.jsonl", b"\xff\xfe\x00", "cannot read"),
    ("x.txt", "\n\n", "none in"),
    ("missing.csv", None, "does not exist"),
])
def test_bad_evaluation_files_are_refused_in_a_sentence(tmp_path, name, content, what):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(UserError, match=what):
        dc.build_index([path], tmp_path / "index.npz")


def test_an_index_that_is_none_and_counts_of_another_index_are_refused(index, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="build it again"):
        dc.load_index(str(tmp_path / "bad.npz"))
    np.save(tmp_path / "counts.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match="count the documents again"):
        dc.evidence(dc.Decontaminate(index, frequency=str(tmp_path / "counts.npy")))
    with pytest.raises(UserError, match="cut or drop"):
        dc.Decontaminate(index, policy="shred")
    with pytest.raises(UserError, match="at least 9"):
        dc.build_index([tmp_path / "cmmlu"], tmp_path / "i.npz", n=8)


def test_the_same_items_give_the_same_bytes(index, tmp_path):
    dc.build_index([tmp_path / "cmmlu"], tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == open(index, "rb").read()


def test_an_index_without_any_key_finds_nothing(tmp_path):
    """Items that are all too short: reported as unfindable, and no document is touched."""
    (tmp_path / "tiny.txt").write_text("为什么\n多少\n", encoding="utf-8")
    path = str(tmp_path / "index.npz")
    dc.build_index([tmp_path / "tiny.txt"], path)
    cfg = dc.Decontaminate(path)
    out = dc.decontaminate(table_of(["为什么多少"]), cfg)
    assert out["hits"].to_pylist() == [[]] and dc.document_counts(table_of(["为什么"]), cfg).shape == (0,)
    assert dc.report(cfg, *dc.tally(out, cfg))[0]["unfindable"] == 2
