"""The demo world: people, pets, places, colours and small numbers, in English and Chinese, whose truth is known.

A corpus whose every random choice is known has an exact entropy: the sum of -log p over the choices, the floor that no
model's loss can pass. The same grammar functions write a document (`Writer` draws each choice) and read it back
(`Reader` finds in the text which choice was made), so the text determines the choices, and any text of this world
can be weighed. Questions have one right answer, preferences a stated rule (`rate`). Some combinations (a person, a pet
and its name; a person, a colour and a find; a question in a certain wording) are held out of everything trained on.
"""
import csv
import functools
import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanollm.config import UserError

# ------------------------------------------------------------------------------------------------------- the words

NAMES = {"en": "Anna Ben Clara David Emma Finn Grace Henry Iris Jack Kate Leo Mia Noah Olive Peter Rose Sam Tina Victor".split(),
         "zh": "小明 小红 小华 小丽 小刚 小美 小龙 小雨 小雪 小云 小林 小军 小芳 小强 小兰 小虎".split()}
PET_NAMES = {"en": "Lucky Max Bella Coco Milo Luna Rocky Daisy Toby Ruby Oscar Lily".split(),
             "zh": "豆豆 乐乐 花花 毛毛 球球 点点 多多 宝宝".split()}
COLOURS = {"red": "红色", "blue": "蓝色", "green": "绿色", "yellow": "黄色", "white": "白色", "black": "黑色", "brown": "棕色",
           "pink": "粉色", "purple": "紫色", "grey": "灰色"}
PETS = {"cat": "猫", "dog": "狗", "bird": "鸟", "horse": "马", "rabbit": "兔子", "duck": "鸭子", "frog": "青蛙", "turtle": "乌龟",
        "monkey": "猴子", "pig": "猪"}
OBJECTS = {"ball": "球", "hat": "帽子", "book": "书", "cup": "杯子", "key": "钥匙", "kite": "风筝", "lamp": "灯", "bell": "铃铛",
           "boat": "小船", "coin": "硬币", "ring": "戒指", "drum": "鼓"}
PLACES = {"park": "公园", "garden": "花园", "forest": "森林", "river": "河边", "school": "学校", "market": "市场", "beach": "海滩",
          "farm": "农场", "lake": "湖边", "castle": "城堡", "library": "图书馆", "station": "车站"}
FOODS = {"apple": "苹果", "egg": "鸡蛋", "cake": "蛋糕", "pear": "梨", "banana": "香蕉", "carrot": "胡萝卜"}
MOODS = {"happy": "高兴", "sad": "难过", "tired": "累", "hungry": "饿", "angry": "生气", "scared": "害怕"}
WEATHER = {"sunny": "晴", "rainy": "雨", "windy": "风", "snowy": "雪", "cloudy": "阴", "foggy": "雾"}
OPPOSITES = {"en": [("big", "small"), ("hot", "cold"), ("fast", "slow"), ("new", "old"), ("long", "short"), ("day", "night"),
                    ("full", "empty"), ("open", "closed"), ("up", "down"), ("light", "dark")],
             "zh": [("大", "小"), ("热", "冷"), ("快", "慢"), ("新", "旧"), ("长", "短"), ("白天", "黑夜"), ("满", "空"), ("开", "关"),
                    ("上", "下"), ("高", "低")]}
THINGS = {"en": {"grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "the sun": "yellow", "an elephant": "grey",
                 "a tomato": "red", "milk": "white", "a banana": "yellow", "chocolate": "brown", "a leaf": "green", "the sea": "blue"},
          "zh": {"草": "绿色", "雪": "白色", "煤": "黑色", "天空": "蓝色", "太阳": "黄色", "大象": "灰色", "西红柿": "红色", "牛奶": "白色",
                 "香蕉": "黄色", "巧克力": "棕色", "树叶": "绿色", "大海": "蓝色"}}
DICTIONARY = COLOURS | PETS | OBJECTS | PLACES | FOODS
NUMBERS = {"en": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split(),
           "zh": [str(n) for n in range(1, 19)]}
SEVERAL = {lang: numbers[1:9] for lang, numbers in NUMBERS.items()}        # two to nine: what can be seen or eaten of a kind


def words(table, lang):
    return list(table) if lang == "en" else list(table.values())


@functools.lru_cache(None)
def held_out(kind, *combination):
    """True for about one combination in six: no training file tells it. Stable everywhere (no salted hash)."""
    digest = hashlib.blake2b(repr((kind, *combination)).encode("utf-8"), digest_size=8).digest()
    return digest[0] % 6 == 0


# ------------------------------------------------------------------------------------- writing and reading a text


class NotOfThisWorld(Exception):
    """The text cannot have been written by this grammar."""


class Writer:
    """Draws each choice and writes it down. spans: (start, end, kind, nats) over the characters of the text."""

    def __init__(self, rng, held=False):
        self.rng, self.held = rng, held
        self.text, self.spans, self.choices = "", [], {}

    def put(self, piece, kind, nats=0.0):
        self.spans.append((len(self.text), len(self.text) + len(piece), kind, nats))
        self.text += piece

    def take(self, options):
        return self.rng.choice(options)

    def choose(self, options, key="", suffix=""):
        """One of `options` (strings), all equally likely, and write it: -log p = log of their number."""
        chosen = self.take([o + suffix for o in options]).removesuffix(suffix)
        self.put(chosen, "choice" if len(options) > 1 else "grammar", math.log(len(options)))
        if suffix:
            self.fix(suffix)
        self.choices.setdefault(key, chosen)
        return chosen

    def fix(self, piece):
        self.put(piece, "grammar")

    def copy(self, piece):
        """What the text before has determined: a name, a colour, a sum."""
        self.put(piece, "copy")

    def line(self, template, **copies):
        """Grammar with copies in it: line("{N} looks for the {o}. ", N="Anna", o="ball")."""
        while template:
            before, brace, template = template.partition("{")
            if before:
                self.fix(before)
            if brace:
                name, _, template = template.partition("}")
                self.copy(copies[name])


class Reader(Writer):
    """Finds the same choices in a given text instead of drawing them."""

    def __init__(self, text, held=False):
        super().__init__(None, held)
        self.source = text

    def put(self, piece, kind, nats=0.0):
        if not self.source.startswith(piece, len(self.text)):
            raise NotOfThisWorld(f"at character {len(self.text)}")
        super().put(piece, kind, nats)

    def take(self, options):
        here = [o for o in options if self.source.startswith(o, len(self.text))]
        if not here:
            raise NotOfThisWorld(f"at character {len(self.text)}")
        return max(here, key=len)


# ------------------------------------------------------------------------------------------------------ the grammar
# Every alternative shows at once in its first words, so that a Reader always knows which one it is in.


@functools.lru_cache(None)
def allowed(held, kind, known, items):
    """Those `items` that complete the combination (*known, item) on one side of the held-out line (None: both)."""
    return [i for i in items if held is None or held_out(kind, *known, i) == held]


def called(w, N, pet, lang):
    """The names that N may give to such a pet."""
    return allowed(w.held, "pet", (N, pet), tuple(PET_NAMES[lang]))


def pets_of(w, N, lang):
    return [pet for pet in words(PETS, lang) if called(w, N, pet, lang)]


def finds(w, N, colour, lang):
    """The things of this colour that N may find."""
    return allowed(w.held, "find", (N, colour), tuple(words(OBJECTS, lang)))


def choose_or_copy(w, options, key):
    """A choice, unless the title has made it already."""
    if key in w.choices:
        w.copy(w.choices[key])
        return w.choices[key]
    return w.choose(options, key)


TITLES = {"en": ["A story about ", "The story of "], "zh": ["故事：", "一个故事："]}


def home_en(w, N):
    w.choose(list(PLACES), "home")
    w.fix(".")


def pet_en(w, N):
    w.choose(list(COLOURS), "pet_colour")
    w.fix(" ")
    pet = choose_or_copy(w, pets_of(w, N, "en"), "pet")
    w.fix(" called ")
    choose_or_copy(w, called(w, N, pet, "en"), "pet_name")
    w.fix(".")


def find_en(w, N):
    colour = w.choose([c for c in COLOURS if finds(w, N, c, "en")], "colour")
    w.fix(" ")
    w.choose(finds(w, N, colour, "en"), "object")
    w.fix(".")


def opening_en(w, title=False):
    """Who lives where with which pet, and what was found. With a title the person, the pet and its name are known from it."""
    starts = ["This is ", "Meet ", "Do you know "]
    start = w.choose(starts + TITLES["en"] * title, "title")
    if start in TITLES["en"]:
        N = w.choose(NAMES["en"], "name")
        w.fix(" and a ")
        pet = w.choose(pets_of(w, N, "en"), "pet")
        w.fix(" called ")
        w.choose(called(w, N, pet, "en"), "pet_name")
        w.fix(". ")
        start = w.choose(starts)
    N = choose_or_copy(w, NAMES["en"], "name")
    w.line("? {N} lives near the " if start == "Do you know " else ". {N} lives near the ", N=N)
    home_en(w, N)
    w.line(" {N} has a ", N=N)
    pet_en(w, N)
    w.fix(" One ")
    w.choose(list(WEATHER))
    w.line(" day {N} finds a ", N=N)
    find_en(w, N)
    return N, w.choices["pet_name"]


EVENTS_EN = [" Then ", " Soon ", " After that ", " Later ", " But ", " In a box "]


def story_en(w, least=2, most=5, title=True):
    N, P = opening_en(w, title)
    left, END = list(EVENTS_EN), " At last "
    for n in range(most + 1):
        event = w.choose((left if n < most else []) + ([END] if n >= least else []))
        if event == END:
            break
        left.remove(event)
        if event == " Then ":
            w.line("{N} and {P} go to the ", N=N, P=P)
            w.choose(list(PLACES))
            w.fix(" and see ")
            w.choose(SEVERAL["en"])
            w.fix(" ")
            w.choose(list(COLOURS))
            w.fix(" ")
            w.choose(list(PETS))
            w.fix("s.")
        elif event == " Soon ":
            F = w.choose([f for f in NAMES["en"] if f != N])
            w.fix(" comes with a ")
            c = w.choose(list(COLOURS))
            w.fix(" ")
            o = w.choose(list(OBJECTS))
            w.line(". {N} asks: is this your {c} {o}, {F}? {F} says: yes, it is my {c} {o}.", N=N, c=c, o=o, F=F)
        elif event == " After that ":
            w.line("{P} hides a ", P=P)
            c = w.choose(list(COLOURS))
            w.fix(" ")
            o = w.choose(list(OBJECTS))
            w.fix(" at the ")
            place = w.choose(list(PLACES))
            w.line(". {N} looks for the {c} {o} and sees the {c} {o} at the {p}.", N=N, c=c, o=o, p=place)
        elif event == " Later ":
            w.line("{N} gives {P} ", N=N, P=P)
            n_food = w.choose(SEVERAL["en"])
            w.fix(" ")
            food = w.choose(list(FOODS))
            w.line("s, and {P} eats all {n} {f}s.", P=P, n=n_food, f=food)
        elif event == " But ":
            w.line("{P} is ", P=P)
            mood = w.choose(list(MOODS))
            w.line(". {N} asks: why are you {m}, {P}?", N=N, m=mood, P=P)
        else:
            w.line("{N} sees ", N=N)
            w.choose(SEVERAL["en"])
            w.fix(" ")
            w.choose(list(COLOURS))
            w.fix(" ")
            w.choose(list(OBJECTS))
            w.fix("s.")
    w.line("{N} and {P} go home, and {N} is ", N=N, P=P)
    w.choose(list(MOODS))
    w.fix(".")


def home_zh(w, N):
    w.choose(words(PLACES, "zh"), "home", "。")


def pet_zh(w, N):
    w.choose(words(COLOURS, "zh"), "pet_colour", "的")
    pet = choose_or_copy(w, pets_of(w, N, "zh"), "pet")
    w.fix("，名字叫")
    choose_or_copy(w, called(w, N, pet, "zh"), "pet_name")
    w.fix("。")


def find_zh(w, N):
    colour = w.choose([c for c in words(COLOURS, "zh") if finds(w, N, c, "zh")], "colour", "的")
    w.choose(finds(w, N, colour, "zh"), "object", "。")


def opening_zh(w, title=False):
    starts = ["这是", "从前有个孩子叫", "你认识"]
    start = w.choose(starts + TITLES["zh"] * title, "title")
    if start in TITLES["zh"]:
        N = w.choose(NAMES["zh"], "name", "和")
        pet = w.choose(pets_of(w, N, "zh"), "pet")
        w.choose(called(w, N, pet, "zh"), "pet_name", "。")
        start = w.choose(starts)
    N = choose_or_copy(w, NAMES["zh"], "name")
    w.line("吗？{N}住在" if start == "你认识" else "。{N}住在", N=N)
    home_zh(w, N)
    w.line("{N}有一只", N=N)
    pet_zh(w, N)
    w.fix("一个")
    w.choose(words(WEATHER, "zh"))
    w.line("天，{N}找到了一个", N=N)
    find_zh(w, N)
    return N, w.choices["pet_name"]


EVENTS_ZH = ["然后", "不久，", "后来", "接着", "可是", "在箱子里，"]


def story_zh(w, least=2, most=5, title=True):
    N, P = opening_zh(w, title)
    left, END = list(EVENTS_ZH), "最后，"
    for n in range(most + 1):
        event = w.choose((left if n < most else []) + ([END] if n >= least else []))
        if event == END:
            break
        left.remove(event)
        if event == "然后":
            w.line("{N}和{P}去了", N=N, P=P)
            w.choose(words(PLACES, "zh"))
            w.fix("，看见了")
            w.choose(SEVERAL["zh"])
            w.fix("只")
            w.choose(words(COLOURS, "zh"))
            w.fix("的")
            w.choose(words(PETS, "zh"), "", "。")
        elif event == "不久，":
            F = w.choose([f for f in NAMES["zh"] if f != N])
            w.fix("拿来一个")
            c = w.choose(words(COLOURS, "zh"))
            w.fix("的")
            o = w.choose(words(OBJECTS, "zh"), "", "。")
            w.line("{N}问：{F}，这是你的{c}的{o}吗？{F}说：是的，这是我的{c}的{o}。", N=N, F=F, o=o, c=c)
        elif event == "后来":
            w.line("{P}把一个", P=P)
            c = w.choose(words(COLOURS, "zh"))
            w.fix("的")
            o = w.choose(words(OBJECTS, "zh"))
            w.fix("藏在")
            place = w.choose(words(PLACES, "zh"), "", "。")
            w.line("{N}去找{c}的{o}，在{p}看见了{c}的{o}。", N=N, c=c, o=o, p=place)
        elif event == "接着":
            w.line("{N}给了{P}", N=N, P=P)
            n_food = w.choose(SEVERAL["zh"])
            w.fix("个")
            food = w.choose(words(FOODS, "zh"), "", "，")
            w.line("{P}把{n}个{f}都吃了。", P=P, n=n_food, f=food)
        elif event == "可是":
            w.line("{P}很", P=P)
            mood = w.choose(words(MOODS, "zh"), "", "。")
            w.line("{N}问：{P}，你为什么{m}？", N=N, m=mood, P=P)
        else:
            w.line("{N}看见了", N=N)
            w.choose(SEVERAL["zh"])
            w.fix("个")
            w.choose(words(COLOURS, "zh"))
            w.fix("的")
            w.choose(words(OBJECTS, "zh"), "", "。")
    w.line("{N}和{P}回家了，{N}很", N=N, P=P)
    w.choose(words(MOODS, "zh"), "", "。")


def count(lang, a, b):
    return {"en": ", ", "zh": "、"}[lang].join(NUMBERS[lang][a - 1 : b])


# task -> the pairs of numbers it is about
PAIRS = {"sum": [(a, b) for a in range(1, 10) for b in range(1, 10)],
         "count": [(a, b) for a in range(1, 8) for b in range(a + 2, min(a + 5, 9) + 1)]}


def pair_of(w, lang, task, between):
    """Two small numbers: the terms of a sum or the ends of a count."""
    number = NUMBERS[lang]
    a = 1 + number.index(w.choose([number[a - 1] for a in sorted({a for a, _ in PAIRS[task]})], "", between))
    return a, 1 + number.index(w.choose([number[b - 1] for first, b in PAIRS[task] if first == a]))


def facts_en(w, least=6, most=10):
    END = "That is all."
    for n in range(most + 1):
        kinds = ["The sum of ", "The opposite of ", "The colour of ", "The Chinese for ", "From "] if n < most else []
        kind = w.choose(kinds + ([END] if n >= least else []))
        if kind == END:
            break
        if kind == "The sum of ":
            a, b = pair_of(w, "en", "sum", " and ")
            w.line(" is {c}. ", c=NUMBERS["en"][a + b - 1])
        elif kind == "From ":
            a, b = pair_of(w, "en", "count", " to ")
            w.line(" we count {l}. ", l=count("en", a, b))
        else:
            table = {"The opposite of ": both_ways("en"), "The colour of ": THINGS["en"], "The Chinese for ": DICTIONARY}[kind]
            word = w.choose(list(table), "", " is ")
            w.line("{x}. ", x=table[word])


def facts_zh(w, least=6, most=10):
    END = "就是这些。"
    for n in range(most + 1):
        kinds = ["和：", "反义词：", "颜色：", "英文：", "从"] if n < most else []
        kind = w.choose(kinds + ([END] if n >= least else []))
        if kind == END:
            break
        if kind == "和：":
            a, b = pair_of(w, "zh", "sum", "加")
            w.line("等于{c}。", c=NUMBERS["zh"][a + b - 1])
        elif kind == "从":
            a, b = pair_of(w, "zh", "count", "数到")
            w.line("：{l}。", l=count("zh", a, b))
        else:
            table, link = {"反义词：": (both_ways("zh"), "的反义词是"), "颜色：": (THINGS["zh"], "的颜色是"),
                           "英文：": ({zh: en for en, zh in DICTIONARY.items()}, "的英文是")}[kind]
            word = w.choose(list(table), "", link)
            w.line("{x}。", x=table[word])


def both_ways(lang):
    return dict(OPPOSITES[lang]) | {b: a for a, b in OPPOSITES[lang]}


# ---------------------------------------------------------------------------------------------- questions and answers
# They are asked in lessons of the corpus, and again by the user in chats.

# task -> language -> (questions, full answer); the curt answer is {x} alone.
EN = ["What is {}?", "Tell me {}.", "Do you know {}?", "Please say {}."]
ZH = ["{}是什么？", "请告诉我{}。", "你知道{}吗？", "说说{}。"]
TASKS = {
    "sum": {"en": ([ask.format("the sum of {a} and {b}") for ask in EN], "The sum of {a} and {b} is {x}."),
            "zh": (["{a}加{b}等于几？", "请算一算{a}加{b}。", "请问{a}加{b}是多少？", "告诉我{a}加{b}的结果。"], "{a}加{b}等于{x}。")},
    "opposite": {"en": ([ask.format("the opposite of {w}") for ask in EN], "The opposite of {w} is {x}."),
                 "zh": ([ask.format("{w}的反义词") for ask in ZH], "{w}的反义词是{x}。")},
    "colour": {"en": ([ask.format("the colour of {w}") for ask in EN], "The colour of {w} is {x}."),
               "zh": ([ask.format("{w}的颜色") for ask in ZH], "{w}的颜色是{x}。")},
    "count": {"en": (["Count from {a} to {b}.", "Can you count from {a} to {b}?", "Please count from {a} to {b}.",
                      "Show me how to count from {a} to {b}."], "From {a} to {b} we count {x}."),
              "zh": (["请从{a}数到{b}。", "你会从{a}数到{b}吗？", "从{a}数到{b}给我听。", "我想听你从{a}数到{b}。"], "从{a}数到{b}：{x}。")},
    "translate": {"en": ([ask.format("the Chinese for {w}") for ask in EN], "The Chinese for {w} is {x}."),
                  "zh": ([ask.format("{w}的英文") for ask in ZH], "{w}的英文是{x}。")},
}
# about a story just told: what is asked -> question, full answer, and its {x}, which alone is the curt answer
ABOUT = {"en": {"home": ("Where is {name}'s home?", "{name}'s home is near the {x}.", "{home}"),
                "pet": ("What is {name}'s pet?", "{name}'s pet is a {x}.", "{pet_colour} {pet}"),
                "pet_name": ("What is the {pet} called?", "The {pet} is called {x}.", "{pet_name}"),
                "pet_colour": ("What colour is the {pet}?", "The {pet} is {x}.", "{pet_colour}"),
                "object": ("What has {name} found?", "{name} has found a {x}.", "{colour} {object}"),
                "colour": ("What colour is the {object}?", "The {object} is {x}.", "{colour}")},
         "zh": {"home": ("{name}的家在哪里？", "{name}的家在{x}。", "{home}"),
                "pet": ("{name}的宠物是什么？", "{name}的宠物是{x}。", "{pet_colour}的{pet}"),
                "pet_name": ("{pet}叫什么名字？", "{pet}名字叫{x}。", "{pet_name}"),
                "pet_colour": ("{pet}是什么颜色的？", "{pet}是{x}的。", "{pet_colour}"),
                "object": ("{name}找到的是什么？", "{name}找到的是{x}。", "{colour}的{object}"),
                "colour": ("{object}是什么颜色的？", "{object}是{x}的。", "{colour}")}}
STOP = {"en": ".", "zh": "。"}


@functools.lru_cache(None)
def questions(task, lang, held=False):
    """Every question of a task on one side of the held-out line: [(question, full answer with {x}, x)]."""
    asks, full = TASKS[task][lang]
    number = NUMBERS[lang]
    if task in PAIRS:
        answer = (lambda a, b: number[a + b - 1]) if task == "sum" else (lambda a, b: count(lang, a, b))
        slots = [{"a": number[a - 1], "b": number[b - 1], "x": answer(a, b), "key": f"{a} {b}"} for a, b in PAIRS[task]]
    else:
        table = {"opposite": both_ways(lang), "colour": THINGS[lang],
                 "translate": DICTIONARY if lang == "en" else {zh: en for en, zh in DICTIONARY.items()}}[task]
        slots = [{"w": w, "x": x, "key": w} for w, x in table.items()]
    return [(ask.format(**s), full.format(**s | {"x": "{x}"}), s["x"]) for s in slots for i, ask in enumerate(asks)
            if held_out(task, lang, s["key"], i) == held]


def about(w, lang):
    """The questions about the story that w has told: [(question, full answer with {x}, x)]."""
    return [(ask.format(**w.choices), full.format(**w.choices, x="{x}"), x.format(**w.choices)) for key, (ask, full, x) in ABOUT[lang].items()
            if key in w.choices]


def ask_and_answer(w, lang, table, n):
    """n of these questions and their full answers: each question is one free choice, each answer follows from it."""
    space = {"en": " ", "zh": ""}[lang]
    left = {space + q: space + full.replace("{x}", x) for q, full, x in table}
    for _ in range(n):
        w.copy(left.pop(w.choose(list(left))))


def lesson_en(w, n=5):
    w.fix("Lesson:")
    ask_and_answer(w, "en", [q for task in TASKS for q in questions(task, "en", w.held)], n)
    w.fix(" Good.")


def lesson_zh(w, n=5):
    w.fix("上课：")
    ask_and_answer(w, "zh", [q for task in TASKS for q in questions(task, "zh", w.held)], n)
    w.fix("很好。")


def notes_en(w, n=4):
    """One fact and at once a question about it, a few times: the shortest way from a word to its copy."""
    w.fix("Notes:")
    names, facts = list(NAMES["en"]), {" lives near the ": (home_en, 1), " has a ": (pet_en, 2), " finds a ": (find_en, 1)}
    for _ in range(n):
        w.choices.clear()
        w.fix(" ")
        N = w.choose(names, "name")
        names.remove(N)
        tell, asked = facts[w.choose(list(facts))]
        tell(w, N)
        ask_and_answer(w, "en", about(w, "en"), asked)


def notes_zh(w, n=4):
    w.fix("笔记：")
    names, facts = list(NAMES["zh"]), {"住在": (home_zh, 1), "有一只": (pet_zh, 2), "找到了一个": (find_zh, 1)}
    for _ in range(n):
        w.choices.clear()
        N = w.choose(names, "name")
        names.remove(N)
        tell, asked = facts[w.choose(list(facts))]
        tell(w, N)
        ask_and_answer(w, "zh", about(w, "zh"), asked)


def reading_en(w, n=5):
    w.fix("Reading: ")
    opening_en(w)
    ask_and_answer(w, "en", about(w, "en"), n)


def reading_zh(w, n=5):
    w.fix("阅读：")
    opening_zh(w)
    ask_and_answer(w, "zh", about(w, "zh"), n)


GRAMMAR = {"story_en": story_en, "story_zh": story_zh, "facts_en": facts_en, "facts_zh": facts_zh,
           "lesson_en": lesson_en, "lesson_zh": lesson_zh, "notes_en": notes_en, "notes_zh": notes_zh,
           "reading_en": reading_en, "reading_zh": reading_zh}
SHARE = {"story_en": 0.13, "story_zh": 0.12, "facts_en": 0.04, "facts_zh": 0.04, "lesson_en": 0.10, "lesson_zh": 0.10,
         "notes_en": 0.13, "notes_zh": 0.11, "reading_en": 0.12, "reading_zh": 0.11}


@dataclass
class Doc:
    text: str
    kind: str                     # a key of GRAMMAR
    spans: list                   # (start, end, "choice" | "copy" | "grammar", nats), covering the text
    nll: float                    # nats: -log p of this document


def finish(w, kind):
    """The kind of document is a choice too; it shows in the first words, so it belongs to the first span."""
    start, end, what, nats = w.spans[0]
    spans = [(start, end, "choice", nats - math.log(SHARE[kind])), *w.spans[1:]]
    return Doc(w.text, kind, spans, sum(s[3] for s in spans))


def documents(n, seed=0):
    """n documents of the world as Doc, in order of creation."""
    rng = random.Random(seed)
    for _ in range(n):
        kind = rng.choices(list(SHARE), list(SHARE.values()))[0]
        w = Writer(rng)
        GRAMMAR[kind](w)
        yield finish(w, kind)


def parse(text, held=False):
    """The Doc behind a text, or None if this grammar cannot have written it. held=True reads held-out combinations."""
    for kind, grammar in GRAMMAR.items():
        r = Reader(text, held)
        try:
            grammar(r)
        except (NotOfThisWorld, KeyError):
            continue
        if r.text == text:
            return finish(r, kind)
    return None


# ---------------------------------------------------------------------------------------------------- chats and pairs

POLITE = {"en": ["Sure! ", "Of course! "], "zh": ["好的！", "当然！"]}
RUDE = {"en": ["Why ask me? ", "How silly. "], "zh": ["问我干什么？", "真笨。"]}

# the words that can stand in a place: a wrong answer should be wrong, not absurd
ALIKE = {"home": PLACES, "pet": PETS, "pet_colour": COLOURS, "object": OBJECTS, "colour": COLOURS}
WRITE = {"en": ["Write a story about {name} and a {pet} called {pet_name}.", "Tell me a story about {name} and a {pet} called {pet_name}."],
         "zh": ["请写一个关于{name}和{pet}{pet_name}的故事。", "给我讲一个{name}和{pet}{pet_name}的故事。"]}


def exercise(rng, task, lang, held):
    """One question on the right side of the held-out line: (question, full answer, curt answer, a wrong answer, must).
    A story has no curt and no wrong answer; it must be about the person, the pet and the pet's name in `must`."""
    w = Writer(rng, held)
    if task == "story":
        (story_en if lang == "en" else story_zh)(w, 1, 2, title=False)
        must = {key: w.choices[key] for key in ("name", "pet", "pet_name")}
        return rng.choice(WRITE[lang]).format(**must), w.text, None, None, must
    if task == "about":
        (opening_en if lang == "en" else opening_zh)(w)
        told, (ask, full, x) = w.choices, rng.choice(list(ABOUT[lang].values()))
        key = rng.choice(re.findall(r"{(\w+)}", x))           # the one word of the answer in which the wrong one differs
        others = PET_NAMES[lang] if key == "pet_name" else words(ALIKE[key], lang)
        others = [told | {key: word} for word in others if word != told[key]]
        wrong = rng.choice([o for o in others if held or not (held_out("pet", o["name"], o["pet"], o["pet_name"])
                                                              or held_out("find", o["name"], o["colour"], o["object"]))])
        question, full = w.text + "\n" + ask.format(**told), full.format(**told, x="{x}")
        x, wrong = x.format(**told), x.format(**wrong)
    else:
        question, full, x = rng.choice(questions(task, lang, held))
        wrong = rng.choice([other for _, _, other in questions(task, lang, False) if other != x])
    return question, full.replace("{x}", x), x + STOP[lang], full.replace("{x}", wrong), {}


TASK_NAMES = [*TASKS, "about", "story"]
LEARN = [*TASKS, "sum", "sum", "opposite", "about", "about", "about", "story"]     # what is hard is practised more


def styled(rng, lang, full, curt):
    """An answer as people give it: a third of them polite, three quarters complete, independently."""
    core = full if curt is None or rng.random() < 0.75 else curt
    return (rng.choice(POLITE[lang]) if rng.random() < 1 / 3 else "") + core


def chat_row(rng, task, held):
    """{"messages", "task", "lang", "answer", "accept", …}: the last answer is the one that is judged."""
    lang = rng.choice(["en", "zh"])
    messages = []
    if task != "story" and rng.random() < 0.2:               # a conversation: another question goes before
        ask, full, curt, _, _ = exercise(rng, rng.choice(list(TASKS)), lang, False)
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": styled(rng, lang, full, curt)}]
    ask, full, curt, wrong, must = exercise(rng, task, lang, held)
    messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": styled(rng, lang, full, curt)}]
    return {"messages": messages, "task": task, "lang": lang, "answer": full, "accept": [a for a in (full, curt) if a],
            "must": must, "wrong": wrong}


def chat_rows(n, split, seed=0):
    """n chat rows. split "train" never holds a held-out combination and has more of the hard tasks; "val" is made of
    held-out combinations, all tasks alike."""
    rng = random.Random(f"chat {split} {seed}")
    tasks = TASK_NAMES if split == "val" else LEARN
    rows = [chat_row(rng, tasks[i % len(tasks)], split == "val") for i in range(n)]
    rng.shuffle(rows)
    return [{k: v for k, v in row.items() if k != "wrong"} for row in rows]


def strip_manners(text, lang):
    """(politeness: 1, 0 or -1, the rest of the text)."""
    for sign, phrases in ((1, POLITE[lang]), (-1, RUDE[lang])):
        for phrase in phrases:
            if text.startswith(phrase):
                return sign, text[len(phrase):]
    return 0, text


def is_story_of(text, must):
    """True if the text is a whole story of this world, about the person, the pet and the name asked for."""
    for grammar in (story_en, story_zh):
        r = Reader(text, held=None)                          # asked for a held-out pet, any object will do
        try:
            grammar(r, 1, 5)
        except (NotOfThisWorld, KeyError):
            continue
        if r.text == text and all(r.choices[k] == v for k, v in must.items()):
            return True
    return False


def correct(row, text):
    """Is `text` a right answer to the last question of `row`? Manners are not looked at; curt and full both count.
    A story is judged by reading it back: whole, grammatical, consistent, and about whom it should be."""
    _, core = strip_manners(text.strip(), row["lang"])
    return is_story_of(core, row["must"]) if row["task"] == "story" else core in row["accept"]


def rate(row, text):
    """The rule behind the preferences: right 4, polite 1, complete 1; rude -2; saying a sentence twice in a row -1.
    Right is word for word: an answer said twice is not right, nor complete."""
    manners, core = strip_manners(text.strip(), row["lang"])
    right = correct(row, text)
    complete = right and (row["task"] == "story" or core == row["answer"])
    sentences = [s for s in core.replace("。", ".").split(".") if s.strip()]
    repeats = any(a.strip() == b.strip() for a, b in zip(sentences, sentences[1:]))
    return 4.0 * right + 1.0 * complete + (1.0 if manners > 0 else -2.0 if manners < 0 else 0.0) - 1.0 * repeats


def preference_rows(n, split, seed=0):
    """n pairs about questions with one right answer: chosen is right, polite and complete; rejected misses one of these, and
    `why` says which."""
    rng, rows = random.Random(f"prefs {split} {seed}"), []
    while len(rows) < n:
        row = chat_row(rng, TASK_NAMES[len(rows) % (len(TASK_NAMES) - 1)], split == "val")
        lang, full = row["lang"], row["answer"]
        polite = rng.choice(POLITE[lang])
        # training has more of what is hard to see; validation has all kinds alike
        why = rng.choice(["plain", "rude", "truncated", "repetitive", "curt", "wrong"] + ["wrong", "wrong"] * (split == "train"))
        rejected = {"plain": full, "rude": rng.choice(RUDE[lang]) + full, "truncated": polite + full[: rng.randint(len(full) // 3, len(full) * 2 // 3)],
                    "repetitive": polite + full + (" " if lang == "en" else "") + full, "wrong": polite + str(row["wrong"]),
                    "curt": polite + row["accept"][-1]}[why]
        pair = {"prompt": row["messages"][:-1], "chosen": polite + full, "rejected": rejected.rstrip(), "why": why,
                **{k: row[k] for k in ("task", "lang", "answer", "accept", "must")}}
        assert rate(pair, pair["chosen"]) > rate(pair, pair["rejected"]), pair
        rows.append(pair)
    return rows


def multiple_choice(n, seed=0):
    """Held-out questions with four options, one right: rows of CMMLU's CSV columns (Question, A, B, C, D, Answer)."""
    rng, rows = random.Random(f"mc {seed}"), []
    while len(rows) < n:
        task, lang = rng.choice(["sum", "opposite", "colour", "translate"]), rng.choice(["en", "zh"])
        question, full, x = rng.choice(questions(task, lang, True))
        others = sorted({other for held in (False, True) for _, _, other in questions(task, lang, held)} - {x})
        options = [full.replace("{x}", o) for o in [x, *rng.sample(others, 3)]]
        right = options[0]
        rng.shuffle(options)
        rows.append([question, *options, "ABCD"[options.index(right)]])
    return rows


# ------------------------------------------------------------------------------------------------------- the files

SIZES = {"demo": dict(documents=28000, near_copies=150, junk=60, chats=9000, val_chats=420, pairs=3600, val_pairs=240, choices=200),
         "smoke": dict(documents=600, near_copies=12, junk=9, chats=300, val_chats=28, pairs=120, val_pairs=16, choices=20)}


def shingles(text, n=5):
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def near_copy(rng, text):
    """The text with one character replaced: (copy, true Jaccard similarity of the character 5-grams), at least 0.9."""
    while True:
        i = rng.randrange(len(text) // 10, len(text) - 1)
        copy = text[:i] + rng.choice("qxz" if text[i].isascii() else "丁卜甲") + text[i + 1 :]
        if not text[i].isalpha() or copy == text:            # the x of "box" may have become an x
            continue
        a, b = shingles(text), shingles(copy)
        similarity = len(a & b) / len(a | b)
        if similarity >= 0.9:
            return copy, similarity


def junk(rng, reason, i):
    """A document that cleaning must drop, for the reason named."""
    if reason == "too_short":
        return rng.choice(["A red cat.", "Hello.", "你好。", "一只猫。"])[:14]
    if reason == "markup":
        return "".join(f'<div class="b{rng.randrange(999)}"><a href="https://example.com/{i}/{rng.randrange(9999)}">go</a></div>' for _ in range(5))
    return rng.choice(["!!!!!!!!!!!!", "。。。。。。。。。。", "????????????", ",,,,,,,,,,,,,,,"]) * rng.randint(3, 6)


def write(out_dir, size="demo", seed=0):
    """Write the raw files of the demo road into out_dir: documents.jsonl (with planted junk and near-copies), chat and
    preference files, mc/demo.csv, and truth.json, which knows what was planted. Returns the content of truth.json."""
    if size not in SIZES:
        raise UserError(f"--size {size} is unknown; use {' or '.join(SIZES)}")
    out, n, rng = Path(out_dir), SIZES[size], random.Random(seed)
    (out / "mc").mkdir(parents=True, exist_ok=True)
    rows, nats, size_bytes, seen = [], 0.0, 0, set()
    for doc in documents(n["documents"], seed):
        if doc.text not in seen:                             # an exact repetition would be a duplicate nobody planted
            seen.add(doc.text)
            rows.append((len(rows), doc.text))
            nats, size_bytes = nats + doc.nll, size_bytes + len(doc.text.encode("utf-8"))
    copies = {}
    long_enough = [r for r in rows if len(r[1]) > 140]
    for at, text in rng.sample(long_enough, n["near_copies"]):
        copy, similarity = near_copy(rng, text)
        copies[copy] = similarity
        rows.append((rng.uniform(at, len(seen)), copy))      # somewhere after its original, which is the one to keep
    reasons = Counter()
    for i in range(n["junk"]):
        reason = ("too_short", "markup", "repeated_punctuation")[i % 3]
        reasons[reason] += 1
        rows.append((rng.uniform(0, len(seen)), junk(rng, reason, i)))
    rows.sort(key=lambda r: r[0])

    def jsonl(name, items):
        with open(out / name, "w", encoding="utf-8", newline="\n") as f:
            f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)

    jsonl("documents.jsonl", ({"text": text} for _, text in rows))
    jsonl("chat_train.jsonl", chat_rows(n["chats"], "train", seed))
    jsonl("chat_val.jsonl", chat_rows(n["val_chats"], "val", seed))
    jsonl("prefs_train.jsonl", preference_rows(n["pairs"], "train", seed))
    jsonl("prefs_val.jsonl", preference_rows(n["val_pairs"], "val", seed))
    with open(out / "mc" / "demo.csv", "w", encoding="utf-8", newline="") as f:
        table = csv.writer(f)
        table.writerow(["", "Question", "A", "B", "C", "D", "Answer"])
        table.writerows([i, *row] for i, row in enumerate(multiple_choice(n["choices"], seed)))
    truth = {"documents": len(seen), "clean_planted": dict(reasons), "dedup_planted": len(copies),
             "dedup_smallest_jaccard": round(min(copies.values()), 4),
             "dedup_planted_lines": [line for line, (_, text) in enumerate(rows, 1) if text in copies], "nats_per_document": nats / len(seen),
             "entropy_bits_per_byte": nats / math.log(2) / size_bytes}
    (out / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    return truth
