"""One process or many: the torchrun environment, data parallelism by hand, device and precision.

One code path: under plain `python` the world has one rank and every collective here is the identity.
"""
import contextlib
import os
import signal
import sys
from dataclasses import dataclass, field

import torch
import torch.distributed as torch_dist

from nanollm.config import UserError


@dataclass
class Context:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    main: bool                                   # rank 0: the one that prints and writes
    parallel: str = "ddp"
    tp: int = 1
    interrupted: list = field(default_factory=list)
    handlers: dict = field(default_factory=dict)  # what Ctrl-C and SIGTERM did before

    @property
    def sharded(self):
        """Does each rank hold only a part of the weights?"""
        return self.parallel == "fsdp" or self.tp > 1

    def to(self, batch):
        """The tensors of a batch on this rank's device; from pinned memory the copy runs beside the arithmetic."""
        return tuple(t if t is None else t.to(self.device, non_blocking=True) for t in batch)

    def sum(self, value):
        """The sum of a number or tensor over all ranks, on every rank."""
        value = torch.as_tensor(value).detach().clone()
        if self.world_size > 1:
            torch_dist.all_reduce(value)
        return value

    def gather(self, value):
        """[value of rank 0, value of rank 1, …] on every rank; value may be any picklable object."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        torch_dist.all_gather_object(values, value)
        return values

    def barrier(self):
        if self.world_size > 1:
            torch_dist.barrier()

    def stop_requested(self):
        """True on every rank once any rank got Ctrl-C or SIGTERM: the loop then saves and ends in good order."""
        return bool(self.sum(len(self.interrupted)) > 0)


def choose_device(device="auto", local_rank=0):
    """auto, cpu, cuda, cuda:N or mps as a torch.device. Raises UserError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is no device; use auto, cpu, cuda, cuda:0 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch sees no Apple GPU here; use --device cpu or auto")
    if device.type == "cuda":
        device = torch.device("cuda", device.index if device.index is not None else local_rank)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"there is no GPU {device.index}: this machine has {torch.cuda.device_count()}; start fewer processes or "
                            f"choose another --device")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")           # TF32 for what autocast leaves in fp32
    return device


def init(device="auto", parallel="ddp", tp=1):
    """Join the group that torchrun describes in RANK, LOCAL_RANK and WORLD_SIZE, or be a world of one; from here to
    finish(), Ctrl-C and SIGTERM ask the loop to save and stop instead of ending the process."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = choose_device(device, local_rank)
    if world_size > 1 and not torch_dist.is_initialized():
        if os.name == "nt":
            os.environ.setdefault("USE_LIBUV", "0")          # the Windows wheels are built without libuv
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    ctx = Context(rank, local_rank, world_size, device, rank == 0, parallel, tp)
    if not ctx.main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 speaks for all; errors still reach the screen

    def remember(signum, frame):
        if ctx.interrupted:                                  # the second Ctrl-C means now
            raise KeyboardInterrupt
        ctx.interrupted.append(signum)
        if ctx.main:
            os.write(1, b"\nstopping: the checkpoint is written after this step (once more to quit at once)\n")

    with contextlib.suppress(ValueError):                    # not in the main thread (a notebook's, say): leave them
        for signum in (signal.SIGINT, signal.SIGTERM):
            ctx.handlers[signum] = signal.signal(signum, remember)
    return ctx


def finish(ctx):
    """Leave the group. A run that was stopped ends with code 130, so that what called it does not take it for done."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    for signum, handler in ctx.handlers.items():             # a notebook's Ctrl-C is its own again
        signal.signal(signum, handler or signal.SIG_DFL)
    if ctx.interrupted:
        sys.exit(130)


def choose_dtype(wanted, device):
    """The compute type: "auto" is bf16 where the GPU has it in hardware, else fp16 (with GradScaler), else fp32.

    is_bf16_supported() answers yes for GPUs that emulate it, at a fraction of the speed: ask for native support.
    CPU and MPS stay in fp32 unless asked. Raises UserError for what cannot work."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if wanted not in names:
        raise UserError(f"--dtype {wanted} is unknown; use auto, {', '.join(names)}")
    return names[wanted]


def autocast(device, dtype):
    """Mixed precision for the forward pass: weights stay fp32, matrix products run in dtype. A no-op for fp32."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()


def compiled(model, wanted):
    """torch.compile(model) if wanted and a compiler is there; otherwise the model itself, with one line that says why."""
    if not wanted:
        return model
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8))     # torch only finds out at the first call
        return torch.compile(model)
    except Exception as e:
        print(f"warning: --compile has no effect: {type(e).__name__}, {str(e).splitlines()[0][:100]}", flush=True)
        return model


class DDP(torch.nn.Module):
    """Data parallelism by hand: every rank holds the whole model and reads its own rows; gradients are averaged.

    - At the start rank 0 broadcasts its weights and buffers.
    - Gradients are packed into buckets in reverse order of use. When the backward pass has filled a bucket, its
      all-reduce starts while the earlier layers are still being differentiated (Li et al. 2020, section 3.2).
    - `ddp.sync = False` before the forward of all but the last micro-batch: accumulate without talking.
    - `ddp.wait()` after the last backward: the averages are in place. Exactly one synchronisation an update.

    Buckets are sent in one fixed order on all ranks, and a parameter that got no gradient counts as zero, so that
    ranks can never wait for each other's different messages. With world_size 1 nothing is installed.
    """

    def __init__(self, module, ctx, bucket_mb=25):
        super().__init__()
        self.module, self.ctx, self.sync, self.rounds = module, ctx, True, 0
        self.buckets, self.pending = [], []
        if ctx.world_size == 1:
            return
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                torch_dist.broadcast(tensor, src=0)
        size = 0
        for p in reversed([p for p in module.parameters() if p.requires_grad]):
            if not self.buckets or size + p.numel() * 4 > bucket_mb * 2**20 or self.buckets[-1][0].dtype != p.dtype:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.numel() * 4
            p.register_post_accumulate_grad_hook(self._ready)
        self._home = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._reset()

    def _reset(self):
        self._missing = [len(bucket) for bucket in self.buckets]
        self._next = 0                                       # the next bucket to send: always in order

    def _ready(self, p):
        if self.sync:
            self._missing[self._home[p]] -= 1
            while self._next < len(self.buckets) and self._missing[self._next] <= 0:
                self._send()

    def _send(self):
        bucket = self.buckets[self._next]
        self._next += 1
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        flat /= self.ctx.world_size                          # average, as torch's DDP does
        self.pending.append((bucket, flat, torch_dist.all_reduce(flat, async_op=True)))

    def wait(self):
        """Send what is left, wait for all buckets and put the averages into p.grad."""
        if self.ctx.world_size == 1:
            return
        assert self.sync, "wait() without a synchronised micro-batch"
        while self._next < len(self.buckets):
            self._send()
        for bucket, flat, work in self.pending:
            work.wait()
            for p, mean in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = mean.view_as(p)
        self.pending.clear()
        self.rounds += 1
        self._reset()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def zero_grad(self, set_to_none=True):
        self.module.zero_grad(set_to_none)


def wrap(raw, ctx, compile=False):
    return DDP(compiled(raw, compile), ctx).train()


def check_replicas(model, ctx):
    pass
