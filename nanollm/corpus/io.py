"""Raw files as a stream of documents: which files, cut into which tasks, and readers that survive what is broken.

.txt .jsonl .json .parquet .csv .tsv .warc .wet come in, each also .gz. `plan` cuts the input into tasks that depend on the
files only, never on the number of workers. `documents` streams one task: what cannot be read goes to a callback with
its file, line and reason (the driver writes it to quarantine.jsonl), and does not stop the stream.
"""
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanollm.config import UserError
from nanollm.corpus import adapters, foreign
from nanollm.corpus.parts import read_report
from nanollm.corpus.readers import BROKEN, MAX_LINE, open_bytes, read_json, read_jsonl, read_parquet, read_txt

KINDS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv", ".warc", ".wet")
TASK = 64 << 20                           # bytes of a file that make one task
MAX_DOCUMENT = 200_000                    # characters; longer documents are cut at line ends, each piece a document


@dataclass(frozen=True)
class Task:
    """A piece of the input that one worker reads: bytes start..stop of a text file, row groups start..stop of a
    Parquet file, else the whole file (start 0, stop -1)."""
    number: int
    path: str
    source: str
    adapter: str                          # "auto", or the name of one of adapters.ADAPTERS
    sep: str                              # what ends a document in .txt
    start: int = 0
    stop: int = -1
    line: int = 0                         # lines (rows) of the file before `start`
    bytes: int = 0                        # for the progress bar
    size: int = 0                         # of the file, and when it was changed: the signature of the input
    mtime_ns: int = 0


# ---- which files, and how they are cut -------------------------------------------------------------------------------

def kind(path):
    """The extension that decides the reader: ".jsonl" for books.jsonl and books.jsonl.gz."""
    path = Path(path)
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def shown(path):
    """A path as it is written into our files: forward slashes, and real characters where the locale knows none (C)."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "replace")


def find_files(paths, exclude, flag="--input"):
    """Files and directories, each perhaps NAME=PATH -> ([(file, source, adapter)], [(skipped file, why)]), in the order
    given and sorted inside a directory; the order decides which of two duplicates is the first.

    The source of a document is NAME, else the directory that was given, else the file's own name; a NAME that is one of
    adapters.ADAPTERS also says how its rows are to be read. `exclude` is our own output directory, which may lie inside
    an input directory; a file named by itself is read wherever it lies. UserError, which names `flag`, for a path that does not
    exist, or if nothing is left."""
    files, skipped, seen = [], [], set()
    for word in map(str, paths):
        name, equals, rest = word.partition("=")
        named = bool(equals) and re.fullmatch(r"[\w.-]+", name) and not Path(word).exists()
        path = Path(rest if named else word)
        if not path.exists():
            raise UserError(f"{flag}: {path} does not exist")
        adapter = name if named and name in adapters.ADAPTERS else "auto"
        inside = files_below(path, skipped) if path.is_dir() else [path]
        stages = {folder: read_report(folder) for folder in {file.parent for file in inside}}
        for file in inside:
            stage = stages[file.parent] if path.is_dir() else None        # a finished stage of ours: its documents, not what it dropped
            real = Path(os.path.realpath(file))          # not file.resolve(), which raises where links go in a circle
            if real in seen:
                continue
            seen.add(real)
            why = ("lies in --out, our own output" if path.is_dir() and Path(exclude).resolve() in real.parents else
                   "a link to a directory; name that itself" if file.is_dir() else
                   "belongs to a stage of ours, but not its documents" if stage and file.name not in stage.get("parts", ()) else
                   f"unknown extension (known: {' '.join(KINDS)}, each also .gz)" if kind(file) not in KINDS else
                   "not a regular file" if not file.is_file() else
                   "empty file" if file.stat().st_size == 0 else None)
            stem = Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem
            source = name if named else shown(path.resolve().name) if path.is_dir() else shown(stem)
            skipped.append((file, why)) if why else files.append((file, source, adapter))
    if not files:
        why = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UserError(f"{flag}: nothing to read in {', '.join(map(str, paths))}{why}")
    return files, skipped


def files_below(path, skipped):
    """All files below a directory, sorted; a directory that may not be read goes to `skipped`."""
    found = []
    for folder, _, names in os.walk(path, onerror=lambda e: skipped.append((Path(e.filename), e.strerror))):
        found += [Path(folder, name) for name in names]
    links = [Path(folder, name) for folder, names, _ in os.walk(path) for name in names if Path(folder, name).is_symlink()]
    return sorted([*found, *links])


def choose_separator(path, doc_sep):
    """What ends a document of a .txt file: "auto" means blank lines if there are any between lines, else each line."""
    if kind(path) != ".txt" or doc_sep != "auto":
        return doc_sep
    text = blank = False
    raw, stream = open_bytes(path)
    with raw:
        try:
            ended = True                                 # a line over MAX_LINE comes in pieces, and the last may be blank
            while line := stream.readline(MAX_LINE):
                if line.strip() and blank:
                    return "blank"
                text, blank, ended = text or bool(line.strip()), text and ended and not line.strip(), line.endswith(b"\n")
        except (*BROKEN, OSError):                       # the reader will report it
            pass
    return "line"


def cuts(path, size, step, at_blank):
    """[(byte, lines before it)] where the tasks of an uncompressed text file begin: the first line after each `step`
    bytes (the first after a blank line, where those part the documents)."""
    found, lines = [(0, 0)], 0
    with open_bytes(path)[0] as f:
        while f.tell() + step < size:
            left = step
            while left:
                block = f.read(min(left, 1 << 22))
                if not block:                            # the file has become shorter meanwhile
                    break
                left, lines = left - len(block), lines + block.count(b"\n")
            whole = block.endswith(b"\n")                # else the next piece is the end of a line, blank or not
            while line := f.readline(MAX_LINE):
                lines += line.endswith(b"\n")
                if line.endswith(b"\n") and (not at_blank or whole and not line.strip()):
                    break
                whole = line.endswith(b"\n")
            if f.tell() < size:
                found.append((f.tell(), lines))
    return found


def plan(files, doc_sep="auto", step=TASK):
    """[(file, source, adapter)] -> list of Task. Only plain .jsonl and .txt and Parquet files can be entered in the
    middle; every other file is one task."""
    tasks = []
    for path, source, adapter in files:
        stat, suffix = path.stat(), kind(path)
        whole = Task(0, str(path), source, adapter, choose_separator(path, doc_sep), bytes=stat.st_size, size=stat.st_size,
                     mtime_ns=stat.st_mtime_ns)
        pieces = [whole]
        if suffix in (".jsonl", ".txt") and path.suffix.lower() != ".gz" and whole.sep != "file" and stat.st_size > step:
            begins = cuts(path, stat.st_size, step, suffix == ".txt" and whole.sep == "blank")
            ends = [byte for byte, _ in begins[1:]] + [stat.st_size]
            pieces = [replace(whole, start=a, stop=b, line=n, bytes=b - a) for (a, n), b in zip(begins, ends)]
        elif suffix == ".parquet" and path.suffix.lower() != ".gz":
            pieces = row_group_tasks(whole, step)
        tasks += pieces
    return [replace(task, number=i) for i, task in enumerate(tasks)]


def row_group_tasks(whole, step):
    """Whole row groups of a Parquet file, as many as come to `step` bytes."""
    try:
        meta = pq.ParquetFile(whole.path).metadata
    except (pa.ArrowException, OSError, ValueError):     # the reader will report it (ValueError: a name that is no UTF-8)
        return [whole]
    pieces, begin, rows, size, before = [], 0, 0, 0, 0
    for i in range(meta.num_row_groups):
        size, rows = size + meta.row_group(i).total_byte_size, rows + meta.row_group(i).num_rows
        if size >= step or i == meta.num_row_groups - 1:
            pieces.append(replace(whole, start=begin, stop=i + 1, line=before, bytes=size))
            begin, before, size = i + 1, rows, 0
    return pieces or [whole]


# ---- one task as documents -------------------------------------------------------------------------------------------

def rows(task, bad, moved=lambda position: None):
    """(line, row) of each row of `task`; moved(bytes read so far) now and then, for the progress bar."""
    suffix = kind(task.path)
    if suffix == ".parquet":
        yield from read_parquet(task.path, bad, task.start, task.stop, task.line)
        return
    raw, stream = open_bytes(task.path)
    with raw:
        try:
            raw.seek(task.start)
            reader = (read_txt(stream, bad, task.sep, task.line, task.stop) if suffix == ".txt" else
                      read_jsonl(stream, bad, task.line, task.stop) if suffix == ".jsonl" else
                      read_json(stream, bad) if suffix == ".json" else
                      foreign.read_csv(stream, bad, "\t" if suffix == ".tsv" else ",") if suffix in (".csv", ".tsv") else
                      foreign.read_warc(stream, bad))
            for number, row in reader:
                yield number, row
                if number % 256 == 0:
                    moved(raw.tell() - task.start)
        except (*BROKEN, UnicodeDecodeError) as e:
            bad(0, "unreadable_file", b"", f"{e}; the rows before the damage were read")
        except OSError as e:                             # a disk that fails, a file that vanished
            raise UserError(f"{shown(task.path)}: {e.strerror or e}") from None


def documents(task, bad, moved=lambda position: None):
    """The documents of `task`: {"id": "file:line", "text", "source", "meta", "drop_reason"}; a drop reason is a rule of
    the source (see adapters). What is no document goes to bad(line, reason, head, error)."""
    name = shown(task.path)
    for number, row in rows(task, bad, moved):
        try:
            text, meta, reason = adapters.adapt(row, task.adapter)
        except ValueError as e:
            known = "known keys: text, content, messages, instruction and output, … (adapters.py)" if str(e) == "missing_text" else ""
            bad(number, str(e), json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "replace"), known)
            continue
        for k, piece in enumerate([text] if meta else pieces(text), 1):
            yield {"id": f"{name}:{number}" + f"#{k}" * (k > 1), "text": writable(piece), "source": task.source,
                   "meta": writable(json.dumps(meta, ensure_ascii=False)) if meta else "", "drop_reason": reason}


def pieces(text, limit=MAX_DOCUMENT):
    """A long text cut at line ends (where there are none: anywhere), at most `limit` characters each."""
    start = 0
    while len(text) - start > limit:
        cut = text.rfind("\n", start + 1, start + limit) + 1 or start + limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def writable(text):
    """JSON may hold half of a surrogate pair (an escape such as \\ud83d), which is no character: U+FFFD instead."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def write_row(file, row):
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def progress(iterable=None, **options):
    """A tqdm bar on stderr with rate and ETA; every half minute where nobody watches (a log file)."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, leave=False, mininterval=interval, maxinterval=interval, delay=interval, **options)
