"""Kill it at any moment, in any way; fill its disk, cut its files, turn their bits; break its numbers. What comes out of the run must be
what comes out of an undisturbed one, bit for bit, or a sentence that says what is wrong."""
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time

import pytest
import torch

import train_pretrain
from conftest import ROOT, flags, metrics, options, python, run_ranks, stories, tiny_lm, tiny_tokenizer, weights, write_world
from nanollm import checkpoint, dist, distill
from nanollm.config import run
from nanollm.corpus.pack import write_tokens
from nanollm.optim import update
from test_scripts import LORA, SCRIPTS, same_run

PHASES = """[[phase]]
until = 0.6
mix = { tokens = 0.7, more = 0.3 }
[[phase]]
until = 1.0
mix = { tokens = 0.2, more = 0.8 }
"""
# What is killed: each script, and what else has a state of its own. 32 samples an update of about 60 rows: an epoch is two updates.
RUNS = {"pretrain": {}, "pretrain-muon-dropout": {"optimizer": "muon", "dropout": 0.1}, "pretrain-fp16": {"dtype": "float16"},
        "pretrain-phases": {"phases": "phases.toml"}, "pretrain-rollback": {"rollback": 12, "rollback_lr": 0.1, "schedule": "constant"},
        "pretrain-patience": {"patience": 50, "milestones": ["3", "9", "27"]}, "sft": {}, "sft-lora": {**LORA, "lora_dropout": 0.1}, "rm": {},
        "sft-teacher": {"teacher": "teacher"}, "pretrain-teacher": {"teacher": "teacher", "kd_cache": "said", "kd_top_k": 8},
        "sft-mix": {"data": ["chats.jsonl:0.7", "chats_val.jsonl:0.3"]}, "rm-divergence": {"loss": "divergence"},
        "dpo": {}, "dpo-lora": LORA, "dpo-kto": {"loss": "kto"}, "dpo-cached": {"precompute_ref": True, "pair_curriculum": 1.0},
        "ppo": {}, "ppo-grpo": {"algorithm": "grpo", "group": 2}}
LENGTH = dict(max_steps=48, save_every=4, eval_every=6, log_every=1, keep=3, batch_size=4, gradient_accumulation_steps=8)
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def torture_world(root):
    write_world(root)
    (root / "more").mkdir()
    for folder in (root, root / "more"):
        tiny_tokenizer().save(folder / "tokenizer")
    for split, texts in (("train", stories(90)[30:]), ("val", stories(100)[90:])):
        write_tokens(root / "more", split, texts, tiny_tokenizer())
    checkpoint.save(root / "teacher", 3, tiny_lm(seed=2), tiny_tokenizer(), "sft", None)
    (root / "phases.toml").write_text(PHASES, encoding="utf-8")
    return root


def play(variant, world, out, **changes):
    """The run `variant`, in this process; $STEPS updates long."""
    changes["max_steps"] = int(os.environ.get("STEPS", LENGTH["max_steps"]))
    stage, more = variant.split("-")[0], dict(RUNS[variant])
    if "data" in more:
        more["data"] = [str(world / word) for word in more["data"]]
    if "phases" in more:
        more |= {"phases": str(world / more["phases"]), "data": str(world)}
    if "teacher" in more:
        more["teacher"] = str(world / more["teacher"])
    if "kd_cache" in more:                                    # a file for every second row: some kills find it half written
        distill.BLOCK, more["kd_cache"] = 2, str(out.parent / f"{out.name}-said")
    if variant == "pretrain-rollback":
        break_the_numbers_at_the_full_rate()
    if stage == "dpo":
        more["ref_cache"] = str(out.parent / f"{out.name}-reference")
    script = SCRIPTS[stage]
    script.main(script.Config(**{**options(stage, world, out), **LENGTH, **more, **changes}))


def break_the_numbers_at_the_full_rate(first=20, last=41):
    """Updates 20 to 40 have an infinite loss, unless the rate is a low one: what a rate that is too high does, at a known place."""
    now = [0]

    class Noting(train_pretrain.Ahead):
        def __call__(self, step):
            now[0] = step
            return super().__call__(step)

    def broken(raw, optimizer, scaler, grad_clip, loss):
        high = optimizer.param_groups[0]["lr"] > 0.5 * train_pretrain.Config().learning_rate
        return update(raw, optimizer, scaler, grad_clip, loss * math.inf if high and first <= now[0] < last else loss)
    train_pretrain.Ahead, train_pretrain.update = Noting, broken


def child(work, log):
    """Run work() in a fork of this process, its output in `log`. Returns its pid. Exit code: main()'s, 1 for an exception."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})                 # a Ctrl-C waits until the child can say how it ended
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if pid == 0:
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, 1), os.dup2(fd, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8", closefd=False), os.fdopen(2, "w", encoding="utf-8", closefd=False)
            work()
            code = 0
        except SystemExit as e:
            code = e.code
        except KeyboardInterrupt:                             # before the script listens: nothing was begun
            code = 130
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return pid


def half_written(out):
    """Is a checkpoint being written here, or what a kill has left of one? (A longer name: an old one that is being removed.)"""
    return any(out.glob(checkpoint.ASIDE + "?" * 8))


def torture(variant, world, out, kills):
    """Start, kill, start again … then let it finish. Every third kill waits for a checkpoint that is being written, the others for a
    random moment. A kill that came too late, or none that left half a checkpoint: all over again with shorter waits.
    -> [(signal, did it leave half a checkpoint?, how the process ended, newest step on the disk)]"""
    for hurry in range(8):
        felt = torture_once(variant, world, out, kills, random.Random(f"{variant} {hurry}"), 0.5**hurry)
        if len(felt) == kills and any(in_save for _, in_save, _, _ in felt):
            break
        shutil.rmtree(out, ignore_errors=True)
    log = out.parent / f"{out.name}.log"
    pid = child(lambda: play(variant, world, out, resume="auto"), log)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text(encoding="utf-8")[-3000:]
    return felt


def torture_once(variant, world, out, kills, dice, wait):
    """The kills, up to the first that comes too late. wait: factor of the waits."""
    log, felt = out.parent / f"{out.name}.log", []
    for kill in range(kills):
        how = SIGNALS[kill % 3] if kill % 2 else signal.SIGKILL
        moment, saves, cleared = time.time() + 1.2 * wait * dice.random(), int(3 * wait * dice.random()), False
        pid = child(lambda: play(variant, world, out, resume="auto"), log)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            writing = half_written(out)
            cleared |= not writing                            # what the last kill has left is gone: from here on it is this run's
            if kill % 3 == 2 and writing and cleared:
                if saves == 0:
                    time.sleep(0.004 * wait * dice.random())
                    break
                saves -= 1
                while half_written(out):
                    time.sleep(0.0005)
            if kill % 3 != 2 and time.time() > moment:
                break
            time.sleep(0.0005)
        else:
            return felt                                       # it was quicker
        os.kill(pid, how)
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        assert ended in (-how, 130, 0), (ended, log.read_text(encoding="utf-8")[-3000:])
        if ended == 0:
            return felt
        felt.append((how.name, cleared and half_written(out), ended, max([int(p.name[5:]) for p in out.glob("step_*")], default=0)))
    return felt


def worker(out, kills):
    """All variants in a process with little else in it; what happened goes to felt.json."""
    world, felt = torture_world(out / "world"), {}
    for variant in (out / "variants").read_text(encoding="utf-8").split():
        felt[variant] = torture(variant, world, out / variant, kills)
        pid = child(lambda: play(variant, world, out / f"{variant}-straight"), out / f"{variant}-straight.log")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (out / f"{variant}-straight.log").read_text(encoding="utf-8")[-3000:]
    (out / "felt.json").write_text(json.dumps(felt), encoding="utf-8")


def tortured(out, variants, kills, steps=LENGTH["max_steps"]):
    (out / "variants").write_text(" ".join(variants), encoding="utf-8")
    with open(out / "log", "w+b") as log:
        process = python("import test_torture, pathlib; test_torture.worker(pathlib.Path(sys.argv[1]), int(sys.argv[2]))", out, kills, log=log,
                         env={"STEPS": str(steps)})
        try:
            code = process.wait(timeout=3000)
        finally:
            process.kill()
    assert code == 0, (out / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
    return json.loads((out / "felt.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A few runs, three kills each: SIGKILL, SIGTERM, and SIGKILL in the middle of a save."""
    out = tmp_path_factory.mktemp("three")
    return out, tortured(out, QUICK, 3, steps=16)


QUICK = ["pretrain-muon-dropout", "sft-lora", "rm", "dpo", "ppo"]


@pytest.mark.parametrize("variant", QUICK)
def test_three_kills_of_three_kinds_leave_no_trace(three, variant):
    """Weights and every logged number equal an undisturbed run's, over 8 epochs and with accumulation."""
    out, felt = three
    assert len(felt[variant]) == 3 and any(in_save for _, in_save, _, _ in felt[variant]), felt[variant]
    same_run(out / variant, out / f"{variant}-straight")
    assert not list((out / variant).glob(checkpoint.ASIDE + "*"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", RUNS)
def test_twenty_kills_at_any_moment_change_nothing(tmp_path, variant):
    """SIGKILL, SIGTERM and Ctrl-C at random moments, every third in the middle of a save: for every script, with Muon, dropout, fp16
    and its scaler, phases, adapters, early stopping, and through a rollback. Signals that it hears end it with code 130."""
    felt = tortured(tmp_path, [variant], 20)[variant]
    print(variant, felt)
    assert len(felt) == 20 and any(in_save for _, in_save, _, _ in felt)
    assert {("SIGTERM", 130), ("SIGINT", 130)} <= {(how, ended) for how, _, ended, _ in felt}                # saved and left in good order
    same_run(tmp_path / variant, tmp_path / f"{variant}-straight")
    if variant == "pretrain-rollback":
        assert any("rollback from step" in r.get("event", "") for r in metrics(tmp_path / variant))


# ----------------------------------------------------------------------------------------------------------------
# Damage on the disk


FILES = ["model.pt", "training.pt", "meta.json", "tokenizer/tokenizer.json"]


def damage(path, how, dice):
    """Cut a file short, turn one bit of it, or remove it, at a random place."""
    raw = bytearray(path.read_bytes())
    at = dice.randrange(len(raw))
    if how == "missing":
        path.unlink()
        return
    if how == "cut":
        del raw[at:]
    else:
        raw[at] ^= 1 << dice.randrange(8)
    path.write_bytes(raw)


SHORT = dict(max_steps=9, save_every=3, keep=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 9 updates with the checkpoints of 3, 6 and 9, and its world."""
    out = tmp_path_factory.mktemp("finished")
    world = write_world(out / "world")
    train_pretrain.main(train_pretrain.Config(**options("pretrain", world, out / "run", **SHORT)))
    return out


@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_refused_by_name_and_passed_over_by_auto(finished, tmp_path, capsys, name, how):
    """Exit code 2 and one sentence for --resume and --init_from by name; --resume auto takes the one before, makes the lost updates
    again, and ends where the run ended."""
    shutil.copytree(finished / "run", tmp_path / "run")
    for line in range(30 if how == "flipped" else 5):         # many places, by the checksum alone
        shutil.copytree(finished / "run" / "step_00000009", tmp_path / "one", dirs_exist_ok=True)
        damage(tmp_path / "one" / name, how, random.Random(f"{name} {how} {line}"))
        assert not checkpoint.is_whole(tmp_path / "one", checksums=True)
    damage(tmp_path / "run" / "step_00000009" / name, how, random.Random(name))
    words = options("pretrain", finished / "world", tmp_path / "run", **SHORT)
    bad = str(tmp_path / "run" / "step_00000009")
    changes = [{"resume": bad}, {"init_from": bad, "out_dir": str(tmp_path / "new")}]
    for change in changes[:1] if (name, how) == ("training.pt", "flipped") else changes:       # --init_from reads the weights only
        with pytest.raises(SystemExit) as stop:
            run(train_pretrain.main, train_pretrain.Config, argv=flags(words | change))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and ("damaged" in said or "holds no checkpoint" in said)
    train_pretrain.main(train_pretrain.Config(**words | {"resume": "auto"}))
    assert "resumed" in (out := capsys.readouterr().out) and "step_00000006 at step 6" in out and "skipping" in out
    same_run(tmp_path / "run", finished / "run")


def test_the_newest_two_damaged_are_passed_over_and_all_damaged_is_a_sentence(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    words = options("pretrain", finished / "world", tmp_path / "run", **SHORT) | {"resume": "auto"}
    for step in (9, 6):
        damage(tmp_path / "run" / f"step_0000000{step}" / "training.pt", "flipped", random.Random(step))
    train_pretrain.main(train_pretrain.Config(**words))
    same_run(tmp_path / "run", finished / "run")
    for path in (tmp_path / "run").glob("step_*"):
        damage(path / "model.pt", "cut", random.Random(0))
    with pytest.raises(SystemExit) as stop:
        run(train_pretrain.main, train_pretrain.Config, argv=flags(words))
    assert stop.value.code == 2 and "every checkpoint" in capsys.readouterr().err


DISK_FULL = """
import resource, runpy
from nanollm import checkpoint
real = checkpoint.save
def save(run_dir, step, *a, **k):
    if step >= 6:                                             # from here on no file may grow beyond 100 kB, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return real(run_dir, step, *a, **k)
checkpoint.save = save
sys.argv[0] = 'train_pretrain.py'
runpy.run_path('train_pretrain.py', run_name='__main__')
"""


def test_a_disk_that_is_full_in_the_middle_of_a_file_ends_in_a_sentence_and_is_resumed(finished, tmp_path):
    """The system itself refuses to write on, inside model.pt: exit code 2, the checkpoint of step 3 stays, nothing half-written; with room
    again, the same command and --resume auto end where an undisturbed run ends."""
    words = options("pretrain", finished / "world", tmp_path / "run", **SHORT) | {"resume": "auto"}
    with open(tmp_path / "log", "w+b") as log:
        process = python(DISK_FULL, *flags(words), log=log)
        assert process.wait(timeout=300) == 2, (tmp_path / "log").read_text(encoding="utf-8")
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert re.search("error: could not write the checkpoint .*step_00000006: the disk is full.*free some disk space", said) and "Traceback" not in said
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "step_00000003"]
    train_pretrain.main(train_pretrain.Config(**words))
    same_run(tmp_path / "run", finished / "run")


def test_a_kill_while_old_checkpoints_are_removed_leaves_no_half_one(finished, tmp_path, monkeypatch):
    """Removing is a renaming first: what is left of it is cleared away by the next --resume auto."""
    words = options("pretrain", finished / "world", tmp_path / "run", **SHORT | {"keep": 1})

    def killed(path, **k):
        if "step_" in str(path) and os.path.exists(path):
            raise KeyboardInterrupt
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        train_pretrain.main(train_pretrain.Config(**words))
    monkeypatch.undo()
    there = [p.name for p in (tmp_path / "run").glob("step_*")]
    assert there == ["step_00000006"] and checkpoint.is_whole(tmp_path / "run" / there[0], checksums=True)
    train_pretrain.main(train_pretrain.Config(**words | {"resume": "auto"}))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "step_00000009"]
    same_run(tmp_path / "run", finished / "run")


# ----------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def poisoned(monkeypatch, first, last, only_high=True):
    """As break_the_numbers_at_the_full_rate, undone at the end of the test."""
    for name in ("Ahead", "update"):
        monkeypatch.setattr(train_pretrain, name, getattr(train_pretrain, name))
    break_the_numbers_at_the_full_rate(first, last)


def lines(out):
    return [r for r in metrics(out) if "train/loss" in r]


def test_twenty_updates_without_effect_in_a_row_end_in_advice(world, tmp_path, monkeypatch, capsys):
    """Each is logged with its rows; 19 are survived."""
    poisoned(monkeypatch, 3, 99)
    words = options("pretrain", world, tmp_path / "a", max_steps=40, schedule="constant")
    with pytest.raises(SystemExit) as stop:
        run(train_pretrain.main, train_pretrain.Config, argv=flags(words))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "20 updates in a row" in said
    assert all(word in said for word in ("metrics.jsonl", "--learning_rate", "--rollback"))
    events = [r for r in metrics(tmp_path / "a") if "event" in r]
    assert [e["step"] for e in events] == list(range(4, 24)) and all(len(e["rows"]) == 4 for e in events)
    monkeypatch.undo()
    poisoned(monkeypatch, 3, 22)
    train_pretrain.main(train_pretrain.Config(**words | {"out_dir": str(tmp_path / "b")}))
    assert sum(r["grad_norm"] is None for r in lines(tmp_path / "b")) == 19
    assert checkpoint.meta_of(checkpoint.find(tmp_path / "b"))["progress"]["skipped"] == 19


def test_rollback_goes_back_slows_down_and_restores_the_rate(world, tmp_path, monkeypatch, capsys):
    """The notes' recipe. Infinite from update 20 on at the full rate: after the 20th of them (step 40) back to the newest checkpoint at
    least 12 updates older than the break (8, which --keep 1 alone would have removed), a tenth of the rate up to step 52, then all of it."""
    poisoned(monkeypatch, 20, 41)
    words = options("pretrain", world, tmp_path, max_steps=60, save_every=4, keep=1, schedule="constant", rollback=12)
    train_pretrain.main(train_pretrain.Config(**words))
    done = lines(tmp_path)
    assert [r["step"] for r in done] == list(range(1, 61)) and all(r["grad_norm"] is not None for r in done)
    rate = train_pretrain.Config().learning_rate
    assert {r["lr"] for r in done[2:8]} == {rate} == {r["lr"] for r in done[52:]} and {r["lr"] for r in done[8:52]} == {rate * 0.1}
    assert sorted(p.name for p in tmp_path.glob("abandoned_*")) == [f"abandoned_step_{step:08d}" for step in range(12, 40, 4)]
    assert "rollback from step 40: up to step 52 at 0.1 of the rate" in capsys.readouterr().out
    assert checkpoint.meta_of(checkpoint.find(tmp_path))["progress"]["rollbacks"] == 1


def test_a_rollback_without_an_older_checkpoint_and_a_fourth_one_are_sentences(world, tmp_path, monkeypatch, capsys):
    for name, changes, says in (("none", {"save_every": 100}, "no checkpoint in .* is that many updates older"),
                                ("four", {"save_every": 2, "rollback_lr": 1.0}, "after three rollbacks")):
        monkeypatch.undo()
        poisoned(monkeypatch, 20, 99)
        words = options("pretrain", world, tmp_path / name, max_steps=60, schedule="constant", rollback=12, keep=0) | changes
        with pytest.raises(SystemExit) as stop:
            run(train_pretrain.main, train_pretrain.Config, argv=flags(words))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert re.search(says, said), said


def rollback_worker(out):
    """Two ranks; the infinite loss is on rank 1 alone."""
    torch.distributed.init_process_group("gloo")
    world = out / "world"
    if int(os.environ["RANK"]) == 0:
        write_world(world)
    torch.distributed.barrier()
    now, seen, real = [0], [], train_pretrain.pretrain_loss

    class Noting(train_pretrain.Ahead):
        def __call__(self, step):
            now[0] = step
            return super().__call__(step)

    def noting(raw, optimizer, *rest):
        seen[:] = [optimizer]
        return update(raw, optimizer, *rest)

    def broken(model, *batch):
        loss, count, m = real(model, *batch)
        bad = model.training and os.environ["RANK"] == "1" and 8 <= now[0] < 29 and seen[0].param_groups[0]["lr"] > 5e-4
        return (loss * math.inf if bad else loss), count, m
    train_pretrain.Ahead, train_pretrain.update, train_pretrain.pretrain_loss = Noting, noting, broken
    raw, wrap = [], dist.wrap
    dist.wrap = lambda model, *a: raw.append(model) or wrap(model, *a)
    train_pretrain.main(train_pretrain.Config(**options("pretrain", world, out / "run", max_steps=36, save_every=4, keep=0, schedule="constant", rollback=4)))
    torch.save(raw[0].state_dict(), out / f"{os.environ['RANK']}.pt")


def test_two_ranks_roll_back_together(tmp_path):
    """One rank's numbers break: both leave the updates out, both go back to the same checkpoint, both go on slowly."""
    run_ranks("test_torture.rollback_worker", tmp_path)
    a, b = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert all(torch.equal(a[k], b[k]) and torch.isfinite(a[k]).all() for k in a)
    assert sum("rollback from step 28" in r.get("event", "") for r in metrics(tmp_path / "run")) == 1
    assert [r["step"] for r in lines(tmp_path / "run")] == list(range(1, 37))
