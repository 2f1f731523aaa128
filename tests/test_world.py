"""The demo world: its entropy is exact, its held-out combinations stay out, and what was planted is what is found."""
import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict

import pytest
from conftest import python
from nanollm import world
from nanollm.config import UserError
from nanollm.corpus.clean import clean_text
from nanollm.corpus.dedup import DedupConfig, deduplicate_texts
from nanollm.data import to_messages, to_preference
from nanollm.choices import read_choices

ZH = {zh: en for en, zh in world.DICTIONARY.items()}
STORY = {"en": world.story_en, "zh": world.story_zh}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def written(kind, n, held=False):
    """n documents of one kind."""
    for i in range(n):
        w = world.Writer(random.Random(f"{kind} {i}"), held)
        world.GRAMMAR[kind](w)
        yield world.finish(w, kind)


def jaccard(a, b):
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The files of the smoke road -> their folder."""
    folder = tmp_path_factory.mktemp("smoke")
    world.write(folder, "smoke")
    return folder


@pytest.fixture(scope="module")
def texts(smoke):
    return [row["text"] for row in rows_of(smoke / "documents.jsonl")]


@pytest.fixture(scope="module")
def planted(texts):
    """Positions of the near copies in the file: whole sentences that cleaning keeps and this grammar cannot have written."""
    return [i for i, text in enumerate(texts) if clean_text(text)[1] is None and world.parse(text) is None]


# ------------------------------------------------------------------------------------------------ exact entropy


@pytest.mark.parametrize("kind", world.GRAMMAR)
def test_reading_a_document_back_recovers_every_choice_and_its_probability(kind):
    """Each span (where, what kind, how many nats), so each choice, and the sum of -log p to 1e-9."""
    for doc in written(kind, 1000):
        read = world.parse(doc.text)
        assert read.kind == kind and read.spans == doc.spans and abs(read.nll - doc.nll) < 1e-9


def test_spans_cover_the_text_and_only_choices_carry_nats():
    """No gap, no overlap; copies and grammar are free of information, a choice never is."""
    for doc in world.documents(400, seed=1):
        assert [s[0] for s in doc.spans] == [0, *(s[1] for s in doc.spans[:-1])] and doc.spans[-1][1] == len(doc.text)
        assert all(end > start and (nats > 0) == (what == "choice") and what in ("choice", "copy", "grammar")
                   for start, end, what, nats in doc.spans)
        assert math.isclose(doc.nll, sum(s[3] for s in doc.spans))


class Scripted(world.Writer):
    """Takes the prescribed way through the grammar, then the first alternative each time; path: [way, number of ways]."""

    def __init__(self, script):
        super().__init__(None)
        self.script, self.path = script, []

    def take(self, options):
        i = self.script[len(self.path)] if len(self.path) < len(self.script) else 0
        self.path.append([i, len(options)])
        return options[i]


def every_document(grammar):
    """All documents that a grammar can write, as Writers, depth first."""
    path = []
    while True:
        w = Scripted([i for i, _ in path])
        grammar(w)
        yield w
        path = w.path
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1][0] += 1


@pytest.mark.parametrize("kind", world.GRAMMAR)
def test_the_probabilities_of_all_documents_sum_to_one(kind, monkeypatch):
    """Each grammar over so few words that all its documents can be written down: all different, and exp(-nats) sums to 1."""
    what, full_grammar, all_questions = kind[:-3], world.GRAMMAR[kind], world.questions
    length = {"story": (1, 1), "facts": (0, 1)}.get(what, (2,))
    if what != "facts":
        for name, n in dict(COLOURS=1, PETS=2, OBJECTS=2, PLACES=2, FOODS=1, MOODS=1, WEATHER=1, DICTIONARY=1).items():
            monkeypatch.setattr(world, name, dict(list(getattr(world, name).items())[:n]))
        monkeypatch.setattr(world, "NAMES", {lang: names[:2 if what == "story" else 3] for lang, names in world.NAMES.items()})
        monkeypatch.setattr(world, "PET_NAMES", {lang: names[:1] for lang, names in world.PET_NAMES.items()})
        monkeypatch.setattr(world, "SEVERAL", {lang: numbers[:2] for lang, numbers in world.SEVERAL.items()})
        monkeypatch.setattr(world, "TASKS", dict(list(world.TASKS.items())[1:3]))
        monkeypatch.setattr(world, "questions", lambda *key: all_questions(*key)[:8])
    seen, total = set(), []
    for i, w in enumerate(every_document(lambda w: full_grammar(w, *length))):
        seen.add(w.text)
        total.append(math.exp(-sum(s[3] for s in w.spans)))
        if i % 10 == 0:
            r = world.Reader(w.text)
            full_grammar(r, *length)
            assert r.spans == w.spans
    assert len(seen) == len(total) > 100 and math.isclose(math.fsum(total), 1, rel_tol=1e-9)
    assert what in ("lesson", "reading") or max(total) > 1.5 * min(total)     # not uniform: the sum is no mere count


def test_alternatives_are_drawn_as_often_as_their_probability_says(monkeypatch):
    """Chi-square of each set of alternatives, and of the kinds of document: deviations as chance makes them (< 4.5 sigma)."""
    drawn = defaultdict(Counter)

    class Recorder(world.Writer):
        def take(self, options):
            chosen = super().take(options)
            assert len(set(options)) == len(options)         # or one would be twice as likely as its nats say
            drawn[tuple(options)][chosen] += 1
            return chosen

    monkeypatch.setattr(world, "Writer", Recorder)
    kinds = Counter(doc.kind for doc in world.documents(2500, seed=2))
    tests = [[(kinds[k], 2500 * share) for k, share in world.SHARE.items()]]
    tests += [[(counts[o], counts.total() / len(options)) for o in options] for options, counts in drawn.items()
              if counts.total() >= 10 * len(options) and len(options) > 1]
    assert len(tests) > 50 and math.isclose(sum(world.SHARE.values()), 1)
    for cells in tests:
        chi_square, freedom = sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1
        sigmas = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))      # Wilson & Hilferty
        assert sigmas < 4.5, cells


def test_the_nats_of_a_story_equal_a_count_by_hand():
    """Independent of the grammar's code: the alternatives at each point of one story, counted from the word lists."""
    free = lambda kind, known, items: [i for i in items if not world.held_out(kind, *known, i)]
    name, pet, called, colour, thing = next(
        (n, p, m, c, o) for n in world.NAMES["en"] for p in world.PETS for m in free("pet", (n, p), world.PET_NAMES["en"])
        for c in world.COLOURS for o in free("find", (n, c), world.OBJECTS))
    text = (f"Meet {name}. {name} lives near the lake. {name} has a red {pet} called {called}. One sunny day {name} finds a {colour} {thing}. "
            f"But {called} is sad. {name} asks: why are you sad, {called}? Then {name} and {called} go to the farm and see three red cats. "
            f"At last {name} and {called} go home, and {name} is happy.")
    ways = [3 + 2, len(world.NAMES["en"]), len(world.PLACES), len(world.COLOURS), len(world.PETS), len(free("pet", (name, pet), world.PET_NAMES["en"])),
            len(world.WEATHER), len(world.COLOURS), len(free("find", (name, colour), world.OBJECTS)),
            6, len(world.MOODS), 5, len(world.PLACES), 8, len(world.COLOURS), len(world.PETS), 4 + 1, len(world.MOODS)]
    assert math.isclose(world.parse(text).nll, -math.log(world.SHARE["story_en"]) + sum(map(math.log, ways)), rel_tol=1e-12)


def test_one_word_copied_wrongly_makes_a_text_foreign():
    """Every copy of 300 documents, each replaced by another piece that is a copy somewhere else (a name, a colour, a sum)."""
    docs = list(world.documents(300, seed=3))
    copies = [(doc, s) for doc in docs for s in doc.spans if s[2] == "copy"]
    pieces, rng = sorted({doc.text[s[0] : s[1]] for doc, s in copies}), random.Random(0)
    assert len(copies) > 2000
    for doc, (start, end, _, _) in copies:
        other = rng.choice([p for p in pieces if p != doc.text[start:end]])
        assert world.parse(doc.text[:start] + other + doc.text[end:]) is None, (doc.text[start:end], other)
    colours = [(doc.text, s) for doc, s in copies if doc.text[s[0] : s[1]] in world.COLOURS]
    for text, (start, end, _, _) in colours:                 # what a model gets wrong: another colour than the one before
        assert not any(world.parse(text[:start] + c + text[end:]) for c in world.COLOURS if c != text[start:end])
    assert len(colours) > 20


def test_foreign_and_broken_texts_are_refused():
    """Cut anywhere, doubled, with a character more or a piece less, or not of this world at all: None."""
    for doc in world.documents(40, seed=4):
        rng = random.Random(doc.text)
        cuts = [doc.text[:i] for i in rng.sample(range(len(doc.text)), 15)] + [doc.text[1:]]
        less = [doc.text[:s[0]] + doc.text[s[1]:] for s in doc.spans]
        for text in [*cuts, *less, doc.text + "x", doc.text + doc.text, " " + doc.text, doc.text.swapcase() + "."]:
            assert world.parse(text) is None, text
    for text in ["", " ", "Once upon a time", "The cat sat on the mat.", "从前有座山。", "{N}", "\0", "This is Zoe. Zoe lives near the park."]:
        assert world.parse(text) is None


# ------------------------------------------------------------------------------------------ held-out combinations


NUMBER = {"en": ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
                 "eighteen").split(), "zh": [str(n) for n in range(19)]}


def all_questions():
    """{question: (the combination that `held_out` knows, the right full answer)}, from the word lists alone."""
    found = {}
    for task, languages in world.TASKS.items():
        for lang, (asks, full) in languages.items():
            comma = ", " if lang == "en" else "、"
            opposites = {a: b for pair in world.OPPOSITES[lang] for a, b in (pair, pair[::-1])}
            words = {"opposite": opposites, "colour": world.THINGS[lang], "translate": world.DICTIONARY if lang == "en" else ZH}.get(task, {})
            for i, ask in enumerate(asks):
                for w, x in words.items():
                    found[ask.format(w=w)] = (task, lang, w, i), full.format(w=w, x=x)
                number = NUMBER[lang]
                for a, b in itertools.product(range(1, 10), range(1, 10)) if not words else ():
                    x = number[a + b] if task == "sum" else comma.join(number[a : b + 1])
                    if task == "sum" or 2 <= b - a <= 5:
                        found[ask.format(a=number[a], b=number[b])] = (task, lang, f"{a} {b}", i), full.format(a=number[a], b=number[b], x=x)
    return found


QUESTIONS = all_questions()
WORDS = {lang: [w for table in (world.PLACES, world.PETS, world.COLOURS, world.OBJECTS) for w in (table if lang == "en" else table.values())]
         + world.PET_NAMES[lang] for lang in ("en", "zh")}
STATEMENTS = {"pet": (r"(\w+) has a \w+ (\w+) called (\w+)", r"(?:about|of) (\w+) and a (\w+) called (\w+)\.", r"(小.)有一只.色的(.+?)，名字叫(..)",
                      rf"(?:故事：|关于|讲一个)(小.)和({'|'.join(world.PETS.values())})(..)(?:的故事)?。"),
              "find": (r"(\w+) (?:finds|has found) a (\w+) (\w+)\.", r"(小.)找到(?:了一个|的是)(.色)的([^，。？]+?)。")}
ASKED = re.compile("|".join(map(re.escape, QUESTIONS)))


def combinations(text):
    """What a text tells, read with patterns: who calls which pet what, who finds what; and which questions it asks."""
    found = [(kind, *triple) for kind, patterns in STATEMENTS.items() for p in patterns for triple in re.findall(p, text)]
    return found + [QUESTIONS[q][0] for q in ASKED.findall(text)]


def held(text):
    return [world.held_out(*c) for c in combinations(text)]


def test_documents_hold_no_held_out_combination(smoke, texts):
    """Persons' pets and finds and the questions, of the file and of 1500 more documents; and not because none is found."""
    seen = Counter()
    for text in [t for t in texts if world.parse(t)] + [doc.text for doc in world.documents(1500, seed=5)]:     # near copies misspell words
        seen.update(c[0] for c in combinations(text))
        assert not any(held(text)), text
    assert min(seen[k] for k in ("pet", "find", *world.TASKS)) > 50
    for kind in world.GRAMMAR:                               # and the reader tells the two sides apart
        for doc in written(kind, 30, held=True):
            assert all(held(doc.text)) and bool(held(doc.text)) == (kind[:5] != "facts")       # facts are the same on both sides
            assert world.parse(doc.text, held=True).spans == doc.spans and (world.parse(doc.text) is None or not held(doc.text))


def test_about_one_combination_in_six_is_held_out():
    """Enough to test on, enough to learn from: named pets and finds of persons, wordings of questions."""
    for lang, words in (("en", list), ("zh", lambda table: list(table.values()))):
        for kind, middle, last in (("pet", words(world.PETS), world.PET_NAMES[lang]), ("find", words(world.COLOURS), words(world.OBJECTS))):
            share = [world.held_out(kind, *triple) for triple in itertools.product(world.NAMES[lang], middle, last)]
            assert 0.14 < sum(share) / len(share) < 0.19
    words = Counter(c[0] for c, _ in QUESTIONS.values() if world.held_out(*c))
    assert words.keys() == world.TASKS.keys() and min(words.values()) > 5 and 0.1 < words.total() / len(QUESTIONS) < 0.24
    asked = {c[:3] for c, _ in QUESTIONS.values()}
    assert len(asked - {c[:3] for c, _ in QUESTIONS.values() if not world.held_out(*c)}) < 0.06 * len(asked)     # of the others one form is learnt


@pytest.mark.parametrize("make", [world.chat_rows, lambda n, split: world.preference_rows(n, split)], ids=["chat", "preferences"])
def test_training_rows_hold_no_held_out_combination_and_validation_rows_are_made_of_them(make):
    """All questions, stories and right answers of the rows; a validation row's last exchange is held out in each combination."""
    for split in ("train", "val"):
        for row in make(700, split):
            messages = row["messages"] if "messages" in row else row["prompt"] + [{"role": "assistant", "content": row["chosen"]}]
            *before, question, answer = [m["content"] for m in messages]
            pieces = [question] + question.split("\n") + [world.strip_manners(answer, row["lang"])[1]]
            last = [h for piece in pieces for h in held(piece)]
            assert last and set(last) == {split == "val"}, (row["task"], question, answer)
            assert not any(h for text in before for h in held(text))


def test_rejected_answers_of_the_training_pairs_hold_no_held_out_combination():
    """A wrong answer about a story must not be what a held-out story says: DPO would unlearn it. One word of the answer is
    exchanged for another of its list; put into the story, it makes no held-out combination."""
    exchanged = Counter()
    for i in range(1500):
        row = world.chat_row(random.Random(i), "about", held=False)
        lang = row["lang"]
        facts = TOLD[lang].search(row["messages"][-2]["content"]).groupdict()
        changed = [(key, facts | {key: word}) for key in facts for word in WORDS[lang] if word != facts[key]
                   for _, full, x in world.ABOUT[lang].values() if f"{{{key}}}" in x and full.format(**facts, x=x.format(**facts)) == row["answer"]
                   and full.format(**facts, x=x.format(**(facts | {key: word}))) == row["wrong"]]
        assert len(changed) == 1, row
        (key, f), = changed
        exchanged[key] += 1
        assert not world.held_out("pet", f["name"], f["pet"], f["pet_name"]) and not world.held_out("find", f["name"], f["colour"], f["object"])
    assert exchanged.keys() == set(world.ABOUT["en"])


# --------------------------------------------------------------------------------------------- what was planted


def test_the_same_seed_writes_the_same_files_in_any_process(smoke, tmp_path):
    """Two processes with different string hashing, byte for byte; another seed gives other files."""
    code = "import sys; from nanollm import world; world.write(sys.argv[1], 'smoke', int(sys.argv[2]))"
    runs = [python(code, tmp_path / str(i), seed, env={"PYTHONHASHSEED": str(i + 1)}) for i, seed in enumerate((0, 0, 7))]
    assert [p.wait(60) for p in runs] == [0, 0, 0]
    one, two, other = (digests(tmp_path / str(i)) for i in range(3))
    assert one == two == digests(smoke) and len(one) == 7 and all(one[name] != other[name] for name in one)


def test_truth_json_equals_the_files(smoke, texts, planted):
    """Counts by reason, near copies, rows of each file, and the entropy: of the very documents, near copies left aside."""
    truth, n = json.loads((smoke / "truth.json").read_text(encoding="utf-8")), world.SIZES["smoke"]
    docs = [d for d in map(world.parse, texts) if d]
    assert len(docs) == len({d.text for d in docs}) == truth["documents"] and len(planted) == truth["dedup_planted"] == n["near_copies"]
    assert sum(truth["clean_planted"].values()) == n["junk"] and len(texts) == len(docs) + n["near_copies"] + n["junk"]
    assert math.isclose(truth["nats_per_document"], sum(d.nll for d in docs) / len(docs))
    assert math.isclose(truth["entropy_bits_per_byte"], sum(d.nll for d in docs) / math.log(2) / sum(len(d.text.encode()) for d in docs))
    for name, rows in dict(chat_train="chats", chat_val="val_chats", prefs_train="pairs", prefs_val="val_pairs").items():
        assert len(rows_of(smoke / f"{name}.jsonl")) == n[rows]
    assert len(read_choices(smoke / "mc" / "demo.csv")) == n["choices"]
    assert world.write(smoke.parent / "again", "smoke") == truth


def test_near_copies_come_after_their_original_and_are_as_similar_as_promised(texts, planted):
    """The most similar text of the file stands before the copy, with a true Jaccard similarity of at least 0.9."""
    sets = [world.shingles(t) for t in texts]
    for i in planted:
        similarity, original = max((jaccard(sets[i], s), j) for j, s in enumerate(sets) if j != i)
        assert 0.9 <= similarity < 1 and original < i and world.parse(texts[original])


def test_a_near_copy_differs_in_one_character_and_no_longer_parses():
    """Also where the character put in was there before (the x of a box); the similarity returned is the true one."""
    for n, doc in enumerate(d for d in world.documents(300, seed=6) if len(d.text) > 140):
        copy, similarity = world.near_copy(random.Random(n), doc.text)
        assert len(copy) == len(doc.text) and sum(a != b for a, b in zip(copy, doc.text)) == 1
        assert 0.9 <= similarity == jaccard(world.shingles(copy), world.shingles(doc.text)) and world.parse(copy) is None
    boxes = " ".join(f"box{i}" for i in range(60))
    assert all(world.near_copy(random.Random(i), boxes)[0] != boxes for i in range(100))


def test_no_pair_of_documents_is_similar_by_accident(texts, planted):
    """All pairs of the unplanted documents, by their true Jaccard similarity: below the threshold of 0.85."""
    sets = sorted((world.shingles(t) for t in texts if world.parse(t)), key=len)
    for i, a in enumerate(sets):
        for b in itertools.takewhile(lambda b: len(a) >= 0.85 * len(b), sets[i + 1 :]):
            both = len(a & b)
            assert both < 0.85 * (len(a) + len(b) - both)


def test_deduplication_removes_exactly_the_planted_copies(texts, planted):
    """The project's own deduplication at the threshold of the demo, after cleaning."""
    kept = [i for i, t in enumerate(texts) if world.parse(t) or i in planted]
    decisions = deduplicate_texts([texts[i] for i in kept], DedupConfig(threshold=0.85, bands=32, rows=8))
    assert [i for i, gone in zip(kept, decisions) if gone] == planted


def test_junk_is_dropped_for_exactly_the_reason_it_was_planted_for():
    """Every kind of junk, many times; and the file's counts are what cleaning reports."""
    for reason in ("too_short", "markup", "repeated_punctuation"):
        for i in range(60):
            text = world.junk(random.Random(i), reason, i)
            assert clean_text(text)[1] == reason, text


def test_cleaning_drops_as_many_as_truth_json_says(smoke, texts):
    truth = json.loads((smoke / "truth.json").read_text(encoding="utf-8"))
    assert Counter(r for r in (clean_text(t)[1] for t in texts) if r) == truth["clean_planted"]


def test_cleaning_leaves_every_document_as_it_is(texts, planted):
    """Byte for byte, near copies too: a changed document would no longer be read back."""
    for text in [d.text for d in world.documents(1000, seed=8)] + [texts[i] for i in planted]:
        assert clean_text(text)[:3] == (text, None, [])


def test_an_unknown_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="huge.*demo or smoke"):
        world.write(tmp_path / "out", "huge")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- answers and the rule


def test_words_have_one_translation_and_one_opposite():
    """Or a question would have two right answers."""
    assert len(ZH) == len(world.DICTIONARY) == sum(map(len, (world.COLOURS, world.PETS, world.OBJECTS, world.PLACES, world.FOODS)))
    for lang in ("en", "zh"):
        words = [w for pair in world.OPPOSITES[lang] for w in pair]
        assert len(set(words)) == len(words) and set(world.THINGS[lang].values()) <= {*world.COLOURS, *world.COLOURS.values()}


def test_right_answers_count_however_polite_or_short_and_wrong_ones_never():
    """Each task and language: full and curt, plain, polite and rude, with blanks around; against the wrong, the empty, a
    part, another row's answer, and two answers at once."""
    rows = [world.chat_row(random.Random(i), world.TASK_NAMES[i % 7], held=i % 2 == 1) for i in range(420)]
    assert {(r["task"], r["lang"]) for r in rows} == set(itertools.product(world.TASK_NAMES, ("en", "zh")))
    for row in rows:
        lang = row["lang"]
        assert len(row["accept"]) == (1 if row["task"] == "story" else 2)
        for answer in row["accept"]:
            assert all(world.correct(row, manners + answer + blank) for manners in ("", *world.POLITE[lang], *world.RUDE[lang]) for blank in ("", "\n"))
            assert not any(world.correct(row, manners + answer[:-1]) for manners in ("", *world.POLITE[lang]))
        assert world.correct(row, row["messages"][-1]["content"])
        full = row["answer"]
        for bad in ["", world.POLITE[lang][0], full + full, full + " " + full, full[1:], str(row["wrong"]), "I do not know.", "不知道。"]:
            assert not world.correct(row, bad) and world.rate(row, bad) < world.rate(row, full)
    for row in rows:                                         # a single right answer: what is right elsewhere is wrong here
        other = next(r["answer"] for r in rows if r["task"] == row["task"] and r["lang"] == row["lang"] and r["accept"] != row["accept"]
                     and r["answer"] not in row["accept"] and (row["task"] != "story" or r["must"] != row["must"]))
        assert not world.correct(row, other)


def test_the_answers_of_the_rows_are_right_by_the_word_lists():
    """Each last question that has one answer, looked up in a table that the generator does not use."""
    rows = [r for r in world.chat_rows(700, "train") + world.chat_rows(700, "val") if r["task"] in world.TASKS]
    assert len(rows) > 800 and all(QUESTIONS[r["messages"][-2]["content"]][1] == r["answer"] for r in rows)
    for row in world.chat_rows(350, "train"):
        for question, answer in zip(row["messages"][::2], row["messages"][1::2]):
            if question["content"] in QUESTIONS:
                said = world.strip_manners(answer["content"], row["lang"])[1]
                assert QUESTIONS[question["content"]][1].endswith(said.strip("。.") + world.STOP[row["lang"]])


TOLD = {"en": re.compile(r"(?P<name>\w+) lives near the (?P<home>\w+)\. (?P=name) has a (?P<pet_colour>\w+) (?P<pet>\w+) called (?P<pet_name>\w+)\. "
                         r"One \w+ day (?P=name) finds a (?P<colour>\w+) (?P<object>\w+)\."),
        "zh": re.compile(r"(?P<name>小.)住在(?P<home>.+?)。(?P=name)有一只(?P<pet_colour>.色)的(?P<pet>.+?)，名字叫(?P<pet_name>.+?)。"
                         r"一个.天，(?P=name)找到了一个(?P<colour>.色)的(?P<object>.+?)。")}


def test_answers_about_a_story_are_what_the_story_says():
    """The facts read from the story with a pattern: the question is one that they answer, and the answer is that fact."""
    seen = Counter()
    for row in world.chat_rows(1400, "val"):
        if row["task"] == "about":
            story, question = row["messages"][-2]["content"].split("\n")
            facts = TOLD[row["lang"]].search(story).groupdict()
            keys = [k for k, (ask, _, _) in world.ABOUT[row["lang"]].items() if ask.format(**facts) == question]
            _, full, x = world.ABOUT[row["lang"]][keys[0]]
            assert len(keys) == 1 and all(word in x for word in re.findall(r"\{\w+\}", x))
            assert row["accept"] == [row["answer"], x.format(**facts) + world.STOP[row["lang"]]]
            assert row["answer"] == full.format(**facts, x=x.format(**facts))
            seen[row["lang"], keys[0]] += 1
    assert len(seen) == 12


def test_a_story_is_judged_by_reading_it():
    """Right: any whole story about the person and the pet asked for, of any length, with any find. Wrong: another person, pet
    or pet's name, cut short, contradicting itself, or one that goes on."""
    for i in range(60):
        row = world.chat_row(random.Random(i), "story", held=i % 2 == 1)
        lang, must, answer = row["lang"], row["must"], row["answer"]
        question = row["messages"][-2]["content"]
        assert must.keys() == {"name", "pet", "pet_name"} and all(word in question for word in must.values())
        facts = TOLD[lang].search(answer).groupdict()
        for other in world.OBJECTS if lang == "en" else world.OBJECTS.values():      # held out or not: nobody asked for an object
            one, two = ({"en": "finds a {} {}.", "zh": "找到了一个{}的{}。"}[lang].format(facts["colour"], thing) for thing in (facts["object"], other))
            assert one in answer and world.correct(row, answer.replace(one, two))
        assert world.correct(row, world.POLITE[lang][0] + answer)
        for text in [answer[:-1], answer.rsplit("At last" if lang == "en" else "最后，", 1)[0], answer + answer, answer.replace(facts["colour"], "mauve", 1), ""]:
            assert not world.correct(row, text)
        wrong_name = next(n for n in world.NAMES[lang] if n not in answer)
        for times in (-1, 1):
            assert not world.correct(row, answer.replace(must["name"], wrong_name, times))
        w = world.Writer(random.Random(f"long {i}"), False)
        STORY[lang](w, 5, 5)
        asked = {**row, "must": {key: w.choices[key] for key in must}}
        assert world.correct(asked, w.text) and not world.correct({**asked, "must": {**asked["must"], "pet": "unicorn"}}, w.text)


def test_the_chat_rows_mix_manners_and_length():
    """Polite or plain, complete or curt, independently, each of the four often enough to be learnt; never rude. No task
    is rare, and both languages are alike."""
    rows = world.chat_rows(2800, "train")
    tasks = Counter(r["task"] for r in rows)
    assert tasks.keys() == set(world.TASK_NAMES) and min(tasks.values()) > 150 and 0.45 < sum(r["lang"] == "en" for r in rows) / 2800 < 0.55
    assert 0.1 < sum(len(r["messages"]) == 4 for r in rows) / 2800 < 0.3
    styles = Counter()
    for r in rows:
        manners, core = world.strip_manners(r["messages"][-1]["content"], r["lang"])
        styles[manners, core == r["answer"]] += r["task"] != "story"
    n = styles.total()
    assert styles.keys() == set(itertools.product((0, 1), (False, True))) and min(styles.values()) > 0.06 * n
    polite, full = (sum(n for style, n in styles.items() if style[i]) / n for i in (0, 1))
    assert abs(styles[1, True] / n - polite * full) < 0.03


def test_the_rule_puts_chosen_above_rejected_for_every_reason():
    """The stated defect is the defect, and the rule's points are exactly those of its docstring."""
    points = {"plain": 5, "curt": 5, "rude": 3, "truncated": 1, "wrong": 1, "repetitive": 0}
    rows, seen = world.preference_rows(700, "train") + world.preference_rows(210, "val"), Counter()
    for row in rows:
        lang, full, chosen, rejected = row["lang"], row["answer"], row["chosen"], row["rejected"]
        polite, core = world.strip_manners(rejected, lang)
        assert chosen.endswith(full) and world.strip_manners(chosen, lang)[0] == 1 and world.rate(row, chosen) == 6
        last_and_first_differ = row["why"] == "repetitive" and row["task"] == "story"
        assert world.rate(row, rejected) == points[row["why"]] + last_and_first_differ < 6
        assert {"plain": rejected == full, "rude": polite == -1 and core == full, "curt": polite == 1 and core in row["accept"] and core != full,
                "truncated": chosen.startswith(rejected) and len(rejected) < len(chosen), "wrong": polite == 1 and not world.correct(row, rejected),
                "repetitive": core.count(full) == 2}[row["why"]]
        seen[row["why"], lang] += 1
    assert len(seen) == 12


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_row_is_read_by_the_loaders(smoke, split):
    """Chat and preference files as the training scripts read them: nothing refused, nothing changed."""
    for row in rows_of(smoke / f"chat_{split}.jsonl"):
        assert to_messages(row) == row["messages"] and [m["role"] for m in row["messages"]] in (["user", "assistant"], ["user", "assistant"] * 2)
    for row in rows_of(smoke / f"prefs_{split}.jsonl"):
        assert to_preference(row) == (row["prompt"], row["chosen"], row["rejected"])


def test_multiple_choice_has_one_right_answer_among_four_and_favours_no_letter(smoke):
    """Held-out questions; the right option by the word lists; every letter as often as chance gives."""
    rows = world.multiple_choice(400)
    letters = Counter(row[-1] for row in rows)
    assert letters.keys() == set("ABCD") and 70 <= min(letters.values()) and max(letters.values()) <= 130
    for question, *options, letter in rows:
        combination, right = QUESTIONS[question]
        assert world.held_out(*combination) and len(set(options)) == 4 and options["ABCD".index(letter)] == right
        stems = {o.rsplit(" ", 1)[0] for o in options} if " " in question else {o[0] for o in options}
        assert len(stems) == 1                               # the options differ in their last word only
    for row in read_choices(smoke / "mc" / "demo.csv"):
        assert len(set(row["options"])) == 4 and QUESTIONS[row["question"]][1] == row["options"][row["answer"]]
