"""Every command that a page shows is executed, in a smoke form: in a directory where the files it names exist (small ones), two updates
instead of hundreds. Whatever a command says on a page, a reader can type it.

Marked slow, since a hundred and fifty commands take minutes; .ci/run runs it beside the suite.
"""
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import evaluate
import export
import prepare_data
import train_classify
import train_sft
from conftest import ROOT, chats, pairs, write_jsonl
from learn import pictures
from learn.exercises import __main__ as exercises
from nanollm import ask, checkpoint, config
from nanollm import tokenizer as tokenizers
from nanollm import world as demo_world
from nanollm.corpus.train_tokenizer import train_sentencepiece
from nanollm.model import ModelArgs, RewardModel, Transformer
from test_classify import sequence_rows, token_rows
from test_docs import CHINESE, ENGLISH, commands

ELSEWHERE = {                                                # what stands in a page and is executed by other tests, or wants another machine
    r"--nnodes=2": "two machines (tests/test_launch.py starts two launchers on one)", r"--tp 2": "two processes: tests/test_parallel.py",
    r"--resume": "a run that was stopped: tests/test_checkpoint.py, tests/test_torture.py",
    r"^python bench/|learn\.studies|^python -m learn\.(experiments|exercises|pictures|site)|nanollm\.tools\.scaling":
        "tests/test_bench.py, test_quant.py, test_classify.py, test_learn.py, test_exercises.py and test_pictures.py run these on toy shapes",
    r"^python -m pytest": "that is this", r"--serve": "tests/test_serve.py",
}
SOURCES = ("web", "wiki", "code", "books", "chats")
MODELS = ("demo/pretrain demo/sft demo/dpo demo/ppo try/sft try/student try/stream try/muon_fast try/base try/muon try/adamw try/bf16 "
          "try/changed tuned imported base mine/pretrain mine/sft mine/dpo real/base real/sft").split()
FEW = dict(max_steps=2, eval_every=2, save_every=2, log_every=1, eval_batches=2, eval_prompts=4, batch_size=2, max_new_tokens=8, epochs=0.0, warmup_steps=1,
           minibatches=2, group=2, n=2, max_rows=6, max_tokens=3000)
OWN = {"train_ppo": dict(batch_size=4, max_rows=0), "prepare_data": dict(max_rows=30, max_new_tokens=150), "train_classify": dict(max_rows=0)}


def lm(seed, tok, cls=Transformer, **more):
    torch.manual_seed(seed)
    return cls(ModelArgs(dim=32, n_layers=2, n_heads=4, multiple_of=16, vocab_size=tok.vocab_size, max_seq_len=256), **more).eval()


def exam(folder):
    """CMMLU's layout: dev/ and test/, a CSV a subject."""
    for split, n in (("dev", 3), ("test", 4)):
        (folder / split).mkdir(parents=True)
        rows = [f"{i},{i} 加 {i} 等于几？,{i},{2 * i},{i + 7},{i + 9},B" for i in range(1, n + 1)]
        (folder / split / "elementary_mathematics.csv").write_text("\n".join([",Question,A,B,C,D,Answer", *rows]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with everything that the pages call by name."""
    here = tmp_path_factory.mktemp("reader") / "place"
    here.mkdir()
    was = os.getcwd()
    os.chdir(here)
    for folder in ("configs", "recipes", "tests", "docs", "nanollm"):
        os.symlink(ROOT / folder, here / folder)
    demo_world.write("out/demo/raw", "smoke")
    for stage in ("clean", "dedup", "tokenizer", "tokenize"):
        prepare_data.main([stage, "--config", f"configs/smoke/{stage}.toml", "--out", "out/demo", *(["--input", "out/demo/raw/documents.jsonl"] if stage == "clean" else [])])
    for run in ("smoke", "mine", "try"):                     # the same corpus under the other names
        shutil.copytree("out/demo", f"out/{run}")
    lines = [doc.text for doc in demo_world.documents(400, seed=3)]
    for folder in ("my_texts", "corpus", "texts", "books", "data/pretrain"):
        os.makedirs(folder)
        (here / folder / "a.txt").write_text("\n\n".join(lines[:300]), encoding="utf-8")
    for name in ("wiki.txt", "play.txt", "input.txt"):
        (here / name).write_text("\n\n".join(lines), encoding="utf-8")
    os.makedirs("path/to"), os.makedirs("data/tokenizers"), os.makedirs("data/sft"), os.makedirs("data/prefs"), os.makedirs("old")
    for name in ("c4.jsonl", "poetry.jsonl", "poems.jsonl", "news.jsonl.gz", "out/some.jsonl"):
        write_jsonl(here / name, [{"text": line} for line in lines])
    for name in "my_chats chats chats_val more ours general sharegpt_zh firefly_zh sft_rows out/try/sft data/sft/sharegpt_zh".split():
        write_jsonl(here / f"{name}.jsonl", chats(60))
    for name in ("alpaca_zh", "data/sft/alpaca_en", "data/sft/alpaca_zh"):
        (here / f"{name}.json").write_text(json.dumps([{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(40)]), encoding="utf-8")
    pq.write_table(pa.table({"prompt": [f"Say {i}" for i in range(40)], "response": [f"It is {i}." for i in range(40)]}), "chatlm_zh.parquet")
    for name in "my_pairs pairs prefs pairs_val prompts data/prefs/dpo_zh".split():
        write_jsonl(here / f"{name}.jsonl", pairs(60))
    (here / "data/prefs/dpo_en.json").write_text(json.dumps(pairs(40)), encoding="utf-8")
    write_jsonl(here / "entities.jsonl", token_rows(60))
    write_jsonl(here / "out/tasks.jsonl", sequence_rows(60))
    os.makedirs("sources")
    for i, name in enumerate(SOURCES):
        write_jsonl(here / "sources" / f"{name}.jsonl", [{"text": line} for line in lines[i::5]])
    exam(here / "cmmlu"), exam(here / "data/eval/cmmlu")
    (here / "rules.py").write_text("def short(row, text):\n    return -len(text)\n", encoding="utf-8")
    (here / "mine.py").write_text("def quality(text):\n    return min(1, len(text) / 100)\n", encoding="utf-8")
    mix = re.search(r"```toml\n(.*?\[\[phase\]\].*?)```", (ROOT / "docs" / "packing.md").read_text(encoding="utf-8"), re.S)[1]
    (here / "phases.toml").write_text(mix, encoding="utf-8")
    np.arange(600, dtype="<u2").__mod__(300).tofile("old/train.bin")
    model = train_sentencepiece(lines, 400, "bpe", say=lambda *_: None)
    for name in ("path/to/chatglm2.model", "tokenizer.model", "data/tokenizers/chatglm2.model"):
        (here / name).write_bytes(model)
    shutil.copytree("out/demo/tokens", "out/real/tokens")
    tok = tokenizers.load(here / "out/demo/tokens/tokenizer")
    for seed, name in enumerate(MODELS):
        checkpoint.save(here / "out" / name, 400, lm(seed, tok), tok, "pretrain" if "pretrain" in name else "sft", None)
        write_jsonl(here / "out" / name / "metrics.jsonl", [{"step": s, "time": 0.1 * s, "train/loss": 6 / s, "tokens": 100 * s, "lr": 1e-3, "grad_norm": 1.0,
                    **{f"train/{key}": 1.0 / s for key in ("scores", "kl", "rlhf_reward", "explained_variance", "entropy", "approx_kl")}} for s in range(1, 5)])
    for name in ("demo/rm", "mine/rm"):
        checkpoint.save(here / "out" / name, 5, lm(7, tok, RewardModel), tok, "rm", None)
    shutil.rmtree("out/mine/sft")                            # this one must have learnt to end an answer
    train_sft.main(train_sft.Config(data=["my_chats.jsonl"], init_from="out/mine/pretrain", out_dir="out/mine/sft", max_steps=60, epochs=0.0, batch_size=8, eval_every=60,
                                    save_every=60, log_every=30, learning_rate=1e-2))
    export.main(export.Config(init_from="out/demo/pretrain", out="path/to/model"))
    shutil.copy("path/to/model/tokenizer.json", "data/tokenizers/zero_chatgpt_tokenizer.json")
    os.chdir(was)
    return here


SHOWN = sorted({shlex.join(words) for page in [*ENGLISH, *CHINESE] for words in commands(page)})
HERE = [command for command in SHOWN if not any(re.search(pattern, command) for pattern in ELSEWHERE)]


def test_most_commands_are_executed_here():
    """And the rest stand in ELSEWHERE with the tests that run them."""
    assert len(HERE) > 150
    assert all(any(re.search(pattern, command) for command in SHOWN) for pattern in ELSEWHERE), "a pattern of ELSEWHERE fits nothing"


def test_what_the_lessons_run_elsewhere_has_these_names():
    """Experiments, studies, exercises, pictures and benchmarks: each that a page names is there."""
    for words in (shlex.split(command) for command in SHOWN):
        names = [word for i, word in enumerate(words[3:], 3) if not word.startswith("--") and not words[i - 1].startswith("--")]
        if words[1].startswith("bench/"):
            assert (ROOT / words[1]).exists(), words
        elif words[2].startswith(("learn.experiments.", "learn.studies.")):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), words
        elif words[2] == "learn.experiments":
            assert all((ROOT / "learn" / "experiments" / f"{name}.py").exists() for name in names if name != "all"), words
        elif words[2] == "learn.exercises":
            assert all(exercises.find(name) for name in names), words
        elif words[2] == "learn.pictures":
            assert all(callable(getattr(pictures, name)) for name in names), words


def smaller(module, cfg):
    """The same command with two updates, few rows, few tokens."""
    for key, value in {**FEW, **OWN.get(module, {})}.items():
        if isinstance(getattr(cfg, key, None), (int, float)) and not isinstance(getattr(cfg, key), bool):
            setattr(cfg, key, type(getattr(cfg, key))(value))
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE, ids=lambda command: re.sub(r"[^ -~]", "?", command))
def test_a_command_of_the_pages_runs(command, place, tmp_path, monkeypatch, capsys):
    """To its end, without an error, in a copy of the place."""
    here = tmp_path / "place"
    shutil.copytree(place, here, symlinks=True)
    monkeypatch.chdir(here)
    words = shlex.split(command)
    if words[0] == "torchrun":                               # tests/test_scripts.py starts two processes; here it is the options that count
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[2] == "nanollm.ask":
        ask.main(config.parse(ask.Config, words[3:]))
        return
    if words[1] == "-m":
        run = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert run.returncode == 0, run.stderr[-1500:]
        return
    name, argv = words[1].removesuffix(".py"), words[2:]
    prepare(command, here)
    module = importlib.import_module(name)
    if name == "prepare_data":
        function, options = module.COMMANDS[argv[0]]
        return function(smaller(name, config.parse(options, argv[1:])))
    cfg = smaller(name, config.parse(module.Config, argv))
    monkeypatch.setattr("builtins.input", nothing_more)      # of chat.py
    if getattr(cfg, "task", "") == "ppl" and any("tokens" in path for path in cfg.data):
        cfg.max_rows = 0
    if getattr(cfg, "out_dir", "") and getattr(cfg, "resume", "") in ("", None) and cfg.out_dir != getattr(cfg, "init_from", None):
        shutil.rmtree(cfg.out_dir, ignore_errors=True)       # a run of its own, as on the page
    if hasattr(cfg, "gradient_accumulation_steps"):
        cfg.gradient_accumulation_steps = 1
    module.main(cfg)


def nothing_more(prompt=""):
    raise EOFError


def prepare(command, here):
    """What one command alone wants to find, or to find missing."""
    if "labelled.jsonl" in command:
        kto = [{"prompt": f"Number {i}?", "completion": row["chosen"], "label": bool(i % 2)} for i, row in enumerate(pairs(200))]
        write_jsonl(here / "labelled.jsonl", kto if "kto" in command else sequence_rows(60))
    if classifier := re.search(r"--classifier (\S+?)(?::(\w+))?( |$)", command):
        rows = [row | {"label": (classifier[2] or "web") if row["label"] == "warm" else "other"} for row in sequence_rows(60)]
        write_jsonl(here / "classes.jsonl", rows)
        train_classify.main(smaller("train_classify", config.parse(train_classify.Config, ["--init_from", "out/base", "--data", "classes.jsonl", "--out_dir", classifier[1]])))
    adapted = re.search(r"--init_from (\S+) .*--adapter$|--adapters (.+)", command)
    for run in (adapted[1] or adapted[2]).split() if adapted else []:
        train_sft.main(smaller("train_sft", config.parse(train_sft.Config, ["--init_from", "out/mine/sft", "--data", "more.jsonl", "--out_dir", run,
                                                                            "--peft", "prompt" if "prompt" in run else "lora"])))
    if "--mix" in command or "--phases" in command:
        prepare_data.main(["build", "--input", *(f"sources/{name}.jsonl" for name in SOURCES), "--out", "out/mine", "--vocab_size", "512",
                           "--val_fraction", "0.3", "--by_source", "--force"])
    if "--compare" in command:
        for run in ("pretrain", "sft", "dpo"):
            evaluate.main(evaluate.Config(init_from=f"out/mine/{run}", data=["out/mine/tokens"], max_tokens=3000, out=f"out/mine/{run}"))
    if "--from_hf" in command:
        shutil.rmtree("out/imported")
    if command.startswith("python prepare_data.py demo"):
        shutil.rmtree(re.search(r"--out (\S+)", command)[1], ignore_errors=True)
    if command.startswith("python prepare_data.py rejects") and (out := re.search(r"--out (\S+)", command)):
        (here / out[1]).unlink(missing_ok=True)
