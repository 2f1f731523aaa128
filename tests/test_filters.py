"""Every filter of the clean stage: a text just inside of its threshold and one just outside, in English and in Chinese."""
import random
from collections import Counter

import pytest

from nanollm.corpus import clean, filters
from nanollm.corpus.filters import Doc

EN = [
    "The lighthouse at the end of the pier was built in 1874, when fishing boats still came home by sail. Its lamp burned oil, "
    "and a keeper carried 12 cans up the stairs each evening. He wrote down the weather, the ships that passed, and once, in a "
    "very careful hand, that his daughter had learned to read. Nobody lives there now. The lamp turns by itself; a computer in "
    "the harbour office switches it on at 4:30 in winter and at 9:15 in summer. On Sundays the stairs are open to visitors, who "
    "pay $3.50 and are asked to mind their heads. \"You can see three counties,\" says the woman at the door. \"On a clear day.\"",
    "Bread needs four things: flour, water, salt and time. Mix 500 g of flour with 350 ml of water and let it rest for half an "
    "hour, so that the gluten can form by itself. Then add 10 g of salt and a little yeast.\nFold the dough four times in the next "
    "two hours. It should feel soft and strong, and it should have grown by half. Shape it, put it into a basket, and leave it "
    "in the fridge until the morning.\nHeat the oven to 240 degrees with a pot inside. Bake for 25 minutes with the lid on and 20 "
    "without. The crust sings when it cools; wait until it has finished.",
    "Why do leaves turn red? In autumn a tree takes back what it can use. Chlorophyll is broken down and its nitrogen is carried "
    "into the wood. What stays behind are the yellow pigments that were there all summer, hidden by the green. The red is "
    "different: it is made new, in leaves that have only weeks to live. Some think that it protects them from the sun while they "
    "are being emptied; others, that it warns insects off. Both may be true. A maple in the shade stays yellow, and the same "
    "tree on a sunny slope burns.",
]
ZH = [
    "老城墙下有一家修表铺，门面只有三米宽。师傅姓陈，今年六十八岁，十六岁开始学徒，到现在已经修了五十多年。他说，机械表最怕的不是摔，而是没有人戴："
    "油干了，齿轮就会磨损。铺子里挂着一百多只钟，每到整点，此起彼伏地响起来，路过的孩子总要停下来听。去年冬天，有人拿来一块1956年的怀表，"
    "说是爷爷留下的。陈师傅拆开一看，里面的零件早就停产了，只好自己一点一点地磨。三个星期以后，那块表又走了起来。客人问多少钱，他想了想说：“给八十吧。”",
    "做豆腐并不难，难的是做得嫩。先把黄豆泡上一夜，第二天早晨加水磨成浆，用纱布滤去豆渣。\n豆浆要煮开两次，撇掉浮沫，等温度降到八十度左右再点卤。卤水要慢慢地加，"
    "一边加一边轻轻搅动，看到出现豆花就停下来。\n最后把豆花舀进木框里，盖上布，压上一块干净的石头。压得久，豆腐就老；压得短，豆腐就嫩。刚做好的豆腐还带着热气，"
    "撒一点盐就很好吃。村里的老人说，水好，豆腐才好，所以每年春天他们都要把井淘一遍。",
    "为什么月亮有圆有缺？月亮自己不发光，我们看到的是它反射的太阳光。月亮绕着地球转，大约二十九天半转完一圈，在不同的位置上，被照亮的那一面朝向我们的部分也不同。"
    "当月亮走到太阳和地球之间，它背对我们，这就是新月；当地球走到太阳和月亮之间，我们看到的是满月。有人以为月缺是地球的影子造成的，其实那是月食，"
    "一年里只有几次，而月亮的圆缺每个月都在发生。",
    "用PyTorch训练模型时，先用Dataset和DataLoader读取数据，再定义Transformer Encoder和Decoder的结构。优化器一般选AdamW，学习率用cosine scheduler逐步降低。如果显存不够，可以打开gradient "
    "checkpointing，Gradient Accumulation或者FlashAttention，或者用FSDP把参数分到多张卡上。训练过程中要把loss和gradient norm写进TensorBoard，"
    "发现NaN就降低learning rate。混合精度推荐bfloat16，它不需要GradScaler，也可以用DeepSpeed。"
    "最后用torch.save保存state_dict，再用Evaluation Harness在HellaSwag上测试效果。",
]
LISTS = ["\n".join(f"{i}. {name}" for i, name in enumerate(
             "苹果 香蕉 桃子 梨子 葡萄 西瓜 草莓 樱桃 柠檬 芒果 荔枝 龙眼 菠萝 椰子 石榴 柿子 红枣 杏子 李子 橘子 "
             "白菜 萝卜 黄瓜 茄子 辣椒 土豆 番茄 南瓜 冬瓜 豆角 菠菜 芹菜 韭菜 大葱 生姜 大蒜 洋葱 莲藕 竹笋 香菇".split(), 1)),
         "\n".join(f"{colour} {thing}" for colour in ("red", "green", "blue", "white", "black") for thing in
                   ("house", "river", "stone", "garden", "window", "table", "letter", "candle", "mirror", "basket"))]
QUATRAINS = "\n\n".join(["山中无一事，\n独坐听泉声。\n月上松间路，\n风来竹外清。", "小雨湿春衣，\n江头客未归。\n隔帘闻燕语，\n知是杏花飞。",
                         "秋夜灯前坐，\n虫声绕短墙。\n故人书不至，\n一夜满天霜。", "雪满长安道，\n孤舟泊晚津。\n围炉温浊酒，\n共话旧时人。", "山寺钟初动，\n溪桥月欲斜。\n牧童归去晚，\n一路落梅花。"])
VERSE = ["春风轻轻吹过\n河边的柳树\n小船慢慢划着\n月光落在水里\n\n我想起你的歌\n想起那年夏天\n萤火虫提着灯\n照亮回家的路\n\n"
         "春风轻轻吹过\n河边的柳树\n孩子已经长大\n歌声还在水里\n\n"
         "我想起你的歌\n想起那年夏天\n星星落进井里\n谁也没有去捞\n\n远方的信到了\n纸上没有一个字\n只有一片叶子\n夹着去年的秋",
         "The river said\nthat it was late,\nthe willow said\nthat it could wait.\n\nA boat went by\nwith no one in,\nthe moon came up\n"
         "as thin as tin.\n\nThe river said\nthat it was late,\nthe willow said\nthat it could wait.\n\nAnd I, who had\nno word to say,\nsat on the stones\n"
         "and looked away.\n\nThe night was long,\nthe night was wide,\na frog began\non the other side.\n\n"
         "It sang of mud,\nit sang of rain,\nit stopped a while\nand sang again."]


def check(name, inside, outside, **thresholds):
    """`inside` passes and `outside` fails. Both are (text, raw text and edits if they matter)."""
    for text, drop in ((inside, False), (outside, True)):
        doc = text if isinstance(text, Doc) else Doc(text, text)
        assert bool(filters.FILTERS[name](doc, **thresholds)) is drop, (name, doc.text[:80])


def lines(n, line):
    return "\n".join(f"{line}{chr(0x4E00 + i) if line[0] > '~' else chr(97 + i // 26) + chr(97 + i % 26)}" for i in range(n))


WORDS = "abcdefghijklmnopqrstuvwxyz"
HAN = "".join(chr(0x4E00 + 7 * i) for i in range(2000))   # all different

# filter -> (just inside, just outside) at its usual thresholds
PAIRS = [
    ("empty", "a", ""), ("empty", "好", ""),
    ("markup", Doc("abcd", "<b>abcd", ("markup",)), Doc("abcd", "<b>abc</b>", ("markup",))),
    ("markup", Doc("好好好", "<b>好好好", ("markup",)), Doc("好好", "<b>好好", ("markup",))),
    ("repeated_punctuation", Doc("", "a" * 20 + "!" * 5), Doc("", "a" * 19 + "!" * 5)),
    ("repeated_punctuation", Doc("", "好" * 20 + "！" * 5), Doc("", "好" * 19 + "！" * 5)),
    ("too_short", WORDS[:15], WORDS[:14]), ("too_short", HAN[:15], HAN[:14]),
    ("language", HAN[:30] + "a" * 70, "か" * 60 + HAN[:40]), ("language", HAN[:95] + "か" * 5, HAN[:94] + "か" * 6),
    ("language", "English", "Кириллица"),
    ("curly_brackets", WORDS, WORDS + "{"), ("curly_brackets", HAN, HAN + "}"),
    ("function_words", "Red bread of the", "Red bread the the"), ("function_words", "好书人", "好书"),
    ("word_length", "one two three four 好好", "a bc de 好"),
    ("word_length", "cat dog fox", "cat dog ox"), ("word_length", "abcdefghij " * 9, "abcdefghij " * 9 + "abcdefghijk"),
    ("alphabetic", "ab " * 80 + "1 " * 20, "ab " * 79 + "1 " * 21), ("alphabetic", HAN[:735] + "，" * 265, HAN[:734] + "，" * 266),
    ("symbols", "### ab " * 10 + "ab " * 60, "### ab " * 10 + "ab " * 59),
    ("symbols", "ab " * 90 + "# " * 10, "ab " * 89 + "# " * 11), ("symbols", "好" * 80 + "……好" * 10, "好" * 69 + "……好" * 10),
    ("bullets", "- ab\n" * 9 + "ab", "- ab\n" * 10), ("bullets", "● 好\n" * 9 + "好", "● 好\n" * 10), ("bullets", "- ab\n- ab", "- ab\n- ab\n• ab"),
    ("ellipsis_lines", "ab...\n" * 3 + "ab\n" * 7, "ab...\n" * 4 + "ab\n" * 6), ("ellipsis_lines", "好……\n" * 3 + "好\n" * 7, "好……\n" * 4 + "好\n" * 6),
    ("punctuation", "a" * 65 + "!" * 35, "a" * 64 + "!" * 36), ("punctuation", HAN[:65] + "，" * 35, HAN[:64] + "，" * 36),
    ("punctuation", "a" * 99 + ",", "a" * 100 + ","), ("punctuation", HAN[:99] + "。", HAN[:100] + "。"),
    ("digits", "a" * 70 + "1" * 30, "a" * 69 + "1" * 31), ("digits", HAN[:70] + "1" * 30, HAN[:69] + "1" * 31),
    ("terminal_punctuation", "ab.\n" * 12 + "ab\n" * 88, "ab.\n" * 11 + "ab\n" * 89),
    ("terminal_punctuation", "好。\n" * 106 + "好\n" * 894, "好。\n" * 105 + "好\n" * 895), ("terminal_punctuation", "好\n好", "好\n好\n好"),
    ("short_lines", ("a" * 30 + "\n") * 67 + ("a" * 31 + "\n") * 33, ("a" * 30 + "\n") * 68 + ("a" * 31 + "\n") * 32),
    ("short_lines", ("好" * 10 + "\n") * 67 + ("好" * 11 + "\n") * 33, ("好" * 10 + "\n") * 68 + ("好" * 11 + "\n") * 32),
    ("newlines", "a " * 70 + "a\n" * 30, "a " * 69 + "a\n" * 31), ("newlines", "好" * 89 + "好\n" * 11, "好" * 88 + "好\n" * 12),
    ("duplicate_lines", lines(69, "abcdefgh") + "\nx" * 31, lines(68, "abcdefgh") + "\nx" * 32),              # 30 of 100 repeat; 31
    ("duplicate_lines", lines(712, HAN[:9]) + "\n好" * 288, lines(711, HAN[:9]) + "\n好" * 289),               # 287 and 288 of 1,000
    ("duplicate_lines", lines(79, "abcdefgh") + "\nabcdefghij" * 21, lines(78, "abcdefgh") + "\nabcdefghij" * 22),       # characters
    ("duplicate_lines", lines(89, HAN[:9]) + f"\n{HAN[50:60]}" * 11, lines(88, HAN[:9]) + f"\n{HAN[50:60]}" * 12),
    ("duplicate_paragraphs", lines(69, "abcdefgh").replace("\n", "\n\n") + "\n\nx" * 31, lines(68, "abcdefgh").replace("\n", "\n\n") + "\n\nx" * 32),
    ("duplicate_paragraphs", lines(79, HAN[:9]).replace("\n", "\n\n") + f"\n\n{HAN[50:60]}" * 21,
     lines(78, HAN[:9]).replace("\n", "\n\n") + f"\n\n{HAN[50:60]}" * 22),
    ("repeated_sentences", "abcdefghij! " * 4 + "k" * 60 + "!", "abcdefghij! " * 4 + "k" * 59 + "!"),          # 30 of 100; of 99
    ("repeated_sentences", (HAN[:10] + "。") * 4 + HAN[20:80], (HAN[:10] + "。") * 4 + HAN[20:79]),
    ("repeated_sentences", "abc! " * 50 + "abcd! ", "abcd! " * 50),                       # sentences under 4 characters do not count
    ("repeated_sentences", (HAN[:3] + "。") * 50, (HAN[:4] + "。") * 50),
]


@pytest.mark.parametrize("name, inside, outside", PAIRS, ids=[f"{p[0]}-{i}" for i, p in enumerate(PAIRS)])
def test_each_filter_draws_its_line_exactly_where_it_says(name, inside, outside):
    """One character, line or word more, and the text is dropped."""
    check(name, inside, outside)


def test_thresholds_of_the_web_recipe():
    """100 characters, 50 English words, and three keywords."""
    check("too_short", HAN[:100], HAN[:99], chars=100, words_en=50)
    check("too_short", "abcdef " * 50, "abcdef " * 49 + "1 " * 40, chars=100, words_en=50)
    words = ["online casino", "代开发票", "sex"]
    check("keywords", "an online casino and sex", "online casino, sex, 代开发票", words=words)
    check("keywords", HAN[:980] + "代开发票" * 2, HAN[:980] + "代开发票" * 3, words=words)
    check("keywords", "Essex and Sussex and Middlesex and Wessex " * 9, "sex " * 3, words=words)
    check("keywords", "代开发票" * 99, "代开发票" * 99 + "b", words=["b"], per_1000=0)


def test_every_filter_has_a_pair_in_both_languages():
    """But for those that need a list or two languages, which have tests of their own."""
    zh = {name for name, _, outside in PAIRS if not (outside.raw if isinstance(outside, Doc) else outside).isascii()}
    en = {name for name, *texts in PAIRS if any((t.raw if isinstance(t, Doc) else t).isascii() for t in texts)}
    own = {"keywords", "duplicate_ngrams", "top_ngrams"}
    assert en | own == set(filters.FILTERS) and zh | own | {"empty", "word_length"} == set(filters.FILTERS)


# ------------------------------------------------------------------------------------------------ units and n-grams

def units(text):
    """The definition, one character at a time."""
    found, last = [], filters.BLANK
    for c in text:
        kind = int(filters.class_table()[ord(c)])
        if kind == last and kind in (filters.LATIN, filters.LETTER, filters.DIGIT):
            found[-1] += c
        elif kind != filters.BLANK:
            found.append(c)
        last = kind
    return found


def duplicate_share(text, n):
    """The definition, with sets of tuples."""
    u, seen, cover = units(text), set(), set()
    for i in range(len(u) - n + 1):
        if tuple(u[i:i + n]) in seen:
            cover |= set(range(i, i + n))
        seen.add(tuple(u[i:i + n]))
    return sum(len(u[i]) for i in cover) / sum(map(len, u)) if len(u) > n else 0.0


def top_share(text, n):
    u = units(text)
    grams = [tuple(u[i:i + n]) for i in range(len(u) - n + 1)]
    if len(u) <= n or max(Counter(grams).values()) < 2:
        return 0.0
    most = max(Counter(grams).values())
    best = max((g for g, times in Counter(grams).items() if times == most), key=lambda g: (sum(map(len, g)), -grams.index(g)))
    cover = {j for i, g in enumerate(grams) if g == best for j in range(i, i + n)}
    return sum(len(u[i]) for i in cover) / sum(map(len, u))


def test_a_unit_is_a_chinese_character_or_a_run_of_letters_or_digits_or_a_mark():
    assert units("我有2个iPhone 15，约5,999元！かな") == ["我", "有", "2", "个", "iPhone", "15", "，", "约", "5", ",", "999", "元", "！", "か", "な"]
    for text in [*EN, *ZH, "  a\n\nb 〇々 é Ωmega1２３ …—\u3000x", "a", ""]:
        doc = Doc(text)
        assert doc.unit_lengths.tolist() == [len(u) for u in units(text)]
        assert len(set(doc.unit_hashes.tolist())) == len(set(units(text))) and sum(doc.unit_lengths) == doc.visible


def test_ngram_shares_are_those_of_the_definition():
    """The arrays against sets and tuples, on 300 random texts that repeat themselves in every way."""
    rng = random.Random(0)
    atoms = ["你", "好", "ab", "a", " ", "1", "22", "。", ",", "\n", "か", "你好ab"]
    for text in ["".join(rng.choices(atoms, k=rng.randint(1, 60))) for _ in range(300)] + EN + ZH + VERSE:
        doc = Doc(text)
        for n in (1, 2, 3, 5, 8):
            assert filters.duplicate_ngram_share(doc, n) == pytest.approx(duplicate_share(text, n), abs=1e-12), (text, n)
            assert filters.top_ngram_share(doc, n) == pytest.approx(top_share(text, n), abs=1e-12), (text, n)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_ngram_filters_draw_their_line_at_the_share(lang):
    """At the exact share a text passes, a hair below it is dropped."""
    text = VERSE[lang == "en"]
    for name, share, n in (("duplicate_ngrams", duplicate_share, 8), ("top_ngrams", top_share, 3)):
        exact = share(text, n)
        assert exact > 0.03
        doc = Doc(text)
        assert not filters.FILTERS[name](doc, **{lang: [[n, exact + 1e-12]]}) and filters.FILTERS[name](doc, **{lang: [[n, exact - 1e-9]]})


def test_longer_ngrams_may_be_skipped_without_changing_a_decision():
    """The rule that ends the search early, against asking every n."""
    rng = random.Random(1)
    limits = [[2, 0.5], [3, 0.45], [4, 0.3], [6, 0.35], [8, 0.2]]
    decisions = Counter()
    for _ in range(400):
        phrases = ["".join(rng.choices(HAN, k=rng.randint(2, 12))) for _ in range(8)]
        doc = Doc("".join(rng.choices(phrases, k=3)) + "".join(rng.choices(HAN, k=rng.randint(5, 60))))
        want = any(filters.duplicate_ngram_share(doc, n) > most for n, most in limits)
        assert filters.duplicate_ngrams(doc, zh=limits) == want
        top = any(filters.top_ngram_share(doc, n) > most for n, most in limits)
        assert filters.top_ngrams(doc, zh=limits) == top
        decisions[want, top] += 1
    assert min(decisions[True, False] + decisions[True, True], decisions[False, False]) > 25          # both sides were met


def test_a_text_without_repetition_has_no_top_ngram():
    """An n-gram that occurs once is no repetition: datatrove counts it and drops short documents."""
    assert filters.top_ngram_share(Doc("one two three"), 2) == 0 and not filters.top_ngrams(Doc("今天天气好"))


# ------------------------------------------------------------------------------------------------ whole texts

@pytest.mark.parametrize("recipe", ["default", "web", "encyclopedia"])
@pytest.mark.parametrize("text", EN + ZH, ids=["en1", "en2", "en3", "zh1", "zh2", "zh3", "zh4"])
def test_good_paragraphs_are_kept_as_they_are(text, recipe):
    """In both languages, with the strict recipe too: same text, no reason, no edit."""
    lang = "zh" if text in ZH else "en"
    assert clean.clean_text(text, clean.read_recipe(recipe)) == (text, None, [], lang)


@pytest.mark.parametrize("text", [*LISTS, QUATRAINS], ids=["zh", "en", "verse"])
def test_lists_and_verse_are_kept_where_the_recipe_says_so(text):
    """Short lines without a function word, and with few marks or many: in the default, and lists in an encyclopedia."""
    recipes = ("default", "encyclopedia") if text in LISTS else ("default", "verse")
    assert [clean.clean_text(text, clean.read_recipe(name))[:3] for name in recipes] == [(text, None, [])] * 2


def test_latin_letters_count_as_words():
    """Chinese with English names in it is Chinese, though most of its letters are Latin; an English text with some Chinese is English."""
    counts = Doc(ZH[3]).counts
    assert counts[filters.HAN] < 0.3 * (counts[filters.HAN] + counts[filters.LATIN]) and Doc(ZH[3]).lang == "zh"
    assert Doc("training " * 30 + HAN[:30]).lang == "zh" and Doc("a " * 31 + HAN[:30]).lang == "en"
    assert Doc(f"The word {HAN[:2]} means this, and {HAN[3:5]} means that.").lang == "en"


def test_headings_of_markdown_are_no_noise():
    """An answer in steps, each with a heading and a few words: the recipe for chats keeps it."""
    text = "\n".join(f"### 第{n}步\n{step}。" for n, step in zip("一二三四五六七八九十", ["打开电脑", "登录账号", "点击设置", "选择语言", "保存更改", "退出程序",
                                                                                "重新启动", "检查结果", "完成备份", "关闭电脑"]))
    assert clean.clean_text(text, clean.read_recipe("chat"))[:2] == (text, None)
    assert filters.symbols(Doc(text + "#" * 30, "")) is False and filters.symbols(Doc("# " * 30 + text, ""))


@pytest.mark.parametrize("text", VERSE, ids=["zh", "en"])
def test_verse_is_kept_by_the_recipe_for_verse_and_named_by_the_one_for_the_web(text):
    """Short lines and a refrain are what makes a poem, and what makes a web page bad."""
    assert clean.clean_text(text, clean.read_recipe("verse"))[:3] == (text, None, [])
    assert clean.clean_text(text, clean.read_recipe("web"))[1] in ("newlines", "duplicate_lines", "duplicate_ngrams", "punctuation")


def gopher(text):
    """Three of Gopher's rules with words between blanks, as tools for English apply them to any language."""
    words = text.split()
    stop = {"the", "be", "to", "of", "and", "that", "have", "with"} & {w.lower() for w in words}
    return len(words) < 50 or not 3 <= sum(map(len, words)) / len(words) <= 10 or len(stop) < 2


def c4(text):
    """C4's rule for lines: what remains after dropping every line that does not end in . ? ! or a quote."""
    return [line for line in text.split("\n") if line.rstrip().endswith((".", "?", "!", '"'))]


def test_english_rules_reject_good_chinese_and_ours_do_not():
    """They keep each English paragraph here, drop each Chinese one, and leave no Chinese line."""
    assert not any(map(gopher, EN)) and all(map(gopher, ZH))
    assert all(map(c4, EN)) and not any(map(c4, ZH))


BAD = [
    ("keyword list", "手机 电脑 相机 耳机 " * 30, {"function_words", "punctuation"}),
    ("telephone list", "".join(f"张{HAN[i]}：{7919 * i % 9000000 + 1000000}\n" for i in range(40)), {"digits", "function_words"}),
    ("navigation", "首页\n新闻\n体育\n财经\n科技\n娱乐\n汽车\n房产\n教育\n时尚\n" * 4, {"terminal_punctuation", "function_words", "punctuation"}),
    ("a loop", "今天的天气真的很不错，我们一起去公园里玩吧。" * 12, {"repeated_sentences"}),
    ("a loop of phrases", "这款产品质量非常好并且价格便宜" * 12 + "。", {"duplicate_ngrams", "punctuation", "function_words"}),
    ("noise", "".join(random.Random(0).choices("#@%^&*~|<>=", k=300)), {"punctuation", "repeated_punctuation"}),
    ("word salad", "shoes bags watches cheap discount outlet store sale " * 12, {"function_words"}),
    ("spam", "本公司代开发票，网上赌场，点击注册，时时彩，私服发布。" + ZH[0], {"keywords"}),
    ("a script", "function a() { return 1; } if (x) { y(); } else { z(); } " * 9, {"curly_brackets"}),
    ("an English loop", "Click here to read more about our great offers today. " * 12, {"function_words", "repeated_sentences"}),
    ("teasers", "\n".join(f"The {a} news of the day and what it means for you and the rest of us in {a}land..." for a in WORDS), {"ellipsis_lines"}),
]


@pytest.mark.parametrize("what, text, reasons", BAD, ids=[b[0] for b in BAD])
def test_bad_pages_are_dropped_for_a_reason_one_would_give(what, text, reasons):
    assert clean.clean_text(text, clean.read_recipe("web"))[1] in reasons


def test_code_is_not_judged_as_prose():
    """A function of Python and one of C pass the filters for prose, with all their braces and blanks; repeated code does not."""
    python = "def area(r):\n    \"\"\"Area of a circle.\"\"\"\n    if r < 0:\n        raise ValueError(r)\n    return 3.14159 * r ** 2\n\n\n" \
             "for r in range(10):\n    print(area(r))\n    total = 0\n    total += area(r)\n"
    c = "int main(void) {\n    int a[10];\n    for (int i = 0; i < 10; i++) {\n        a[i] = i * i;\n    }\n    return a[1];\n}\n" + "static int x;\n"
    for text in (python, c):
        assert Doc(text).code and clean.clean_text(text)[:2] == (text.strip(), None)
    assert not any(Doc(text).code for text in EN + ZH + VERSE)
    assert clean.clean_text(c * 30)[1] in ("duplicate_lines", "duplicate_ngrams", "repeated_sentences")
