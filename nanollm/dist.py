"""One process or many: the torchrun environment, data parallelism by hand, device and precision.

One code path: under plain `python` the world has one rank and every collective here is the identity.
"""
import contextlib
import datetime
import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as torch_dist

from nanollm.config import UserError


@dataclass
class Context:
    rank: int                                    # of the data-parallel ranks: which rows are read; with --tp N, N processes share one
    local_rank: int
    world_size: int                              # the number of data-parallel ranks
    device: torch.device
    main: bool                                   # process 0: the one that prints and writes
    parallel: str = "ddp"
    tp: int = 1
    interrupted: list = field(default_factory=list)
    handlers: dict = field(default_factory=dict)  # what Ctrl-C and SIGTERM did before
    mesh: object = None                          # --parallel fsdp and --tp: the processes as a grid ("dp", "tp")
    group: object = None                         # the data-parallel ranks; None = all processes

    @property
    def sharded(self):
        """Does each process hold only a part of the weights?"""
        return self.mesh is not None

    def to(self, batch):
        """The tensors of a batch on this rank's device; from pinned memory the copy runs beside the arithmetic."""
        return tuple(t if t is None else t.to(self.device, non_blocking=True) for t in batch)

    def share(self, batches):
        """This rank's part of a list of batches, filled up with empty ones: a forward pass over sharded weights is a collective, so
        all ranks must make the same number of them. -n % W empty ones make n a multiple of W; rank r takes each W-th from r on."""
        return [*batches, *[[]] * (-len(batches) % self.world_size)][self.rank :: self.world_size]

    def sum(self, value):
        """The sum of a number or tensor over the data-parallel ranks, on every rank. The group has two backends, "cpu:gloo,cuda:nccl"
        (init below), and the tensor's device picks: what lies on the CPU is summed there, so that counting never waits for the GPU."""
        value = torch.as_tensor(value).detach().clone()
        if self.world_size > 1:
            torch_dist.all_reduce(value, group=self.group)
        return value

    def gather(self, value):
        """[value of process 0, value of process 1, …] on every process; value may be any picklable object."""
        if not torch_dist.is_initialized():
            return [value]
        values = [None] * torch_dist.get_world_size()
        torch_dist.all_gather_object(values, value)
        return values

    def barrier(self):
        """Wait for all processes."""
        if torch_dist.is_initialized():
            torch_dist.all_reduce(torch.zeros(()))

    def stop_requested(self):
        """True on every process once any of them got Ctrl-C or SIGTERM: the loop then saves and ends in good order."""
        asked = torch.tensor(len(self.interrupted))
        if torch_dist.is_initialized():
            torch_dist.all_reduce(asked)
        return bool(asked)


def choose_device(device="auto", local_rank=0, local_size=1):
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
    if device.index is not None and local_size > 1:
        raise UserError(f"--device {device} would put all {local_size} processes of this machine on one GPU; use --device {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", device.index if device.index is not None else local_rank)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"there is no GPU {device.index}: this machine has {torch.cuda.device_count()}; start fewer processes or "
                            f"choose another --device")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")           # TF32 for what autocast leaves in fp32
    return device


def init(device="auto", parallel="ddp", tp=1, listen=True):
    """Join the group that torchrun describes in RANK, LOCAL_RANK and WORLD_SIZE, or be a world of one; from here to
    finish(), Ctrl-C and SIGTERM ask the loop to save and stop instead of ending the process (listen=False: they end it). tp:
    processes that share each matrix. A collective without an answer for NANOLLM_TIMEOUT seconds (600) ends the run (config.unanswered)."""
    rank, local_rank, size, local_size = (int(os.environ.get(k, d)) for k, d in
                                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    missing = [k for k in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if size > 1 and missing:
        raise UserError(f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start with torchrun --standalone --nproc_per_node={size} …")
    if parallel not in ("ddp", "fsdp", "none"):
        raise UserError(f"--parallel {parallel} is unknown; use ddp, fsdp or none")
    if tp < 1 or size % tp:
        raise UserError(f"--tp {tp}: {size} process(es) do not split into groups of {tp}; start a multiple of {tp} with torchrun --nproc_per_node")
    if 1 < tp < size and parallel != "fsdp" or parallel == "none" and size > tp:
        raise UserError(f"--parallel {parallel} --tp {tp} leaves no work for {size} processes: use --parallel fsdp, or start only {tp}")
    seconds = os.environ.get("NANOLLM_TIMEOUT", "600")
    if not seconds.isdecimal():
        raise UserError(f"NANOLLM_TIMEOUT is {seconds!r}: give a number of seconds")
    timeout = datetime.timedelta(seconds=int(seconds))
    device = choose_device(device, local_rank, local_size)
    if device.type == "cpu" and local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":     # 1 is torchrun's own choice
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_size))
    if size > 1 and not torch_dist.is_initialized():
        if os.name == "nt":
            os.environ.setdefault("USE_LIBUV", "0")          # the Windows wheels are built without libuv
        store, attempt = None, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0" and local_size == size:            # torchrun on one machine keeps its store over restarts: the addresses of the dead
            store = torch_dist.PrefixStore(f"attempt_{attempt}", next(torch_dist.rendezvous("env://", timeout=timeout))[0])
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch_dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    ctx = Context(rank // tp, local_rank, size // tp, device, rank == 0, parallel, tp)
    if size > 1 and (parallel == "fsdp" or tp > 1):
        ctx.mesh = torch_dist.device_mesh.init_device_mesh(device.type, (size // tp, tp), mesh_dim_names=("dp", "tp"))
        ctx.group = ctx.mesh["dp"].get_group()
        for group in ctx.mesh.get_all_groups():              # they begin with torch's default of up to 30 minutes
            torch_dist.distributed_c10d._set_pg_timeout(timeout, group)
    if size > 1 and ctx.main:
        print(f"{size} processes ({parallel}, tp {tp}), {torch.get_num_threads()} thread(s) each", flush=True)
    if not ctx.main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 speaks for all; errors still reach the screen

    def note_signal(signum, frame):
        if ctx.interrupted:                                  # the second Ctrl-C means now
            raise KeyboardInterrupt
        ctx.interrupted.append(signum)
        if ctx.main:
            os.write(1, b"\nstopping: the checkpoint is written after this step (once more to quit at once)\n")

    with contextlib.suppress(ValueError):                    # not in the main thread (a notebook's, say): leave them
        for signum in (signal.SIGINT, signal.SIGTERM) if listen else ():
            ctx.handlers[signum] = signal.signal(signum, note_signal)
    return ctx


def finish(ctx):
    """Leave the group. A run that was stopped ends with code 130, so that what called it does not take it for done."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        if ctx.sharded:                                      # DTensor's caches keep the group's threads alive. One that frees a tensor
            time.sleep(0.2)                                  # while Python shuts down would abort the process (PyTorch's PR 179291): let it
    for signum, handler in ctx.handlers.items():             # a notebook's Ctrl-C is its own again
        signal.signal(signum, handler or signal.SIG_DFL)
    if ctx.interrupted:
        sys.exit(130)


def choose_dtype(wanted, device):
    """The compute type: "auto" is bf16 where the GPU has it in hardware, else fp16 (with GradScaler), else fp32.

    is_bf16_supported() answers yes for GPUs that emulate it, at a fraction of the speed: ask for native support.
    CPU and MPS stay in fp32 unless asked. Raises UserError for an unknown name."""
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
    """Compile the model's blocks in place if wanted and a compiler is there; otherwise one line says why not. Returns model.

    All blocks run the same code, so one of them is compiled and serves all: seconds, not minutes. Embedding, mask, head and
    loss stay as they are, so a new lambda as head, a checkpoint or a hook costs no compilation. Each of training and evaluation,
    with segments and without, is compiled when it is first seen; a second batch shape once more, for all shapes then.
    """
    if not wanted:
        return model
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8))     # torch only finds out at the first call
    except Exception as e:
        print(f"warning: --compile has no effect: {type(e).__name__}, {str(e).splitlines()[0][:100]}", flush=True)
        return model
    torch._dynamo.config.recompile_limit = 64                 # 8 of those kinds would be too few, and the ninth never be compiled
    print("compiling: the first update and the first evaluation take up to some minutes", flush=True)
    body = getattr(model, "backbone", model)
    body.by_runs = False                                      # lengths that change would mean a compilation for each batch
    for layer in body.layers:
        layer.compile()
    return model


class DDP(torch.nn.Module):
    """Data parallelism by hand: every rank holds the whole model and reads its own rows; gradients are averaged.

    - At the start rank 0 broadcasts its weights and buffers.
    - Gradients live in buckets, flat tensors for many parameters in reverse order of use: a fresh gradient is divided by the
      number of ranks straight into its place while it is still in the cache, and p.grad becomes a view. When the backward
      pass has filled a bucket, its all-reduce starts, while earlier layers are still being differentiated (Li et al. 2020, 3.2).
    - `ddp.sync = False` before the forward of all but the last micro-batch: accumulate without talking.
    - `ddp.wait()` after the last backward: the averages are in place. Exactly one synchronisation an update.

    Buckets are sent in one fixed order on all ranks, and a parameter that got no gradient counts as zero, so that
    ranks can never wait for each other's different messages. With world_size 1 nothing is installed.
    """

    def __init__(self, module, ctx, bucket_mb=25):
        super().__init__()
        self.module, self.ctx, self.sync, self.rounds = module, ctx, True, 0
        self.buckets, self.flats, self.views, self.pending = [], [], {}, []
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
        for bucket in self.buckets:
            self.flats.append(torch.zeros(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device))
            self.views |= {p: part.view_as(p) for p, part in zip(bucket, self.flats[-1].split([p.numel() for p in bucket]))}
        self._bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._reset()

    def _reset(self):
        self._missing = [set(bucket) for bucket in self.buckets]
        self._next = 0                                       # the next bucket to send: always in order

    def _ready(self, p):
        if self.sync or p.grad is not self.views[p]:
            torch.mul(p.grad, 1 / self.ctx.world_size if self.sync else 1, out=self.views[p])
            p.grad = self.views[p]
        if self.sync:
            self._missing[self._bucket_of[p]].discard(p)
            while self._next < len(self.buckets) and not self._missing[self._next]:
                self._send()

    def _send(self):
        for p in self._missing[self._next]:                  # no gradient in this micro-batch: what earlier ones left, or zero
            self.views[p].zero_() if p.grad is None else self.views[p].mul_(1 / self.ctx.world_size)
            p.grad = self.views[p]
        self.pending.append(torch_dist.all_reduce(self.flats[self._next], async_op=True))
        self._next += 1

    def wait(self):
        """Send what is left and wait until the averages are in every p.grad."""
        if self.ctx.world_size == 1:
            return
        assert self.sync, "wait() without a synchronised micro-batch"
        while self._next < len(self.buckets):
            self._send()
        for work in self.pending:
            work.wait()
        self.pending.clear()
        self.rounds += 1
        self._reset()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def wrap(raw, ctx, compile=False, dtype=torch.float32):
    """What the loop calls, with sync, wait() and zero_grad(): our DDP, or parallel.py's shards for --parallel fsdp and --tp.
    Those cut up raw's own parameters, so the optimizer is made afterwards. dtype: what blocks are gathered in."""
    if ctx.sharded:
        from nanollm import parallel
        return parallel.Sharded(raw, ctx, lambda model: compiled(model, compile), dtype).train()
    return DDP(compiled(raw, compile), ctx).train()


def check_replicas(model, ctx):
    """Raises UserError on every process if weights that should be copies of each other differ: replicas that have drifted apart
    train on without any sign of it. A hash over all bytes of what is not cut into slices; called at each save."""
    if not torch_dist.is_initialized():
        return
    digest = hashlib.blake2b()
    for p in model.parameters():
        if not hasattr(p, "to_local"):
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    seen = ctx.gather(digest.hexdigest())
    if wrong := [str(i) for i, other in enumerate(seen) if other != seen[0]]:
        raise UserError(f"the weights of process(es) {', '.join(wrong)} are no longer copies of process 0's: bad memory, or another version of the "
                        "code or of PyTorch there; go on from the last checkpoint with --resume auto")
