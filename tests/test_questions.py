"""The notes' questions and errors: every entry against the code, every quoted figure against its stored run."""
import json
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from nanollm import ask
from nanollm.config import UserError

FILES = sorted(ask.QUESTIONS.glob("*.toml")) + sorted(ask.ERRATA.glob("*.toml"))
STARRED = ("E1 E10 E11 E12 E18 E19 E23 E30 E33 E37 E40 E46 E54 E66 E67 E76 E77 E94 E99 E108 E112 E113 E116 E129 "
           "E138 E139 E140 E141 E156 E161 E165 E175 E176 E183 E188 E206 E228 E233 E234").split()


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_each_entry_holds_against_the_code(path):
    """Its function, tests and experiment exist, its figures stand in the stored run, its answer is short, in both languages."""
    table, found = ask.read(path)
    assert found and table["title_en"] and table["title_zh"]
    assert [fault for entry in found for fault in ask.faults(entry)] == []
    assert [e["id"] for e in found] == sorted((e["id"] for e in found), key=lambda i: int(i[1:])), "in the order of their numbers"


def test_every_question_of_the_notes_is_answered():
    """272 of 272, each once; at most a fifth by argument alone, and each of those says why nothing is run."""
    found = ask.entries()
    assert [e["id"] for e in found] == [f"Q{i}" for i in range(1, 273)]
    tests = [e for e in found if e.get("tests")]
    experiments = [e for e in found if e.get("experiment")]
    argued = [e for e in found if not e.get("tests") and not e.get("experiment")]
    print(f"\n{len(found)} of 272 questions: {len(tests)} by test, {len(experiments)} by experiment ({len([e for e in tests if e in experiments])} by both), "
          f"{len(argued)} by argument only ({len(argued) / len(found):.0%}); "
          + ", ".join(f"{verdict} {sum(e['verdict'] == verdict for e in found)}" for verdict in ask.VERDICTS))
    assert len(argued) <= len(found) / 5
    assert all(e["argument_en"] and e["argument_zh"] for e in argued)


def test_every_starred_error_is_corrected():
    ids = [e["id"] for e in ask.entries(ask.ERRATA)]
    assert len(ids) == len(set(ids)) and set(STARRED) <= set(ids), set(STARRED) - set(ids)
    assert set(STARRED) == {e["id"] for e in ask.entries(ask.ERRATA) if e["star"]}


def test_every_experiment_answers_a_question_and_is_stored():
    """None stands alone: its result, its picture and an entry that quotes or links it."""
    for path in sorted((ROOT / "learn" / "experiments").glob("[a-z]*.py")):
        stored = json.loads((ask.RESULTS / f"{path.stem}.json").read_text(encoding="utf-8"))
        assert stored["scale"] == 1 and stored["figures"] and stored["claims"] and stored["seconds"] <= 120, path.stem
        assert (ROOT / "docs" / "images" / "learn" / f"{path.stem}.png").stat().st_size < 150_000
        assert any(e.get("experiment") == path.stem for e in ask.entries()), f"no question is answered by {path.stem}"


@pytest.mark.parametrize("query, known", [("为什么要 warmup", "Q98"), ("why is there a warmup", "Q98"), ("为什么要预热", "Q98"), ("why pad on the left", "Q63"), ("q0143", "Q143"), ("143", "Q143"),
                                          ("奖励黑客", "Q198"), ("what is grokking", "Q113"), ("梯度累积有什么用", "Q156")])
def test_a_question_is_found_in_plain_words_of_either_language(query, known):
    found, fits = ask.search(query)
    assert fits and found[0]["id"] == known, [e["id"] for e in found]


def test_what_cannot_be_found_is_said(capsys):
    with pytest.raises(UserError, match="no question Q999; they go from Q1 to Q272"):
        ask.search("Q999")
    with pytest.raises(UserError, match="nothing is known about 'xyzzy'"):
        ask.main(ask.Config(words=["xyzzy"]))


def test_an_answer_tells_its_verdict_and_its_demonstration(capsys, monkeypatch):
    """And offers to run it: asked on a terminal, at once with --run, never without being asked."""
    ran = []
    monkeypatch.setattr(ask.subprocess, "run", lambda command, cwd: ran.append(command[1:]))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    ask.main(ask.Config(words=["Q98"]))
    said = capsys.readouterr().out
    assert said.startswith("Q98  ") and "The notes are" in said and "python -m learn.experiments.no_warmup" in said and not ran
    ask.main(ask.Config(words=["Q98"], lang="zh", run=True))
    assert "笔记" in capsys.readouterr().out and ["-m", "learn.experiments.no_warmup"] in ran
    ran.clear()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for reply, runs in (("", 0), ("n", 0), ("y", 1)):
        monkeypatch.setattr("builtins.input", lambda prompt: reply)
        ask.main(ask.Config(words=["Q98"]))
        assert bool(ran) == bool(runs)


def test_a_figure_comes_from_the_stored_run_and_from_nowhere_else(monkeypatch):
    monkeypatch.setattr(ask, "figures", lambda experiment: {"loss": 1.23456, "hit": 0.5, "tokens": 12345.6})
    assert ask.filled("a {x/loss} b {x/hit:.0%} c {x/tokens}") == "a 1.23 b 50% c 12,346"
    with pytest.raises(UserError, match="no such figure; it has loss"):
        ask.filled("{x/lost}")


GOOD = {"id": "Q1", "en": "a", "zh": "b", "verdict": "right", "place": ["001:1"], "answer_en": "a", "answer_zh": "b", "code": ["nanollm.optim:get_lr"],
        "tests": ["tests/test_optim.py::test_muon_lowers_a_loss"]}


@pytest.mark.parametrize("change, said", [
    ({"code": ["nanollm.optim:get_rl"]}, "get_rl"), ({"tests": ["tests/test_optim.py::test_nothing"]}, "no test"), ({"experiment": "none_such"}, "no experiment none_such"),
    ({"verdict": "true"}, "verdict true"), ({"place": ["S1:3"]}, "write file:line"), ({"answer_en": "word " * 121}, "121 words"), ({"answer_zh": "字" * 241}, "120 words"),
    ({"tests": []}, "neither tests"), ({"argument_en": "x"}, "belong together"), ({"colour": 1}, "no key of an entry"), ({"code": []}, "no code"),
    ({"answer_en": "{no_warmup/height}"}, "no such figure")])
def test_a_fault_of_an_entry_is_named(change, said):
    assert ask.faults(GOOD) == []
    assert any(said in fault for fault in ask.faults(GOOD | change)), ask.faults(GOOD | change)
    missing = {k: v for k, v in GOOD.items() if k not in change or k in ("id",)}
    assert "colour" in change or "experiment" in change or "argument_en" in change or missing == GOOD or ask.faults(missing)


@pytest.mark.parametrize("see, holds", [("Q98", True), ("Q999", False), ("tests/test_optim.py::test_muon_lowers_a_loss", True), ("tests/test_optim.py", False), ("experiment no_warmup", True),
                                        ("python -m nanollm.plan --dim 512", True), ("python -m nothing.there", False), ("python train_sft.py --help", True), ("python -c 'print(1)'", True)])
def test_what_an_erratum_points_at_must_be_there(see, holds):
    erratum = {"id": "E1", "star": False, "place": ["001:1"], "printed_en": "a", "printed_zh": "a", "right_en": "a", "right_zh": "a", "see": [see]}
    assert bool(ask.faults(erratum)) != holds


def test_a_file_that_holds_no_entries_is_refused_in_one_sentence(tmp_path):
    for content in (b"\xff\xfe", b"question = 3", b"[[question]]\nen = 1"):
        (tmp_path / "x.toml").write_bytes(content)
        with pytest.raises(UserError, match="x.toml"):
            ask.check(tmp_path / "x.toml")


def test_the_command_answers_and_refuses():
    run = lambda *words: subprocess.run([sys.executable, "-m", "nanollm.ask", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    assert run("Q98").stdout.startswith("Q98  ")
    assert re.search(r"Q1 +… Q\d+", run().stdout)
    bad = run("Q998")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr and "Q998" in bad.stderr
