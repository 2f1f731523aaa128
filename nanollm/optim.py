"""Learning-rate schedule, AdamW groups, Muon, and the one order of an update: unscale, clip, step, update."""
import math

import torch

from nanollm.config import UserError


def get_lr(it, learning_rate, min_lr, warmup_steps, decay_steps, schedule="cosine"):
    """Learning rate at iteration `it`: linear warmup from 0, then the schedule down to min_lr, then min_lr.

    cosine: half a cosine from warmup_steps to decay_steps (Loshchilov & Hutter 2017, eq. 5, one cycle).
    wsd: warmup, stable, decay: hold the peak, go down linearly over the last 30 % (Hu et al. 2024, section 4).
    linear: a straight line from the peak to min_lr. constant: hold the peak.
    The first update uses it = 1: at it = 0 the rate is 0 and nothing would move.
    """
    if schedule not in ("cosine", "wsd", "linear", "constant"):
        raise UserError(f"--schedule {schedule} is unknown; use cosine, wsd, linear or constant")
    if min_lr > learning_rate:
        raise UserError(f"--min_lr {min_lr} lies above --learning_rate {learning_rate}: the schedule would rise; lower it")
    if it < warmup_steps:
        return learning_rate * it / warmup_steps
    if schedule == "constant":
        return learning_rate
    if it >= decay_steps:
        return min_lr
    done = (it - warmup_steps) / (decay_steps - warmup_steps)                 # 0 … 1
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "wsd": min(1.0, (1 - done) / 0.3), "linear": 1 - done}[schedule]
    return min_lr + shape * (learning_rate - min_lr)


# Quintics x -> a x + b x^3 + c x^5, each the best there is (least largest distance from 1) on the interval that the one before
# leaves; the first on [0.01, 1]: the greedy construction of Amsel et al. 2025, "The Polar Express" (arXiv:2505.16932, algorithm 1).
QUINTICS = [(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)]


def orthogonalize(g):
    """U V^T of each matrix g = U S V^T in a stack (…, rows, cols), nearly and without an SVD: an odd polynomial
    a X + b (X X^T) X + c (X X^T)^2 X changes the singular values S and leaves U and V alone.

    Singular values above 1 % of the matrix's norm land between 0.73 and 1.27, smaller ones grow 78-fold. That takes three
    products of polynomials; one polynomial over and over (Jordan et al. 2024, "Muon") needs five for the same band.
    """
    wide = g.size(-2) > g.size(-1)
    x = g.mT if wide else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)        # the norm bounds the largest singular value: all are in [0, 1]
    for a, b, c in QUINTICS:
        s = x @ x.mT                                           # on the shorter side
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if wide else x


class Muon(torch.optim.AdamW):
    """Momentum, orthogonalised, for the matrices inside the blocks; AdamW for everything else.

    A gradient matrix is dominated by a few directions; taking U V^T of its SVD instead moves all directions equally
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Groups with muon=True take that path; AdamW's own step sees
    only the others. Equal shapes are stacked, so that one batched product serves all layers.
    """

    @torch.no_grad()
    def step(self, closure=None):
        found_inf = getattr(self, "found_inf", torch.zeros(()))           # 1: leave everything as it is (see update below)
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"] if group["muon"] else []:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                momenta = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(p)
                    grad = torch.where(found_inf > 0, state["momentum"], p.grad)      # not finite: from m to m no lerp moves (0 * NaN is NaN)
                    state["momentum"].lerp_(grad, 1 - group["momentum"])
                    momenta.append(torch.lerp(grad, state["momentum"], group["momentum"]))     # Nesterov
                scale = max(1.0, shape[0] / shape[1]) ** 0.5        # so that a unit input moves every shape alike
                rate = group["lr"] * (1 - found_inf)
                for p, direction in zip(params, orthogonalize(torch.stack(momenta))):
                    p.mul_(1 - rate * group["weight_decay"]).sub_(direction * (rate * scale))
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything


def make_optimizer(model, kind="adamw", learning_rate=3e-4, weight_decay=0.1, betas=(0.9, 0.95), muon_lr=0.02):
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices and embeddings (>= 2-D) only: pulling norm gains, or IA3's, towards 0
    is no sensible prior. kind="muon" gives the blocks' matrices to Muon at peak rate muon_lr. Each group carries
    lr_scale, so that a script sets group["lr"] = lr * group["lr_scale"] and stays in charge of the schedule."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrix = lambda n, p: p.dim() >= 2 and "ia3_" not in n   # IA3's gains are rows or columns, (1, n) or (n, 1)
    in_block = lambda n, p: kind == "muon" and p.dim() == 2 and matrix(n, p) and "layers." in n
    if kind not in ("adamw", "muon"):
        raise UserError(f"--optimizer {kind} is unknown; use adamw or muon")
    groups = [
        {"params": [(n, p) for n, p in named if matrix(n, p) and not in_block(n, p)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if not matrix(n, p)], "weight_decay": 0.0},
        {"params": [(n, p) for n, p in named if in_block(n, p)], "weight_decay": weight_decay, "muon": True,
         "momentum": 0.95, "lr_scale": muon_lr / (learning_rate or 1)},
    ]
    sharded = lambda p: hasattr(p, "to_local")               # under --tp some are slices (DTensor), some whole: no fused step takes both
    groups = [{"muon": False, "lr_scale": 1.0, **g, "params": part} for g in groups for cut in (False, True)
              if (part := [(n, p) for n, p in g["params"] if sharded(p) == cut])]
    if kind == "muon" and any(sharded(p) for _, p in named):
        raise UserError("--optimizer muon orthogonalises whole matrices; with --parallel fsdp or --tp each process holds slices: use adamw, or --parallel ddp")
    cls = Muon if kind == "muon" else torch.optim.AdamW
    return cls(groups, lr=learning_rate, betas=betas, fused=True)


@torch.no_grad()
def update(model, optimizer, scaler, grad_clip, loss):
    """Unscale -> clip -> step -> update, the only order that is right: what is clipped must be the true gradient and not the
    scaled one (fp16), and the scale may change only after the step that it belongs to.

    Where the loss or the gradient is not finite nothing moves: not the weights, not the optimizer's state. That is decided
    on the device (found_inf, as GradScaler hands it to a fused optimizer), so nothing here waits for a GPU. loss: the sum
    over all ranks, so that all ranks decide alike. Returns the gradient's L2 norm before clipping, () fp32; not finite =
    left out.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    smallest = min(grads, key=torch.Tensor.numel)
    smallest = smallest.to_local() if hasattr(smallest, "to_local") else smallest      # a shard (--parallel fsdp, --tp)
    smallest.add_(loss * 0)                                                    # NaN if the loss is not finite: now one test sees both
    scaler.unscale_(optimizer)
    clip = torch.nn.utils.clip_grad_norm_
    if any(hasattr(g, "to_local") for g in grads):
        from nanollm.parallel import clip_grad_norm_ as clip                   # the norm of the whole gradient, not of this process's slices
    norm = clip(model.parameters(), grad_clip or float("inf"))
    if not scaler.is_enabled():                                                # with fp16 the scaler has looked itself
        optimizer.found_inf = (~torch.isfinite(norm)).float()
    scaler.step(optimizer)
    scaler.update()
    return norm


class Guard:
    """Counts the updates that `update` left out, says which rows they had read, and tells when `limit` came in a row.

    The norms stay on a GPU until a line is logged or a checkpoint saved: reading each would make the CPU wait every time.
    On the CPU each is read at once. The schedule does not count the updates left out.
    """

    def __init__(self, ctx, log, sampler, log_every, limit=20):
        self.log, self.sampler, self.limit, self.norms, self.broken = log, sampler, limit, [], False
        self.every = log_every if ctx.device.type == "cuda" else 1

    def __call__(self, at, norm):
        """Note the norm of update at.step - 1; True when too many have failed."""
        self.norms.append(norm)
        if at.step % self.every == 0:
            self.read(at)
        broken, self.broken = self.broken, False
        return broken

    def read(self, at):
        """Bring at.skipped and at.in_a_row up to date."""
        norms = torch.stack(self.norms).tolist() if self.norms else []
        for step, norm in enumerate(norms, at.step - len(norms)):
            at.in_a_row = 0 if math.isfinite(norm) else at.in_a_row + 1
            self.broken |= at.in_a_row >= self.limit
            if at.in_a_row:
                at.skipped += 1
                self.log.event(step + 1, f"loss or gradient is not finite: update left out ({at.in_a_row} in a row)", rows=self.sampler.rows(step).tolist())
        self.norms.clear()
