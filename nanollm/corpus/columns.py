"""What stage functions do to a table of documents: number its rows, set a column or the text, mark rows as dropped."""
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanollm.config import UserError


def numbers(table):
    """int64 (D,): each document's place in the global order, from the column `docno`, which the driver adds. Random
    choices and "the first" hang on it, so that they do not depend on how the corpus was cut into tables."""
    if "docno" not in table.column_names:
        raise UserError("this stage needs the column docno (the number of the document in the corpus); the table has "
                        + ", ".join(table.column_names))
    return table["docno"].to_numpy().astype(np.int64)


def with_column(table, name, values, kind=None):
    """The table with column `name` set to `values` (D,), as Arrow type `kind` if given; an existing one is replaced."""
    values = values if isinstance(values, pa.ChunkedArray) else pa.array(values, type=kind)
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def drop(table, mask, reason):
    """The table with drop_reason = `reason` where `mask` (D,) holds and no earlier rule has given one."""
    before = table["drop_reason"] if "drop_reason" in table.column_names else pa.nulls(len(table), pa.string())
    here = pc.if_else(pa.array(np.asarray(mask, dtype=bool)), pa.scalar(reason), pa.scalar(None, pa.string()))
    return with_column(table, "drop_reason", pc.coalesce(before, here))


def with_text(table, texts, changed, edit):
    """The table with new texts; where `changed` (D,) holds, the name `edit` joins those in the column `edits`."""
    table = with_column(table, "text", texts, pa.large_string())
    if "n_chars" in table.column_names:
        table = with_column(table, "n_chars", [len(text) for text in texts], pa.int32())
    before = table["edits"].to_pylist() if "edits" in table.column_names else [""] * len(table)
    names = [",".join(filter(None, [old, edit if new else ""])) for old, new in zip(before, changed)]
    return with_column(table, "edits", names, pa.string())


def is_conversation(meta):
    """Whether a row's `meta` holds a chat or a preference pair, of which no part can be cut."""
    row = json.loads(meta) if meta else {}
    return isinstance(row, dict) and ("messages" in row or "prompt" in row)
