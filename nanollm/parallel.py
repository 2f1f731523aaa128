"""A model too large for one GPU: PyTorch's FSDP2 over the data-parallel ranks, its tensor parallelism inside a group.

    --parallel fsdp      weights, gradients and optimizer states in W slices; a block's weights are gathered just before
                         they are used, its gradients reduce-scattered just after (ZeRO-3; Zhao et al. 2023)
    --tp N               each matrix in N slices; every process computes its heads and its part of the SwiGLU width, and
                         one all-reduce per sub-layer adds the parts up (Megatron-LM, Shoeybi et al. 2019, section 3)
    both                 a grid of processes: those of a row share the matrices, those of a column the rows of data

A parameter becomes a DTensor: this process's slice, which knows the shape of the whole and who holds the rest.
dist.wrap comes here under these two flags only. This file knows torch and the names of the model's modules.
"""
import logging
import warnings

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from nanollm.config import UserError

logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)        # its advice on how to gather a grid's slices faster
warnings.filterwarnings("ignore", message=".*returned a view tensor|torch.distributed is disabled")   # neither is a danger here

# A Linear's weight is (out, in). The first matrices of a sub-layer are cut along out: each process computes whole heads (or
# hidden units) of its own. The last is cut along in: each process has a summand of the output, and an all-reduce adds them.
FIRST, LAST = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"), ("attention.wo", "feed_forward.w2")


class Sharded(torch.nn.Module):
    """What the training loop calls, with the words of our DDP: sync, wait(), zero_grad(). `raw` itself is cut up, so the
    optimizer is made after this. compiled: model -> model, torch.compile or nothing. dtype: what blocks are gathered in.
    Raises UserError for a model that cannot be cut up so."""

    def __init__(self, raw, ctx, compiled=lambda model: model, dtype=torch.float32):
        super().__init__()
        self.fsdp, tp = raw if ctx.world_size > 1 else None, ctx.mesh["tp"]
        with torch.no_grad():
            for tensor in [*raw.parameters(), *raw.buffers()]:               # all start from process 0's weights
                torch_dist.broadcast(tensor, src=0)
        if tp.size() > 1:
            tensor_parallel(raw, tp)
            if not self.fsdp and dtype == torch.float16:
                raise UserError("--dtype float16 with --tp alone: GradScaler takes whole tensors or slices, not both; use bfloat16, or --parallel fsdp too")
        if self.fsdp:
            # bf16: half the bytes to gather; gradients are still added up in fp32, and the slices stay fp32
            half = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if dtype != torch.float32 else MixedPrecisionPolicy()
            for block in blocks(raw):
                fully_shard(block, mesh=ctx.mesh["dp"], mp_policy=half)
            # what no block holds: embedding, last norm, head. Cut up again after each forward pass, too, so that whoever looks at
            # the parameters between two updates finds slices (torch would leave the root's whole after an evaluation)
            fully_shard(raw, mesh=ctx.mesh["dp"], reshard_after_forward=True)
        self.module = compiled(raw)

    @property
    def sync(self):
        return self._sync

    @sync.setter
    def sync(self, value):
        """False: gradients stay where they are, unsharded, until the last micro-batch. A DDP's no_sync."""
        self._sync = value
        if self.fsdp:
            self.fsdp.set_requires_gradient_sync(value)

    def wait(self):
        """Nothing to wait for: the backward pass ends with the averages in place."""

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def blocks(model):
    """The TransformerBlocks of a Transformer or a RewardModel."""
    return getattr(model, "backbone", model).layers


def tensor_parallel(model, mesh):
    """Cut attention and feed-forward matrices over the processes of `mesh`, in place. Embedding, norms and head stay whole.
    Raises UserError for a shape or a module that cannot be cut."""
    args, n = model.args, mesh.size()
    for name, value in (("n_heads", args.n_heads), ("n_kv_heads", args.n_kv_heads), ("the FFN width", args.ffn_dim)):
        if value % n:
            raise UserError(f"--tp {n}: {name} {value} is not divisible by {n}; choose another --tp or shape")
    for block in blocks(model):
        names = {name for name, _ in block.named_parameters() if name.startswith(("attention.", "feed_forward."))}
        if strange := sorted(names ^ {f"{name}.weight" for name in FIRST + LAST}):
            raise UserError(f"--tp {n}: there is no plan for cutting this model's {strange[0]} (an adapter or a variant); use --parallel fsdp instead")
        once = {name: PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts) for name, layouts in
                (("attention", (Replicate(), None, None, None, None)), ("feed_forward", (Replicate(),)))}     # one gradient all-reduce, not one a matrix
        parallelize_module(block, mesh, {**once, **{w: ColwiseParallel() for w in FIRST}, **{w: RowwiseParallel() for w in LAST}})
        block.attention.n_heads //= n                                        # of this process
        block.attention.n_kv_heads //= n


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm):
    """torch.nn.utils.clip_grad_norm_ for gradients that are whole here, cut there, on meshes of one or two dimensions (torch's
    own refuses the mixture). Returns the norm of the whole gradient, () fp32, the same on every process."""
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = {}                                                             # who must be asked -> sum of squares of our part
    for g in grads:
        groups = tuple(g.device_mesh.get_group(i) for i, place in enumerate(g.placements) if not place.is_replicate()) if isinstance(g, DTensor) else ()
        squares[groups] = squares.get(groups, 0) + local(g).float().square().sum()
    for groups, square in squares.items():
        for group in groups:
            torch_dist.all_reduce(square, group=group)
    norm = sum(squares.values()).sqrt()
    for g in grads:
        local(g).mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local(tensor):
    """This process's slice; of a plain tensor, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def slice_of(whole, like):
    """The part of `whole` that this process holds of the DTensor `like`: tensor parallelism cuts first, then FSDP."""
    if not isinstance(like, DTensor):
        return whole
    for i, place in reversed(list(enumerate(like.placements))):
        n, mine = like.device_mesh.size(i), like.device_mesh.get_local_rank(i)
        parts = whole.chunk(n, place.dim)
        whole = parts[mine] if mine < len(parts) else whole.narrow(place.dim, 0, 0)          # fewer rows than processes
    return whole


def full_state(model, keep=True):
    """{plain name: whole tensor, fp32, on the CPU}. Collective: call it on all processes; keep=False on those that need not
    hold the whole model for it ({} then)."""
    state = {}
    for name, t in model.state_dict().items():
        whole = (t.full_tensor() if isinstance(t, DTensor) else t).detach()
        if keep:
            state[name] = whole.float().cpu()
    return state


@torch.no_grad()
def load_full_state(model, state):
    """The reverse: each process takes its slices of {name: whole tensor}. Raises RuntimeError unless names and shapes all fit."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise RuntimeError(f"{len(wrong)} tensors are missing, unknown or of another shape, the first is {wrong[0]}")
    for name, t in own.items():
        local(t).copy_(slice_of(state[name], t))


def save_training(folder, model, optimizer):
    """The optimizer's states into `folder`, each process its own slices (torch.distributed.checkpoint). Collective. What the
    states are called, "layers.0.attention.wq.weight/exp_avg", does not depend on the number of processes."""
    states = {f"{name}/{key}": value for name, p in model.named_parameters() for key, value in optimizer.state.get(p, {}).items()}
    try:
        dcp.save(states, checkpoint_id=folder, no_dist=not torch_dist.is_initialized())
    except dcp.api.CheckpointException as e:
        raise UserError(f"could not write {folder}: {first_cause(e)}; free some disk space or change --out_dir") from None


def load_training(folder, model, optimizer, whole=None):
    """Restore what save_training wrote, on any number of processes, sharded or not, also in a plain process without a
    group. whole: the state_dict() of an unsharded run's optimizer, instead of `folder`. Raises UserError if it does not fit."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if whole is not None:
        names = {i: name for group in whole["param_groups"] for i, name in zip(group["params"], group["param_names"])}
        for i, state in whole["state"].items():
            mine = {key: like(parameters[names[i]], value.shape) for key, value in state.items()}
            for key, value in state.items():
                local(mine[key]).copy_(slice_of(value, mine[key]))
            optimizer.state[parameters[names[i]]] = mine
        return
    try:
        states = {key: meta.size for key, meta in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()}
        states = {key: like(parameters[key.rpartition("/")[0]], size) for key, size in states.items()}
        dcp.load(states, checkpoint_id=folder, no_dist=not torch_dist.is_initialized())
    except KeyError as e:
        raise UserError(f"{folder} is not the training state of this model: it names {e}; use --init_from for its weights") from None
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError, EOFError) as e:
        raise UserError(f"cannot read {folder}: {first_cause(e)}; it is damaged or of another model, use another checkpoint") from None
    for key, value in states.items():
        name, _, what = key.rpartition("/")
        optimizer.state[parameters[name]][what] = value


def like(p, shape):
    """An empty optimizer state of a parameter: of its own kind and slices, or a number such as the step count."""
    return torch.zeros_like(p, requires_grad=False) if shape == p.shape else torch.zeros(shape, device=p.device)


def first_cause(error):
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
