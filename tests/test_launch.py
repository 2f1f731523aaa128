"""torchrun as a user types it: two machines, a worker that is killed and started again, a process that waits in vain."""
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import ROOT, flags, largest_difference, metrics, options, python, weights
from test_scripts import start, train_lines

# A training script in which process 1 dies the hard way in its fifth update, the first time.
DOOMED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train_pretrain
from nanollm.config import run
update, calls = train_pretrain.update, []
def doomed(*args):
    calls.append(1)
    if len(calls) == 5 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)
train_pretrain.update = doomed
run(train_pretrain.main, train_pretrain.Config)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(*words, log):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, words)], cwd=ROOT, stdout=log, stderr=log,
                            env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"})


def finish(processes, timeout=300):
    """Exit codes; what does not end in time is killed."""
    end = time.time() + timeout
    try:
        return [p.wait(max(1, end - time.time())) for p in processes]
    finally:
        for p in processes:
            p.kill()


def test_two_launchers_are_two_machines(world, tmp_path):
    """The commands of the documentation, both launchers on this machine: one run, the metrics of one process, one line for all
    that says how many processes and threads there are."""
    port, words = free_port(), flags(options("pretrain", world, tmp_path / "two"))
    logs = [open(tmp_path / f"node{i}.log", "w+b") for i in range(2)]
    nodes = [torchrun("--nproc_per_node=1", "--nnodes=2", f"--node_rank={i}", "--master_addr=127.0.0.1", f"--master_port={port}",
                      "--local_addr=127.0.0.1", "train_pretrain.py", *words, log=logs[i]) for i in range(2)]
    codes = finish(nodes)
    said = [(tmp_path / f"node{i}.log").read_text(encoding="utf-8") for i in range(2)]
    assert codes == [0, 0], "\n".join(said)
    assert re.search(r"2 processes \(ddp, tp 1\), \d+ thread\(s\) each", said[0]) and "thread(s)" not in said[1]
    for got, want in zip(train_lines(metrics(tmp_path / "two")), train_lines(start("pretrain", world, tmp_path / "one")), strict=True):
        assert got["train/loss"] == pytest.approx(want["train/loss"], rel=1e-5) and got["tokens"] == want["tokens"]


def test_a_killed_worker_is_started_again_and_goes_on(world, tmp_path):
    """torchrun --max_restarts 3 and kill -9 in the fifth of eight updates: both workers start anew, go on from the fourth without being
    told to, and the result is that of a run that nothing disturbed."""
    script, changes = tmp_path / "doomed.py", dict(max_steps=8, save_every=2)
    script.write_text(DOOMED, encoding="utf-8")
    with open(tmp_path / "log", "w+b") as log:
        codes = finish([torchrun("--standalone", "--nproc_per_node=2", "--max_restarts=3", script, ROOT,
                                 *flags(options("pretrain", world, tmp_path / "killed", **changes)), log=log)])
    said = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
    assert codes == [0], said[-3000:]
    assert said.count("resumed ") == 1 and re.search(r"resumed \S*step_00000004 at step 4", said)
    assert "process 0 got no answer from another one: it has ended" in said                 # what the survivor said
    start("pretrain", world, tmp_path / "undisturbed", **changes)
    assert largest_difference(weights(tmp_path / "killed"), weights(tmp_path / "undisturbed")) < 1e-5
    assert [r["step"] for r in train_lines(metrics(tmp_path / "killed"))] == list(range(1, 9))


WAITS = """
import os, pathlib, sys, time
from nanollm import config, dist
def main(cfg):
    here = pathlib.Path(sys.argv[2])
    (here / os.environ["RANK"]).touch()
    while len(list(here.iterdir())) < 2:                      # importing torch may take longer than the timeout: wait for each other first
        time.sleep(0.01)
    ctx = dist.init("cpu")
    if ctx.rank == 1:
        os._exit(1) if sys.argv[1] == "dies" else time.sleep(300)
    ctx.sum(1)
class Config: pass
config.parse = lambda cls, argv: None
config.run(main, Config)
"""


@pytest.mark.parametrize("fate, says", [("dies", "it has ended"), ("sleeps", "it hangs, has more work than this one")])
def test_waiting_in_vain_ends_with_a_sentence_and_code_2(tmp_path, fate, says):
    """Process 1 dies without a word, or sleeps past NANOLLM_TIMEOUT; process 0 says what is likely and ends, without a traceback."""
    port = free_port()
    (tmp_path / "here").mkdir()
    with open(tmp_path / "log", "w+b") as log:
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NANOLLM_TIMEOUT": "5"}
        one, zero = (python(WAITS, fate, tmp_path / "here", log=log if r == 0 else subprocess.DEVNULL, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (1, 0))
        try:
            code = finish([zero])
        finally:
            one.kill()
            one.wait()
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert code == [2] and "Traceback" not in said, said
    assert f"error: process 0 got no answer from another one: {says}" in said
