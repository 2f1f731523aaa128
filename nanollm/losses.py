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
    """sequence_logps(output(hidden), targets) of hidden states (B, T, C) and an output layer. On the CPU prompts and padding
    get no logits; a GPU would have to wait for the number of the others."""
    if hidden.device.type != "cpu":
        return sequence_logps(output(hidden), targets)
    mask = targets != IGNORE_INDEX
    logps = -F.cross_entropy(output(hidden[mask]).float(), targets[mask], reduction="none")       # (N,)
    return logps.new_zeros(len(targets)).index_add(0, mask.nonzero()[:, 0], logps), mask.sum(-1)


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
