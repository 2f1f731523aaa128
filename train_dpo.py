"""DPO: raise the likelihood of chosen answers over rejected ones, on a leash to a frozen reference.

    python train_dpo.py --config configs/demo/dpo.toml
    python train_dpo.py --init_from out/sft --data pairs.jsonl --beta 0.1
    torchrun --standalone --nproc_per_node=4 train_dpo.py --gradient_accumulation_steps 4      four GPUs

Rafailov et al. 2023: the KL-regularised RL objective has a closed-form optimum, and putting it into the Bradley-Terry
model turns preference learning into classification: no reward model, no sampling. At step 0 the loss is ln 2.
"""
import copy
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist, evaluation, pairs, peft
from nanollm.config import UserError, arg, run
from nanollm.data import Ahead, PreferenceRows
from nanollm.log import Logger
from nanollm.losses import IGNORE_INDEX, KINDS, REFERENCE_FREE, dpo_loss, kto_loss
from nanollm.mixture import ByLength
from nanollm.model import parameter_count
from nanollm.optim import Guard, get_lr, make_optimizer, update
from nanollm.sampler import Sampler


@dataclass
class Config:
    data: list = arg(["out/demo/raw/prefs_train.jsonl"], "preference files: prompt (or conversations), chosen, rejected; for kto also completion, label")
    val_data: list = arg([], "held-out pairs; none = hold out --val_fraction of data")
    val_fraction: float = arg(0.05, "share of the pairs held out when there is no val_data")
    init_from: str = arg("out/demo/sft", "the SFT model: policy at the start, and reference")
    reference: str = arg("", "another model of the same shape as the reference; empty = init_from")
    out_dir: str = arg("out/dpo", "where checkpoints and metrics.jsonl go")
    resume: str = arg("", "auto: go on from the newest checkpoint in out_dir if there is one; or a checkpoint's path")
    override_schedule: bool = arg(False, "allow --resume with other max_steps or learning-rate options")
    max_seq_len: int = arg(0, "longest row; 0 = the model's context", unit="tokens")
    loss: str = arg("sigmoid", f"{', '.join(KINDS)} (formulas: docs/dpo.md)")
    beta: float = arg(0.1, "strength of the KL leash: larger keeps the policy nearer to the reference; 2 for simpo; orpo's lambda")
    label_smoothing: float = arg(0.0, "cdpo and robust: share of the labels that are taken to be wrong, below 0.5")
    simpo_gamma: float = arg(1.0, "simpo: by how much the chosen answer should lead")
    desirable_weight: float = arg(1.0, "kto: weight of the good answers' loss")
    undesirable_weight: float = arg(1.0, "kto: weight of the bad answers' loss")
    rpo_alpha: float = arg(0.0, "weight of the chosen answers' own cross-entropy (RPO): holds their probability up; orpo's is 1")
    dpop: float = arg(0.0, "DPO-Positive: how hard a fall of the chosen answer's probability is punished, 5 to 50")
    precompute_ref: bool = arg(False, "ask the reference once, before training, and keep its answers in --ref_cache: one model less in memory")
    ref_cache: str = arg("out/reference", "where --precompute_ref keeps files, named by a hash of weights, pairs and type: one serves all --beta and --loss")
    pair_curriculum: float = arg(0.0, "k: at time t (0..1) of the run a share k t of the pairs is from the hard half; 0 = all alike")
    # the run
    max_steps: int = arg(0, "length of the run and of the schedule; 0 = --epochs says it", unit="updates")
    epochs: float = arg(1.0, "passes over the data, unless --max_steps is given")
    batch_size: int = arg(16, "pairs per micro-batch and rank")
    gradient_accumulation_steps: int = arg(1, "micro-batches per update over all ranks together")
    optimizer: str = arg("adamw", "adamw, or muon for the blocks' matrices and adamw for the rest")
    learning_rate: float = arg(5e-5, "peak rate; far below SFT's, 5e-7 to 5e-6 for large models: the margin grows without limit")
    min_lr: float = arg(5e-6, "floor of the schedule")
    muon_lr: float = arg(0.005, "peak rate of the Muon group")
    warmup_steps: int = arg(10, "linear warmup from 0", unit="updates")
    schedule: str = arg("cosine", "cosine, wsd (hold, then decay), linear or constant")
    decay_factor: float = arg(1.0, "length of the decay as a factor of the run: 0.8 ends early at min_lr, 1.25 never gets there")
    weight_decay: float = arg(0.0, "on matrices and embeddings, never on norms")
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
    peft: str = arg("", f"train a small adapter beside frozen weights: {', '.join(peft.ANYWHERE)}; empty = train everything")
    lora_rank: int = arg(8, "r: each adapted matrix (out, in) gets r * (in + out) parameters")
    lora_alpha: float = arg(16.0, "the adapter is scaled by alpha / r (rslora: / sqrt(r))")
    lora_targets: list = arg(["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "which matrices")
    adapter_only: bool = arg(False, "checkpoints hold the adapter alone, and the path and hash of --init_from")
    merge_on_save: bool = arg(False, "also write OUT/merged: base and adapter as one plain model")
    sample_prompts: list = arg([], "questions to answer greedily at each evaluation; none = the first validation questions")


def preference_loss(model, reference, cfg, inputs, targets, prompts=None, ref_logps=None, desirable=None, nll_weight=0.0, share=0.5):
    """inputs, targets (2B, T): chosen rows first, then rejected, in one forward pass. (sum, count, metrics).

    prompts (B, P) or None: what both go on from, read once (pairs.py). reference: a frozen model, or None with LoRA, where the
    policy with its adapters switched off is the reference; not asked if its log-probabilities ref_logps (2B,) are known.
    nll_weight * (sum of -log pi over the chosen answers) is added: DPO sees only the difference of the two sides, and
    may lower both (RPO, Pang et al. 2024, eq. 2). KTO: desirable (B,), see kto_loss."""
    if ref_logps is None and cfg.loss not in REFERENCE_FREE:
        ref_logps = pairs.reference_logps(model, reference, inputs, targets, prompts)
    if cfg.loss == "kto":
        B = len(desirable)
        logps, counts = pairs.answer_logps(model, inputs[:B], targets[:B], prompts)
        with torch.no_grad():                                # answers to other questions measure the distance, and teach nothing
            others, _ = pairs.answer_logps(model, inputs[B:], targets[B:], prompts)
        return kto_loss(logps, others, ref_logps, counts, desirable, cfg.beta, (cfg.desirable_weight, cfg.undesirable_weight), share)
    logps, counts = pairs.answer_logps(model, inputs, targets, prompts)        # (2B,) sums over the answer's tokens
    loss, count, metrics = dpo_loss(logps, ref_logps, counts, cfg.beta, cfg.loss, cfg.label_smoothing, cfg.simpo_gamma, cfg.dpop)
    return loss - nll_weight * logps.chunk(2)[0].sum(), count, metrics


@torch.no_grad()
def validate(model, reference, val, ctx, autocast, cfg):
    """Loss, accuracy, margin and both log-probabilities on held-out pairs, batches spread over the ranks."""
    total, sums = torch.zeros(2, device=ctx.device), {}
    share = 0.5 if val.desirable is None else float(val.desirable.double().mean())
    batches = [range(i, min(i + cfg.batch_size, len(val))) for i in range(0, len(val), cfg.batch_size)]
    for batch in ctx.share(batches):
        with autocast():
            loss, count, metrics = preference_loss(model, reference, cfg, *ctx.to(val.batch(batch)), share=share)
        total += torch.stack([loss, count])
        sums = {k: sums.get(k, 0) + v for k, v in metrics.items()}
    (loss, count), means = ctx.sum(total).tolist(), {k: float(ctx.sum(v)) for k, v in sums.items()}
    nll = -means["chosen_logp"] / max(means["chosen_tokens"], 1)
    return {"val/loss": loss / count + nll_alpha(cfg) * nll} | {f"val/{k}": v / count for k, v in means.items()}


def nll_alpha(cfg):
    """ORPO is its odds ratio beside the chosen answers' cross-entropy; the other kinds add that only for --rpo_alpha."""
    return 1.0 if cfg.loss == "orpo" else cfg.rpo_alpha


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device, cfg.parallel, cfg.tp)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    pairs.check(cfg)
    raw, tokenizer, _ = checkpoint.load(cfg.init_from, ctx.device, expect="chat", plain=True, mapped=cfg.peft.startswith("qlora"))
    T = cfg.max_seq_len or raw.args.max_seq_len
    if T > raw.args.max_seq_len:
        raise UserError(f"--max_seq_len {T} is longer than the model's context of {raw.args.max_seq_len}")
    adapter = peft.read(cfg, peft.ANYWHERE)
    reference, before = raw, 0.0
    if cfg.reference:
        reference, its_tokenizer, _ = checkpoint.load(cfg.reference, ctx.device, expect="lm")
        if its_tokenizer.hash != tokenizer.hash or reference.args != raw.args:
            raise UserError(f"--reference {cfg.reference} has another tokenizer or shape than --init_from {cfg.init_from}; use a relative of it")
    share = cfg.share_prompt and cfg.loss != "kto" and pairs.can_share(raw, cfg)      # kto's second answer is not read with the first
    tight = pairs.takes_runs(raw)                            # padding costs nothing
    train, val = PreferenceRows.load(cfg, tokenizer, T, labelled=cfg.loss == "kto", cut_answers=True, share=share, tight=tight)
    if cfg.peft.startswith("qlora") and (cfg.precompute_ref or cfg.pair_curriculum):
        raise UserError("--peft qlora is compared with its own base in 4 bits, which is made later: leave out --precompute_ref and --pair_curriculum")
    if cfg.loss not in REFERENCE_FREE and (cfg.precompute_ref or cfg.pair_curriculum):
        for rows in (train, val):
            pairs.precompute(reference, rows, ctx, autocast, dtype, cfg.batch_size, cfg.ref_cache)
    if cfg.loss in REFERENCE_FREE or train.ref_logps is not None or cfg.peft and not cfg.reference:
        reference = None                                     # not asked; or, with adapters, the base that they stand beside
    elif reference is raw:
        reference = copy.deepcopy(raw).requires_grad_(False)
    if cfg.peft:                                             # on top of --init_from, whose own adapter is merged: the reference has it too
        peft.adapt(raw, cfg, *adapter).to(ctx.device)
    if cfg.loss in REFERENCE_FREE:                           # what the chosen answers' probability is compared with later
        before = validate(raw.to(ctx.device), None, val, ctx, autocast, cfg)["val/chosen_logp"]

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
    if cfg.pair_curriculum:
        total = sampler.total or max_steps * sampler.rows_per_step
        sampler.order = pairs.PairCurriculum(pairs.easiest_first(train), cfg.seed, total, cfg.pair_curriculum)
    sampler.order = ByLength(sampler, train.lengths(), cfg.seed)          # half of a batch of chance neighbours is padding
    model.eval()                                             # dropout off: noise in the margin, and policy != reference
    print(f"{parameter_count(raw)['total']:,} parameters, {sum(p.numel() for p in raw.parameters() if p.requires_grad):,} trained "
          f"| {dtype} on {ctx.device}, {ctx.world_size} rank(s)\n{len(train):,} pairs | {sampler.rows_per_step} pairs an update "
          f"| {max_steps} updates | {cfg.loss}" + (" | expected first loss ln 2 = 0.6931" if cfg.loss == "sigmoid" else "")
          + (" + rpo_alpha * NLL" if cfg.rpo_alpha else ""), flush=True)

    prompts = cfg.sample_prompts or val.questions[:3]

    def evaluate():
        metrics = validate(model, reference, val, ctx, autocast, cfg)
        start = before or metrics["val/chosen_logp"] - metrics["val/chosen_reward"] / cfg.beta       # log pi_ref(chosen)
        metrics["val/chosen_fall"] = (start - metrics["val/chosen_logp"]) / max(abs(start), 1e-9)
        if metrics["val/chosen_fall"] > 0.05:
            print(f"warning: the chosen answers' log-probability is {metrics['val/chosen_fall']:.0%} below the reference's: the loss sees only the "
                  f"distance to the rejected ones; add --rpo_alpha 0.2 or --dpop 5, or lower --learning_rate (docs/dpo.md)", flush=True)
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
        count = ctx.sum(sum((targets != IGNORE_INDEX).any(1).sum() for _, targets, *_ in batches) // 2)     # pairs on all ranks
        chosen_tokens = ctx.sum(sum((targets.chunk(2)[0] != IGNORE_INDEX).sum() for _, targets, *_ in batches))
        nll_weight = nll_alpha(cfg) * count / chosen_tokens.clamp(min=1)     # a mean over tokens beside DPO's mean over pairs
        desirable = ctx.sum(sum(batch[4].sum() for batch in batches)) / count if cfg.loss == "kto" else 0.5
        at.tokens += int(ctx.sum(sum((inputs != tokenizer.pad_id).sum() + pairs.spared(prompts) for inputs, _, prompts, *_ in batches)))
        loss, metrics = torch.zeros((), device=ctx.device), {}
        for micro_step, batch in enumerate(batches):
            model.sync = micro_step == len(batches) - 1      # gradients travel once an update, with the last micro-batch
            with autocast():
                loss_sum, _, m = preference_loss(model, reference, cfg, *ctx.to(batch), nll_weight=nll_weight, share=desirable)
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
    if cfg.merge_on_save and cfg.peft and ctx.main:
        merged, _, _ = checkpoint.load(cfg.out_dir)          # what has just been saved, whole and merged
        print("merged:", checkpoint.save(f"{cfg.out_dir}/merged", at.step, merged, tokenizer, STAGE, cfg))
    dist.finish(ctx)


STAGE = "dpo"

if __name__ == "__main__":
    run(main, Config, __doc__)
