"""Reinforcement learning on written answers, as pure functions of tensors: KL, rewards, advantages, PPO's and GRPO's losses.

An action is a token. All tensors are (B, T) unless a docstring says otherwise: a row is a prompt and its answer, position t
the token that is predicted there, and mask (bool or 0/1) is 1 on the answer's tokens, its end token included, and 0 on the
prompt and behind the end. Losses return (sum, count, metrics) like those of losses.py: the script divides by the count
over all micro-batches and ranks.
"""
import torch

from nanollm.losses import IGNORE_INDEX


def token_logps(hidden, output, targets, temperature=1.0):
    """log p(target) of the policy that samples at this temperature, and that policy's entropy in nats: hidden (B, T, C), output
    layer, targets (B, T) -> two (B, T), zero where a target is IGNORE_INDEX; prompts and padding get no logits.

    Rollout, reference and every epoch must divide by the same temperature: else the ratio begins away from 1."""
    mask = targets != IGNORE_INDEX
    logps = torch.log_softmax(output(hidden[mask]).float() / temperature, -1)             # (N, V)
    chosen, entropy = logps.gather(1, targets[mask][:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)
    empty = torch.zeros(targets.shape, device=hidden.device)
    return empty.masked_scatter(mask, chosen), empty.masked_scatter(mask, entropy)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, unbiased=False):
    """(x - mean) / std with mean and variance over the mask; 0 elsewhere. unbiased: variance over n - 1, as trl has it."""
    n = mask.sum()
    centred = x - masked_mean(x, mask)
    var = masked_mean(centred**2, mask) * (n / (n - 1).clamp(min=1) if unbiased else 1)
    return centred * torch.rsqrt(var + 1e-8) * mask


# ---- the leash: estimators of KL(pi || ref) from tokens that pi has drawn (Schulman 2020, joschu.net/blog/kl-approx.html)

def kl_k1(logps, ref_logps):
    """log pi - log ref: unbiased, negative at times. Inside the reward its gradient is that of KL(pi || ref)."""
    return logps - ref_logps


def kl_k2(logps, ref_logps):
    """Half the square of the log-ratio: biased, never negative; for watching."""
    return (logps - ref_logps) ** 2 / 2


def kl_k3(logps, ref_logps):
    """ref/pi - 1 - log(ref/pi): unbiased, never negative. As a loss, its gradient is that of the *other* direction,
    E_pi[(1 - ref/pi) grad log pi], so GRPO's optimum differs from PPO's at the same coefficient (docs/ppo.md)."""
    k1 = logps - ref_logps
    return torch.exp(-k1) - 1 + k1


def adapt_kl(beta, kl, target, n, horizon=10_000):
    """The KL coefficient after n more sequences whose KL was `kl` nats each (Ziegler et al. 2019, section 2.2): 20 % of the way at most."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


# ---- PPO

def place_reward(reward, score, mask, past_end=False):
    """reward (B, T) with each row's score (B,) added at its last real token.

    past_end: one position later where there is room, as trl does; the value of a padding state leaks into the advantage then."""
    last = mask.size(1) - 1 - mask.flip(1).int().argmax(1)                                # (B,)
    last = (last + past_end).clamp(max=mask.size(1) - 1)
    return reward.scatter_add(1, last[:, None], score[:, None])


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), backwards from a terminal value of 0:
    delta_t = r_t + gamma v_{t+1} - v_t,  A_t = delta_t + gamma lam A_{t+1}.  -> advantages, returns A + v."""
    advantages, after, value_after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.size(1))):
        after = (rewards[:, t] + gamma * value_after - values[:, t] + gamma * lam * after) * mask[:, t]
        value_after = values[:, t] * mask[:, t]
        advantages[:, t] = after
    return advantages, (advantages + values) * mask


def clipped(logps, old_logps, advantages, mask, clip):
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) with ratio = pi / pi_old, for each token (B, T), and what to watch."""
    ratio = torch.exp((logps - old_logps) * mask)
    plain, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    metrics = {"clipfrac": ((held > plain) * mask).sum(), "approx_kl": (kl_k2(logps.detach(), old_logps) * mask).sum(),
               "ratio_min": ratio.detach().min(), "ratio_max": ratio.detach().max()}
    return torch.max(plain, held), metrics


def ppo_policy_loss(logps, old_logps, advantages, mask, clip=0.2):
    """Schulman et al. 2017, eq. 7, over tokens."""
    tokens, metrics = clipped(logps, old_logps, advantages, mask, clip)
    return (tokens * mask).sum(), mask.sum(), metrics


def ppo_value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error, the larger of plain and clipped: a critic may not run further than `clip` from the values of the
    rollout at once (Schulman's PPO code; Ziegler et al. 2019)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * (torch.max(plain, clipped) * mask).sum(), mask.sum(), {"value_clipfrac": ((clipped > plain) * mask).sum()}


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 = the critic knows the outcome, 0 = no better than a constant."""
    def var(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return 1 - var(returns - values) / var(returns).clamp(min=1e-8)


# ---- GRPO: no critic; an answer is compared with the others to the same prompt

def group_advantages(scores, group, scale="std", baseline="mean"):
    """scores (N * group,), each prompt's answers side by side -> advantages (N * group,) (Shao et al. 2024, section 4.1.2).

    scale "none" leaves the spread in (Dr. GRPO, Liu et al. 2025: dividing by it prefers prompts that are nearly solved or nearly
    hopeless). baseline "loo": the mean of the *others* (RLOO, Ahmadian et al. 2024); with the sample itself in the mean, the
    gradient is (group - 1) / group of that. A group of equal scores teaches nothing: all zero."""
    scores = scores.view(-1, group)
    advantages = scores - scores.mean(1, keepdim=True)
    if baseline == "loo":
        advantages = advantages * group / max(group - 1, 1)
    if scale == "std":
        advantages = advantages / (scores.std(1, keepdim=True, correction=int(group > 1)) + 1e-4)
    return advantages.flatten()


NORMALIZERS = ("grpo", "bnpo", "dr_grpo", "dapo")


def answer_count(mask, normalizer="dapo", max_tokens=1):
    """What a sum over the tokens of these answers is divided by:

    grpo      the answers, after each was divided by its own length: a token of a long answer counts less (Shao et al. 2024, eq. 3)
    dr_grpo   answers * max_tokens (the longest allowed): a constant, no bias by length (Liu et al. 2025)
    dapo      the tokens of the whole update (Yu et al. 2025): each counts the same; PPO's rule. bnpo: those of the micro-batch
    """
    answers = (mask.sum(1) > 0).sum()
    return {"grpo": answers, "dr_grpo": answers * max_tokens}.get(normalizer, mask.sum())


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip=0.2, beta=0.0, normalizer="dapo", max_tokens=1):
    """-min(ratio A, clip(ratio) A) + beta k3(pi, ref) per token (Shao et al. 2024, eq. 3). (sum, answer_count, metrics)."""
    tokens, metrics = clipped(logps, old_logps, advantages, mask, clip)
    if beta:
        tokens = tokens + beta * kl_k3(logps, ref_logps)
    tokens = tokens * mask
    if normalizer == "grpo":
        tokens = tokens / mask.sum(1, keepdim=True).clamp(min=1)
    return tokens.sum(), answer_count(mask, normalizer, max_tokens), metrics
