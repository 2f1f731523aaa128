"""PPO: the model writes answers, a reward model or a rule scores them, and what scored above expectation becomes likelier, on
a leash to a frozen reference. --algorithm grpo does without a critic: an answer's rivals to the same prompt are its expectation.

    python train_ppo.py --config configs/demo/ppo.toml
    python train_ppo.py --init_from out/sft --data prompts.jsonl --reward out/rm
    python train_ppo.py --init_from out/sft --data prompts.jsonl --reward rules.py:short --algorithm grpo --group 8
    torchrun --standalone --nproc_per_node=4 train_ppo.py --gradient_accumulation_steps 4      four GPUs

Schulman et al. 2017; for language models Ziegler et al. 2019, Ouyang et al. 2022. A step here is a whole iteration: one rollout
and --ppo_epochs passes over it. The four models: actor, reference, reward, critic (docs/ppo.md).
"""
from dataclasses import dataclass

import torch

from nanollm import checkpoint, dist, peft
from nanollm.config import UserError, arg, run
from nanollm.log import Logger
from nanollm.losses import IGNORE_INDEX
from nanollm.model import parameter_count
from nanollm.optim import Guard, get_lr, make_optimizer, update
from nanollm.pairs import without_padding
from nanollm.rl import (adapt_kl, explained_variance, gae, group_advantages, grpo_loss, masked_mean, masked_whiten, place_reward, ppo_policy_loss,
                        ppo_value_loss)
from nanollm.rollout import PromptRows, backward, experience, fold, load_models, logps_of, minibatches, shape, share_of, summary, texts
from nanollm.sampler import Sampler


@dataclass
class Config:
    data: list = arg(["out/demo/raw/prefs_train.jsonl"], "files with prompts: preference or chat rows, whose answers are not read, or questions alone")
    val_data: list = arg([], "held-out prompts; none = hold out --val_fraction of data")
    val_fraction: float = arg(0.05, "share of the prompts held out when there is no val_data")
    init_from: str = arg("out/demo/sft", "the SFT model: the actor at the start")
    reference: str = arg("", "the frozen model at the other end of the leash; empty = --init_from")
    reward: str = arg("out/demo/rm", "a reward model's checkpoint, or FILE.py:NAME with a function NAME(row, text) -> number")
    critic: str = arg("", "checkpoint that the critic starts from; empty = the reward model, or with a rule --init_from; its head begins at zero")
    out_dir: str = arg("out/ppo", "where checkpoints and metrics.jsonl go")
    resume: str = arg("", "auto: go on from the newest checkpoint in out_dir if there is one; or a checkpoint's path")
    override_schedule: bool = arg(False, "allow --resume with other max_steps or learning-rate options")
    max_seq_len: int = arg(0, "longest prompt and answer together; 0 = the model's context", unit="tokens")
    max_new_tokens: int = arg(64, "longest answer", unit="tokens", least=1)
    algorithm: str = arg("ppo", "ppo, or grpo: no critic, --group answers to each prompt compared with each other")
    temperature: float = arg(1.0, "of the rollouts, and of every log-probability", least=1e-3)
    beta: float = arg(0.05, "strength of the KL leash: k1 inside the reward (ppo), k3 in the loss (grpo)")
    target_kl: float = arg(0.0, "ppo: adapt beta towards this KL; a run at three times as much ends. 0 = beta stays", unit="nats an answer")
    kl_horizon: int = arg(10000, "ppo: how slowly beta adapts", unit="answers", least=1)
    missing_eos_penalty: float = arg(1.0, "taken off the score of an answer that did not end by itself")
    normalize_scores: bool = arg(True, "a reward model's scores as (s - mean) / std of the validation at rollout 0, within -5 … 5; give it 64 --eval_prompts")
    ppo_epochs: int = arg(2, "passes over each rollout", least=1)
    minibatches: int = arg(4, "parts of a pass, each followed by an update", least=1)
    clip: float = arg(0.2, "the probability ratio counts within 1 - clip … 1 + clip")
    value_clip: float = arg(0.2, "a value counts within so much of the rollout's")
    stop_kl: float = arg(0.25, "end the passes over a rollout once a minibatch's approx_kl is above this", unit="nats a token")
    entropy_coef: float = arg(0.0, "weight of the policy's entropy in the objective")
    gamma: float = arg(1.0, "discount of later rewards")
    lam: float = arg(0.95, "GAE: 1 = what really followed, 0 = what the critic expects to follow")
    group: int = arg(8, "grpo: answers to each prompt", least=1)
    normalizer: str = arg("dapo", "grpo: what the sum over tokens is divided by: grpo, bnpo, dr_grpo or dapo")
    scale: str = arg("std", "grpo: std divides advantages by the group's spread, none does not (Dr. GRPO)")
    baseline: str = arg("mean", "grpo: an answer is compared with the mean of its group, or with the mean of the others (loo)")
    # the run
    max_steps: int = arg(0, "length of the run and of the schedule; 0 = --epochs says it", unit="rollouts")
    epochs: float = arg(1.0, "passes over the prompts, unless --max_steps is given")
    batch_size: int = arg(16, "prompts per micro-batch and rank; a rank writes all its answers at once, the models then read so many at a time")
    gradient_accumulation_steps: int = arg(4, "micro-batches per rollout over all ranks together")
    optimizer: str = arg("adamw", "adamw, or muon for the blocks' matrices and adamw for the rest")
    learning_rate: float = arg(1e-5, "peak rate of the actor; 1e-6 for large models")
    min_lr: float = arg(1e-6, "floor of the schedule")
    critic_learning_rate: float = arg(5e-5, "the critic's rate after the warmup")
    muon_lr: float = arg(0.005, "peak rate of the Muon group")
    warmup_steps: int = arg(5, "linear warmup from 0", unit="rollouts")
    schedule: str = arg("constant", "cosine, wsd (hold, then decay), linear or constant")
    decay_factor: float = arg(1.0, "length of the decay as a factor of the run: 0.8 ends early at min_lr, 1.25 never gets there")
    weight_decay: float = arg(0.0, "on matrices and embeddings, never on norms")
    grad_clip: float = arg(1.0, "largest L2 norm of the gradient, actor and critic each; 0 = off")
    dtype: str = arg("auto", "auto: bf16 where native, else fp16 with GradScaler, else fp32")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")
    parallel: str = arg("ddp", "several ranks: ddp (each holds all), none (refuse)")
    tp: int = arg(1, "tensor parallelism: not in this script", least=1)
    activation_checkpointing: bool = arg(False, "keep only the blocks' inputs and compute the rest again: less memory, a third more time")
    compile: bool = arg(False, "torch.compile; falls back with one line if there is no compiler")
    seed: int = arg(0, "order of the prompts, and every sampled token")
    eval_every: int = arg(20, "validation", unit="rollouts", least=1)
    eval_prompts: int = arg(64, "validation: so many held-out prompts", least=1)
    save_every: int = arg(100, "checkpoints", unit="rollouts", least=1)
    log_every: int = arg(1, "console and metrics.jsonl, with two answers", unit="rollouts", least=1)
    keep: int = arg(2, "newest checkpoints to keep, beside the best; 0 = all")
    milestones: list = arg([], "rollouts whose checkpoints stay for good: 0 1 2 4 8 …")
    patience: int = arg(0, "stop after so many evaluations without a better val/loss; 0 = never")
    rollback: int = arg(0, "after 20 bad updates in a row go back so many and on at --rollback_lr; 0 = stop", unit="rollouts")
    rollback_lr: float = arg(0.1, "factor of the rate after a rollback, until it is as far behind")
    tensorboard: bool = arg(False, "also write OUT/tensorboard (extra: tensorboard)")
    max_bad: float = arg(0.1, "largest share of unusable rows before the run refuses to start")
    # adapters (docs/peft.md)
    peft: str = arg("", f"train a small adapter beside frozen weights: {', '.join(peft.ANYWHERE)}; empty = train everything")
    lora_rank: int = arg(8, "r: each adapted matrix (out, in) gets r * (in + out) parameters")
    lora_alpha: float = arg(16.0, "the adapter is scaled by alpha / r (rslora: / sqrt(r))")
    lora_targets: list = arg(["wq", "wk", "wv", "wo", "w1", "w2", "w3"], "which matrices")
    adapter_only: bool = arg(False, "checkpoints hold the adapter alone, and the path and hash of --init_from")


def advantages(batch, cfg, state):
    """What each token did better than expected: (batch with "advantages" and, for PPO, "returns"; metrics)."""
    scores, kl, metrics = shape(batch, cfg, state)
    mask = batch["targets"] != IGNORE_INDEX
    if cfg.algorithm == "grpo":
        better = group_advantages(scores, cfg.group, cfg.scale, cfg.baseline)[:, None] * mask
        return batch | {"advantages": better}, metrics | {"frac_zero_std": (scores.view(-1, cfg.group).std(1) == 0).float().mean()}
    rewards = place_reward(-state["beta"] * kl, scores, mask)             # the leash at each token, the score at the last
    better, returns = gae(rewards, batch["values"], mask, cfg.gamma, cfg.lam)
    metrics |= {"explained_variance": explained_variance(batch["values"], returns, mask), "beta": torch.tensor(state["beta"])}
    return batch | {"advantages": masked_whiten(better, mask), "returns": returns}, metrics


def policy_loss(model, batch, cfg):
    """(sum, count, metrics) of the actor on some rows of a rollout."""
    mask = batch["targets"] != IGNORE_INDEX
    logps, entropy = logps_of(model, batch["inputs"], batch["targets"], cfg.temperature)
    if cfg.algorithm == "grpo":
        loss, count, metrics = grpo_loss(logps, batch["old"], batch["ref"], batch["advantages"], mask, cfg.clip, cfg.beta, cfg.normalizer, cfg.max_new_tokens)
    else:
        loss, count, metrics = ppo_policy_loss(logps, batch["old"], batch["advantages"], mask, cfg.clip)
    return loss - cfg.entropy_coef * count * masked_mean(entropy, mask), count, metrics | {"entropy": entropy.detach().sum()}


def value_loss(model, batch, cfg):
    """The same of the critic."""
    mask = batch["targets"] != IGNORE_INDEX
    values = model(batch["inputs"], without_padding(model, batch["targets"]))
    loss, count, metrics = ppo_value_loss(values, batch["values"], batch["returns"], mask, cfg.value_clip)
    return loss, count, metrics | {"value_loss": loss.detach()}


def main(cfg):
    # [shared:setup]
    ctx = dist.init(cfg.device, cfg.parallel, cfg.tp)
    dtype = dist.choose_dtype(cfg.dtype, ctx.device)
    autocast = lambda: dist.autocast(ctx.device, dtype)
    torch.manual_seed(cfg.seed + ctx.rank)                   # ranks draw different dropout masks
    # [/shared]
    if ctx.sharded:
        raise UserError("train_ppo.py knows --parallel ddp only: answers are written with whole models")
    raw, reference, critic, score, state, tokenizer, T = load_models(cfg, ctx)             # raw: the actor
    if adapter := peft.read(cfg, peft.ANYWHERE):
        peft.adapt(raw, cfg, *adapter)
        reference = reference if cfg.reference else None     # the actor with its adapters switched off
    train, val = PromptRows.load(cfg, tokenizer, T - cfg.max_new_tokens)

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
    model.eval()                                             # dropout off everywhere: old and new policy must be one network
    also = {"state": state}
    if critic is not None:
        critic_model = dist.wrap(critic, ctx, cfg.compile, dtype).eval()
        critic.checkpointing = cfg.activation_checkpointing
        critic_optimizer = make_optimizer(critic, cfg.optimizer, cfg.critic_learning_rate, cfg.weight_decay, muon_lr=cfg.muon_lr)
        also |= {"critic": critic, "critic_optimizer": critic_optimizer}
    saver.include(**also)
    for group in [*optimizer.param_groups, *(critic_optimizer.param_groups if critic is not None else [])]:
        group["eps"], group["betas"] = 1e-5, (0.9, 0.999)    # tiny gradients must not make whole steps; noisy ones want a long memory
    tools, copies = (cfg, ctx, scaler, autocast), cfg.group if cfg.algorithm == "grpo" else 1
    print(f"{parameter_count(raw)['total']:,} parameters, {sum(p.numel() for p in raw.parameters() if p.requires_grad):,} trained | {cfg.algorithm} | "
          f"{dtype} on {ctx.device}, {ctx.world_size} rank(s)\n{len(train):,} prompts | {sampler.rows_per_step} prompts, {sampler.rows_per_step * copies} "
          f"answers a rollout | {max_steps} rollouts | expected first kl 0", flush=True)

    def roll_out(data, rows, samples, seed):
        return experience(raw, reference, critic, score, data, rows, samples, seed, cfg, tokenizer, ctx, autocast)

    def evaluate():
        rows = range(min(len(val), cfg.eval_prompts))[ctx.rank :: ctx.world_size]
        batch = roll_out(val, rows, rows, 2 * cfg.seed + 1)
        metrics = {f"val/{k}": v.item() for k, v in shape(batch, cfg, state)[2].items()}
        return {"val/loss": -metrics["val/rlhf_reward"], **metrics, "samples": texts(batch, 3, tokenizer)}

    def step_of(raw, model, optimizer, loss):
        """One update inside an iteration. Returns 0, or NaN if it was left out: then the iteration's last one is, too, and is counted."""
        model.wait()
        norm = update(raw, optimizer, scaler, cfg.grad_clip, ctx.sum(loss))
        model.zero_grad()
        return 0 * norm

    def improve(batch, step):
        """All updates of an iteration but the actor's last, whose gradient is left in place. Returns (mean loss, metrics)."""
        loss, sums, seen, plan = torch.zeros((), device=ctx.device), {}, 0, list(minibatches(len(batch["scores"]), step, cfg))
        for i, rows in enumerate(plan, 1):
            if critic is not None:
                part, m = backward(critic_model, value_loss, batch, rows, *tools)
                loss, sums = loss + step_of(critic, critic_model, critic_optimizer, part), fold(sums, m)
            part, m = backward(model, policy_loss, batch, rows, *tools)
            tokens = (batch["targets"][rows] != IGNORE_INDEX).sum()
            loss, sums, seen = loss + part, fold(sums, m), seen + tokens
            if i == len(plan) or ctx.sum(m["approx_kl"]) > cfg.stop_kl * tokens:          # the one that sees it is the last
                return loss / i, summary(sums, seen, {"updates": torch.tensor(float(i))}, ctx)
            loss = loss + step_of(raw, model, optimizer, part)

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
        for group in critic_optimizer.param_groups if critic is not None else []:
            group["lr"] = cfg.critic_learning_rate * min(1.0, (at.step + 1) / max(cfg.warmup_steps, 1)) * group["lr_scale"]
        batch, facts = advantages(roll_out(train, *share_of(sampler, at.step, copies), 2 * cfg.seed), cfg, state)
        at.tokens += int((batch["targets"] != IGNORE_INDEX).sum())
        loss, metrics = improve(batch, at.step)
        metrics, count = metrics | {k: v.cpu() / ctx.world_size for k, v in facts.items()}, 1          # all are shares of means
        if cfg.target_kl:
            state["beta"] = adapt_kl(state["beta"], float(facts["kl"]), cfg.target_kl, len(batch["scores"]), cfg.kl_horizon)
        if 0 < 3 * cfg.target_kl < facts["kl"]:
            log.event(at.step, f"the policy is {facts['kl']:.1f} nats an answer from the reference, more than 3 x --target_kl: the run ends")
            max_steps = at.step + 1
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
        if at.step % cfg.log_every == 0:
            log.samples(at.step, texts(batch, 2, tokenizer))
    dist.finish(ctx)


STAGE = "ppo"

if __name__ == "__main__":
    run(main, Config, __doc__)
