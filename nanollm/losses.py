"""Losses as pure functions of tensors. They never see a model, a file or a rank.

Each returns (sum, count, metrics): the script divides by the count summed over all micro-batches and ranks, which
is the only normalisation that does not change with the batch split. metrics are sums too, to be divided likewise.
Targets are already shifted by the loader (target t is the token after input t); IGNORE_INDEX marks no loss.
"""
import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def cross_entropy(logits, targets):
    """Next-token loss. logits (B, T, V), targets (B, T) -> (sum of -log p in nats, number of targets, {}).

    reduction="sum" gives a connected zero where a micro-batch has no target; "mean" would give NaN.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (targets != IGNORE_INDEX).sum(), {}


def sequence_logps(logits, targets):
    """Sum of log p(target) over each row's supervised positions. logits (B, T, V), targets (B, T) ->
    (logps (B,), counts (B,)). A sum, not a mean: the mean is a different objective (length-normalised DPO)."""
    mask = targets != IGNORE_INDEX
    logits = logits.float()
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)         # (B, T)
    logps = (chosen - logits.logsumexp(-1)) * mask
    return logps.sum(-1), mask.sum(-1)


def dpo_loss(logps, ref_logps, counts, beta):
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(beta * [(log pi/ref)(chosen) - (log pi/ref)(rejected)]).

    logps, ref_logps, counts (2B,): rows 0..B-1 chosen, B..2B-1 rejected. beta is the strength of the KL leash:
    a larger beta keeps the policy nearer to the reference. Starts at ln 2 when policy and reference are equal.
    A pair without answer tokens (the filler of a ragged last batch) counts as nothing.
    """
    valid = (counts > 0).view(2, -1).all(0)                                            # (B,)
    chosen, rejected = (beta * (logps - ref_logps)).chunk(2)                           # implicit rewards, eq. 5
    margin = chosen - rejected
    loss = -(F.logsigmoid(margin) * valid).sum()
    c_logp, r_logp = logps.detach().chunk(2)
    metrics = {"accuracy": ((margin > 0) & valid).sum(), "margin": (margin.detach() * valid).sum(),
               "chosen_reward": (chosen.detach() * valid).sum(), "rejected_reward": (rejected.detach() * valid).sum(),
               "chosen_logp": (c_logp * valid).sum(), "rejected_logp": (r_logp * valid).sum()}
    return loss, valid.sum(), metrics


def reward_loss(rewards, lengths, center=0.0):
    """Bradley-Terry on the score of each row's last real token: -log sigmoid(s_chosen - s_rejected), which is binary
    cross-entropy of "the chosen one wins" (Ouyang et al. 2022, eq. 1).

    rewards (2B, T) per position, lengths (2B,) true lengths, never read off the padding; rows 0..B-1 chosen.
    Only differences are determined; center > 0 adds center * (s_c + s_r)^2, which pins the free offset near zero
    (Eisenstein et al. 2023). A row of length 0 (filler) takes its pair out of the sum.
    """
    scores = rewards.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)         # (2B,)
    valid = (lengths > 0).view(2, -1).all(0)
    chosen, rejected = scores.chunk(2)
    loss = (valid * (center * (chosen + rejected) ** 2 - F.logsigmoid(chosen - rejected))).sum()
    c, r = chosen.detach(), rejected.detach()
    metrics = {"accuracy": ((c > r) & valid).sum(), "ties": ((c == r) & valid).sum(),
               "chosen_mean_scores": (c * valid).sum(), "rejected_mean_scores": (r * valid).sum(),
               "margin": ((c - r) * valid).sum()}
    return loss, valid.sum(), metrics
