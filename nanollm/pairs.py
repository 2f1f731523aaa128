"""Two answers to one prompt: the prompt read once for both, what the reference thinks of them, easy pairs before hard ones."""
import contextlib
import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanollm import peft
from nanollm.config import UserError
from nanollm.losses import IGNORE_INDEX, KINDS, REFERENCE_FREE, linear_sequence_logps
from nanollm.model import KVCache, Transformer, causal_mask
from nanollm.sampler import uniform
from nanollm.variants import mark_prefix


def check(cfg):
    """Refuse options of train_dpo.py that do not belong together. Raises UserError."""
    if cfg.loss not in KINDS:
        raise UserError(f"--loss {cfg.loss} is unknown; use {', '.join(KINDS)}")
    if cfg.beta == 0 or cfg.label_smoothing >= 0.5:
        raise UserError("--beta must be above 0 and --label_smoothing below 0.5")
    if bool(cfg.label_smoothing) != (cfg.loss in ("cdpo", "robust")):
        raise UserError(f"--label_smoothing {cfg.label_smoothing} with --loss {cfg.loss}: cdpo and robust need it above 0, the other kinds know none")
    if cfg.dpop and cfg.loss not in ("sigmoid", "cdpo", "robust", "hinge") or cfg.rpo_alpha and cfg.loss in ("orpo", "kto"):
        raise UserError(f"--loss {cfg.loss}: --dpop belongs to sigmoid, cdpo, robust and hinge; --rpo_alpha to all but kto and orpo, which has its own")
    if cfg.loss == "kto" and (cfg.batch_size < 2 or cfg.pair_curriculum):
        raise UserError("--loss kto reads single answers: give --batch_size at least 2 and no --pair_curriculum")
    if cfg.loss in REFERENCE_FREE and (cfg.precompute_ref or cfg.reference or cfg.pair_curriculum):
        raise UserError(f"--loss {cfg.loss} has no reference: leave out --precompute_ref, --reference and --pair_curriculum")


def read_prompts(model, prompts, n, **how):
    """Read prompts (B, P), padded with -1 on the left, and return the KVCache from which `n` answers to each can go on. Keys and
    values of a prompt do not depend on what follows it, so both answers may look at the same ones, and in the backward pass
    their gradients add up there: half of the prompts' arithmetic is saved.

    The answers come as rows 0..B-1, B..2B-1, …; RoPE sees distances only, so the padding changes nothing. how: what the model
    wants besides, such as a head."""
    cache = KVCache()
    model(prompts.clamp(min=0), (prompts >= 0).long(), cache, **how)
    cache.kv = {layer: (k.repeat(n, 1, 1, 1), v.repeat(n, 1, 1, 1)) for layer, (k, v) in cache.kv.items()}      # (n B, G, P, D)
    cache.segments = cache.segments.repeat(n, 1)
    return cache


def can_share(model, cfg):
    """May prompts be read apart? Variants have their own masks, positions and caches; the rest want one forward pass."""
    return not (model.args.variants or cfg.activation_checkpointing or cfg.compile or cfg.tp > 1 or cfg.parallel == "fsdp")


def spared(prompts):
    """Tokens of the whole pairs that do not stand in the rows of answers: every prompt token twice."""
    return 0 if prompts is None else 2 * (prompts >= 0).sum()


def takes_runs(model):
    """Does it compute segments end to end, without their padding (Transformer.hidden)? Elsewhere they would cost it a mask."""
    model = getattr(model, "module", model)                  # out of DDP
    body = getattr(model, "backbone", model)
    return isinstance(body, Transformer) and body.by_runs and body.mask is causal_mask and next(body.parameters()).device.type == "cpu"


def without_padding(model, targets):
    """Segments (N, T) that end with each row's last target, for a model that takes_runs, else None."""
    return (targets != IGNORE_INDEX).flip(1).cummax(1).values.flip(1).long() if takes_runs(model) else None


def answer_logps(model, inputs, targets, prompts=None):
    """(log p of each answer, a sum over its tokens (N,); number of tokens (N,)). inputs, targets (N, T), targets on the answers
    only. prompts (B, P): what rows i, i + B, … go on from, see read_prompts; None = it stands in the rows."""
    cache, segments = None, mark_prefix(model, without_padding(model, targets), targets)
    if prompts is not None:
        cache = read_prompts(model, prompts, len(inputs) // len(prompts), head=lambda h, output: None)
        segments = torch.ones_like(inputs)
    return model(inputs, segments, cache, head=lambda h, output: linear_sequence_logps(h, output, targets))


def scores(model, ids, prompts=None):
    """A reward model's number at each position (N, T) of ids (N, T); prompts as in answer_logps."""
    if prompts is None:
        return model(ids)
    return model(ids, torch.ones_like(ids), read_prompts(model, prompts, len(ids) // len(prompts)))


# ----------------------------------------------------------------------------------------------------------------
# The reference


@torch.no_grad()
def reference_logps(model, reference, inputs, targets, prompts=None):
    """answer_logps (N,) under the reference: a frozen model, or None for `model` with its LoRA adapter switched off."""
    with peft.disable_adapter(model) if reference is None else contextlib.nullcontext():
        return answer_logps(model if reference is None else reference, inputs, targets, prompts)[0]


def key_of(reference, rows, dtype):
    """What the log-probabilities depend on, as a hash: the reference's weights, the tokens of the pairs, the compute type."""
    digest = hashlib.sha256(str(dtype).encode())
    for name, weight in reference.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    for ids in (ids for pair in rows.pairs for ids in pair):
        digest.update(np.array([len(ids), *ids], np.int64).tobytes())
    return digest.hexdigest()


def precompute(reference, rows, ctx, autocast, dtype, batch_size, folder):
    """Fill rows.ref_logps (pairs, 2), so that training needs no reference in memory and no pass through it. Kept as
    folder/KEY.npz: neither beta nor the kind of loss plays a part, so one file serves a whole sweep."""
    path = Path(folder) / f"{key_of(reference, rows, dtype)[:32]}.npz"
    known = all(ctx.gather(path.exists()))
    if known:
        try:
            rows.ref_logps = torch.from_numpy(np.load(path)["logps"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise UserError(f"{path} is damaged; delete it, and it will be computed again") from None
    else:
        order = np.argsort(rows.lengths(), kind="stable")
        logps = torch.zeros(len(rows), 2, device=ctx.device)
        for batch in ctx.share([order[i : i + batch_size] for i in range(0, len(order), batch_size)]):
            inputs, targets, prompts, *_ = ctx.to(rows.batch(batch))
            with autocast():
                found = reference_logps(reference, reference, inputs, targets, prompts).float()
            logps[list(batch)] = found.view(2, -1).T[: len(batch)]
        rows.ref_logps = ctx.sum(logps).cpu()                # each pair was read by one rank, the others have 0
        if ctx.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}.tmp")  # runs of a sweep may do this at the same time
            with open(aside, "wb") as f:
                np.savez(f, logps=rows.ref_logps.numpy())
            os.replace(aside, path)
    print(f"reference: {len(rows):,} pairs {'read from' if known else 'computed ->'} {path}", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Easy pairs before hard ones


def easiest_first(rows):
    """Pair numbers, easy ones first. How far a pair's answers lie apart is its own margin, if every row has one; else how much more
    likely the reference finds a token of the chosen answer than one of the rejected (rows.ref_logps)."""
    gaps = rows.margins
    if any(margin is None for margin in gaps):
        tokens = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in rows.pairs])
        gaps = (rows.ref_logps / tokens) @ torch.tensor([1.0, -1.0])
    return np.argsort(-np.asarray(gaps), kind="stable")


@dataclass
class PairCurriculum:
    """Which pair each sample of the run is: at time t (0..1) a hard one with probability f(t) = k t, cut at 1, else an easy one (Xu et
    al. 2023, arXiv:2310.02263, section 4). Hard is the second half of easiest_first. Drawn with replacement, as a function of
    (seed, sample number)."""
    easiest_first: np.ndarray
    seed: int
    total: int                           # samples of the run
    k: float = 1.0

    def __call__(self, samples):
        half = len(self.easiest_first) // 2
        hard = uniform(self.seed, samples) < np.minimum(1.0, self.k * samples / self.total)
        size = np.where(hard, len(self.easiest_first) - half, half)
        place = np.floor(uniform(self.seed + 1, samples) * size).astype(np.int64)
        return self.easiest_first[np.where(hard, half + place, np.minimum(place, max(half - 1, 0)))].astype(np.int64)
