"""The notes' questions, answered by running something.

    python -m nanollm.ask 为什么要 warmup                 finds the entry, prints the answer, offers to run its demonstration
    python -m nanollm.ask Q143 --run true                 prints it and runs the demonstration
    python -m nanollm.ask why pad on the left --lang zh
    python -m nanollm.ask                                 what there is, by stage

The entries are docs/questions/*.toml, the errors of the notes docs/errata/*.toml, the figures in an answer the means of the stored
runs in learn/results/: `{no_warmup/0.008 none}` in an entry is replaced by that figure of that experiment.
"""
import ast
import functools
import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanollm.config import UserError, arg, run

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS, ERRATA, RESULTS = ROOT / "docs" / "questions", ROOT / "docs" / "errata", ROOT / "learn" / "results"
VERDICTS = {"right": ("The notes are right.", "笔记对。"), "caveat": ("The notes are right, with a caveat.", "笔记对，但有条件。"),
            "wrong": ("The notes are wrong.", "笔记错。"), "open": ("It cannot be decided here.", "这里无法判定。")}
FIGURE = re.compile(r"\{(\w+)/([^{}:]+)(?::([^{}]+))?\}")


@dataclass
class Config:
    first = "words"                                  # words before the first option
    words: list = arg([], "a question in your words, English or Chinese, or its number: Q143")
    lang: str = arg("", "the language of the answer, en or zh; empty = that of the question")
    run: bool = arg(False, "run the demonstration without asking")
    check: list = arg([], "instead: hold these files of questions or errata against the code")


def read(path):
    """A TOML file of entries -> (its titles, [entry]). UserError names the file."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    found = table.get("question", table.get("erratum", []))
    if not isinstance(found, list) or not all(isinstance(entry, dict) and "id" in entry for entry in found):
        raise UserError(f"{path}: entries are tables [[question]] or [[erratum]], each with an id")
    return table, found


@functools.cache
def entries(folder=QUESTIONS):
    """All entries of a folder in the order of their numbers; each knows its stage, the name of its file."""
    found = [entry | {"stage": path.stem} for path in sorted(Path(folder).glob("*.toml")) for entry in read(path)[1]]
    return sorted(found, key=lambda e: int(e["id"][1:]))


@functools.cache
def figures(experiment):
    """{name: mean} of the stored run of an experiment."""
    path = RESULTS / f"{experiment}.json"
    if not path.exists():
        raise UserError(f"{path.relative_to(ROOT)} is missing: python -m learn.experiments.{experiment} --record true makes it")
    return {name: f["mean"] for name, f in json.loads(path.read_text(encoding="utf-8"))["figures"].items()}


def filled(text):
    """The text with its figures, three significant digits each unless a format is given."""
    def one(match):
        experiment, name, form = match.groups()
        if name not in figures(experiment):
            raise UserError(f"{match[0]}: {experiment} has no such figure; it has {', '.join(figures(experiment))}")
        value = figures(experiment)[name]
        return format(value, form) if form else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return FIGURE.sub(one, text.strip())


# ------------------------------------------------------------------------------------------------------------- finding

EMPTY = re.compile(r"为什么|什么|怎么|怎样|如何|哪些|是不是|应该|多少|多大|[要的吗呢是了用和与]|\b(?:why|what|which|how|many|much|does|do|did|is|are|be|was|can|should|must|"
                   r"i|we|my|you|it|the|an?|of|to|in|and|or|for|on|with|between|difference|need|get|there|not)\b")


def terms(text):
    """What a search compares: Latin words, numbers, Chinese characters and pairs of neighbouring ones; not the words that only ask."""
    text = EMPTY.sub(" ", text.lower())
    han = re.findall(r"[\u4e00-\u9fff]+", text)
    return Counter(re.findall(r"[a-z0-9_]+(?:-[a-z0-9]+)*", text) + [run[i : i + n] for run in han for n in (1, 2) for i in range(len(run) - n + 1)])


@functools.cache
def index():
    """[(terms of the question, terms of its answer)] for each entry, and in how many entries each term stands."""
    both = [(terms(f"{e['en']} {e['zh']} {e['id']}"), terms(f"{e['answer_en']} {e['answer_zh']}")) for e in entries()]
    return both, Counter(term for question, answer in both for term in question | answer)


def search(query, most=5):
    """(the entries nearest to the words, best first; does the first one fit?). Rare words count more, and more in a question than in
    an answer; words that stand in no entry count against all."""
    if not entries():
        raise UserError(f"{QUESTIONS} holds no questions; run this in a clone of the repository")
    if number := re.fullmatch(r"\s*[Qq]?0*(\d+)\s*", query):
        found = [e for e in entries() if e["id"] == f"Q{number[1]}"]
        if not found:
            raise UserError(f"there is no question Q{number[1]}; they go from {entries()[0]['id']} to {entries()[-1]['id']}")
        return found, True
    both, known = index()
    han = lambda term: term >= "\u4e00"
    weight = {term: math.log(1 + len(both) / known.get(term, 1)) * (0.3 if han(term) and len(term) == 1 else 1)
              for term in terms(query) if term in known or not han(term)}                    # two characters that stand nowhere may be no word
    score = [sum(w * (3 * (term in question) + (term in answer)) for term, w in weight.items()) for question, answer in both]
    best = sorted(range(len(both)), key=lambda i: -score[i])[:most]
    words = [term for term in weight if len(term) > 1 and (term in both[best[0]][0] or term in both[best[0]][1])]
    fits = words and score[best[0]] >= sum(weight.values())                 # below that most of the words stand nowhere near each other
    return [entries()[i] for i in best if score[i] > 0], bool(fits)


def demonstrations(entry):
    """The commands that show it: lists of words."""
    found = [[sys.executable, "-m", "pytest", *entry["tests"]]] if entry.get("tests") else []
    if entry.get("experiment"):
        folder = "experiments" if (ROOT / "learn" / "experiments" / f"{entry['experiment']}.py").exists() else "studies"
        found.append([sys.executable, "-m", f"learn.{folder}.{entry['experiment']}"])
    return found


def spoken(command):
    return " ".join(["python", *command[1:]])


def shown(entry, lang):
    """An entry as text."""
    zh = lang == "zh"
    lines = [f"{entry['id']}  {entry[lang]}", "", filled(entry[f"answer_{lang}"]), "", VERDICTS[entry["verdict"]][zh],
             f"{'笔记' if zh else 'notes'}: {', '.join(entry['place'])}"]
    lines += [f"{'代码' if zh else 'code'}: {', '.join(entry['code'])}"] if entry.get("code") else []
    lines += [f"{'演示' if zh else 'shown by'}: {spoken(command)}" for command in demonstrations(entry)]
    lines += [f"{'不运行，因为' if zh else 'nothing is run'}: {entry[f'argument_{lang}']}"] if f"argument_{lang}" in entry else []
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ checking

@functools.cache
def tests_of(path):
    """Names of the test functions of a file, none if there is no such file."""
    source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else ""
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


def symbol(name):
    """The object behind module:qualified.name; AttributeError, ImportError or ValueError if there is none."""
    module, qualified = name.split(":")
    return functools.reduce(getattr, qualified.split("."), importlib.import_module(module))


def runs(show):
    """Is it a question's number, or a command whose script or module is there?"""
    if re.fullmatch(r"Q\d+", show):
        return any(e["id"] == show for e in entries())
    words = shlex.split(show)
    if words[:2] == ["python", "-c"]:
        return bool(compile(words[2], show, "exec"))
    if words[:2] == ["python", "-m"]:
        ours = (ROOT / words[2].split(".")[0]).is_dir()          # find_spec raises where the first part of the name is missing
        return words[2] == "pytest" or ours and importlib.util.find_spec(words[2]) is not None
    return words[:1] in (["python"], ["bash"]) and (ROOT / words[1]).exists()


def length(text, lang):
    """Words of English; Chinese counts two characters as a word."""
    return len(text.split()) if lang == "en" else len(re.findall(r"[\u4e00-\u9fff]", text)) / 2 + len(re.findall(r"[A-Za-z0-9_.]+", text))


def faults(entry):
    """What is wrong with an entry or an erratum: sentences, none if all is well."""
    bad, of = [], entry.get("id", "an entry without id")
    question = "verdict" in entry or "answer_en" in entry
    wanted = {"id", "place", *(("en", "zh", "verdict", "answer_en", "answer_zh", "code") if question else
                               ("star", "printed_en", "printed_zh", "right_en", "right_zh", "see"))}
    allowed = wanted | {"stage", *(("tests", "experiment", "argument_en", "argument_zh") if question else ())}
    bad += [f"{key} is missing" for key in sorted(wanted - entry.keys())] + [f"{key} is no key of an entry" for key in sorted(entry.keys() - allowed)]
    if bad:
        return [f"{of}: {b}" for b in bad]
    bad += [f"place {p}: write file:line, as 001:421" for p in entry["place"] if not re.fullmatch(r"00[0-4]:\d+(-\d+)?", p)]
    shows = entry.get("tests", []) + ([f"experiment {entry['experiment']}"] if entry.get("experiment") else []) if question else entry["see"]
    for show in shows:
        if "::" in show:
            path, name = show.split("::")
            bad += [] if name in tests_of(path) else [f"there is no test {show}"]
        elif not re.fullmatch(r"experiment \w+", show):
            bad += [] if runs(show) else [f"{show!r} is neither a test, an experiment, a question nor a command"]
        else:
            bad += [] if any((ROOT / "learn" / f / f"{show.split()[1]}.py").exists() for f in ("experiments", "studies")) else [f"there is no {show}"]
    if question:
        bad += [f"verdict {entry['verdict']} is none of {', '.join(VERDICTS)}"] if entry["verdict"] not in VERDICTS else []
        bad += ["neither tests, nor an experiment, nor an argument"] if not shows and "argument_en" not in entry else []
        bad += ["argument_en and argument_zh belong together"] if ("argument_en" in entry) != ("argument_zh" in entry) else []
        bad += ["no code, though it is demonstrated"] if shows and not entry["code"] else []
        for lang in ("en", "zh"):
            try:
                n = length(filled(entry[f"answer_{lang}"]), lang)
                bad += [f"answer_{lang} has {n:.0f} words; 120 are the most"] if n > 120 else []
            except UserError as e:
                bad.append(str(e))
        for name in entry["code"]:
            try:
                symbol(name)
            except (AttributeError, ImportError, ValueError) as e:
                bad.append(f"code {name}: {e}")
    return [f"{of}: {b}" for b in bad]


def check(path):
    """Every fault of a file of entries, printed; True if there is none."""
    _, found = read(path)
    bad = [fault for entry in found for fault in faults(entry)]
    ids = [e.get("id") for e in found]
    bad += [f"{i} stands there twice" for i, n in Counter(ids).items() if n > 1]
    print(f"{path}: {len(found)} entries, " + (f"{len(bad)} faults" if bad else "all well"))
    print("".join(f"  {b}\n" for b in bad), end="")
    return not bad


def main(cfg):
    sys.path.insert(0, str(ROOT))                    # the scripts and tests are modules there
    if cfg.lang not in ("", "en", "zh"):
        raise UserError(f"--lang {cfg.lang}: answers are in en and zh")
    if cfg.check:
        sys.exit(0 if all([check(path) for path in cfg.check]) else 1)
    query = " ".join(cfg.words)
    if not query:
        for path in sorted(QUESTIONS.glob("*.toml")):
            table, found = read(path)
            print(f"{found[0]['id']:>5} … {found[-1]['id']:<5} {len(found):>4}  {table.get('title_en', path.stem)} · {table.get('title_zh', '')}")
        return print("\nAsk in your own words, or by number: python -m nanollm.ask Q98")
    found, fits = search(query)
    if not found:
        raise UserError(f"nothing is known about {query!r}; `python -m nanollm.ask` lists the stages, docs/questions/ holds the entries")
    lang = cfg.lang or ("en" if re.fullmatch(r"[Qq]\d+", query.strip()) else "zh" if re.search(r"[\u4e00-\u9fff]", query) else "en")
    if not fits:
        print({"en": "No question fits these words well. The nearest:", "zh": "没有很合适的问题。最接近的："}[lang])
        return print("\n".join(f"  {entry['id']:<5} {entry[lang]}" for entry in found))
    print(shown(found[0], lang))
    if found[1:]:
        print("\n" + ("别的近似问题：" if lang == "zh" else "Near it:"))
        print("\n".join(f"  {entry['id']:<5} {entry[lang]}" for entry in found[1:]))
    for command in demonstrations(found[0]):
        offer = f"\n{'现在运行？' if lang == 'zh' else 'Run it now?'} {spoken(command)} [y/N] "
        if cfg.run or sys.stdin.isatty() and input(offer).strip().lower() in ("y", "yes"):
            subprocess.run(command, cwd=ROOT)


if __name__ == "__main__":
    run(main, Config, __doc__)
