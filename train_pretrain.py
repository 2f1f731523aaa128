"""Pretraining: predict the next token, over token files made by prepare_data.py.

    python train_pretrain.py --config configs/demo/pretrain.toml                 one process, CPU or one GPU
    torchrun --standalone --nproc_per_node=4 train_pretrain.py --gradient_accumulation_steps 4      four GPUs
    python train_pretrain.py --data out/mine/tokens --dim 512 --n_layers 8 --n_heads 8  another shape

Each update: gradient_accumulation_steps micro-batches of batch_size rows of max_seq_len tokens, over all ranks.
The blocks marked "shared" are the same in all four training scripts; a test keeps them so.
"""
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import checkpoint, curriculum, dist, distill, evaluation
from nanollm.config import UserError, arg, run
from nanollm.data import Ahead, Joined, TokenFile, tokenizer_of
from nanollm.log import Logger
from nanollm.losses import IGNORE_INDEX, linear_cross_entropy
from nanollm.mixture import read_phases, sources_of
from nanollm.model import ModelArgs, flops_per_token, parameter_count
from nanollm.optim import Guard, get_lr, make_optimizer, update
from nanollm.sampler import Sampler, permute
from nanollm.variants import add_balance, build


@dataclass
class Config:
    data: str = arg("out/demo/tokens", "directory of token files (prepare_data.py build)")
    rows: str = arg("stream", "stream: cut one long stream; documents: each row begins at a document's start")
    mix: list = arg([], "NAME:WEIGHT of several sources, directories below --data (or anywhere), by their share of the rows")
    phases: str = arg("", "a TOML file of mixtures that take turns during the run (docs/packing.md), instead of --mix")
    curriculum: str = arg("", "easy rows first: length, unigram, bigram, trigram, unigram_perplexity or model; a minus in front: hard first")
    competence: str = arg("sqrt", "how the share of rows in reach grows: sqrt or linear")
    competence_start: float = arg(0.1, "share of the rows in reach at the first update, the easiest; 1 = all")
    competence_end: float = arg(0.5, "share of the run after which all rows are in reach")
    curriculum_switch: int = arg(0, "from here on in the order of the model's own perplexity; 0 = never", unit="updates")
    init_from: str = arg("", "go on from these weights (continued pretraining); the shape comes from them, not from the options below")
    out_dir: str = arg("out/pretrain", "where checkpoints and metrics.jsonl go")
    resume: str = arg("", "auto: go on from the newest checkpoint in out_dir if there is one; or a checkpoint's path")
    override_schedule: bool = arg(False, "allow --resume with other max_steps or learning-rate options")
    # the model (ModelArgs)
    dim: int = arg(128, "width of the residual stream")
    n_layers: int = arg(4, "number of blocks")
    n_heads: int = arg(4, "query heads")
    n_kv_heads: int = arg(0, "key/value heads; 0 = n_heads, fewer = GQA")
    head_dim: int = arg(0, "width of a head; 0 = dim / n_heads")
    vocab_size: int = arg(0, "0 = the tokenizer's; larger pads the embedding")
    multiple_of: int = arg(32, "the FFN width is rounded up to a multiple of this")
    hidden_dim: int = arg(0, "FFN width; 0 = 2/3 * 4 * dim, rounded up")
    norm_eps: float = arg(1e-5, "epsilon inside RMSNorm")
    max_seq_len: int = arg(256, "context length", unit="tokens")
    rope_theta: float = arg(10000.0, "RoPE base; larger for longer contexts")
    dropout: float = arg(0.0, "0 for one pass over the data; 0.1 when epochs repeat")
    tie_embeddings: bool = arg(True, "one matrix for input and output; saves vocab_size * dim parameters")
    attention: str = arg("sdpa", "sdpa: PyTorch's kernel; naive: softmax(QK^T/sqrt(d))V spelled out")
    variants: list = arg([], "architecture options by name, as in docs/variants.md: qk_norm moe:n_experts=8,top_k=2")
    # the run
    max_steps: int = arg(0, "length of the run and of the schedule; 0 = --epochs says it", unit="updates")
    epochs: float = arg(1.0, "passes over the data, unless --max_steps is given")
    batch_size: int = arg(8, "rows per micro-batch and rank")
    gradient_accumulation_steps: int = arg(1, "micro-batches per update over all ranks together")
    optimizer: str = arg("adamw", "adamw, or muon for the blocks' matrices and adamw for the rest")
    learning_rate: float = arg(1e-3, "peak rate; 3e-4 from about 100 M parameters on")
    min_lr: float = arg(1e-4, "floor of the schedule, a tenth of the peak")
    muon_lr: float = arg(0.02, "peak rate of the Muon group")
    warmup_steps: int = arg(50, "linear warmup from 0; 5 % of the run", unit="updates")
    schedule: str = arg("cosine", "cosine, wsd (hold, then decay), linear or constant")
    decay_factor: float = arg(1.0, "length of the decay as a factor of the run: 0.8 ends early at min_lr, 1.25 never gets there")
    weight_decay: float = arg(0.1, "on matrices and embeddings, never on norms")
    grad_clip: float = arg(1.0, "largest L2 norm of the gradient; 0 = off")
    dtype: str = arg("auto", "auto: bf16 where native, else fp16 with GradScaler, else fp32")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    parallel: str = arg("ddp", "several ranks: ddp (each holds all), fsdp (each holds a part), none (refuse)")
    tp: int = arg(1, "tensor parallelism: so many ranks share each matrix", least=1)
    activation_checkpointing: bool = arg(False, "keep only the blocks' inputs and compute the rest again: less memory, a third more time")
    compile: bool = arg(False, "torch.compile; falls back with one line if there is no compiler")
    seed: int = arg(0, "initial weights and data order")
    eval_every: int = arg(100, "validation loss and greedy samples", unit="updates", least=1)
    eval_batches: int = arg(20, "validation batches; 0 = the whole split")
    save_every: int = arg(500, "checkpoints", unit="updates", least=1)
    log_every: int = arg(10, "console and metrics.jsonl", unit="updates", least=1)
    keep: int = arg(2, "newest checkpoints to keep, beside the best; 0 = all")
    milestones: list = arg([], "updates whose checkpoints stay for good: 0 1 2 4 8 …")
    patience: int = arg(0, "stop after so many evaluations without a better val/loss; 0 = never")
    rollback: int = arg(0, "after 20 bad updates in a row go back so many and on at --rollback_lr; 0 = stop", unit="updates")
    rollback_lr: float = arg(0.1, "factor of the rate after a rollback, until it is as far behind")
    tensorboard: bool = arg(False, "also write OUT/tensorboard (extra: tensorboard)")
    # distillation (docs/distillation.md)
    teacher: str = arg("", "a checkpoint of the same tokenizer: learn its whole distribution beside the text")
    kd_alpha: float = arg(0.5, "loss = alpha * cross-entropy + (1 - alpha) * T^2 * divergence from the teacher; 1 = no teacher")
    kd_temperature: float = arg(1.0, "T: both distributions are softmax(logits / T); above 1 the unlikely tokens count more")
    kd_kind: str = arg("forward", "forward: KL(teacher || student), reverse: KL(student || teacher), jsd: their middle")
    kd_cache: str = arg("", "a directory: ask the teacher once about each row and keep its --kd_top_k likeliest tokens there")
    kd_top_k: int = arg(32, "tokens a place that --kd_cache keeps, and the mass of all others; the vocabulary's size = exact", least=1)
    sample_prompts: list = arg([], "texts to complete greedily at each evaluation; none = openings of validation documents")


def pretrain_loss(model, inputs, targets, segments, teacher=None):
    """Cross-entropy of every next token, in nats: (sum, count, metrics). Untrained it is ln(vocab_size) a token."""
    head = teacher.head(inputs, targets, segments) if teacher else lambda h, output: linear_cross_entropy(h, output.weight, targets)
    loss = model(inputs, segments, head=head)
    return add_balance(model, *loss)                         # for a mixture of experts: that all are used


@torch.no_grad()
def validate(model, val, ctx, autocast, cfg):
    """Mean loss over the validation split, its batches spread over the ranks, and bits per UTF-8 byte of text,
    which, unlike loss per token, can be compared between tokenizers (with the end of each document counted; evaluate.py
    leaves it out)."""
    total = torch.zeros(2, device=ctx.device)
    order = permute(range(len(val)), len(val), key=0)        # the first --eval_batches must be a fair sample of the split
    batches = [order[i : i + cfg.batch_size] for i in range(0, len(val), cfg.batch_size)]
    model.eval()
    for batch in ctx.share(batches[: cfg.eval_batches or None]):
        inputs, targets, segments = ctx.to(val.batch(batch))
        with autocast():
            loss, count, _ = pretrain_loss(model, inputs, targets, segments)
        total += torch.stack([loss, count])
    model.train()
    loss, count = ctx.sum(total).tolist()
    bytes_per_token = val.meta["n_bytes"] / val.meta["n_tokens"]
    return {"val/loss": loss / count, "val/bits_per_byte": loss / count / math.log(2) / bytes_per_token}


def make_model(cfg, tokenizer):
    """A fresh Transformer from the flags, or the one in --init_from."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ModelArgs)}
    if cfg.init_from:
        raw, _, meta = checkpoint.load(cfg.init_from, expect="lm", variants=cfg.variants, plain=True)
        if meta["tokenizer_hash"] != tokenizer.hash:
            raise UserError(f"--init_from {cfg.init_from} was trained with another tokenizer than {cfg.data}; tokenize with the model's")
        for name, value in fields.items():
            if name != "variants" and value != getattr(Config(), name) and value != getattr(raw.args, name):
                raise UserError(f"--{name} {value}: the shape comes from --init_from, where it is {getattr(raw.args, name)}; leave it out")
        return raw
    if cfg.vocab_size and cfg.vocab_size < tokenizer.vocab_size:
        raise UserError(f"--vocab_size {cfg.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it out")
    try:
        return build(ModelArgs(**{**fields, "vocab_size": cfg.vocab_size or tokenizer.vocab_size}))
    except ValueError as e:
        raise UserError(str(e)) from None


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device, cfg.parallel, cfg.tp)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    phases = read_phases(cfg.mix, cfg.phases)
    cfg = dataclasses.replace(cfg, phases=json.dumps(phases) if cfg.phases else "")       # a checkpoint keeps what the file says
    if cfg.curriculum_switch and not cfg.curriculum or cfg.curriculum and phases:
        raise UserError("--curriculum_switch needs --curriculum, and --curriculum one data set, without --mix and --phases")
    tokenizer = tokenizer_of(cfg.data)
    raw = make_model(cfg, tokenizer).to(ctx.device)
    T = raw.args.max_seq_len
    folders = [below if (below := Path(cfg.data, name)).is_dir() else Path(name) for name in sources_of(phases)] or [cfg.data]
    train, val = (Joined([TokenFile(folder, split, T, cfg.rows, tokenizer.hash) for folder in folders]) for split in ("train", "val"))
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
    sampler.order = curriculum.sample_order(cfg, train, sampler, max_steps, phases, at.step)
    parts = ", ".join(f"{name} {n:,}" for name, n in parameter_count(raw).items())
    print(f"parameters: {parts}\n{flops_per_token(raw, T) / 1e6:.1f} MFLOP a token | {dtype} on {ctx.device}, "
          f"{ctx.world_size} rank(s)\n{len(train):,} rows of {T} | {'up to ' * (cfg.rows == 'documents')}{sampler.rows_per_step * T:,} tokens an update "
          f"| {max_steps} updates = {max_steps * sampler.rows_per_step / len(train):.2f} epochs "
          f"| expected first loss ln {raw.args.vocab_size} = {math.log(raw.args.vocab_size):.2f}", flush=True)

    if "prefix_lm" in raw.args.variants:
        print("note: plain text has no prompt and is trained causally; prefix_lm takes effect in train_sft.py", flush=True)
    prompts = cfg.sample_prompts or val.openings(tokenizer)

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
        if at.step and at.step == cfg.curriculum_switch:
            sampler.order.later = curriculum.reorder(raw, train.parts[0], ctx, autocast, cfg, at.step)
            fetch.futures.clear()                            # read ahead in the old order
        batches = fetch(at.step)
        count = ctx.sum(sum((targets != IGNORE_INDEX).sum() for _, targets, _ in batches))
        at.tokens += int(count)
        loss, metrics = torch.zeros((), device=ctx.device), {}
        for micro_step, batch in enumerate(batches):
            model.sync = micro_step == len(batches) - 1      # gradients travel once an update, with the last micro-batch
            with autocast():
                loss_sum, _, m = pretrain_loss(model, *ctx.to(batch), teacher)
            scaler.scale(loss_sum / count * ctx.world_size).backward()     # * world_size: DDP averages over ranks
            loss += loss_sum.detach()
            metrics = {k: metrics.get(k, 0) + v for k, v in m.items()}
        # [shared:update]
        model.wait()                                         # the averaged gradients are in place, on every rank the same
        loss = ctx.sum(loss)
        grad_norm = update(raw, optimizer, scaler, cfg.grad_clip, loss)        # unscale, clip, step; left out if not finite
        # [/shared]
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
    dist.finish(ctx)


STAGE = "pretrain"

if __name__ == "__main__":
    run(main, Config, __doc__)
