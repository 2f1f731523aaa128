"""The training scripts as a user runs them: three real steps in one process and in two, refusals in one sentence,
and a kill -9 that leaves no trace in the result."""
import io
import json
import math
import os
import re
import shutil
import signal
import time
import types

import pytest
import torch

import train_dpo
import train_ppo
import train_pretrain
import train_rm
import train_sft
from conftest import (chats, flags, largest_difference, metrics, options, pairs, python, run_ranks, stories, tiny_lm, tiny_tokenizer, weights,
                      write_jsonl, write_world)
from nanollm import checkpoint, dist
from nanollm.config import parse, run
from nanollm.corpus.pack import write_tokens
from nanollm.log import Logger
from nanollm.model import RewardModel
from nanollm.optim import update
from nanollm.tokenizer import bpe_tokenizer

SCRIPTS = {"pretrain": train_pretrain, "sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": train_ppo}
LORA = dict(peft="lora", lora_rank=4)
VARIANTS = {"pretrain": {}, "pretrain-muon-dropout": {"optimizer": "muon", "dropout": 0.1}, "sft": {},
            "sft-lora": {**LORA, "lora_dropout": 0.1}, "rm": {}, "dpo": {}, "dpo-lora": LORA, "dpo-rpo": {"rpo_alpha": 0.5},
            "ppo": {}, "ppo-lora": {**LORA, "target_kl": 6.0}, "ppo-grpo": {"algorithm": "grpo", "group": 3},
            "sft-mix": {"data": ["chats.jsonl:0.7", "chats_val.jsonl:0.3"], "format": "bos", "truncate": "keep_start"}, "dpo-kto": {"loss": "kto"},
            "dpo-cached": {"precompute_ref": True, "pair_curriculum": 1.0, "loss": "ipo"}, "rm-divergence": {"loss": "divergence"}, "sft-alone": {"pack": False},
            "sft-adalora": {"peft": "adalora", "lora_rank": 2, "adapter_only": True}, "rm-lora": LORA, "sft-prompt": {"peft": "ptuning:n=4", "learning_rate": 1e-2}}


def start(variant, world, out_dir, **changes):
    """Run the script of a variant in this process. Returns its metrics."""
    stage = variant.split("-")[0]
    script, more = SCRIPTS[stage], dict(VARIANTS[variant])
    if "data" in more:
        more["data"] = [str(world / word) for word in more["data"]]
    if stage == "dpo":
        more["ref_cache"] = str(out_dir / "reference")
    script.main(script.Config(**{**options(stage, world, out_dir), **more, **changes}))
    return metrics(out_dir)


def train_lines(records):
    return [r for r in records if "train/loss" in r]


# ---- three steps ---------------------------------------------------------------------------------------------------

TWO_RANK_RUNS = {"pretrain": {}, "sft": {}, "rm": {}, "dpo": {}, "sft-lora": {"lora_dropout": 0.0}, "dpo-lora": {}, "dpo-rpo": {}, "ppo": {}, "ppo-grpo": {},
                 "sft-mix": {}, "dpo-kto": {}, "dpo-cached": {}, "rm-divergence": {}, "sft-alone": {}, "sft-adalora": {}, "rm-lora": {}, "sft-prompt": {}}


def worker(out):
    """All scripts, one after the other, in each of two ranks. Then pretraining with an infinite loss on rank 1."""
    torch.distributed.init_process_group("gloo")
    dist.finish = lambda ctx: None                             # one group for all runs
    world = out / "world"
    if int(os.environ["RANK"]) == 0:
        write_world(world)
    torch.distributed.barrier()
    for variant, changes in TWO_RANK_RUNS.items():
        start(variant, world, out / variant, **changes)

    real, calls, models, ddp = train_pretrain.pretrain_loss, [0], [], dist.DDP

    def broken(model, *batch):
        loss, count, m = real(model, *batch)
        if model.training:
            calls[0] += 1                                     # one micro-batch a step on each rank
            if os.environ["RANK"] == "1" and calls[0] == 2:
                loss = loss * float("inf")
        return loss, count, m
    train_pretrain.pretrain_loss = broken
    dist.DDP = lambda *a: models.append(ddp(*a)) or models[-1]
    start("pretrain", world, out / "inf", max_steps=4)
    torch.save(models[0].module.state_dict(), out / f"inf{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    run_ranks("test_scripts.worker", out)
    return out


@pytest.fixture(scope="module")
def alone(two, tmp_path_factory):
    """The same runs in this process: {variant: (out_dir, metrics)}."""
    out = tmp_path_factory.mktemp("alone")
    return {v: (out / v, start(v, two / "world", out / v, **changes)) for v, changes in TWO_RANK_RUNS.items()}


@pytest.mark.parametrize("variant", TWO_RANK_RUNS)
def test_three_real_steps_write_metrics_and_a_checkpoint(alone, variant):
    """One line a step with all that a curve needs, evaluation before the first and after the last step, a whole checkpoint
    with this stage's name, and weights that moved."""
    out, records = alone[variant]
    lines = train_lines(records)
    assert [r["step"] for r in lines] == [1, 2, 3]
    for r in lines:
        assert {"train/loss", "lr", "grad_norm", "tokens", "tokens_per_s"} <= r.keys() and r["grad_norm"] > 0
        assert r["train/loss"] > 0 or variant.startswith("ppo"), "only an advantage can be negative"
    evaluations = [r for r in records if "val/loss" in r]
    assert [r["step"] for r in evaluations] == [0, 3]
    model, tok, meta = checkpoint.load(out)
    assert (meta["stage"], meta["step"]) == (variant.split("-")[0], 3) and meta["head"] == ("reward" if variant.startswith("rm") else "lm")
    if not variant.startswith("rm"):
        assert all({"prompt", "text"} == s.keys() for s in evaluations[-1]["samples"]) and evaluations[-1]["samples"]
    if "-lora" in variant:
        assert meta["adapter"]["r"] == 4
    assert evaluations[0]["val/loss"] != evaluations[1]["val/loss"]


@pytest.mark.parametrize("variant", TWO_RANK_RUNS)
def test_two_processes_make_the_run_of_one(two, alone, variant):
    """Same losses, same validation (also where one rank has no validation batch), same weights after three AdamW updates
    with clipping. Only rank 0 writes and prints."""
    out, records = alone[variant]
    both = metrics(two / variant)
    assert len(both) == len(records)
    for a, b in zip(both, records):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_s", "samples", "time"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (key, a["step"])
    assert largest_difference(weights(two / variant), weights(out)) < 1e-5
    assert (two / "rank1.log").read_text(encoding="utf-8", errors="replace").count("step ") == 0


def test_an_infinite_gradient_on_one_rank_is_skipped_by_all(two):
    """The update is left out, said with the rows that it read, logged as null, and the run goes on with equal, finite weights.
    The schedule waits: the next update gets the rate that this one would have had."""
    a, b = (torch.load(two / f"inf{r}.pt", weights_only=True) for r in range(2))
    assert all(torch.equal(a[k], b[k]) and torch.isfinite(a[k]).all() for k in a)
    lines = train_lines(metrics(two / "inf"))
    assert [r["grad_norm"] is None for r in lines] == [False, True, False, False]
    assert all(math.isfinite(r["train/loss"]) for r in lines[2:]) and lines[1]["lr"] == lines[2]["lr"]
    event, = [r for r in metrics(two / "inf") if "event" in r]
    rows = [sorted(event["rows"])]
    assert event["step"] == lines[1]["step"] == 2 and "left out (1 in a row)" in event["event"] and len(rows[0]) == len(set(rows[0])) > 0
    assert "not finite: update left out" in (two / "rank0.log").read_text(encoding="utf-8", errors="replace")


def test_first_pretraining_loss_is_the_logarithm_of_the_vocabulary(alone):
    """An untrained model knows nothing: ln V within 5 %, in validation before the first step and in the first batch."""
    _, records = alone["pretrain"]
    want = math.log(tiny_tokenizer().vocab_size)
    assert records[0]["step"] == 0 and records[0]["val/loss"] == pytest.approx(want, rel=0.05)
    assert train_lines(records)[0]["train/loss"] == pytest.approx(want, rel=0.05)


def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_text(alone, two):
    record = alone["pretrain"][1][0]
    meta = json.loads((two / "world" / "tokens" / "val.json").read_text(encoding="utf-8"))
    assert record["val/bits_per_byte"] == pytest.approx(record["val/loss"] * meta["n_tokens"] / math.log(2) / meta["n_bytes"])


@pytest.mark.parametrize("variant", ["dpo", "dpo-lora"])
def test_dpo_starts_at_ln_2(alone, variant):
    """Policy = reference: in validation and in the first batch, for a frozen copy and for the adapter switched off."""
    _, records = alone[variant]
    assert records[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6) and records[0]["val/margin"] == pytest.approx(0, abs=1e-6)
    assert train_lines(records)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert train_lines(records)[-1]["train/margin"] > 0


def test_lora_leaves_the_base_weights_alone(alone, two):
    """After SFT with LoRA every base weight is bit for bit that of --init_from; only lora_A and lora_B are new."""
    base, tuned = weights(two / "world" / "base"), weights(alone["sft-lora"][0])
    assert all(torch.equal(v, tuned[k]) for k, v in base.items())
    assert {k.rpartition(".")[2] for k in tuned.keys() - base.keys()} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("variant", ["sft-lora", "dpo-lora"])
def test_merge_on_save_writes_a_plain_model_that_computes_the_same(world, tmp_path, variant):
    start(variant, world, tmp_path, merge_on_save=True)
    merged, adapted = checkpoint.load(tmp_path / "merged"), checkpoint.load(tmp_path)
    ids = torch.arange(30)[None]
    assert merged[2]["adapter"] is None and not any("lora" in k for k in weights(tmp_path / "merged"))
    torch.testing.assert_close(merged[0](ids), adapted[0](ids))
    assert largest_difference(merged[0].state_dict(), tiny_lm().state_dict()) > 0


@pytest.mark.parametrize("stage", ["rm", "dpo", "ppo"])
def test_dropout_stays_off_where_two_answers_are_compared(tmp_path, stage):
    """A base trained with dropout 0.5, and evaluation (which could switch it back on) after every step: two runs that
    differ only in their random numbers are equal."""
    world = write_world(tmp_path / "world", n_train=20)
    checkpoint.save(world / "base", 9, tiny_lm(dropout=0.5), tiny_tokenizer(), "pretrain", None)
    runs = []
    for noise in (1, 2):
        real = checkpoint.Saver.resume

        def noisy(*args):
            result = real(*args)
            torch.manual_seed(noise)
            return result
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.Saver, "resume", noisy)
            more = {"critic": str(world / "base")} if stage == "ppo" else {}
            runs.append([r["train/loss"] for r in train_lines(start(stage, world, tmp_path / str(noise), eval_every=1, **more))])
    assert runs[0] == runs[1]


def test_epochs_count_the_steps(world, tmp_path):
    """Without --max_steps the epochs say how long the run is: half of 60 rows, 4 an update, the last update smaller."""
    records = train_lines(start("rm", world, tmp_path, epochs=0.5, max_steps=0))
    assert records[-1]["step"] == math.ceil(30 / 4)


def test_max_steps_wins_over_the_epochs(world, tmp_path):
    """A given --max_steps is never ignored: the epochs are only a default length."""
    assert train_lines(start("rm", world, tmp_path, epochs=1.0, max_steps=2))[-1]["step"] == 2


def test_muon_trains_every_stage(world, tmp_path):
    for stage in SCRIPTS:
        lines = train_lines(start(stage, world, tmp_path / stage, optimizer="muon"))
        assert len(lines) == 3 and all(math.isfinite(r["train/loss"]) for r in lines)


def test_bfloat16_autocast_trains_and_saves_fp32(world, tmp_path):
    a, b = start("pretrain", world, tmp_path / "a", dtype="bfloat16"), start("pretrain", world, tmp_path / "b")
    assert train_lines(a)[0]["train/loss"] == pytest.approx(train_lines(b)[0]["train/loss"], rel=1e-2)
    assert {v.dtype for v in weights(tmp_path / "a").values()} == {torch.float32}


def test_a_stop_request_saves_after_the_step_and_resumes(world, tmp_path):
    """SIGTERM (a cluster's notice, or Ctrl-C): the step is finished, the checkpoint written, exit code 130; --resume auto
    goes on to the same result as an undisturbed run."""
    straight = start("pretrain", world, tmp_path / "straight", max_steps=6)
    real, calls = train_pretrain.pretrain_loss, [0]

    def interrupted(model, *batch):
        calls[0] += model.training
        if calls[0] == 5:                                     # in the third update
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, *batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pretrain, "pretrain_loss", interrupted)
        with pytest.raises(SystemExit) as stop:
            start("pretrain", world, tmp_path / "stopped", max_steps=6)
    assert stop.value.code == 130 and checkpoint.find(tmp_path / "stopped").name == "step_00000003"
    resumed = start("pretrain", world, tmp_path / "stopped", max_steps=6, resume="auto")
    assert [(r["step"], r["train/loss"]) for r in train_lines(resumed)] == [(r["step"], r["train/loss"]) for r in train_lines(straight)]
    assert largest_difference(weights(tmp_path / "stopped"), weights(tmp_path / "straight")) == 0


# ---- kill -9 and resume --------------------------------------------------------------------------------------------

LONG = dict(max_steps=20, save_every=5, eval_every=4, keep=0)


def kill_worker(out):
    """Each variant in a process of its own that is killed with SIGKILL in the middle of writing the checkpoint of step 15."""
    real = torch.save

    def deadly(obj, path):
        real(obj, path)
        if ".writing_00000015" in str(path):                  # model.pt is there, training.pt and meta.json are not
            os.kill(os.getpid(), signal.SIGKILL)
    for variant in VARIANTS:
        pid = os.fork()
        if pid == 0:
            torch.save = deadly
            try:
                start(variant, out / "world", out / variant, **LONG)
            finally:
                os._exit(1)                                   # only reached if nothing killed us
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (variant, status)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("killed")
    write_world(out / "world")
    with open(out / "log", "w+b") as log:
        process = python("sys.stdout.reconfigure(encoding='utf-8'); import test_scripts, pathlib; test_scripts.kill_worker(pathlib.Path(sys.argv[1]))", out, log=log)
        try:
            code = process.wait(timeout=900)                  # seconds, unless the machine is busy with something else
        finally:
            process.kill()
    assert code == 0, (out / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
    return out


def same_run(a, b):
    """Equal training and validation values at every step, and weights equal bit for bit."""
    def values(out):
        return [(r["step"], {k: v for k, v in r.items() if k not in ("step", "tokens_per_s", "time")}) for r in metrics(out)
                if not r.get("event", "").startswith("rollback")]          # a kill between the deed and the word leaves it unsaid
    assert values(a) == values(b)
    assert largest_difference(weights(a), weights(b)) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(killed, tmp_path, variant):
    """20 steps = 10, a kill -9 while step 15 was being saved, and --resume auto: weights and every logged number equal,
    with AdamW, Muon, dropout, adapters and packing."""
    names = sorted(p.name for p in (killed / variant).glob("*0*"))
    assert "step_00000010" in names and "step_00000015" not in names
    start(variant, killed / "world", tmp_path, **LONG)
    records = start(variant, killed / "world", killed / variant, resume="auto", **LONG)
    assert [r["step"] for r in train_lines(records)] == list(range(1, 21))
    same_run(killed / variant, tmp_path)
    assert not list((killed / variant).glob(".writing*"))


def killed_from_outside(variant, world, out, when):
    """Start the real script as a user would, kill -9 it when `when()` says so. Returns its exit code."""
    stage = variant.split("-")[0]
    words = flags({**options(stage, world, out), **VARIANTS[variant], **LONG, "gradient_accumulation_steps": 8, "resume": "auto"})
    code = f"import runpy; sys.argv[0] = 'train_{stage}.py'; runpy.run_path('train_{stage}.py', run_name='__main__')"
    with open(out.with_suffix(".log"), "ab") as log:
        process = python(code, *words, log=log)
        end = time.time() + 500
        while process.poll() is None and not when() and time.time() < end:
            time.sleep(0.002)
        process.kill()
        return process.wait()


def test_the_real_script_killed_from_outside_resumes_bit_for_bit(world, tmp_path):
    """train_pretrain.py from a command line, killed at whatever it does once the checkpoint of step 10 is there."""
    out = tmp_path / "killed"
    assert killed_from_outside("pretrain", world, out, (out / "step_00000010" / "meta.json").exists) == -signal.SIGKILL
    start("pretrain", world, tmp_path / "straight", **LONG, gradient_accumulation_steps=8)
    start("pretrain", world, out, **LONG, gradient_accumulation_steps=8, resume="auto")
    same_run(out, tmp_path / "straight")


def test_a_longer_schedule_is_refused_unless_asked_for(world, tmp_path, capsys):
    """--resume auto with another --max_steps: a sentence; with --override_schedule it goes on."""
    start("sft", world, tmp_path, max_steps=3)
    assert "--override_schedule" in refused(train_sft, flags(options("sft", world, tmp_path, max_steps=5, resume="auto")), capsys)
    records = start("sft", world, tmp_path, max_steps=5, resume="auto", override_schedule=True)
    assert [r["step"] for r in train_lines(records)] == [1, 2, 3, 4, 5]


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    """The speedrun may call a stage again: no new step, the same checkpoint."""
    start("dpo", world, tmp_path)
    before = (checkpoint.find(tmp_path) / "model.pt").stat().st_mtime_ns
    records = start("dpo", world, tmp_path, resume="auto")
    assert len(train_lines(records)) == 3 and (checkpoint.find(tmp_path) / "model.pt").stat().st_mtime_ns == before


# ---- refusals ------------------------------------------------------------------------------------------------------

def refused(script, words, capsys):
    """Run the script on a command line that it must refuse; returns the one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(script.main, script.Config, script.__doc__, words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip() and "Warning" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def text(path, content):
    path.write_bytes(content)
    return str(path)


def other_tokens(tmp):
    """Token files of another tokenizer."""
    tok = tiny_tokenizer()
    tok = bpe_tokenizer(tok.spec["merges"][:-1], tok.spec["pattern"])
    (tmp / "other").mkdir()
    tok.save(tmp / "other" / "tokenizer")
    for split in ("train", "val"):
        write_tokens(tmp / "other", split, stories(30), tok)
    return str(tmp / "other")


def copy_of(source, target, harm):
    shutil.copytree(source, target)
    harm(target)
    return str(target)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def reward_model(tmp):
    return str(checkpoint.save(tmp / "rm", 1, RewardModel(tiny_lm().args), tiny_tokenizer(), "rm", None))


def other_reward(tmp):
    tok = tiny_tokenizer()
    tok = bpe_tokenizer(tok.spec["merges"][:-1], tok.spec["pattern"])
    return str(checkpoint.save(tmp / "other", 1, RewardModel(tiny_lm(vocab_size=tok.vocab_size).args), tok, "rm", None))


def rule(tmp, source):
    (tmp / "rule.py").write_text(source, encoding="utf-8")
    return str(tmp / "rule.py")


def short_corpus(tmp):
    tok = tiny_tokenizer()
    (tmp / "short").mkdir()
    tok.save(tmp / "short" / "tokenizer")
    for split in ("train", "val"):
        write_tokens(tmp / "short", split, ["Hi."], tok)
    return str(tmp / "short")


def good(n=3):
    return b"".join(json.dumps(r).encode() + b"\n" for r in chats(n))


def mixed(tmp):
    return text(tmp / "mixed.jsonl", good(3) + b'{"broken\n{"messages": []}\n')


# name: (stage, changed options as a function of (tmp_path, world), what the sentence says)
REFUSALS = {
    "unknown flag": ("pretrain", lambda t, w: {"learning_rat": 1}, "did you mean 'learning_rate'"),
    "not a number": ("sft", lambda t, w: {"batch_size": "many"}, "wants int"),
    "no such data directory": ("pretrain", lambda t, w: {"data": str(t / "none")}, "prepare_data.py build"),
    "a text file given to pretraining": ("pretrain", lambda t, w: {"data": text(t / "a.txt", b"hello")}, "prepare_data.py"),
    "an SFT file given to pretraining": ("pretrain", lambda t, w: {"data": str(w / "chats.jsonl")}, "train_sft.py"),
    "corpus shorter than one block": ("pretrain", lambda t, w: {"data": short_corpus(t), "rows": "stream"}, "less than one row"),
    "truncated token file": ("pretrain", lambda t, w: {"data": copy_of(w / "tokens", t / "x", lambda d: truncate(d / "train-00000.bin"))}, "truncated copy"),
    "missing index": ("pretrain", lambda t, w: {"data": copy_of(w / "tokens", t / "x", lambda d: (d / "val-00000.idx").unlink())}, "no val token file"),
    "damaged tokenizer": ("pretrain", lambda t, w: {"data": copy_of(w / "tokens", t / "x", lambda d: truncate(d / "tokenizer" / "tokenizer.json"))},
                          "tokenizer"),
    "wrong tokenizer": ("pretrain", lambda t, w: {"data": other_tokens(t), "init_from": str(w / "base"), **dict.fromkeys(
        ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len"))}, "another tokenizer"),
    "shape against init_from": ("pretrain", lambda t, w: {"init_from": str(w / "base"), "dim": 64}, "--dim 64: the shape comes from --init_from"),
    "impossible heads": ("pretrain", lambda t, w: {"dim": 30}, "n_heads"),
    "no heads": ("pretrain", lambda t, w: {"n_heads": 0}, "n_heads"),
    "impossible attention": ("pretrain", lambda t, w: {"attention": "flash"}, "attention must be"),
    "vocabulary too small": ("pretrain", lambda t, w: {"vocab_size": 100}, "smaller than the tokenizer"),
    "unknown rows": ("pretrain", lambda t, w: {"rows": "lines"}, "--rows lines is unknown"),
    "unknown schedule": ("pretrain", lambda t, w: {"schedule": "staircase"}, "--schedule staircase is unknown"),
    "unknown optimizer": ("rm", lambda t, w: {"optimizer": "sgd"}, "--optimizer sgd is unknown"),
    "negative rate": ("dpo", lambda t, w: {"learning_rate": -1}, "at least 0"),
    "rate that is no number": ("dpo", lambda t, w: {"learning_rate": "nan"}, "finite"),
    "eval_every 0": ("sft", lambda t, w: {"eval_every": 0}, "at least 1"),
    "batch 0": ("sft", lambda t, w: {"batch_size": 0}, "at least 1"),
    "no such device": ("rm", lambda t, w: {"device": "gpu"}, "is no device"),
    "no such type": ("pretrain", lambda t, w: {"dtype": "fp8"}, "--dtype fp8 is unknown"),
    "no such base": ("sft", lambda t, w: {"init_from": str(t / "none")}, "holds no checkpoint"),
    "truncated checkpoint": ("sft", lambda t, w: {"init_from": copy_of(w / "base" / "step_00000007", t / "c", lambda d: truncate(d / "model.pt"))},
                             "damaged"),
    "a reward model as base": ("dpo", lambda t, w: {"init_from": reward_model(t)}, "is a reward model"),
    "too long rows": ("sft", lambda t, w: {"max_seq_len": 100}, "longer than the model's context"),
    "empty file": ("sft", lambda t, w: {"data": [text(t / "e.jsonl", b"")]}, "the file is empty"),
    "missing file": ("rm", lambda t, w: {"data": [str(t / "n.jsonl")]}, "does not exist"),
    "no file at all": ("sft", lambda t, w: {"data": []}, "--data"),
    "unknown kind of file": ("sft", lambda t, w: {"data": [text(t / "a.csv", b"a,b")]}, "unknown kind of file"),
    "a directory of tokens given to SFT": ("sft", lambda t, w: {"data": [str(w / "tokens")]}, "is a directory; name the files in it"),
    "broken JSON lines": ("sft", lambda t, w: {"data": [mixed(t)]}, "more than --max_bad 10%"),
    "invalid UTF-8": ("sft", lambda t, w: {"data": [text(t / "u.jsonl", b"\xff\xfe{}\n" * 3)]}, "cannot be used"),
    "a missing field": ("sft", lambda t, w: {"data": [text(t / "f.jsonl", b'{"instruction": "Q"}\n' * 3)]}, "no answer"),
    "plain text rows given to SFT": ("sft", lambda t, w: {"data": [text(t / "p.jsonl", b'{"text": "once"}\n' * 3)]}, "prepare_data.py"),
    "pairs given to SFT": ("sft", lambda t, w: {"data": [str(w / "pairs.jsonl")]}, "train_rm.py or train_dpo.py"),
    "unpaired preferences given to SFT": ("sft", lambda t, w: {"data": [write_jsonl(t / "k.jsonl", [{"prompt": "Q", "completion": "A", "label": True}] * 4)]},
                                          "unpaired preference row .*train_dpo.py"),
    "a weight for one of two files": ("sft", lambda t, w: {"data": [f"{w / 'chats.jsonl'}:0.5", str(w / "chats_val.jsonl")]}, "one weight above 0"),
    "unknown format": ("sft", lambda t, w: {"format": "xml"}, "--format xml is unknown; use one of chatml, bos, raw"),
    "unknown truncation": ("sft", lambda t, w: {"truncate": "end"}, "--truncate end is unknown"),
    "chats given to RM": ("rm", lambda t, w: {"data": [str(w / "chats.jsonl")]}, "not a preference row"),
    "chats given to DPO": ("dpo", lambda t, w: {"data": [str(w / "chats.jsonl")]}, "not a preference row"),
    "equal answers": ("dpo", lambda t, w: {"data": [write_jsonl(t / "s.jsonl", [{**p, "rejected": p["chosen"]} for p in pairs(4)])]}, "the same"),
    "one row and no validation": ("dpo", lambda t, w: {"data": [write_jsonl(t / "1.jsonl", pairs(1))], "val_data": []}, "--val_data"),
    "unknown adapter": ("sft", lambda t, w: {"peft": "ia4"}, "--peft ia4 is unknown; did you mean 'ia3'"),
    "unknown LoRA target": ("dpo", lambda t, w: {"peft": "lora", "lora_targets": ["q_proj"]}, "choose from"),
    "LoRA rank 0": ("sft", lambda t, w: {"peft": "lora", "lora_rank": 0}, "rank"),
    "no such reward": ("ppo", lambda t, w: {"reward": str(t / "none")}, "holds no checkpoint"),
    "a language model as reward": ("ppo", lambda t, w: {"reward": str(w / "base")}, "is a language model"),
    "a reward model of another tokenizer": ("ppo", lambda t, w: {"reward": other_reward(t)}, "another tokenizer"),
    "no such rule": ("ppo", lambda t, w: {"reward": str(t / "none.py") + ":f"}, "there is no file"),
    "a rule without a name": ("ppo", lambda t, w: {"reward": rule(t, "def f(row, text): return 1")}, "name the function, too: --reward .*:NAME"),
    "a rule without its function": ("ppo", lambda t, w: {"reward": rule(t, "def g(row, text): return 1") + ":f"}, "defines no function f"),
    "a rule that cannot be read": ("ppo", lambda t, w: {"reward": rule(t, "def f(") + ":f"}, "cannot be run"),
    "qlora and a reference from before it": ("dpo", lambda t, w: {"peft": "qlora", "precompute_ref": True}, "compared with its own base in 4 bits"),
    "a rule that fails": ("ppo", lambda t, w: {"reward": rule(t, "def f(row, text): return row['none']") + ":f"}, "KeyError: 'none'; it must return a number"),
    "a rule that gives nan": ("ppo", lambda t, w: {"reward": rule(t, "def f(row, text): return float('nan')") + ":f"}, "gave nan for '.*a finite number"),
    "a reference of another shape": ("ppo", lambda t, w: {"reference": str(checkpoint.save(t / "ref", 1, tiny_lm(n_layers=1), tiny_tokenizer(), "sft", None))},
                                     "another shape"),
    "prompts longer than the context": ("ppo", lambda t, w: {"max_new_tokens": 60}, "no prompt fits into 4 tokens"),
    "answers longer than the context": ("ppo", lambda t, w: {"max_new_tokens": 64}, "a prompt needs room"),
    "plain text given to PPO": ("ppo", lambda t, w: {"data": [text(t / "p.jsonl", b'{"text": "once"}\n' * 3)]}, "prepare_data.py"),
    "unknown algorithm": ("ppo", lambda t, w: {"algorithm": "reinforce"}, "--algorithm reinforce is unknown"),
    "a group of one": ("ppo", lambda t, w: {"algorithm": "grpo", "group": 1}, "at least 2"),
    "a KL target for GRPO": ("ppo", lambda t, w: {"algorithm": "grpo", "target_kl": 6.0}, "GRPO has its leash in the loss"),
    "a critic of a shorter context": ("ppo", lambda t, w: {"critic": str(checkpoint.save(t / "short", 1, tiny_lm(max_seq_len=32), tiny_tokenizer(), "sft", None))},
                                      "--critic .* reads at most 32 tokens"),
    "resume from nowhere": ("sft", lambda t, w: {"resume": str(t / "none")}, "holds no checkpoint"),
    "resume from another stage": ("rm", lambda t, w: {"resume": str(w / "base")}, "--init_from|--resume"),
    "no such preset": ("rm", lambda t, w: {"config": "none.toml"}, "does not exist"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_sentence_and_exit_code_2(world, tmp_path, capsys, name):
    """What, where and what to do; no traceback; and no checkpoint that looks like success."""
    stage, change, says = REFUSALS[name]
    words = {**options(stage, world, tmp_path / "out"), **change(tmp_path, world)}
    sentence = refused(SCRIPTS[stage], flags({k: v for k, v in words.items() if v is not None}), capsys)
    assert re.search(says, sentence), sentence
    assert not list(tmp_path.glob("out/step_*"))


def test_a_second_run_into_the_same_directory_is_refused_and_nothing_is_lost(world, tmp_path, capsys):
    start("rm", world, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert "--resume auto" in refused(train_rm, flags(options("rm", world, tmp_path)), capsys)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_broken_lines_below_the_share_are_set_aside_and_the_run_goes_on(world, tmp_path, capsys):
    path = text(tmp_path / "m.jsonl", good(30) + b'{"broken\n')
    records = start("sft", world, tmp_path / "out", data=[path])
    assert len(train_lines(records)) == 3
    assert "set aside 1 of 31" in capsys.readouterr().out
    assert "m.jsonl:31" in (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", SCRIPTS)
def test_help_names_every_option_and_its_reason(stage, capsys):
    script = SCRIPTS[stage]
    run(script.main, script.Config, script.__doc__, ["--help"])
    out = capsys.readouterr().out
    for name, field in script.Config.__dataclass_fields__.items():
        assert f"--{name} " in out and field.metadata["help"], name


@pytest.mark.parametrize("stage", SCRIPTS)
def test_common_flags_have_the_same_names_everywhere(stage):
    """Those of the design page; a command learnt for one stage works for the next."""
    common = {"data", "init_from", "out_dir", "resume", "max_steps", "batch_size", "gradient_accumulation_steps", "max_seq_len",
              "learning_rate", "min_lr", "warmup_steps", "schedule", "weight_decay", "grad_clip", "dtype", "device", "compile", "seed",
              "eval_every", "save_every", "log_every"}
    assert common <= SCRIPTS[stage].Config.__dataclass_fields__.keys()
    assert parse(SCRIPTS[stage].Config, []) == SCRIPTS[stage].Config()


# ---- watching and stopping -----------------------------------------------------------------------------------------

def test_patience_stops_the_run_and_best_holds_what_was_best(world, tmp_path, capsys):
    """A rate that ruins the model: after three evaluations without a better one the run ends, in good order and for good,
    and OUT/best is the checkpoint from before."""
    words = dict(max_steps=60, eval_every=2, patience=3, learning_rate=0.5, min_lr=0.5, warmup_steps=1, keep=1)
    records = start("pretrain", world, tmp_path, **words)
    losses = {r["step"]: r["val/loss"] for r in records if "val/loss" in r}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 6 < 60 and "early stop" in capsys.readouterr().out
    assert best > 0 and checkpoint.load(tmp_path / "best")[2]["step"] == best
    before = weights(tmp_path)
    assert len(train_lines(start("pretrain", world, tmp_path, **words, resume="auto"))) == len(train_lines(records))
    assert largest_difference(weights(tmp_path), before) == 0


def test_milestones_stay_for_good(world, tmp_path):
    """As Pythia keeps them, the untrained model included."""
    start("sft", world, tmp_path, max_steps=8, milestones=["0", "1", "2", "4"], save_every=3, keep=1)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step_*")) == [0, 1, 2, 4, 8]
    assert largest_difference(weights(tmp_path / "step_00000000"), weights(tmp_path / "step_00000001")) > 0


def test_decay_factor_sets_the_length_of_the_cosine(world, tmp_path):
    """0.5: at the floor after half of the run."""
    lines = train_lines(start("pretrain", world, tmp_path, max_steps=8, decay_factor=0.5, log_every=1, warmup_steps=0))
    assert [r["lr"] == pytest.approx(lines[-1]["lr"]) for r in lines] == [False] * 3 + [True] * 5


def test_tensorboard_shows_what_metrics_jsonl_says(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    lines = train_lines(start("pretrain", world, tmp_path, tensorboard=True))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in board.Scalars("train/loss")] == [(r["step"], r["train/loss"]) for r in lines]
    assert {"val/loss", "train/lr", "train/grad_norm", "train/tokens_per_s"} <= set(board.Tags()["scalars"])


def test_time_in_the_log_goes_on_over_a_resume(world, tmp_path, monkeypatch):
    """"time" is the seconds worked, so that curves over time have no jump where a run rested: here for a day."""
    now = [1e9]
    monkeypatch.setattr("nanollm.log.time", types.SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(train_pretrain, "update", lambda *a: (now.append(now.pop() + 1), update(*a))[1])          # each update takes a second
    start("pretrain", world, tmp_path, max_steps=3)
    now[0] += 86400
    records = start("pretrain", world, tmp_path, max_steps=6, resume="auto", override_schedule=True)
    assert [r["time"] for r in train_lines(records)] == [1, 2, 3, 4, 5, 6]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_line_stands_on_a_terminal_only_and_gives_way_to_the_log(tmp_path, monkeypatch):
    """Drawn over itself at most twice a second, with the place and the time to go; a line of the log begins where it stood."""
    now, at = [1e9], checkpoint.Progress()
    monkeypatch.setattr("nanollm.log.time", types.SimpleNamespace(time=lambda: now[0]))
    for screen, main, drawn in ((Terminal(), True, True), (io.StringIO(), True, False), (Terminal(), False, False)):
        monkeypatch.setattr("sys.stdout", screen)
        at.step = 0
        logger = Logger(tmp_path, main, at, max_steps=100)
        for at.step in range(1, 9):                          # an update takes 0.2 s: one in three finds the last line old enough
            now[0] += 0.2
            logger.live(at)
        logger(at.step, {"train/loss": 2.0})
        lines = ["\rstep 1/100 | eta 0:19 ", "\rstep 4/100 | eta 0:19 ", "\rstep 7/100 | eta 0:18 "] if drawn else []
        assert screen.getvalue() == "".join(lines) + ("\r\033[K" * drawn + "step   8/100 | loss 2 | eta 0:18\n" if main else "")

