"""Reading raw files: every format gives the same documents, in a fixed order, with a source and an id. (What is broken: see
test_bad_input.)"""
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanollm.config import UserError
from nanollm.corpus import io

TEXTS = ["first document, 第一", "second one", "third 第三"]


def read(path, doc_sep="auto"):
    """(texts, [(line, reason, …)] of what could not be read) of one file."""
    bad = []
    rows = [row for task in io.plan([(path, "here", "auto")], doc_sep) for row in io.documents(task, lambda *row: bad.append(row))]
    return [row["text"] for row in rows], bad


def test_every_format_gives_the_same_documents(tmp_path):
    """.jsonl, .json (a list, or lines after all), .parquet, .txt, .csv, .tsv, each also compressed."""
    jsonl = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
    pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), tmp_path / "a.parquet")
    plain = {"a.jsonl": jsonl, "a.json": json.dumps([{"text": t} for t in TEXTS]).encode(), "b.json": jsonl,
             "a.txt": "\n".join(TEXTS).encode(), "b.txt": "\n\n \n".join(TEXTS).encode(), "a.parquet": (tmp_path / "a.parquet").read_bytes(),
             "a.csv": ("n,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS))).encode(),
             "a.tsv": ("text\tn\n" + "".join(f"{t}\t{i}\n" for i, t in enumerate(TEXTS))).encode()}
    for name, data in plain.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        for file in (name, f"{name}.gz"):
            assert read(tmp_path / file) == (TEXTS, []), file


def test_what_ends_a_document_of_a_text_file(tmp_path):
    """Blank lines if there are any between lines, else lines; a blank line at the end of the file is none."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\nthree\r\n".encode())
    assert io.choose_separator(path, "auto") == "blank"
    assert read(path)[0] == ["one\r\ntwo", "three"]
    assert read(path, "line")[0] == ["one", "two", "three"]
    assert read(path, "file")[0] == ["one\r\ntwo\r\n\r\nthree"]
    path.write_bytes(b"one\ntwo\n\n")
    assert io.choose_separator(path, "auto") == "line"


def test_files_are_found_in_a_fixed_order_once_and_skipped_with_a_reason(tmp_path):
    """A directory and a file in it, an unknown extension, an empty file, our own output; NAME=PATH names the source."""
    for name, data in {"b.txt": "x", "a/c.jsonl": "x", "a/d.docx": "x", "e.txt": "", "out/f.jsonl": "x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(data, encoding="utf-8")
    files, skipped = io.find_files([tmp_path / "b.txt", tmp_path], exclude=tmp_path / "out")
    assert [(f.name, source) for f, source, _ in files] == [("b.txt", "b"), ("c.jsonl", tmp_path.name)]
    assert {f.name: why.split()[0] for f, why in skipped} == {"d.docx": "unknown", "e.txt": "empty", "f.jsonl": "lies"}
    assert io.find_files([f"baike={tmp_path / 'b.txt'}"], exclude=tmp_path / "out")[0] == [(tmp_path / "b.txt", "baike", "baike")]
    assert io.find_files([f"mine={tmp_path / 'b.txt'}"], exclude=tmp_path / "out")[0] == [(tmp_path / "b.txt", "mine", "auto")]
    with pytest.raises(UserError, match="^--corpus: .*does not exist"):
        io.find_files([tmp_path / "nowhere"], tmp_path, "--corpus")
    (tmp_path / "a" / "report.json").write_text('{"signature": 1}', encoding="utf-8")              # a stage that made no documents, but tokens
    with pytest.raises(UserError, match="^--input: nothing to read .*belongs to a stage of ours"):
        io.find_files([tmp_path / "a"], exclude=tmp_path / "out")


def test_a_huge_document_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    """Each piece is a document of its own: id, id#2, id#3."""
    text = "".join(f"line {i} 第{i}行\n" for i in range(40_000))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}), encoding="utf-8")
    rows = list(io.documents(io.plan([(path, "here", "auto")])[0], bad=None))
    assert "".join(row["text"] for row in rows) == text and len(rows) > 2 and all(len(row["text"]) <= io.MAX_DOCUMENT for row in rows)
    assert all(row["text"].endswith("\n") for row in rows) and [row["id"][-2:] for row in rows[:3]] == [":1", "#2", "#3"]
