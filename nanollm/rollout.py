"""What reinforcement learning reads: prompts, answers that the model writes to them, and what a reward model or a rule says of these.

Every random number of an answer is a function of (seed, number of the sample, place in the answer): neither ranks nor
batches nor a resume change what is drawn, and nothing about it needs saving.
"""
import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from nanollm import checkpoint, peft
from nanollm.config import UserError
from nanollm.data import collate, question_of, report_bad, split_rows, to_messages, to_preference
from nanollm.generate import write_batch
from nanollm.losses import IGNORE_INDEX
from nanollm.pairs import without_padding
from nanollm.rl import NORMALIZERS, answer_count, kl_k1, token_logps
from nanollm.sampler import permute, uniform
from nanollm.tokenizer import render
from nanollm.variants import build, mark_prefix


def to_prompt(row):
    """The messages up to the answer that is wanted, from a preference row, a chat row or one with a question only; what such a
    row holds as its last answer is left out. Raises ValueError(reason)."""
    if "chosen" in row and "rejected" in row:
        return to_preference(row)[0]
    messages = to_messages(row) if isinstance(row.get("conversation"), list) else question_of(row)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


class PromptRows:
    """Prompts as ids that end with the assistant's header, beside the rows they came from (a rule may want to look there)."""

    @classmethod
    def load(cls, cfg, tok, max_len):
        """(train, val) as a script's config names them."""
        return [cls(rows, tok, max_len, cfg.out_dir, cfg.max_bad) for rows in split_rows(cfg)]

    def __init__(self, rows, tok, max_len, out_dir=None, max_bad=0.1):
        """rows: [(where, row)] as read_rows returns them. A prompt longer than max_len tokens is left out and counted."""
        self.ids, self.rows, self.questions, bad, too_long = [], [], [], [], 0
        for where, row in rows:
            try:
                messages = to_prompt(row)
            except ValueError as e:
                bad.append((where, str(e), json.dumps(row, ensure_ascii=False, default=str)[:200]))
                continue
            ids = render(tok, messages, add_generation_prompt=True)[0]
            too_long += len(ids) > max_len
            if len(ids) <= max_len:
                self.ids.append(ids)
                self.rows.append(row)
                self.questions.append(messages[-1]["content"])
        if too_long:
            print(f"left out {too_long} of {len(rows)} prompts: longer than {max_len} tokens, what the context leaves beside --max_new_tokens", flush=True)
        report_bad(bad, len(rows), out_dir, max_bad)
        if not self.ids:
            raise UserError(f"no prompt fits into {max_len} tokens, what the context leaves beside --max_new_tokens; lower that, or raise --max_seq_len")

    def __len__(self):
        return len(self.ids)


def load_reward(spec, tok, max_seq_len, device, flag="--reward"):
    """What --reward (or another flag) names, as (score, model): score(rows, prompts, answers) -> one number an answer, in which rows
    are the data's, prompts and answers lists of ids. model: the RewardModel, or None for a rule.

    A directory is a reward model's checkpoint. FILE.py:NAME is a function NAME(row, text) -> number of that file, where text is the answer
    without its end token. Raises UserError for what is neither, another tokenizer, a shorter context, or a score that is no number.
    """
    path, is_rule, name = spec.rpartition(":")
    if spec.endswith(".py"):
        raise UserError(f"{flag} {spec}: name the function, too: {flag} {spec}:NAME")
    if not is_rule or not path.endswith(".py"):
        model, own, _ = checkpoint.load(spec, device, expect="reward")
        if own.hash != tok.hash:
            raise UserError(f"{flag} {spec}: this reward model has another tokenizer than the policy, so it would read other words; "
                            "train one from the policy's SFT model")
        if model.args.max_seq_len < max_seq_len:
            raise UserError(f"{flag} {spec} reads at most {model.args.max_seq_len} tokens; lower --max_seq_len {max_seq_len}")

        @torch.no_grad()
        def score(rows, prompts, answers):
            ids = collate([[(p + a, p + a)] for p, a in zip(prompts, answers)], tok.pad_id)[0].to(device)
            lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)], device=device)
            return model(ids).gather(1, lengths[:, None] - 1).squeeze(1).tolist()     # read at the last real token
        return score, model.requires_grad_(False)
    if not Path(path).exists():
        raise UserError(f"{flag} {spec}: there is no file {path}")
    module = importlib.util.module_from_spec(about := importlib.util.spec_from_file_location("reward_rule", path))
    try:
        about.loader.exec_module(module)
    except Exception as e:                                    # the user's file: anything may go wrong in it
        raise UserError(f"{flag} {spec}: {path} cannot be run: {type(e).__name__}: {e}") from None
    if not callable(rule := getattr(module, name, None)):
        raise UserError(f"{flag} {spec}: {path} defines no function {name}; write one: def {name}(row, text) -> number")

    def judge(rows, prompts, answers):
        numbers = []
        for row, answer in zip(rows, answers):
            text = tok.decode([t for t in answer if t not in tok.stop_ids])
            try:
                numbers.append(float(rule(row, text)))
            except Exception as e:
                raise UserError(f"{flag} {spec} failed on the answer {text!r}: {type(e).__name__}: {e}; it must return a number") from None
        return numbers
    return judge, None


def write_answers(model, prompts, samples, seed, max_new_tokens, temperature, tok):
    """Sample answers at this temperature from the whole vocabulary (no top_k, no top_p: what is scored must be what was
    drawn). prompts: lists of ids; samples: the number of each in the run. -> lists of ids, <|im_end|> included."""
    samples = torch.as_tensor(samples, dtype=torch.long)
    noise = torch.from_numpy(uniform(seed, (samples[:, None] * max_new_tokens + torch.arange(max_new_tokens)).numpy()))    # (B, R), float64

    def pick(logits, rows, answers):
        return draw(logits, temperature, noise[rows, len(answers[rows[0]])])
    return write_batch(model, prompts, max_new_tokens, tok.pad_id, tok.stop_ids, pick)


def draw(logits, temperature, u):
    """One token a row by inverting the distribution function at u. logits (B, V), u (B,) in [0, 1) -> (B,). In float64, so that
    no rounding can reach a token of probability 0; MPS has only float32."""
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cdf = (logits.float() / temperature).softmax(-1).to(exact).cumsum(-1)
    u = u.to(logits.device, exact)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=logits.size(1) - 1)


def batch_of(prompts, answers, pad_id):
    """inputs, targets (B, T), right-padded: targets only on the answers."""
    return collate([[((p + a)[:-1], [IGNORE_INDEX] * (len(p) - 1) + a)] for p, a in zip(prompts, answers)], pad_id)[:2]


def join(parts, fill):
    """[{name: tensor (B, …)}] -> {name: tensor}: rows below each other, second dimensions padded to the longest with fill[name]
    (0 unless named), in the order of parts["sample"]."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if tensors[0].dim() > 1:
            T = max(t.size(1) for t in tensors)
            tensors = [torch.nn.functional.pad(t, (0, T - t.size(1)), value=fill.get(name, 0)) for t in tensors]
        joined[name] = torch.cat(tensors)
    order = joined["sample"].argsort()
    return {name: t[order] for name, t in joined.items()}


def logps_of(model, inputs, targets, temperature):
    """log p of the answers' tokens and the entropy beside them, both (B, T)."""
    return model(inputs, mark_prefix(model, without_padding(model, targets), targets), head=lambda h, output: token_logps(h, output, targets, temperature))


@torch.no_grad()
def experience(actor, reference, critic, score, data, rows, samples, seed, cfg, tokenizer, ctx, autocast):
    """A rollout, on all ranks the same: {"sample", "inputs", "targets", "old", "ref", "values", "scores", "ended"}, (N,) or (N, T).

    rows: this rank's prompts in `data`; samples: their numbers in the run, which decide what is drawn. Old and reference
    log-probabilities and values come from full forward passes like those of the updates, not from the sampling cache: the
    ratio must begin at 1. Actor, reference and old policy are all taken at the same temperature."""
    prompts, parts, failed = [data.ids[r] for r in rows], [], ""
    answers = write_answers(actor, prompts, samples, seed, cfg.max_new_tokens, cfg.temperature, tokenizer)
    for i in range(0, len(rows), cfg.batch_size):
        some = slice(i, i + cfg.batch_size)
        try:
            scores = score([data.rows[r] for r in rows[some]], prompts[some], answers[some])
        except UserError as e:                               # on this rank only: all leave together, below
            failed = str(e)
            break
        inputs, targets = ctx.to(batch_of(prompts[some], answers[some], tokenizer.pad_id))
        with autocast():
            part = {"inputs": inputs, "targets": targets, "old": logps_of(actor, inputs, targets, cfg.temperature)[0]}
            with peft.disable_adapter(actor) if reference is None else nullcontext():
                part["ref"] = logps_of(reference or actor, inputs, targets, cfg.temperature)[0]
            if critic is not None:
                part["values"] = critic(inputs, without_padding(critic, targets))              # v_t: what the critic expects before token t + 1 is drawn
        ended = torch.tensor([answer[-1] == tokenizer.end_id for answer in answers[some]])
        parts.append({k: v.cpu() for k, v in part.items()} | {"sample": torch.as_tensor(samples[some]), "scores": torch.tensor(scores), "ended": ended})
    everywhere = ctx.gather((parts, failed))
    if failed := next((words for _, words in everywhere if words), ""):
        raise UserError(failed)
    batch = join([part for parts, _ in everywhere for part in parts], {"inputs": tokenizer.pad_id, "targets": IGNORE_INDEX})
    for i in (~torch.isfinite(batch["scores"])).nonzero()[:1, 0].tolist():
        text = tokenizer.decode(batch["inputs"][i].tolist())[:80]
        raise UserError(f"--reward {cfg.reward} gave {batch['scores'][i]} for {text!r}: a reward must be a finite number")
    return {k: v.to(ctx.device) for k, v in batch.items()}


def shape(batch, cfg, state):
    """Scores as the policy is to see them (N,), the log-ratio to the reference (N, T), and a rollout's metrics."""
    mask, raw = batch["targets"] != IGNORE_INDEX, batch["scores"]
    if not state["std"]:                                     # nothing is trained yet: these are the SFT model's
        state.update(mean=raw.mean().item(), std=raw.std(correction=0).item())
        if state["std"] < 1e-6:
            raise UserError(f"--normalize_scores: the first {len(raw)} answers all score {raw[0]:.4g}, no spread to divide by; give more --eval_prompts")
    scores = ((raw - state["mean"]) / state["std"]).clamp(-state["limit"], state["limit"]) - cfg.missing_eos_penalty * ~batch["ended"]
    kl = kl_k1(batch["old"], batch["ref"]) * mask
    per_answer = kl.sum(1).mean()
    metrics = {"scores": raw.mean(), "scores_std": raw.std(correction=0), "kl": per_answer, "rlhf_reward": scores.mean() - state["beta"] * per_answer,
               "length": mask.sum(1).float().mean(), "eos_rate": batch["ended"].float().mean()}
    return scores, kl, metrics


# ---- what the updates read, and what the log says of them

def minibatches(n, step, cfg):
    """Row numbers of a rollout for each inner update: the first pass in order, the others shuffled anew."""
    for epoch in range(cfg.ppo_epochs):
        order = permute(np.arange(n), n, (cfg.seed * 1_000_003 + step) * 1009 + epoch) if epoch else np.arange(n)
        yield from (torch.from_numpy(part) for part in np.array_split(order, min(cfg.minibatches, n)))


def backward(model, loss_of, batch, rows, cfg, ctx, scaler, autocast):
    """Gradients of one minibatch: this rank's share of its rows, --batch_size at a time. -> this rank's share of the loss, and sums."""
    normalizer = cfg.normalizer if cfg.algorithm == "grpo" else "dapo"
    count = answer_count(batch["targets"][rows] != IGNORE_INDEX, normalizer, cfg.max_new_tokens)        # of all ranks: each holds the whole rollout
    mine = rows[ctx.rank :: ctx.world_size]
    weight = float(len(mine) > 0)                            # a rank without a row takes part with somebody else's, times 0: all must
    parts = (mine if weight else rows[:1]).split(cfg.batch_size)          # make the same collectives in the same order
    n_parts, loss, sums = ctx.sum(weight * len(parts)), torch.zeros((), device=ctx.device), {}
    for i, part in enumerate(parts):
        model.sync = i == len(parts) - 1                     # gradients travel once an update, with the last micro-batch
        width = (batch["targets"][part] != IGNORE_INDEX).any(0).nonzero().max() + 1
        with autocast():
            loss_sum, own, metrics = loss_of(model, {k: v[part][:, :width] if v.dim() > 1 else v[part] for k, v in batch.items()}, cfg)
        share = weight * loss_sum / (own * n_parts if normalizer == "bnpo" else count)
        scaler.scale(share * ctx.world_size).backward()      # * world_size: DDP averages over ranks
        loss += share.detach()
        sums = fold(sums, {k: v if k[-3:] in ("min", "max") else weight * v for k, v in metrics.items()})
    return loss, sums


def share_of(sampler, step, copies):
    """(rows, samples): this rank's prompts of a rollout, each `copies` times, and the numbers of these answers in the run."""
    rows, samples = [], []
    for k, part in enumerate(sampler.micro_batches(step)):
        first = step * sampler.rows_per_step + (sampler.rank + k * sampler.world_size) * sampler.batch_size
        rows += [row for row in part for _ in range(copies)]
        samples += range(first * copies, (first + len(part)) * copies)
    return rows, samples


def fold(a, b):
    """Two dicts of metrics as one: the smaller of what ends in _min, the larger of _max, the sum of anything else."""
    how = {"min": torch.minimum, "max": torch.maximum}
    return a | {k: how.get(k[-3:], torch.add)(a[k], v) if k in a else v for k, v in b.items()}


def summary(sums, count, facts, ctx):
    """Metrics that need nothing but a sum over the ranks to be true of the whole iteration: each rank's sums over its tokens / count,
    and what all ranks know alike (facts, and the extremes) / the number of ranks."""
    extremes = {k: v for k, v in sums.items() if k[-3:] in ("min", "max")}
    for other in ctx.gather({k: v.cpu() for k, v in extremes.items()}):
        facts = fold(facts, other)
    return {k: v / count for k, v in sums.items() if k not in extremes} | {k: v.cpu() / ctx.world_size for k, v in facts.items()}


def texts(batch, n, tokenizer):
    """The first n answers of a rollout for the log: [{"prompt", "text"}], their scores behind them."""
    out = []
    for inputs, targets, score in zip(batch["inputs"][:n], batch["targets"][:n], batch["scores"].tolist()):
        mask = targets != IGNORE_INDEX
        prompt = tokenizer.decode(inputs[: mask.int().argmax() + 1].tolist())
        out.append({"prompt": prompt.removesuffix("assistant\n").strip(), "text": f"{tokenizer.decode(targets[mask].tolist())}  [{score:.2f}]"})
    return out


class State(dict):
    """Numbers that the run carries along: the KL coefficient, and mean and spread of the reward model's scores."""
    def state_dict(self):
        return dict(self)

    def load_state_dict(self, state):
        self.update(state)


def make_critic(cfg, lm, reward_model, tokenizer, ctx):
    """A body that has learnt to read, and a head of zeros: the first values are the mean of normalised scores."""
    if cfg.critic:
        body, own, _ = checkpoint.load(cfg.critic, ctx.device, plain=True)
        if own.hash != tokenizer.hash:
            raise UserError(f"--critic {cfg.critic} has another tokenizer than --init_from {cfg.init_from}")
    elif reward_model is not None and not peft.adapter_config(reward_model):
        body = reward_model
    else:                                                    # a rule, or a reward model with an adapter that cannot be merged
        body = lm
    critic, body = build(body.args, "reward").to(ctx.device), getattr(body, "backbone", body)
    critic.backbone.load_state_dict({k: v for k, v in body.state_dict().items() if k != "output.weight"})
    torch.nn.init.zeros_(critic.v_head.weight)
    return critic


def load_models(cfg, ctx):
    """Actor, frozen reference, critic (None for GRPO), score function, State, tokenizer and longest row, as a script's config names them.
    Raises UserError where they do not belong together."""
    for name, known in (("algorithm", ("ppo", "grpo")), ("normalizer", NORMALIZERS), ("scale", ("std", "none")), ("baseline", ("mean", "loo"))):
        if getattr(cfg, name) not in known:
            raise UserError(f"--{name} {getattr(cfg, name)} is unknown; use {', '.join(known)}")
    if cfg.algorithm == "grpo" and cfg.group < 2:
        raise UserError("--group 1: GRPO compares the answers to one prompt with each other; give it at least 2")
    if cfg.algorithm == "grpo" and cfg.target_kl:
        raise UserError("--target_kl adapts the beta of PPO's rewards; GRPO has its leash in the loss, at a constant --beta")
    actor, tok, _ = checkpoint.load(cfg.init_from, ctx.device, expect="chat", plain=True)
    T, context = cfg.max_seq_len or actor.args.max_seq_len, actor.args.max_seq_len
    if T > context or cfg.max_new_tokens >= T:
        raise UserError(f"--max_seq_len {T} with --max_new_tokens {cfg.max_new_tokens}: the model's context is {context}, and a prompt needs room, too")
    reference, own, _ = checkpoint.load(cfg.reference or cfg.init_from, ctx.device, expect="lm")
    if reference.args != actor.args or own.hash != tok.hash:
        raise UserError(f"--reference {cfg.reference} has another shape or tokenizer than --init_from {cfg.init_from}: it must be the model that "
                        "the actor came from")
    score, judge = load_reward(cfg.reward, tok, T, ctx.device)
    critic = make_critic(cfg, actor, judge, tok, ctx) if cfg.algorithm == "ppo" else None
    if critic is not None and critic.args.max_seq_len < T:
        raise UserError(f"--critic {cfg.critic} reads at most {critic.args.max_seq_len} tokens; lower --max_seq_len {T}")
    normalize = cfg.normalize_scores and judge is not None
    state = State(beta=cfg.beta, mean=0.0, std=0.0 if normalize else 1.0, limit=5.0 if normalize else float("inf"))
    return actor, reference.requires_grad_(False), critic, score, state, tok, T
