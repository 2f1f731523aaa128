"""metrics.jsonl over kills and resumes, and what a terminal shows."""
import io
import json
import sys

import pytest

from nanollm.checkpoint import Progress
from nanollm.log import Logger


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def run(tmp_path):
    """A run of six steps with Chinese samples; one holds U+2028, which Python takes for the end of a line and JSON does not."""
    log = Logger(tmp_path, True, Progress(), 10)
    for step in range(7):
        log(step, {"val/loss": 1.0 * step, "samples": [{"prompt": "问", "text": "小明\u2028在公园"}]})
    return tmp_path


def test_a_resume_keeps_what_was_logged_up_to_its_step(run):
    Logger(run, True, Progress(step=4, evaluated=4), 10)
    assert [r["step"] for r in records(run)] == [0, 1, 2, 3, 4] and records(run)[4]["samples"][0]["text"] == "小明\u2028在公园"


def test_a_line_cut_inside_a_character_is_dropped(run):
    """A kill or a full disk in the middle of a Chinese sample."""
    raw = (run / "metrics.jsonl").read_bytes()
    cut = raw.rstrip(b"\n")[:-8]
    assert cut.decode("utf-8", errors="replace").endswith("\ufffd")
    (run / "metrics.jsonl").write_bytes(cut)
    Logger(run, True, Progress(step=6, evaluated=6), 10)
    assert [r["step"] for r in records(run)] == [0, 1, 2, 3, 4, 5]


def test_a_resume_at_step_0_keeps_its_evaluation_and_a_fresh_run_starts_an_empty_file(run):
    Logger(run, True, Progress(step=0, evaluated=0), 10)
    assert [r["step"] for r in records(run)] == [0]
    Logger(run, True, Progress(), 10)
    assert records(run) == []


def test_on_a_terminal_a_live_line_stands_between_two_lines_of_the_log(tmp_path, monkeypatch):
    """With an ETA, and wiped away by the next line; in a file there is none."""
    screen = io.StringIO()
    log = Logger(tmp_path, True, Progress(), 10)
    monkeypatch.setattr(sys, "stdout", screen)
    log.live(Progress(step=3))
    assert screen.getvalue() == ""
    screen.isatty = lambda: True
    log.live(Progress(step=3))
    log.event(3, "something happened")
    assert screen.getvalue().startswith("\rstep 3/10 | eta ") and screen.getvalue().endswith("\r\033[Kstep 3: something happened\n")


def test_tensorboard_keeps_the_evaluation_of_the_step_that_a_run_resumed_from(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for at, steps in ((Progress(), range(1, 7)), (Progress(step=4, evaluated=4), range(5, 9))):
        log = Logger(tmp_path, True, at, 10, tensorboard=True)
        for step in steps:
            log(step, {"val/loss": 1.0 * step})
        log.board.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("val/loss")] == list(range(1, 9))
