"""The edits, the recipes, and the stage that applies them to a table."""
import json
import pickle
import random
import re
import tomllib
import unicodedata

import pyarrow as pa
import pytest

from conftest import ROOT
from nanollm.config import UserError
from nanollm.corpus import clean, edits, filters
from nanollm.corpus.clean import clean_text, read_recipe
from test_filters import EN, VERSE, ZH

PROSE = [
    "The class passes 3.14 to the function at 12:30; the others wait... and then, finally, it ends. Isn't it so?",
    "今天上午9:30，气温是23.5度，大约有1,000人参加。他说：“我们明天再来……”然后就走了！真的吗？",
    "比例为3：2的混合物（约100克），加热后静置。\n第二行从这里开始，没有问题。",
    "She paid $1,250.75 (about €1,100) for it, i.e. half. x < 3 and y > 4; a<b and c>d; <unk> stays, R&D too.",
    "约翰.史密斯在2020。他考了100，3天后离开。选择A、B或C；见第3.2节。从2数到5：2、3、4、5。",
    "    indented code is rare, but e-mail me@host.org is left: U.S.A., 50%, #1, A+B=C, ~/bin, foo_bar[0]",
    "JavaScript is a language for web pages, cookies are small files; a privacy lawyer explains the terms.",
    "上一篇文章里我们说过，责任编辑这个职位很重要。\n版权所有者可以转载，返回首页的按钮在右上角，点击查看结果。",
    "他用了整整一个下午阅读全文，收获很大。\n他认为未经允许转载是违法的。\n点击按钮返回首页。\n该书版权所有，翻印必究的制度始于清末。",
    "The recipe uses cookies and cream.\nParliament debated the new privacy policy for hours.\nWe wrote a privacy policy.\nUse cookies, she said.",
    "我们使用了PyTorch，NumPy和Ray。J．K．罗琳写了七本书。\nThe loop for(;;) never ends; nor does while(1);;",
]
SWITCHABLE = dict.fromkeys(edits.EDITS, True) | {"urls": "tag", "pii": "mask"}

# ------------------------------------------------------------------------------------------------ edits


@pytest.mark.parametrize("text", PROSE + EN + ZH + VERSE)
def test_clean_prose_passes_unchanged(text):
    """Decimals, times, thousands, ellipses, comparisons and words that only sound like boilerplate are no errors."""
    assert edits.normalise(text) == text.strip()


@pytest.mark.parametrize("dirty, want", [
    ("多么好！！！！真的吗？？", "多么好！真的吗？"),
    ("Wow!!!! Really???? yes....... no", "Wow! Really? yes... no"),
    ("等等…………好吧", "等等……好吧"),
    ("<p>Hello <b>big</b> world</p><p>again</p>", "Hello big world\n\nagain"),
    ("one<br/>two<!-- hidden - --><script>var x = 1 < 2;</script> three<!-- open", "one\ntwo three<!-- open"),
    ("a &amp; b &lt;3 &#20320;&nbsp;x&not", "a & b <3 你 x&not"),
    ("&amp;lt;b&amp;gt;bold&amp;lt;/b&amp;gt; text", "bold text"),
    ("见https://a.cn/x?y=1，然后", "见，然后"),
    ("看www.a.cn这里，还有 (https://b.org/c).", "看这里，还有 ()."),
    ("你好,世界!他说:走吧", "你好，世界！他说：走吧"), ("你好 ,世界 !", "你好 ，世界 ！"),
    ("买了(两个)苹果.", "买了（两个）苹果。"),
    ("Hello，world at 12：30 and 3．14", "Hello,world at 12:30 and 3.14"), ("在3．14附近，上午9：05开始", "在3.14附近，上午9:05开始"),
    ("a\r\nb\rc\u2028d\x00e\u200bf\ufeff", "a\nb\nc\ndef"),
    ("x" + " " * 20 + "y   \n\n\n\n\n\nz\t", "x y\n\n\nz"),
    ("cafe\u0301 ①２", "caf\u00e9 ①２"),
    ("正文在这里。\n上一篇：旧闻 下一篇：新闻\n京ICP备12345号", "正文在这里。"),
    ("A good text.\nThis site uses cookies.\nAll Rights Reserved 2020", "A good text."),
    ("A good text.\nCopyright © 2020 Example Inc. All rights reserved.\nPrivacy Policy | Terms of Service | Contact", "A good text."),
    ("正文在这里。\n（责任编辑：张三）\n版权所有 © 2020 某某公司\n未经授权，禁止转载。\n阅读全文>>", "正文在这里。"),
])
def test_each_edit_does_what_it_says(dirty, want):
    """One case for each rule; NFC composes é but leaves ① and full-width digits alone."""
    assert edits.normalise(dirty) == want


@pytest.mark.parametrize("name, dirty, want", [
    ("wiki_marks", "北京[1]是首都[2-4][来源请求]。[编辑]", "北京是首都。"),
    ("wiki_marks", "Paris[1][citation needed] is big.[2, 3] a[0] and [see]", "Paris is big. a[0] and [see]"),
    ("repeated_sentences", "今天的天气真是很不错。我们去公园。今天的天气真是很不错。好。好。", "今天的天气真是很不错。我们去公园。好。好。"),
    ("repeated_sentences", "The value is 3.14 now. Wait. The value is 3.14 now. End", "The value is 3.14 now. Wait. End"),
])
def test_edits_that_a_recipe_must_turn_on(name, dirty, want):
    """Footnote marks, and sentences that repeat: short ones stay."""
    assert edits.normalise(dirty) == dirty and edits.normalise(dirty, (name,)) == want


def test_sentences_together_are_the_text():
    """The pattern cuts and loses nothing."""
    for text in PROSE + EN + ZH + VERSE + ["a.b. c.\n\n。。”）x", ""]:
        assert "".join(edits.SENTENCE.findall(text)) == text


@pytest.mark.parametrize("name", edits.EDITS)
def test_every_edit_can_be_switched_off(name):
    """Then its name is never among the edits, and its own text stays as it is."""
    dirty = {"characters": "一段很普通的中文\u200b文字，没有什么特别的。", "markup": "一段很普通的<b>中文</b>文字，没有什么特别的。",
             "urls": "一段很普通的中文https://a.cn/b文字，没有什么特别的。", "wiki_marks": "一段很普通的中文[1]文字，没有什么特别的。",
             "repeated_punctuation": "一段很普通的中文文字！！没有什么特别的。", "punctuation": "一段很普通的中文文字,没有什么特别的。",
             "boilerplate": "一段很普通的中文文字，没有什么特别的。\n版权所有", "repeated_sentences": "一段很普通的中文文字没有什么特别的。" * 2,
             "blanks": "一段很普通的中文文字，没有什么特别的。  \n第二行", "pii": "一段很普通的中文文字，写信给abc@b.cn就好。"}[name]
    on = read_recipe(changes={"edits": SWITCHABLE})
    off = read_recipe(changes={"edits": SWITCHABLE | {name: "off" if name in clean.EDIT_OPTIONS else False}})
    assert clean_text(dirty, on)[2] == [name] and clean_text(dirty, on)[0] != dirty
    assert clean_text(dirty, off)[::2] == (dirty, [])


def test_urls_may_leave_a_tag():
    recipe = read_recipe(changes={"edits": {"urls": "tag"}})
    assert clean_text("详情请看 https://a.cn/b，谢谢大家的支持和关注。", recipe)[0] == "详情请看 <URL>，谢谢大家的支持和关注。"


ATOMS = ["&#38;", "b>", "1]", "你", "好", "a", "B ", "1", " ", "  ", "\n", "\r", "\t", "\u3000", ",", "，", ".", "。", "!", "！", "?", "：", ":", "(", ")", "（", "…",
         "......", "&", "amp;", "&lt;", "&gt;", "&#60;", "&#96;", "<b>", "</p>", "<a href=x>", "<", ">", "=", "\u200b", "https://x.y/z", "www.", "://",
         "-", "\u0301", "<!--", "-->", "<script>", "</script>", "\x85", "．", ";", "\xa0", "`", "```", "```\n", "{", "}", "[1]", "[", "]", "a@b.cn",
         "13812345678", "8.8.8.8", "版权所有", "def f():\n    ", "return x\n", "\U000F0000", "\U000F0001", "今天的天气真是很不错。", "12：30"]


def test_normalising_twice_changes_nothing():
    """2,000 random mixtures of everything that the rules look at, and 1,000 strings of any characters, with every edit on; and
    nothing grows but for tags."""
    rng = random.Random(0)
    mixtures = ["".join(rng.choices(ATOMS, k=rng.randint(1, 25))) for _ in range(2000)]
    anything = ["".join(chr(rng.choice([rng.randrange(0x100), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(rng.randint(0, 40)))
                for _ in range(1000)]
    for recipe in (read_recipe(changes={"edits": SWITCHABLE}), read_recipe("chat")):
        for text in mixtures + anything:
            once, *_ = clean_text(text, recipe)
            again, _, names, _ = clean_text(once, recipe)
            assert again == once and not names, (text, once, again)
            tags = sum(map(once.count, ("<URL>", "<EMAIL>", "<PHONE>", "<ID>", "<CARD>", "<IP>")))
            assert len(once) <= len(unicodedata.normalize("NFC", text)) + 7 * tags


def test_no_pattern_is_quadratic():
    """Pieces that open something and never close it, 20,000 times: a pattern that reads on for each would not come back."""
    for piece in ("<!--", "<script>", "<a ", "`", "（", "(好", "[1", " \t", "http://", "。 ", "a. ", "&#", "<div x=", "好 ", "{;", "\n ", "\n    x = 1", "-" * 5):
        text = "x" + piece * 20_000 + "y"
        assert isinstance(clean_text(text, read_recipe(changes={"edits": SWITCHABLE}))[0], str)


def test_brackets_in_brackets_take_a_bounded_number_of_rounds():
    """One round would take off one level: a document of 200,000 characters that nests 70,000 deep would never be done."""
    steps, rounds = dict(edits.EDITS), []
    steps["markup"] = lambda text: rounds.append(text) or edits.markup(text)
    for bomb in ("<" * 300 + "b>" * 300, "[" * 300 + "1]" * 300, "好(" * 300 + "好" + ")好" * 300, "&" + "#038;" * 300 + "lt;b>",
                 "&" + "amp;" * 300 + "lt;b&gt;", "&" + "#38;amp;" * 300 + "lt;b&gt;"):
        rounds.clear()
        once, _ = edits.apply(bomb, steps)
        assert len(rounds) <= edits.ROUNDS + 2 and edits.apply(once, steps) == (once, []), bomb[:9]
    assert edits.normalise("&" + "amp;" * 300 + "lt;b&gt;x") == "x"                      # escaping alone is no bomb


def test_code_keeps_its_braces_tags_and_blanks():
    """Between backticks, in a fenced block, and as a whole document; around it the text is edited as always."""
    chat = "用 `<div>` 标签,如:\n```html\n<p>你好,世界!!</p>\n\n" + " " * 12 + "x[1]\n```\n<b>好</b>!!"
    assert edits.normalise(chat) == "用 `<div>` 标签，如：\n```html\n<p>你好,世界!!</p>\n\n" + " " * 12 + "x[1]\n```\n好！"
    jsx = "function App() {\n    const x = {a: 1};;\n    return (<div><b>{x.a}</b></div>);\n}"
    assert edits.normalise(jsx) == jsx and edits.looks_like_code(jsx)
    page = "<html><head><style>a { color: red; } b { top: 0; }</style><script>var a = {}; f();</script></head><body><p>Just a few words.</p></body></html>"
    assert edits.normalise(page) == "Just a few words."
    assert clean_text("# write to abc@b.cn\nint f() {\n  return 1; }\nint g() {\n  return 2; }")[0].startswith("# write to <EMAIL>\nint")


def test_the_letter_s_is_no_punctuation():
    """The notes' list of marks holds a non-raw "\\s": as characters that is a backslash and the letter s, and replacing "marks"
    by a comma eats both letters and blanks. Nothing of the kind here."""
    marks, sentence = set("，。！？" + "\\s"), "The class passes 3.14... ok"
    assert "s" in marks and "".join("，" if c in marks else c for c in sentence).count("s") == 0
    for text in (sentence, "Sissy's glasses: sixty-six dollars and 0.99 cents at 7:05."):
        assert edits.normalise(text) == text


# ------------------------------------------------------------------------------------------------ drops of every text

def test_fourteen_characters_are_dropped_and_fifteen_kept():
    """The notes' limit, counted after cleaning: blanks at the ends do not help."""
    for text in ("abcdefghijklmno", "一二三四五六七八九十一二三四五"):
        assert clean_text(text)[1] is None and clean_text(text[:14] + " " * 5)[1] == "too_short"


@pytest.mark.parametrize("text, reason", [
    ("", "empty"), (" \n\t\u200b\ufeff ", "empty"), ("short", "too_short"),
    ('<div class="nav"><a href="/home">Home</a><a href="/about">About us</a></div>', "markup"),
    ("https://example.com/a/very/long/path and https://example.com/another", "markup"),
    ("哈哈！！！！！！！！！！！！！！！！", "repeated_punctuation"),
    ("Is this real?????????????????????????? Yes", "repeated_punctuation"),
    ("?!" * 20, "repeated_punctuation"), ("########=======" * 3, "repeated_punctuation"),
    ("=-=-=-=-=- Title", "repeated_punctuation"), ("Приветствуем вас на нашем сайте", "language"), ("これはペンです。あれは何ですか。", "language"),
    ("A long enough heading with a rule under it\n=====\nand text", None),
    ("<p>A <i>long</i> enough sentence with two tags stays.</p>", None),
    ("很好很好！！这个东西确实不错，大家都可以来看看。", None),
])
def test_every_drop_has_the_reason_one_would_give(text, reason):
    """And what is merely edited is kept."""
    assert clean_text(text)[1] == reason


# Question 32 of the notes: thirty rows whose fate is known
THIRTY = ([(text, None) for text in EN + ZH] + [(line, None) for line in PROSE[:5]]
          + [("太短了。", "too_short"), ("Hi!", "too_short"), ("一二三四五六七八九十一二三四", "too_short"), ("abcdefghijklmn", "too_short")]
          + [("", "empty"), ("\u200b\u200b \n", "empty"), ("<br><br>", "empty")]
          + [('<a href="x">a</a>' * 9, "markup"), ("https://a.cn/" + "b" * 90 + " 看这里吧，这里有你想要的一切", "markup"), ("<td>1</td>" * 20, "markup")]
          + [("！！！！！！！！！！好", "repeated_punctuation"), ("~~~~~~~~~~ 分割线 ~~~~~~~~~~", "repeated_punctuation")]
          + [("日本語の文章はここでは残りません。", "language"), ("한국어 문장도 마찬가지입니다, 여기서는.", "language")]
          + [("今天的天气真的很不错，我们一起去公园里玩吧。" * 12, "repeated_sentences"), ("".join(f"第{i}号是{7919 * i % 1000:03}，" for i in range(40)), "digits"),
             ("春天" * 80, "duplicate_ngrams"), ("".join(c + "，；" for c in ZH[0] if c >= "一"), "punctuation")])


def test_thirty_rows_with_a_known_outcome():
    """Each is kept, or dropped for exactly the reason that was planted."""
    assert len(THIRTY) == 30 and [clean_text(text)[1] for text, _ in THIRTY] == [reason for _, reason in THIRTY]


# ------------------------------------------------------------------------------------------------ recipes

def test_the_recipe_for_the_web_names_every_setting():
    """So that one file shows all there is; it differs from the usual values only where its first lines say so."""
    given = tomllib.loads((ROOT / "recipes" / "web.toml").read_text(encoding="utf-8"))
    usual = clean.defaults()
    differs = set()
    assert set(given) == set(usual) and set(given["edits"]) == set(usual["edits"])
    for name, values in usual["filters"].items():
        assert set(given["filters"][name]) | {"off"} == set(values), name
        differs |= {name} if values | given["filters"][name] != values else set()
    differs |= {k for k in usual["edits"] if usual["edits"][k] != given["edits"][k]} | {k for k in ("shares_from",) if usual[k] != given[k]}
    assert differs == {"shares_from", "wiki_marks", "too_short", "keywords", "curly_brackets"}
    head = (ROOT / "recipes" / "web.toml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(name in head for name in differs)


@pytest.mark.parametrize("page", ["docs/cleaning.md", "docs/zh/cleaning.md"])
def test_the_page_lists_every_edit_and_filter_with_its_thresholds(page):
    """In the order in which they run; a threshold that changes in the code must change on the page."""
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").split("\n") if re.match(r"\| `\w+` ", line)]
    names = [row.split("`")[1] for row in rows]
    assert names == [*edits.EDITS, *filters.FILTERS]
    for row, values in zip(rows[len(edits.EDITS):], clean.defaults()["filters"].values()):
        for key, value in values.items():
            if isinstance(value, (int, float)) and key not in ("off", "words_en", "least_chars"):
                assert any(form in row for form in (f"{value:g}", f"{value:.2f}", f"{100 * value:g} %")), (row, key, value)


@pytest.mark.parametrize("path", sorted(clean.RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_reads_and_every_filter_can_be_switched_off(path):
    """A Recipe is a value: equal when read twice, hashable, the same after a trip to a worker."""
    recipe = read_recipe(path.stem)
    assert recipe == read_recipe(str(path)) and len({recipe, read_recipe(path.stem)}) == 1 and pickle.loads(pickle.dumps(recipe)) == recipe
    off = read_recipe(path.stem, {"filters": {name: {"off": True} for name in filters.FILTERS}})
    assert off != recipe and clean_text("", off)[1] is None and clean_text("!" * 99, off)[1] is None


@pytest.mark.parametrize("toml, words", [
    ("[filter.digits]\nmost = 1", ["unknown option 'filter'", "'filters'"]), ("[filters.digit]\nmost = 1.0", ["'digit'", "'digits'"]),
    ("[filters.digits]\nmots = 1.0", ["'mots'", "'most'"]), ("[edits]\npunctuations = true", ["'punctuations'", "'punctuation'"]),
    ("[edits]\nurls = true", ["urls", "remove", "tag", "off"]), ("[edits]\nmarkup = 'yes'", ["markup", "true or false"]),
    ("[filters.digits]\nmost = 'x'", ["most", "number"]), ("[filters.digits]\nmost = -1.0", ["most", "-1"]),
    ("[filters.too_short]\nchars = 1.5", ["chars", "whole"]),
    ("[filters.digits]\nmost = nan", ["most"]), ("[filters.digits]\noff = 1", ["off", "true or false"]),
    ("[filters.duplicate_ngrams]\nzh = [8]", ["zh", "[n, share]"]), ("[filters.language]\nkeep = 'zh'", ["keep", "list"]),
    ("filters = 3", ["filters", "table"]), ("edits = true", ["edits", "table"]), ("[filters.keywords]\npath = 'none.txt'", ["none.txt", "keywords"]),
    ("filters = [", ["TOML"]), (b"\xff\xfe", ["TOML"]),
])
def test_a_mistake_in_a_recipe_gets_one_sentence(tmp_path, toml, words):
    """It names the place and the nearest valid name."""
    path = tmp_path / "mine.toml"
    path.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    with pytest.raises(UserError) as error:
        read_recipe(str(path))
    assert all(word in str(error.value) for word in [*words]) and "\n" not in str(error.value), str(error.value)


def test_a_recipe_that_is_not_there():
    for name in ("webb", "nowhere/mine.toml"):
        with pytest.raises(UserError, match="default.*web"):
            read_recipe(name)


def test_keywords_come_from_a_file(tmp_path):
    """One word a line beside the recipe; the words are part of the Recipe, so that another list is another recipe."""
    (tmp_path / "words.txt").write_text("# mine\n苹果\n\n香蕉\n桃子\n", encoding="utf-8")
    (tmp_path / "mine.toml").write_text('[filters.keywords]\npath = "words.txt"\n', encoding="utf-8")
    recipe = read_recipe(str(tmp_path / "mine.toml"))
    assert clean_text("苹果和香蕉和桃子都是水果，我都很喜欢吃。", recipe)[1] == "keywords"
    (tmp_path / "words.txt").write_text("苹果\n", encoding="utf-8")
    assert read_recipe(str(tmp_path / "mine.toml")) != recipe


# ------------------------------------------------------------------------------------------------ the stage

def table(rows):
    return pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("meta", pa.string()),
                                                 ("drop_reason", pa.string())]))


def chat(*contents):
    roles = ("user", "assistant")
    meta = {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}
    return {"id": "c", "text": "\n".join(contents), "source": "s", "meta": json.dumps(meta, ensure_ascii=False), "drop_reason": None}


def test_the_stage_keeps_rows_and_order_and_sets_its_columns():
    """Whatever the batch: one table of all rows, or a table for each."""
    texts = [text for text, _ in THIRTY]
    rows = [{"id": str(i), "text": t, "source": "s", "meta": '{"url": "x"}' if i % 2 else "", "drop_reason": "adapter" if i == 3 else None}
            for i, t in enumerate(texts)]
    rows.append({"id": "x", "text": None, "source": "s", "meta": None, "drop_reason": None})
    whole = clean.clean(table(rows), read_recipe())
    assert whole.column_names == ["id", "text", "source", "meta", "drop_reason", "lang", "n_chars", "edits"]
    assert whole.schema.field("n_chars").type == pa.int32() and whole.schema.field("text").type == pa.large_string()
    got = whole.to_pylist()
    for row, given in zip(got, rows):
        text, reason, names, lang = clean_text(given["text"] or "")
        assert row["id"] == given["id"] and row["meta"] == given["meta"] and row["n_chars"] == len(row["text"]) and row["lang"] == lang
        if given["drop_reason"]:
            assert (row["text"], row["drop_reason"], row["edits"]) == (given["text"], "adapter", "")
        else:
            assert (row["text"], row["drop_reason"], row["edits"]) == (text, reason, ",".join(names))
    assert pa.concat_tables([clean.clean(table([row]), read_recipe()) for row in rows]).to_pylist() == got
    assert clean.clean(whole.slice(0, 0), read_recipe()).schema == whole.schema
    assert clean.clean(table(rows).drop_columns("drop_reason").slice(0, 3), read_recipe())["drop_reason"].to_pylist() == [r["drop_reason"] for r in got[:3]]


def test_chats_are_edited_message_by_message():
    """Tags and marks go in each content, roles and other keys stay, and text is the contents joined again."""
    row = clean.clean(table([chat("请问,<b>北京</b>有多大?", "很大!!有一万六千平方公里,写信给a@b.cn。")]), read_recipe()).to_pylist()[0]
    messages = json.loads(row["meta"])["messages"]
    assert [m["content"] for m in messages] == ["请问，北京有多大？", "很大！有一万六千平方公里，写信给<EMAIL>。"]
    assert [m["role"] for m in messages] == ["user", "assistant"] and row["text"] == "\n".join(m["content"] for m in messages)
    assert row["edits"] == "markup,repeated_punctuation,punctuation,pii" and row["drop_reason"] is None and row["lang"] == "zh"
    empty = clean.clean(table([chat("请你把这个网页的内容翻译成中文好吗？", "<br>")]), read_recipe()).to_pylist()[0]
    assert empty["drop_reason"] == "empty_message"
    loop = clean.clean(table([chat("讲个故事吧", "从前有座山，山里有座庙，庙里有个老和尚讲故事。" * 30)]), read_recipe("chat")).to_pylist()[0]
    assert loop["drop_reason"] in ("repeated_sentences", "duplicate_ngrams")


def test_preference_pairs_are_judged_by_the_prompt_and_the_better_answer():
    """The rejected answer is edited too, but it may be as bad as it likes."""
    pair = {"prompt": [{"role": "user", "content": "介绍一下你自己,好吗?"}], "chosen": "我是一个助手,可以回答问题。", "rejected": "哈哈，" * 200}
    row = {"id": "p", "text": "\n".join([pair["prompt"][0]["content"], pair["chosen"], pair["rejected"]]), "source": "s",
           "meta": json.dumps(pair, ensure_ascii=False), "drop_reason": None}
    got = clean.clean(table([row]), read_recipe()).to_pylist()[0]
    meta = json.loads(got["meta"])
    assert meta["prompt"][0]["content"] == "介绍一下你自己，好吗？" and meta["chosen"] == "我是一个助手，可以回答问题。" and meta["rejected"] == pair["rejected"]
    assert got["drop_reason"] is None and got["text"] == "\n".join([meta["prompt"][0]["content"], meta["chosen"], meta["rejected"]])
    swapped = dict(row, meta=json.dumps(pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}, ensure_ascii=False))
    assert clean.clean(table([swapped]), read_recipe()).to_pylist()[0]["drop_reason"] is not None
