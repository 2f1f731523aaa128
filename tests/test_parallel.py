"""FSDP and tensor parallelism: a model in slices trains exactly as a whole one, and its checkpoints fit any number of processes.

`worker` runs in two and then in four gloo processes; the tests compare with this process.
"""
import functools
import math
import os
import types

import pytest
import torch
import torch.distributed as torch_dist
from torch.distributed.tensor.debug import CommDebugMode

from conftest import largest_difference, metrics, run_ranks, tiny_lm, weights, write_world
from nanollm import dist, parallel, peft
from nanollm.config import UserError
from nanollm.model import RewardModel
from nanollm.optim import make_optimizer, update
from test_dist import beside_torchs
from test_scripts import start, train_lines

STEPS, HALF, G = 4, 2, 4
MODELS = ("tied", "untied", "reward", "lora", "checkpointing", "bfloat16", "float16")
LAYOUTS = {2: [("fsdp", 1), ("ddp", 2)], 4: [("fsdp", 1), ("ddp", 4), ("fsdp", 2)]}        # processes: (--parallel, --tp)
CASES = [(n, *layout, kind) for n in LAYOUTS for layout in LAYOUTS[n] for kind in (MODELS if n == 2 else ("tied",)) if layout[1] == 1 or kind != "lora" and (kind, layout[0]) != ("float16", "ddp")]


def one():
    return dist.Context(0, 0, 1, torch.device("cpu"), True)


def model_of(kind, seed=7):
    model = tiny_lm(seed, n_heads=4, n_kv_heads=4, tie_embeddings=kind != "untied")
    if kind == "reward":
        model = RewardModel(model.args)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4) if p.dim() > 1 else None
    if kind == "lora":
        peft.inject_lora(model, r=4)
        for _, layer in peft.lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.02)
    if kind == "checkpointing":
        model.checkpointing = True
    return model


def loss_of(model, batch):
    """Any loss over all positions will do: (sum, count)."""
    out = model(batch)
    return (out.square() if out.dim() == 2 else out.logsumexp(-1).square()).sum() / 100, batch.numel()


def train(ctx, kind, first=0, last=STEPS, save=None, load=None, seed=7):
    """Updates first … last - 1, the same rows whatever the number of ranks -> {losses, norms, state}."""
    raw, dtype = model_of(kind, seed), getattr(torch, kind) if "float" in kind else torch.float32
    model, scaler = dist.wrap(raw, ctx, dtype=dtype), torch.amp.GradScaler("cpu", init_scale=256.0, enabled=kind == "float16")
    optimizer = make_optimizer(raw, learning_rate=1e-2)
    if load:
        parallel.load_full_state(raw, torch.load(load / "model.pt", weights_only=True))
        whole = torch.load(load / "training.pt", weights_only=True) if (load / "training.pt").exists() else None
        parallel.load_training(load / "training", raw, optimizer, whole)
    losses, norms = [], []
    for step in range(first, last):
        batches = [torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(100 * step + m)) for m in range(ctx.rank, G, ctx.world_size)]
        count, loss = ctx.sum(sum(b.numel() for b in batches)), 0.0
        for i, batch in enumerate(batches):
            model.sync = i == len(batches) - 1
            with dist.autocast(torch.device("cpu"), dtype):
                loss_sum, _ = loss_of(model, batch)
            scaler.scale(loss_sum / count * ctx.world_size).backward()
            loss = loss + loss_sum.detach()
        model.wait()
        loss = ctx.sum(loss)
        if (kind, step) == ("float16", 1) and len(slice := parallel.local(raw.norm.weight.grad)) and (ctx.rank == ctx.world_size - 1):
            slice[-1] = math.inf                             # an overflow that only one process's slice shows
        norms.append(float(update(raw, optimizer, scaler, 1.0, loss)))
        losses.append(float(loss / count))
        model.zero_grad()
    dist.check_replicas(raw, ctx)
    state = parallel.full_state(raw)
    if save:
        if ctx.sharded:
            parallel.save_training(save / "training", raw, optimizer)
        if ctx.main:
            torch.save(state, save / "model.pt")
            None if ctx.sharded else torch.save(optimizer.state_dict(), save / "training.pt")
        ctx.barrier()
    return {"losses": losses, "norms": norms, "state": state}


def worker(out):
    """Every layout of this number of processes. The tied model stops half-way and saves; where `out` has checkpoints of other
    layouts already, it goes on from each of them."""
    n, seen = int(os.environ["WORLD_SIZE"]), {}
    for parallel_, tp in LAYOUTS[n]:
        ctx = dist.init("cpu", parallel_, tp)
        me = torch_dist.get_rank()
        for *layout, kind in CASES:
            if layout == [n, parallel_, tp]:
                seen[n, parallel_, tp, kind] = train(ctx, kind, seed=7 + me)          # another start on each: the broadcast must undo it
        folder = out.parent / f"half-{n}-{parallel_}-{tp}"
        if ctx.main:
            folder.mkdir()
        ctx.barrier()
        train(ctx, "tied", last=HALF, save=folder, seed=7 + me)
        for half in sorted(out.parent.glob("half-[12]-*")):
            seen[n, parallel_, tp, half.name] = train(ctx, "tied", first=HALF, load=half, seed=8 + me)
        ctx.barrier()
    with pytest.raises(UserError, match="n_kv_heads 2 is not divisible by 3"):
        parallel.tensor_parallel(tiny_lm(n_heads=6, dim=48), types.SimpleNamespace(size=lambda: 3))
    seen[n, "torch"] = [beside_torchs(dist.init("cpu"), micro)[:2] for micro in (1, 3)]
    model = dist.wrap(model_of("tied"), ctx)
    if n == 2:                                               # the last layout is --tp 2
        with pytest.raises(UserError, match="no plan for cutting this model's attention.wk.lora_A"):
            dist.wrap(model_of("lora"), ctx)
        with pytest.raises(UserError, match="--dtype float16 with --tp"):
            dist.wrap(model_of("float16"), ctx, dtype=torch.float16)
        with CommDebugMode() as counted:
            model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        seen["all-reduces"] = sum(counted.get_comm_counts().values())
    with pytest.raises(UserError, match="each process holds slices"):
        make_optimizer(model.module, "muon")
    torch.save(seen, out / f"seen{me}.pt")
    dist.finish(ctx)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """{(processes, --parallel, --tp, what): losses, norms, state}, seen by process 0, of two and of four processes and of this one."""
    out = tmp_path_factory.mktemp("parallel")
    half = out / "half-1-ddp-1"                              # a checkpoint of a run that is not sharded
    half.mkdir()
    train(one(), "tied", last=HALF, save=half)
    found = {}
    for n in LAYOUTS:
        run_ranks("test_parallel.worker", out / str(n), n)
        found |= torch.load(out / str(n) / "seen0.pt", weights_only=True)
    for half in sorted(out.glob("half-*")):
        found[1, "ddp", 1, half.name] = train(one(), "tied", first=HALF, load=half, seed=8)
    return found


@functools.cache
def alone(kind):
    """The same updates in this process, undisturbed."""
    return train(one(), kind)


def test_tensor_parallelism_adds_up_four_times_a_block(seen):
    """Attention and feed-forward, forward and backward: one all-reduce each, as in Megatron-LM (two blocks here)."""
    assert seen["all-reduces"] == 4 * 2


def test_the_bubble_of_a_pipeline_by_counting():
    """p stages, m micro-batches, each stage one at a time and after the stage before it: (p - 1) / (m + p - 1) of the time is idle."""
    for p, m in ((2, 2), (4, 4), (4, 16), (8, 64)):
        done = {}
        for i in range(m):
            for stage in range(p):
                done[i, stage] = 1 + max(done.get((i, stage - 1), 0), done.get((i - 1, stage), 0))
        total = max(done.values())
        assert (total - m) / total == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("n", LAYOUTS)
def test_our_ddp_equals_torchs_to_1e_6_with_more_ranks(seen, n):
    """Of the largest number in each gradient: gloo adds up in an order that depends on where a bucket begins. With two ranks to the bit."""
    assert all(apart < 1e-6 and norm > 1e-3 for apart, norm in seen[n, "torch"]) and (n > 2 or all(apart == 0 for apart, _ in seen[n, "torch"]))


def assert_mixed(got, want, kind):
    """16-bit products in blocks that were gathered in 16 bits: as one process under autocast, to 1e-2. What one process's slice makes
    overflow in fp16 is left out by all."""
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-2) and got["losses"] != alone("tied")["losses"]
    assert [math.isfinite(norm) for norm in got["norms"]] == [math.isfinite(norm) for norm in want["norms"]] == [True, kind != "float16", True, True]
    assert [a for a in got["norms"] if math.isfinite(a)] == pytest.approx([b for b in want["norms"] if math.isfinite(b)], rel=1e-2)
    assert {t.dtype for t in got["state"].values()} == {torch.float32} and all(t.isfinite().all() for t in got["state"].values())


@pytest.mark.parametrize("n, parallel_, tp, kind", CASES)
def test_a_model_in_slices_trains_as_a_whole_one(seen, n, parallel_, tp, kind):
    """Losses and gradient norms to 1e-5, with two micro-batches an update and gradients that travel with the last one only: tied
    and separate embeddings, a reward model, LoRA with its frozen weights, recomputed activations."""
    got, want = seen[n, parallel_, tp, kind], alone(kind)
    if "float" in kind:
        return assert_mixed(got, want, kind)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5) and got["norms"] == pytest.approx(want["norms"], rel=1e-5)
    assert largest_difference(got["state"], want["state"]) < 1e-4                     # Adam divides by gradients near zero
    assert want["losses"][0] - want["losses"][-1] > 1e-3 or kind == "reward"


@pytest.mark.parametrize("n, parallel_, tp", [(1, "ddp", 1), *((n, *layout) for n in LAYOUTS for layout in LAYOUTS[n])])
def test_a_checkpoint_of_any_layout_is_resumed_by_any_other(seen, n, parallel_, tp):
    """Written by 1 process, by 2 with fsdp or tp, …; resumed by 1 (no process group at all), 2 and 4: the losses of the undisturbed run."""
    halves = {key[3]: run for key, run in seen.items() if key[:3] == (n, parallel_, tp) and key[3].startswith("half")}
    assert {"half-1-ddp-1", "half-2-fsdp-1", "half-2-ddp-2"} <= halves.keys() if n != 2 else "half-2-fsdp-1" in halves
    for name, run in halves.items():
        assert run["losses"] == pytest.approx(alone("tied")["losses"][HALF:], rel=1e-5), name
        assert largest_difference(run["state"], alone("tied")["state"]) < 1e-4, name


# ---- the four scripts ----------------------------------------------------------------------------------------------

RUNS = {"pretrain": ("fsdp", "tp"), "sft": ("fsdp", "tp"), "rm": ("fsdp", "tp"), "dpo": ("fsdp", "tp"), "sft-lora": ("fsdp",), "dpo-lora": ("fsdp",)}
FLAGS = {"fsdp": {"parallel": "fsdp"}, "tp": {"tp": 2}, "alone": {}}
EXTRA = {"sft-lora": {"merge_on_save": True, "lora_dropout": 0.0}, "pretrain": {"save_every": 2, "keep": 0, "activation_checkpointing": True}}


def scripts_worker(out):
    """Each script in each layout, one after the other in one group."""
    torch_dist.init_process_group("gloo")
    contexts, finish = [], dist.finish
    dist.finish = contexts.append
    if int(os.environ["RANK"]) == 0:
        write_world(out / "world")
    torch_dist.barrier()
    for variant, layouts in RUNS.items():
        for layout in layouts:
            start(variant, out / "world", out / f"{variant}-{layout}", **EXTRA.get(variant, {}), **FLAGS[layout])
    finish(contexts[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with the runs of two processes, and beside them those of this one."""
    out = tmp_path_factory.mktemp("runs")
    run_ranks("test_parallel.scripts_worker", out)
    for variant in RUNS:
        start(variant, out / "world", out / f"{variant}-alone", **EXTRA.get(variant, {}))
    return out


@pytest.mark.parametrize("variant, layout", [(variant, layout) for variant, layouts in RUNS.items() for layout in layouts])
def test_every_script_runs_in_slices(runs, variant, layout):
    """--parallel fsdp and --tp 2: the metrics of one process to 1e-5, validation with its uneven batches and the samples, too; the
    checkpoint holds whole weights under plain names."""
    got, want = metrics(runs / f"{variant}-{layout}"), metrics(runs / f"{variant}-alone")
    assert len(got) == len(want) and len(train_lines(got)) == 3
    for a, b in zip(got, want):
        assert a.get("samples") == b.get("samples")
        ties = {"val/accuracy", "train/accuracy"} if variant == "dpo" and a["step"] < 2 else set()      # policy = reference: rounding decides
        for key in b.keys() - ties:
            if key.startswith(("train/", "val/")) or key in ("grad_norm", "lr", "tokens"):
                small = 1e-5 if "reward" in key or "margin" in key else 1e-6       # beta * the difference of two sums of -150
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=small), (key, a["step"])
    assert largest_difference(weights(runs / f"{variant}-{layout}"), weights(runs / f"{variant}-alone")) < 1e-4
    if variant == "sft-lora":
        assert largest_difference(weights(runs / f"{variant}-{layout}" / "merged"), weights(runs / f"{variant}-alone" / "merged")) < 1e-4


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_plain_python_goes_on_from_a_run_in_slices(runs, layout):
    """--resume of step 2 of two processes' run, in this one process without torchrun."""
    start("pretrain", runs / "world", runs / f"on-{layout}", resume=str(runs / f"pretrain-{layout}" / "step_00000002"), **EXTRA["pretrain"])
    assert largest_difference(weights(runs / f"on-{layout}"), weights(runs / "pretrain-alone")) < 1e-4
    assert train_lines(metrics(runs / f"on-{layout}"))[-1]["train/loss"] == pytest.approx(train_lines(metrics(runs / "pretrain-alone"))[-1]["train/loss"], rel=1e-5)
