"""The driver: tasks, parts, sidecars; the same bytes for any number of workers, shards, tries and kills."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
from nanollm.config import UserError
from nanollm.corpus import driver, io, parts

TEXTS = [f"Row {i}: " + "一只猫坐在桌子上。The cat is on the table. " * (1 + i % 7) for i in range(3000)]


@dataclass(frozen=True)
class Short:
    least: int


def drop_short(table, cfg):
    """A table function as the stages are made of: rows in = rows out, the reason in a column."""
    short = pc.less(pc.utf8_length(table["text"]), cfg.least)
    return table.append_column("note", pa.array([str(i) for i in range(table.num_rows)])).set_column(
        table.column_names.index("drop_reason"), "drop_reason", pc.if_else(short, "short", pa.scalar(None, pa.string())))


def slow(table, cfg):
    time.sleep(0.02)
    return table


def corpus(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


def options(out, **given):
    return SimpleNamespace(**dict(out=str(out), workers=1, runner="local", shard="0/1", keep_dropped=True, show=2, force=False, fail_fast=False,
                                  max_bad=0.01) | given)


def tasks_of(path, step=50_000):
    return io.plan([(path, "web", "auto")], step=step)


def carry(out, tasks, least=60, steps=None, **given):
    return driver.run_stage(options(out, **given), "s", tasks, lambda: steps or [(drop_short, Short(least))], {"least": least}, [driver])


def files(directory):
    """The bytes of every file of a stage but its reports, which hold times."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if not p.name.startswith("report")}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("raw") / "raw.jsonl")


@pytest.fixture(scope="module")
def one(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    carry(out, tasks_of(raw))
    return out / "s"


def test_the_tasks_of_a_file_are_its_lines_each_once(raw):
    """Cut anywhere: every document comes exactly once, in order, with the number of its line as its id."""
    for step in (1, 999, 50_000, 1 << 30):
        tasks = tasks_of(raw, step)
        rows = [row for task in tasks for row in io.documents(task, bad=None)]
        assert [row["text"] for row in rows] == TEXTS and rows[1234]["id"] == f"{io.shown(raw)}:1235"
        assert sum(task.bytes for task in tasks) == raw.stat().st_size


def test_a_text_file_is_cut_at_document_ends_only(tmp_path):
    """Blank-line documents of several lines, with a line number each; Parquet files at row groups."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\r\n".join(f"first {i}\r\nsecond {i}\r\n".encode() for i in range(500)))
    whole = list(io.documents(tasks_of(path, 1 << 30)[0], bad=None))
    cut = [row for task in tasks_of(path, 700) for row in io.documents(task, bad=None)]
    assert cut == whole and len(whole) == 500 and len(tasks_of(path, 700)) > 10 and whole[1]["id"].endswith(":4")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=100)
    tasks = tasks_of(tmp_path / "a.parquet", 1)
    assert len(tasks) == 30 and [r["text"] for t in tasks for r in io.documents(t, bad=None)] == TEXTS
    assert list(io.documents(tasks[7], bad=None))[0]["id"].endswith(":701")


def test_in_is_kept_and_dropped_and_quarantined(tmp_path):
    """Every row is accounted for: in the part, in the dropped part with its reason, or in the quarantine with its line."""
    path = corpus(tmp_path / "raw.jsonl")
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"text": 1}\n{"text": "cut\n')
    report = carry(tmp_path / "out", tasks_of(path))
    kept = parts.Parts(tmp_path / "out" / "s")
    dropped = [row for p in sorted((tmp_path / "out" / "s").glob("*.dropped.parquet")) for row in pq.read_table(p).to_pylist()]
    bad = [json.loads(line) for line in (tmp_path / "out" / "s" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert report["in"] == 3002 == len(kept) + len(dropped) + len(bad) and report["kept"] == len(kept)
    assert [row["line"] for row in bad] == [3001, 3002] and {row["drop_reason"] for row in dropped} == {"short"}
    assert sorted(list(kept.texts()) + [row["text"] for row in dropped]) == sorted(TEXTS)
    assert len(report["examples"]["short"]) == 2 and sum(report["lengths"].values()) == len(kept)


def test_the_bytes_do_not_depend_on_the_number_of_workers_or_shards(raw, one, tmp_path):
    """Two workers, and three shards started in a strange order, leave what one worker leaves."""
    carry(tmp_path / "two", tasks_of(raw), workers=2)
    assert files(tmp_path / "two" / "s") == files(one)
    for shard in ("2/3", "0/3", "1/3"):
        assert carry(tmp_path / "shards", tasks_of(raw), shard=shard) is None
    assert carry(tmp_path / "shards", tasks_of(raw), steps=[(broken, None)])["kept"] == len(parts.Parts(one))     # nothing is left to do
    assert files(tmp_path / "shards" / "s") == files(one)


def test_a_second_run_does_nothing_and_a_changed_one_everything(raw, tmp_path, capsys):
    """Done means: the same settings, code and input. A part that lost its sidecar is done again, the others are not."""
    carry(tmp_path, tasks_of(raw))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}
    carry(tmp_path, tasks_of(raw))
    assert "skipped" in capsys.readouterr().out and before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}
    (tmp_path / "s" / "part-00003.json").unlink()
    carry(tmp_path, tasks_of(raw))
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("part-*.parquet")}
    assert {n for n in after if after[n] != before[n]} == {"part-00003.parquet", "part-00003.dropped.parquet"}
    assert carry(tmp_path, tasks_of(raw), least=1)["kept"] == 3000
    assert carry(tmp_path, tasks_of(raw, 1 << 30), least=1)["parts"] == ["part-00000.parquet"]
    assert len(list((tmp_path / "s").glob("part-*.parquet"))) == 2        # the parts of the old cut are gone


def test_a_stage_that_reads_parts_numbers_the_documents(one, tmp_path):
    """docno runs through all parts; parts of parts keep ids, and a reader's row groups are small."""
    source = parts.Parts(one)
    numbers = [n for table in source.tables() for n in table["docno"].to_pylist()]
    assert numbers == list(range(len(source)))
    report = driver.run_stage(options(tmp_path), "t", driver.part_tasks(source), lambda: [], {}, [driver])
    assert report["in"] == report["kept"] == len(source)
    assert all(table.num_rows <= 1024 for table in source.tables())
    assert len(list(source.sample(50))) == 50 and set(source.sample(10**9)) == set(source.texts())


def test_a_row_group_holds_at_most_1024_documents_or_16_mib(tmp_path):
    """However the rows come: the file is the same, and a reader's memory is bounded."""
    rows = [{"id": str(i), "text": "x" * (3 << 20 if i < 10 else 10), "source": "a", "meta": ""} for i in range(3000)]
    table = pa.Table.from_pylist(rows)
    for name, size in (("a", 3000), ("b", 7)):
        writer = parts.Writer(tmp_path / name)
        for start in range(0, 3000, size):
            writer.write(table.slice(start, size))
        writer.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    groups = [t.num_rows for t in parts.read_tables(tmp_path / "a", 0)]
    assert groups[:2] == [5, 1024] and sum(groups) == 3000                # 3 MiB each: five fit into 16 MiB
    assert all(t.num_rows <= 1024 and sum(map(len, t["text"].to_pylist())) <= 16 << 20 for t in parts.read_tables(tmp_path / "a", 0))


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_driver as t
if __name__ == "__main__":
    t.carry({out!r}, t.tasks_of(t.io.Path({raw!r})), workers=2, steps=[(t.slow, None)] * 5 + [(t.drop_short, t.Short(60))])
"""


def killed_runs(raw, out, kills, seed):
    """Start the stage and kill -9 it at a random moment after its work has begun, until `kills` found it begun and not ended
    (where it came to its end first, it begins anew, and the next kill comes sooner); then let it finish."""
    code = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out), raw=str(raw))
    script = out.parent / "stage.py"
    script.write_text(code, encoding="utf-8")
    rng, inside, longest = random.Random(seed), 0, 0.4
    while inside < kills:
        for path in (out / "s.tmp").glob("*.tmp"):        # of the kill before: this one waits for work of its own
            path.unlink(missing_ok=True)                  # a worker may just be dying
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((out / "s.tmp").glob("part-*.tmp")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, longest))
        process.send_signal(signal.SIGKILL)
        process.wait()
        ended = (out / "s" / "report.json").exists()
        inside += not ended
        if ended:
            shutil.rmtree(out)
            longest /= 2
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)


def test_a_killed_run_goes_on_and_leaves_the_same_bytes(raw, one, tmp_path):
    """kill -9 of the parent at three random moments: its workers die with it, finished tasks stay, the rest is done."""
    killed_runs(raw, tmp_path / "out", 3, seed=0)
    assert files(tmp_path / "out" / "s") == files(one)


@pytest.mark.slow
def test_twenty_kills_leave_the_same_bytes(raw, one, tmp_path):
    killed_runs(raw, tmp_path / "out", 20, seed=1)
    assert files(tmp_path / "out" / "s") == files(one)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_full_disk_is_one_sentence_and_can_be_resumed(raw, one, tmp_path):
    """Writing fails in a worker: UserError, no half part under its real name; with room again the run goes on."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(UserError, match="run the same command again"):
            carry(tmp_path, tasks_of(raw))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("part-*.parquet"))
    carry(tmp_path, tasks_of(raw))
    assert files(tmp_path / "s") == files(one)


def test_what_was_there_before_stays_until_the_new_run_is_whole(raw, one, tmp_path):
    """A run that fails leaves the finished stage as it was, and what it could do itself aside."""
    carry(tmp_path, tasks_of(raw))
    with pytest.raises(UserError):
        carry(tmp_path, tasks_of(raw), least=7, steps=[(broken, None)])
    assert files(tmp_path / "s") == files(one) and len(parts.Parts(tmp_path / "s"))


def test_a_disk_that_fills_between_the_tasks_is_one_sentence_too(raw, tmp_path, monkeypatch):
    """While a stage gathers what it needs, and while it adds up its sidecars."""
    def full(*words):
        raise OSError(28, "No space left on device", "x")
    with pytest.raises(UserError, match="No space left"):
        driver.run_stage(options(tmp_path), "s", tasks_of(raw), full, {}, [driver])
    monkeypatch.setattr(driver, "merge", full)
    with pytest.raises(UserError, match="No space left"):
        carry(tmp_path, tasks_of(raw))


def test_two_processes_that_finish_at_once_leave_one_whole_stage(raw, one, tmp_path):
    """The second finds its work taken away, and the stage there: no harm, no traceback."""
    carry(tmp_path, tasks_of(raw))
    driver.swap(tmp_path / "s.tmp", tmp_path / "s")
    assert files(tmp_path / "s") == files(one)


def die(item):
    os._exit(9)


def test_a_dead_worker_is_one_sentence():
    """The out-of-memory killer takes a worker: no hang, no traceback."""
    with pytest.raises(UserError, match="a worker process died"):
        driver.run(die, [1, 2], "x", workers=2)


def broken(table, cfg):
    raise UserError("the recipe says no")


def test_a_users_mistake_in_a_worker_reaches_the_user(raw, tmp_path):
    with pytest.raises(UserError, match="the recipe says no"):
        carry(tmp_path, tasks_of(raw), workers=2, steps=[(broken, None)])


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/2"])
def test_a_wrong_shard_is_refused(raw, tmp_path, shard):
    with pytest.raises(UserError, match="--shard"):
        carry(tmp_path, tasks_of(raw), shard=shard)


def test_too_many_bad_rows_stop_the_run(tmp_path):
    """A wrong file must not look like success: more than --max_bad, with the first offender named."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good enough to be kept"}\n' * 50 + "{\n" * 50, encoding="utf-8")
    with pytest.raises(UserError, match=r"50 of 100 rows .*a.jsonl:51, broken_json"):
        carry(tmp_path / "out", tasks_of(path), least=1)
    with pytest.raises(UserError, match="a.jsonl:51: broken_json"):
        carry(tmp_path / "first", tasks_of(path), least=1, fail_fast=True)
