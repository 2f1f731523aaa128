"""The driver: carries documents through table functions, many tasks at a time, and can be stopped at any moment.

A stage is a list of pure functions fn(table, cfg) -> table over Arrow tables: rows in = rows out, and a row to be dropped
gets a `drop_reason`. The driver does the rest: it cuts the input into tasks that depend only on the input, gives each to a
worker process that streams tables of at most 1,024 documents or 16 MiB, and writes one part and one JSON sidecar a task,
aside and then renamed. A task is done if its sidecar names the same settings, code and input; so a run that was killed goes
on where it was, and the parts are the same bytes for any number of workers, shards or tries.
"""
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanollm.config import UserError
from nanollm.corpus import io, page, parts
from nanollm.corpus.parts import BYTES, DROPPED, ROWS, SCHEMA

RAW = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("meta", pa.string()),
                 ("drop_reason", pa.string())])


@dataclass(frozen=True)
class PartTask:
    """A task of a stage that reads another stage: one of its parts."""
    number: int
    path: str
    first: int                            # the number of its first document in the whole corpus
    bytes: int
    blake2b: str                          # of its contents: the signature of this input


@dataclass(frozen=True)
class Job:
    """What a worker gets: a task, what to do with its tables, and where the part goes."""
    task: io.Task | PartTask
    steps: tuple                          # of (function, cfg)
    out: str
    signature: str
    keep_dropped: bool = True
    show: int = 3                         # examples to keep for each reason
    fail_fast: bool = False


def part_tasks(source):
    """One task for each part of a finished stage (parts.Parts)."""
    hashes = [read_sidecar(path)["blake2b"] for path in source.paths]
    return [PartTask(i, str(path), int(source.first[i]), path.stat().st_size, h) for i, (path, h) in enumerate(zip(source.paths, hashes))]


# ---- one task: runs in a worker ---------------------------------------------------------------------------------------

def tables_of(task, bad, moved):
    """The input of a task as tables of at most 1,024 documents or 16 MiB of text."""
    if isinstance(task, PartTask):
        yield from parts.read_tables(task.path, task.first)
        return
    rows, size = [], 0
    for row in io.documents(task, bad, moved):
        rows.append(row)
        size += len(row["text"].encode("utf-8")) + len(row["meta"])
        if len(rows) == ROWS or size >= BYTES:
            yield pa.Table.from_pylist(rows, schema=RAW)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=RAW)


def run_job(job):
    """Carry one task through; returns its sidecar. The same bytes every time."""
    stem = Path(job.out) / f"part-{job.task.number:05d}"
    file = io.shown(job.task.path)
    counts, examples, quarantined, first_bad = Counter(), {}, Counter(), []
    quarantine = Path(f"{stem}.quarantine.{os.getpid()}.tmp")
    kept = parts.Writer(f"{stem}.parquet")
    gone = parts.Writer(f"{stem}.dropped.parquet", DROPPED) if job.keep_dropped else None
    begun = last = 0

    with open(quarantine, "w", encoding="utf-8", newline="\n") as bad_file:
        def bad(line, reason, head=b"", error=""):
            row = {"file": file, "line": line, "reason": reason, "error": str(error), "head": head[:200].decode("utf-8", "backslashreplace")}
            io.write_row(bad_file, row)
            quarantined[reason] += 1
            first_bad.extend([row] * (len(first_bad) < 3))
            if job.fail_fast:
                raise UserError(f"{file}:{line}: {reason} {row['error'] or row['head']!r} (--fail_fast)")

        def moved(position):
            nonlocal last
            advance(bytes=position - last)
            last = position

        for table in tables_of(job.task, bad, moved):
            before = table
            for function, cfg in job.steps:
                table = function(table, cfg)
            reasons = table["drop_reason"] if "drop_reason" in table.column_names else pa.nulls(table.num_rows, pa.string())
            stay = pc.is_null(reasons)
            out, drop = table.filter(stay), table.filter(pc.invert(stay))
            kept.write(out)
            if gone and drop.num_rows:                   # as they were before this stage edited them
                gone.write(drop.set_column(drop.column_names.index("text"), "text", before["text"].filter(pc.invert(stay))))
            tally(counts, before, out, drop)
            for name in set(drop["drop_reason"].to_pylist()) if drop.num_rows else ():
                some = examples.setdefault(name, [])
                if len(some) < job.show:
                    rows = drop.filter(pc.equal(drop["drop_reason"], name)).slice(0, job.show - len(some)).to_pylist()
                    some += [{k: row[k] for k in ("id", "dup_of", "jaccard") if row.get(k)} | {"text": row["text"][:200]} for row in rows]
            if isinstance(job.task, PartTask):
                begun += table.num_rows
            advance(docs=table.num_rows, kept=out.num_rows)
    kept.close()
    if gone:
        gone.close()
    stale = [f"{stem}.dropped.parquet"] * (not gone) + [f"{stem}.quarantine.jsonl"] * (not quarantined)      # of other settings
    for path in map(Path, stale):
        path.unlink(missing_ok=True)
    parts.publish(quarantine, f"{stem}.quarantine.jsonl") if quarantined else quarantine.unlink()
    advance(bytes=job.task.bytes - last)
    sidecar = {"signature": job.signature, "task": asdict(job.task) | {"path": file}, "counts": nested(counts),
               "quarantined": dict(sorted(quarantined.items())), "first_bad": first_bad, "examples": dict(sorted(examples.items())),
               "blake2b": file_hash(kept.path)}
    parts.write_json(f"{stem}.json", sidecar)
    return sidecar


def tally(counts, before, out, drop):
    """Count one table: documents, characters, reasons, edits, languages, sources, lengths (by powers of two)."""
    chars = lambda column: int(pc.sum(pc.utf8_length(column)).as_py() or 0)
    counts.update({("in",): before.num_rows, ("chars_in",): chars(before["text"]), ("kept",): out.num_rows, ("chars",): chars(out["text"])})
    if drop.num_rows:
        counts.update({("dropped", name): n for name, n in Counter(drop["drop_reason"].to_pylist()).items()})
    counts.update({("sources", name): n for name, n in Counter(out["source"].to_pylist()).items()})
    if "lang" in out.column_names:
        counts.update({("lang", name or "?"): n for name, n in Counter(out["lang"].to_pylist()).items()})
    if "edits" in out.column_names:
        edits = [e for e in out["edits"].to_pylist() if e]
        counts[("changed",)] += len(edits)
        counts.update(("edited", name) for e in edits for name in e.split(","))
    if "quality" in out.column_names and out["quality"].null_count < out.num_rows:
        tenths, n = np.unique(np.floor(out["quality"].drop_null().to_numpy() * 10).astype(int), return_counts=True)
        counts.update({("quality", f"{t / 10:.1f}"): k for t, k in zip(tenths.tolist(), n.tolist())})
    lengths = np.asarray(pc.utf8_length(out["text"]), dtype=np.int64)
    powers, n = np.unique(np.ceil(np.log2(lengths + 1)).astype(int), return_counts=True)
    counts.update({("lengths", str(1 << max(p - 1, 0))): k for p, k in zip(powers.tolist(), n.tolist())})


def nested(counts):
    """{("dropped", "too_short"): 3} -> {"dropped": {"too_short": 3}}, in a fixed order."""
    tree = {"in": 0, "chars_in": 0, "kept": 0, "chars": 0, "dropped": {}}
    for key in sorted(counts):
        if len(key) == 2:
            tree.setdefault(key[0], {})[key[1]] = int(counts[key])
        else:
            tree[key[0]] = int(counts[key])
    return tree


def merge(sidecars):
    """The counts of all tasks added up."""
    total = Counter()
    for sidecar in sidecars:
        for name, value in sidecar["counts"].items():
            total.update({(name, k): n for k, n in value.items()} if isinstance(value, dict) else {(name,): value})
    return nested(total)


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# ---- many tasks -------------------------------------------------------------------------------------------------------

_shared = None                            # in a worker: bytes, documents and kept documents so far, of all workers
_peaks = [0]                              # in the parent: the most memory, in MB, that it and its workers have told of in this stage


def _enter(shared, parent):
    """A worker begins: Ctrl-C is the parent's business, and if the parent is killed, so is the worker."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pa.set_cpu_count(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def advance(bytes=0, docs=0, kept=0):
    """A worker tells how far it has come."""
    if _shared is not None:
        with _shared.get_lock():
            for i, n in enumerate((bytes, docs, kept)):
                _shared[i] += n


def run(function, items, label="", workers=0, runner="local", total=None, seen=lambda result: None, keep=True):
    """[function(item) for item in items], in parallel and in order; function at module level, items picklable.

    `workers` 0 takes every core. `seen(result)` is called as results come, in any order, and may raise to stop; without
    `keep` that is all that is done with them. With `total` bytes the bar counts what `advance` tells, else items.
    UserError if a worker dies or the disk is full."""
    global _shared
    if runner == "ray":
        from nanollm.corpus import on_ray
        return on_ray.run(function, items, label, seen, keep)
    workers = min(workers or os.cpu_count() or 1, len(items))
    context = multiprocessing.get_context("spawn")       # fork would copy the locks of arrow's threads and deadlock
    before, _shared = _shared, context.Array("q", 3)
    bar = io.progress(total=total or len(items), desc=label, **({"unit": "B", "unit_scale": True} if total else {"unit": " parts"}))
    try:
        if workers <= 1:
            results = [watched(function, item, bar, bool(total), seen, keep) for item in items]
            return results if keep else None
        with ProcessPoolExecutor(workers, context, _enter, (_shared, os.getpid())) as pool:
            places = {pool.submit(with_peak, function, item): i for i, item in enumerate(items)}
            results, left = [None] * len(items), set(places)
            try:
                while left:
                    done, left = wait(left, 0.5, FIRST_COMPLETED)
                    show(bar, bool(total), len(done))
                    while done:
                        future = done.pop()
                        at, (result, peak) = places.pop(future), future.result()
                        _peaks.append(peak)
                        results[at] = result if keep else None
                        seen(result)
            except BaseException:                        # Ctrl-C, a full disk, a broken file: stop the others at once
                for child in multiprocessing.active_children():
                    child.kill()
                raise
            return results if keep else None
    except BrokenProcessPool:
        raise UserError(f"{label}: a worker process died (killed, or out of memory); what is finished is kept: run the same command again, "
                        "perhaps with fewer --workers") from None
    except OSError as e:
        raise trouble(label, e) from None
    finally:
        bar.close()
        _shared = before


def with_peak(function, item):
    """(function(item), the most memory that this worker has held so far, in MB)."""
    return function(item), peak_rss_mb() or 0


def trouble(label, e):
    """What a full disk (or a broken one, or a second process on the same directory) is to the user."""
    if isinstance(e, FileNotFoundError):
        return UserError(f"{label}: {e.filename} has vanished: another process has worked on the same directory; run the same command again")
    return UserError(f"{label}: {e}; what is finished is kept: mend that and run the same command again")


def watched(function, item, bar, by_bytes, seen, keep):
    """One item in this process, with the bar kept moving by a thread."""
    stop = threading.Event()

    def tick():
        while not stop.wait(0.5):
            show(bar, by_bytes, 0)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        result = function(item)
        seen(result)
        return result if keep else None
    finally:
        stop.set()
        thread.join()
        show(bar, by_bytes, 1)
        _peaks.append(peak_rss_mb() or 0)


def show(bar, by_bytes, items):
    moved, docs, kept = _shared[:] if _shared is not None else (0, 0, 0)
    if docs:
        bar.set_postfix_str(f"{docs / max(time.time() - bar.start_t, 1e-9):,.0f} docs/s, kept {kept / docs:.1%}", refresh=False)
    bar.update(moved - bar.n if by_bytes else items)


def work_of(cfg, name):
    """OUT/NAME.work, where a stage gathers what it needs; empty with --force."""
    work = Path(cfg.out) / f"{name}.work"
    if cfg.force:
        shutil.rmtree(work, ignore_errors=True)
    return work


def runner_of(cfg):
    """`run` with the number of workers and the place that the command line says."""
    return partial(run, workers=cfg.workers, runner=cfg.runner)


def signature_of(settings, code, *more):
    """A hash of settings, of the source of modules, and of what else decides what is written."""
    sources = [hashlib.blake2b(Path(module.__file__).read_bytes(), digest_size=8).hexdigest() for module in code]
    return hashlib.blake2b(json.dumps([settings, sources, *more], sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def run_stage(cfg, name, tasks, steps, settings, code, extra=lambda: {}):
    """Carry `tasks` through the steps [(function, cfg)] that `steps()` returns into OUT/NAME; returns the report, or None
    if other shards are still to come.

    Skips what is done. `settings` and the source of the modules `code` decide what "done" means. `extra()` adds to the
    report when all parts are there. The work is done in OUT/NAME.tmp, so what was in OUT/NAME before stays until all is
    well; parts of it that still hold are linked over."""
    target = Path(cfg.out) / name
    aside = Path(f"{target}.tmp")
    claim(target)
    basis = signature_of(settings, code, cfg.keep_dropped)
    signatures = [signature_of(basis, [], asdict(task)) for task in tasks]
    whole = hashlib.blake2b("".join(signatures).encode(), digest_size=16).hexdigest()
    before = parts.read_report(target)
    whole_before = [is_done(target, i, signature) and not cfg.force for i, signature in enumerate(signatures)]
    if before and before["signature"] == whole and all(whole_before):
        print(f"{name}: {io.shown(target)} is complete, skipped (--force redoes it)")
        return before
    claim(aside)
    for i, holds in enumerate(whole_before):
        if holds and not is_done(aside, i, signatures[i]):
            link(target, aside, i)
    todo = [i for i in range(len(tasks)) if cfg.force or not is_done(aside, i, signatures[i])]
    shard, of = shard_of(cfg.shard)
    mine = [i for i in todo if i % of == shard]
    print(name + (f": {len(tasks) - len(todo)} of {len(tasks)} tasks were done before" if 0 < len(todo) < len(tasks) else "")
          + (f": shard {cfg.shard}, {len(mine)} tasks" if of > 1 else ""), flush=True)
    start, _peaks[:] = time.time(), [peak_rss_mb() or 0]
    try:
        todo_steps = tuple(steps())
    except OSError as e:
        raise trouble(name, e) from None
    jobs = [Job(tasks[i], todo_steps, str(aside), signatures[i], cfg.keep_dropped, cfg.show, cfg.fail_fast) for i in mine]
    docs = []
    run(run_job, jobs, name, cfg.workers, cfg.runner, sum(job.task.bytes for job in jobs), lambda s: docs.append(s["counts"]["in"]), keep=False)
    missing = [i for i in range(len(tasks)) if not is_done(aside, i, signatures[i])]
    if of > 1:                                            # of several launchers none knows that it is the last
        print(f"  {len(missing)} of {len(tasks)} tasks are left; when all shards are done, the same command without --shard finishes the stage", flush=True)
        return None
    try:
        report = finish(cfg, name, aside, len(tasks), whole, settings, time.time() - start, sum(docs), extra)
        swap(aside, target)
        parts.gather(cfg.out)
    except OSError as e:
        raise trouble(name, e) from None
    print("\n".join(page.lines(name, report)) + f"\n  -> {io.shown(target)}", flush=True)
    return report


def swap(aside, target):
    """`aside` becomes `target`. Another process that has just done the same may have taken it: then all is well already."""
    mine, old = Path(f"{target}.{os.getpid()}.new"), Path(f"{target}.{os.getpid()}.old")
    try:
        aside.rename(mine)
        if target.exists():
            target.rename(old)
        mine.rename(target)
    except FileNotFoundError:
        if parts.read_report(target) is None:
            raise
    shutil.rmtree(old, ignore_errors=True)


def finish(cfg, name, target, n, signature, settings, seconds, docs, extra):
    """All parts are there: add up the sidecars, write report.html, quarantine.jsonl and, last, report.json; returns that."""
    stems = {f"part-{i:05d}": i for i in range(n)}
    for path in target.iterdir():                        # parts of an earlier plan, what a kill has left, what was exported of them
        if path.suffix == ".tmp" or path.name in parts.EXPORTS or path.name.startswith("part-") and path.name.split(".")[0] not in stems:
            path.unlink()
    sidecars = [read_sidecar(target / f"{stem}.parquet") for stem in stems]
    report = merge(sidecars)
    report["quarantined"] = dict(sorted(sum((Counter(s["quarantined"]) for s in sidecars), Counter()).items()))
    first_bad = [row for s in sidecars for row in s["first_bad"]][:3]
    with open(target / "quarantine.jsonl.tmp", "wb") as f:
        for stem, s in zip(stems, sidecars):
            f.write((target / f"{stem}.quarantine.jsonl").read_bytes() if s["quarantined"] else b"")
    os.replace(target / "quarantine.jsonl.tmp", target / "quarantine.jsonl")
    report["examples"] = {}
    for s in sidecars:
        for reason, rows in s["examples"].items():
            report["examples"].setdefault(reason, []).extend(rows)
            del report["examples"][reason][max(cfg.show, 0):]
    bad = sum(report["quarantined"].values())
    report["in"] += bad
    assert report["in"] == report["kept"] + sum(report["dropped"].values()) + bad
    files, lost = {s["task"]["path"] for s in sidecars}, report["quarantined"].get("unreadable_file", 0)
    if max(bad / max(report["in"], 1), lost / len(files)) > cfg.max_bad:
        raise UserError(too_bad(bad, report["in"], cfg.max_bad, first_bad, target))
    if not report["kept"]:
        raise UserError(f"{name}: none of {report['in']:,} documents is left; dropped: {page.shares(report['dropped'], report['in'])}; unreadable: "
                        f"{page.shares(report['quarantined'], report['in'])} (see {target.as_posix()}/quarantine.jsonl)")
    report |= extra() | {"first_bad": first_bad, "seconds": round(seconds, 2), "docs_per_second": round(docs / max(seconds, 1e-9)),
                         "peak_rss_mb": max(_peaks), "parts": [f"{stem}.parquet" for stem in stems], "settings": settings,
                         "output": hashlib.blake2b("".join(s["blake2b"] for s in sidecars).encode(), digest_size=16).hexdigest(),
                         "signature": signature}
    (target / "report.html").write_text(page.render(name, report), encoding="utf-8")
    parts.write_json(target / "report.json", report)
    return report


def too_bad(bad, seen, limit, first, target):
    where = f"; the first is {first[0]['file']}:{first[0]['line']}, {first[0]['reason']} ({first[0]['error'] or first[0]['head']})" if first else ""
    return f"{bad:,} of {seen:,} rows cannot be read, more than --max_bad {limit:g}{where}; all stand in {target.as_posix()}/*quarantine.jsonl"


def link(source, target, i):
    """Part i of `source` and what belongs to it, also under `target` (a second name of the same file where the disk can)."""
    for path in source.glob(f"part-{i:05d}.*"):
        other = target / path.name
        other.unlink(missing_ok=True)
        try:
            os.link(path, other)
        except OSError:
            shutil.copy2(path, other)


def claim(target):
    """Make the directory of a stage. UserError if it holds what is not ours."""
    ours = ("part-", "report.", "quarantine.", *parts.EXPORTS)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if foreign := [p.name for p in target.iterdir() if not p.name.startswith((*ours, "."))]:       # .DS_Store, .nfs…
            raise UserError(f"--out: {target} holds {foreign[0]}, which prepare_data.py did not write; choose another directory")
    except OSError as e:
        raise UserError(f"--out: cannot make the directory {target}: {e.strerror}") from None


def is_done(target, i, signature):
    path = target / f"part-{i:05d}.parquet"
    try:
        return path.exists() and read_sidecar(path)["signature"] == signature
    except (OSError, ValueError, KeyError):
        return False


def read_sidecar(part):
    return json.loads(Path(part).with_suffix(".json").read_text(encoding="utf-8"))


def shard_of(text):
    """--shard i/n, i from 0: this launcher takes tasks i, i + n, i + 2n, …"""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match and int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise UserError(f"--shard {text}: wants i/n with 0 <= i < n, for instance 0/4, 1/4, 2/4 and 3/4 on four machines")


def peak_rss_mb():
    """The most memory this process has held so far, in MB; None on Windows, which does not tell. From /proc where there is
    one: getrusage counts on from the process that started this one."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return round(int(next(line for line in f if line.startswith("VmHWM")).split()[1]) / 1024)
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        return None
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10)))
