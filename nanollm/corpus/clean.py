"""Cleaning: edits that make two spellings of one text the same text, and drops with exactly one reason each.

`normalise` is idempotent and leaves well-formed English and Chinese prose untouched; both are tested. What the notes'
own cleaning scripts do wrong is avoided on purpose: a full stop inside 3.14 stays a full stop, blanks between English
words stay, and full-width punctuation is not flattened by NFKC.
"""
import html
import re
import unicodedata
from collections import Counter

from nanollm.config import UserError

MIN_CHARS = 15                            # the notes' rule; counts every character that is left after the edits
MAX_MARKUP = 0.5                          # dropped if more than this share of the text was tags and URLs
MAX_REPEATED = 0.2                        # dropped if more than this share stood in runs of 5 or more punctuation marks

HAN = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
NEWLINE = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Control characters, zero-width and direction marks, byte order marks, and the replacement character of a lost byte.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060\ufeff\ufffd]")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")     # not "x&not"

# Known element names only: "<unk>", "a<b and c>d" and "<3" are text. Attributes need an "=".
BLOCK = ("address article aside blockquote body br caption dd div dl dt fieldset figcaption figure footer form h1 h2 "
         "h3 h4 h5 h6 head header hr html li main meta nav ol option p pre section select table tbody td tfoot th "
         "thead title tr ul")
INLINE = ("a abbr acronym audio b bdi bdo big button canvas center cite code col del dfn em embed font i iframe img "
          "input ins kbd label link map mark noscript object param q s samp script small source span strike strong "
          "style sub sup svg textarea time tt u var video wbr")
TAG = r"</?(?:{})(?:\s[^<>=]{{0,100}}=[^<>]{{0,500}}|\s*/?)>"
BLOCK_TAG = re.compile(TAG.format("|".join(BLOCK.split())), re.I)
INLINE_TAG = re.compile(TAG.format("|".join(INLINE.split())), re.I)
HIDDEN = re.compile(r"<!--.*?-->|<!doctype[^<>]{0,200}>|<(script|style)\b[^<>]*>.*?</\1\s*>", re.I | re.S)

# A URL ends at a blank, a quote, CJK punctuation or a Chinese character (\S+ would swallow the sentence that follows),
# and a full stop or bracket at its end belongs to the sentence.
OUTSIDE = r"\s<>\"'\u2018-\u201d\u3000-\u9fff\uff00-\uffef"
URL = re.compile(rf" ?(?<![A-Za-z0-9@])(?:https?://|ftp://|www\.)[^{OUTSIDE}]*[^{OUTSIDE}.,;:!?)\]}}]", re.I)

REPEATED = re.compile(r"([。！？!?，,、；;])(?:[ \t]*\1)+")
DOTS = re.compile(r"\.{4,}|。{2,}|…{3,}")
NOISE = re.compile(r"[^\w\s]{5,}")
LONG_BLANK = re.compile("[ \t\u3000]{9,}")                # also keeps tiktoken from a stack overflow on endless blanks
LINE_END = re.compile("[ \t\u3000]+(?=\n|\\Z)")
BLANK_LINES = re.compile("\n{4,}")

# ASCII punctuation becomes full-width between two Chinese characters, or between one and the end of its line.
# "." only at the end: 约翰.史密斯 and 一.背景 are no sentence ends. Brackets only as a pair, both inside Chinese.
TO_FULL = re.compile(rf"(?<={HAN})([ \t]*)([,!?:;])(?=[ \t]*(?:{HAN}|$))|(?<={HAN})(\.)(?=[ \t]*$)", re.M)
BRACKETS = re.compile(rf"(?:(?<={HAN})|^)\((?={HAN})([^()\n]*)(?<={HAN})\)(?={HAN}|$)", re.M)
FULL = str.maketrans(",.!?:;", "，。！？：；")
# And back between ASCII letters (Hello，world), in 3．14, and in times (12：30). Not between any two digits: in
# "他考了100，3天后离开" and "从2数到5：2、3、4" the mark parts two clauses.
TO_ASCII = re.compile(r"(?<=[A-Za-z])[，！？；：](?=[A-Za-z])|(?<=[A-Za-z0-9])．(?=[A-Za-z0-9])"
                      r"|(?<![0-9])(?:[01]?[0-9]|2[0-4])：[0-5][0-9](?![0-9])")
ASCII = str.maketrans("，！？；．：", ",!?;.:")


def characters(text):
    """Newlines as \\n, entities decoded, invisible characters off, NFC (not NFKC: that would turn ，！１² into ,!12)."""
    if "&" in text:
        text = ENTITY.sub(lambda m: html.unescape(m[0]), text)
    text = NEWLINE.sub("\n", text).replace("\xa0", " ")   # a no-break blank is a blank
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def strip_markup(text):
    """Tags, comments and scripts off; a block tag leaves a line break, so that no two words grow together."""
    return INLINE_TAG.sub("", BLOCK_TAG.sub("\n", HIDDEN.sub("", text))) if "<" in text else text


def strip_urls(text):
    return URL.sub("", text) if "://" in text or "www." in text else text


def collapse_punctuation(text):
    """One mark instead of a run of the same mark; an ellipsis keeps its usual length (... or ……)."""
    return DOTS.sub(lambda run: {".": "...", "。": "。", "…": "……"}[run[0][0]], REPEATED.sub(r"\1", text))


def match_punctuation(text):
    """Full-width marks inside Chinese, ASCII marks inside Latin text and numbers; the rules stand at the patterns."""
    if text.isascii():
        return text
    text = TO_FULL.sub(lambda m: (m[1] or "") + (m[2] or m[3]).translate(FULL), text)
    return TO_ASCII.sub(lambda m: m[0].translate(ASCII), BRACKETS.sub(r"（\1）", text))


def tidy_blanks(text):
    """No blanks at line ends, no endless runs of them, at most two blank lines in a row."""
    return BLANK_LINES.sub("\n\n\n", LINE_END.sub("", LONG_BLANK.sub(" ", text))).strip()


STEPS = {"characters": characters, "markup": strip_markup, "urls": strip_urls,
         "repeated_punctuation": collapse_punctuation, "punctuation": match_punctuation, "blanks": tidy_blanks}


def normalise(text):
    """All edits, repeated until nothing changes: &amp;lt;b&amp;gt; needs three rounds, clean text one. Idempotent."""
    while True:
        new = text
        for step in STEPS.values():
            new = step(new)
        if new == text:
            return text
        text = new


def visible(text):
    """Number of characters that are not blank."""
    return len(text) - sum(map(str.isspace, text))


def clean(text, min_chars=MIN_CHARS):
    """(cleaned text, reason to drop it or None, names of the edits that changed it).

    The first reason that holds is the only one: "empty"; "markup" or "repeated_punctuation" if that was most of the
    document, or all that made it long enough; "too_short".
    """
    result = normalise(text)
    if result == text and len(text) >= min_chars and not NOISE.search(text):      # the usual case, nothing to explain
        return result, None, []
    edits, now = [], text
    for name, step in STEPS.items():
        before, now = now, step(now)
        edits += [name] * (now != before)
    plain = characters(text)
    bare = strip_urls(strip_markup(plain))
    total, short = visible(plain), len(result) < min_chars
    if not total:
        return result, "empty", edits
    for reason, gone, limit in (("markup", total - visible(bare), MAX_MARKUP),
                                ("repeated_punctuation", sum(map(len, NOISE.findall(bare))), MAX_REPEATED)):
        if gone > limit * total or short and gone and total >= min_chars:
            return result, reason, edits
    return result, "too_short" if short else None, edits


