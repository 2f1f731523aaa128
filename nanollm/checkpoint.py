"""Checkpoints: one self-contained directory each, written aside and renamed, one format for all stages.

    RUN/step_00000400/
        model.pt       state dict, fp32, plain names, loadable with weights_only=True; with --adapter_only the adapter's tensors alone
        meta.json      stage, step, ModelArgs, adapter and its base, tokenizer hash, the run's configuration, each file's size and SHA-256
        tokenizer/     what turns text into this model's ids and back
        training.pt    optimizer, GradScaler, random states of all ranks: what --resume needs beyond the weights
        training/      instead of the optimizer in training.pt where the weights are sharded (parallel.py)
    RUN/best           as a path: the checkpoint of the lowest validation loss

A directory under its final name is whole: killing the process at any moment leaves the previous one usable.
"""
import dataclasses
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import dist, peft, quant
from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.heads import Classifier
from nanollm.model import ModelArgs, RewardModel
from nanollm.variants import build

PREFIX, ASIDE = "step_", ".writing_"


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def seal(meta):
    """The checksum of meta.json itself, over everything else in it."""
    return hashlib.sha256(json.dumps({k: v for k, v in meta.items() if k != "seal"}, sort_keys=True).encode()).hexdigest()


def write_meta(path, meta):
    """meta.json, sealed, in one piece: a kill leaves the old one or the new one."""
    (path / "meta.tmp").write_text(json.dumps({**meta, "seal": seal(meta)}, indent=1, ensure_ascii=False), encoding="utf-8")
    with open(path / "meta.tmp", "rb+") as f:
        os.fsync(f.fileno())
    os.replace(path / "meta.tmp", path / "meta.json")


def aside_of(run_dir, step):
    """An empty directory in which a checkpoint is written before it gets its name."""
    aside = Path(run_dir) / f"{ASIDE}{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def save(run_dir, step, model, tokenizer, stage, config, training=None, keep=2, state=None, aside=None, **about):
    """Write RUN/step_NNNNNNNN and remove all but the newest `keep` (0 keeps all), the best and the milestones. Returns its path.

    model: a bare Transformer or RewardModel (no DDP wrapper). config: a dataclass. state: the weights, where they are not simply
    the model's state dict. about: more for meta.json (val_loss, milestone, progress). Call on rank 0 only.
    Raises UserError when the disk is full; the older checkpoints are untouched then.
    """
    run_dir = Path(run_dir)
    final, adapter = run_dir / f"{PREFIX}{step:08d}", peft.to_meta(model, alone=getattr(config, "adapter_only", False))
    try:
        aside = aside or aside_of(run_dir, step)
        state = model.state_dict() if state is None else state
        if adapter and adapter["alone"]:
            state = {k: v for k, v in state.items() if peft.OWN.search(k)}
        need = sum(v.numel() * 4 for v in state.values()) + sum(v.numel() * v.element_size() for v in tensors(training))
        free = shutil.disk_usage(aside).free
        if free < 1.02 * need:
            raise OSError(f"it needs {need / 2**20:,.0f} MB and the disk has {free / 2**20:,.0f}")
        torch.save({k: (v.float() if v.is_floating_point() else v).detach().cpu() for k, v in state.items()}, aside / "model.pt")
        if training is not None:
            torch.save(training, aside / "training.pt")
        tokenizer.save(aside / "tokenizer")
        files = {str(p.relative_to(aside).as_posix()): p for p in sorted(aside.rglob("*")) if p.is_file()}
        meta = {"format": "nanollm-checkpoint", "version": 2, "stage": stage, "step": step,
                "head": "reward" if isinstance(model, RewardModel) else "classifier" if isinstance(model, Classifier) else "lm",
                "model": dataclasses.asdict(peft.base_args(model)), "adapter": adapter, **about,
                **({"classifier": {"task": model.task, "labels": model.labels}} if isinstance(model, Classifier) else {}),
                "tokenizer_hash": tokenizer.hash, "config": dataclasses.asdict(config) if config else {},
                "files": {name: {"size": p.stat().st_size, "sha256": digest(p)} for name, p in files.items()}}
        for path in files.values():                           # on the disk before the name is: survives a power cut
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        write_meta(aside, json.loads(json.dumps(meta)))
        shutil.rmtree(final, ignore_errors=True)              # only when the very same step is written again
        os.replace(aside, final)
    except (OSError, RuntimeError) as e:                      # torch.save reports a full disk as RuntimeError
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(e, RuntimeError) and not any(word in str(e).lower() for word in ("write", "file", "inline_container")):
            raise
        e = "the disk is full" if "unexpected pos" in str(e) else e                     # all that torch's zip writer has to say
        raise UserError(f"could not write the checkpoint {final}: {e}; free some disk space or change --out_dir, "
                        f"then go on with --resume auto") from None
    whole = sorted(p for p in run_dir.glob(PREFIX + "*") if is_whole(p))
    kept = {best_of(whole), *whole[-keep:], *to_go_back_to(whole, step - 20, config)} if keep else set(whole)
    for old in whole:
        if old not in kept and not meta_of(old).get("milestone"):
            gone = run_dir / f"{ASIDE}{old.name}"             # a kill in the middle of removing must not leave half a checkpoint
            shutil.rmtree(gone, ignore_errors=True)
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    return final


def step_of(path):
    return int(path.name.removeprefix(PREFIX))


def to_go_back_to(paths, step, config):
    """The checkpoints that --rollback may need at `step` or later: the newest that is N updates old, and those after it. Only those of
    --save_every count: where a run goes back to must not depend on when somebody stopped it."""
    if not getattr(config, "rollback", 0):
        return []
    regular = [p for p in paths if step_of(p) % config.save_every == 0]
    old = [p for p in regular if step_of(p) <= step - config.rollback]
    return regular[max(len(old) - 1, 0):]


def tensors(tree):
    """All tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [t for branch in branches for t in tensors(branch)]


def meta_of(path):
    return json.loads((path / "meta.json").read_text(encoding="utf-8"))


def is_whole(path, checksums=False, skip=""):
    """True if meta.json can be read and every file has the size, and if asked the checksum, that it names; no checksums of
    files whose names begin with `skip`."""
    try:
        meta = meta_of(path)
        if checksums and "seal" in meta and meta["seal"] != seal(meta):
            return False
        for name, file in meta["files"].items():
            file = {"size": file} if isinstance(file, int) else file                     # version 1 had sizes only
            if (path / name).stat().st_size != file["size"]:
                return False
            if checksums and "sha256" in file and not (skip and name.startswith(skip)) and digest(path / name) != file["sha256"]:
                return False
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def best_of(paths):
    """The checkpoint of the lowest validation loss, the later one of equals; None if none was evaluated."""
    evaluated = [(meta_of(p)["val_loss"], p) for p in paths if meta_of(p).get("val_loss") is not None]
    return min(reversed(evaluated), key=lambda pair: pair[0], default=(None, None))[1]


def find(path, skip=""):
    """The newest whole checkpoint in a run directory, its best one (RUN/best), or the checkpoint directory itself; files whose
    names begin with `skip` are taken on trust, but for their size. Raises UserError."""
    path = Path(path)
    if (path / "meta.json").exists():
        if not is_whole(path, True, skip):
            raise UserError(f"the checkpoint {path} is damaged: a file is missing, cut short or changed; use an older one")
        return path
    run_dir = path.parent if path.name == "best" and not path.exists() else path
    candidates = sorted(run_dir.glob(PREFIX + "*"), reverse=True)
    if run_dir != path:
        found = best_of(p for p in sorted(candidates) if is_whole(p, True, skip))
        if not found:
            raise UserError(f"{path}: no checkpoint in {run_dir} was saved together with an evaluation; give {run_dir} for the newest")
        return found
    for candidate in candidates:
        if is_whole(candidate, True, skip):
            return candidate
        print(f"warning: skipping {candidate}: a file is missing, cut short or changed", flush=True)
    if candidates:
        raise UserError(f"every checkpoint in {path} is damaged; train again or name a good copy")
    raise UserError(f"{path} holds no checkpoint; give the directory of a finished run, or make the demo's with `bash runs/speedrun.sh`")


def read(path, name, mapped=False):
    try:
        return torch.load(path / name, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:                                    # pickle, zip and torch each have their own
        raise UserError(f"cannot read {path / name}: {type(e).__name__}; the file is damaged, use another checkpoint") from None


@torch.no_grad()
def knows_chat(model, tokenizer):
    """Has this language model learnt to end a turn? A token that no training text holds, like <|pad|>, gets no gradient of its own, only
    the softmax's push away from every hidden state, the same for all such tokens: their output rows become parallel (cosine of the end's
    and <|pad|>'s: 1.000 after the demo's pretraining, 0.80 after its SFT, about 0 with random weights). A gentle SFT turns the row by
    little: then where an answer ends the end must be likelier than <|pad|> (by 0.0 nats after pretraining, 1.1 after 200 updates at 5e-5)."""
    end, pad = model.output.weight.detach()[[tokenizer.end_id, tokenizer.pad_id]].float()
    ids, mask = tokenizers.render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    asked = ids[: ids.index(tokenizer.end_id, mask.index(1))][-model.args.max_seq_len :]
    logits = model(torch.tensor([asked], device=end.device))[0, -1]
    apart = torch.cosine_similarity(end, pad, dim=0) < 0.99               # 0 beside a row of zeros, as imported models may have
    return bool(apart or logits[tokenizer.end_id] - logits[tokenizer.pad_id] > 0.5)


def load(path, device="cpu", expect=None, variants=(), plain=False, merge=True, quantize="", mapped=False):
    """(model, tokenizer, meta) of the checkpoint or run directory at `path`, in eval mode; the model plain, an adapter merged. One that
    cannot be merged, such as a prompt, stays on, or with plain=True is refused; merge=False leaves every adapter on.

    expect: "lm", "reward" or "classifier" refuses another head in one sentence, "chat" also a language model that has not been taught to
    end its turn. variants: more than it was trained with, such as have no weights (docs/variants.md). quantize: int8, int4 or nf4,
    to use it and not to train it on (docs/quantization.md). mapped: a plain language model stays in its file, read where it is used, and
    on the CPU: for qlora, which takes one matrix after the other. Strict: every tensor must match by name and shape.
    """
    path = find(path, skip="training")                       # the largest part, and not read here
    meta = meta_of(path)
    if expect and meta["head"] != expect.replace("chat", "lm"):
        kind = {"lm": "a language model", "reward": "a reward model", "chat": "a language model", "classifier": "a classifier"}
        raise UserError(f"{path} is {kind[meta['head']]} ({meta['stage']}), but this needs {kind[expect]}")
    tokenizer = tokenizers.load(path / "tokenizer")
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(f"{path}: its tokenizer is not the one it was trained with (hash {tokenizer.hash[:8]} instead "
                        f"of {meta['tokenizer_hash'][:8]}); restore the tokenizer directory")
    args = ModelArgs(**meta["model"])
    args.variants += [word for word in variants if word not in args.variants]
    config, base, alone = peft.of_meta(meta)
    mapped, device = mapped and not config and meta["head"] == "lm", "cpu" if mapped else device
    with torch.device("meta" if mapped else "cpu"):          # meta: shapes alone, no memory
        model = Classifier(build(args), **meta["classifier"]) if meta["head"] == "classifier" else build(args, meta["head"])
    quant.as_stored(model, meta.get("quantize"), quantize, path)
    if alone:
        peft.put_base(model, base, path, load)
    if config:
        peft.add_adapter(model, **config).base = base
    try:
        peft.load_state_dict(model, read(path, "model.pt", mapped), alone, mapped)
        if mapped:                                            # what is in no file: the tables of RoPE, and that two tied matrices are one
            small = build(dataclasses.replace(args, n_layers=1, vocab_size=8, hidden_dim=8))
            model.rope_cos, model.rope_sin = small.rope_cos, small.rope_sin
            model.output.weight = model.tok_embeddings.weight if args.tie_embeddings else model.output.weight
    except RuntimeError as e:
        extra = f" with --variants {' '.join(variants)} added (a trained model takes only variants without weights)" if variants else ""
        raise UserError(f"{path}: the weights do not fit the model that meta.json describes{extra}: {str(e).splitlines()[-1].strip()[:120]}") from None
    if config and merge and config["method"] in peft.MERGEABLE:
        peft.merge_adapter(model)
    elif config and plain:
        raise UserError(f"{path} carries a {config['method']} adapter, which cannot be merged into the weights; train from its base, "
                        f"{base.get('path', 'the plain model')}")
    elif config:
        peft.bake(model)
    if expect == "chat" and not knows_chat(model.eval(), tokenizer):
        raise UserError(f"{path} ({meta['stage']}) has never seen the chat tokens: its answers would not end; train it with train_sft.py first")
    if quantize and not meta.get("quantize"):
        quant.quantize(model, quantize)
    return model.to(device).eval(), tokenizer, meta


# ----------------------------------------------------------------------------------------------------------------
# A training run: where it stands, going on, going back


@dataclass
class Progress:
    """Where a run stands, apart from weights, optimizer and random states. The data need no more than the step: the sampler is a
    function of (seed, step)."""
    step: int = 0                  # updates tried = the place in the data
    tokens: int = 0
    seconds: float = 0.0           # worked so far, over all resumes
    skipped: int = 0               # updates left out for a loss or gradient that was not finite: the schedule waits for them
    in_a_row: int = 0              # of these, the last ones
    evaluated: int = -1            # step of the last evaluation
    val_loss: float | None = None
    best: float | None = None
    stale: int = 0                 # evaluations since the best (--patience)
    slow_until: int = 0            # after a rollback: up to here at --rollback_lr of the rate
    rollbacks: int = 0

    def judge(self, val_loss, counts=True):
        """Note an evaluation at this step. counts=False: one out of turn, at the end of the run; --patience knows nothing of it."""
        self.evaluated, self.val_loss = self.step, val_loss if math.isfinite(val_loss) else None
        if counts and self.val_loss is not None and (self.best is None or val_loss < self.best):
            self.best, self.stale = val_loss, 0
        elif counts:
            self.stale += 1


SCHEDULE = {"max_steps", "epochs", "learning_rate", "min_lr", "warmup_steps", "schedule", "decay_factor", "muon_lr"}
FREE = {"out_dir", "resume", "override_schedule", "eval_every", "save_every", "log_every", "keep", "device", "compile", "eval_batches", "max_bad",
        "sample_prompts", "merge_on_save", "parallel", "tp", "activation_checkpointing", "tensorboard", "patience", "milestones", "rollback",
        "rollback_lr", "ref_cache", "share_prompt"}


class Saver:
    """What saving and going on need to know of a training run; all ranks hold one and call each method together."""

    def __init__(self, cfg, ctx, model, optimizer, scaler, tokenizer, stage):
        self.cfg, self.ctx, self.model, self.optimizer, self.scaler, self.tokenizer, self.stage = cfg, ctx, model, optimizer, scaler, tokenizer, stage
        self.out_dir, self.step = Path(cfg.out_dir), -1                                  # step: of the checkpoint last saved or loaded
        self.also, self.loaded = {}, {}
        self.scores = None                                    # a reward model's {"mean", "std"} on held-out answers, told in meta.json
        try:
            self.milestones = {int(step) for step in cfg.milestones}
        except ValueError:
            raise UserError(f"--milestones {' '.join(cfg.milestones)}: wants numbers of updates, as in --milestones 1 2 4 8 16") from None

    def include(self, **also):
        """More that has a state_dict (PPO's critic, its optimizer): saved with the rest from now on, and restored, now if this run goes on."""
        self.also = also
        self.restore()

    def restore(self):
        for name, thing in self.also.items() if self.step >= 0 else []:
            if name not in self.loaded:
                raise UserError(f"--resume: the checkpoint of step {self.step} holds no {name}: it is of another kind of run; use --init_from for its weights")
            thing.load_state_dict(self.loaded[name])
        self.loaded = {} if self.also else self.loaded       # not to be held in memory for the whole run

    def due(self, at, last):
        """Is it time for a checkpoint?"""
        improved = self.cfg.patience and at.evaluated == at.step and at.stale == 0
        return at.step > self.step and (at.step in self.milestones or improved or at.step > 0 and (at.step % self.cfg.save_every == 0 or last))

    def save(self, at):
        """A checkpoint of this very step, with everything that the next one depends on. Raises UserError as save() does, and when
        the ranks no longer hold the same weights."""
        ctx, sharded, aside = self.ctx, self.ctx.sharded, None
        for model in [self.model, *(m for m in self.also.values() if isinstance(m, torch.nn.Module))]:
            dist.check_replicas(model, ctx)
        rng = {"cpu": torch.get_rng_state()}
        if ctx.device.type in ("cuda", "mps"):
            rng[ctx.device.type] = torch.cuda.get_rng_state(ctx.device) if ctx.device.type == "cuda" else torch.mps.get_rng_state()
        training = {"scaler": self.scaler.state_dict(), "rng": ctx.gather(rng)[:: ctx.tp],          # one a data-parallel rank: its tp processes draw alike
                    "also": {name: thing.state_dict() for name, thing in self.also.items()}}
        if sharded:
            from nanollm import parallel
            failed = ctx.gather(self.no_room(at) if ctx.main else "")[0]
            if failed:
                raise UserError(failed)
            aside = self.out_dir / f"{ASIDE}{at.step:08d}"
            parallel.save_training(aside / "training", self.model, self.optimizer)
            state = parallel.full_state(self.model, keep=ctx.main)
        else:
            training["optimizer"], state = self.optimizer.state_dict(), self.model.state_dict()
        failed = ""
        if ctx.main:
            try:
                save(self.out_dir, at.step, self.model, self.tokenizer, self.stage, self.cfg, training, self.cfg.keep, state, aside,
                     val_loss=at.val_loss if at.evaluated == at.step else None, milestone=at.step in self.milestones, progress=dataclasses.asdict(at),
                     **({"scores": self.scores} if self.scores else {}))
            except UserError as e:
                failed = str(e)
        if failed := ctx.gather(failed)[0]:                                              # all ranks leave together, none waits for the others
            raise UserError(failed)
        self.step = at.step

    def no_room(self, at):
        """Make the directory into which all processes write their slices; a sentence if that or the disk's room fails."""
        need = 12 * sum(p.numel() for p in self.model.parameters())                      # fp32 weights and AdamW's two moments
        try:
            free = shutil.disk_usage(aside_of(self.out_dir, at.step)).free
        except OSError as e:
            return f"could not write into {self.out_dir}: {e.strerror}; free some disk space or change --out_dir"
        sizes = f"{need / 2**20:,.0f} MB and the disk has {free / 2**20:,.0f}"
        return "" if free > 1.02 * need else f"a checkpoint in {self.out_dir} needs {sizes}; free some disk space, then go on with --resume auto"

    def resume(self):
        """The Progress that --resume asks for, its state in place.

        "" starts afresh (and refuses to mix with an existing run), "auto" takes the newest whole checkpoint in out_dir or
        starts afresh, anything else is a checkpoint's path. A worker that torchrun has started again after a crash goes on.
        """
        cfg, ctx, which = self.cfg, self.ctx, self.cfg.resume
        found = sorted(p.name for p in self.out_dir.glob(PREFIX + "*"))
        if found and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
            which = "auto"                                    # this very run has written them, whatever it began from
        if any(there != found for there in ctx.gather(found)):
            raise UserError(f"the ranks do not see the same checkpoints in --out_dir {cfg.out_dir}: put it on a disk that all machines share")
        if not which and found:
            raise UserError(f"--out_dir {cfg.out_dir} already holds a run; add --resume auto to go on, or choose another directory")
        if which:
            for aside in self.out_dir.glob(ASIDE + "*") if ctx.main else []:
                shutil.rmtree(aside, ignore_errors=True)                                 # the half-written one of a killed process
        if not which or which == "auto" and not found:
            return Progress()
        path = find(self.out_dir if which == "auto" else which)
        self.compare(meta_of(path), path)
        later = [p for p in sorted(self.out_dir.glob(PREFIX + "*")) if p.name > path.name and is_whole(p, checksums=True)]
        if later and not cfg.rollback:
            raise UserError(f"--resume {path}: --out_dir {cfg.out_dir} already holds the later {later[-1].name}; choose another --out_dir, move it "
                            f"away, or add --rollback N to set it aside and go on from here at a lower rate")
        at = self.load(path)
        if later:
            at.slow_until = step_of(later[-1]) + cfg.rollback
            if ctx.main:                                      # first: killed from here on, it still goes on slowly
                write_meta(path, meta_of(path) | {"progress": dataclasses.asdict(at)})
            self.abandon(later)
        print(f"resumed {path} at step {at.step}" + (f"; up to step {at.slow_until} at {cfg.rollback_lr} of the rate" if later else ""), flush=True)
        return at

    def compare(self, meta, path):
        """Every option that shapes the result must equal the checkpoint's; --override_schedule lets the schedule differ, and says so."""
        now, then, free = dataclasses.asdict(self.cfg), meta["config"], set(FREE)
        split = ("batch_size", "gradient_accumulation_steps")     # 8 x 2 and 4 x 4 are the same rows in the same update
        if now[split[0]] * now[split[1]] == then.get(split[0], 0) * then.get(split[1], 0):
            free |= set(split)
        for key in [k for k in now if k in then and k not in free and now[k] != then[k]]:
            if key in ("max_steps", "epochs") and then.get("phases"):
                raise UserError(f"--resume: {key} was {then[key]!r} in {path.name} and is {now[key]!r} now; with --phases use the old value: "
                                "phases end at shares of the run, so in one of another length they would begin elsewhere and read rows again")
            if key not in SCHEDULE or not self.cfg.override_schedule:
                raise UserError(f"--resume: {key} was {then[key]!r} in {path.name} and is {now[key]!r} now; use the old value"
                                + (", or add --override_schedule to change the schedule on purpose" if key in SCHEDULE else ""))
            print(f"override_schedule: {key} {then[key]!r} -> {now[key]!r}", flush=True)
        if self.tokenizer.hash != meta["tokenizer_hash"]:
            raise UserError(f"--resume: {path} was trained with another tokenizer than the data's or --init_from's; choose another --out_dir")

    def load(self, path):
        """Put the checkpoint's weights, optimizer, scaler and random states in place; returns its Progress."""
        ctx, meta = self.ctx, meta_of(path)
        if not (path / "training.pt").exists():
            raise UserError(f"{path} holds no training state to resume from; start from its weights with --init_from instead")
        training = read(path, "training.pt")
        scales = [group["lr_scale"] for group in self.optimizer.param_groups]
        try:
            if ctx.sharded:
                from nanollm import parallel
                parallel.load_full_state(self.model, read(path, "model.pt"))
            else:
                _, base, alone = peft.of_meta(meta)
                if alone and base != (peft.to_meta(self.model, alone) or {}).get("base"):
                    raise UserError(f"--resume: {path} holds an adapter alone, and --init_from {self.cfg.init_from} is no longer its base")
                peft.load_state_dict(self.model, read(path, "model.pt"), alone)
            if "optimizer" in training and not ctx.sharded:
                self.optimizer.load_state_dict(training["optimizer"])
            else:                                             # saved by, or going on as, a sharded run
                from nanollm import parallel
                parallel.load_training(path / "training", self.model, self.optimizer, training.get("optimizer"))
        except (RuntimeError, ValueError, KeyError):
            raise UserError(f"--resume: {path} ({meta['stage']}) is not a checkpoint of this model; use --init_from for its weights") from None
        for group, scale in zip(self.optimizer.param_groups, scales):
            group["lr_scale"] = scale                         # a new --muon_lr under --override_schedule must count
        if training["scaler"] and self.scaler.is_enabled():   # empty unless the run was in fp16
            self.scaler.load_state_dict(training["scaler"])
        if len(training["rng"]) == ctx.world_size:            # another number of ranks: fresh random states
            rng = training["rng"][ctx.rank]
            torch.set_rng_state(rng["cpu"])
            if ctx.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], ctx.device)
            if ctx.device.type == "mps" and "mps" in rng:
                torch.mps.set_rng_state(rng["mps"])
        else:
            print(f"note: {len(training['rng'])} ranks saved, {ctx.world_size} now: dropout draws new random numbers", flush=True)
        self.step, self.scores, self.loaded = meta["step"], meta.get("scores"), training.get("also", {})
        self.restore()
        return Progress(**meta["progress"]) if "progress" in meta else Progress(meta["step"], training.get("tokens", 0))

    def abandon(self, paths):
        """Give checkpoints another name, so that nothing takes them for this run's."""
        self.ctx.barrier()                                    # every rank has seen them
        for path in paths if self.ctx.main else []:
            shutil.rmtree(path.with_name("abandoned_" + path.name), ignore_errors=True)
            path.rename(path.with_name("abandoned_" + path.name))
        self.ctx.barrier()

    def roll_back(self, at, log):
        """Too many updates in a row without effect: with --rollback N the notes' recipe, go back to the newest checkpoint at
        least N updates old, lower the rate until N updates beyond the place that broke, then restore it. Else give up with advice."""
        cfg, ctx = self.cfg, self.ctx
        if not cfg.rollback or at.rollbacks == 3:
            raise UserError(f"{at.in_a_row} updates in a row had a loss or gradient that is not finite" + (" after three rollbacks" if cfg.rollback else "")
                            + f"; look at the rows that {cfg.out_dir}/metrics.jsonl names, lower --learning_rate"
                            + ("" if cfg.rollback else ", or let --rollback 100 go back by itself"))
        whole = [p for p in sorted(self.out_dir.glob(PREFIX + "*")) if is_whole(p, checksums=True)]
        broke = at.step - at.in_a_row                         # the last update before the 20 that failed
        old = to_go_back_to(whole, broke, cfg)[:1]
        if not old or step_of(old[0]) > broke - cfg.rollback:
            raise UserError(f"--rollback {cfg.rollback}: no checkpoint in {cfg.out_dir} is that many updates older than step {broke}; lower --save_every "
                            f"or --learning_rate")
        back = self.load(old[0])
        back.slow_until, back.rollbacks = at.step + cfg.rollback, at.rollbacks + 1
        if ctx.main:                                          # first: killed from here on, the run goes on slowly too
            write_meta(old[0], meta_of(old[0]) | {"progress": dataclasses.asdict(back)})
        if later := [p for p in whole if p.name > old[0].name]:
            self.abandon(later)
        log.rewind(back)
        log.event(back.step, f"rollback from step {at.step}: up to step {back.slow_until} at {cfg.rollback_lr} of the rate")
        return back
