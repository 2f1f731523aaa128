"""The same functions on a Ray cluster: tasks as rows of a Ray Dataset, mapped with map_batches, joined with groupby.

Ray brings what a cluster needs and this project does not write: a scheduler, back-pressure, and the repetition of what was
lost with a node. Workers write the same parts with the same names into the same directory (all nodes must see it: NFS,
Lustre, a mounted bucket), aside and then renamed, so a task that runs twice does no harm and the bytes are the local
runner's. RAY_ADDRESS chooses the cluster; without it Ray starts one on this machine.
"""
import os
import pickle

import pyarrow as pa

from nanollm.config import UserError
from nanollm.corpus import io


def start():
    """The ray module, connected. UserError if the extra is missing."""
    try:
        import ray
    except ImportError:
        raise UserError("--runner ray needs Ray: pip install \"nanollm[ray]\" (or leave --runner local)") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [
            os.getcwd(), os.environ.get("PYTHONPATH")]))}})
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def call(table, function):
    """One batch of items -> one batch of results; both travel pickled, as binary columns."""
    items = [pickle.loads(item) for item in table["item"].to_pylist()]
    return pa.table({"at": table["at"], "result": pa.array([pickle.dumps(function(item)) for item in items], pa.large_binary())})


def run(function, items, label="", seen=lambda result: None):
    """driver.run on Ray: [function(item) for item in items], one item a Ray task."""
    ray = start()
    rows = pa.table({"at": list(range(len(items))), "item": pa.array([pickle.dumps(item) for item in items], pa.large_binary())})
    results, bar = [None] * len(items), io.progress(total=len(items), desc=f"{label} (ray)", unit=" parts")
    try:
        mapped = ray.data.from_arrow([rows.slice(i, 1) for i in range(len(items))]).map_batches(
            call, batch_format="pyarrow", batch_size=1, fn_args=(function,))
        for row in mapped.iter_rows():
            results[row["at"]] = pickle.loads(row["result"])
            seen(results[row["at"]])
            bar.update()
    except ray.exceptions.RayTaskError as e:
        cause = e.cause if isinstance(getattr(e, "cause", None), UserError) else None
        raise cause or UserError(f"{label}: a Ray task failed: {str(e).strip().splitlines()[-1]}") from None
    finally:
        bar.close()
    return results
