"""Supervised fine-tuning: from a text continuer to an assistant that answers and stops.

    python train_sft.py --config configs/demo/sft.toml
    python train_sft.py --init_from out/pretrain --data chats.jsonl --val_data chats_val.jsonl
    python train_sft.py --data ours.jsonl:0.8 general.jsonl:0.2 --inspect 2                   look at two rows, train nothing
    torchrun --standalone --nproc_per_node=4 train_sft.py --gradient_accumulation_steps 4      four GPUs

Rows: OpenAI messages, ShareGPT, Firefly, alpaca, prompt/completion, prompt/answer. The loss covers what the assistant
says and the <|im_end|> that closes it, nothing else, and is averaged over tokens, not over rows.
"""
import math
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist, distill, evaluation, peft
from nanollm.config import UserError, arg, run
from nanollm.data import Ahead, ChatRows
from nanollm.log import Logger
from nanollm.losses import IGNORE_INDEX, linear_cross_entropy
from nanollm.mixture import ByLength, Mixture
from nanollm.model import parameter_count
from nanollm.optim import Guard, get_lr, make_optimizer, update
from nanollm.sampler import Sampler
from nanollm.tokenizer import TEMPLATES
from nanollm.variants import add_balance, mark_prefix


@dataclass
class Config:
    data: list = arg(["out/demo/raw/chat_train.jsonl"], "chat files: .jsonl, .json, .parquet; FILE:WEIGHT for each mixes them by share of rows")
    val_data: list = arg([], "held-out chats; none = hold out --val_fraction of data")
    val_fraction: float = arg(0.05, "share of the rows held out when there is no val_data")
    init_from: str = arg("out/demo/pretrain", "the pretrained model; shape and tokenizer come from it")
    out_dir: str = arg("out/sft", "where checkpoints and metrics.jsonl go")
    resume: str = arg("", "auto: go on from the newest checkpoint in out_dir if there is one; or a checkpoint's path")
    override_schedule: bool = arg(False, "allow --resume with other max_steps or learning-rate options")
    max_seq_len: int = arg(0, "longest row; 0 = the model's context", unit="tokens")
    pack: bool = arg(True, "several short chats in one row, kept apart by a block-diagonal mask")
    truncate: str = arg("turn", "a chat that is too long: turn = loses late exchanges, then the start of its question; keep_start = its end, as trl")
    format: str = arg("", "chatml, bos (question <bos> answer <eos>) or raw (question answer <eos>); empty = the model's own, at first chatml")
    alpaca_prompt: bool = arg(False, "alpaca rows in the words of Stanford Alpaca's prompt")
    inspect: int = arg(0, "print so many rows token by token with id and mask, and stop")
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
    schedule: str = arg("cosine", "cosine, wsd (hold, then decay), linear or constant")
    decay_factor: float = arg(1.0, "length of the decay as a factor of the run: 0.8 ends early at min_lr, 1.25 never gets there")
    weight_decay: float = arg(0.0, "on matrices and embeddings, never on norms")
    grad_clip: float = arg(1.0, "largest L2 norm of the gradient; 0 = off")
    dtype: str = arg("auto", "auto: bf16 where native, else fp16 with GradScaler, else fp32")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    parallel: str = arg("ddp", "several ranks: ddp (each holds all), fsdp (each holds a part), none (refuse)")
    tp: int = arg(1, "tensor parallelism: so many ranks share each matrix", least=1)
    activation_checkpointing: bool = arg(False, "keep only the blocks' inputs and compute the rest again: less memory, a third more time")
    compile: bool = arg(False, "torch.compile; falls back with one line if there is no compiler")
    seed: int = arg(0, "data order")
    eval_every: int = arg(100, "validation", unit="updates", least=1)
    save_every: int = arg(500, "checkpoints", unit="updates", least=1)
    log_every: int = arg(10, "console and metrics.jsonl", unit="updates", least=1)
    keep: int = arg(2, "newest checkpoints to keep, beside the best; 0 = all")
    milestones: list = arg([], "updates whose checkpoints stay for good: 0 1 2 4 8 …")
    patience: int = arg(0, "stop after so many evaluations without a better val/loss; 0 = never")
    rollback: int = arg(0, "after 20 bad updates in a row go back so many and on at --rollback_lr; 0 = stop", unit="updates")
    rollback_lr: float = arg(0.1, "factor of the rate after a rollback, until it is as far behind")
    tensorboard: bool = arg(False, "also write OUT/tensorboard (extra: tensorboard)")
    max_bad: float = arg(0.1, "largest share of unusable rows before the run refuses to start")
    variants: list = arg([], "architecture options to put on the trained model: prefix_lm, sliding_window, rope_scaling (docs/variants.md)")
    # adapters (docs/peft.md)
    peft: str = arg("", f"train a small adapter beside frozen weights: {', '.join(peft.METHODS)}, options as in prefix:n=16; empty = train everything")
    lora_rank: int = arg(8, "r: each adapted matrix (out, in) gets r * (in + out) parameters")
    lora_alpha: float = arg(16.0, "the adapter is scaled by alpha / r (rslora: / sqrt(r))")
    lora_dropout: float = arg(0.0, "dropout on the adapter's input")
    lora_targets: list = arg(["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "which matrices")
    adapter_only: bool = arg(False, "checkpoints hold the adapter alone, and the path and hash of --init_from")
    merge_on_save: bool = arg(False, "also write OUT/merged: base and adapter as one plain model")
    # distillation (docs/distillation.md)
    teacher: str = arg("", "a checkpoint of the same tokenizer: learn its whole distribution beside the text")
    kd_alpha: float = arg(0.5, "loss = alpha * cross-entropy + (1 - alpha) * T^2 * divergence from the teacher; 1 = no teacher")
    kd_temperature: float = arg(1.0, "T: both distributions are softmax(logits / T); above 1 the unlikely tokens count more")
    kd_kind: str = arg("forward", "forward: KL(teacher || student), reverse: KL(student || teacher), jsd: their middle")
    kd_cache: str = arg("", "a directory: ask the teacher once about each row and keep its --kd_top_k likeliest tokens there")
    kd_top_k: int = arg(32, "tokens a place that --kd_cache keeps, and the mass of all others; the vocabulary's size = exact", least=1)
    sample_prompts: list = arg([], "questions to answer greedily at each evaluation; none = the first validation questions")


def sft_loss(model, inputs, targets, segments, teacher=None):
    """Cross-entropy on the assistant's tokens: the mask lives in targets, where all else is IGNORE_INDEX.
    (sum, count, metrics)."""
    head = teacher.head(inputs, targets, segments) if teacher else lambda h, output: linear_cross_entropy(h, output.weight, targets)
    segments = mark_prefix(model, segments, targets)         # for a prefix-LM: the prompt reads itself in both directions
    loss = peft.add_orthogonality(model, *model(inputs, segments, head=head))                # for AdaLoRA: that its vectors stay apart
    return add_balance(model, *loss)                         # for a mixture of experts: that all are used


@torch.no_grad()
def validate(model, val, ctx, autocast, cfg):
    """Mean loss over the supervised tokens of the held-out rows, batches spread over the ranks."""
    total = torch.zeros(2, device=ctx.device)
    batches = [range(i, min(i + cfg.batch_size, len(val))) for i in range(0, len(val), cfg.batch_size)]
    model.eval()
    for batch in ctx.share(batches):
        inputs, targets, segments = ctx.to(val.batch(batch))
        with autocast():
            loss, count, _ = sft_loss(model, inputs, targets, segments)
        total += torch.stack([loss, count])
    model.train()
    loss, count = ctx.sum(total).tolist()
    return {"val/loss": loss / max(count, 1), "val/perplexity": math.exp(min(loss / max(count, 1), 50))}


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device, cfg.parallel, cfg.tp)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    raw, tokenizer, _ = checkpoint.load(cfg.init_from, ctx.device, expect="lm", variants=cfg.variants, plain=True, mapped=cfg.peft.startswith("qlora"))
    if adapter := peft.read(cfg):
        if not checkpoint.knows_chat(raw, tokenizer):
            print(f"note: {cfg.init_from} has never seen the chat tokens, and adapters leave their embeddings as they are: it may never learn "
                  f"to stop. Train all weights first (no --peft), or use --format raw, whose end it knows", flush=True)
        peft.adapt(raw, cfg, *adapter).to(ctx.device)
        cfg.pack &= peft.base_args(raw) is raw.args          # virtual tokens stand in front of each chat: a row of its own
    T = cfg.max_seq_len or raw.args.max_seq_len
    if T > raw.args.max_seq_len:
        raise UserError(f"--max_seq_len {T} is longer than the model's context of {raw.args.max_seq_len}")
    if cfg.format not in ("", *TEMPLATES):
        raise UserError(f"--format {cfg.format} is unknown; use one of {', '.join(TEMPLATES)}")
    tokenizer.template = cfg.format or tokenizer.template    # saved with the model: chat, RM, DPO and export speak it from here on
    train, val = ChatRows.load(cfg, tokenizer, T)
    if cfg.inspect:
        train.inspect(tokenizer, cfg.inspect if ctx.main else 0)
        return dist.finish(ctx)
    teacher = distill.load_teacher(cfg, tokenizer, train, T, ctx, autocast)

    # [shared:engine]
    epochs = 0.0 if cfg.max_steps else cfg.epochs
    sampler = Sampler(len(train), ctx, cfg.batch_size, cfg.gradient_accumulation_steps, cfg.seed, epochs)
    max_steps = sampler.steps(cfg.max_steps)
    if cfg.warmup_steps >= max_steps:
        print(f"note: these {max_steps} updates end inside the warmup of {cfg.warmup_steps}; lower --warmup_steps", flush=True)
    get_lr(1, cfg.learning_rate, cfg.min_lr, cfg.warmup_steps, max_steps, cfg.schedule)      # a wrong schedule is refused now
    raw.checkpointing = cfg.activation_checkpointing
    model = dist.wrap(raw, ctx, cfg.compile, dtype)          # raw: the bare weights, what is optimised, saved and sampled; model: raw over all ranks
    optimizer = make_optimizer(raw, cfg.optimizer, cfg.learning_rate, cfg.weight_decay, muon_lr=cfg.muon_lr)
    scaler = torch.amp.GradScaler(ctx.device.type, enabled=dtype == torch.float16)
    saver = checkpoint.Saver(cfg, ctx, raw, optimizer, scaler, tokenizer, STAGE)
    at = saver.resume()                                      # where the run stands: at.step, at.tokens, …
    log = Logger(cfg.out_dir, ctx.main, at, max_steps, cfg.tensorboard)
    guard = Guard(ctx, log, sampler, cfg.log_every)
    # [/shared]
    if train.weights:
        sampler.order = Mixture(train.sizes, [(1.0, train.weights)], sampler.total or max_steps * sampler.rows_per_step, cfg.seed, block=256)
        print("\n".join(sampler.order.report(sampler.rows_per_step)), flush=True)
    if not cfg.pack:                                         # the rows of an update, the short ones in one micro-batch: less padding, the same update
        sampler.order = ByLength(sampler, train.lengths(), cfg.seed, window=1)
    print(f"{parameter_count(raw)['total']:,} parameters, {sum(p.numel() for p in raw.parameters() if p.requires_grad):,} trained "
          f"| {dtype} on {ctx.device}, {ctx.world_size} rank(s)\n{len(train.examples):,} chats in {len(train):,} rows, "
          f"{train.n_supervised:,} supervised tokens | {sampler.rows_per_step} rows an update | {max_steps} updates", flush=True)

    prompts = cfg.sample_prompts or val.questions[:3]

    def evaluate():
        metrics = validate(model, val, ctx, autocast, cfg)
        with autocast():                                     # under fsdp the blocks' weights are gathered in half precision
            return metrics | {"samples": evaluation.sample_prompts(raw, tokenizer, prompts, STAGE)}

    fetch = Ahead(lambda step: [train.batch(rows) for rows in sampler.micro_batches(step)], ctx)

    while True:
        # [shared:evaluate_and_save]
        last, stop = at.step >= max_steps, ctx.stop_requested()           # asked to stop: save without an evaluation out of turn
        if (at.step % cfg.eval_every == 0 or last) and at.evaluated != at.step:
            metrics = evaluate()
            log(at.step, metrics)
            at.judge(metrics["val/loss"], counts=at.step % cfg.eval_every == 0)
        if 0 < cfg.patience <= at.stale and not last:
            log.event(at.step, f"early stop: val/loss {at.best:.4g} has not been beaten in {at.stale} evaluations; it is kept as {cfg.out_dir}/best")
            stop = True
        if saver.due(at, last or stop):
            guard.read(at)
            at.seconds = log.seconds()
            saver.save(at)
        if last or stop:
            break
        # [/shared]
        # [shared:learning_rate]
        lr = get_lr(at.step - at.skipped + 1, cfg.learning_rate, cfg.min_lr, cfg.warmup_steps, round(cfg.decay_factor * max_steps), cfg.schedule)
        lr *= cfg.rollback_lr if at.step < at.slow_until else 1         # for a while after weights have been rolled back
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # [/shared]
        batches = fetch(at.step)
        # the one right normaliser: supervised tokens of all micro-batches of all ranks. A mean per micro-batch would
        # weigh a token in a short answer more than one in a long answer, differently for each way to split the batch.
        count = ctx.sum(sum((targets != IGNORE_INDEX).sum() for _, targets, _ in batches))
        at.tokens += int(ctx.sum(sum((inputs != tokenizer.pad_id).sum() for inputs, _, _ in batches)))
        loss, metrics = torch.zeros((), device=ctx.device), {}
        for micro_step, batch in enumerate(batches):
            model.sync = micro_step == len(batches) - 1      # gradients travel once an update, with the last micro-batch
            with autocast():
                loss_sum, _, m = sft_loss(model, *ctx.to(batch), teacher)
            scaler.scale(loss_sum / count * ctx.world_size).backward()     # * world_size: DDP averages over ranks
            loss += loss_sum.detach()
            metrics = {k: metrics.get(k, 0) + v for k, v in m.items()}
        # [shared:update]
        model.wait()                                         # the averaged gradients are in place, on every rank the same
        loss = ctx.sum(loss)
        grad_norm = update(raw, optimizer, scaler, cfg.grad_clip, loss)        # unscale, clip, step; left out if not finite
        # [/shared]
        if cfg.peft.startswith("adalora") and torch.isfinite(grad_norm):      # the gradients of this update are still there
            peft.reallocate(raw, at.step + 1, max_steps)
        # [shared:advance]
        model.zero_grad()
        at.step += 1
        log.live(at)
        if guard(at, grad_norm):
            at = saver.roll_back(at, log)                    # or give up with advice
            continue
        if at.step % cfg.log_every == 0 or at.step == max_steps:
            means = {f"train/{k}": float(v / count) for k, v in {"loss": loss, **{k: ctx.sum(v) for k, v in metrics.items()}}.items()}
            log(at.step, {**means, "lr": lr, "grad_norm": float(grad_norm), "tokens": at.tokens, "tokens_per_s": log.tokens_per_s(at.tokens)})
        # [/shared]
    if cfg.merge_on_save and cfg.peft and ctx.main:
        merged, _, _ = checkpoint.load(cfg.out_dir)          # what has just been saved, whole and merged
        print("merged:", checkpoint.save(f"{cfg.out_dir}/merged", at.step, merged, tokenizer, STAGE, cfg))
    dist.finish(ctx)


STAGE = "sft"

if __name__ == "__main__":
    run(main, Config, __doc__)
