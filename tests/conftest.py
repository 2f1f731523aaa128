"""Small worlds for the tests: a tokenizer trained in milliseconds, files of every kind a script reads, tiny models, and a
way to run a function in several processes as torchrun would. Nothing is downloaded and nothing outside tmp_path written."""
import functools
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")              # tiny tensors: threads only cost time, and the CPU may be shared

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                               # the training scripts are imported as modules

from nanollm import checkpoint
from nanollm.corpus.bpe import train_bpe
from nanollm.corpus.pack import write_tokens
from nanollm.model import ModelArgs, RewardModel, Transformer
from nanollm.tokenizer import bpe_tokenizer, pattern_for

torch.set_num_threads(1)
SHAPE = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16, max_seq_len=64)
NAMES = ["Anna", "Ben", "Clara", "David", "小明", "小红"]
THINGS = ["cat", "dog", "ball", "kite", "苹果", "书"]
COLOURS = ["red", "blue", "green", "yellow"]


def pytest_configure(config):
    """Two speeds: the proofs marked slow run only when asked for with -m."""
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(autouse=True)
def same_signals():
    """A script that ends with an error leaves its Ctrl-C handler behind; pytest keeps its own."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def stories(n):
    """n different short texts, English and Chinese."""
    return [f"{NAMES[i % 6]} has a {COLOURS[i // 6 % 4]} {THINGS[i // 24 % 6]}. It is number {i}. {NAMES[i % 6]} likes it very much. "
            + ("今天天气很好。" if i % 3 else "The sun is warm and the sky is blue. " * (i % 5)) for i in range(n)]


def chats(n):
    """n OpenAI-style rows with answers of very different lengths, every third with two exchanges."""
    rows = []
    for i in range(n):
        rows.append({"messages": [{"role": "user", "content": f"What has {NAMES[i % 6]}?"},
                                  {"role": "assistant", "content": f"A {COLOURS[i % 4]} {THINGS[i // 4 % 6]}." + " Yes!" * (i % 4)}]})
        if i % 3 == 0:
            rows[-1]["messages"] += [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "好的。"}]
    return rows


def pairs(n):
    """n preference rows; chosen and rejected differ in length."""
    return [{"prompt": [{"role": "user", "content": f"What has {NAMES[i % 6]}?"}], "chosen": f"A {COLOURS[i % 4]} {THINGS[i // 4 % 6]}, I think {i}.",
             "rejected": "No" + "!" * (i % 5)} for i in range(n)]


@functools.cache
def tiny_tokenizer(vocab_size=320):
    pattern = pattern_for(vocab_size)
    return bpe_tokenizer(train_bpe(stories(40), vocab_size, pattern, say=None), pattern)


def tiny_lm(seed=0, **changes):
    """A Transformer for tiny_tokenizer; weights larger than at the start of training, so that differences show."""
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**{**SHAPE, "vocab_size": tiny_tokenizer().vocab_size, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() > 1 else None
    return model.eval()


def tiny_rm(seed=1):
    torch.manual_seed(seed)
    return RewardModel(tiny_lm().args).eval()


def write_jsonl(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if str(path).endswith(".gz"):
        Path(path).write_bytes(gzip.compress(text.encode("utf-8")))
    else:
        Path(path).write_text(text, encoding="utf-8")
    return str(path)


def write_world(root, n_train=60, n_val=12):
    """root/{tokens/, chats.jsonl, chats_val.jsonl, pairs.jsonl, pairs_val.jsonl, base/step_…, rm/step_…} -> root."""
    tok = tiny_tokenizer()
    (root / "tokens").mkdir(parents=True)
    tok.save(root / "tokens" / "tokenizer")
    write_tokens(root / "tokens", "train", stories(n_train), tok)
    write_tokens(root / "tokens", "val", stories(n_train + n_val)[n_train:], tok)
    write_jsonl(root / "chats.jsonl", chats(n_train))
    write_jsonl(root / "chats_val.jsonl", chats(n_train + 8)[n_train:])
    write_jsonl(root / "pairs.jsonl", pairs(n_train))
    write_jsonl(root / "pairs_val.jsonl", pairs(n_train + 3)[n_train:])         # fewer than two batches: one rank has none
    checkpoint.save(root / "base", 7, tiny_lm(), tok, "pretrain", None)
    checkpoint.save(root / "rm", 5, tiny_rm(), tok, "rm", None)
    return root


@pytest.fixture(scope="session")
def tok():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Shared, read-only input files; scripts write below their own tmp_path."""
    return write_world(tmp_path_factory.mktemp("world") / "files")


COMMON = dict(device="cpu", max_steps=3, batch_size=2, gradient_accumulation_steps=2, warmup_steps=1, eval_every=100, save_every=100,
              log_every=1)


def options(stage, world, out_dir, **changes):
    """Keyword arguments for a script's Config: a run of seconds on `world`. stage: pretrain, sft, rm, dpo, ppo."""
    if stage == "pretrain":
        own = {"data": str(world / "tokens"), "rows": "documents", "eval_batches": 2, **SHAPE}
    else:
        kind = "chats" if stage == "sft" else "pairs"
        own = {"data": [str(world / f"{kind}.jsonl")], "val_data": [str(world / f"{kind}_val.jsonl")],
               "init_from": str(world / "base"), "epochs": 0.0, **({} if stage in ("rm", "ppo") else {"sample_prompts": ["Hi"]})}
    if stage == "ppo":
        own |= {"reward": str(world / "rm"), "max_new_tokens": 12, "eval_prompts": 5}
    return {**COMMON, **own, "out_dir": str(out_dir), **changes}


def flags(kwargs):
    """The same options as words for a command line."""
    words = []
    for key, value in kwargs.items():
        words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def metrics(out_dir):
    """[record] of OUT/metrics.jsonl."""
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run_dir):
    """The newest checkpoint's state dict."""
    return torch.load(checkpoint.find(run_dir) / "model.pt", weights_only=True)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


def python(code, *args, env=None, log=None):
    """Start `python -c code args…` with the repository and tests/ importable."""
    head = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    return subprocess.Popen([sys.executable, "-c", head + code, *map(str, args)], stdout=log, stderr=log, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def run_ranks(call, out, n=2, timeout=900):
    """Run `module.function(out)` (call = "module.function", a worker in tests/) in n gloo processes with torchrun's
    environment on a free port. Fails with the processes' output if one fails or hangs; none is left behind."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    logs = [open(out / f"rank{r}.log", "w+b") for r in range(n)]
    processes = [python(f"sys.stdout.reconfigure(encoding='utf-8'); import {call.split('.')[0]}, pathlib; {call}(pathlib.Path(sys.argv[1]))", out, log=logs[r],
                        env={"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
                 for r in range(n)]
    try:
        end = time.time() + timeout
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes) and time.time() < end:
            time.sleep(0.02)
        time.sleep(0.2 if any(p.poll() for p in processes) else 0)              # let the others say what they saw
        codes = [p.poll() for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()
        for log in logs:
            log.close()
    text = "\n".join((out / f"rank{r}.log").read_text(encoding="utf-8", errors="replace")[-3000:] for r in range(n))
    assert codes == [0] * n, f"exit codes {codes} (None = hung for {timeout} s)\n{text}"
