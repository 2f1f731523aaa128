"""Documents between the stages: OUT/STAGE/part-00012.parquet, and how a stage finds and reads what another has left.

Parquet because it is columnar (a stage reads the columns it needs), compressed (zstd-3 halves text and writes 129 MB/s on
one core) and read by everything. The schema is fixed, never guessed from the first row. Row groups of at most 1,024
documents or 16 MiB bound the memory of every reader.
"""
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanollm.config import UserError

EXPORTS = ("documents.jsonl", "dropped.jsonl")
STAGES = ("ingest", "clean", "dedup", "sentences", "weigh", "outliers", "decontaminate", "score", "tokenizer", "tokens")
ROWS, BYTES = 1024, 16 << 20              # the most documents, and bytes of text, in one row group and one table
SCHEMA = pa.schema([
    ("id", pa.string()), ("text", pa.large_string()),    # large: 64-bit offsets; `string` ends at 2 GiB an array
    ("source", pa.string()), ("meta", pa.string()),      # meta: JSON of a chat or a preference pair, else ""
    ("lang", pa.string()), ("n_chars", pa.int32()),
    ("quality", pa.float32()), ("weight", pa.float32()), ("dup_size", pa.int32())])
DROPPED = pa.schema([*SCHEMA, ("drop_reason", pa.string()), ("dup_of", pa.string()), ("jaccard", pa.float32())])


def conform(table, schema):
    """The columns of `schema`, in order; those a stage has not made are null."""
    return pa.table([table[f.name].cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type) for f in schema],
                    schema=schema)


class Writer:
    """One Parquet part, written aside and renamed by `close`: a part that is there is whole. Small tables are gathered
    into full row groups, so that a file does not depend on how its rows came."""

    def __init__(self, path, schema=SCHEMA):
        self.path, self.schema = Path(path), schema
        self.aside = Path(f"{path}.{os.getpid()}.tmp")
        self.file = pq.ParquetWriter(self.aside, schema, compression="zstd", compression_level=3, use_dictionary=["source", "lang"],
                                     write_statistics=False)
        self.waiting, self.rows, self.bytes = [], 0, 0

    def write(self, table):
        """Rows one by one only where the limits say so: a table of 1,024 small documents is one slice."""
        table = conform(table, self.schema)
        sizes = text_bytes(table)
        start = 0
        for i, size in enumerate(sizes.tolist()):
            if self.rows and (self.rows == ROWS or self.bytes + size > BYTES):
                self.waiting.append(table.slice(start, i - start))
                self.flush()
                start = i
            self.rows, self.bytes = self.rows + 1, self.bytes + size
        self.waiting.append(table.slice(start))

    def flush(self):
        if self.rows:
            self.file.write_table(pa.concat_tables(self.waiting).combine_chunks(), row_group_size=ROWS)
        self.waiting, self.rows, self.bytes = [], 0, 0

    def close(self):
        self.flush()
        self.file.close()
        publish(self.aside, self.path)


def text_bytes(table):
    """UTF-8 bytes of each text, as an int64 array."""
    column = table["text"].combine_chunks() if table.num_rows else pa.array([], pa.large_string())
    column = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
    return np.asarray(pa.compute.binary_length(column).fill_null(0), dtype=np.int64)


def publish(aside, path):
    """Rename what was written aside, after it has reached the disk: whoever sees `path` sees all of it."""
    with open(aside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(aside, path)


@contextmanager
def written(path):
    """Yields a name aside to write to, this process's own; when all went well, it is on the disk and renamed to `path`."""
    aside = f"{path}.{os.getpid()}.tmp"
    yield aside
    publish(aside, path)


def write_json(path, value):
    """A small JSON file, aside and renamed."""
    aside = Path(f"{path}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace", newline="\n")
    publish(aside, path)


def read_report(directory):
    """The report.json that a finished stage has left in `directory`, or None."""
    try:
        report = json.loads((Path(directory) / "report.json").read_text(encoding="utf-8"))
        return report if "signature" in report else None
    except (OSError, ValueError):
        return None


def gather(out):
    """OUT/report.json: the reports of all stages that are there."""
    write_json(Path(out) / "report.json", {s: report for s in STAGES if (report := read_report(Path(out) / s))})


def dropped(directory, columns=("id", "drop_reason", "dup_of", "jaccard")):
    """What a stage has dropped, as dicts one after the other; nothing if it kept nothing of that."""
    for path in sorted(Path(directory).glob("part-*.dropped.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=list(columns)):
            yield from batch.to_pylist()


class Parts:
    """The output of a finished stage as a sequence of documents. Only the number of rows of each part is in memory.

    UserError if the stage is not finished, or a part is missing or damaged.
    """

    def __init__(self, directory):
        self.directory, report = Path(directory), read_report(directory)
        if report is None:
            raise UserError(f"{self.directory.as_posix()} holds no finished stage; run `python prepare_data.py clean` (or what comes before) first")
        self.paths = [self.directory / name for name in report["parts"]]
        self.signature = report["output"]                # a hash of the parts' contents
        try:
            self.rows = [pq.ParquetFile(path).metadata.num_rows for path in self.paths]
        except (OSError, pa.ArrowException) as e:
            raise UserError(f"{self.directory.as_posix()}: a part is missing or damaged ({e}); run this stage again with --force") from None
        self.first = np.cumsum([0, *self.rows])          # the number of each part's first document

    def check_fresh(self):
        """UserError if the stage that this one was made from, or one further back, has been made anew since."""
        directory = self.directory
        while made_from := (read_report(directory) or {}).get("settings", {}).get("from"):
            now = read_report(made_from[0])
            if now and now["output"] != made_from[1]:
                raise UserError(f"{directory.as_posix()} was made from an earlier {made_from[0]}: run `python prepare_data.py {directory.name}` "
                                "again, or remove that directory if you do not want the stage, or name what you mean with --input")
            directory = Path(made_from[0])

    def __len__(self):
        return int(self.first[-1])

    def tables(self, columns=None):
        """All documents in order, a row group at a time."""
        for path, first in zip(self.paths, self.first):
            yield from read_tables(path, int(first), columns)

    def texts(self):
        for table in self.tables(["text"]):
            yield from table["text"].to_pylist()

    def sample(self, n):
        """About n documents spread evenly over the corpus: whole row groups are read, a few rows of each are used."""
        wanted = np.unique(np.linspace(0, max(len(self) - 1, 0), min(len(self), n)).astype(np.int64))
        for path, first, rows in zip(self.paths, self.first, self.rows):
            here = wanted[(wanted >= first) & (wanted < first + rows)]
            if len(here):
                for table in read_tables(path, int(first), ["text"]):
                    start = table["docno"][0].as_py()
                    at = here[(here >= start) & (here < start + table.num_rows)] - start
                    yield from table["text"].take(pa.array(at)).to_pylist()


def read_tables(path, first, columns=None):
    """The row groups of a part as tables, with a column `docno` of document numbers from `first` on."""
    file = pq.ParquetFile(path, pre_buffer=False)
    for i in range(file.metadata.num_row_groups):
        table = file.read_row_group(i, columns)
        yield table.append_column("docno", pa.array(np.arange(first, first + table.num_rows)))
        first += table.num_rows


def export(source, gone=False):
    """Write the documents of a stage, or those it dropped, beside its parts as JSON lines for people and other programs: {"id",
    "text"}, chats as {"id", "messages"}, pairs as {"id", "prompt", "chosen", "rejected"}. Returns (path, number of rows)."""
    path, n = source.directory / EXPORTS[gone], 0
    rows = dropped(source.directory, DROPPED.names) if gone else (row for table in source.tables() for row in table.to_pylist())
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="\n") as f:
        for n, row in enumerate(rows, 1):
            said = json.loads(row["meta"]) if row["meta"] else {"text": row["text"]}
            why = {k: row[k] for k in ("drop_reason", "dup_of", "jaccard") if row.get(k) is not None}
            f.write(json.dumps({"id": row["id"]} | said | why, ensure_ascii=False) + "\n")
    publish(f"{path}.tmp", path)
    return path, n
