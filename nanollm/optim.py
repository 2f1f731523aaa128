"""Learning-rate schedule, AdamW groups, and Muon."""
import math

import torch

from nanollm.config import UserError


def get_lr(it, learning_rate, min_lr, warmup_steps, decay_steps, schedule="cosine"):
    """Learning rate at iteration `it`: linear warmup from 0, then the schedule down to min_lr, then min_lr.

    cosine: half a cosine from warmup_steps to decay_steps (Loshchilov & Hutter 2017, eq. 5, one cycle).
    wsd: warmup, stable, decay: hold the peak, go down linearly over the last 30 % (Hu et al. 2024, section 4).
    constant: hold the peak. The first update uses it = 1: at it = 0 the rate is 0 and nothing would move.
    """
    if schedule not in ("cosine", "wsd", "constant"):
        raise UserError(f"--schedule {schedule} is unknown; use cosine, wsd or constant")
    if min_lr > learning_rate:
        raise UserError(f"--min_lr {min_lr} lies above --learning_rate {learning_rate}: the schedule would rise; lower it")
    if it < warmup_steps:
        return learning_rate * it / warmup_steps
    if schedule == "constant":
        return learning_rate
    if it >= decay_steps:
        return min_lr
    done = (it - warmup_steps) / (decay_steps - warmup_steps)                 # 0 … 1
    if schedule == "wsd":
        return min_lr + (learning_rate - min_lr) * min(1.0, (1 - done) / 0.3)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def orthogonalize(g, steps=5):
    """Newton-Schulz: push all singular values of each matrix in g (…, rows, cols) towards 1 without an SVD.

    X <- a X + b (X X^T) X + c (X X^T)^2 X with the quintic coefficients of Jordan et al. 2024 ("Muon"), chosen for
    speed: five steps land between about 0.7 and 1.2, which is close enough for an update direction.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.size(-2) > g.size(-1)
    x = g.mT if wide else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if wide else x


class Muon(torch.optim.AdamW):
    """Momentum, orthogonalised, for the matrices inside the blocks; AdamW for everything else.

    A gradient matrix is dominated by a few directions; taking U V^T of its SVD instead moves all directions equally
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Groups with muon=True take that path, then hide their
    gradients from AdamW's own step. Equal shapes are stacked, so that one batched product serves all layers.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"] if group["muon"] else []:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(p.grad, state["momentum"], group["momentum"]))     # Nesterov
                scale = max(1.0, shape[0] / shape[1]) ** 0.5        # so that a unit input moves every shape alike
                for p, update in zip(params, orthogonalize(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
                    p.grad = None
        return super().step(closure)


def make_optimizer(model, kind="adamw", learning_rate=3e-4, weight_decay=0.1, betas=(0.9, 0.95), muon_lr=0.02):
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices and embeddings (>= 2-D) only: pulling norm gains towards 0 is
    no sensible prior. kind="muon" gives the blocks' matrices to Muon at peak rate muon_lr. Each group carries
    lr_scale, so that a script sets group["lr"] = lr * group["lr_scale"] and stays in charge of the schedule."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    in_block = lambda n, p: kind == "muon" and p.dim() == 2 and "layers." in n
    if kind not in ("adamw", "muon"):
        raise UserError(f"--optimizer {kind} is unknown; use adamw or muon")
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() >= 2 and not in_block(n, p)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0},
        {"params": [(n, p) for n, p in named if in_block(n, p)], "weight_decay": weight_decay, "muon": True,
         "momentum": 0.95, "lr_scale": muon_lr / (learning_rate or 1)},
    ]
    sharded = lambda p: hasattr(p, "to_local")               # under --tp some are slices (DTensor), some whole: no fused step takes both
    groups = [{"muon": False, "lr_scale": 1.0, **g, "params": part} for g in groups for cut in (False, True)
              if (part := [(n, p) for n, p in g["params"] if sharded(p) == cut])]
    if kind == "muon" and any(sharded(p) for _, p in named):
        raise UserError("--optimizer muon turns whole matrices, and with --parallel fsdp or --tp every process holds slices; use adamw, or --parallel ddp")
    cls = Muon if kind == "muon" else torch.optim.AdamW
    return cls(groups, lr=learning_rate, betas=betas, fused=True)
