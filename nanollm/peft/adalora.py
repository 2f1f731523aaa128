"""AdaLoRA by hand (Zhang et al. 2023, arXiv:2303.10512): rank moves to the matrices that need it.

    y = W x + s * P diag(E) Q x        P (out, r0) and Q (r0, in) random, E (r0,) zero: step 0 is the base model
                                       s = alpha / r0

The shape of a singular value decomposition, but none is computed: the loss holds P and Q near orthogonality (eq. 4). All
matrices begin with rank r0; then the least important triplets (column of P, number of E, row of Q) of the whole model are
set to zero, more of them from update to update, until r a matrix are left on average. Names as in peft: Q is lora_A, P lora_B.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.peft.lora import TARGETS, check, linears, product

BETA = 0.85                                                              # of both moving averages (section 4.1 of the paper)


class AdaLoRALinear(nn.Linear):
    def __init__(self, base, r0, target, alpha, dropout, start, end, orthogonality):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.r0, self.target, self.start, self.end, self.orthogonality = r0, target, start, end, orthogonality
        self.scaling, self.enabled = alpha / (r0 + 1e-5), True           # r0, not what is left of it: peft's formula, to the 1e-5
        at = dict(device=base.weight.device)
        self.lora_A = nn.Parameter(0.02 * torch.randn(r0, base.in_features, **at))
        self.lora_E = nn.Parameter(torch.zeros(r0, 1, **at))
        self.lora_B = nn.Parameter(0.02 * torch.randn(base.out_features, r0, **at))
        for name in "AEB":                                               # moving averages: part of the state, so that a resume is exact
            self.register_buffer(f"lora_mean_{name}", torch.zeros_like(getattr(self, f"lora_{name}").detach()))
            self.register_buffer(f"lora_spread_{name}", torch.zeros_like(getattr(self, f"lora_{name}").detach()))
        self.register_buffer("lora_alive", torch.ones(r0, 1, **at))
        self.lora_dropout = nn.Dropout(dropout)
        self.train(base.training)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return y + self.scaling * F.linear(F.linear(self.lora_dropout(x), self.lora_A * self.lora_E), self.lora_B)

    @torch.no_grad()
    def merged_weight(self):
        return (self.weight.float() + self.scaling * product(self.lora_B, self.lora_A * self.lora_E)).to(self.weight.dtype)

    @torch.no_grad()
    def watch(self):
        """Sensitivity I = |w * gradient|, what the loss would lose without w; its mean, and how far it swings about it (eq. 8-10)."""
        for name in "AEB":
            w, mean, spread = getattr(self, f"lora_{name}"), getattr(self, f"lora_mean_{name}"), getattr(self, f"lora_spread_{name}")
            now = (w * w.grad).abs()
            mean.lerp_(now, 1 - BETA)
            spread.lerp_((now - mean).abs(), 1 - BETA)

    def importance(self):
        """(r0,): the score of a number is mean * spread; of a triplet, E's plus the means over its row of Q and column of P (eq. 7, 11)."""
        score = {name: getattr(self, f"lora_mean_{name}") * getattr(self, f"lora_spread_{name}") for name in "AEB"}
        return score["E"].squeeze(1) + score["A"].mean(1) + score["B"].mean(0)


def adalora(model, r=8, alpha=16.0, dropout=0.0, targets=TARGETS, r0=0, start=0.1, end=0.3, orthogonality=0.5):
    """r: rank a matrix at the end, on average; r0: at the start (0 = 1.5 r). Until `start` of the run all ranks stay, and from `end`
    before its end on."""
    check(r, alpha, dropout)
    r0 = r0 or 3 * r // 2
    if r0 < r or not (start >= 0 and end >= 0 and start + end < 1):      # so that nan is refused, too
        raise UserError(f"--peft adalora: r0 {r0} must be at least r {r}, and start {start} + end {end} less than the whole run, 1")
    return {name: AdaLoRALinear(base, r0, r, alpha, dropout, start, end, orthogonality) for name, base in linears(model, targets).items()}


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, AdaLoRALinear)]


def add_orthogonality(model, loss, count, metrics):
    """(loss, count, metrics) with weight * mean over all P and Q of |P^T P - 1| and |Q Q^T - 1| (Frobenius) added, times count, since
    losses are sums. Nothing is added to another model or to a validation loss."""
    layers = layers_of(model) if model.training else []
    if not layers:
        return loss, count, metrics
    squares = [s for m in layers for s in (m.lora_A @ m.lora_A.T, m.lora_B.T @ m.lora_B)]               # (r0, r0)
    distance = torch.stack([(s - torch.eye(len(s), device=s.device)).norm() for s in squares]).mean()
    return loss + count * layers[0].orthogonality * distance, count, metrics | {"orthogonality": count * distance.detach()}


def budget(step, total, start, end, first, target):
    """Triplets that may live after update `step` of `total`: `first` for `start` updates, then down along a cubic to `target`, which
    is reached `end` updates before the last (eq. 12)."""
    if step <= start:
        return first
    done = min(1.0, (step - start) / (total - end - start))
    return int(target + (first - target) * (1 - done) ** 3)


@torch.no_grad()
def reallocate(model, step, total):
    """After update `step` (from 1) of `total`, gradients still in place: judge all triplets and silence the least important ones. They go
    on learning, and may come back, until `end` of the run is reached."""
    layers = layers_of(model)
    start, end = round(layers[0].start * total), round(layers[0].end * total)
    if step < total - end:
        for m in layers:
            m.watch()
    if step <= total - end:
        first = sum(m.r0 for m in layers)
        silent = first - budget(step, total, start, end, first, len(layers) * layers[0].target)
        if silent:
            threshold = torch.cat([m.importance() for m in layers]).kthvalue(silent).values
            for m in layers:
                m.lora_alive.copy_((m.importance() > threshold)[:, None])
    for m in layers:
        m.lora_E.mul_(m.lora_alive)
