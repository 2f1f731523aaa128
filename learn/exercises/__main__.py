"""Exercises: fill in a function, have it judged.

    python -m learn.exercises                              the list, and which are solved
    python -m learn.exercises 05                           judge learn/exercises/05_attention.py
    python -m learn.exercises 05 --file my_attempt.py      judge another file

Exit code 0: solved. 1: not yet. 2: wrong usage.
"""
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from learn.exercises.judge import HERE, NAMES, Blank, judge
from nanollm.config import UserError, arg, run


@dataclass
class Config:
    exercise: str = arg("", "its number or topic; empty: list all")
    file: str = arg("", "the attempt; empty: the exercise's own file")
    limit: int = arg(60, "stop an attempt that runs longer", unit="seconds", least=1)
    first = "exercise"


def find(wanted):
    """The exercise that "5", "05", "attention" or "05_attention" means."""
    for name in NAMES:
        number, topic = name.split("_", 1)
        if wanted in (name, topic, number, str(int(number))):
            return name
    raise UserError(f"there is no exercise {wanted}; there are {NAMES[0][:2]} to {NAMES[-1][:2]}, and python -m learn.exercises lists them")


def stopwatch(seconds, name, file):
    """Ends the process with a sentence when an attempt runs on and on; .cancel() it. The main thread cannot be interrupted on every
    system, so a second one watches, and says at which line of the learner's file the first one is."""
    main = threading.get_ident()

    def stop():
        frame, line = sys._current_frames()[main], None
        while frame:
            line = line or (frame.f_lineno if Path(frame.f_code.co_filename) == file else None)
            frame = frame.f_back
        where = f" at {file.name}:{line}" if line else ""
        print(f"  no   {name} has run for {seconds} seconds and was stopped{where}: does a loop never end?", flush=True)
        os._exit(1)
    watch = threading.Timer(seconds, stop)
    watch.daemon = True
    watch.start()
    return watch


def title(name):
    return (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()[0].strip('"')


def main(cfg):
    if not cfg.exercise:
        solved = 0
        for name in NAMES:
            watch = stopwatch(cfg.limit, name, HERE / f"{name}.py")
            hint = judge(name)[1]
            watch.cancel()
            solved += hint is None
            state = "solved" if hint is None else "" if isinstance(hint, Blank) else "begun"
            print(f"{state:>8}  {title(name)}", flush=True)
        print(f"\n{solved} of {len(NAMES)} solved. Open learn/exercises/NN_topic.py, write, and run python -m learn.exercises NN")
        return
    name = find(cfg.exercise)
    file = Path(cfg.file).resolve() if cfg.file else HERE / f"{name}.py"
    if not file.is_file():
        raise UserError(f"--file {cfg.file} does not exist; name the Python file with your attempt")
    print(f"{title(name)}\n", flush=True)
    watch = stopwatch(cfg.limit, name, file)
    passed, hint = judge(name, file)
    watch.cancel()
    for line in passed:
        print(f"  yes  {line}")
    if hint:
        print(f"  no   {hint}")
        sys.exit(1)
    print("\nsolved")


if __name__ == "__main__":
    run(main, Config, __doc__)
