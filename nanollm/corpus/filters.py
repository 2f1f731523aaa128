"""Filters: each a pure function of one document that says whether to drop it. Its arguments are the thresholds.

English thresholds come from Gopher (Rae et al. 2021, table A1), C4 (Raffel et al. 2020, section 2.2) and FineWeb (Penedo
et al. 2024); applied to Chinese they reject nearly everything, because they count words between blanks. The Chinese ones
are those of FineWeb-2 for cmn_Hani, carried from words to units: one Chinese word is about 1.6 characters.

A *unit* is one Chinese character or kana, one run of letters, one run of digits, or one punctuation mark or symbol.
A *share of characters* counts visible characters only, no blanks. "zh" thresholds hold for Chinese and Japanese text,
"en" thresholds for everything else.

What several filters need is computed once a document, over the array of its code points, and kept in `Doc`.
"""
import functools
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from nanollm.corpus import edits

BLANK, HAN, KANA, LATIN, LETTER, DIGIT, MARK = range(7)   # classes of characters; MARK: punctuation and symbols
RANGES = {HAN: ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF), (0x3005, 0x3007), (0x3021, 0x3029)),
          KANA: ((0x3041, 0x3096), (0x309D, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D)),
          LATIN: ((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F), (0x1E00, 0x1EFF),
                  (0xFF21, 0xFF3A), (0xFF41, 0xFF5A))}
HAN_SHARE, KANA_SHARE = 0.5, 0.05                         # from the first on a text is Chinese, beyond the second Japanese
GOPHER_WORDS = re.compile(r"\b(the|be|to|of|and|that|have|with)\b", re.I)
FINEWEB2_WORDS = re.compile("[的年在月是和日了有被人中]")
BULLET = re.compile(r"\s*(?:[•·◆◇●○■□▪◦‣★※*]|[-–—+](?=\s))")
SYMBOL = re.compile(r"#+|\.{3,}|…+|。{3,}")
NOISE = re.compile(r"[^\w\s]{5,}")
TERMINAL = frozenset("。！？…；.!?;”’」』\"'）)")
POWERS = np.cumprod(np.array([1] + 255 * [0x9E3779B97F4A7C15], np.uint64))        # B^0, B^1, ... modulo 2^64
SENTENCE_END = re.compile(r"[。！？!?\n]|\.(?=\s)")


@functools.cache
def class_table():
    """(0x110000,) uint8: the class of every code point. Beyond the listed ranges by Unicode category: letters with
    their accents, numbers, blanks with control characters, and marks for all the rest."""
    first = {"L": LETTER, "M": LETTER, "N": DIGIT, "Z": BLANK, "C": BLANK, "P": MARK, "S": MARK}
    table = np.full(0x110000, MARK, np.uint8)
    table[:0x20000] = [first[unicodedata.category(chr(i))[0]] for i in range(0x20000)]
    for kind, ranges in RANGES.items():
        for low, high in ranges:
            table[low:high + 1] = kind
    return table


def code_points(text):
    """(n,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@dataclass(frozen=True)
class Doc:
    """One document after the edits. `raw` is the text before them and `edited` the names of those that changed it."""
    text: str
    raw: str = ""
    edited: tuple = ()

    @functools.cached_property
    def codes(self):
        return code_points(self.text)

    @functools.cached_property
    def classes(self):
        """(n,) uint8: the class of each character."""
        return class_table()[self.codes]

    @functools.cached_property
    def counts(self):
        """Seven integers: characters of each class."""
        return np.bincount(self.classes, minlength=7).tolist()

    @property
    def visible(self):
        return len(self.text) - self.counts[BLANK]

    @functools.cached_property
    def lang(self):
        latin = self.classes == LATIN
        return language_of(self.counts, self.counts[LATIN] and int(latin[0]) + int(np.count_nonzero(latin[1:] > latin[:-1])))

    @property
    def chinese(self):
        """Do the thresholds for Chinese hold?"""
        return self.lang in ("zh", "ja")

    @functools.cached_property
    def code(self):
        return edits.looks_like_code(self.text)

    @functools.cached_property
    def unit_starts(self):
        """(m,) where each unit begins."""
        kind = self.classes
        new = np.ones(len(kind), bool)
        new[1:] = (kind[1:] != kind[:-1]) | (kind[1:] <= KANA) | (kind[1:] == MARK)        # only runs go on
        return np.flatnonzero(new & (kind != BLANK))

    @functools.cached_property
    def unit_lengths(self):
        """(m,) visible characters of each unit."""
        seen = np.concatenate([[0], np.cumsum(self.classes != BLANK)])
        return np.diff(seen[self.unit_starts], append=seen[-1])

    @functools.cached_property
    def unit_ends(self):
        """(m + 1,) visible characters before each unit, and in all."""
        return np.concatenate([[0], np.cumsum(self.unit_lengths)])

    @functools.cached_property
    def unit_hashes(self):
        """(m,) uint64, equal for equal units: sum of code_i * B^i over the unit, modulo 2^64, then mixed."""
        starts = self.unit_starts
        if not len(starts):
            return np.zeros(0, np.uint64)
        codes = np.where(self.classes == BLANK, 0, self.codes)[starts[0]:].astype(np.uint64)
        place = np.arange(len(codes)) - np.repeat(starts - starts[0], np.diff(starts, append=len(self.codes)))
        sums = np.add.reduceat(codes * POWERS[place % len(POWERS)], starts - starts[0])
        return (sums ^ (sums >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)

    @functools.cached_property
    def lines(self):
        """Lines that are not blank, stripped."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]


def language_of(counts, latin_words):
    """"zh", "ja", "en" or "other", by script alone, from the characters of each class and the number of runs of Latin
    letters; "en" stands for any text in Latin letters.

    Chinese or Japanese: (Han + kana) / (Han + kana + Latin words) >= 0.5. Words and not letters, since "PyTorch" is one word
    like 训练. Japanese: of Han and kana, more than 5 % are kana. Two Latin languages can not be told apart by script:
    `function_words` asks for English ones.
    """
    han, kana, latin, letter = (counts[kind] for kind in (HAN, KANA, LATIN, LETTER))
    if not han + kana + latin or letter > han + kana + latin:
        return "other" if letter else "en"
    if han + kana < HAN_SHARE * (han + kana + latin_words):
        return "en"
    return "ja" if kana > KANA_SHARE * (han + kana) else "zh"


def visible(text):
    """Number of characters that are not blank."""
    return len(text) - sum(map(str.isspace, text))


# ------------------------------------------------------------------------------------------- for every document

def empty(doc):
    """Nothing visible is left after the edits."""
    return not doc.visible


def markup(doc, most=0.5):
    """More than `most` of the visible characters were tags and URLs. Only asked where an edit took some off."""
    if not {"markup", "urls"} & set(doc.edited):
        return False
    total = visible(edits.characters(doc.raw))
    return total - visible(edits.normalise(doc.raw, ("characters", "markup", "urls"))) > most * total


def repeated_punctuation(doc, most=0.2):
    """More than `most` of the visible characters stood in runs of 5 or more punctuation marks and symbols (!!!!!!, =-=-=-).
    Not asked of code, which draws its lines like that."""
    if not NOISE.search(doc.raw) or doc.code:
        return False
    bare = edits.normalise(doc.raw, ("characters", "markup", "urls"))
    return sum(map(len, NOISE.findall(bare))) > most * visible(edits.characters(doc.raw))


def too_short(doc, chars=15, words_en=0):
    """Fewer than `chars` characters (15: the notes; 100 for the web), or fewer than `words_en` runs of letters in English
    text (Gopher: 50 words)."""
    if len(doc.text) < chars:
        return True
    return words_en > 0 and not doc.chinese and int(is_word(doc).sum()) < words_en


def language(doc, keep=("zh", "en")):
    """The language by script (`language_of`) is not among those to keep."""
    return doc.lang not in keep


def keywords(doc, words=(), distinct=3, per_1000=2.0):
    """At least `distinct` different words of the list, or more than `per_1000` occurrences per 1,000 characters (a shorter
    text counts as 1,000). C4 drops a page at the first hit of its list, which in Chinese contains 性 and with it a tenth
    of all documents; density is what tells spam from an article about spam. English words are matched whole."""
    if not words:
        return False
    found = keyword_pattern(tuple(words)).findall(doc.text.lower())
    return len(set(found)) >= distinct or len(found) > per_1000 * max(len(doc.text), 1000) / 1000


@functools.cache
def keyword_pattern(words):
    """One alternation, the longer words first so that none hides behind its own beginning."""
    ordered = sorted({w.lower() for w in words}, key=lambda w: (-len(w), w))
    return re.compile("|".join(rf"(?<![a-z]){re.escape(w)}(?![a-z])" if w.isascii() else re.escape(w) for w in ordered))


def curly_brackets(doc, per_1000=0.0):
    """More than `per_1000` braces { } per 1,000 characters. C4 drops every page with one brace (0); a recipe that wants code
    leaves this off."""
    return doc.text.count("{") + doc.text.count("}") > per_1000 * len(doc.text) / 1000


# ------------------------------------------------------------- for prose: not for code, nor for a text of a few words

def is_word(doc):
    """(m,) bool: which units are runs of letters or Chinese characters."""
    kind = doc.classes[doc.unit_starts]
    return (kind >= HAN) & (kind <= LETTER)


def function_words(doc, least_en=2, least_zh=1):
    """Fewer different function words than any text of the language has. English: 2 of the be to of and that have with
    (Gopher). Chinese: 1 of 的 年 在 月 是 和 日 了 有 被 人 中 (FineWeb-2). Word lists and tables fail."""
    pattern, least = (FINEWEB2_WORDS, least_zh) if doc.chinese else (GOPHER_WORDS, least_en)
    found = set()
    for word in pattern.finditer(doc.text):
        found.add(word[0].lower())
        if len(found) >= least:
            return False
    return len(found) < least


def word_length(doc, least=3.0, most=10.0):
    """English only: the mean length of a run of letters lies outside 3 to 10 (Gopher). A Chinese word has no blanks around
    it, and a unit has one character."""
    if doc.chinese:
        return False
    kind = doc.classes[doc.unit_starts]
    lengths = doc.unit_lengths[(kind == LATIN) | (kind == LETTER)]
    return bool(len(lengths)) and not least <= lengths.mean() <= most


def alphabetic(doc, least_en=0.80, least_zh=0.735):
    """Too few words with a letter: of what stands between blanks in English (Gopher 0.80), of the units in Chinese
    (FineWeb-2 0.735; a Chinese character is a letter)."""
    if doc.chinese:
        return float(is_word(doc).mean()) < least_zh
    starts = np.flatnonzero(np.diff(doc.classes != BLANK, prepend=False) & (doc.classes != BLANK))
    letter = (doc.classes >= HAN) & (doc.classes <= LETTER)
    return float(np.maximum.reduceat(letter.view(np.uint8), starts).mean()) < least_en


def symbols(doc, most=0.1):
    """More than `most` number signs and ellipses a unit (Gopher: a word). ###, …… and ... count once."""
    if "#" not in doc.text and "…" not in doc.text and "..." not in doc.text:
        return False
    return len(SYMBOL.findall(doc.text)) > most * len(doc.unit_starts)


def bullets(doc, most=0.9):
    """More than 90 % of the lines begin with a bullet (Gopher), • · ◆ ● and such included. Of three lines or more."""
    return len(doc.lines) >= 3 and sum(bool(BULLET.match(line)) for line in doc.lines) > most * len(doc.lines)


def ellipsis_lines(doc, most=0.3):
    """More than 30 % of the lines end with an ellipsis, ... or … (Gopher): teasers of articles that stand elsewhere."""
    return sum(line.endswith(("...", "…")) for line in doc.lines) > most * len(doc.lines)


def punctuation(doc, least=0.01, most=0.35):
    """The share of punctuation and symbols among the characters lies outside 0.01 to 0.35: lists of keywords have next to
    none, noise has little else."""
    return not least * doc.visible <= doc.counts[MARK] <= most * doc.visible


def digits(doc, most=0.3):
    """More than 30 % of the characters are digits: tables, telephone lists."""
    return doc.counts[DIGIT] > most * doc.visible


def terminal_punctuation(doc, least_en=0.12, least_zh=0.106):
    """Of three lines or more, too few end like a sentence (FineWeb 0.12; FineWeb-2 0.106 with 。！？…；”」』）). C4 goes by the
    line and keeps only those that end with . ? ! or a quote: that deletes 98 % of Chinese lines, so it is not offered."""
    ends = sum(line[-1] in TERMINAL for line in doc.lines)
    return len(doc.lines) >= 3 and ends < (least_zh if doc.chinese else least_en) * len(doc.lines)


def short_lines(doc, chars_en=30, chars_zh=10, most=0.67):
    """More than 67 % of the lines have at most 30 characters (FineWeb), in Chinese 10. FineWeb-2 went without."""
    limit = chars_zh if doc.chinese else chars_en
    return sum(len(line) <= limit for line in doc.lines) > most * len(doc.lines)


def newlines(doc, most_en=0.3, most_zh=0.11):
    """Too many line breaks a unit: FineWeb 0.3 a word; FineWeb-2 0.178 a word, which is 0.11 a Chinese unit. Poems have
    more: the recipe for verse leaves this off."""
    return doc.text.count("\n") > (most_zh if doc.chinese else most_en) * len(doc.unit_starts)


# -------------------------------------------------------------------------------------------------- repetition

def repeated(pieces):
    """(share of the pieces that repeat an earlier one, share of their characters)."""
    again = len(pieces) - len(set(pieces))
    if not again:
        return 0.0, 0.0
    return again / len(pieces), 1 - sum(map(len, set(pieces))) / sum(map(len, pieces))


def duplicate_lines(doc, lines_en=0.30, lines_zh=0.287, chars_en=0.20, chars_zh=0.10):
    """Too many lines repeat an earlier one, or too many characters stand in such lines (Gopher 0.30 and 0.20; FineWeb-2
    0.287 and 0.10)."""
    lines, chars = repeated(doc.lines)
    return lines > (lines_zh if doc.chinese else lines_en) or chars > (chars_zh if doc.chinese else chars_en)


def duplicate_paragraphs(doc, paragraphs=0.30, chars=0.20):
    """The same for paragraphs, which blank lines part (Gopher 0.30 and 0.20)."""
    if "\n\n" not in doc.text:
        return False
    share, of_chars = repeated([p for p in map(str.strip, re.split(r"\n{2,}", doc.text)) if p])
    return share > paragraphs or of_chars > chars


def repeated_sentences(doc, most=0.30, least_chars=4):
    """More than 30 % of the characters stand in sentences of at least 4 characters that occurred before (the notes'
    repetition within a document). Sentences end at 。！？!? and line breaks, and at "." before a blank."""
    pieces = [p for p in map(str.strip, SENTENCE_END.split(doc.text)) if p]
    long = [p for p in pieces if len(p) >= least_chars]
    again = sum(map(len, long)) - sum(map(len, set(long)))
    return again > most * sum(map(len, pieces))


def ngram_hashes(units, n):
    """(m - n + 1,) uint64 from (m,) unit hashes: h[i] = sum of units[i + j] * B^j for j = 0..n-1, modulo 2^64.

    By doubling: the sum over 2k terms is the sum over the first k plus B^k times the sum over the next k.
    """
    total, done = None, 0                                 # total: the sums over the first `done` terms
    power, size = units, 1                                # power: the sums over `size` terms
    while True:
        if n & size:
            more = power[done:] * POWERS[done]
            total, done = more if total is None else total[:len(more)] + more, done + size
            if done == n:
                return total
        power, size = power[:-size] + power[size:] * POWERS[size], 2 * size


def groups(hashes):
    """(order, bounds): the positions sorted by value, equal ones in their order; group g is order[bounds[g]:bounds[g+1]]."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    return order, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))


def ngram_lengths(doc, n):
    """(m - n + 1,) visible characters of the n units from each on."""
    return doc.unit_ends[n:] - doc.unit_ends[:-n]


def covered(starts, n, lengths):
    """Characters of the units that lie in any of the n-grams at `starts`, each unit counted once."""
    size = len(lengths) + 1
    change = np.bincount(starts, minlength=size) - np.bincount(starts + n, minlength=size)
    return int(lengths[np.cumsum(change[:-1]) > 0].sum())


def duplicate_ngram_share(doc, n, ask_from=0.0):
    """Characters of the units covered by the second or a later occurrence of an n-gram, each unit counted once, over all.

    0.0 without looking closer where the share cannot exceed `ask_from`. (datatrove joins n-grams with blanks and divides
    by the length of the text, which inflates Chinese.)
    """
    if len(doc.unit_hashes) <= n:
        return 0.0
    grams = ngram_hashes(doc.unit_hashes, n)
    ranked = np.sort(grams)                               # values sort faster than positions
    later = int(np.count_nonzero(ranked[1:] == ranked[:-1]))
    if later * int(ngram_lengths(doc, n).max()) <= ask_from * doc.visible:
        return 0.0
    order, bounds = groups(grams)
    first = np.zeros(len(grams), bool)
    first[order[bounds[:-1]]] = True
    return covered(np.flatnonzero(~first), n, doc.unit_lengths) / doc.visible


def duplicate_ngrams(doc, en=((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)),
                     zh=((8, 0.198), (10, 0.182), (11, 0.167), (13, 0.154), (14, 0.14), (16, 0.127))):
    """Too much of the text repeats itself: for any (n, most), the `duplicate_ngram_share` exceeds `most` (Gopher for English
    words; FineWeb-2 for Chinese, its n times 1.6, since a word has 1.6 units).

    What a repeated (n+1)-gram covers, repeated n-grams cover too. So once the share for some n is within the smallest
    limit of it and all longer ones, these hold as well and are not computed.
    """
    limits = sorted(zh if doc.chinese else en)
    for i, (n, most) in enumerate(limits):
        smallest = min(limit for _, limit in limits[i:])
        share = duplicate_ngram_share(doc, n, smallest)
        if share > most:
            return True
        if share <= smallest:
            return False
    return False


def times_of_top(doc, n):
    """How often the most frequent n-gram of units occurs."""
    ranked = np.sort(ngram_hashes(doc.unit_hashes, n))
    return int(np.diff(np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))).max())


def top_ngram_share(doc, n):
    """Share of the characters that lie in the most frequent n-gram of units, each unit counted once; 0.0 if none occurs
    twice. Of n-grams that occur equally often the longest counts, then the first. (datatrove takes one that occurs once,
    and drops short documents with it.)"""
    if len(doc.unit_hashes) <= n:
        return 0.0
    order, bounds = groups(ngram_hashes(doc.unit_hashes, n))
    times = np.diff(bounds)
    if times.max() < 2:
        return 0.0
    top = np.flatnonzero(times == times.max())
    first = order[bounds[top]]
    best = top[np.lexsort((first, -ngram_lengths(doc, n)[first]))[0]]
    return covered(order[bounds[best]:bounds[best + 1]], n, doc.unit_lengths) / doc.visible


def top_ngrams(doc, en=((2, 0.20), (3, 0.18), (4, 0.16)), zh=((3, 0.256), (5, 0.201), (6, 0.171))):
    """One short phrase makes up too much of the text: for any (n, most), the `top_ngram_share` exceeds `most` (Gopher for
    English words; FineWeb-2 for Chinese, its n times 1.6).

    A longer n-gram occurs at most as often as the top n-gram, so its share is at most that number times its length: where
    that is within the limit, nothing is sorted.
    """
    times = len(doc.unit_hashes)
    for n, most in sorted(zh if doc.chinese else en):
        if len(doc.unit_hashes) <= n:
            return False
        longest = int(ngram_lengths(doc, n).max())
        if times * longest > most * doc.visible:
            times = times_of_top(doc, n)
            if times * longest > most * doc.visible and top_ngram_share(doc, n) > most:
                return True
    return False


# In this order, cheap ones first; the first that holds is the reason. Of a text of a few words only the first group is
# asked, since shares of so little say nothing. Code is not asked the second, nor `repeated_punctuation`.
ALWAYS = (empty, markup, repeated_punctuation, too_short, language, keywords, curly_brackets)
PROSE = (function_words, word_length, alphabetic, symbols, bullets, ellipsis_lines, punctuation, digits, terminal_punctuation,
         short_lines, newlines)
REPETITION = (duplicate_lines, duplicate_paragraphs, repeated_sentences, duplicate_ngrams, top_ngrams)
FILTERS = {f.__name__: f for f in ALWAYS + PROSE + REPETITION}
OFF = ("curly_brackets", "short_lines")                   # unless a recipe turns them on


def reason_to_drop(doc, chosen, shares_from):
    """Name of the first filter that holds, or None. `chosen`: {name: thresholds as keyword arguments}. Texts shorter than
    `shares_from` units are only asked the filters in ALWAYS, code none of those in PROSE."""
    def first(group):
        return next((f.__name__ for f in group if f.__name__ in chosen and f(doc, **chosen[f.__name__])), None)
    reason = first(ALWAYS)
    if reason or len(doc.text) < shares_from or len(doc.unit_starts) < shares_from:
        return reason
    return (None if doc.code else first(PROSE)) or first(REPETITION)
