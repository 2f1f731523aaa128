"""A stage of data preparation: run once, written aside, renamed when whole, skipped when nothing has changed."""
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

from nanollm.config import UserError
from nanollm.corpus import io

STAGES = ("clean", "dedup", "tokenizer", "tokens")


def stage(cfg, name, inputs, settings, code, work):
    """Run work(directory) -> report for OUT/NAME, and rename the directory to that once it is whole.

    Skipped if that was done before: with the same settings, the same source of the modules `code` (so that an edited
    rule takes effect), and input files of the same size and time, as its report.json remembers. OUT/report.json
    gathers the reports of all stages.
    """
    target = Path(cfg.out) / name
    aside, before = Path(f"{target}.tmp"), read_report(target)
    source = b"".join(Path(module.__file__).read_bytes() for module in code)
    signature = {"settings": settings, "code": hashlib.blake2b(source, digest_size=8).hexdigest(),
                 "inputs": [[io.shown(p), p.stat().st_size, p.stat().st_mtime_ns] for p in inputs]}
    if before and before["signature"] == signature and not cfg.force:
        print(f"{target.name}: {io.shown(target)} is complete, skipped (--force redoes it)")
        return
    if not before and target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"--out: {target} holds something that prepare_data.py did not write; choose another directory")
    try:
        shutil.rmtree(aside, ignore_errors=True)          # the rest of an interrupted run
        aside.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--out: cannot make the directory {aside}: {e.strerror}") from None
    print(target.name, flush=True)
    start = time.time()
    report = work(aside)
    report |= {"seconds": round(time.time() - start, 2), "peak_rss_mb": peak_rss_mb(), "signature": signature}
    write_report(aside, report)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    print(f"  {report['seconds']:.1f} s, peak memory {report['peak_rss_mb']} MB -> {io.shown(target)}", flush=True)
    if name:
        write_report(Path(cfg.out), {s: report for s in STAGES if (report := read_report(Path(cfg.out) / s))})


def read_report(directory):
    """The report.json a stage has left in `directory`, or None: then the directory is not one of ours."""
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        return report if "signature" in report else None
    except (OSError, ValueError):
        return None


def write_report(directory, report):
    (directory / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def peak_rss_mb():
    """The most memory this process has held so far, in MB; None on Windows, which does not tell."""
    if sys.platform == "win32":
        return None
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10)))
