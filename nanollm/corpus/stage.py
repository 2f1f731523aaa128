"""A stage that is one piece of work (a tokenizer, the token files): written aside, renamed when whole, skipped when nothing
has changed. Stages that go over documents task by task are the driver's."""
import hashlib
import shutil
import time
from pathlib import Path

from nanollm.config import UserError
from nanollm.corpus import driver, io
from nanollm.corpus.parts import gather, read_report, write_json


def stage(cfg, name, documents, settings, code, work, goes_on=False):
    """Run work(directory) -> report for OUT/NAME, and rename the directory to that once it is whole.

    Skipped if that was done before: with the same settings, the same source of the modules `code` (so that an edited rule
    takes effect), and the same `documents` (parts.Parts, or None). With `goes_on`, work finds what an interrupted try has left,
    and tells by itself what of that still holds. OUT/report.json gathers the reports of all stages.
    """
    target = Path(cfg.out) / name
    aside, before = Path(f"{target}.tmp"), read_report(target)
    source = b"".join(Path(module.__file__).read_bytes() for module in code)
    signature = {"settings": settings, "code": hashlib.blake2b(source, digest_size=8).hexdigest(),
                 "documents": documents and documents.signature}
    if before and before["signature"] == signature and not cfg.force:
        print(f"{target.name}: {io.shown(target)} is complete, skipped (--force redoes it)")
        return
    if not before and target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"--out: {target} holds something that prepare_data.py did not write; choose another directory")
    try:
        if not goes_on:
            shutil.rmtree(aside, ignore_errors=True)      # the rest of an interrupted run
        aside.mkdir(parents=True, exist_ok=True)
        print(target.name, flush=True)
        start, driver._peaks[:] = time.time(), [0]
        report = work(aside)
        peak = max(*driver._peaks, driver.peak_rss_mb() or 0)
        report |= {"seconds": round(time.time() - start, 2), "peak_rss_mb": peak, "signature": signature}
        write_json(aside / "report.json", report)
        driver.swap(aside, target)
    except OSError as e:
        raise UserError(f"--out: cannot write {aside}: {e.strerror or e}; mend that and run the same command again") from None
    print(f"  {report['seconds']:.1f} s, peak memory {report['peak_rss_mb']} MB -> {io.shown(target)}", flush=True)
    if name:
        gather(cfg.out)
