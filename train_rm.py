"""Reward model: one number for an answer, learned from pairs of a better and a worse one.

    python train_rm.py --config configs/demo/rm.toml
    python train_rm.py --init_from out/sft --data pairs.jsonl
    torchrun --standalone --nproc_per_node=4 train_rm.py --gradient_accumulation_steps 4      four GPUs

The SFT model's body with a head of one output; the score is read at the <|im_end|> that closes the answer.
A separate model: it is trained on fixed pairs here, and frozen when a policy is trained against it.
"""
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist, evaluation, pairs, peft
from nanollm.config import UserError, arg, run
from nanollm.data import Ahead, PreferenceRows
from nanollm.log import Logger
from nanollm.losses import divergence_loss, reward_loss
from nanollm.mixture import ByLength
from nanollm.model import parameter_count
from nanollm.optim import Guard, get_lr, make_optimizer, update
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
    loss: str = arg("bt_last", "bt_last: compare the scores at the end; divergence: at every token from the first different one on (the notes')")
    exact: bool = arg(False, "with divergence: as DeepSpeed-Chat has it, padding and identical pairs included")
    margin: float = arg(0.0, "how far apart two scores should be at least, for rows that bring no margin of their own")
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
    schedule: str = arg("cosine", "cosine, wsd (hold, then decay), linear or constant")
    decay_factor: float = arg(1.0, "length of the decay as a factor of the run: 0.8 ends early at min_lr, 1.25 never gets there")
    weight_decay: float = arg(0.1, "on matrices and embeddings, never on norms")
    grad_clip: float = arg(1.0, "largest L2 norm of the gradient; 0 = off")
    dtype: str = arg("auto", "auto: bf16 where native, else fp16 with GradScaler, else fp32")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    parallel: str = arg("ddp", "several ranks: ddp (each holds all), fsdp (each holds a part), none (refuse)")
    tp: int = arg(1, "tensor parallelism: so many ranks share each matrix", least=1)
    activation_checkpointing: bool = arg(False, "keep only the blocks' inputs and compute the rest again: less memory, a third more time")
    share_prompt: bool = arg(True, "read a prompt once for both answers where that is less work")
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
    # adapters (docs/peft.md)
    peft: str = arg("", f"train the head and a small adapter beside frozen weights: {', '.join(peft.ANYWHERE)}; empty = train everything")
    lora_rank: int = arg(8, "r: each adapted matrix (out, in) gets r * (in + out) parameters")
    lora_alpha: float = arg(16.0, "the adapter is scaled by alpha / r (rslora: / sqrt(r))")
    lora_targets: list = arg(["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "which matrices")
    adapter_only: bool = arg(False, "checkpoints hold the adapter alone, and the path and hash of --init_from")


def pair_loss(model, cfg, ids, lengths, prompts=None, margins=0.0):
    """Bradley-Terry over a batch of pairs: ids (2B, T), chosen first; lengths (2B,); margins (B,). (sum, count, metrics).
    prompts (B, P) or None: what both answers go on from, read once (pairs.py)."""
    return loss_of(cfg, pairs.scores(model, ids, prompts), ids, lengths, margins)


def loss_of(cfg, rewards, ids, lengths, margins):
    """The loss of rewards (2B, T), which --loss names."""
    if cfg.loss == "divergence":
        return divergence_loss(rewards, ids, lengths, cfg.exact)
    return reward_loss(rewards, lengths, cfg.center, margins)


@torch.no_grad()
def validate(model, val, ctx, autocast, cfg):
    """The training loss on held-out pairs, batches spread over the ranks, and what reward_report says of all their scores."""
    total, table = torch.zeros(2, device=ctx.device), torch.zeros(len(val), 4, dtype=torch.float64)
    batches = [range(i, min(i + cfg.batch_size, len(val))) for i in range(0, len(val), cfg.batch_size)]
    for batch in ctx.share(batches):
        ids, lengths, prompts, margins = ctx.to(val.scored_batch(batch, cfg.margin))
        with autocast():
            rewards = pairs.scores(model, ids, prompts)
            loss, count, _ = loss_of(cfg, rewards, ids, lengths, margins)
        total += torch.stack([loss, count])
        table[list(batch)] = evaluation.score_table(rewards, lengths)[: len(batch)]
    (loss, count), report = ctx.sum(total).tolist(), evaluation.reward_report(ctx.sum(table))      # each row was filled by one rank
    return {"val/loss": loss / count} | {f"val/{k}": v for k, v in report.items()}


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device, cfg.parallel, cfg.tp)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    lm, tokenizer, _ = checkpoint.load(cfg.init_from, expect="chat", plain=True)
    T = cfg.max_seq_len or lm.args.max_seq_len
    if T > lm.args.max_seq_len:
        raise UserError(f"--max_seq_len {T} is longer than the model's context of {lm.args.max_seq_len}")
    raw = build(lm.args, "reward").to(ctx.device)
    raw.backbone.load_state_dict({k: v for k, v in lm.state_dict().items() if k != "output.weight"})
    if cfg.loss not in ("bt_last", "divergence") or cfg.exact and cfg.loss != "divergence":
        raise UserError(f"--loss {cfg.loss}: use bt_last or divergence; --exact belongs to divergence")
    if cfg.loss == "divergence" and (cfg.center or cfg.margin):
        raise UserError("--loss divergence knows no --center and no --margin; use --loss bt_last")
    if adapter := peft.read(cfg, peft.ANYWHERE):
        peft.adapt(raw, cfg, *adapter, base=lm)
    share = cfg.share_prompt and pairs.can_share(raw, cfg)
    train, val = PreferenceRows.load(cfg, tokenizer, T, share=share)

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
    model.eval()                                             # dropout off: both answers are judged by the same network
    print(f"{parameter_count(raw)['total']:,} parameters, {sum(p.numel() for p in raw.parameters() if p.requires_grad):,} trained | {dtype} on "
          f"{ctx.device}, {ctx.world_size} rank(s)\n{len(train):,} pairs | {sampler.rows_per_step} pairs an update | {max_steps} updates", flush=True)

    def evaluate():
        metrics = validate(model, val, ctx, autocast, cfg)
        saver.scores = {"mean": metrics["val/score_mean"], "std": metrics["val/score_std"]}      # what a raw score is measured by
        return metrics

    fetch = Ahead(lambda step: [train.scored_batch(rows, cfg.margin) for rows in sampler.micro_batches(step)], ctx)

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
        count = ctx.sum(sum((lengths > 0).sum() for _, lengths, *_ in batches) // 2)        # pairs on all ranks
        at.tokens += int(ctx.sum(sum(lengths.sum() + pairs.spared(prompts) for _, lengths, prompts, _ in batches)))
        loss, metrics = torch.zeros((), device=ctx.device), {}
        for micro_step, batch in enumerate(batches):
            model.sync = micro_step == len(batches) - 1      # gradients travel once an update, with the last micro-batch
            with autocast():
                loss_sum, _, m = pair_loss(model, cfg, *ctx.to(batch))
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


STAGE = "rm"

if __name__ == "__main__":
    run(main, Config, __doc__)
