"""Checkpoints: one self-contained directory each, written aside and renamed, one format for all stages.

    RUN/step_00000400/
        model.pt       state dict, fp32, plain names, loadable with weights_only=True
        meta.json      stage, step, ModelArgs, LoRA shape, tokenizer hash, the run's configuration, file sizes
        tokenizer/     what turns text into this model's ids and back
        training.pt    optimizer, GradScaler, random states of all ranks: what --resume needs beyond the weights

A directory under its final name is whole: killing the process at any moment leaves the previous one usable.
"""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch

from nanollm import peft
from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.model import ModelArgs, RewardModel
from nanollm.variants import build

PREFIX, ASIDE = "step_", ".writing_"


def save(run_dir, step, model, tokenizer, stage, config, training=None, keep=2):
    """Write RUN/step_NNNNNNNN and remove all but the newest `keep` (0 keeps all). Returns its path.

    model: a bare Transformer or RewardModel (no DDP wrapper). config: a dataclass. Call on rank 0 only.
    Raises UserError when the disk is full; the older checkpoints are untouched then.
    """
    run_dir = Path(run_dir)
    final, aside = run_dir / f"{PREFIX}{step:08d}", run_dir / f"{ASIDE}{step:08d}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        torch.save({k: v.detach().float().cpu() for k, v in model.state_dict().items()}, aside / "model.pt")
        if training is not None:
            torch.save(training, aside / "training.pt")
        tokenizer.save(aside / "tokenizer")
        meta = {"format": "nanollm-checkpoint", "version": 1, "stage": stage, "step": step,
                "head": "reward" if isinstance(model, RewardModel) else "lm",
                "model": dataclasses.asdict(model.args), "lora": peft.lora_config(model),
                "tokenizer_hash": tokenizer.hash, "config": dataclasses.asdict(config) if config else {},
                "files": {str(p.relative_to(aside).as_posix()): p.stat().st_size
                          for p in sorted(aside.rglob("*")) if p.is_file()}}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        for path in aside.rglob("*"):                         # on the disk before the name is: survives a power cut
            if path.is_file():
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)              # only when the very same step is written again
        os.replace(aside, final)
    except (OSError, RuntimeError) as e:                      # torch.save reports a full disk as RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(e, RuntimeError) and "write" not in str(e).lower() and "file" not in str(e).lower():
            raise
        raise UserError(f"could not write the checkpoint {final}: {e}; free some disk space or change --out_dir, "
                        f"then go on with --resume auto") from None
    whole = sorted(p for p in run_dir.glob(PREFIX + "*") if is_whole(p))
    for old in whole[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def is_whole(path):
    """True if meta.json can be read and every file has the size it names."""
    try:
        files = json.loads((path / "meta.json").read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def find(path):
    """The newest whole checkpoint in a run directory, or the checkpoint directory itself. Raises UserError."""
    path = Path(path)
    if (path / "meta.json").exists():
        if not is_whole(path):
            raise UserError(f"the checkpoint {path} is damaged: a file is missing or truncated; use an older one")
        return path
    candidates = sorted(path.glob(PREFIX + "*"), reverse=True)
    for candidate in candidates:
        if is_whole(candidate):
            return candidate
        print(f"warning: skipping {candidate}: a file is missing or truncated", flush=True)
    if candidates:
        raise UserError(f"every checkpoint in {path} is damaged; train again or name a good copy")
    raise UserError(f"{path} holds no checkpoint; give the directory of a finished run, or make the demo's with `bash runs/speedrun.sh`")


def read(path, name):
    try:
        return torch.load(path / name, map_location="cpu", weights_only=True)
    except Exception as e:                                    # pickle, zip and torch each have their own
        raise UserError(f"cannot read {path / name}: {type(e).__name__}; the file is damaged, use another checkpoint") from None


def load(path, device="cpu", expect=None):
    """(model, tokenizer, meta) of the checkpoint or run directory at `path`; the model plain (a LoRA adapter is merged)
    and in eval mode.

    expect: "lm" or "reward" refuses the other head in one sentence. Strict: every tensor must match by name and shape.
    """
    path = find(path)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    if expect and meta["head"] != expect:
        kind = {"lm": "a language model", "reward": "a reward model"}
        raise UserError(f"{path} is {kind[meta['head']]} ({meta['stage']}), but this needs {kind[expect]}")
    tokenizer = tokenizers.load(path / "tokenizer")
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(f"{path}: its tokenizer is not the one it was trained with (hash {tokenizer.hash[:8]} instead "
                        f"of {meta['tokenizer_hash'][:8]}); restore the tokenizer directory")
    args = ModelArgs(**meta["model"])
    model = build(args, meta["head"])
    if meta.get("lora"):
        peft.inject_lora(model, **meta["lora"])
    try:
        model.load_state_dict(read(path, "model.pt"))
    except RuntimeError as e:
        raise UserError(f"{path}: the weights do not fit the model that meta.json describes: {str(e).splitlines()[-1].strip()}") from None
    if meta.get("lora"):
        peft.merge_lora(model)
    return model.to(device).eval(), tokenizer, meta


def training_state(ctx, optimizer, scaler, **counters):
    """Everything but the weights that the next step depends on. Collective: call it on all ranks.
    The data need no state: the sampler is a function of (seed, step)."""
    rng = {"cpu": torch.get_rng_state()}
    if ctx.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(ctx.device)
    if ctx.device.type == "mps":
        rng["mps"] = torch.mps.get_rng_state()
    return {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": ctx.gather(rng), **counters}


def resume(out_dir, which, ctx, model, optimizer, scaler, config, tokenizer):
    """Restore model, optimizer, scaler and random state in place; returns (step, training counters).

    which: "" starts afresh (and refuses to mix with an existing run), "auto" takes the newest whole checkpoint in
    out_dir or starts afresh, anything else is a checkpoint's path. Every option that shapes the result must equal
    the checkpoint's; config.override_schedule lets max_steps and the learning-rate options differ, and says so.
    """
    out_dir = Path(out_dir)
    found = sorted(p.name for p in out_dir.glob(PREFIX + "*"))
    if any(there != found for there in ctx.gather(found)):
        raise UserError(f"the ranks do not see the same checkpoints in --out_dir {out_dir}: put it on a disk that all machines share")
    exists = bool(found)
    if not which:
        if exists:
            raise UserError(f"--out_dir {out_dir} already holds a run; add --resume auto to go on, or choose another directory")
        return 0, {}
    if which == "auto":
        for aside in out_dir.glob(ASIDE + "*") if ctx.main else []:
            shutil.rmtree(aside, ignore_errors=True)          # the half-written one of a killed process
        if not exists:
            return 0, {}
        which = out_dir
    path = find(which)
    later = [name for name in found if name > path.name and is_whole(out_dir / name)]
    if later:
        raise UserError(f"--resume {path}: --out_dir {out_dir} already holds the later {later[-1]}; choose another --out_dir, or move it away")
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    schedule = {"max_steps", "epochs", "learning_rate", "min_lr", "warmup_steps", "schedule", "muon_lr"}
    free = {"out_dir", "resume", "override_schedule", "eval_every", "save_every", "log_every", "keep", "device", "compile",
            "eval_batches", "max_bad", "sample_prompts", "merge_on_save"}
    now, then = dataclasses.asdict(config), meta["config"]
    split = ("batch_size", "gradient_accumulation_steps")     # 8 x 2 and 4 x 4 are the same rows in the same update
    if now[split[0]] * now[split[1]] == then.get(split[0], 0) * then.get(split[1], 0):
        free |= set(split)
    changed = [k for k in now if k in then and k not in free and now[k] != then[k]]
    for key in changed:
        if key in ("max_steps", "epochs") and then.get("phases"):
            raise UserError(f"--resume: {key} was {then[key]!r} in {path.name} and is {now[key]!r} now; with --phases use the old value: "
                            "phases end at shares of the run, so in one of another length they would begin elsewhere and read rows again")
        if key not in schedule or not config.override_schedule:
            raise UserError(f"--resume: {key} was {then[key]!r} in {path.name} and is {now[key]!r} now; use the old value"
                            + (", or add --override_schedule to change the schedule on purpose" if key in schedule else ""))
        if ctx.main:
            print(f"override_schedule: {key} {then[key]!r} -> {now[key]!r}", flush=True)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(f"--resume: {path} was trained with another tokenizer than the data's or --init_from's; choose another --out_dir")
    if not (path / "training.pt").exists():
        raise UserError(f"{path} holds no training state to resume from; start from its weights with --init_from instead")
    training = read(path, "training.pt")
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    try:
        model.load_state_dict(read(path, "model.pt"))
        optimizer.load_state_dict(training.pop("optimizer"))
    except (RuntimeError, ValueError, KeyError):
        raise UserError(f"--resume: {path} ({meta['stage']}) is not a checkpoint of this model; use --init_from for its weights") from None
    for group, scale in zip(optimizer.param_groups, scales):
        group["lr_scale"] = scale                             # a new --muon_lr under --override_schedule must count
    scaler_state = training.pop("scaler")
    if scaler_state and scaler.is_enabled():                  # empty unless the run was in fp16
        scaler.load_state_dict(scaler_state)
    rng = training.pop("rng")
    if len(rng) == ctx.world_size:                            # another number of ranks: fresh random states
        torch.set_rng_state(rng[ctx.rank]["cpu"])
        if ctx.device.type == "cuda" and "cuda" in rng[ctx.rank]:
            torch.cuda.set_rng_state(rng[ctx.rank]["cuda"], ctx.device)
        if ctx.device.type == "mps" and "mps" in rng[ctx.rank]:
            torch.mps.set_rng_state(rng[ctx.rank]["mps"])
    elif ctx.main:
        print(f"note: {len(rng)} ranks saved, {ctx.world_size} now: dropout draws new random numbers", flush=True)
    if ctx.main:
        print(f"resumed {path} at step {meta['step']}", flush=True)
    return meta["step"], training
