"""Reward model: one number for an answer, learned from pairs of a better and a worse one.

    python train_rm.py --config configs/demo/rm.toml
    python train_rm.py --init_from out/sft --data pairs.jsonl
    torchrun --standalone --nproc_per_node=4 train_rm.py --gradient_accumulation_steps 4      four GPUs

The SFT model's body with a head of one output; the score is read at the <|im_end|> that closes the answer.
A separate model: it is trained on fixed pairs here, and frozen when a policy is trained against it.
"""
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist
from nanollm.config import UserError, arg, run
from nanollm.data import PreferenceRows
from nanollm.log import Logger
from nanollm.losses import reward_loss
from nanollm.model import parameter_count
from nanollm.optim import get_lr, make_optimizer
from nanollm.sampler import Sampler
from nanollm.variants import build


@dataclass
class Config:
    data: list = arg(["out/demo/raw/prefs_train.jsonl"], "preference files: prompt (or conversations), chosen, rejected")
    val_data: list = arg([], "held-out pairs; none = hold out --val_fraction of data")
    val_fraction: float = arg(0.05, "share of the pairs held out when there is no val_data")
    init_from: str = arg("out/demo/sft", "the SFT model whose body reads the answers")
    out_dir: str = arg("out/rm", "where checkpoints and metrics.jsonl go")
    resume: str = arg("", "auto: go on from the newest checkpoint in out_dir if there is one; or a checkpoint's path")
    override_schedule: bool = arg(False, "allow --resume with other max_steps or learning-rate options")
    max_seq_len: int = arg(0, "longest row; 0 = the model's context", unit="tokens")
    center: float = arg(0.0, "pulls the sum of a pair's scores to 0 (0.01 is usual): only differences are determined otherwise")
    # the run
    max_steps: int = arg(0, "length of the run and of the schedule; 0 = --epochs says it", unit="updates")
    epochs: float = arg(1.0, "passes over the data, unless --max_steps is given")
    batch_size: int = arg(16, "pairs per micro-batch and rank")
    gradient_accumulation_steps: int = arg(1, "micro-batches per update over all ranks together")
    optimizer: str = arg("adamw", "adamw, or muon for the blocks' matrices and adamw for the rest")
    learning_rate: float = arg(1e-4, "peak rate; 1e-5 for large models")
    min_lr: float = arg(1e-5, "floor of the schedule")
    muon_lr: float = arg(0.005, "peak rate of the Muon group")
    warmup_steps: int = arg(10, "linear warmup from 0", unit="updates")
    schedule: str = arg("cosine", "cosine, wsd (hold, then decay) or constant")
    weight_decay: float = arg(0.1, "on matrices and embeddings, never on norms")
    grad_clip: float = arg(1.0, "largest L2 norm of the gradient; 0 = off")
    dtype: str = arg("auto", "auto: bf16 where native, else fp16 with GradScaler, else fp32")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    compile: bool = arg(False, "torch.compile; falls back with one line if there is no compiler")
    seed: int = arg(0, "data order")
    eval_every: int = arg(100, "validation", unit="updates", least=1)
    save_every: int = arg(500, "checkpoints", unit="updates", least=1)
    log_every: int = arg(10, "console and metrics.jsonl", unit="updates", least=1)
    keep: int = arg(2, "newest checkpoints to keep; 0 = all")
    max_bad: float = arg(0.1, "largest share of unusable rows before the run refuses to start")


def pair_loss(model, ids, lengths, center):
    """Bradley-Terry over a batch of pairs: ids (2B, T), chosen first; lengths (2B,). (sum, count, metrics)."""
    return reward_loss(model(ids), lengths, center)


@torch.no_grad()
def validate(model, val, ctx, autocast, cfg):
    """Loss, accuracy (strict: a tie is a miss), mean scores, and what always preferring the longer answer would score."""
    total, sums = torch.zeros(2, device=ctx.device), {}
    batches = [range(i, min(i + cfg.batch_size, len(val))) for i in range(0, len(val), cfg.batch_size)]
    for batch in batches[ctx.rank :: ctx.world_size] or [[]]:               # a rank without a batch joins the sums with zeros
        ids, lengths = (t.to(ctx.device) for t in val.scored_batch(batch))
        with autocast():
            loss, count, metrics = pair_loss(model, ids, lengths, cfg.center)
        chosen, rejected = lengths.chunk(2)
        metrics["longer_wins"] = (chosen > rejected).sum()
        total += torch.stack([loss, count])
        sums = {k: sums.get(k, 0) + v for k, v in metrics.items()}
    loss, count = ctx.sum(total).tolist()
    return {"val/loss": loss / count} | {f"val/{k}": float(ctx.sum(v)) / count for k, v in sums.items()}


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    lm, tokenizer, _ = checkpoint.load(cfg.init_from, expect="lm")
    T = cfg.max_seq_len or lm.args.max_seq_len
    if T > lm.args.max_seq_len:
        raise UserError(f"--max_seq_len {T} is longer than the model's context of {lm.args.max_seq_len}")
    raw = build(lm.args, "reward").to(ctx.device)
    raw.backbone.load_state_dict({k: v for k, v in lm.state_dict().items() if k != "output.weight"})
    train, val = PreferenceRows.load(cfg, tokenizer, T)

    # [shared:engine]
    epochs = 0.0 if cfg.max_steps else cfg.epochs
    sampler = Sampler(len(train), ctx, cfg.batch_size, cfg.gradient_accumulation_steps, cfg.seed, epochs)
    max_steps = sampler.steps(cfg.max_steps)
    if cfg.warmup_steps >= max_steps:
        print(f"note: these {max_steps} updates end inside the warmup of {cfg.warmup_steps}; lower --warmup_steps", flush=True)
    optimizer = make_optimizer(raw, cfg.optimizer, cfg.learning_rate, cfg.weight_decay, muon_lr=cfg.muon_lr)
    scaler = torch.amp.GradScaler(ctx.device.type, enabled=dtype == torch.float16)
    step, counters = checkpoint.resume(cfg.out_dir, cfg.resume, ctx, raw, optimizer, scaler, cfg, tokenizer)
    tokens, start, skipped = counters.get("tokens", 0), step, 0
    model = dist.DDP(dist.compiled(raw, cfg.compile), ctx).train()
    log = Logger(cfg.out_dir, ctx.main, step, max_steps, tokens)
    # [/shared]
    model.eval()                                             # dropout off: both answers are judged by the same network
    print(f"{parameter_count(raw)['total']:,} parameters | {dtype} on {ctx.device}, {ctx.world_size} rank(s)\n"
          f"{len(train):,} pairs | {sampler.rows_per_step} pairs an update | {max_steps} updates", flush=True)

    def evaluate():
        return validate(model, val, ctx, autocast, cfg)

    while True:
        # [shared:evaluate_and_save]
        last = step >= max_steps or ctx.stop_requested()
        if step % cfg.eval_every == 0 or last:
            log(step, evaluate())
        if step > start and (step % cfg.save_every == 0 or last):
            state = checkpoint.training_state(ctx, optimizer, scaler, tokens=tokens)
            if ctx.main:
                checkpoint.save(cfg.out_dir, step, raw, tokenizer, STAGE, cfg, state, cfg.keep)
            ctx.barrier()
        if last:
            break
        # [/shared]
        # [shared:learning_rate]
        lr = get_lr(step + 1, cfg.learning_rate, cfg.min_lr, cfg.warmup_steps, max_steps, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # [/shared]
        batches = [train.scored_batch(rows) for rows in sampler.micro_batches(step)]
        count = ctx.sum(sum((lengths > 0).sum() for _, lengths in batches) // 2)            # pairs on all ranks
        tokens += int(ctx.sum(sum(lengths.sum() for _, lengths in batches)))
        loss, metrics = torch.zeros((), device=ctx.device), {}
        for micro_step, batch in enumerate(batches):
            model.sync = micro_step == len(batches) - 1      # gradients travel once an update, with the last micro-batch
            with autocast():
                loss_sum, _, m = pair_loss(model, *(t.to(ctx.device) for t in batch), cfg.center)
            scaler.scale(loss_sum / count * ctx.world_size).backward()     # * world_size: DDP averages over ranks
            loss += loss_sum.detach()
            metrics = {k: metrics.get(k, 0) + v for k, v in m.items()}
        # [shared:update]
        model.wait()                                         # the averaged gradients are in place, on every rank the same
        scaler.unscale_(optimizer)                           # clip the true gradient, not the scaled one
        grad_norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip or float("inf"))
        if torch.isfinite(grad_norm):
            scaler.step(optimizer)
            skipped = 0
        else:                                                # an overflow (fp16) or a broken batch: leave the weights alone
            skipped += 1
            print(f"step {step}: the gradient is not finite, update skipped ({skipped} in a row)", flush=True)
            if skipped == 20:
                raise UserError("20 updates in a row had a non-finite gradient; lower --learning_rate or look at the data")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % cfg.log_every == 0 or step == max_steps:
            means = {f"train/{k}": float(ctx.sum(v) / count) for k, v in {"loss": loss, **metrics}.items()}
            log(step, {**means, "lr": lr, "grad_norm": float(grad_norm), "tokens": tokens, "tokens_per_s": log.tokens_per_s(tokens)})
        # [/shared]
    dist.finish(ctx)


STAGE = "rm"

if __name__ == "__main__":
    run(main, Config, __doc__)
