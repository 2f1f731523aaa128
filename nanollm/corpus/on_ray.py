"""The same functions on a Ray cluster: tasks as rows of a Ray Dataset, mapped with map_batches, joined with groupby.

Ray brings what a cluster needs and this project does not write: a scheduler, back-pressure, and the repetition of what was
lost with a node. Workers write the same parts with the same names into the same directory (all nodes must see it: NFS,
Lustre, a mounted bucket), aside and then renamed, so a task that runs twice does no harm and the bytes are the local
runner's. RAY_ADDRESS chooses the cluster; without it Ray starts one on this machine.
"""
import logging
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanollm.config import UserError
from nanollm.corpus import dedup, io

GROUPS = 64                               # each band's values are joined in so many groups, so that a group is worth a task


def start():
    """The ray module, connected. UserError if the extra is missing."""
    try:
        import ray
    except ImportError:
        raise UserError("--runner ray needs Ray: pip install -e '.[ray]' (or leave --runner local)") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [
            os.getcwd(), os.environ.get("PYTHONPATH")]))}})
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def call(table, function, home):
    """One batch of items -> one batch of results; both travel pickled, as binary columns. `home`: our working directory, from
    which the paths in them are meant."""
    os.chdir(home)
    items = [pickle.loads(item) for item in table["item"].to_pylist()]
    return pa.table({"at": table["at"], "result": pa.array([pickle.dumps(function(item)) for item in items], pa.large_binary())})


def mistake(label, e):
    """The UserError that a task has raised, however Ray has wrapped it; else one that says what Ray says."""
    cause = e
    while cause is not None and not isinstance(cause, UserError):
        cause = getattr(cause, "cause", None) or cause.__cause__
    return cause or UserError(f"{label}: Ray gave up: {str(e).strip().splitlines()[-1]}; what is finished is kept: run the same command again")


def run(function, items, label="", seen=lambda result: None, keep=True):
    """driver.run on Ray: [function(item) for item in items], one item a Ray task."""
    ray = start()
    if not items:
        return [] if keep else None
    rows = pa.table({"at": list(range(len(items))), "item": pa.array([pickle.dumps(item) for item in items], pa.large_binary())})
    results, bar = [None] * len(items), io.progress(total=len(items), desc=f"{label} (ray)", unit=" parts")
    try:
        mapped = ray.data.from_arrow([rows.slice(i, 1) for i in range(len(items))]).map_batches(
            call, batch_format="pyarrow", batch_size=1, fn_args=(function, os.getcwd()))
        for row in mapped.iter_rows():
            result = pickle.loads(row["result"])
            results[row["at"]] = result if keep else None
            seen(result)
            bar.update()
    except ray.exceptions.RayError as e:
        raise mistake(label, e) from None
    finally:
        bar.close()
    return results


def bands_of_sketch(table, cfg, work, home):
    """Rows {"path", "first"} of sketch files -> the rows of dedup.band_rows, with the group that each value falls into."""
    os.chdir(home)
    found = pa.concat_tables([dedup.band_rows(dedup.ranked_sketch(path, first, work), cfg)
                              for path, first in zip(table["path"].to_pylist(), table["first"].to_pylist())])
    return found.append_column("group", pa.array((found["value"].to_numpy() % np.uint64(GROUPS)).astype(np.int32)))


def join(sketches, work, cfg):
    """The band join of the deduplication as a shuffle: rows (band, value, rank), grouped by band and group of values, each
    group to the edges that the local join finds in it. Yields arrays of edges."""
    ray = start()
    firsts = np.cumsum([0, *(pq.read_metadata(path).num_rows for path in sketches)])[:-1]
    files = pa.table({"path": [str(path) for path in sketches], "first": firsts})
    edges = ray.data.from_arrow([files.slice(i, 1) for i in range(len(sketches))]).map_batches(
        bands_of_sketch, batch_format="pyarrow", batch_size=1, fn_args=(cfg, str(work), os.getcwd())).groupby(["band", "group"]).map_groups(
        dedup.edges_of_group, batch_format="pyarrow")
    try:
        for batch in edges.iter_batches(batch_format="pyarrow", batch_size=None):
            yield batch["edge"].to_numpy()
    except ray.exceptions.RayError as e:
        raise mistake("join", e) from None
