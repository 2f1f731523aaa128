"""Reading any corpus as a stream of documents, and the one file format between our own stages.

Raw input (.txt .jsonl .json .parquet, each also .gz) comes in through `read_documents`. A row that cannot be read goes
to quarantine.jsonl with its file, line and reason, and does not stop the stream. Between stages documents live in
JSONL files of {"id", "text"}, which `Documents` opens as a sequence: readable in any editor, and a document can be
fetched by its number, so nothing needs the whole corpus in memory.
"""
import gzip
import io
import json
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanollm.config import UserError

KINDS = (".txt", ".jsonl", ".json", ".parquet")
MAX_LINE = 64 << 20                       # bytes; a longer "line" is a binary or a broken file, not a document
BOM = b"\xef\xbb\xbf"


def kind(path):
    """The extension that decides the reader: ".jsonl" for books.jsonl and books.jsonl.gz."""
    path = Path(path)
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def shown(path):
    """A path as it is written into our files: forward slashes, and real characters where the locale knows none (C)."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "replace")


def find_files(paths, exclude):
    """Files and directories -> (readable files, [(skipped file, why)]), in the order given and sorted inside a
    directory; the order decides which of two duplicates is the first. `exclude` is our own output directory, which may
    lie inside an input directory; a file named by itself is read wherever it lies. Raises UserError for a path that does not exist, or if nothing is left."""
    files, skipped, seen = [], [], set()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--input: {path} does not exist")
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            why = ("lies in --out, our own output" if path.is_dir() and Path(exclude).resolve() in file.resolve().parents else
                   f"unknown extension (known: {' '.join(KINDS)}, each also .gz)" if kind(file) not in KINDS else
                   "empty file" if file.stat().st_size == 0 else None)
            skipped.append((file, why)) if why else files.append(file)
    if not files:
        why = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UserError(f"--input: nothing to read in {', '.join(map(str, paths))}{why}")
    return files, skipped


class Quarantine:
    """Rows that could not be read: written to a JSONL file of {"file", "line", "reason", "error", "head"}, counted."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="utf-8", newline="\n")
        self.counts, self.examples, self.broken_files = Counter(), [], set()

    def add(self, file, line, reason, head=b"", error=""):
        """`line` counts from 1 (rows in .json and .parquet; 0 is the file itself); `head`: the raw start of the row."""
        row = {"file": file, "line": line, "reason": reason, "error": str(error),
               "head": head[:200].decode("utf-8", "backslashreplace")}
        write_row(self.file, row)
        self.counts[reason] += 1
        self.examples += [row] * (len(self.examples) < 3)
        if reason == "unreadable_file":
            self.broken_files.add(file)


def open_bytes(path):
    """(raw file, stream of its uncompressed bytes); the raw one tells how far we are."""
    raw = open(path, "rb")
    return raw, gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def numbered_lines(stream, file, quarantine):
    """(number, bytes) of each line. Split at b"\\n" only: str.splitlines would cut a JSON row at U+2028 or U+0085."""
    number = 0
    while raw := stream.readline(MAX_LINE):
        number += 1
        if len(raw) < MAX_LINE or raw.endswith(b"\n"):
            yield number, raw.removeprefix(BOM) if number == 1 else raw
            continue
        quarantine.add(file, number, "line_too_long", raw, f"over {MAX_LINE >> 20} MiB")
        while (raw := stream.readline(MAX_LINE)) and not raw.endswith(b"\n"):
            pass


def choose_separator(path, doc_sep):
    """What ends a document of a .txt file: "auto" means blank lines if there are any between lines, else each line."""
    if kind(path) != ".txt" or doc_sep != "auto":
        return doc_sep
    text = blank = False
    raw, stream = open_bytes(path)
    with raw:
        try:
            while line := stream.readline(MAX_LINE):
                if line.strip() and blank:
                    return "blank"
                text, blank = text or bool(line.strip()), text and not line.strip()
        except (EOFError, OSError, zlib.error):          # a broken .gz: the reader will report it
            pass
    return "line"


def read_txt(stream, file, sep, quarantine):
    """(line of its start, {"text"}) of each document; decoded one by one, so that a bad byte costs one document."""
    start, block = 1, []

    def document():
        data = b"".join(block).strip(b"\r\n")
        block.clear()
        try:
            return [(start, {"text": data.decode("utf-8")})]
        except UnicodeDecodeError as e:
            quarantine.add(file, start, "not_utf8", data, f"{e}; convert the file to UTF-8")
            return []

    for number, raw in numbered_lines(stream, file, quarantine):
        if sep != "file" and not raw.strip():
            yield from document() if block else []
            continue
        start = start if block else number
        block.append(raw)
        if sep == "line":
            yield from document()
    yield from document() if block else []


def read_jsonl(stream, file, quarantine):
    """(line, row) of each JSON line; blank lines are nothing."""
    for number, raw in numbered_lines(stream, file, quarantine):
        try:
            if raw.strip():
                yield number, json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as e:         # ValueError: also a number of 5,000 digits
            quarantine.add(file, number, "not_utf8" if isinstance(e, UnicodeDecodeError) else "broken_json", raw, e)


def read_json(stream, file, quarantine):
    """(row number, row) of a JSON list, read whole. Many ".json" files are really JSON lines, and read as such."""
    data = stream.read().removeprefix(BOM)
    try:
        if data.lstrip().startswith(b"["):
            yield from enumerate(json.loads(data.decode("utf-8")), start=1)
        else:
            yield from read_jsonl(io.BytesIO(data), file, quarantine)
    except (ValueError, RecursionError) as e:
        quarantine.add(file, 0, "unreadable_file", data, e)


def read_parquet(stream, file, quarantine):
    """(row number, {"text"}) of each row; only the text column is read, 1,024 rows at a time."""
    try:
        table = pq.ParquetFile(io.BytesIO(stream.read()) if isinstance(stream, gzip.GzipFile) else stream)
        names = table.schema_arrow.names
        if "text" not in names:                           # iter_batches would yield empty batches without a word
            raise UserError(misplaced(names, file) or f"--input: {file} has no column \"text\", only "
                            f"{', '.join(names)}; rename the one that holds the documents")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for number, text in enumerate(batch.column(0).to_pylist(), start=number + 1):
                yield number, {"text": text}
    except (pa.ArrowException, OSError) as e:
        quarantine.add(file, 0, "unreadable_file", error=e)


def misplaced(keys, file):
    """The sentence for a file of chats or of preference pairs that was given as a corpus, or None."""
    if {"chosen", "rejected"} <= set(keys):
        return f"--input: {file} holds preference pairs, not documents: give it to train_rm.py or train_dpo.py"
    if set(keys) & {"messages", "conversations", "conversation", "instruction", "prompt"}:
        return f"--input: {file} is an SFT file (chats), not documents: give it to train_sft.py"


def fault(row):
    """Why a row is no document, or None."""
    if not isinstance(row, dict):
        return "not_an_object"
    text = row.get("text")
    return "missing_text" if text is None else None if isinstance(text, str) else "text_not_a_string"


def read_documents(separators, quarantine):
    """Stream {"id", "text"} from the files of `separators`, a dict {path: what ends a document, for .txt}; the id is
    "file:line". What cannot be read goes to `quarantine`. Raises UserError for a chat or preference file."""
    sizes = {path: path.stat().st_size for path in separators}
    bar, done = progress(total=sum(sizes.values()), unit="B", unit_scale=True, desc="clean"), 0
    for path, sep in separators.items():
        file, good = shown(path), 0
        raw, stream = open_bytes(path)
        reader = {".parquet": read_parquet, ".json": read_json, ".jsonl": read_jsonl}.get(kind(path))
        rows = reader(stream, file, quarantine) if reader else read_txt(stream, file, sep, quarantine)
        with raw:
            try:
                for number, row in rows:
                    if reason := fault(row):
                        if not good and isinstance(row, dict) and (sentence := misplaced(row, file)):
                            raise UserError(sentence)
                        quarantine.add(file, number, reason, json.dumps(row, default=str).encode())
                        continue
                    good += 1
                    yield {"id": f"{file}:{number}", "text": writable(row["text"])}
                    bar.update(done + raw.tell() - bar.n)
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                quarantine.add(file, 0, "unreadable_file", error=f"{e}; documents read before the damage: {good}")
        done += sizes[path]
    bar.close()


def writable(text):
    """JSON may hold half of a surrogate pair (an escape such as \\ud83d), which is no character: U+FFFD instead."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def write_row(file, row):
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def progress(iterable=None, **options):
    """A tqdm bar on stderr with rate and ETA; every half minute where nobody watches (a log file)."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, leave=False, mininterval=interval, maxinterval=interval, delay=interval, **options)


class Documents:
    """A JSONL file of {"id", "text"} as a sequence; only the line offsets (8 bytes a document) are in memory."""

    def __init__(self, path):
        self.path, self.offsets, position = Path(path), array("Q"), 0
        if not self.path.is_file():
            raise UserError(f"{path} is not a file; `prepare_data.py clean` makes it from raw files")
        self.file = open(self.path, "rb")
        for line in self.file:
            if line.strip():
                self.offsets.append(position)
            position += len(line)
        if not self.offsets:
            raise UserError(f"{path} holds no documents")

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        self.file.seek(self.offsets[i])                   # beyond the end: IndexError, which ends a for loop
        try:
            row = json.loads(self.file.readline())
            return {"id": str(row.get("id", i + 1)), "text": writable(row["text"])}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path}: document {i + 1} is not a line of {{\"text\": \"…\"}}; give raw files to "
                            "`prepare_data.py clean`") from None
