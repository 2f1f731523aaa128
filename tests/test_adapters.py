"""Rows in the published shapes of the notes' sources, and what becomes of them. All texts are our own."""
import gzip
import io
import json
import sys

import pytest

from nanollm import data
from nanollm.config import UserError
from nanollm.corpus import adapters, foreign
from nanollm.corpus.adapters import ADAPTERS, adapt, detect

ANSWER = "先把面粉和水揉成光滑的面团，盖上湿布醒半个小时，再擀成薄片。"                # 30 characters
SHORT = "先揉面再擀皮。"


def messages(*contents):
    """user, assistant, user, … with these contents."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


# ---- documents -------------------------------------------------------------------------------------------------------

BAIKE = {"title": "榫卯", "summary": "榫卯是木器接合处的凹凸结构。",
         "sections": [{"title": "历史", "content": "河姆渡的木构里已经有榫卯。"}, {"title": "", "content": "明式家具很少用钉子。"},
                      {"title": "种类", "content": "有燕尾榫、粽角榫等。"}],
         "tags": ["木工", "建筑"], "url": "http://baike.example/view/1.htm"}


def test_baike_keeps_every_section():
    """A peer's `return` inside the loop over sections kept only the first one."""
    assert adapt(BAIKE) == ("榫卯：榫卯是木器接合处的凹凸结构。\n历史：河姆渡的木构里已经有榫卯。\n明式家具很少用钉子。\n"
                            "种类：有燕尾榫、粽角榫等。", {}, None)


def test_a_baike_article_without_sections_or_with_a_short_first_one_stays():
    """The same peer lost articles without sections, and all of an article whose first section had under 15 characters."""
    for sections in ([], None):
        assert adapt(BAIKE | {"sections": sections}) == ("榫卯：榫卯是木器接合处的凹凸结构。", {}, None)
    bare = {k: v for k, v in BAIKE.items() if k != "sections"}
    assert adapt(bare)[0] == "榫卯：榫卯是木器接合处的凹凸结构。"
    assert adapt(BAIKE | {"summary": None})[0].startswith("榫卯\n历史：河姆渡")
    assert adapt(BAIKE | {"summary": "", "sections": [{"title": "一", "content": "短"}, {"title": "二", "content": ANSWER}]})[0].endswith(ANSWER)


def test_what_is_stored_is_what_was_read():
    """A peer cleaned one string and stored another: no text of the row may be missing, none may be changed."""
    text = adapt(BAIKE)[0]
    for part in [BAIKE["title"], BAIKE["summary"], *(v for s in BAIKE["sections"] for v in s.values())]:
        assert part in text
    assert set(text) - {"：", "\n"} <= set("".join([BAIKE["title"], BAIKE["summary"], *(v for s in BAIKE["sections"] for v in s.values())]))


@pytest.mark.parametrize("n", [0, 1, 999, 1000, 1001])
def test_no_row_is_lost_at_the_end_of_a_batch(n):
    """A peer wrote its batches of a million and forgot what followed the last full one: here a row is a call, whatever their number."""
    rows = [BAIKE | {"title": f"词条{i}"} for i in range(n)]
    assert [adapt(row)[0].split("：")[0] for row in rows] == [f"词条{i}" for i in range(n)]


def test_wikipedia_skypile_and_medical_books_are_plain_documents():
    assert adapt({"completion": "昆山是一座县级市。\n面积约九百平方公里。", "source": "wikipedia.zh2307"}) == (
        "昆山是一座县级市。\n面积约九百平方公里。", {}, None)
    assert adapt({"text": ANSWER}) == (ANSWER, {}, None)                      # SkyPile, medical (pretrain), c4
    assert adapt({"text": ANSWER, "meta": {"url": "x"}, "source": "c4", "timestamp": 7}) == (ANSWER, {}, None)


def test_a_long_document_is_not_cut():
    text = "长文" * 300_000
    assert adapt({"text": text})[0] == text


# ---- chats -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, row, want", [
    ("firefly", {"kind": "Cot", "input": "三加五是几？", "target": "是八。"}, messages("三加五是几？", "是八。")),
    ("firefly_multiturn", {"conversation_id": 7, "category": "闲聊", "dataset": "x",
                           "conversation": [{"human": "你好", "assistant": "您好！"}, {"human": "几点了？", "assistant": "我看不到钟。"}]},
     messages("你好", "您好！", "几点了？", "我看不到钟。")),
    ("alpaca", {"instruction": "把下面的句子改成疑问句。", "input": "他来了。", "output": "他来了吗？"},
     messages("把下面的句子改成疑问句。\n他来了。", "他来了吗？")),
    ("alpaca", {"instruction": "写一个比喻。", "input": "", "output": "月亮像盘子。"}, messages("写一个比喻。", "月亮像盘子。")),
    ("alpaca", {"instruction": "写一个比喻。", "input": None, "output": "月亮像盘子。", "history": [["你好", "您好"]]},
     messages("你好", "您好", "写一个比喻。", "月亮像盘子。")),
    ("alpaca", {"instruction": "树上有几只鸟？", "output": "要看是什么时候。"}, messages("树上有几只鸟？", "要看是什么时候。")),   # ruozhiba
    ("alpaca", {"query": "树上有几只鸟？", "response": "要看是什么时候。"}, messages("树上有几只鸟？", "要看是什么时候。")),       # ruozhiba
    ("alpaca", {"prompt": "如何和面？", "response": ANSWER}, messages("如何和面？", ANSWER)),
    ("alpaca", {"instruction": "Human:背一句诗。\nAssistant:床前明月光。\nHuman:下一句呢？\nAssistant:", "input": "", "output": "疑是地上霜。"},
     messages("背一句诗。", "床前明月光。", "下一句呢？", "疑是地上霜。")),                                                    # BELLE 0.8M
    ("alpaca", {"instruction": "Human: 你好 是一句问候，请翻译。", "output": "Hello"}, messages("Human: 你好 是一句问候，请翻译。", "Hello")),
    ("sharegpt", {"conversations": [{"from": "human", "value": "一加一？"}, {"from": "gpt", "value": "二。"}]}, messages("一加一？", "二。")),
    ("sharegpt", {"id": "18205", "conversations": [{"from": "human", "value": "一加一？"}, {"from": "assistant", "value": "二。"}]},
     messages("一加一？", "二。")),                                                                                           # BELLE 3.5M
    ("sharegpt", {"conversations": [{"role": "user", "content": "一加一？"}, {"role": "assistant", "content": "二。"}]}, messages("一加一？", "二。")),
    ("messages", {"messages": [{"role": "user", "content": "一加一？"}, {"role": "assistant", "content": "二。"}]}, messages("一加一？", "二。")),
    ("messages", {"messages": [{"role": "system", "content": "简短。"}, *messages("一加一？", "二。")]},
     [{"role": "system", "content": "简短。"}, *messages("一加一？", "二。")]),
    ("sharegpt", {"system": "简短。", "conversations": messages("一加一？", "二。")}, [{"role": "system", "content": "简短。"}, *messages("一加一？", "二。")]),
    ("messages", {"messages": [{"role": "user", "content": "今天几号？"}, {"role": "assistant", "content": "我查一下。", "weight": 0},
                               {"role": "tool", "content": "三号"}, {"role": "assistant", "content": "三号。"}]},
     [{"role": "user", "content": "今天几号？"}, {"role": "assistant", "content": "我查一下。", "weight": 0},
      {"role": "tool", "content": "三号"}, {"role": "assistant", "content": "三号。"}]),
    ("zhihu_kol", {"INSTRUCTION": "怎样包饺子？", "RESPONSE": ANSWER, "SOURCE": "Zhihu", "METADATA": '{"upvotes": "12"}'}, messages("怎样包饺子？", ANSWER)),
    ("webtext2019zh", {"qid": 1, "title": "怎样包饺子？", "desc": "第一次做，<br>家里没有擀面杖。", "topic": "美食", "star": 5, "content": ANSWER,
                       "answer_id": 2, "answerer_tags": "厨师"}, messages("怎样包饺子？\n第一次做，<br>家里没有擀面杖。", ANSWER)),
    ("baike_qa2019", {"qid": "q1", "category": "生活", "title": "怎样包饺子？ ", "desc": "", "answer": ANSWER}, messages("怎样包饺子？", ANSWER)),
    ("baike_qa2019", {"qid": "q1", "category": "生活", "title": "怎样包饺子？", "desc": "怎样包饺子", "answer": ANSWER}, messages("怎样包饺子？", ANSWER)),
])
def test_each_chat_source_is_recognised_and_read(name, row, want):
    """By its keys; the text is all contents, the messages are the chat."""
    assert detect(row) == name
    assert adapt(row) == adapt(row, name) == ("\n".join(m["content"] for m in want), {"messages": want}, None)


@pytest.mark.parametrize("row, reason", [
    ({"title": "怎样包饺子？", "desc": "", "star": 4, "content": ANSWER}, "low_star"),
    ({"title": "怎样包饺子？", "desc": "", "star": 5, "content": ANSWER}, None),
    ({"title": "怎样包饺子？", "desc": "", "star": 5, "content": ANSWER[:9]}, "short_answer"),
    ({"title": "怎样包饺子？", "desc": "", "star": 5, "content": ANSWER[:10]}, None),
    ({"title": "为何", "desc": "", "star": 5, "content": ANSWER}, "short_question"),
    ({"title": "为何？", "desc": "", "star": 5, "content": ANSWER}, None),
    ({"title": "为何", "desc": "面会裂开？", "star": 5, "content": ANSWER}, None),
    ({"title": "怎样包饺子？", "desc": "", "answer": ANSWER[:14]}, "short_answer"),
    ({"title": "怎样包饺子？", "desc": "", "answer": ANSWER[:15]}, None),
    ({"INSTRUCTION": "怎么包", "RESPONSE": ANSWER}, "short_question"),
    ({"INSTRUCTION": "怎么包？", "RESPONSE": ANSWER[:9]}, "short_answer"),
    ({"INSTRUCTION": "怎么包？", "RESPONSE": ANSWER[:10]}, None),
])
def test_the_thresholds_of_question_and_answer_sources(row, reason):
    """One row just inside and one just outside of each; a dropped row keeps its text, to be shown."""
    text, meta, found = adapt(row)
    assert found == reason and text and meta["messages"][0]["role"] == "user"


def test_a_description_is_merged_unless_it_says_the_same():
    """Dice of the sets of characters, by hand: 2·9/(9+10) = 0.947 and 2·8/(9+9) = 0.889."""
    title = "一二三四五六七八九"
    assert adapters.dice(title, title + "十") == pytest.approx(18 / 19) and adapters.dice(title, title[:8] + "十") == pytest.approx(8 / 9)
    row = {"title": title, "answer": ANSWER}
    assert adapt(row | {"desc": title + "十"})[1]["messages"][0]["content"] == title
    assert adapt(row | {"desc": title[:8] + "十"})[1]["messages"][0]["content"] == title + "\n" + title[:8] + "十"
    assert adapters.dice("", "") == 0


# ---- preference pairs ------------------------------------------------------------------------------------------------

PAIR = {"prompt": messages("怎样和面？"), "chosen": ANSWER, "rejected": "不知道。"}


@pytest.mark.parametrize("name, row", [
    ("preference", {"prompt": "怎样和面？", "chosen": ANSWER, "rejected": "不知道。"}),                                       # single-round
    ("preference", {"prompt": "\n\nHuman: 怎样和面？\n\nAssistant:", "chosen": ANSWER, "rejected": "不知道。"}),               # hh's form
    ("preference", {"prompt": "Human: 怎样和面？ Assistant:", "chosen": ANSWER, "rejected": "不知道。"}),
    ("preference", {"chosen": f"\n\nHuman: 怎样和面？\n\nAssistant: {ANSWER}", "rejected": "\n\nHuman: 怎样和面？\n\nAssistant: 不知道。"}),
    ("preference", {"conversations": [{"from": "human", "value": "怎样和面？"}], "chosen": {"from": "gpt", "value": ANSWER},
                    "rejected": {"from": "gpt", "value": "不知道。"}}),
    ("preference", {"prompt": "怎样和面？", "chosen": messages("怎样和面？", ANSWER), "rejected": messages("怎样和面？", "不知道。")}),
    ("preference", {"chosen": messages("怎样和面？", ANSWER), "rejected": messages("怎样和面？", "不知道。")}),
    ("huozi", {"prompt": "怎样和面？", "chosen": ANSWER, "reject": "不知道。"}),
    ("medical_reward", {"question": "怎样和面？", "response_chosen": ANSWER, "response_rejected": "不知道。"}),
])
def test_each_preference_source_gives_the_same_pair(name, row):
    assert detect(row) == name
    assert adapt(row) == (f"怎样和面？\n{ANSWER}\n不知道。", PAIR, None)


def test_huozi_writes_newlines_as_two_characters():
    row = {"prompt": "列出两种水果。", "chosen": "苹果\\n香蕉", "reject": "苹果"}
    assert adapt(row)[1]["chosen"] == "苹果\n香蕉"


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "怎样和面？", "chosen": ANSWER, "rejected": f" {ANSWER}\n"}, "same_answers"),
    ({"prompt": "怎样和面？", "chosen": ANSWER, "rejected": " "}, "empty_message"),
    ({"prompt": "", "chosen": ANSWER, "rejected": SHORT}, "empty_message"),
    ({"chosen": ANSWER, "rejected": SHORT}, "bad_turns"),                                          # no question at all
    ({"prompt": messages("怎样和面？", "慢慢来。"), "chosen": ANSWER, "rejected": SHORT}, "bad_turns"),
    ({"chosen": messages("怎样和面？", ANSWER, "谢谢", "不客气"), "rejected": messages("怎样和面？", SHORT)}, "bad_turns"),
    ({"conversations": []}, "no_answer"), ({"messages": messages("问")}, "no_answer"),
    ({"conversations": [{"from": "gpt", "value": "二。"}, *messages("一？", "一。")]}, "bad_turns"),
    ({"messages": messages("问", "答", "再问", " ")}, "empty_message"),
    ({"instruction": "写诗", "output": ""}, "empty_message"),
    ({"url": "http://a.example", "mime": "image/png", "ok": True, "text": ""}, "not_html"),
    ({"url": "http://a.example", "mime": "text/html", "ok": False, "text": "找不到网页"}, "http_error"),
])
def test_a_row_that_can_be_read_but_not_used_is_dropped_with_a_reason(row, reason):
    assert adapt(row)[2] == reason


@pytest.mark.parametrize("row, code", [
    ([1], "not_an_object"), ("text", "not_an_object"), (None, "not_an_object"), (7, "not_an_object"),
    ({}, "missing_text"), ({"txt": "拼错的键"}, "missing_text"), ({"text": None}, "missing_text"), ({"text": None, "messages": None}, "missing_text"),
    ({"text": 5}, "bad_type"), ({"text": float("nan")}, "bad_type"), ({"text": ["一"]}, "bad_type"), ({"text": True}, "bad_type"),
    ({"text": {"a": 1}}, "bad_type"), ({"text": b"\xff"}, "not_utf8"), ({"completion": 3, "source": "x"}, "bad_type"),
    ({"title": None, "summary": None, "sections": None}, "missing_text"), ({"title": "一", "summary": 3}, "bad_type"),
    ({"title": "一", "sections": "二"}, "bad_type"), ({"title": "一", "sections": ["二"]}, "bad_type"),
    ({"title": "一", "sections": [{"title": "二", "content": 3}]}, "bad_type"),
    ({"title": "怎样？", "star": "5", "content": ANSWER}, "bad_type"), ({"title": "怎样？", "star": None, "content": ANSWER}, "bad_type"),
    ({"title": "怎样？", "star": True, "content": ANSWER}, "bad_type"), ({"title": "怎样？", "desc": "", "star": 9, "content": None}, "missing_text"),
    ({"title": "怎样？", "desc": "", "answer": None}, "missing_text"), ({"INSTRUCTION": "怎样？", "RESPONSE": 3}, "bad_type"),
    ({"input": "问", "target": None}, "missing_text"), ({"instruction": "问", "output": None}, "missing_text"),
    ({"instruction": "问", "input": 3, "output": "答"}, "bad_type"), ({"instruction": "问", "output": "答", "history": [["一"]]}, "bad_type"),
    ({"instruction": "问", "output": "答", "history": "一"}, "bad_type"), ({"instruction": "问", "output": "答", "system": 3}, "bad_type"),
    ({"messages": "问"}, "bad_type"), ({"messages": ["问"]}, "bad_type"), ({"messages": [{"role": "poet", "content": "诗"}]}, "unknown_role"),
    ({"messages": [{"content": "诗"}]}, "unknown_role"), ({"messages": [{"role": "user", "content": None}]}, "missing_text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "诗"}]}]}, "bad_type"), ({"messages": [{"role": ["user"], "content": "诗"}]}, "unknown_role"),
    ({"conversation": {"human": "问"}}, "bad_type"), ({"conversation": [{"human": "问"}]}, "missing_text"),
    ({"prompt": "问", "chosen": 3, "rejected": "答"}, "bad_type"), ({"prompt": "问", "chosen": None, "rejected": "答"}, "missing_text"),
    ({"prompt": 3, "chosen": "好", "rejected": "坏"}, "bad_type"), ({"prompt": "问", "chosen": "好", "reject": 3}, "bad_type"),
])
def test_a_row_of_another_shape_goes_to_quarantine_with_its_reason(row, code):
    """No value is made a string by force: a peer's `str(sample["text"])` trained on "None" and "nan"."""
    with pytest.raises(ValueError) as caught:
        adapt(row)
    assert str(caught.value) == code


def test_a_named_adapter_is_obeyed_and_an_unknown_one_refused():
    row = {"title": "榫卯", "text": ANSWER, "summary": "木器的接合。"}
    assert detect(row) == "baike" and adapt(row, "text")[0] == ANSWER
    with pytest.raises(ValueError, match="missing_text"):
        adapt({"text": ANSWER}, "baike")
    with pytest.raises(UserError, match="adapter.*baike"):
        adapt(row, "baidu")


def test_keys_without_a_value_do_not_decide():
    """A Parquet table fills the columns that a row has not with null."""
    nothing = dict.fromkeys(["messages", "conversations", "chosen", "rejected", "text", "title", "sections"])
    assert adapt(nothing | {"text": ANSWER}) == (ANSWER, {}, None)
    assert detect(nothing | {"messages": messages("问", "答")}) == "messages"


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    """json.loads lets it pass, but it cannot be written: in documents and in every message."""
    text, meta, _ = adapt(json.loads('{"instruction": "\\ud83d好", "output": "\\udc00"}'))
    assert text == "\ufffd好\n\ufffd" and json.dumps(meta, ensure_ascii=False).encode("utf-8")
    assert adapt({"text": "完好的😀"})[0] == "完好的😀"


def test_every_adapter_refuses_nonsense_in_words():
    """Each value of each key replaced by things that are none: a ValueError with one of our codes, never another error."""
    rows = {name: {key: "字" for shape in shapes[:1] for key in shape.split()} for name, (_, shapes) in ADAPTERS.items()}
    for name, row in rows.items():
        for key in row:
            for value in (None, 3, float("nan"), True, [], [None], {}, [{}], [[]], [{"from": None}], [{"title": 1}], "字", b"x"):
                try:
                    text, meta, reason = adapt(row | {key: value}, name)
                    assert isinstance(text, str) and isinstance(meta, dict) and (reason is None or isinstance(reason, str))
                except ValueError as e:
                    assert str(e) in {"missing_text", "bad_type", "unknown_role", "not_utf8"}, (name, key, value, e)


def test_a_chat_means_here_what_it_means_to_the_trainers():
    """The rows of every format, good and bad: the same messages as data.to_messages and data.to_preference, or none in both."""
    chats = [
        {"conversation": [{"human": "问", "assistant": "答"}], "system": "简短。"}, {"conversation": [{"human": "问"}]},
        {"messages": [{"role": "tool", "content": "三"}, *messages("问", "答")]}, {"messages": messages("问", "答", "问")},
        {"messages": messages("问", "答") + [{"role": "system", "content": "短"}]}, {"conversations": [{"from": "bot", "value": "答"}]},
        {"instruction": " 问 ", "input": " 补充 ", "output": "答"}, {"instruction": "问", "input": "", "output": "答", "history": [["一", "二"]], "system": "短"},
        {"prompt": "问", "completion": "答"}, {"prompt": messages("问"), "completion": "答"}, {"question": "问", "answer": "答"},
        {"instruction": "问", "output": " "}, {"prompt": "问", "answer": 3}, {"text": "文"}, {"messages": [{"role": "x", "content": "y"}]},
    ]
    pairs = [
        {"prompt": "问", "chosen": "好", "rejected": "坏"}, {"conversations": messages("问"), "chosen": {"from": "gpt", "value": "好"}, "rejected": "坏"},
        {"prompt": "问", "chosen": messages("问", "好"), "rejected": messages("问", "坏")}, {"chosen": messages("问", "好"), "rejected": messages("问", "坏")},
        {"instruction": "问", "input": "补", "chosen": "好", "rejected": "坏"}, {"prompt": "问", "chosen": "好", "rejected": " 好"},
        {"chosen": "好", "rejected": "坏"}, {"prompt": messages("问", "答"), "chosen": "好", "rejected": "坏"}, {"prompt": "问", "chosen": "", "rejected": "坏"},
        {"prompt": "问", "chosen": messages("别的", "好"), "rejected": messages("别的", "坏")},
    ]

    def ours(row):
        try:
            _, meta, reason = adapt(row)
        except ValueError:
            return None
        return None if reason else meta.get("messages") or meta and (meta["prompt"], meta["chosen"], meta["rejected"]) or None

    def theirs(function, row):
        try:
            return function(row)
        except ValueError:
            return None

    assert [ours(row) for row in chats] == [theirs(data.to_messages, row) for row in chats] and ours(chats[0])
    assert [ours(row) for row in pairs] == [theirs(data.to_preference, row) for row in pairs] and ours(pairs[0])


# ---- CSV and web archives --------------------------------------------------------------------------------------------

def read(reader, raw):
    """([(number, row)], [(number, reason)]) of these bytes."""
    quarantined = []

    def bad(line, reason, head, error):
        assert isinstance(head, bytes) and str(error)
        quarantined.append((line, reason))
    return list(reader(io.BytesIO(raw), bad)), quarantined


def test_csv_records_may_hold_commas_quotes_and_lines():
    """RFC 4180, written by Python's own csv module with either line end, and with a byte order mark."""
    import csv
    rows = [("一", "他说：\"好\"，走了"), ("二", "第一行\n第二行\r\n第三行,"), ("", "\"\""), ("三\x00", " 首尾有空格 ")]
    for end in ("\n", "\r\n"):
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator=end).writerows([("id", "text"), *rows])
        got, bad = read(foreign.read_csv, b"\xef\xbb\xbf" + out.getvalue().encode())
        assert not bad and [tuple(row.values()) for _, row in got] == rows and set(got[0][1]) == {"id", "text"}
        assert [number for number, _ in got] == [2, 3, 6, 7]


@pytest.mark.parametrize("raw, texts, bad", [
    (b"text\n", [], []), (b"", [], []), (b"\n\n\n", [], []),
    (b"id,text\n1,a\n\n2,b\n   \n3,c", ["a", "b", "c"], []),
    (b"id,text\n1,a\n2\n3,c,c\n4,d\n", ["a", "d"], [(3, "wrong_fields"), (4, "wrong_fields")]),
    (b'id,text\n1,a\n2,"open\n3,c\n4,d\n', ["a", "c", "d"], [(3, "broken_csv")]),
    (b'id,text\n1,a\n2,"b" x\n3,c\n', ["a", "c"], [(3, "broken_csv")]),
    (b'id,text\n1,a 5" screen\n2,b\n3,a 7" one\n4,d\n', ['a 5" screen', "b", 'a 7" one', "d"], []),
    (b'id,text\n1,\xff\xfe\n2,b\n', ["b"], [(2, "not_utf8")]),
    (b'id,text\n1,"\xff\nx"\n2,b\n', ["b"], [(2, "not_utf8")]),
    (b'id,text\n1,a\rb\n2,c\n', ["c"], [(2, "broken_csv")]),
    ("id,text\n1,一\u2028二\u0085\n".encode(), ["一\u2028二\u0085"], []),
    (b"id,text\n1,\x00a\n", ["\x00a"], []),
    (b"id,text\n1," + b"x" * 300_000 + b"\n", ["x" * 300_000], []),
])
def test_a_broken_csv_record_costs_that_record(raw, texts, bad):
    """With the line it begins on; an open quote does not swallow the rows after it."""
    got, quarantined = read(foreign.read_csv, raw)
    assert [row["text"] for _, row in got] == texts and quarantined == bad


def test_one_open_quote_in_a_large_csv_is_read_twice_not_a_hundred_times(monkeypatch):
    """The lines after it are even, so they are not taken up again: at most two looks at each line."""
    looks = []
    monkeypatch.setattr(foreign, "fields_of", lambda lines, delimiter, real=foreign.fields_of: looks.append(len(lines)) or real(lines, delimiter))
    raw = b"id,text\n" + b'0,"open\n' + b"".join(b"%d,row\n" % i for i in range(5000))
    got, bad = read(foreign.read_csv, raw)
    assert len(got) == 5000 and bad == [(2, "broken_csv")] and sum(looks) <= 2 * 5002 + 1


def warc(*records):
    """A WARC file of (type, content type, block); the library's writer makes the frames."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    for i, (kind, content_type, block) in enumerate(records):
        http = None
        if kind == "response":
            head, _, block = block.partition(b"\r\n\r\n")
            status, *lines = head.decode().split("\r\n")
            http = StatusAndHeaders(status.partition(" ")[2], [tuple(line.split(": ", 1)) for line in lines], protocol="HTTP/1.1")
        writer.write_record(writer.create_warc_record(f"http://a.example/{i}", kind, payload=io.BytesIO(block), warc_content_type=content_type, http_headers=http))
    return out.getvalue()


PAGE = "<html><head><title>馒头</title><script>var x = 1;</script></head><body><p>发面要温水。</p><p>蒸二十分钟。</p></body></html>"


def http(body, *headers):
    return b"\r\n".join([b"HTTP/1.1 200 OK", *headers, b"", body])


@pytest.fixture
def no_trafilatura(monkeypatch):
    monkeypatch.setitem(sys.modules, "trafilatura", None)                      # import trafilatura -> ImportError


def test_wet_records_are_documents_with_their_address():
    raw = warc(("warcinfo", "application/warc-fields", b"software: none\r\n"), ("conversion", "text/plain", ANSWER.encode()),
               ("conversion", "text/plain", "第二页\r\n\r\nWARC-like text\n".encode()))
    rows, bad = read(foreign.read_warc, raw)
    assert not bad and [row["text"] for _, row in rows] == [ANSWER, "第二页\r\n\r\nWARC-like text\n"]
    assert [number for number, _ in rows] == [2, 3] and rows[0][1]["url"] == "http://a.example/1"
    assert adapt(rows[0][1]) == (ANSWER, {}, None)


def test_the_records_are_those_that_warcio_reads():
    """Types, addresses and payloads, for plain and for chunked and compressed responses."""
    from warcio.archiveiterator import ArchiveIterator
    body = PAGE.encode()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(body[i:i + 50]), body[i:i + 50]) for i in range(0, len(body), 50)) + b"0\r\n\r\n"
    raw = warc(("response", None, http(body, b"Content-Type: text/html; charset=utf-8")), ("request", None, b"GET / HTTP/1.1\r\n\r\n"),
               ("response", None, http(chunked, b"Content-Type: text/html", b"Transfer-Encoding: chunked")),
               ("response", None, http(gzip.compress(body), b"Content-Type: text/html", b"Content-Encoding: gzip")),
               ("conversion", "text/plain", b""))
    theirs = [(r.rec_headers.get_header("WARC-Target-URI"), r.rec_type, r.content_stream().read()) for r in ArchiveIterator(io.BytesIO(raw))]
    ours = [(h["warc-target-uri"], h["warc-type"], foreign.http_body(block)[2] if h["warc-type"] == "response" else block)
            for _, h, block in foreign.warc_records(io.BytesIO(raw), None)]
    assert [row for row in ours if row[1] != "request"] == [row for row in theirs if row[1] != "request"] and len(ours) == 5


def test_pages_lose_their_tags_and_what_is_no_page_is_dropped(no_trafilatura):
    raw = warc(("response", None, http(PAGE.encode(), b"Content-Type: text/html; charset=utf-8")),
               ("response", None, http(b"\x89PNG", b"Content-Type: image/png")),
               ("response", None, http(PAGE.encode(), b"Content-Type: text/html").replace(b"200 OK", b"404 Not Found")))
    rows, bad = read(foreign.read_warc, raw)
    text, _, reason = adapt(rows[0][1])
    assert not bad and text.split() == ["馒头", "发面要温水。", "蒸二十分钟。"] and reason is None
    assert [adapt(row)[2] for _, row in rows] == [None, "not_html", "http_error"]


@pytest.mark.parametrize("encoding, header, meta", [
    ("utf-8", "", ""), ("gb18030", "; charset=gb2312", ""), ("gb18030", "", '<meta charset="gbk">'), ("gb18030", "", ""),
    ("big5", "; charset=big5", ""), ("utf-8", "; charset=no-such-thing", ""), ("utf-8", "; charset=ascii", "")])
def test_a_page_is_decoded_as_it_says_or_as_it_looks(encoding, header, meta):
    body = f"{meta}饅頭要蒸二十分鐘".encode(encoding)
    assert foreign.decode(body, "text/html" + header) == f"{meta}饅頭要蒸二十分鐘"


def test_trafilatura_is_used_where_it_is_installed(monkeypatch):
    """A stand-in for the library: its `extract` gets the page and may find nothing."""
    fake = type(sys)("trafilatura")
    fake.extract = lambda page: "发面要温水。" if "发面" in page else None
    monkeypatch.setitem(sys.modules, "trafilatura", fake)
    assert foreign.page_text(PAGE) == "发面要温水。" and foreign.page_text("<p></p>") == ""


def test_a_library_that_is_half_installed_is_not_passed_over(monkeypatch, tmp_path):
    """Else a corpus would be read the other way without a word."""
    (tmp_path / "trafilatura.py").write_text("raise ImportError('lxml.html.clean is missing')", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "trafilatura", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="lxml.html.clean is missing"):
        foreign.page_text(PAGE)


@pytest.mark.parametrize("harm, numbers, bad", [
    (lambda raw: raw.replace(b"Content-Length: 9\r\n", b"Content-Length: 8\r\n", 1), [3, 4], [(2, "broken_record")]),
    (lambda raw: raw.replace(b"Content-Length: 9\r\n", b"Content-Length: 900000\r\n", 1), [3, 4], [(2, "broken_record")]),
    (lambda raw: raw.replace(b"Content-Length: 9\r\n", b"Content-Length: 99999999999\r\n", 1), [3, 4], [(2, "broken_record")]),
    (lambda raw: raw.replace(b"Content-Length: 9\r\n", b"", 1), [3, 4], [(2, "broken_record")]),
    (lambda raw: raw.replace(b"Content-Length: 9\r\n", b"Content-Length: -9\r\n", 1), [3, 4], [(2, "broken_record")]),
    (lambda raw: raw[:-6], [2, 3], [(4, "broken_record")]),
    (lambda raw: b"noise\nmore noise\n" + raw, [3, 4, 5], [(1, "broken_record")]),
])
def test_a_damaged_record_costs_that_record(harm, numbers, bad):
    """Its length too small, too large, missing or negative, the file cut off, noise between: the next one is found again."""
    raw = warc(("warcinfo", "x", b"y\r\n"), *[("conversion", "text/plain", b"page %d ok" % i) for i in range(1, 4)])
    rows, quarantined = read(foreign.read_warc, harm(raw))
    assert [number for number, _ in rows] == numbers and quarantined == bad


@pytest.mark.parametrize("body, headers", [
    (b"zz\r\nnot chunked", [b"Transfer-Encoding: chunked"]), (b"not compressed", [b"Content-Encoding: gzip"]), (b"x", [b"Content-Encoding: br"])])
def test_a_body_that_cannot_be_unpacked_goes_to_quarantine(body, headers):
    rows, bad = read(foreign.read_warc, warc(("response", None, http(body, b"Content-Type: text/html", *headers))))
    assert not rows and bad == [(1, "broken_record")]


def test_a_truncated_archive_does_not_look_whole():
    """warcio 1.7 ends quietly at the cut; a corpus made of what came before it would be short without a word."""
    raw = gzip.compress(warc(*[("conversion", "text/plain", f"第{i}页 {i * 7919}".encode() * 40) for i in range(300)]))
    with pytest.raises(EOFError):
        list(foreign.read_warc(gzip.GzipFile(fileobj=io.BytesIO(raw[:len(raw) // 2])), None))
