"""Classification: a label for a text, one for each word, or the place of an answer, by a head on a trained decoder.

    python train_classify.py --init_from out/pretrain --data reviews.jsonl           {"text", "label"}
    python train_classify.py --init_from out/pretrain --data entities.jsonl          {"tokens", "labels"}, as in CoNLL
    python train_classify.py --init_from out/pretrain --data squad.jsonl             {"context", "question", "answer"}
    torchrun --standalone --nproc_per_node=4 train_classify.py --gradient_accumulation_steps 4      four GPUs

The keys of the rows say which of the three it is. The body of a pretrained or fine-tuned model goes on learning under a fresh head
of one Linear. `prepare_data.py score --classifier` judges a corpus with the result (docs/classify.md).
"""
import copy
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist, peft
from nanollm.classify import LabelledRows, logits_of
from nanollm.config import UserError, arg, run
from nanollm.data import Ahead
from nanollm.heads import Classifier, asked, classification_loss, decide
from nanollm.log import Logger
from nanollm.mixture import ByLength
from nanollm.model import parameter_count
from nanollm.optim import Guard, get_lr, make_optimizer, update
from nanollm.sampler import Sampler


@dataclass
class Config:
    data: list = arg(["labelled.jsonl"], "rows of text and label, of tokens and labels, or of context, question and answer")
    val_data: list = arg([], "held-out rows; none = hold out --val_fraction of data")
    val_fraction: float = arg(0.1, "share of the rows held out when there is no val_data")
    init_from: str = arg("out/demo/pretrain", "the language model whose body reads the rows")
    out_dir: str = arg("out/classify", "where checkpoints and metrics.jsonl go")
    resume: str = arg("", "auto: go on from the newest checkpoint in out_dir if there is one; or a checkpoint's path")
    override_schedule: bool = arg(False, "allow --resume with other max_steps or learning-rate options")
    max_seq_len: int = arg(0, "longest row; 0 = the model's context", unit="tokens")
    freeze: bool = arg(False, "train the head alone: what do the hidden states know already?")
    variants: list = arg([], "prefix_lm: read each row in both directions")
    # the run
    max_steps: int = arg(0, "length of the run and of the schedule; 0 = --epochs says it", unit="updates")
    epochs: float = arg(3.0, "passes over the data, unless --max_steps is given")
    batch_size: int = arg(16, "rows per micro-batch and rank")
    gradient_accumulation_steps: int = arg(1, "micro-batches per update over all ranks together")
    optimizer: str = arg("adamw", "adamw, or muon for the blocks' matrices and adamw for the rest")
    learning_rate: float = arg(3e-4, "peak rate; about 2e-5 for large models, ten times as much with --freeze")
    min_lr: float = arg(3e-5, "floor of the schedule")
    muon_lr: float = arg(0.005, "peak rate of the Muon group")
    warmup_steps: int = arg(10, "linear warmup from 0", unit="updates")
    schedule: str = arg("cosine", "cosine, wsd (hold, then decay), linear or constant")
    decay_factor: float = arg(1.0, "length of the decay as a factor of the run: 0.8 ends early at min_lr, 1.25 never gets there")
    weight_decay: float = arg(0.01, "on matrices and embeddings, never on norms")
    grad_clip: float = arg(1.0, "largest L2 norm of the gradient; 0 = off")
    dtype: str = arg("auto", "auto: bf16 where native, else fp16 with GradScaler, else fp32")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    parallel: str = arg("ddp", "several ranks: ddp (each holds all), fsdp (each holds a part), none (refuse)")
    tp: int = arg(1, "tensor parallelism: so many ranks share each matrix", least=1)
    activation_checkpointing: bool = arg(False, "keep only the blocks' inputs and compute the rest again: less memory, a third more time")
    compile: bool = arg(False, "torch.compile; falls back with one line if there is no compiler")
    seed: int = arg(0, "data order, and the numbers that the head begins with")
    eval_every: int = arg(50, "validation", unit="updates", least=1)
    save_every: int = arg(500, "checkpoints", unit="updates", least=1)
    log_every: int = arg(10, "console and metrics.jsonl", unit="updates", least=1)
    keep: int = arg(2, "newest checkpoints to keep, beside the best; 0 = all")
    milestones: list = arg([], "updates whose checkpoints stay for good: 0 1 2 4 8 …")
    patience: int = arg(0, "stop after so many evaluations without a better val/loss; 0 = never")
    rollback: int = arg(0, "after 20 bad updates in a row go back so many and on at --rollback_lr; 0 = stop", unit="updates")
    rollback_lr: float = arg(0.1, "factor of the rate after a rollback, until it is as far behind")
    tensorboard: bool = arg(False, "also write OUT/tensorboard (extra: tensorboard)")
    max_bad: float = arg(0.1, "largest share of unusable rows before the run refuses to start")
    # adapters (docs/peft.md)
    peft: str = arg("", f"train the head and a small adapter beside frozen weights: {', '.join(peft.ANYWHERE)}; empty = train everything")
    lora_rank: int = arg(8, "r: each adapted matrix (out, in) gets r * (in + out) parameters")
    lora_alpha: float = arg(16.0, "the adapter is scaled by alpha / r (rslora: / sqrt(r))")
    lora_targets: list = arg(["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "which matrices")
    adapter_only: bool = arg(False, "checkpoints hold the adapter alone, and the path and hash of --init_from")


def label_loss(model, raw, inputs, targets, pad_id):
    """The loss where something is asked, and nothing elsewhere. (sum, count, metrics), and the logits (B, T, labels)."""
    logits = logits_of(model, inputs, pad_id)
    return *classification_loss(raw.task, logits, targets), logits


@torch.no_grad()
def validate(model, raw, val, ctx, autocast, cfg):
    """Loss and task metrics on the held-out rows, batches spread over the ranks."""
    total, decisions = torch.zeros(2, device=ctx.device), torch.zeros(int(val.ends[-1]), dtype=torch.long)
    batches = [range(i, min(i + cfg.batch_size, len(val))) for i in range(0, len(val), cfg.batch_size)]
    model.eval()
    for batch in ctx.share(batches):
        inputs, targets = ctx.to(val.batch(batch))
        with autocast():
            loss, count, _, logits = label_loss(model, raw, inputs, targets, val.tok.pad_id)
        total += torch.stack([loss, count])
        if len(batch):
            decisions[val.where(batch)] = decide(raw.task, logits, targets).flatten().cpu()
    model.train()
    (loss, count), decisions = ctx.sum(total).tolist(), ctx.sum(decisions)               # each place was filled by one rank
    return {"val/loss": loss / max(count, 1)} | {f"val/{k}": v for k, v in val.report(decisions).items()}


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device, cfg.parallel, cfg.tp)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    lm, tokenizer, _ = checkpoint.load(cfg.init_from, expect="lm", variants=cfg.variants, plain=True)
    T = cfg.max_seq_len or lm.args.max_seq_len
    if not 3 <= T <= lm.args.max_seq_len:
        raise UserError(f"--max_seq_len {T}: at least 3, for one token between two <|endoftext|>; at most the model's context of {lm.args.max_seq_len}")
    if cfg.freeze and cfg.peft:
        raise UserError(f"--freeze trains the head alone, --peft {cfg.peft} an adapter too: leave one of them out")
    train, val = LabelledRows.load(cfg, tokenizer, T)
    raw = Classifier(copy.deepcopy(lm), train.task, train.labels).to(ctx.device)
    raw.backbone.requires_grad_(not cfg.freeze)
    if adapter := peft.read(cfg, peft.ANYWHERE):
        peft.adapt(raw, cfg, *adapter, base=lm)              # by lm's weights the adapter knows its base

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
    sampler.order = ByLength(sampler, train.lengths(), cfg.seed)          # half of a batch of chance neighbours is padding
    print(f"{parameter_count(raw)['total']:,} parameters, {sum(p.numel() for p in raw.parameters() if p.requires_grad):,} trained "
          f"| {dtype} on {ctx.device}, {ctx.world_size} rank(s)\n{raw.task}: {len(train):,} rows, labels {' '.join(raw.labels[:20])} "
          f"| {sampler.rows_per_step} rows an update | {max_steps} updates", flush=True)
    evaluate = lambda: validate(model, raw, val, ctx, autocast, cfg)
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
        count = ctx.sum(sum(asked(raw.task, targets) for _, targets in batches))            # labels, or answers, on all ranks
        at.tokens += int(ctx.sum(sum((inputs != tokenizer.pad_id).sum() for inputs, _ in batches)))
        loss, metrics = torch.zeros((), device=ctx.device), {}
        for micro_step, batch in enumerate(batches):
            model.sync = micro_step == len(batches) - 1      # gradients travel once an update, with the last micro-batch
            with autocast():
                loss_sum, _, m, _ = label_loss(model, raw, *ctx.to(batch), tokenizer.pad_id)
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


STAGE = "classify"

if __name__ == "__main__":
    run(main, Config, __doc__)
