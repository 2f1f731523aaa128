"""Reading any corpus as a stream of documents, and the one file format between our own stages.

Raw input (.txt .jsonl .json .parquet, each also .gz) comes in through `read_documents`; a row that cannot be read
goes to quarantine.jsonl with its file, line and reason, and never stops the stream. Between stages documents live in
JSONL files of {"id", "text"}, which `Documents` opens as a sequence: readable in any editor, and a document can be
fetched by number, so nothing needs the whole corpus in memory.
"""
import gzip
import io
import json
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
SEPARATORS = ("auto", "line", "blank", "file")


def kind(path):
    """The extension that decides the reader, without .gz: "books.jsonl.gz" -> ".jsonl"."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def find_files(paths, exclude=None):
    """Files and directories -> (readable files in a fixed order, [(skipped file, why)]). Raises UserError.

    The order is that of `paths`, sorted inside a directory: it decides which of two duplicates is "the first".
    `exclude` is our own output directory, which may lie inside an input directory.
    """
    files, skipped, seen = [], [], set()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--input: {path} does not exist")
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            if exclude and Path(exclude).resolve() in file.resolve().parents:
                skipped.append((file, "lies in --out, our own output"))
            elif kind(file) not in KINDS:
                skipped.append((file, f"unknown extension (known: {' '.join(KINDS)}, each also .gz)"))
            elif file.stat().st_size == 0:
                skipped.append((file, "empty file"))
            else:
                files.append(file)
    if not files:
        why = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UserError(f"--input: nothing to read in {', '.join(map(str, paths))}{why}")
    return files, skipped


class Quarantine:
    """Rows that could not be read, written to a JSONL file of {"file", "line", "reason", "head"}, and counted."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="utf-8", newline="\n")
        self.counts, self.examples, self.broken_files = Counter(), [], set()

    def add(self, file, line, reason, head=b"", detail=""):
        """`line` counts from 1 (rows in .json and .parquet; 0: the file itself); `head` is the raw start of the row."""
        record = {"file": str(file), "line": line, "reason": reason, "error": str(detail),
                  "head": head[:200].decode("utf-8", "backslashreplace")}
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.counts[reason] += 1
        if len(self.examples) < 3:
            self.examples.append(record)
        if reason == "unreadable_file":
            self.broken_files.add(str(file))

    def close(self):
        self.file.close()


def open_bytes(path):
    """(raw file, stream of its uncompressed bytes): the raw one tells how far we are."""
    raw = open(path, "rb")
    return raw, gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def numbered_lines(stream, file, quarantine):
    """(number, bytes) of each line. Split at b"\\n" only: str.splitlines would cut a JSON row at U+2028 or U+0085."""
    number = 0
    while raw := stream.readline(MAX_LINE):
        number += 1
        if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
            quarantine.add(file, number, "line_too_long", raw, f"over {MAX_LINE >> 20} MiB")
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            continue
        yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def choose_separator(path, doc_sep):
    """What ends a document of a .txt file: "auto" means blank lines if the file has any inside, else each line."""
    if kind(path) != ".txt" or doc_sep != "auto":
        return doc_sep
    blank_after_text = text = False
    raw, stream = open_bytes(path)
    with raw:
        try:
            for line in iter(lambda: stream.readline(MAX_LINE), b""):
                if line.strip():
                    if blank_after_text:
                        return "blank"
                    text = True
                else:
                    blank_after_text = text
        except (EOFError, OSError, zlib.error):          # a broken .gz: the reader will report it
            pass
    return "line"


def read_txt(stream, file, sep, quarantine):
    """Documents of a text file: yields (line of its start, text). Bytes are decoded per document, so that one bad
    byte costs one document."""
    def decoded(start, block):
        data = b"".join(block)
        try:
            return [(start, data.decode("utf-8").strip("\r\n"))]
        except UnicodeDecodeError as e:
            quarantine.add(file, start, "not_utf8", data, f"{e}; convert the file to UTF-8 first")
            return []

    start, block = 1, []
    for number, raw in numbered_lines(stream, file, quarantine):
        blank = not raw.strip()
        if not blank or sep == "file":
            start = start if block else number
            block.append(raw)
        if block and (sep == "line" or sep == "blank" and blank):
            yield from decoded(start, block)
            block = []
    if block:
        yield from decoded(start, block)


def read_jsonl(stream, file, quarantine):
    """(line, row) of each JSON line; blank lines are nothing."""
    for number, raw in numbered_lines(stream, file, quarantine):
        if not raw.strip():
            continue
        try:
            yield number, json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as e:
            quarantine.add(file, number, "not_utf8", raw, e)
        except (ValueError, RecursionError) as e:         # ValueError: also a number of 5,000 digits
            quarantine.add(file, number, "broken_json", raw, e)


def read_json(stream, file, quarantine):
    """(row number, row) of a JSON list. Many ".json" files are really JSON lines: read as what they are."""
    data = stream.read()
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from read_jsonl(io.BytesIO(data), file, quarantine)
        return
    try:
        yield from enumerate(json.loads(data.decode("utf-8-sig")), start=1)
    except (ValueError, RecursionError) as e:             # UnicodeDecodeError is a ValueError
        quarantine.add(file, 0, "unreadable_file", data, e)


def read_parquet(stream, path, file, quarantine):
    """(row number, {"text": value}) of each row; only the text column is read, 1,024 rows at a time."""
    source = io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else stream
    try:
        table = pq.ParquetFile(source)
        names = table.schema_arrow.names
        if "text" not in names:                           # iter_batches would yield empty batches without a word
            raise UserError(misplaced(names, file) or f"--input: {file} has no column 'text', only {', '.join(names)}; "
                            "rename the column that holds the documents")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, {"text": value}
    except (pa.ArrowException, OSError) as e:
        quarantine.add(file, 0, "unreadable_file", b"", e)


def misplaced(keys, file):
    """The sentence for a file of chats or preference pairs that was given as a corpus, or None."""
    if {"chosen", "rejected"} <= set(keys):
        return f"--input: {file} holds preference pairs, not documents: give it to train_rm.py or train_dpo.py"
    if set(keys) & {"messages", "conversations", "conversation", "instruction", "prompt"}:
        return f"--input: {file} is an SFT file (chats), not documents: give it to train_sft.py"


def read_documents(files, quarantine):
    """Stream {"id", "text"} from `files`, a dict {path: separator (for .txt)}; the id is "file:line".

    Unreadable rows and files go to `quarantine`. Raises UserError for a chat or preference file.
    """
    bar = progress(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True, desc="clean")
    done = 0
    for path, sep in files.items():
        file, good = path.as_posix(), 0
        raw, stream = open_bytes(path)
        with raw:
            if kind(path) == ".txt":
                rows = ((number, {"text": text}) for number, text in read_txt(stream, file, sep, quarantine))
            elif kind(path) == ".parquet":
                rows = read_parquet(stream, path, file, quarantine)
            else:
                rows = (read_json if kind(path) == ".json" else read_jsonl)(stream, file, quarantine)
            try:
                for number, row in rows:
                    reason = fault(row)
                    if reason:
                        if not good and isinstance(row, dict) and (sentence := misplaced(row, file)):
                            raise UserError(sentence)
                        quarantine.add(file, number, reason, json.dumps(row, ensure_ascii=True, default=str).encode())
                        continue
                    good += 1
                    yield {"id": f"{file}:{number}", "text": writable(row["text"])}
                    bar.update(done + raw.tell() - bar.n)
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                quarantine.add(file, good + 1, "unreadable_file", b"", f"the compressed file breaks off here: {e}")
        done += path.stat().st_size
    bar.close()


def writable(text):
    """JSON may hold half of a surrogate pair (an escape such as \\ud83d), which is no character: U+FFFD instead."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def fault(row):
    """Why a row is no document, or None."""
    if not isinstance(row, dict):
        return "not_an_object"
    if row.get("text") is None:
        return "missing_text"
    return None if isinstance(row["text"], str) else "text_not_a_string"


def progress(iterable=None, **options):
    """A tqdm bar on stderr with rate and ETA; every half minute when nobody watches (a log file)."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, file=sys.stderr, leave=False, mininterval=interval, maxinterval=interval, **options)


class Documents:
    """A JSONL file of {"id", "text"} as a sequence; only the line offsets (8 bytes a document) are in memory."""

    def __init__(self, path):
        self.path, self.offsets = Path(path), array("Q")
        if not self.path.is_file():
            raise UserError(f"{path} does not exist; `prepare_data.py clean` makes it from raw files")
        self.file = open(self.path, "rb")
        position = 0
        for line in self.file:
            if line.strip():
                self.offsets.append(position)
            position += len(line)
        if not self.offsets:
            raise UserError(f"{path} holds no documents")

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        self.file.seek(self.offsets[i])                   # i beyond the end: IndexError, which ends a for loop
        try:
            row = json.loads(self.file.readline())
            return {"id": str(row.get("id", i + 1)), "text": writable(row["text"])}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path}: document {i + 1} is not a line of {{\"text\": …}}; "
                            "run `prepare_data.py clean` on raw files first") from None
