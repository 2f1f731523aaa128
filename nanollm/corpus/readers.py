"""Readers of the usual formats: (line or row number, row) of each row, bad(line, reason, head, error) for what is none.

They survive what is broken: a bad line costs that line, a damaged archive what follows the damage.
"""
import gzip
import io
import json
import re
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanollm.config import UserError

MAX_LINE = 64 << 20                       # bytes; a longer "line" is a binary or a broken file, not a document
BOM = b"\xef\xbb\xbf"
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)         # what a damaged .gz raises, from anywhere in it


def open_bytes(path):
    """(raw file, stream of its uncompressed bytes); the raw one tells how far we are. UserError if it cannot be opened."""
    try:
        raw = open(path, "rb")
    except OSError as e:
        raise UserError(f"--input: cannot open {Path(path).as_posix()}: {e.strerror}") from None
    return raw, gzip.GzipFile(fileobj=raw) if Path(path).suffix.lower() == ".gz" else raw


def numbered_lines(stream, bad, first=0, stop=-1):
    """(number, bytes) of each line up to byte `stop`. Split at b"\\n" only: str.splitlines would cut a JSON row at U+2028
    or U+0085."""
    number = first
    while (stop < 0 or stream.tell() < stop) and (raw := stream.readline(MAX_LINE)):
        number += 1
        if len(raw) < MAX_LINE or raw.endswith(b"\n"):
            yield number, raw.removeprefix(BOM) if number == 1 else raw
            continue
        bad(number, "line_too_long", raw, f"over {MAX_LINE >> 20} MiB")
        while (raw := stream.readline(MAX_LINE)) and not raw.endswith(b"\n"):
            pass


def read_txt(stream, bad, sep, first=0, stop=-1):
    """Documents that end at each line, at blank lines, or with the file; decoded one by one, so that a bad byte costs one.
    A document of over MAX_LINE bytes is cut there."""
    start, block, size = first + 1, [], 0

    def document():
        data = b"".join(block).strip(b"\r\n")
        block.clear()
        try:
            return [(start, {"text": data.decode("utf-8")})]
        except UnicodeDecodeError as e:
            bad(start, "not_utf8", data, f"{e}; convert the file to UTF-8")
            return []

    for number, raw in numbered_lines(stream, bad, first, stop):
        if sep != "file" and not raw.strip():
            yield from document() if block else []
            continue
        start, size = (start, size + len(raw)) if block else (number, len(raw))
        block.append(raw)
        if sep == "line" or size > MAX_LINE:
            yield from document()
    yield from document() if block else []


def read_jsonl(stream, bad, first=0, stop=-1):
    """JSON lines; blank lines are nothing."""
    for number, raw in numbered_lines(stream, bad, first, stop):
        try:
            if raw.strip():
                yield number, json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as e:        # ValueError: also a number of 5,000 digits
            bad(number, "not_utf8" if isinstance(e, UnicodeDecodeError) else "broken_json", raw, e)


def read_json(stream, bad):
    """The items of a JSON list, one at a time in memory. Many ".json" files are really JSON lines, and read as such.
    After a broken item there is no telling where the next begins: the rest of the file is reported as one."""
    if not stream.peek(1 << 12).removeprefix(BOM).lstrip().startswith(b"["):
        yield from read_jsonl(stream, bad)
        return
    decode, number, done = json.JSONDecoder().raw_decode, 0, False
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")     # a bad byte costs its own row
    buffer, at = text.read(1 << 16), 0
    at = buffer.index("[") + 1
    while not done:
        try:
            gap = re.compile(r"[\s,]*").match(buffer, at).end()
            if buffer.startswith("]", gap):
                if rest := (buffer[gap + 1:] + text.read(1 << 16)).strip():
                    bad(number + 1, "unreadable_file", rest[:200].encode("utf-8", "surrogateescape"), "there is more after the end of the list")
                return
            item, end = decode(buffer, gap)
            if end == len(buffer) and isinstance(item, (int, float)):
                raise ValueError("a number that may go on in the next block")
            number, raw, at = number + 1, buffer[gap:end], end
            if re.search("[\udc80-\udcff]", raw):
                bad(number, "not_utf8", raw[:200].encode("utf-8", "surrogateescape"), "convert the file to UTF-8")
            else:
                yield number, item
        except (ValueError, RecursionError) as e:
            more = text.read(max(1 << 16, len(buffer) - at)) if len(buffer) - at < MAX_LINE else ""
            if not more:
                done = True
                bad(number + 1, "unreadable_file", buffer[at:at + 200].encode("utf-8", "surrogateescape"), f"{e}; all rows from here on")
            buffer, at = buffer[at:] + more, 0


def read_parquet(path, bad, start=0, stop=-1, first=0):
    """Rows of the row groups start..stop, 1,024 at a time."""
    try:
        raw, stream = open_bytes(path)
        with raw:
            table = pq.ParquetFile(stream if stream is raw else io.BytesIO(stream.read()), pre_buffer=False)
            groups, number = range(start, stop if stop >= 0 else table.metadata.num_row_groups), first
            for batch in table.iter_batches(batch_size=1024, row_groups=groups):
                for row in rows_of(batch):
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, ValueError, *BROKEN) as e:
        if getattr(e, "errno", None):                    # the disk's or the network's fault, not the file's
            raise
        bad(0, "unreadable_file", b"", e)


def rows_of(batch):
    """A record batch as dicts; value by value where one does not convert, or where text may stand in a column of bytes."""
    try:
        if not any(pa.types.is_binary(t) or pa.types.is_large_binary(t) for t in batch.schema.types):
            return batch.to_pylist()
    except (pa.ArrowException, ValueError):
        pass
    return [{name: value_of(batch.column(name)[i]) for name in batch.schema.names} for i in range(batch.num_rows)]


def value_of(scalar):
    """What is no UTF-8 stays bytes, which no adapter takes for a text; what does not convert at all is None."""
    try:
        value = scalar.as_py()
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else None
    except (pa.ArrowException, ValueError):
        return None
