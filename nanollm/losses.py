"""Losses as pure functions of tensors. They never see a model, a file or a rank.

Each returns (sum, count, metrics): the script divides by the count summed over all micro-batches and ranks, which
is the only normalisation that does not change with the batch split. metrics are sums too, to be divided likewise.
Targets are already shifted by the loader (target t is the token after input t); IGNORE_INDEX marks no loss.
"""
import torch
import torch.nn.functional as F

from nanollm.by_hand import ONEDNN

IGNORE_INDEX = -100


def cross_entropy(logits, targets):
    """Next-token loss. logits (B, T, V), targets (B, T) -> (sum of -log p in nats, number of targets, {}).

    reduction="sum" gives a connected zero where a micro-batch has no target; "mean" would give NaN.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (targets != IGNORE_INDEX).sum(), {}


class LinearCrossEntropy(torch.autograd.Function):
    """Output projection and cross-entropy in one, chunk by chunk of tokens: hidden (N, C), weight (V, C), targets (N,) -> sum.

    The logits (N, V) are the largest tensor of a small model, and the plain loss keeps them, their log-softmax and their
    gradient. Here each chunk's logits live only until its share of the gradients is added up, in the forward pass already:
    the result is one number, so what the backward pass brings is one factor. With p = softmax(logits) and y one-hot,
    d loss / d logits = p - y, d / d hidden = (p - y) weight, d / d weight = (p - y)^T hidden.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, wanted):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)    # sums, and all that waits for the backward pass, at least in fp32
        scale = min(32.0, 2**13 / min(chunk, len(targets) + 1)) if dtype == torch.float16 else 1.0      # fp16 ends at 6e-8: lift small p - y
        fast = ONEDNN and kind == "cpu" and dtype == torch.float32         # MKL is slow at this shape (docs/speed.md)
        w = weight.to(dtype)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        d_hidden = torch.empty_like(hidden, dtype=exact) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        for i in range(0, len(targets), chunk):
            h, t = hidden[i : i + chunk].to(dtype), targets[i : i + chunk]
            logits = logp = d = None                         # let go of the last chunk's first, or two would be held at once
            logits = ONEDNN(h, w, None, "none", [], "") if fast else h @ w.T               # (chunk, V), the one large tensor
            logp = logits.to(exact)
            logp = torch.log_softmax(logp, -1, out=logp)                                   # in its place
            loss += F.nll_loss(logp, t, ignore_index=IGNORE_INDEX, reduction="sum")
            if not any(wanted):
                continue
            counts = (t != IGNORE_INDEX).unsqueeze(-1)                                     # (chunk, 1)
            d = logp.exp_().scatter_add_(1, t.clamp(min=0).unsqueeze(-1), -torch.ones_like(logp[:, :1]))       # p - y
            if dtype != exact:
                d = d.mul_(scale).to(dtype)
            if wanted[0]:
                d_hidden[i : i + chunk] = (d @ w).to(exact) * counts / scale
            if wanted[1] and dtype == exact:
                d_weight.addmm_(d.T, h * counts)             # adds up inside the product: one walk through memory less
            elif wanted[1]:                                  # h / 64: in fp16 the sum over a chunk would overflow, and no loss scale helps here
                d_weight.add_(d.T @ (h * counts / 64), alpha=64 / scale)
        ctx.kept = d_hidden, d_weight, hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor):
        d_hidden, d_weight, *dtypes = ctx.kept               # scaled in place, so this runs once
        ctx.kept = None
        d_hidden, d_weight = (d if d is None else d.mul_(factor).to(dtype) for d, dtype in zip((d_hidden, d_weight), dtypes))
        return d_hidden, d_weight, None, None, None


@torch.compiler.disable                                      # matrix products and one softmax: nothing to fuse
def linear_cross_entropy(hidden, weight, targets, chunk=0):
    """cross_entropy(hidden @ weight.T, targets) and its gradients, without ever holding more than `chunk` rows of logits
    (0: as many as fit into 64 MB of fp32 on the CPU; 4,096 on a GPU, which small products and many launches would leave idle).

    hidden (B, T, C), weight (V, C), targets (B, T) -> (sum of -log p in nats, number of targets, {}). Under autocast the
    products run in its type. Without gradients (torch.no_grad, a frozen weight) their work is left out. The backward pass
    may run once.
    """
    chunk = chunk or (2**24 // len(weight) + 1 if hidden.device.type == "cpu" else 4096)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()                              # (N, C), (N,)
    if hidden.device.type == "cpu":                          # prompts and padding need no logits; a GPU would have to wait for their number
        hidden, targets = hidden[targets != IGNORE_INDEX], targets[targets != IGNORE_INDEX]
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    loss = LinearCrossEntropy.apply(hidden, weight, targets, chunk, wanted)
    return loss, (targets != IGNORE_INDEX).sum(), {}


def sequence_logps(logits, targets):
    """Sum of log p(target) over each row's supervised positions. logits (B, T, V), targets (B, T) ->
    (logps (B,), counts (B,)). A sum, not a mean: the mean is a different objective (length-normalised DPO)."""
    mask = targets != IGNORE_INDEX
    logits = logits.float()
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)         # (B, T)
    logps = (chosen - logits.logsumexp(-1)) * mask
    return logps.sum(-1), mask.sum(-1)


def linear_sequence_logps(hidden, output, targets):
    """sequence_logps(output(hidden), targets) of hidden states (B, T, C) and an output layer: prompts and padding get no logits,
    the largest tensors of a preference loss. (A GPU waits once for the number of the others.)"""
    mask = targets != IGNORE_INDEX
    logps = -F.cross_entropy(output(hidden[mask]).float(), targets[mask], reduction="none")       # (N,)
    return logps.new_zeros(len(targets)).index_add(0, mask.nonzero()[:, 0], logps), mask.sum(-1)


KINDS = ("sigmoid", "cdpo", "robust", "ipo", "hinge", "sigmoid_norm", "simpo", "orpo", "kto")
REFERENCE_FREE = ("simpo", "orpo")


def dpo_loss(logps, ref_logps, counts, beta, kind="sigmoid", eps=0.0, gamma=0.0, dpop=0.0):
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(beta * [(log pi/ref)(chosen) - (log pi/ref)(rejected)]), and its relatives.

    logps, ref_logps, counts (2B,): rows 0..B-1 chosen, B..2B-1 rejected; ref_logps may be None for simpo and orpo. With
    z = beta * (chosen - rejected) log-ratio:
        sigmoid       -log s(z)                                          ln 2 when policy and reference are equal
        cdpo          -(1 - eps) log s(z) - eps log s(-z)                labels wrong with probability eps (Mitchell 2023)
        robust        [-(1 - eps) log s(z) + eps log s(-z)] / (1 - 2 eps)         the same without bias (Chowdhury et al. 2024, eq. 12)
        hinge         max(0, 1 - z)                                      SLiC (Zhao et al. 2023, eq. 2)
        ipo           (z / beta - 1 / (2 beta))^2 per token              (Azar et al. 2023, eq. 17)
        sigmoid_norm  -log s(z) per token
        simpo         -log s(z - gamma) per token, no reference          (Meng et al. 2024, eq. 6)
        orpo          -beta log s(log odds ratio), no reference; its chosen cross-entropy is the script's (Hong et al. 2024, eq. 7)
    dpop > 0 takes beta * dpop * max(0, log ref/pi (chosen)) off z: no credit for a chosen answer that falls (Pal et al. 2024, eq. 3).
    A pair without answer tokens (the filler of a ragged last batch) counts as nothing. Raises ValueError for an unknown kind.
    """
    valid = (counts > 0).view(2, -1).all(0)                                            # (B,)
    n = counts.clamp(min=1)
    ratio = logps / n if kind in REFERENCE_FREE else logps - ref_logps                 # (2B,)
    reward_c, reward_r = (beta * ratio).chunk(2)                                       # implicit rewards, eq. 5
    c, r = (ratio / n if kind in ("ipo", "sigmoid_norm") else ratio).chunk(2)
    z = beta * (c - r) - beta * dpop * F.relu(-c)
    if kind in ("sigmoid", "cdpo", "sigmoid_norm"):
        losses = -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)
    elif kind == "robust":
        losses = (eps * F.logsigmoid(-z) - (1 - eps) * F.logsigmoid(z)) / (1 - 2 * eps)
    elif kind == "hinge":
        losses = F.relu(1 - z)
    elif kind == "ipo":
        losses = (c - r - 1 / (2 * beta)) ** 2
    elif kind == "simpo":
        losses = -F.logsigmoid(z - gamma)
    elif kind == "orpo":                                     # odds p / (1 - p) of p = exp(mean log-probability)
        c_odds, r_odds = (a - torch.log(-torch.expm1(a.clamp(max=-1e-6))) for a in (c, r))
        losses = -beta * F.logsigmoid(c_odds - r_odds)
    else:
        raise ValueError(f"unknown kind of preference loss {kind!r}")
    c, r = reward_c.detach(), reward_r.detach()
    metrics = {"accuracy": c > r, "margin": c - r, "chosen_reward": c, "rejected_reward": r}
    for name, values in (("logp", logps.detach()), ("logp_per_token", logps.detach() / n), ("tokens", counts)):
        metrics[f"chosen_{name}"], metrics[f"rejected_{name}"] = values.chunk(2)
    return (losses * valid).sum(), valid.sum(), {k: (v * valid).sum() for k, v in metrics.items()}


def kto_loss(logps, other_logps, ref_logps, counts, desirable, beta, weights=(1.0, 1.0), share=0.5):
    """KTO (Ethayarajh et al. 2024, eq. 8): single answers, each labelled good or bad; what counts is whether its reward
    beta * log pi/ref lies above the usual one, beta * z:
        desirable w_d (1 - s(reward - beta z))         undesirable w_u (1 - s(beta z - reward))

    logps, desirable (B,): the answers. other_logps (B,): answers that belong to other prompts, behind the same prompts; z =
    max(0, their mean log pi/ref), an estimate of KL(pi, ref), gets no gradient. ref_logps (2B,): the reference on both.
    counts (B,): tokens of the answers. share: of desirable rows among all of the update, so that the metrics chosen_* and
    rejected_*, divided by the number of rows like everything else, are means over their own side.
    """
    valid, n, B = counts > 0, counts.clamp(min=1), len(logps)
    z = ((other_logps - ref_logps[B:]) * valid).sum() / valid.sum().clamp(min=1)
    z = z.detach().clamp(min=0)
    ratio = logps - ref_logps[:B]
    side = torch.where(desirable, 1.0, -1.0)
    losses = torch.where(desirable, *weights) * (1 - torch.sigmoid(side * beta * (ratio - z)))
    reward = beta * ratio.detach()
    metrics = {"accuracy": side * (ratio.detach() - z) > 0, "kl": z.expand(B)}
    for name, values in (("reward", reward), ("logp", logps.detach()), ("logp_per_token", logps.detach() / n), ("tokens", counts)):
        metrics |= {f"chosen_{name}": values * desirable / max(share, 1e-9), f"rejected_{name}": values * ~desirable / max(1 - share, 1e-9)}
    metrics["margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
    return (losses * valid).sum(), valid.sum(), {k: (v * valid).sum() for k, v in metrics.items()}


def score_metrics(scores, valid):
    """Sums over pairs of what a reward model's scores (2B,), chosen first, say. Accuracy is strict: a tie is a miss."""
    c, r = scores.detach().chunk(2)
    metrics = {"accuracy": c > r, "ties": c == r, "chosen_mean_scores": c, "rejected_mean_scores": r, "margin": c - r}
    return {k: (v * valid).sum() for k, v in metrics.items()}


def last_scores(rewards, lengths):
    """rewards (N, T) per position, true lengths (N,) -> (N,), the score of each row's last real token."""
    return rewards.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)


def reward_loss(rewards, lengths, center=0.0, margin=0.0):
    """Bradley-Terry on the score of each row's last real token: -log sigmoid(s_chosen - s_rejected - margin), which with
    margin 0 is binary cross-entropy of "the chosen one wins" (Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, eq. 2).

    rewards (2B, T) per position, lengths (2B,) true lengths, never read off the padding; rows 0..B-1 chosen. margin: a number
    or (B,), how far apart the two should be at least. Only differences are determined; center > 0 adds center * (s_c + s_r)^2,
    which pins the free offset near zero (Eisenstein et al. 2023). A row of length 0 (filler) takes its pair out of the sum.
    """
    scores = last_scores(rewards, lengths)                                             # (2B,)
    valid = (lengths > 0).view(2, -1).all(0)
    chosen, rejected = scores.chunk(2)
    loss = (valid * (center * (chosen + rejected) ** 2 - F.logsigmoid(chosen - rejected - margin))).sum()
    return loss, valid.sum(), score_metrics(scores, valid)


def divergence_loss(rewards, ids, lengths, exact=False):
    """DeepSpeed-Chat's loss, the one of the notes: -log sigmoid(r_chosen,t - r_rejected,t), averaged over the positions t from
    the first at which the two rows differ to the end of the longer one; then summed over pairs.

    rewards, ids (2B, T), lengths (2B,), chosen first. exact=True is the original to the letter: where one answer has ended, the
    rewards of its padding are compared and trained; identical pairs cost ln 2 each. Without it an answer that has ended keeps
    its last score, and identical pairs, which have nothing to teach, count as nothing. Metrics: of the last scores.
    """
    T, (c_len, r_len), (c_ids, r_ids) = ids.size(1), lengths.chunk(2), ids.chunk(2)
    t = torch.arange(T, device=ids.device)
    differ = c_ids != r_ids                                                            # (B, T)
    valid, same = (lengths > 0).view(2, -1).all(0), ~differ.any(1)
    scores = last_scores(rewards, lengths)
    if not exact:
        valid = valid & ~same
        rewards = rewards.gather(1, torch.minimum(t, (lengths - 1).clamp(min=0)[:, None]))
    first = torch.where(same, T - 1, differ.float().argmax(1))                         # (B,)
    end = torch.where(same, T, torch.maximum(c_len, r_len))
    inside = (t >= first[:, None]) & (t < end[:, None])
    chosen, rejected = rewards.chunk(2)
    losses = -(F.logsigmoid(chosen - rejected) * inside).sum(1) / inside.sum(1).clamp(min=1)
    return (losses * valid).sum(), valid.sum(), score_metrics(scores, valid)
