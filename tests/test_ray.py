"""Past one machine: the same functions and the same bytes on a Ray cluster, also when a node dies."""
import json
import os
import random
import threading
import time

import pyarrow as pa
import pytest
import ray

import prepare_data
from conftest import ROOT
from nanollm.corpus import clean, driver, io, parts
from test_driver import corpus, files, options, slow

WHO, WHAT, WHERE = ("小明", "老师", "医生", "邻居", "农民", "奶奶"), ("苹果", "书", "雨伞", "自行车", "茶壶", "风筝"), ("公园", "车站", "河边", "市场", "学校", "山上")
rng = random.Random(0)
VARIED = ["".join(f"{rng.choice(WHO)}在第{rng.randrange(999)}天把{rng.randrange(99)}个{rng.choice(WHAT)}带到了{rng.choice(WHERE)}。" for _ in range(9)) for _ in range(400)]
VARIED += [text[:-14] + "后来就没有了。" for text in VARIED[100:130]]


def stage_files(out):
    """Everything of clean, and the documents of dedup (its sidecars name their input, which lies elsewhere)."""
    return {"clean": files(out / "clean"), "dedup": {n: data for n, data in files(out / "dedup").items() if n.endswith(".parquet")}}


def carry(runner, raw, out, step=20_000):
    """clean and dedup, with tasks small enough that there are many."""
    recipe = clean.read_recipe()
    tasks = io.plan([(raw, "web", "auto")], step=step)
    driver.run_stage(options(out, runner=runner), "clean", tasks, lambda: [(clean.clean, recipe)], {}, [driver])
    prepare_data.main(["dedup", "--out", str(out), "--runner", runner, "--threshold", "0.7"])


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("raw") / "raw.jsonl", VARIED)


@pytest.fixture(scope="module")
def local(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    carry("local", raw, out)
    return out


@pytest.fixture
def cluster(monkeypatch):
    """One machine that plays a cluster, as Ray's own tests do; its workers find the package and these tests."""
    from ray.cluster_utils import Cluster
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_the_bytes_on_ray_are_those_of_the_local_runner(raw, local, tmp_path, cluster):
    """Tasks through map_batches, the bands joined through groupby().map_groups(): the same parts, sidecars and removals."""
    carry("ray", raw, tmp_path)
    assert stage_files(tmp_path) == stage_files(local)
    assert json.loads((local / "dedup/report.json").read_text(encoding="utf-8"))["dropped"]["near"] >= 20
    # and a stage function goes into Ray Data as it is
    table = pa.Table.from_pylist([{"id": str(i), "text": t, "source": "s", "meta": ""} for i, t in enumerate(VARIED[:200])])
    mapped = ray.data.from_arrow(table).map_batches(clean.clean, batch_format="pyarrow", batch_size=64, fn_kwargs={"cfg": clean.read_recipe()})
    rows = sorted(mapped.take_all(), key=lambda row: int(row["id"]))
    assert [row["text"] for row in rows] == clean.clean(table, clean.read_recipe())["text"].to_pylist()


@pytest.mark.slow
def test_a_node_that_dies_in_mid_stage_costs_nothing_but_time(raw, local, tmp_path, cluster):
    """Two nodes; the second is killed while it works. Ray gives its tasks to the first, and the bytes are the same."""
    second = cluster.add_node(num_cpus=2)
    recipe = clean.read_recipe()
    tasks = io.plan([(raw, "web", "auto")], step=3_000)
    driver.run_stage(options(tmp_path / "one"), "clean", tasks, lambda: [(slow, None)] * 20 + [(clean.clean, recipe)], {}, [driver])

    def kill():
        while not list((tmp_path / "two").rglob("part-*.json")):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        killed.append(len(list((tmp_path / "two").rglob("part-*.json"))))
    killed, thread = [], threading.Thread(target=kill)
    thread.start()
    driver.run_stage(options(tmp_path / "two", runner="ray"), "clean", tasks, lambda: [(slow, None)] * 20 + [(clean.clean, recipe)], {}, [driver])
    thread.join()
    assert 0 < killed[0] < len(tasks)
    assert files(tmp_path / "two" / "clean") == files(tmp_path / "one" / "clean")
