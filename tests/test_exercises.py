"""The exercises: a blank is called blank, the project's own functions pass, and typical mistakes get the hint that helps."""
import inspect
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from learn.exercises import judge
from nanollm.config import UserError
from wrong_attempts import ALSO_RIGHT, ATTEMPTS

by_name = pytest.mark.parametrize("name", judge.NAMES)


def verdict(name, source, tmp_path):
    file = tmp_path / "attempt.py"
    file.write_text(source, encoding="utf-8")
    return judge.judge(name, file.resolve())


def test_there_are_23_exercises_each_with_its_checks():
    assert [name[:2] for name in judge.NAMES] == [f"{i:02d}" for i in range(1, 24)] == sorted(ATTEMPTS)
    assert [path.stem for path in sorted((judge.HERE / "checks").glob("*.py"))] == judge.NAMES


@by_name
def test_a_blank_is_told_that_it_is_blank(name):
    """As they lie in the repository; fill one in place and this test of yours turns red."""
    passed, hint = judge.judge(name)
    assert isinstance(hint, judge.Blank) and "still blank" in str(hint) and not passed


@by_name
def test_the_projects_own_function_passes(name):
    checks = judge.checks_of(name)
    attempt = checks.reference if inspect.isclass(checks.reference) else judge.untouched(checks.reference)
    for check in checks.CHECKS:
        check(attempt)


@by_name
def test_a_right_attempt_passes(name, tmp_path):
    """Written without a look at the project's function."""
    right = ATTEMPTS[name[:2]][0]
    for old, new in [("", ""), *ALSO_RIGHT.get(name[:2], [])]:
        assert old in right, old
        passed, hint = verdict(name, right.replace(old, new) if old else right, tmp_path)
        assert hint is None and len(passed) == len(judge.checks_of(name).CHECKS), f"{new!r}: {hint}"


@by_name
def test_five_typical_wrong_attempts_get_the_right_hint(name, tmp_path):
    right, wrong = ATTEMPTS[name[:2]]
    assert len(wrong) >= 5
    for old, new, words in wrong:
        assert right.count(old) >= 1 and words, (old, new)
        hint = verdict(name, right.replace(old, new), tmp_path)[1]
        assert hint and re.search(words, str(hint)), f"{old!r} -> {new!r}: {hint}"
        assert "\n" not in str(hint) and "Traceback" not in str(hint)


def test_every_exercise_says_its_task_in_both_languages_and_where_the_solution_is():
    for name in judge.NAMES:
        text = (judge.HERE / f"{name}.py").read_text(encoding="utf-8")
        assert text.startswith(f'"""{name[:2]}  ') and "\n中文：" in text and f"python -m learn.exercises {name[:2]}" in text, name
        assert re.search(r"solution: .*\s?.*(nanollm|train_pretrain)", text) and "# Hint 1" in text and "# Hint 2" in text, name


def test_errors_of_the_learner_are_one_sentence_with_file_and_line(tmp_path):
    for source, words in (("def rms_norm(x, weight, eps)\n    return x", "attempt.py:1: SyntaxError"),
                          ("def rms_norm(x, weight, eps):\n    return y", r"attempt.py:2: NameError.*`return y`"),
                          ("def rms_norm(x):\n    return x", "keep the name and the arguments"), ("def norm(x):\n    return x", "defines no rms_norm"),
                          ("def rms_norm(x, weight, eps):\n    pass", "`return` missing"),
                          ("def rms_norm(x, weight, eps):\n    return x.tolist()", "must be a torch.Tensor; it is of type list"),
                          ("import nothing_of_that_name", "ModuleNotFoundError"),
                          ("import sys\nsys.exit()", r"attempt.py:2: this ends the program.*`sys.exit\(\)`"),
                          ("def rms_norm(x, weight, eps):\n    return 2 * x / x.pow(2).mean(-1, keepdim=True).sqrt()",
                           "2 times too large"),
                          ("def rms_norm(x, weight, eps):\n    return x.sum(-1)",
                           r"wrong shape of the result: expected \(2, 4, 8\) \(B=2, T=4, C=8\), got \(2, 4\)")):
        hint = verdict("03_rmsnorm", source, tmp_path)[1]
        assert hint and re.search(words, str(hint)), (source, str(hint))


def test_generic_differences_are_named():
    import torch
    x = judge.randn(3, 4)
    for got, words in ((-x, "wrong sign"), (x / 3, "3 times too small"), (x + 2, r"\+2 away"), (x.T, "in another order"),
                       (x * float("nan"), "nan in 12 of 12"),
                       (x + torch.eye(3, 4), r"3 of 12 places, first at row=0, column=0")):
        with pytest.raises(judge.Hint, match=words):
            judge.same(got, x, axes="row column")


def test_an_exercise_is_found_by_number_and_topic():
    from learn.exercises.__main__ import find
    assert {find(word) for word in ("5", "05", "attention", "05_attention")} == {"05_attention"}
    with pytest.raises(UserError, match="there is no exercise 31; there are 01 to 23"):
        find("31")


def command(*words):
    result = subprocess.run([sys.executable, "-m", "learn.exercises", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    return result.returncode, result.stdout + result.stderr


def test_the_command_says_solved_or_not_yet_or_what_it_wants(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(ATTEMPTS["11"][0], encoding="utf-8")
    code, text = command("11", "--file", str(file))
    assert code == 0 and text.endswith("\nsolved\n") and text.count("  yes  ") == 4
    code, text = command("11")
    assert code == 1 and "  no   still blank: 11_cosine_schedule.py:" in text
    code, text = command("99")
    assert code == 2 and "there is no exercise 99" in text


def test_an_attempt_that_never_ends_is_stopped(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def lr_at(it, peak, low, warmup, total):\n    while True:\n        it += 1\n", encoding="utf-8")
    code, text = command("11", "--file", str(file), "--limit", "1")
    assert code == 1 and re.search(r"has run for 1 seconds and was stopped at mine.py:[23]: does a loop never end", text)


def test_the_list_says_which_are_solved(capsys, monkeypatch):
    from learn.exercises import __main__ as program
    verdicts = {"03_rmsnorm": ([], None), "04_rope": ([], judge.Hint("no"))}
    monkeypatch.setattr(program, "judge", lambda name: verdicts.get(name, ([], judge.Blank("still blank"))))
    program.main(program.Config())
    text = capsys.readouterr().out
    assert "  solved  03  RMSNorm" in text and "   begun  04  RoPE" in text and "          05  Causal" in text and "1 of 23 solved" in text
