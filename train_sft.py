"""Supervised fine-tuning: from a text continuer to an assistant that answers and stops.

    python train_sft.py --config configs/demo/sft.toml
    python train_sft.py --init_from out/pretrain --data chats.jsonl --val_data chats_val.jsonl
    torchrun --standalone --nproc_per_node=4 train_sft.py --gradient_accumulation_steps 4      four GPUs

Rows: OpenAI messages, ShareGPT, Firefly, alpaca, prompt/completion, prompt/answer. The loss covers what the assistant
says and the <|im_end|> that closes it, nothing else, and is averaged over tokens, not over rows.
"""
import math
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist, evaluation, peft
from nanollm.config import UserError, arg, run
from nanollm.data import ChatRows
from nanollm.log import Logger
from nanollm.losses import IGNORE_INDEX, cross_entropy
from nanollm.model import parameter_count
from nanollm.optim import get_lr, make_optimizer
from nanollm.sampler import Sampler


@dataclass
class Config:
    data: list = arg(["out/demo/raw/chat_train.jsonl"], "chat files: .jsonl, .json, .parquet")
    val_data: list = arg([], "held-out chats; none = hold out --val_fraction of data")
    val_fraction: float = arg(0.05, "share of the rows held out when there is no val_data")
    init_from: str = arg("out/demo/pretrain", "the pretrained model; shape and tokenizer come from it")
    out_dir: str = arg("out/sft", "where checkpoints and metrics.jsonl go")
    resume: str = arg("", "auto: go on from the newest checkpoint in out_dir if there is one; or a checkpoint's path")
    override_schedule: bool = arg(False, "allow --resume with other max_steps or learning-rate options")
    max_seq_len: int = arg(0, "longest row; 0 = the model's context", unit="tokens")
    pack: bool = arg(True, "several short chats in one row, kept apart by a block-diagonal mask")
    # the run
    max_steps: int = arg(0, "length of the run and of the schedule; 0 = --epochs says it", unit="updates")
    epochs: float = arg(2.0, "passes over the data, unless --max_steps is given")
    batch_size: int = arg(16, "rows per micro-batch and rank")
    gradient_accumulation_steps: int = arg(1, "micro-batches per update over all ranks together")
    optimizer: str = arg("adamw", "adamw, or muon for the blocks' matrices and adamw for the rest")
    learning_rate: float = arg(2e-4, "peak rate; about 2e-5 for full tuning of a large model, 2e-4 with LoRA")
    min_lr: float = arg(2e-5, "floor of the schedule")
    muon_lr: float = arg(0.005, "peak rate of the Muon group")
    warmup_steps: int = arg(20, "linear warmup from 0", unit="updates")
    schedule: str = arg("cosine", "cosine, wsd (hold, then decay) or constant")
    weight_decay: float = arg(0.0, "on matrices and embeddings, never on norms")
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
    # LoRA
    peft: str = arg("", "lora: train small adapters beside frozen weights; empty = train everything")
    lora_rank: int = arg(8, "r: each adapted matrix (out, in) gets r * (in + out) parameters")
    lora_alpha: float = arg(16.0, "the adapter is scaled by alpha / r")
    lora_dropout: float = arg(0.0, "dropout on the adapter's input")
    lora_targets: list = arg(["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "which matrices")
    merge_on_save: bool = arg(False, "also write OUT/merged: base and adapter as one plain model")
    sample_prompts: list = arg([], "questions to answer greedily at each evaluation; none = the first validation questions")


def sft_loss(model, inputs, targets, segments):
    """Cross-entropy on the assistant's tokens: the mask lives in targets, where all else is IGNORE_INDEX.
    (sum, count, metrics)."""
    return cross_entropy(model(inputs, segments), targets)


@torch.no_grad()
def validate(model, val, ctx, autocast, cfg):
    """Mean loss over the supervised tokens of the held-out rows, batches spread over the ranks."""
    total = torch.zeros(2, device=ctx.device)
    batches = [range(i, min(i + cfg.batch_size, len(val))) for i in range(0, len(val), cfg.batch_size)]
    model.eval()
    for batch in batches[ctx.rank :: ctx.world_size]:
        inputs, targets, segments = (t if t is None else t.to(ctx.device) for t in val.batch(batch))
        with autocast():
            loss, count, _ = sft_loss(model, inputs, targets, segments)
        total += torch.stack([loss, count])
    model.train()
    loss, count = ctx.sum(total).tolist()
    return {"val/loss": loss / max(count, 1), "val/perplexity": math.exp(min(loss / max(count, 1), 50))}


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    raw, tokenizer, _ = checkpoint.load(cfg.init_from, ctx.device, expect="lm")
    T = cfg.max_seq_len or raw.args.max_seq_len
    if T > raw.args.max_seq_len:
        raise UserError(f"--max_seq_len {T} is longer than the model's context of {raw.args.max_seq_len}")
    # [shared:adapter]
    if cfg.peft not in ("", "lora"):
        raise UserError(f"--peft {cfg.peft} is unknown; use lora, or leave it out to train all weights")
    # [/shared]
    if cfg.peft:
        peft.inject_lora(raw, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets)
    train, val = ChatRows.load(cfg, tokenizer, T)

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
    print(f"{parameter_count(raw)['total']:,} parameters, {sum(p.numel() for p in raw.parameters() if p.requires_grad):,} trained "
          f"| {dtype} on {ctx.device}, {ctx.world_size} rank(s)\n{len(train.examples):,} chats in {len(train):,} rows, "
          f"{train.n_supervised:,} supervised tokens | {sampler.rows_per_step} rows an update | {max_steps} updates", flush=True)

    prompts = cfg.sample_prompts or val.questions[:3]

    def evaluate():
        return validate(model, val, ctx, autocast, cfg) | {"samples": evaluation.sample_prompts(raw, tokenizer, prompts, STAGE)}

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
        batches = [train.batch(rows) for rows in sampler.micro_batches(step)]
        # the one right normaliser: supervised tokens of all micro-batches of all ranks. A mean per micro-batch would
        # weigh a token in a short answer more than one in a long answer, differently for each way to split the batch.
        count = ctx.sum(sum((targets != IGNORE_INDEX).sum() for _, targets, _ in batches))
        tokens += int(ctx.sum(sum((inputs != tokenizer.pad_id).sum() for inputs, _, _ in batches)))
        loss = torch.zeros((), device=ctx.device)
        for micro_step, batch in enumerate(batches):
            model.sync = micro_step == len(batches) - 1      # gradients travel once an update, with the last micro-batch
            with autocast():
                loss_sum, _, _ = sft_loss(model, *(t if t is None else t.to(ctx.device) for t in batch))
            scaler.scale(loss_sum / count * ctx.world_size).backward()     # * world_size: DDP averages over ranks
            loss += loss_sum.detach()
        metrics = {}                                         # the loss says it all; preference stages count more
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
    if cfg.merge_on_save and cfg.peft and ctx.main:
        peft.merge_lora(raw)
        print("merged:", checkpoint.save(f"{cfg.out_dir}/merged", step, raw, tokenizer, STAGE, cfg))
    dist.finish(ctx)


STAGE = "sft"

if __name__ == "__main__":
    run(main, Config, __doc__)
