"""The clean stage: a recipe says which edits change a text and which filters drop it.

    text, reason, edited, lang = clean_text("<p>一段文字……</p>", read_recipe("web"))

A recipe is a TOML file (recipes/*.toml, or your own): what it does not name keeps its default, an unknown name is refused.
The edits stand in edits.py and pii.py, the filters in filters.py; docs/cleaning.md has them all in one table.
"""
import functools
import inspect
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from nanollm.config import UserError, unknown
from nanollm.corpus import columns, edits, filters, pii

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EDIT_OPTIONS = {"urls": ("remove", "tag", "off"), "pii": ("mask", "drop", "off")}         # the others: true or false
EDITS_OFF = ("wiki_marks", "repeated_sentences")          # unless a recipe turns them on
SHARES_FROM = 100                                         # units below which shares and counts of lines say little


@dataclass(frozen=True)
class Recipe:
    """Every setting of the clean stage, as canonical JSON: equal recipes are equal values, may be hashed, pickled and sent
    to a worker. Made by `read_recipe`."""
    settings: str


def defaults():
    """All settings as a dict {"shares_from", "edits": {name: value}, "filters": {name: {"off", thresholds ...}}}, the
    thresholds read off the signatures of the filters."""
    on_or_off = {name: EDIT_OPTIONS[name][0] if name in EDIT_OPTIONS else name not in EDITS_OFF for name in edits.EDITS}
    thresholds = {name: {p.name: json.loads(json.dumps(p.default)) for p in inspect.signature(check).parameters.values()
                         if p.default is not p.empty} for name, check in filters.FILTERS.items()}
    return {"shares_from": SHARES_FROM, "edits": on_or_off,
            "filters": {name: {"off": name in filters.OFF} | values for name, values in thresholds.items()}}


def read_recipe(name="default", changes=None):
    """The recipe of recipes/NAME.toml, or of the TOML file NAME, as a Recipe; `changes` is a dict of the same shape, merged
    over it ({"filters": {"too_short": {"chars": 20}}}).

    Raises UserError for a file that is missing or no TOML, an unknown name or key (naming the nearest valid one), and a
    value of the wrong type. The list of words that [filters.keywords] path = "FILE" names is read here, one a line.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    try:
        with open(path, "rb") as f:
            given = tomllib.load(f)
    except OSError as e:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise UserError(f"recipe {name!r}: cannot read {path.as_posix()} ({e.strerror}); use one of {known}, or the path of a .toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"recipe {path.as_posix()} is not a TOML file: {e}") from None
    words = given.get("filters", {}).get("keywords", {}) if isinstance(given.get("filters"), dict) else {}
    if isinstance(words, dict) and "path" in words:
        given["filters"]["keywords"] = {k: v for k, v in words.items() if k != "path"}
        given["filters"]["keywords"]["words"] = words.get("words", []) + read_words(path.parent / str(words["path"]))
    settings = merged(defaults(), given, f"recipe {path.name}")
    settings = merged(settings, changes or {}, "command line")
    return Recipe(json.dumps(settings, sort_keys=True, ensure_ascii=False))


def read_words(path):
    """The lines of a UTF-8 file that are neither blank nor begin with #."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"[filters.keywords] path: cannot read {path.as_posix()}: {e}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def merged(base, given, where):
    """`base` with the values of `given` put in its place, key by key; both nested dicts of the same shape."""
    result = dict(base)
    for key, value in given.items():
        if key not in base:
            raise unknown(key, list(base), where)
        if isinstance(base[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} is a table; write [{key}] and its keys below")
            result[key] = merged(base[key], value, f"{where} [{key}]")
        else:
            result[key] = checked(key, value, base[key], where)
    return result


def checked(key, value, default, where):
    """`value` if it is of the type of `default`; else UserError."""
    def number(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf
    options = EDIT_OPTIONS.get(key)
    if isinstance(default, bool):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        good, wanted = value in options, " or ".join(map(repr, options))
    elif isinstance(default, int):
        good, wanted = number(value) and value == int(value), "a whole number of at least 0"
    elif isinstance(default, float):
        good, wanted = number(value), "a finite number of at least 0"
    elif key in ("en", "zh"):
        good = isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 and all(map(number, p)) and p[0] == int(p[0]) >= 1 for p in value)
        wanted = "a list of [n, share]"
    else:
        good, wanted = isinstance(value, list) and all(isinstance(v, str) and v for v in value), "a list of words"
    if not good:
        raise UserError(f"{where}: {key} wants {wanted}, got {value!r}")
    return value


@functools.lru_cache(maxsize=32)
def compiled(recipe):
    """(edits {name: function}, filters {name: thresholds}, shares_from, drop what holds personal data?) of a Recipe."""
    settings = json.loads(recipe.settings)
    steps = {name: edits.EDITS[name] for name, value in settings["edits"].items() if value not in (False, "off")}
    if settings["edits"]["urls"] == "tag":
        steps["urls"] = functools.partial(edits.urls, tag="<URL>")
    drop_pii = settings["edits"]["pii"] == "drop"
    if drop_pii:
        del steps["pii"]
    chosen = {name: {k: v for k, v in table.items() if k != "off"} for name, table in settings["filters"].items() if not table["off"]}
    return steps, chosen, settings["shares_from"], drop_pii


def judge(doc, recipe):
    """The reason to drop a Doc, or None: "pii" if the recipe says so, else the first filter that holds."""
    _, chosen, shares_from, drop_pii = compiled(recipe)
    if drop_pii and pii.mask(doc.text) != doc.text:
        return "pii"
    return filters.reason_to_drop(doc, chosen, shares_from)


def clean_text(text, recipe=None):
    """(edited text, reason to drop it or None, names of the edits that changed it, language by script)."""
    recipe = recipe or read_recipe()
    result, names = edits.apply(text, compiled(recipe)[0])
    doc = filters.Doc(result, text, tuple(names))
    return result, judge(doc, recipe), names, doc.lang


def clean_chat(row, recipe):
    """The same for {"messages": [...]} or {"prompt": [...], "chosen", "rejected"}: (row, text, reason, names, language).

    Every content is edited for itself. A message that is nothing after that drops the row ("empty_message"). The rejected
    answer is not judged: what is wrong with it is what the pair teaches.
    """
    steps, changed = compiled(recipe)[0], set()

    def edit(text):
        text, names = edits.apply(text, steps)
        changed.update(names)
        return text
    key = "messages" if "messages" in row else "prompt"
    messages = [m | {"content": edit(m["content"])} for m in row[key]]
    answers = {side: edit(row[side]) for side in ("chosen", "rejected") if side in row}
    row, old = row | {key: messages} | answers, [m["content"] for m in row[key]] + [row[k] for k in answers]
    new = [m["content"] for m in messages] + list(answers.values())
    names = [name for name in edits.EDITS if name in changed]
    judged = len(new) - ("rejected" in answers)
    doc = filters.Doc("\n".join(new[:judged]), "\n".join(old[:judged]), tuple(names))
    reason = judge(doc, recipe)
    if not reason and any(not text for text, m in zip(new, messages + [{}, {}]) if m.get("role") != "system"):
        reason = "empty_message"
    return row, "\n".join(new), reason, names, doc.lang


def clean(table, cfg):
    """Stage function: (n rows) -> (n rows), same order, for a Recipe `cfg`.

    Sets text, meta (the contents of chats), lang, n_chars, drop_reason (one that is set already stays, and that row is left
    as it is) and edits (names joined by commas).
    """
    texts, metas = table["text"].to_pylist(), table["meta"].to_pylist()
    before = table["drop_reason"].to_pylist() if "drop_reason" in table.column_names else [None] * len(texts)
    rows = []
    for text, meta, reason in zip(texts, metas, before):
        text = text or ""
        chat = json.loads(meta) if meta and meta.startswith(('{"messages"', '{"prompt"')) else None
        if reason:
            names, lang = [], filters.Doc(text).lang
        elif chat:
            chat, text, reason, names, lang = clean_chat(chat, cfg)
            meta = json.dumps(chat, ensure_ascii=False)
        else:
            text, reason, names, lang = clean_text(text, cfg)
        rows.append((text, meta, lang, len(text), reason, ",".join(names)))
    kinds = {"text": pa.large_string(), "meta": pa.string(), "lang": pa.string(), "n_chars": pa.int32(), "drop_reason": pa.string(), "edits": pa.string()}
    for (name, kind), values in zip(kinds.items(), zip(*rows) if rows else [[]] * len(kinds)):
        table = columns.with_column(table, name, values, kind)
    return table
