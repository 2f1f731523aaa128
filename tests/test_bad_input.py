"""Whatever lies in the input directory: no traceback, no hang, and in = kept + dropped + quarantined, each with its place and reason.

The first part is a table of the bad inputs that people have met; the second feeds broken files of every kind to the
readers, made by hypothesis from whole ones.
"""
import csv
import gzip
import json
import os
import random
import signal
import threading
import time
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import prepare_data
from nanollm.config import UserError
from nanollm.corpus import driver, foreign, io, readers

SENTENCES = [f"第{i}段：雨停以后，院子里的石榴花落了{i * 7 % 90 + 9}朵。After the rain, {i * 13 % 80 + 9} flowers lay on the ground."
             for i in range(12)]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """Some thousands of tiny parts are written here; that they reach the disk is test_driver's business."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def ingest(path, out, doc_sep="auto", step=io.TASK):
    """Read one file as `prepare_data.py clean` does, without its edits and filters -> (documents, dropped, quarantined), lists of dicts."""
    documents, dropped, quarantined = [], [], []
    for task in io.plan(io.find_files([path], exclude=out)[0], doc_sep, step):
        sidecar = driver.run_job(driver.Job(task, (), str(out), ""))
        stem = f"{out}/part-{task.number:05d}"
        documents += pq.read_table(f"{stem}.parquet").to_pylist()
        dropped += pq.read_table(f"{stem}.dropped.parquet").to_pylist()
        file = Path(f"{stem}.quarantine.jsonl")
        quarantined += [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] if file.exists() else []
        assert sum(sidecar["quarantined"].values()) == len(quarantined) or task.number
        assert sidecar["counts"]["in"] == sidecar["counts"]["kept"] + sum(sidecar["counts"]["dropped"].values())
    return documents, dropped, quarantined


def check(path, documents, dropped, quarantined):
    """What holds for every input: each row has its own place, each loss its file, line and reason, each text can be written."""
    name = io.shown(path)
    ids = [row["id"] for row in documents + dropped]
    assert len(set(ids)) == len(ids) and all(i.startswith(f"{name}:") for i in ids)
    assert all(row["drop_reason"] for row in dropped)
    for row in quarantined:
        assert row["file"] == name and isinstance(row["line"], int) and row["line"] >= 0 and row["reason"] and len(row["head"]) <= 800
    assert all(row["text"].encode("utf-8") is not None and row["meta"].encode("utf-8") is not None for row in documents + dropped)


@contextmanager
def deadline(seconds):
    """A hang becomes a failure: an alarm in the main thread, which also stops a regular expression. (Windows has no alarm.)"""
    def stop(number, frame):
        raise TimeoutError(f"nothing came for {seconds} s")
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- the table -------------------------------------------------------------------------------------------------------

def parquet(**columns):
    out = BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


GOOD, LAST = b'{"text": "one"}\n', b'{"text": "two"}\n'
LINES = b"".join(json.dumps({"text": s}).encode() + b"\n" for s in SENTENCES)
ZIPPED, DEEP = gzip.compress(LINES), b"[" * 100_000
TWO = ["one", "two"]

TABLE = [                                                # what, file name, content, texts kept, [(line, reason)] quarantined
    ("broken JSON", "a.jsonl", GOOD + b'{"text": "tw\n' + LAST, TWO, [(2, "broken_json")]),
    ("raw control character in JSON", "a.jsonl", GOOD + b'{"text": "a\x01b"}\n' + LAST, TWO, [(2, "broken_json")]),
    ("a list, a number, a string, a null", "a.jsonl", GOOD + b'[1]\n7\n"x"\nnull\n' + LAST, TWO, [(n, "not_an_object") for n in (2, 3, 4, 5)]),
    ("two objects on a line", "a.jsonl", GOOD + b'{"text": "x"}{"text": "y"}\n' + LAST, TWO, [(2, "broken_json")]),
    ("deep nesting", "a.jsonl", GOOD + DEEP + b"\n" + LAST, TWO, [(2, "broken_json")]),
    ("deep nesting inside a row", "a.jsonl", GOOD + b'{"text": ' + DEEP + b"]" * 100_000 + b"}\n" + LAST, TWO, [(2, "broken_json")]),
    ("nesting just below the limit", "a.jsonl", GOOD + b'{"txt": ' + b"[" * 900 + b"]" * 900 + b"}\n" + LAST, TWO, [(2, None)]),
    ("a number of 5,000 digits", "a.jsonl", GOOD + b'{"text": ' + b"9" * 5000 + b"}\n" + LAST, TWO, [(2, "broken_json")]),
    ("byte order mark", "a.jsonl", b"\xef\xbb\xbf" + GOOD + LAST, TWO, []),
    ("byte order mark in a list", "a.json", b'\xef\xbb\xbf[{"text": "one"}, {"text": "two"}]', TWO, []),
    ("byte order mark in a text", "a.txt", b"\xef\xbb\xbfone\ntwo\n", TWO, []),
    ("CRLF", "a.jsonl", (GOOD + b"\n" + LAST).replace(b"\n", b"\r\n"), TWO, []),
    ("lone CR, U+2028 and U+0085 part no rows", "a.jsonl", '{"text": "one"\r, "x": "\u2028\u0085"}\n'.encode() + LAST, TWO, []),
    ("invalid UTF-8", "a.jsonl", GOOD + b'{"text": "\xff\xfe"}\n' + LAST, TWO, [(2, "not_utf8")]),
    ("invalid UTF-8 in a text", "a.txt", b"one\n\xb0\xa1\ntwo\n", TWO, [(2, "not_utf8")]),
    ("invalid UTF-8 in a list", "a.json", b'[{"text": "one"}, {"text": "\xff"}, {"text": "two"}]', TWO, [(2, "not_utf8")]),
    ("UTF-16", "a.jsonl", (GOOD + LAST).decode().encode("utf-16"), [], None),
    ("lone surrogate", "a.jsonl", b'{"text": "\\ud83d", "source": "\\udc00"}\n' + LAST, ["\ufffd", "two"], []),
    ("lone surrogate in a chat", "a.jsonl", b'{"prompt": "\\ud83d", "response": "x"}\n' + LAST, ["\ufffd\nx", "two"], []),
    ("NUL and control characters", "a.jsonl", b'{"text": "a\\u0000b\\u001b"}\n' + LAST, ["a\0b\x1b", "two"], []),
    ("NUL in a text", "a.txt", b"a\0b\ntwo\n", ["a\0b", "two"], []),
    ("blank lines", "a.jsonl", b"\n \n\t\r\n" + GOOD + b"\n\n" + LAST + b"\n", TWO, []),
    ("only blank lines", "a.jsonl", b"\n \n\n", [], []),
    ("no newline at the end", "a.jsonl", GOOD + LAST.rstrip(), TWO, []),
    ("no text, null, NaN", "a.jsonl", GOOD + b'{"txt": "x"}\n{"text": null}\n{"text": NaN}\n{}\n' + LAST, TWO,
     [(2, "missing_text"), (3, "missing_text"), (4, "bad_type"), (5, "missing_text")]),
    ("text of another type", "a.jsonl", GOOD + b'{"text": 3}\n{"text": ["x"]}\n{"text": {"x": 1}}\n{"text": true}\n' + LAST, TWO,
     [(n, "bad_type") for n in (2, 3, 4, 5)]),
    ("duplicate keys: the last one counts", "a.jsonl", b'{"text": "x", "text": "one"}\n' + LAST, TWO, []),
    ("duplicate ids", "a.jsonl", b'{"id": 1, "text": "one"}\n{"id": 1, "text": "two"}\n', TWO, []),
    ("an empty text", "a.jsonl", b'{"text": ""}\n' + LAST, ["", "two"], []),
    ("JSON lines called .json", "a.json", GOOD + LAST, TWO, []),
    ("one object, printed over lines", "a.json", b'{\n "text": "one"\n}\n', None, None),
    ("objects without commas between", "a.json", b'[{"text": "one"} {"text": "two"}]', None, []),
    ("a list that breaks off", "a.json", b'[{"text": "one"}, {"text": "tw', ["one"], [(2, "unreadable_file")]),
    ("two lists in one file", "a.json", b'[{"text": "one"}, {"text": "two"}]\n[{"text": "x"}]', TWO, [(3, "unreadable_file")]),
    ("an empty list", "a.json", b"[]", [], []),
    ("several gzip members", "a.jsonl.gz", gzip.compress(GOOD) + gzip.compress(LAST), TWO, []),
    ("not gzip at all", "a.jsonl.gz", GOOD + LAST, [], [(0, "unreadable_file")]),
    ("gzip with a wrong checksum", "a.jsonl.gz", ZIPPED[:-8] + b"\0" * 8, SENTENCES, [(0, "unreadable_file")]),
    ("gzip cut off", "a.jsonl.gz", ZIPPED[:-9], None, [(0, "unreadable_file")]),
    ("gzip of nothing", "a.jsonl.gz", gzip.compress(b""), [], []),
    ("zeros after gzip", "a.jsonl.gz", gzip.compress(GOOD + LAST) + b"\0" * 64, TWO, []),
    ("noise after gzip", "a.jsonl.gz", gzip.compress(GOOD + LAST) + b"noise", TWO, [(0, "unreadable_file")]),
    ("Parquet cut off", "a.parquet", parquet(text=TWO)[:-20], [], [(0, "unreadable_file")]),
    ("no Parquet at all", "a.parquet", GOOD + LAST, [], [(0, "unreadable_file")]),
    ("Parquet in gzip, cut off", "a.parquet.gz", gzip.compress(parquet(text=TWO))[:-20], [], [(0, "unreadable_file")]),
    ("Parquet without a known column", "a.parquet", parquet(txt=TWO), [], [(1, "missing_text"), (2, "missing_text")]),
    ("Parquet without columns", "a.parquet", parquet(), [], []),
    ("Parquet of numbers", "a.parquet", parquet(text=[1, 2]), [], [(1, "bad_type"), (2, "bad_type")]),
    ("Parquet of bytes", "a.parquet", parquet(text=pa.array([b"one", b"\xff", b"two"], pa.binary())), TWO, [(2, "not_utf8")]),
    ("Parquet with nulls", "a.parquet", parquet(text=["one", None, "two"]), TWO, [(2, "missing_text")]),
    ("Parquet, dictionary", "a.parquet", parquet(text=pa.array(TWO).dictionary_encode()), TWO, []),
    ("Parquet, large_string", "a.parquet", parquet(text=pa.array(TWO, pa.large_string())), TWO, []),
    ("Parquet, string_view", "a.parquet", parquet(text=pa.array(TWO, pa.string_view())), TWO, []),
    ("Parquet, wrong UTF-8 in a string", "a.parquet", parquet(text=pa.array([b"one", b"\xff\xfe", b"two"]).view(pa.string())), TWO, [(2, "not_utf8")]),
    ("mixed types in one column", "a.json", b'[{"text": "one"}, {"text": 1}, {"text": ["x"]}, {"text": "two"}]', TWO, [(2, "bad_type"), (3, "bad_type")]),
    ("CSV with an open quote", "a.csv", b'text\none\n"x\ntwo\n', TWO, [(3, "broken_csv")]),
    ("CSV with too many fields", "a.csv", b"id,text\n1,one\n2,x,y\n3,two\n", TWO, [(3, "wrong_fields")]),
    ("CSV without a known column", "a.csv", b"id,body\n1,x\n", [], [(2, "missing_text")]),
    ("CSV, compressed and cut off", "a.csv.gz", gzip.compress(b"text\n" + LINES)[:-9], None, None),
    ("web archive cut off", "a.wet", b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 99\r\n\r\nfive", [], [(1, "broken_record")]),
    ("no web archive at all", "a.warc.gz", gzip.compress(LINES), [], [(1, "broken_record")]),
]


@pytest.mark.parametrize("name, data, texts, bad", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_bad_input(tmp_path, name, data, texts, bad):
    """Kept, and in quarantine with its line and reason, is exactly what the table says (None: one or more of anything)."""
    path = tmp_path / name
    path.write_bytes(data)
    with deadline(60):
        documents, dropped, quarantined = ingest(path, tmp_path)
    check(path, documents, dropped, quarantined)
    found = [(row["line"], row["reason"]) for row in quarantined]
    assert texts is None or [row["text"] for row in documents] == texts and not dropped
    assert len(documents) + len(found) > 0 or texts == []
    if bad is None:
        assert found
    else:
        assert [line for line, _ in found] == [line for line, _ in bad]
        assert all(want in (None, reason) for (_, reason), (_, want) in zip(found, bad))


def test_a_cut_gzip_keeps_the_rows_before_the_cut(tmp_path):
    """And names the damage: 2,000 rows of which about half are there."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(2000)]
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    path.write_bytes(whole[:len(whole) // 2])
    documents, _, quarantined = ingest(path, tmp_path)
    assert 500 < len(documents) < 1500 and [row["text"] for row in documents] == texts[:len(documents)]
    assert [(row["line"], row["reason"]) for row in quarantined] == [(0, "unreadable_file")]


def test_a_line_that_never_ends_is_passed_over(tmp_path, monkeypatch):
    """Longer than MAX_LINE: it goes to quarantine with its beginning, memory stays small, and the next row is read."""
    for module in (readers, io, foreign):
        monkeypatch.setattr(module, "MAX_LINE", 1000)
    for name, rows in (("a.jsonl", GOOD + b'{"text": "' + b"x" * 5000 + b'"}\n' + LAST), ("a.txt", b"one\n" + b"x" * 5000 + b"\ntwo\n"),
                       ("a.csv", b"text\none\n" + b"x" * 5000 + b"\ntwo\n")):
        path = tmp_path / name
        path.write_bytes(rows)
        documents, _, quarantined = ingest(path, tmp_path)
        assert [row["text"] for row in documents] == TWO, name
        assert [(row["line"], row["reason"]) for row in quarantined] == [(2 + (name == "a.csv"), "line_too_long")], name


def test_an_open_quote_does_not_swallow_a_large_file(tmp_path, monkeypatch):
    """Not at the end of the file and not at the limit: 400 rows come after it."""
    for limit in (1 << 20, 1000):
        for module in (readers, foreign):
            monkeypatch.setattr(module, "MAX_LINE", limit)
        path = tmp_path / "a.csv"
        path.write_text('id,text\n0,"open\n' + "".join(f"{i},row {i}\n" for i in range(400)), encoding="utf-8")
        documents, _, quarantined = ingest(path, tmp_path)
        assert [row["text"] for row in documents] == [f"row {i}" for i in range(400)] and [row["line"] for row in quarantined] == [2]


@pytest.mark.parametrize("doc_sep", ["line", "blank"])
def test_where_a_file_is_cut_into_tasks_cuts_no_document(tmp_path, doc_sep):
    """At every byte of a file with all kinds of line ends, also just before the end of a line: the rest of it is no blank line."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一\n二\r\n\r\n三\n \n四\r五\n\n\n\n六\n七".encode())
    want = [(row["id"], row["text"]) for row in ingest(path, tmp_path, doc_sep)[0]]
    assert [text for _, text in want] == {"line": ["一", "二", "三", "四\r五", "六", "七"], "blank": ["一\n二", "三", "四\r五", "六\n七"]}[doc_sep]
    for step in range(1, path.stat().st_size + 2):
        assert [(row["id"], row["text"]) for row in ingest(path, tmp_path, doc_sep, step)[0]] == want, step


def test_what_is_no_readable_file_is_skipped_or_refused(tmp_path):
    """An unknown extension, an empty file, a link in a circle, a link to nothing, a pipe: skipped with a reason each; nothing else: refused."""
    for name, data in {"a.txt": b"one\n", "b.docx": b"x", "c.jsonl": b"", "d.gz": b"x"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    with deadline(60):
        files, skipped = io.find_files([tmp_path], exclude=tmp_path / "out")
    assert [file.name for file, _, _ in files] == ["a.txt"]
    assert {"b.docx", "c.jsonl", "d.gz", "loop", "self.txt", "gone.txt", "pipe.txt"} == {Path(file).name for file, why in skipped if why}
    for name in ("b.docx", "c.jsonl", "self.txt", "gone.txt", "pipe.txt", "nowhere"):
        with pytest.raises(UserError), deadline(60):
            io.find_files([tmp_path / name], exclude=tmp_path / "out")


def test_a_file_that_cannot_be_opened_is_refused_in_words(tmp_path, monkeypatch):
    """No permission, while planning or while reading; or deleted between the two."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n")
    found = io.find_files([path], exclude=tmp_path / "out")[0]
    tasks = io.plan(found)

    def forbidden(*args, **options):
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(readers, "open", forbidden, raising=False)
        for attempt in (lambda: io.plan(found), lambda: io.plan(found, "line", step=2), lambda: list(io.documents(tasks[0], None))):
            with pytest.raises(UserError, match="a.txt: Permission denied"):
                attempt()
    path.unlink()
    with pytest.raises(UserError, match="a.txt: No such file"):
        list(io.documents(tasks[0], None))


# ---- the fuzzer ------------------------------------------------------------------------------------------------------

def rows_of(kind):
    """A whole file of this kind as a list of pieces, one a sentence (and what stands before and after them)."""
    if kind == ".txt":
        return b"", [s.encode() + b"\n\n" for s in SENTENCES], b""
    if kind == ".jsonl":
        return b"", [json.dumps({"text": s, "n": i}, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, s in enumerate(SENTENCES)], b""
    if kind == ".json":
        return b"[", [json.dumps({"text": s}, ensure_ascii=False, indent=1).encode() + b"," for s in SENTENCES[:-1]], json.dumps({"text": SENTENCES[-1]}).encode() + b"]"
    if kind == ".csv":
        def line(*fields):
            out = StringIO(newline="")
            csv.writer(out).writerow(fields)
            return out.getvalue().encode()
        return line("id", "text"), [line(i, s if i % 3 else f'"{s}"\n{s}') for i, s in enumerate(SENTENCES)], b""
    if kind == ".wet":
        return b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 0\r\n\r\n\r\n\r\n", [
            b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (len(s.encode()), s.encode())
            for s in SENTENCES], b""
    if kind == ".warc":
        pages = [f"<html><body><p>{s}</p></body></html>".encode() for s in SENTENCES]
        https = [b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(p), p) for p in pages]
        return b"", [b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (len(h), h) for h in https], b""
    return b"", [parquet(text=SENTENCES)], b""


KINDS = (".txt", ".jsonl", ".json", ".csv", ".wet", ".warc", ".parquet")
WHOLE = {kind: rows_of(kind) for kind in KINDS}
NASTY = [b'"', b"\n", b"\r\n", b"\n\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[" * 2000, b"]", b",", b"\\", b"\\ud800", b"\\", b"\x1f\x8b\x08",
         b"PAR1", b"WARC/1.0\r\n", b"\r\n\r\n", b"NaN", b"null", b"1e999", b"9" * 5000, b'{"text": 1}', b'{"messages": [{}]}', "\u2028\u0085".encode(), b" " * 300]

places = st.floats(0, 1, exclude_max=True)               # of the file's length
changes = st.lists(st.one_of(
    st.tuples(st.just("put"), places, st.one_of(st.sampled_from(NASTY), st.binary(min_size=1, max_size=8))),
    st.tuples(st.just("flip"), places, st.integers(1, 255)),
    st.tuples(st.just("cut"), places, st.integers(1, 400)),
    st.tuples(st.just("repeat"), places, st.integers(1, 400)),
    st.tuples(st.just("end"), places, st.just(0)),
    st.tuples(st.just("splice"), places, st.sampled_from(KINDS))), min_size=1, max_size=3)


def broken(data, changes):
    """(the file after the changes, its length up to the first byte that may be another)."""
    first = len(data)
    for what, place, how in changes:
        at = int(place * len(data))
        first = min(first, at)
        if what == "put":
            data = data[:at] + how + data[at:]
        elif what == "flip":
            data = data[:at] + bytes([b ^ how for b in data[at:at + 1]]) + data[at + 1:]
        elif what == "cut":
            data = data[:at] + data[at + how:]
        elif what == "repeat":
            data = data[:at + how] + data[at:]
        elif what == "end":
            data = data[:at]
        else:
            head, rows, tail = WHOLE[how]
            data = data[:at] + (head + b"".join(rows) + tail)[at:]
    return data, first


def broken_files(folder, kind, zipped, changes, doc_sep, step, after):
    """The claim, for one file."""
    head, rows, tail = WHOLE[kind]
    data = head + b"".join(rows) + tail
    harm_zip = zipped and after
    data, first = broken(gzip.compress(data, mtime=0) if harm_zip else data, changes)
    path = folder / f"file{kind}{'.gz' * zipped}"
    path.write_bytes(gzip.compress(data, 1, mtime=0) if zipped and not harm_zip else data)
    for old in folder.glob("part-*"):
        old.unlink()
    try:
        with deadline(60):
            documents, dropped, quarantined = ingest(path, folder, doc_sep, step)
    except UserError as e:
        assert len(str(e)) > 20 and (not data.strip() or "empty" in str(e) or path.stat().st_size == 0)
        return
    check(path, documents, dropped, quarantined)
    read = len(documents) + len(dropped)
    if harm_zip or kind == ".parquet":
        if read < len(SENTENCES) * (kind != ".parquet"):
            assert quarantined, "fewer rows than there were, and no word about it"
        return
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if kind == ".jsonl" or kind == ".txt" and doc_sep == "line":
        assert read + len(quarantined) == sum(bool(line.strip()) for line in lines)
    elif kind == ".txt":
        assert read + len(quarantined) == sum(bool(line.strip()) and (i == 0 or not lines[i - 1].strip()) for i, line in enumerate(lines))
    ends = np.cumsum([len(row) for row in rows]) + len(head)
    for sentence in SENTENCES[:int((ends <= first).sum())]:      # what stands before the first change is there
        assert any(sentence in row["text"] for row in documents + dropped)


PARAMETERS = dict(kind=st.sampled_from(KINDS), zipped=st.booleans(), changes=changes, doc_sep=st.sampled_from(["line", "blank"]),
                  step=st.sampled_from([700, 1 << 20]), after=st.booleans())
FIXED = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=500, **FIXED)
@given(**PARAMETERS)
def test_broken_files_are_read_or_refused_and_nothing_is_lost(tmp_path_factory, kind, zipped, changes, doc_sep, step, after):
    """500 files of every kind, whole ones with bytes put in, flipped, cut, repeated, spliced with another kind, or cut off."""
    broken_files(folder_of(tmp_path_factory), kind, zipped, changes, doc_sep, step, after)


@pytest.mark.slow
@settings(max_examples=10_000, **FIXED)
@given(**PARAMETERS)
def test_ten_thousand_broken_files(tmp_path_factory, kind, zipped, changes, doc_sep, step, after):
    """The same, twenty times as often."""
    broken_files(folder_of(tmp_path_factory), kind, zipped, changes, doc_sep, step, after)


def folder_of(factory, made=[]):
    if not made:
        made.append(factory.mktemp("fuzz"))
    return made[0]


def command(*argv):
    """prepare_data.py with the exit code that a shell would see."""
    try:
        prepare_data.main([str(a) for a in argv])
        return 0
    except SystemExit as e:
        return e.code


def test_the_command_survives_a_directory_of_all_that(tmp_path, capsys):
    """The whole table and 60 broken files of every kind as one corpus: the sum is right, every bad row stands in quarantine with its
    file and line; --strict says so with exit code 3, --fail_fast and --max_bad with 2 and one sentence."""
    rng, raw = random.Random(1), tmp_path / "raw"
    files = [(name, data) for _, name, data, _, _ in TABLE]
    for i in range(60):
        head, rows, tail = WHOLE[kind := KINDS[i % len(KINDS)]]
        moves = [(rng.choice(["put", "flip", "cut", "repeat", "end"]), rng.random(), rng.randint(1, 255)) for _ in range(rng.randint(1, 3))]
        moves = [(what, place, rng.choice(NASTY) if what == "put" else how) for what, place, how in moves]
        data = broken(head + b"".join(rows) + tail, moves)[0]
        files.append((f"a{kind}{'.gz' * (i % 4 == 0)}", gzip.compress(data) if i % 4 == 0 else data))
    for i, (name, data) in enumerate(files):
        (raw / f"{i:03d}").mkdir(parents=True)
        (raw / f"{i:03d}" / name).write_bytes(data)
    options = ["clean", "--input", raw, "--workers", 1, "--max_bad"]
    with deadline(300):
        assert command(*options, 1, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "clean" / "report.json").read_text(encoding="utf-8"))
    quarantined = [json.loads(line) for line in (tmp_path / "out" / "clean" / "quarantine.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert report["in"] == report["kept"] + sum(report["dropped"].values()) + sum(report["quarantined"].values()) and report["kept"] > 300
    assert len(quarantined) == sum(report["quarantined"].values()) > 100
    assert all(row["file"].startswith(io.shown(raw)) and row["line"] >= 0 and row["reason"] for row in quarantined)
    capsys.readouterr()
    assert command(*options, 1, "--out", tmp_path / "out", "--strict") == 3 and "--strict" in capsys.readouterr().err
    for i, more in enumerate(([0.01], [1, "--fail_fast"])):
        assert command(*options, *more, "--out", tmp_path / f"other{i}") == 2
        assert "Traceback" not in (err := capsys.readouterr().err) and err.count("error: ") == 1 and io.shown(raw) in err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [False, True])
def test_the_fuzzer_begins_with_whole_files(tmp_path, kind, zipped):
    """Without a change every sentence is read and nothing is quarantined, in one task or in many: else the fuzzer would prove nothing."""
    head, rows, tail = WHOLE[kind]
    path = tmp_path / f"file{kind}{'.gz' * zipped}"
    data = head + b"".join(rows) + tail
    path.write_bytes(gzip.compress(data) if zipped else data)
    for step in (200, 1 << 20):
        documents, dropped, quarantined = ingest(path, tmp_path, "line", step)
        assert len(documents) == len(SENTENCES) and not dropped and not quarantined
        assert all(s in row["text"] for s, row in zip(SENTENCES, documents))


def test_the_deadline_stops_what_hangs():
    """Even inside a regular expression that runs away."""
    import re
    if not hasattr(signal, "setitimer"):
        return
    with pytest.raises(TimeoutError), deadline(0.2):
        time.sleep(30)
    with pytest.raises(TimeoutError), deadline(0.2):
        re.match(r"(a|aa)+$", "a" * 60 + "b")
