"""ZeRO stage 1 by hand (Rajbhandari et al. 2020, section 5.1): each rank keeps 1/W of the optimizer's states. To be read.

Data parallelism makes W ranks hold the same Adam moments, 8 bytes a parameter, and compute the same step. Here all
parameters lie one behind the other in a flat vector of W equal parts, and rank r is in charge of part r:

    reduce-scatter    every rank sends its gradients; rank r receives the sum of part r            Psi (W-1)/W numbers sent
    step              AdamW on part r only, with moments of that length                            1/W of the states
    all-gather        rank r sends its new part; every rank receives the whole                     Psi (W-1)/W numbers sent

An all-reduce is these two collectives in a row, so the bytes sent are those of DDP, 2 Psi; what is saved is memory.
Used instead of the DDP wrapper: step() does the averaging. Equal to AdamW on averaged gradients; see docs/distributed.md.
"""
import torch
import torch.distributed as torch_dist


class ZeroAdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with sharded states. groups: [{"params": [...], "weight_decay": float}, …].

    All ranks construct it with equal weights in the same order and call step() together. `rank` and `world_size` are the
    process group's; without one it is plain AdamW."""

    def __init__(self, groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8):
        grouped = torch_dist.is_initialized()
        self.rank, self.world_size = (torch_dist.get_rank(), torch_dist.get_world_size()) if grouped else (0, 1)
        self.params = [p for group in groups for p in group["params"]]
        self.lr, self.betas, self.eps, self.steps = lr, betas, eps, 0
        n = sum(p.numel() for p in self.params)
        self.part = -(-n // self.world_size)                                 # the last part is filled up with zeros
        self.flat = torch.zeros(self.part * self.world_size, device=self.params[0].device)
        decay, at = torch.zeros_like(self.flat), 0
        for group in groups:
            for p in group["params"]:
                here = slice(at, at := at + p.numel())
                self.flat[here] = p.detach().flatten()
                decay[here] = group["weight_decay"]
                p.data = self.flat[here].view_as(p)                          # the model's weights are views: the all-gather fills them in
        self.mine = self.flat[self.rank * self.part : (self.rank + 1) * self.part]
        self.decay = decay[self.rank * self.part : (self.rank + 1) * self.part].clone()
        self.m, self.v = torch.zeros_like(self.mine), torch.zeros_like(self.mine)       # Adam's moments, of our part only

    @torch.no_grad()
    def step(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        grad = torch.cat([g.flatten() for g in grads] + [self.flat.new_zeros(len(self.flat) - sum(map(torch.numel, grads)))])
        g = torch.empty_like(self.mine)
        if self.world_size > 1:
            torch_dist.reduce_scatter(g, list((grad / self.world_size).chunk(self.world_size)))
        else:
            g.copy_(grad)
        self.steps += 1
        b1, b2 = self.betas
        self.m.lerp_(g, 1 - b1)
        self.v.mul_(b2).addcmul_(g, g, value=1 - b2)
        m, v = self.m / (1 - b1**self.steps), self.v / (1 - b2**self.steps)
        self.mine.mul_(1 - self.lr * self.decay).sub_(self.lr * m / (v.sqrt() + self.eps))
        if self.world_size > 1:
            torch_dist.all_gather(list(self.flat.chunk(self.world_size)), self.mine.clone())

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def state_bytes(self):
        """Bytes that this rank keeps for the optimizer between two steps."""
        return sum(t.numel() * t.element_size() for t in (self.m, self.v))
