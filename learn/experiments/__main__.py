"""Runs the experiments that are named, one after another, and holds their figures against the stored ones.

    python -m learn.experiments                                the list: what each asks
    python -m learn.experiments no_warmup no_scaling           these two, two minutes and a half on one core
    python -m learn.experiments all                            all, about three quarters of an hour on one core
    python -m learn.experiments all --scale 0.02 --seeds 1     do they all run
"""
import ast
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def question(name):
    """The first line of an experiment's docstring."""
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))).splitlines()[0]


def main():
    if "--help" in sys.argv or "-h" in sys.argv:
        return print(__doc__)
    known = sorted(p.stem for p in HERE.glob("[a-z]*.py"))
    chosen = [word for word in sys.argv[1:] if word in known]
    options = [word for word in sys.argv[1:] if word not in (*known, "all")]
    takes_next = lambda word: word.startswith("--") and "=" not in word
    unknown = [word for i, word in enumerate(options) if not word.startswith("-") and not (i and takes_next(options[i - 1]))]
    if unknown:
        print(f"error: there is no experiment {unknown[0]}; there are {' '.join(known)}, and all", file=sys.stderr)
        sys.exit(2)
    if "all" in sys.argv[1:]:
        chosen = known
    if not chosen and options:
        print(f"error: {options[0]}: name an experiment, or all, before the options", file=sys.stderr)
        sys.exit(2)
    if not chosen:
        print("".join(f"{name:24}  {question(name)}\n" for name in known))
        return print(f"Run one: python -m learn.experiments {known[0]}\nAll {len(known)}, about three quarters of an hour on one core: python -m learn.experiments all")
    failed = []
    for i, name in enumerate(chosen, 1):
        print(f"[{i}/{len(chosen)}] {name}", flush=True)
        began = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"learn.experiments.{name}", *options]).returncode:
            failed.append(name)
        print(f"  {time.monotonic() - began:.0f} s\n", flush=True)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} as stored" + (f"; apart or failed: {' '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                                  # `… | head` has read enough
        os._exit(0)
    except KeyboardInterrupt:                                # said by the experiment itself
        sys.exit(130)
