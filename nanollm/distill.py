"""Knowledge distillation: a student learns from all that a teacher thinks possible, not only from the one token that came.

    loss = alpha * CE + (1 - alpha) * T^2 * D(p_teacher, p_student),    p = softmax(logits / T)        (Hinton et al. 2015, section 2)

Both terms are sums over the supervised tokens, which the script divides by their global number. (KLDivLoss(reduction="batchmean")
on (B, T, V) divides by B alone, about T times too little, and counts prompts and padding.) The gradient of D by a logit shrinks
like 1 / T^2: T (p_student - p_teacher) is what is left of it here, of one size for all T, and alpha keeps its meaning.
"""
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as computed_again

from nanollm import checkpoint, dist
from nanollm.config import UserError
from nanollm.losses import IGNORE_INDEX
from nanollm.variants import mark_prefix

KINDS, BLOCK = ("forward", "reverse", "jsd"), 256                # BLOCK: rows in a file of the cache


def divergence(student, teacher, kind="forward"):
    """How far the student is from the teacher: log-probabilities (N, K) of both -> (N,) in nats, at least 0.

    forward   KL(teacher || student): the student must give a chance to all that the teacher may say
    reverse   KL(student || teacher): the student may leave things out, but say nothing that the teacher would not
    jsd       (KL(teacher || m) + KL(student || m)) / 2 with m the mean of both, at most ln 2 (Agarwal et al. 2024, eq. 1, beta = 1/2)
    """
    kl = lambda p, q: F.kl_div(q, p, log_target=True, reduction="none").sum(-1)          # sum p (log p - log q)
    if kind == "jsd":
        m = torch.logaddexp(student, teacher) - math.log(2)
        return (kl(teacher, m) + kl(student, m)) / 2
    return kl(teacher, student) if kind == "forward" else kl(student, teacher)


def kd_loss_sum(student_logits, teacher_logits, targets, temperature=1.0, kind="forward"):
    """(sum of T^2 * D over the positions with a target, their number). logits (B, T, V), targets (B, T).
    Where one vocabulary is padded longer than the other, both are cut to the shorter and normalised again."""
    at, V = targets != IGNORE_INDEX, min(student_logits.size(-1), teacher_logits.size(-1))
    student, teacher = (F.log_softmax(logits[at][:, :V].float() / temperature, -1) for logits in (student_logits, teacher_logits))
    return temperature**2 * divergence(student, teacher, kind).sum(), at.sum()


def in_buckets(logps, ids):
    """Log-probabilities (N, V) -> (N, k + 1): of each token in ids (N, k), and of all others together; (N, V) if k = V.

    A divergence between such coarser distributions is never larger than between the whole ones (data processing inequality):
    the k likeliest tokens and the mass of the tail give a lower bound of D, which k = V reaches."""
    picked = logps.gather(1, ids)
    if ids.size(1) == logps.size(1):
        return picked
    return torch.cat((picked, logps.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)), 1)


def distill_loss(hidden, weight, targets, given, vocab_size, alpha, temperature, kind, chunk=0):
    """alpha * cross-entropy + (1 - alpha) * kd_loss_sum, without ever holding the logits of more than `chunk` tokens (0: as many
    as fit into 32 MB): each chunk's are computed again in the backward pass. (sum, count, {"ce": sum, "kd": sum}).

    hidden (B, T, C) and weight (V, C) of the student, targets (B, T). given(i, j) is what the teacher says at the supervised
    positions i … j - 1 of the batch: (None, log-probabilities (j - i, vocab_size)), or (ids (j - i, k), in_buckets of them).
    """
    chunk = chunk or 2**23 // len(weight) + 1
    at = targets.flatten() != IGNORE_INDEX
    hidden, targets = hidden.flatten(0, 1)[at], targets.flatten()[at]                    # (N, C), (N,)

    def part(h, weight, t, i):
        logits = F.linear(h, weight).float()                                             # (chunk, V)
        ids, teacher = given(i, i + len(t))
        student = F.log_softmax(logits[:, :vocab_size] / temperature, -1)
        student = student if ids is None else in_buckets(student, ids)
        return F.cross_entropy(logits, t, reduction="sum"), temperature**2 * divergence(student, teacher, kind).sum()

    parts = [computed_again(part, hidden[i : i + chunk], weight, targets[i : i + chunk], i, use_reentrant=False, preserve_rng_state=False)
             for i in range(0, max(len(targets), 1), chunk)]
    ce, kd = (sum(sums) for sums in zip(*parts))
    return alpha * ce + (1 - alpha) * kd, at.sum(), {"ce": ce.detach(), "kd": kd.detach()}


class Teacher:
    """The frozen model of --teacher, or with --kd_cache what it has said about every row of the training data."""

    def __init__(self, cfg, model, tokenizer):
        self.model, self.vocab_size, self.temperature, self.cached = model.requires_grad_(False), tokenizer.vocab_size, cfg.kd_temperature, None
        self.mixed = {"alpha": cfg.kd_alpha, "temperature": cfg.kd_temperature, "kind": cfg.kd_kind}

    def head(self, inputs, targets, segments):
        """The `head` of Transformer.forward that computes the distillation loss of this batch (segments as the loader made them)."""
        given = self.cached(inputs, targets, segments) if self.cached else self.says(inputs, targets, segments)
        return lambda h, output: distill_loss(h, output.weight, targets, given, self.vocab_size, **self.mixed)

    @torch.no_grad()
    def says(self, inputs, targets, segments):
        """given(i, j) for distill_loss: one forward pass of the teacher now, its logits when they are asked for."""
        hidden = self.model.hidden(inputs, mark_prefix(self.model, segments, targets))[targets != IGNORE_INDEX]             # (N, C)
        return lambda i, j: (None, F.log_softmax(self.model.output(hidden[i:j])[:, : self.vocab_size].float() / self.temperature, -1))


def load_teacher(cfg, tokenizer, rows, max_seq_len, ctx, autocast):
    """The Teacher that --teacher names, None without one. rows: the training data, which --kd_cache runs through once.
    Raises UserError for a teacher of another tokenizer or a shorter context, and for options that do not fit."""
    if not cfg.teacher:
        if cfg.kd_cache:
            raise UserError(f"--kd_cache {cfg.kd_cache} keeps what a teacher says: name one with --teacher CHECKPOINT")
        return None
    if cfg.kd_kind not in KINDS:
        raise UserError(f"--kd_kind {cfg.kd_kind} is unknown; use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if cfg.kd_alpha > 1 or cfg.kd_temperature <= 0:
        raise UserError(f"--kd_alpha {cfg.kd_alpha} lies between 0 (only the teacher) and 1 (only the text), --kd_temperature {cfg.kd_temperature} above 0")
    model, theirs, meta = checkpoint.load(cfg.teacher, ctx.device, expect="lm")
    if theirs.hash != tokenizer.hash:
        raise UserError(f"--teacher {cfg.teacher} has another tokenizer (hash {theirs.hash[:8]}) than the student ({tokenizer.hash[:8]}): its "
                        f"probabilities are of other tokens; train both with the same tokenizer, or let the teacher write text for train_sft.py")
    if model.args.max_seq_len < max_seq_len:
        raise UserError(f"--teacher {cfg.teacher} reads at most {model.args.max_seq_len} tokens and the rows have {max_seq_len}; lower --max_seq_len")
    teacher = Teacher(cfg, model, tokenizer)
    if cfg.kd_cache:
        known = [meta["files"]["model.pt"]["sha256"], tokenizer.hash, cfg.kd_temperature, str(dist.choose_dtype(cfg.dtype, ctx.device))]
        teacher.cached = Cache(teacher, known, rows, cfg, ctx, autocast)
        teacher.model = None                                     # its memory is the student's now
    return teacher


# ---- what the teacher says, written down once -------------------------------------------------------------------------


def row_names(inputs, targets, segments):
    """For each row of a batch (name, supervised tokens): a hash of what the teacher reads up to the last supervised token and of
    where it is asked, so the same row under any padding and in any batch."""
    segments = torch.ones_like(inputs) if segments is None else segments
    for row in zip(*(t.cpu().numpy().astype("<i8") for t in (inputs, targets, segments))):
        asked = np.flatnonzero(row[1] != IGNORE_INDEX)
        yield hashlib.blake2b(np.stack(row)[:, : asked[-1] + 1 if len(asked) else 0].tobytes(), digest_size=16).digest(), len(asked)


class Cache:
    """DIR/KEY/00000.pt, …: for each supervised token of 256 rows the k likeliest tokens' ids (N, k) and log-probabilities at
    temperature T (N, k + 1), the last that of the tail.

    KEY is a hash of the teacher's weights, the number format, the tokenizer, T, k and every row, so what is found there belongs to
    this run; files are written aside and renamed, each rank its share, so a killed run goes on where it was."""

    def __init__(self, teacher, known, rows, cfg, ctx, autocast):
        from nanollm.corpus.io import progress
        self.k = min(cfg.kd_top_k, teacher.vocab_size)
        spans = [range(i, min(i + BLOCK, len(rows))) for i in range(0, len(rows), BLOCK)]
        names = [list(row_names(*rows.batch(span))) for span in spans]
        key = hashlib.sha256(json.dumps([*known, self.k]).encode() + b"".join(name for block in names for name, _ in block)).hexdigest()
        self.folder, self.place, self.files = Path(cfg.kd_cache) / key[:16], {}, {}
        for b, block in enumerate(names):
            starts = np.cumsum([0] + [n for _, n in block]).tolist()
            self.place |= {name: (b, start, start + n) for (name, n), start in zip(block, starts)}
        mine = [b for b in range(ctx.rank, len(spans), ctx.world_size) if not self.path(b).exists()]
        tokens = sum(n for block in names for _, n in block)
        if ctx.main:
            print(f"--kd_cache: the {self.k} likeliest of {teacher.vocab_size} tokens at {tokens:,} places, {tokens * (8 * self.k + 4) / 2**20:,.0f} MB in "
                  f"{self.folder.as_posix()}" + ("" if mine else ", complete"), flush=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for b in progress(mine, desc="teacher", unit=" blocks", disable=not ctx.main):
                self.write(b, [rows.batch(spans[b][i : i + cfg.batch_size]) for i in range(0, len(spans[b]), cfg.batch_size)], teacher, ctx, autocast)
            failed = ""
        except (OSError, RuntimeError) as e:                     # torch.save reports a full disk as RuntimeError
            failed = f"--kd_cache {cfg.kd_cache}: cannot write {self.folder}: {e}; free some disk space, lower --kd_top_k, or choose another directory"
        if failed := next(filter(None, ctx.gather(failed)), ""):
            raise UserError(failed)
        if missing := [b for b in range(len(spans)) if not self.path(b).exists()]:
            raise UserError(f"{self.path(missing[0])} is not there: all processes must see the same --kd_cache, on a disk that they share")

    def path(self, b):
        return self.folder / f"{b:05d}.pt"

    @torch.no_grad()
    def write(self, b, batches, teacher, ctx, autocast):
        ids, logps = [], []
        for batch in batches:
            n = int((batch[1] != IGNORE_INDEX).sum())
            with autocast():
                given = teacher.says(*ctx.to(batch))
                for i in range(0, n, 4096):
                    _, whole = given(i, min(i + 4096, n))
                    ids.append(whole.topk(self.k).indices)
                    logps.append(in_buckets(whole, ids[-1]).float().cpu())
        aside = self.path(b).with_suffix(f".{ctx.rank}.{os.getpid()}.tmp")
        torch.save({"ids": torch.cat(ids).int().cpu(), "logps": torch.cat(logps)}, aside)
        os.replace(aside, self.path(b))

    def block(self, b):
        """The tensors of a block, mapped into memory. Raises UserError if the file is not whole."""
        if b not in self.files:
            try:
                self.files[b] = torch.load(self.path(b), mmap=True, weights_only=True)
            except Exception as e:                               # pickle, zip and torch each have their own
                raise UserError(f"{self.path(b)} cannot be read ({type(e).__name__}); delete it, and the next run writes it again") from None
        return self.files[b]

    def __call__(self, inputs, targets, segments):
        """given(i, j) for distill_loss, from the files."""
        places = [self.place[name] for name, n in row_names(inputs, targets, segments) if n] or [(0, 0, 0)]
        ids, logps = (torch.cat([self.block(b)[what][start:end] for b, start, end in places]).to(inputs.device) for what in ("ids", "logps"))
        return lambda i, j: (ids[i:j].long(), logps[i:j])
