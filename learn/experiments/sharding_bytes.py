"""What does each of two processes hold and send, with DDP and with ZeRO-1, 2 and 3?

    python -m learn.experiments.sharding_bytes             15 seconds: two processes (gloo), the same training four ways

ZeRO (Rajbhandari et al. 2020, section 5) cuts first the optimizer's states, then the gradients, then the weights over the processes.
DDP and stage 1 are the project's (dist.py, zero.py), stage 3 is PyTorch's FSDP2 (parallel.py), stage 2 is written out below. Held is what
this process keeps when the backward pass is over; sent is in units of Psi, the parameters: an all-reduce counts 2 (it is a reduce-scatter
and an all-gather), every other collective 1 for each number of the whole tensor.
"""
import os
import socket
import tempfile

import torch
import torch.distributed as torch_dist
from torch.utils._python_dispatch import TorchDispatchMode

from learn import lab
from nanollm import dist, parallel
from nanollm.losses import cross_entropy
from nanollm.zero import ZeroAdamW

WAYS, RANKS, STEPS, RATE = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"), 2, 4, 1e-3


class Sent(TorchDispatchMode):
    """Numbers that pass through collectives."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            whole = max(t.numel() for t in tensors)
            if func.name() in ("c10d::reduce_scatter_", "c10d::allgather_"):                 # they take a list of parts
                whole *= RANKS
            self.numbers += whole * (2 if "allreduce" in func.name() else 1)
        return func(*args, **(kwargs or {}))


class Zero2:
    """Each parameter has an owner. A gradient is sent to its owner the moment it is ready and forgotten by the others; the owner updates
    the parameter with moments that only it has, and sends the result to all."""

    def __init__(self, params, lr):
        self.owner, filled, total = {}, 0, sum(p.numel() for p in params)
        for p in params:
            self.owner[p] = min(RANKS * filled // total, RANKS - 1)
            filled += p.numel()
            p.register_post_accumulate_grad_hook(self.send)
        mine = [p for p in params if self.owner[p] == torch_dist.get_rank()]
        self.adamw = torch.optim.AdamW(mine, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def send(self, p):
        torch_dist.reduce(p.grad.div_(RANKS), dst=self.owner[p])
        if self.owner[p] != torch_dist.get_rank():
            p.grad = None

    def step(self):
        self.adamw.step()
        with torch.no_grad():
            for p, rank in self.owner.items():
                torch_dist.broadcast(p, src=rank)

    def state_bytes(self):
        return held(t for state in self.adamw.state.values() for t in state.values())


def held(tensors):
    """Bytes of the tensors that this process has, its slice only where one is cut; step counters left out."""
    return sum(parallel.local(t).nbytes for t in tensors if t is not None and t.dim())


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank, ports, folder):
    for way, port in zip(WAYS, ports):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train(rank, way, folder)


def train(rank, way, folder):
    """A few updates one way; process 0 notes what it held and sent, in bytes and numbers a parameter, and the weights."""
    ctx = dist.init("cpu", "fsdp" if way == "ZeRO-3" else "ddp", listen=False)
    ids = torch.randint(512, (10_000,), generator=torch.Generator().manual_seed(0))           # what is read does not matter here
    raw, batch = lab.tiny(n_layers=4), lab.windows(ids)
    model = dist.wrap(raw, ctx) if way in ("DDP", "ZeRO-3") else raw
    params = list(raw.parameters())                                          # after wrap: it may have put slices in their place
    if way == "ZeRO-1":
        optimizer = ZeroAdamW([{"params": params, "weight_decay": 0.0}], lr=RATE)
    else:
        optimizer = Zero2(params, RATE) if way == "ZeRO-2" else torch.optim.AdamW(params, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(STEPS):
        inputs, targets = (t[rank::RANKS] for t in batch(step))              # each process its own rows
        with Sent() as sent:
            model.sync = True
            loss, count, _ = cross_entropy(model(inputs), targets)
            (loss / count).backward()
            if model is not raw:
                model.wait()
            gradients = held(p.grad for p in params)
            optimizer.step()
        for p in params:
            p.grad = None
    states = optimizer.state_bytes() if hasattr(optimizer, "state_bytes") else held(t for s in optimizer.state.values() for t in s.values())
    weights = held(params)
    whole = parallel.full_state(raw)
    if ctx.main:
        n = sum(p.numel() for p in params)
        torch.save({"weights": weights / n, "gradients": gradients / n, "states": states / n, "sent": sent.numbers / n, "state": whole}, f"{folder}/{way}.pt")
    dist.finish(ctx)


def main(cfg):
    figures, whole = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, ([free_port() for _ in WAYS], folder), RANKS)
        for way in WAYS:
            seen = torch.load(f"{folder}/{way}.pt", weights_only=True)
            whole[way] = seen.pop("state")
            figures |= {f"{way}, {part}": value for part, value in seen.items()}
    apart = {way: max((whole[way][k] - v).abs().max().item() for k, v in whole["DDP"].items()) for way in WAYS}
    figures |= {f"{way}, bytes a parameter": sum(figures[f"{way}, {part}"] for part in ("weights", "gradients", "states")) for way in WAYS}
    claims = {"all four train the same weights, to 1e-5": max(apart.values()) < 1e-5,
              "16 bytes a parameter with DDP, then about 12, 10 and 8": [round(figures[f"{way}, bytes a parameter"]) for way in WAYS] == [16, 12, 10, 8],
              "ZeRO-1 and 2 send what DDP sends, to 1 %": all(abs(figures[f"{way}, sent"] / figures["DDP, sent"] - 1) < 0.01 for way in ("ZeRO-1", "ZeRO-2")),
              "ZeRO-3 sends half as much again": abs(figures["ZeRO-3, sent"] / figures["DDP, sent"] - 1.5) < 0.01}

    def draw(plt):
        below = [0.0] * len(WAYS)
        for part, colour in (("weights", "#4878a8"), ("gradients", "#dd8452"), ("states", "#8172b3")):
            values = [figures[f"{way}, {part}"] for way in WAYS]
            plt.bar(WAYS, values, bottom=below, label=part, color=colour)
            below = [a + b for a, b in zip(below, values)]
        for i, way in enumerate(WAYS):
            plt.annotate(f"sends {figures[f'{way}, sent']:.2f} Psi", (i, below[i]), ha="center", va="bottom")
        plt.ylabel("bytes a parameter, one of two processes")
        plt.ylim(0, 19)
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
