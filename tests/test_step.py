"""nanollm/tools/step.py: what runs/speedrun.sh is made of."""
import json
import os

from nanollm.tools import step


def write_marker(path):
    return ["-c", f"open({str(path)!r}, 'a', encoding='utf-8').write('x')"]


def test_a_finished_step_is_skipped_and_a_changed_one_makes_later_ones_stale(tmp_path):
    """The same command runs once; another command for the same stage runs, and what came after it runs again too."""
    first, second = tmp_path / "first", tmp_path / "second"
    for _ in range(2):
        assert step.main("a", tmp_path, write_marker(first)) == 0
        assert step.main("b", tmp_path, write_marker(second)) == 0
    assert first.read_text(encoding="utf-8") == second.read_text(encoding="utf-8") == "x"
    os.utime(tmp_path / "steps" / "b.json", ns=(2**62, 2**62))
    (tmp_path / "b" / "step_00000001").mkdir(parents=True)           # b is a training run made from what a left
    assert step.main("a", tmp_path, write_marker(tmp_path / "other")) == 0
    assert step.main("b", tmp_path, write_marker(second)) == 0
    assert second.read_text(encoding="utf-8") == "xx"
    assert (tmp_path / "b.old" / "step_00000001").is_dir() and not (tmp_path / "b").exists()


def test_an_interrupted_training_run_is_set_aside_when_an_earlier_step_changes(tmp_path):
    """It left checkpoints but no record of its end: going on from them would mix two roads."""
    assert step.main("a", tmp_path, write_marker(tmp_path / "one")) == 0
    assert step.main("b", tmp_path, ["-c", "import sys; sys.exit(3)"]) == 3
    (tmp_path / "b" / "step_00000001").mkdir(parents=True)
    assert step.main("a", tmp_path, write_marker(tmp_path / "two")) == 0
    assert (tmp_path / "b.old" / "step_00000001").is_dir() and not (tmp_path / "b").exists()


def test_the_seconds_of_a_step_are_those_of_all_its_tries(tmp_path):
    """Two tries that fail and one that ends well."""
    code = f"import pathlib, sys, time; p = pathlib.Path({str(tmp_path / 'tries')!r}); n = len(p.read_text()) if p.exists() else 0; " \
           "p.write_text('x' * (n + 1)); time.sleep(0.4); sys.exit(0 if n == 2 else 3)"
    assert [step.main("a", tmp_path, ["-c", code]) for _ in range(3)] == [3, 3, 0]
    record, = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text(encoding="utf-8").splitlines()]
    assert record["seconds"] >= 1.2 and not list((tmp_path / "steps").glob("*.begun"))


def test_a_failed_step_is_not_complete(tmp_path, capfd):
    """Its exit code is passed on, nothing is recorded, and the same command runs again."""
    for _ in range(2):
        assert step.main("a", tmp_path, ["-c", "import sys; sys.exit(3)"]) == 3
    assert not (tmp_path / "steps" / "a.json").exists() and not (tmp_path / "stages.jsonl").exists()


def test_a_step_waits_for_an_interrupted_child_to_save(tmp_path, monkeypatch):
    """Ctrl-C reaches parent and child alike; the parent must wait for the child to end in its own time."""
    real = step.subprocess.Popen.wait
    calls = []

    def wait(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(step.subprocess.Popen, "wait", wait)
    assert step.main("a", tmp_path, write_marker(tmp_path / "saved")) == 0
    assert (tmp_path / "saved").read_text(encoding="utf-8") == "x" and len(calls) == 2
