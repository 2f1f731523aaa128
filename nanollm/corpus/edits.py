"""Edits: make two spellings of one text the same text, and take off what no reader would miss.

Each edit is a pure function from text to text, can be switched off in a recipe, and leaves well-formed English and
Chinese prose untouched (tested). `apply` repeats them until nothing changes, so it is idempotent by construction.
What the notes' own cleaning scripts do wrong is avoided on purpose: a full stop inside 3.14 stays a full stop, the
letter s is no punctuation (their non-raw "\\s" made it one), blanks between English words stay, and full-width
punctuation is not flattened by NFKC. Code is not prose: what stands between backticks, and a document that looks like
code as a whole, keeps its tags, braces and indentation.
"""
import html
import re
import unicodedata

from nanollm.corpus import pii

HAN = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
NEWLINE = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Control characters, zero-width and direction marks, byte order marks, and the replacement character of a lost byte.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060\ufeff\ufffd]")
# The screen for both: one pass over a clean text instead of two. Most patterns here begin with a set of characters and look
# behind after it, which lets the regex engine skip to the next candidate; with the condition in front it would stop everywhere.
ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\xa0\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd]")
# Not "x&not". What was escaped twice, &amp;lt; or &#38;amp;lt;, is decoded in one step.
ENTITY = re.compile(r"&(?:(?:amp|#38);)*(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

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
HIDDEN = re.compile(r"<(?:!doctype[^<>]{0,200}>|(!--)|(script|style)\b[^<>]{0,1000}>)", re.I)
END_OF_HIDDEN = {"!--": re.compile("-->"), "script": re.compile(r"</script\s{0,100}>", re.I), "style": re.compile(r"</style\s{0,100}>", re.I)}

# A URL ends at a blank, a quote, CJK punctuation or a Chinese character (\S+ would swallow the sentence that follows),
# and a full stop or bracket at its end belongs to the sentence. No \b in front: Python counts Han as word characters.
OUTSIDE = r"\s<>\"'\u2018-\u201d\u3000-\u9fff\uff00-\uffef"
URL = re.compile(rf"( ?)(?<![A-Za-z0-9@])(?:https?://|ftp://|www\.)[^{OUTSIDE}]*[^{OUTSIDE}.,;:!?)\]}}]", re.I)

# [1] [2-4] [5,6]; not [0], which is an index. C4 (Raffel et al. 2020) and Zero-Chatgpt take off the same marks.
WIKI_MARK = re.compile(r"\[(?:[1-9][0-9]{0,2}(?:[-–,， ]{1,2}[1-9][0-9]{0,2})*|(?:注|note|nb) ?[0-9]{1,3}"
                       r"|edit|citation needed|clarification needed|编辑|来源请求|來源請求|参考|需要引用)\]", re.I)

REPEATED = re.compile(r"[。！？!?，,、；](?<=(.))(?:[ \t]*\1)+")
DOTS = re.compile(r"\.{4,}|。{2,}|…{3,}")
LONG_BLANK = re.compile("[ \t\u3000]{9,}")
ENDLESS = re.compile("[ \t\u3000]{257,}")                 # tiktoken overflows its stack on a million blanks
LINE_END = re.compile("[ \t\u3000]+(?=\n|\\Z)")
BLANK_LINES = re.compile("\n{4,}")

# ASCII punctuation becomes full-width between two Chinese characters, or between one and the end of its line.
# "." only at the end: 约翰.史密斯 and 一.背景 are no sentence ends. Brackets only as a pair, both inside Chinese.
THEN_HAN = rf"(?=[ \t]*(?:{HAN}|$))"
TO_FULL = re.compile(rf"[,!?:;. \t](?<={HAN}.)(?:(?<=[,!?:;]){THEN_HAN}|(?<=[.])(?=[ \t]*$)|(?<=[ \t])[ \t]*[,!?:;]{THEN_HAN})", re.M)
BRACKETS = re.compile(rf"\((?:(?<={HAN}.)|(?<=^.))(?={HAN})([^()\n]*)(?<={HAN})\)(?={HAN}|$)", re.M)
FULL = str.maketrans(",.!?:;", "，。！？：；")
# And back in 3．14 and in times (12：30). Not between any two digits: in "他考了100，3天后离开" and "从2数到5：2、3、4" the mark
# parts two clauses. And between ASCII letters (Hello，world), but in lines without Chinese only: 我们使用了PyTorch，NumPy和Ray。 is right.
NUMERIC = (r"(?<=[0-9]．)(?=[0-9])"
           r"|(?:(?<=(?<![0-9])[0-9]：)|(?<=(?<![0-9])[01][0-9]：)|(?<=(?<![0-9])2[0-4]：))(?=[0-5][0-9](?![0-9]))")
TO_ASCII_IN_CHINESE = re.compile(rf"[．：](?:{NUMERIC})")
TO_ASCII = re.compile(rf"[，！？；：．](?:(?<=[A-Za-z].)(?=[A-Za-z])|{NUMERIC})")
ANY_HAN = re.compile(HAN)
ASCII = str.maketrans("，！？；．：", ",!?;.:")

# Lines around the text of a page. Only lines of at most BOILERPLATE_LINE characters of which these phrases make up more than
# BOILERPLATE_SHARE: C4 drops every line with the word "javascript", and with it any text about it; likewise a text may
# well tell of cookies, or of a book that somebody read from end to end (阅读全文). The words in SIGNS are the screen.
BOILERPLATE_LINE, BOILERPLATE_SHARE = 100, 2 / 3
BOILERPLATE = re.compile(r"^\W*(?:[上下]一篇[：:]|责任编辑[：:]|版权所有[\s：:©])[^。！？]*$|^(?:copyright )?(?:©|\(c\)).*all rights reserved\W*$"
                         r"|^(?:we use cookies to|(?:this|our) (?:web)?site uses cookies|(?:please|you (?:must|need to)) enable javascript).*"
                         r"|版权所有(?![者人权])|(?:未经.{0,6}|请勿|禁止|不得)转载|转载请(?:注明|保留)|\w{0,2}ICP[备证]\w*|公网安备\w*|返回(?:顶部|首页)"
                         r"|点击(?:查看|进入|阅读)(?:更多|详情|全文|原文|大图)|阅读(?:全文|原文)|all rights reserved|lorem ipsum(?: dolor.*)?"
                         r"|requires javascript|javascript is (?:disabled|required)|cookie policy|privacy policy|terms of (?:use|service)", re.I)
SIGNS = [word.encode() for word in ("版权所有", "转载", "icp", "公网安备", "返回", "一篇", "点击", "阅读", "责任编辑", "reserved", "lorem ipsum", "javascript",
                                    "cookie", "privacy policy", "terms of")]

# A sentence with its end mark; a line break ends one too. "." only before a blank or the end: 3.14 is no end.
SENTENCE = re.compile(r"[^。！？!?\n.]*(?:\.(?![\s”’\"')]|\Z)[^。！？!?\n.]*)*(?:(?:[。！？!?]|\.)[”’」』\"')）]*|\n|\Z)")

FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]{1,200}`", re.S)
PYTHON = re.compile(r"^[ \t]*(?:(?:async )?(?:def|class|for|while|if|elif|with|except)\b.*:|(?:else|try|finally):"
                    r"|(?:import|from) [\w.]+(?: import .*)?|return\b.*|@[\w.]+(?:\(.*\))?|[\w.\[\]]+ [-+*/]?= .*)[ \t]*$", re.M)
FIRST_HIDDEN, MAX_HIDDEN = 0xF0000, 60_000               # private-use characters that stand for hidden code


def characters(text):
    """Newlines as \\n, entities decoded, invisible characters off, NFC (not NFKC: that would turn ，！１² into ,!12)."""
    if "&" in text:
        text = ENTITY.sub(lambda m: html.unescape(f"&{m[1]};"), text)
    if len(text) > 256:
        text = ENDLESS.sub(lambda run: run[0][:256], text)
    if ODD.search(text):
        text = INVISIBLE.sub("", NEWLINE.sub("\n", text).replace("\xa0", " "))            # a no-break blank is a blank
    return unicodedata.normalize("NFC", text)


def strip_hidden(text):
    """Comments, scripts and styles off. Not one pattern `<!--.*?-->`: that would look for the end of each of a thousand
    comments that are never closed, and take hours for a megabyte of them. Here the first that has no end is the last asked."""
    out, at, endless = [], 0, set()
    for begin in HIDDEN.finditer(text):
        kind = (begin[1] or begin[2] or "").lower()
        if begin.start() >= at and kind not in endless:
            end = END_OF_HIDDEN[kind].search(text, begin.end()) if kind else begin
            if end:
                out.append(text[at:begin.start()])
                at = end.end()
            else:
                endless.add(kind)
    return "".join(out) + text[at:]


def markup(text):
    """Tags, comments and scripts off; a block tag leaves a line break, so that no two words grow together."""
    return INLINE_TAG.sub("", BLOCK_TAG.sub("\n", strip_hidden(text))) if "<" in text else text


def urls(text, tag=""):
    """URLs off, with the blank before them; or replaced by `tag` (<URL>)."""
    if "://" not in text and "www." not in text.lower():
        return text
    return URL.sub((r"\1" + tag) if tag else "", text)


def wiki_marks(text):
    """Footnote numbers and editing links of encyclopedias: [1], [edit], [citation needed], [来源请求]."""
    return WIKI_MARK.sub("", text) if "[" in text else text


def repeated_punctuation(text):
    """One mark instead of a run of the same mark; an ellipsis keeps its usual length (... or ……)."""
    text = REPEATED.sub(r"\1", text)
    if "...." in text or "。。" in text or "………" in text:
        text = DOTS.sub(lambda run: {".": "...", "。": "。", "…": "……"}[run[0][0]], text)
    return text


def punctuation(text):
    """Full-width marks inside Chinese, ASCII marks inside Latin text and numbers; the rules stand at the patterns."""
    if text.isascii():
        return text
    text = TO_FULL.sub(lambda m: m[0].translate(FULL), text)
    if "(" in text:
        text = BRACKETS.sub(r"（\1）", text)
    if not TO_ASCII.search(text):
        return text
    return "\n".join((TO_ASCII_IN_CHINESE if ANY_HAN.search(line) else TO_ASCII).sub(lambda m: m[0].translate(ASCII), line)
                     for line in text.split("\n"))


def boilerplate_line(line):
    """Do the phrases of BOILERPLATE make up more than two thirds of the letters of this short line?"""
    if len(line) > BOILERPLATE_LINE or not BOILERPLATE.search(line):
        return False
    covered = sum(c.isalpha() for found in BOILERPLATE.finditer(line) for c in found[0])
    return covered > BOILERPLATE_SHARE * sum(map(str.isalpha, line))


def boilerplate(text):
    """Short lines off that belong to the page and not to its text: 版权所有, 上一篇, cookie notices, "lorem ipsum"."""
    lower = text.encode("utf-8", "surrogatepass").lower()               # of bytes: ASCII only, and twenty times faster
    if not any(sign in lower for sign in SIGNS):
        return text
    return "\n".join(line for line in text.split("\n") if not boilerplate_line(line))


def repeated_sentences(text, least=10):
    """The second and later occurrences of a sentence of at least `least` characters off, within one document (the
    notes' deduplication on the level of sentences)."""
    seen, kept = set(), []
    for sentence in SENTENCE.findall(text):
        key = sentence.strip()
        if len(key) < least or key not in seen:
            seen.add(key)
            kept.append(sentence)
    return "".join(kept)


def blanks(text):
    """No blanks at line ends, no endless runs of them, at most two blank lines in a row."""
    if "  " in text or "\t" in text or "\u3000" in text:
        text = LONG_BLANK.sub(" ", text)
    if any(blank + "\n" in text for blank in " \t\u3000"):
        text = LINE_END.sub("", text)
    return (BLANK_LINES.sub("\n\n\n", text) if "\n\n\n\n" in text else text).strip()


def looks_like_code(text):
    """More than 2 % of { } ; outside of markup, or most of its lines are statements of Python (which has no braces)."""
    braces = sum(map(text.count, "{};"))
    if braces >= 4 and braces > 0.02 * len(text):
        bare = markup(text)
        return sum(map(bare.count, "{};")) > 0.02 * len(bare)
    if "\n    " in text or "\n\t" in text:
        return 2 * len(PYTHON.findall(text)) > len([line for line in text.split("\n") if line.strip()])
    return False


def hide_code(text):
    """(text with private-use characters for code, the hidden pieces). A document that looks like code is one piece."""
    if "`" not in text and not looks_like_code(text) or not text or max(text) >= chr(FIRST_HIDDEN):
        return text, []
    if looks_like_code(text):
        return chr(FIRST_HIDDEN), [BLANK_LINES.sub("\n\n\n", LINE_END.sub("", text)).strip("\n ")]
    hidden = []

    def hide(match):
        if len(hidden) == MAX_HIDDEN:
            return match[0]
        hidden.append(match[0])
        return chr(FIRST_HIDDEN + len(hidden) - 1)
    return FENCED.sub(hide, text), hidden


def show_code(text, hidden):
    """The inverse of `hide_code`."""
    if not hidden:
        return text
    return re.sub(f"[{chr(FIRST_HIDDEN)}-{chr(FIRST_HIDDEN + MAX_HIDDEN)}]", lambda m: hidden[ord(m[0]) - FIRST_HIDDEN], text)


# In this order: entities may hide tags, tags may hide URLs, URLs may hold addresses, and blanks are left over by all.
# Code keeps its tags and braces, but neither its invisible characters nor an e-mail address.
BEFORE_CODE_IS_HIDDEN = {"characters": characters}
OUTSIDE_CODE = {"markup": markup, "urls": urls, "wiki_marks": wiki_marks, "repeated_punctuation": repeated_punctuation,
                "punctuation": punctuation, "boilerplate": boilerplate, "repeated_sentences": repeated_sentences, "blanks": blanks}
AFTER_CODE_IS_SHOWN = {"pii": pii.mask}
EDITS = BEFORE_CODE_IS_HIDDEN | OUTSIDE_CODE | AFTER_CODE_IS_SHOWN
ROUNDS = 8                                                # more than any text needs
OPENING = dict.fromkeys(map(ord, "<&[("))                 # what edits take off layer by layer, from the inside
USUAL = ("characters", "markup", "urls", "repeated_punctuation", "punctuation", "boilerplate", "blanks")


def apply(text, steps):
    """(edited text, names of the edits that changed it) for `steps`, a dict {name of an edit: its function}.

    Repeated until nothing changes, hence idempotent: clean text needs one round, an edited one two. Only brackets in brackets
    need more, as <<b>b>, one round each; so that a thousand of them do not take a thousand rounds, what still changes after
    ROUNDS loses its opening brackets.
    """
    changed = set()

    def run(text, group):
        for name in group:
            if name in steps:
                before, text = text, steps[name](text)
                if text != before:
                    changed.add(name)
        return text

    for left in reversed(range(2 * ROUNDS)):
        before, text = text, run(text, BEFORE_CODE_IS_HIDDEN)
        text, hidden = hide_code(text)
        text = run(show_code(run(text, OUTSIDE_CODE), hidden), AFTER_CODE_IS_SHOWN)
        if text == before:
            break
        if left == ROUNDS:
            text = text.translate(OPENING)
    return text, [name for name in EDITS if name in changed]


def normalise(text, names=USUAL):
    """The text after the edits named, without options."""
    return apply(text, {name: EDITS[name] for name in names})[0]
