"""Checkpoints survive kills, full disks and damage, refuse what does not fit in one sentence, and give everything back."""
import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch

import train_dpo
import train_pretrain
import train_rm
import train_sft
from conftest import options, tiny_lm, tiny_tokenizer, weights
from nanollm import checkpoint, dist, peft
from nanollm.config import UserError
from nanollm.model import RewardModel
from nanollm.optim import make_optimizer
from nanollm.tokenizer import bpe_tokenizer

CTX = dist.Context(0, 0, 1, torch.device("cpu"), True)


def save(run, step, seed=0, **kw):
    return checkpoint.save(run, step, tiny_lm(seed), tiny_tokenizer(), "pretrain", None, **kw)


def cut(path, keep=100):
    path.write_bytes(path.read_bytes()[:keep])


def test_load_gives_back_weights_shape_and_tokenizer(tmp_path, tok):
    save(tmp_path, 5, seed=4)
    model, tokenizer, meta = checkpoint.load(tmp_path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in tiny_lm(4).state_dict().items())
    assert (meta["step"], meta["stage"], meta["head"], not model.training) == (5, "pretrain", "lm", True)
    assert tokenizer.hash == tok.hash and tokenizer.encode("Anna 小明") == tok.encode("Anna 小明")


def test_files_load_with_weights_only_and_plain_fp32_names(tmp_path):
    """No code in the file, no wrapper prefixes, fp32 whatever the training dtype: usable without this package."""
    cfg = train_pretrain.Config(**options("pretrain", tmp_path, tmp_path))
    saver(cfg, tiny_lm().bfloat16()).save(checkpoint.Progress(step=1))
    path = tmp_path / "step_00000001"
    state = torch.load(path / "model.pt", weights_only=True)
    assert set(state) == set(tiny_lm().state_dict()) and {v.dtype for v in state.values()} == {torch.float32}
    torch.load(path / "training.pt", weights_only=True)
    assert (path / "tokenizer" / "tokenizer.json").exists()


def test_only_the_newest_k_are_kept(tmp_path):
    for step in (10, 200, 30, 1000):
        save(tmp_path / "two", step, keep=2)
        save(tmp_path / "all", step, keep=0)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["step_00000200", "step_00001000"]
    assert len(list((tmp_path / "all").iterdir())) == 4
    assert checkpoint.find(tmp_path / "two").name == "step_00001000"


def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path):
    """What a killed save leaves behind is a directory under another name; nothing takes it for a checkpoint, and --resume
    auto clears it away."""
    save(tmp_path, 10, seed=1)
    aside = tmp_path / ".writing_00000020"
    (aside / "tokenizer").mkdir(parents=True)
    (aside / "model.pt").write_bytes(b"half")
    assert checkpoint.find(tmp_path).name == "step_00000010"
    model = tiny_lm()
    with pytest.raises(UserError, match="holds no training state"):          # saved without one: --resume says so, --init_from works
        resume(tmp_path, "auto", model)
    assert not aside.exists()
    assert torch.equal(checkpoint.load(tmp_path)[0].norm.weight, tiny_lm(1).norm.weight)


@pytest.mark.parametrize("at", ["model.pt", "training.pt", "replace"])
def test_a_full_disk_is_one_sentence_and_the_older_checkpoint_stays(tmp_path, monkeypatch, at):
    """ENOSPC in the middle of a save: UserError, the previous checkpoint whole, nothing half-written left over."""
    save(tmp_path, 10, seed=1)
    full = OSError(errno.ENOSPC, "No space left on device")
    real = torch.save

    def failing(obj, path):
        if path.name == at:
            path.write_bytes(b"half")
            raise full
        real(obj, path)
    monkeypatch.setattr(torch, "save", failing)
    if at == "replace":
        monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="No space left.*free some disk space.*--resume auto"):
        save(tmp_path, 20, training={"x": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000010"]
    assert checkpoint.load(tmp_path)[2]["step"] == 10


def test_a_full_disk_inside_torch_save_is_one_sentence_too(tmp_path, monkeypatch):
    """torch's zip writer turns ENOSPC into a RuntimeError of its own."""
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(RuntimeError("PytorchStreamWriter failed writing file data/0")))
    with pytest.raises(UserError, match="could not write the checkpoint"):
        save(tmp_path, 20)
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(RuntimeError("something else broke")))
    with pytest.raises(RuntimeError):                                        # a bug of ours is not dressed up as a full disk
        save(tmp_path, 20)


@pytest.mark.parametrize("name", ["model.pt", "training.pt", "tokenizer/tokenizer.json"])
def test_a_truncated_file_is_skipped_by_auto_and_refused_by_name(tmp_path, name, capsys):
    for step in (1, 2):
        save(tmp_path, step, training={"x": torch.zeros(99)})
    bad = tmp_path / "step_00000002"
    cut(bad / name)
    assert checkpoint.find(tmp_path).name == "step_00000001"
    assert "skipping" in capsys.readouterr().out
    with pytest.raises(UserError, match="step_00000002 is damaged"):
        checkpoint.load(bad)
    cut(tmp_path / "step_00000001" / name)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        checkpoint.find(tmp_path)


def test_a_truncated_or_missing_meta_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    cut(save(tmp_path, 2) / "meta.json", 40)
    (tmp_path / "step_00000003").mkdir()
    assert checkpoint.find(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("name", ["model.pt", "training.pt", "tokenizer/tokenizer.json"])
def test_one_flipped_bit_is_told_by_the_checksum(tmp_path, name, capsys):
    """The size is right, the zip may even open: by name it is refused, by its run directory the older checkpoint is taken."""
    for step in (1, 2):
        save(tmp_path, step, training={"x": torch.zeros(99)})
    path = tmp_path / "step_00000002" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="step_00000002 is damaged: a file is missing, cut short or changed"):
        checkpoint.find(tmp_path / "step_00000002")
    assert checkpoint.find(tmp_path).name == "step_00000001" and "skipping" in capsys.readouterr().out


def test_a_checkpoint_of_version_1_still_loads(tmp_path):
    """It named sizes only, and no validation loss."""
    path = save(tmp_path, 3, seed=4)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    del meta["seal"]
    meta |= {"version": 1, "files": {name: file["size"] for name, file in meta["files"].items()}}
    (path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert checkpoint.load(tmp_path)[2]["step"] == 3


def test_the_best_and_the_milestones_outlive_the_newest(tmp_path):
    """--keep 1 with a validation loss that turns up: the lowest stays, and RUN/best is it."""
    for step, loss, milestone in ((1, 3.0, True), (2, 2.0, False), (3, 1.5, False), (4, 1.7, False), (5, None, False)):
        save(tmp_path, step, keep=1, val_loss=loss, milestone=milestone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003", "step_00000005"]
    assert checkpoint.load(tmp_path / "best")[2]["step"] == 3 and checkpoint.load(tmp_path)[2]["step"] == 5


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(torch, "save", lambda *a: pytest.fail("it began to write"))
    with pytest.raises(UserError, match="it needs .* MB and the disk has 0; free some disk space"):
        save(tmp_path, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000010"]


def test_no_checkpoint_there_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoint.load(path)


def test_another_tokenizer_in_the_checkpoint_is_refused(tmp_path, tok):
    """Whole and valid, but not the one of the training: every id would mean something else."""
    path = save(tmp_path, 1)
    other = bpe_tokenizer(tok.spec["merges"][:-1], tok.spec["pattern"])
    other.save(path / "tokenizer")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    meta["files"] = {n: (path / n).stat().st_size for n in meta["files"]}
    checkpoint.write_meta(path, meta)
    with pytest.raises(UserError, match="tokenizer is not the one it was trained with"):
        checkpoint.load(tmp_path)


def test_weights_that_do_not_fit_the_described_shape_are_refused(tmp_path):
    path = save(tmp_path, 1)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    meta["model"]["n_layers"] = 1
    checkpoint.write_meta(path, meta)
    with pytest.raises(UserError, match="do not fit the model"):
        checkpoint.load(tmp_path)


def test_the_other_head_is_refused(tmp_path, tok):
    checkpoint.save(tmp_path, 1, RewardModel(tiny_lm().args), tok, "rm", None)
    with pytest.raises(UserError, match="is a reward model .*needs a language model"):
        checkpoint.load(tmp_path, expect="lm")
    assert isinstance(checkpoint.load(tmp_path, expect="reward")[0], RewardModel)


def test_a_lora_checkpoint_loads_merged(tmp_path, tok):
    """The plain model it gives computes what the adapted one computed, and can be adapted again."""
    model = tiny_lm()
    peft.inject_lora(model, 4, 8)
    with torch.no_grad():
        for _, m in peft.lora_layers(model):
            m.lora_B.normal_(std=0.1)
    checkpoint.save(tmp_path, 1, model, tok, "sft", None)
    plain, _, meta = checkpoint.load(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert meta["adapter"]["r"] == 4 and set(plain.state_dict()) == set(tiny_lm().state_dict())
    peft.inject_lora(plain, 2)


def saver(cfg, model, tokenizer=None):
    return checkpoint.Saver(cfg, CTX, model, make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False), tokenizer or tiny_tokenizer(), "pretrain")


def resume(out, which, model, cfg=None, override=False, tokenizer=None):
    cfg = cfg or train_pretrain.Config(**options("pretrain", out, out))
    return saver(dataclasses.replace(cfg, out_dir=str(out), resume=which, override_schedule=override), model, tokenizer).resume()


@pytest.fixture
def run(tmp_path):
    """A pretraining run that stands at step 5, with training state."""
    model, cfg = tiny_lm(1), train_pretrain.Config(**options("pretrain", tmp_path, tmp_path, max_steps=20))
    saver(cfg, model).save(checkpoint.Progress(step=5, tokens=77, skipped=2, best=1.5, stale=3, seconds=9.5))
    return tmp_path, cfg


def test_resume_restores_weights_counters_and_random_state(run):
    out, cfg = run
    torch.manual_seed(123)
    state = torch.load(checkpoint.find(out) / "training.pt", weights_only=True)["rng"][0]["cpu"]
    model = tiny_lm(2)
    assert resume(out, "auto", model, cfg) == checkpoint.Progress(step=5, tokens=77, skipped=2, best=1.5, stale=3, seconds=9.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in tiny_lm(1).state_dict().items())
    assert resume(out, str(out / "step_00000005"), model, cfg).step == 5       # by name, too


def test_auto_without_a_checkpoint_starts_afresh(tmp_path):
    assert resume(tmp_path / "new", "auto", tiny_lm()) == checkpoint.Progress()


def test_a_new_run_does_not_write_over_an_old_one(run):
    out, cfg = run
    with pytest.raises(UserError, match="already holds a run; add --resume auto"):
        resume(out, "", tiny_lm(), cfg)


def test_another_max_steps_needs_override_schedule(run, capsys):
    """The cosine would bend: allowed, but only when asked for, and said."""
    out, cfg = run
    longer = dataclasses.replace(cfg, max_steps=40, learning_rate=5e-4)
    with pytest.raises(UserError, match="max_steps was 20 .* is 40 now.*--override_schedule|learning_rate was"):
        resume(out, "auto", tiny_lm(), longer)
    assert resume(out, "auto", tiny_lm(), longer, override=True).step == 5
    printed = capsys.readouterr().out
    assert "max_steps 20 -> 40" in printed and "learning_rate" in printed


@pytest.mark.parametrize("change", [{"seed": 1}, {"grad_clip": 0.5}, {"batch_size": 4}, {"optimizer": "muon"}, {"data": "elsewhere"}])
def test_an_option_that_shapes_the_result_cannot_change(run, change):
    """Not even with --override_schedule: it would be another run under the same name."""
    out, cfg = run
    with pytest.raises(UserError, match=f"{next(iter(change))} was .* use the old value"):
        resume(out, "auto", tiny_lm(), dataclasses.replace(cfg, **change), override=True)


def test_options_that_only_watch_may_change(run):
    """And the same rows an update may be split otherwise: another number of GPUs goes on with the same run."""
    out, cfg = run
    other = dataclasses.replace(cfg, eval_every=3, save_every=4, log_every=2, keep=5, sample_prompts=["x"],
                                batch_size=cfg.batch_size * 2, gradient_accumulation_steps=cfg.gradient_accumulation_steps // 2)
    assert resume(out, "auto", tiny_lm(), other).step == 5


def test_data_tokenized_again_with_another_tokenizer_cannot_be_resumed(run, tok):
    """Same path, same vocabulary size, other ids: it would train on without a word."""
    out, cfg = run
    with pytest.raises(UserError, match="another tokenizer"):
        resume(out, "auto", tiny_lm(), cfg, tokenizer=bpe_tokenizer(tok.spec["merges"][:-1], tok.spec["pattern"]))


def test_a_checkpoint_of_another_model_is_no_traceback(run):
    out, cfg = run
    with pytest.raises(UserError, match="not a checkpoint of this model"):
        resume(out, "auto", RewardModel(tiny_lm().args), cfg)


def test_every_stage_loads_every_language_model_stage(tmp_path, world):
    """pretrain, sft (plain and LoRA) and dpo checkpoints each start continued pretraining, SFT, RM and DPO; a reward
    model is refused in words."""
    made = {"base": world / "base"}
    for name, script, more in [("sft", train_sft, {}), ("lora", train_sft, {"peft": "lora"}), ("dpo", train_dpo, {}), ("rm", train_rm, {})]:
        stage = "sft" if name == "lora" else name
        made[name] = tmp_path / name
        script.main(script.Config(**options(stage, world, made[name], max_steps=1, **more)))
    for name, run_dir in made.items():
        for script in (train_pretrain, train_sft, train_rm, train_dpo):
            out = tmp_path / f"{name}-{script.STAGE}"
            kwargs = options(script.STAGE, world, out, max_steps=1, init_from=str(run_dir))
            kwargs = {k: v for k, v in kwargs.items() if k in script.Config.__dataclass_fields__}
            if script is train_pretrain:                                     # the shape comes from --init_from
                kwargs = {k: v for k, v in kwargs.items() if k not in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len")}
            if name == "rm":
                with pytest.raises(UserError, match="is a reward model"):
                    script.main(script.Config(**kwargs))
            else:
                script.main(script.Config(**kwargs))
                assert weights(out)


def test_who_only_talks_to_a_model_does_not_read_its_training_state(tmp_path):
    """Two thirds of the bytes are the optimizer's: chat.py does not hash them."""
    save(tmp_path, 1, training={"x": torch.zeros(99)})
    raw = bytearray((tmp_path / "step_00000001" / "training.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "step_00000001" / "training.pt").write_bytes(raw)
    assert checkpoint.load(tmp_path)[2]["step"] == 1
