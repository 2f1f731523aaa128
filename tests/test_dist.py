"""Two processes do what one does: same gradient, same weights, one synchronisation an update, for every stage's loss.

`worker` runs in two gloo processes and writes what it saw; the tests compare that with one process on the same rows.
"""
import functools
import os
import types

import pytest
import torch
import torch.distributed as torch_dist

import train_dpo
import train_pretrain
import train_rm
import train_sft
from conftest import chats, pairs, run_ranks, stories, tiny_lm, tiny_tokenizer
from nanollm import config, dist
from nanollm.config import UserError
from nanollm.corpus.pack import write_tokens
from nanollm.data import ChatRows, PreferenceRows, TokenFile
from nanollm.losses import IGNORE_INDEX, linear_cross_entropy
from nanollm.model import RewardModel
from nanollm.sampler import Sampler

STAGES = ("pretrain", "sft", "rm", "dpo")
WINDOWS = {"pretrain": 3, "sft": 7, "rm": 7, "dpo": 3}       # rows in the last update: 3 leaves a rank without any in a micro-batch
STEPS, BATCH, G = 5, 2, 4


def one() -> dist.Context:
    return dist.Context(0, 0, 1, torch.device("cpu"), True)


def stage_of(name, folder):
    """(model, loss function of a batch, batches of row numbers, count of a batch) of a stage, its script's own loss."""
    tok = tiny_tokenizer()
    if name == "pretrain":
        write_tokens(folder, "train", stories(60), tok)
        data = TokenFile(folder, "train", 48, "stream")
        return tiny_lm(7), train_pretrain.pretrain_loss, data, data.batch, lambda b: (b[1] != IGNORE_INDEX).sum()
    if name == "sft":
        data = ChatRows([(str(i), r) for i, r in enumerate(chats(60))], tok, 64, pack_rows=True)
        return tiny_lm(7), train_sft.sft_loss, data, data.batch, lambda b: (b[1] != IGNORE_INDEX).sum()
    data = PreferenceRows([(str(i), r) for i, r in enumerate(pairs(40))], tok, 64)
    if name == "rm":
        torch.manual_seed(7)
        return (RewardModel(tiny_lm().args), lambda m, *b: train_rm.pair_loss(m, train_rm.Config(center=0.01), *b), data, data.scored_batch,
                lambda b: (b[1] > 0).sum() // 2)
    model = tiny_lm(7)
    reference = tiny_lm(8).requires_grad_(False)
    return (model, lambda m, *b: train_dpo.preference_loss(m, reference, train_dpo.Config(), *b), data, data.batch,
            lambda b: (b[1] != IGNORE_INDEX).any(1).sum() // 2)


def train(name, kind, ctx, folder):
    """STEPS updates of G micro-batches with a ragged last one -> first and last gradient, weights, losses, sync rounds."""
    raw, loss_of, data, batch_of, count_of = stage_of(name, folder)
    if ctx.rank == 1:                                        # another start: the broadcast must undo it
        for p in raw.parameters():
            p.data.mul_(2).add_(1)
    total = (STEPS - 1) * BATCH * G + WINDOWS[name]
    sampler = Sampler(len(data), ctx, BATCH, G, seed=1, epochs=total / len(data))
    assert sampler.steps(0) == STEPS and sampler.total == total
    model = dist.DDP(raw, ctx, bucket_mb=0.01)
    optimizer = (torch.optim.SGD(raw.parameters(), lr=0.1) if kind == "sgd" else torch.optim.AdamW(raw.parameters(), lr=1e-3, betas=(0.9, 0.95)))
    grads, losses = [], []
    for step in range(STEPS):
        batches = [batch_of(rows) for rows in sampler.micro_batches(step)]
        count, loss = ctx.sum(sum(count_of(b) for b in batches)), 0.0
        for i, batch in enumerate(batches):
            model.sync = i == len(batches) - 1
            loss_sum, _, _ = loss_of(model, *batch)
            (loss_sum / count * ctx.world_size).backward()
            loss = loss + loss_sum.detach()
        model.wait()
        grads.append({n: p.grad.clone() for n, p in raw.named_parameters()})
        losses.append((ctx.sum(loss) / count).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"first": grads[0], "last": grads[-1], "weights": raw.state_dict(), "losses": losses, "rounds": model.rounds,
            "buckets": len(model.buckets), "rows": [[r.tolist() for r in sampler.micro_batches(s)] for s in range(STEPS)]}


class Patchy(torch.nn.Module):
    """Uses one layer on even ranks, another on odd ones, a third on none."""

    def __init__(self):
        super().__init__()
        self.even, self.odd, self.never = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x, rank):
        return (self.odd if rank % 2 else self.even)(x)


def beside_torchs(ctx, micro):
    """One update of our DDP and of torch's, of `micro` micro-batches -> largest difference (of a gradient's largest number), norm, our DDP, last rows."""
    ours, theirs = (tiny_lm(ctx.rank) for _ in range(2))
    ours, theirs = dist.DDP(ours, ctx, bucket_mb=0.01), torch.nn.parallel.DistributedDataParallel(theirs)
    for i in range(micro):
        x = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(10 * ctx.rank + i))
        ours.sync = theirs.require_backward_grad_sync = i == micro - 1
        for m in (ours, theirs):
            m(x).logsumexp(-1).square().mean().backward()
    ours.wait()
    apart = max(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in zip(ours.parameters(), theirs.parameters()))
    return apart, sum(p.grad.norm() for p in ours.parameters()).item(), ours, x


def worker(out):
    """Everything that needs two processes, in one start of them."""
    ctx = dist.init("cpu")
    seen = {}
    for name in STAGES:
        for kind in ("sgd", "adamw"):
            folder = out / f"{name}{ctx.rank}"
            folder.mkdir(exist_ok=True)
            seen[name, kind] = train(name, kind, ctx, folder)

    for micro in (1, 3):
        seen["torch", micro], seen["norm", micro], ours, x = beside_torchs(ctx, micro)

    # gradients are views into the buckets, also those that waited for the last micro-batch
    spans = [(flat.data_ptr(), flat.data_ptr() + 4 * flat.numel()) for flat in ours.flats]
    inside = lambda: all(any(a <= p.grad.data_ptr() < b for a, b in spans) for p in ours.parameters())
    seen["views"] = [inside()]
    ours.zero_grad()
    for ours.sync in (False, True):
        ours(x).square().mean().backward()
        seen["views"].append(inside())
    ours.wait()
    seen["views"].append(inside())

    # one flipped bit on one rank, seen by both
    dist.check_replicas(ours, ctx)
    if ctx.rank == 1:
        next(ours.parameters()).data.view(torch.int32)[0, 0] ^= 1
    try:
        dist.check_replicas(ours, ctx)
    except UserError as e:
        seen["replicas"] = str(e)

    # validation batches: each once, the same number of forward passes on both ranks
    seen["share"] = [ctx.share([[i] for i in range(n)]) for n in (0, 1, 4, 5)]

    # parameters without gradient, other ones on each rank
    torch.manual_seed(0)
    model = dist.DDP(Patchy(), ctx, bucket_mb=1e-6)
    for _ in range(2):
        model(torch.ones(2, 4), ctx.rank).sum().backward()
        model.wait()
        seen["patchy"] = {n: p.grad.clone() for n, p in model.module.named_parameters()}
        model.zero_grad()

    # a buffer and frozen parameters are broadcast as well
    frozen = torch.nn.BatchNorm1d(3)
    frozen.running_mean += ctx.rank
    frozen.weight.requires_grad_(False).add_(ctx.rank)
    dist.DDP(frozen, ctx)
    seen["frozen"] = (frozen.running_mean.tolist(), frozen.weight.tolist())

    # an infinite gradient on one rank is an infinite gradient on all
    layer = torch.nn.Linear(2, 1)
    model = dist.DDP(layer, ctx)
    (model(torch.ones(1, 2)).sum() * (float("inf") if ctx.rank == 1 else 1.0)).backward()
    model.wait()
    seen["inf"] = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0).item()

    seen["sum"] = (ctx.sum(ctx.rank + 1).item(), ctx.sum(torch.tensor([1.5, ctx.rank])).tolist())
    seen["gather"] = ctx.gather({"rank": ctx.rank})
    if ctx.rank == 1:
        ctx.interrupted.append(2)                            # Ctrl-C reached one rank only
    seen["stop"] = ctx.stop_requested()
    ctx.barrier()
    torch.save(seen, out / f"seen{ctx.rank}.pt")
    ctx.interrupted.clear()
    dist.finish(ctx)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of the two ranks saw."""
    out = tmp_path_factory.mktemp("two")
    run_ranks("test_dist.worker", out)
    return [torch.load(out / f"seen{r}.pt", weights_only=True) for r in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training in this process."""
    return {(n, k): train(n, k, one(), tmp_path_factory.mktemp(n)) for n in STAGES for k in ("sgd", "adamw")}


def difference(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_give_the_gradient_of_one(two, alone, name):
    """fp32, 1e-6, with four micro-batches an update, counts that differ between ranks and a ragged last window of 7 or 3
    rows (one rank then has an empty micro-batch)."""
    want = alone[name, "sgd"]
    assert sum(map(len, want["rows"][-1])) == WINDOWS[name]
    for seen in two:
        got = seen[name, "sgd"]
        assert difference(got["first"], want["first"]) < 1e-6 and difference(got["last"], want["last"]) < 1e-6
        assert max(g.abs().max() for g in want["last"].values()) > 1e-3              # there is something to compare
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("kind, bound", [("sgd", 1e-6), ("adamw", 1e-5)])
def test_after_five_updates_the_weights_are_those_of_one_process(two, alone, name, kind, bound):
    """Although rank 1 began with other weights: the broadcast at the start."""
    a, b = (seen[name, kind]["weights"] for seen in two)
    assert all(torch.equal(a[k], b[k]) for k in a)                                    # between the ranks: bit for bit
    assert difference(a, alone[name, kind]["weights"]) < bound


@pytest.mark.parametrize("name", STAGES)
def test_exactly_one_synchronisation_an_update(two, alone, name):
    """However many micro-batches; in several buckets; and none at all in one process."""
    for seen in two:
        assert seen[name, "sgd"]["rounds"] == STEPS and seen[name, "sgd"]["buckets"] > 1
    assert alone[name, "sgd"]["rounds"] == 0


def test_a_mean_per_micro_batch_would_give_another_gradient(alone, tmp_path):
    """The comparison has teeth: normalising each micro-batch by its own count, the usual bug, is far off on these rows."""
    model, loss_of, data, batch_of, _ = stage_of("sft", tmp_path)
    for rows in Sampler(len(data), one(), BATCH, G, seed=1).micro_batches(0):
        loss_sum, count, _ = loss_of(model, *batch_of(rows))
        (loss_sum / count / G).backward()
    assert difference({n: p.grad for n, p in model.named_parameters()}, alone["sft", "sgd"]["first"]) > 1e-3


@pytest.mark.parametrize("micro", [1, 3])
def test_our_ddp_equals_torchs(two, micro):
    """To the bit: with two ranks there is one order in which to add two numbers. Also with accumulation."""
    for seen in two:
        assert seen["torch", micro] == 0 and seen["norm", micro] > 1e-3
        assert seen["norm", micro] == two[0]["norm", micro]


def test_gradients_are_views_into_the_buckets(two):
    """What is sent is where the optimizer reads it: nothing is unpacked after a message, and nothing is held twice."""
    for seen in two:
        assert seen["views"] == [True] * 4


def test_replicas_that_have_drifted_apart_are_found_by_all_ranks(two):
    """One bit of one weight is enough."""
    for seen in two:
        assert "process(es) 1 are no longer copies" in seen["replicas"]


def test_ranks_share_validation_batches_evenly(two):
    """Filled up with empty batches: with sharded weights a forward pass that only some ranks make would hang."""
    for n, a, b in zip((0, 1, 4, 5), two[0]["share"], two[1]["share"]):
        assert len(a) == len(b) and sorted(sum(a + b, [])) == list(range(n))


def test_parameters_unused_on_some_ranks_do_not_hang_and_count_as_zero(two):
    """In torch's DDP this is find_unused_parameters; here it needs no flag."""
    for seen in two:
        grad = seen["patchy"]
        assert (grad["even.weight"] == 1).all() and (grad["odd.weight"] == 1).all()   # (2 rows on one rank + 0 on the other) / 2
        assert (grad["never.weight"] == 0).all()


def test_buffers_and_frozen_parameters_start_equal(two):
    assert two[0]["frozen"] == two[1]["frozen"] == ([0, 0, 0], [1, 1, 1])


def test_an_infinite_gradient_on_one_rank_is_seen_by_all(two):
    """So that all skip the update, or none."""
    assert not any(torch.isfinite(torch.tensor(seen["inf"])) for seen in two)


def test_sums_gathers_and_stop_requests_reach_every_rank(two):
    for seen in two:
        assert seen["sum"] == (3, [3.0, 1.0]) and seen["gather"] == [{"rank": 0}, {"rank": 1}] and seen["stop"] is True


def test_one_process_needs_no_group():
    ctx = one()
    assert ctx.sum(3).item() == 3 and ctx.gather("x") == ["x"] and ctx.stop_requested() is False
    model = dist.DDP(torch.nn.Linear(2, 1), ctx)
    model(torch.ones(1, 2)).sum().backward()
    model.wait()
    assert model.buckets == [] and not torch_dist.is_initialized()
    value = torch.ones(2)
    assert ctx.sum(value) is not value                       # a copy in both worlds: += on it never changes the argument


def cuda(monkeypatch, major, minor):
    """Pretend to be a machine with a GPU of this compute capability, on which bf16 tensors can be created (emulated)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d=0: types.SimpleNamespace(major=major, minor=minor))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=0: (major, minor))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda d: True)


@pytest.mark.parametrize("gpu, capability, dtype", [("V100", (7, 0), torch.float16), ("T4", (7, 5), torch.float16),
                                                    ("A100", (8, 0), torch.bfloat16), ("H100", (9, 0), torch.bfloat16)])
def test_auto_dtype_is_bf16_only_where_the_gpu_has_it(monkeypatch, gpu, capability, dtype):
    """V100 and T4 emulate bf16 at a fraction of the speed: fp16 with the GradScaler there."""
    cuda(monkeypatch, *capability)
    assert dist.choose_dtype("auto", torch.device("cuda")) == dtype


def test_the_dtype_asked_for_is_taken_or_refused():
    cpu = torch.device("cpu")
    assert dist.choose_dtype("auto", cpu) == dist.choose_dtype("auto", torch.device("mps")) == torch.float32
    assert dist.choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert dist.choose_dtype("float16", cpu) == torch.float16             # slow there, but one can watch the scaler
    with pytest.raises(UserError, match="--dtype fp8 is unknown"):
        dist.choose_dtype("fp8", cpu)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device, says in [("cuda", "no CUDA device"), ("mps", "no Apple GPU"), ("gpu", "is no device")]:
        with pytest.raises(UserError, match=says):
            dist.init(device)


def test_an_impossible_layout_is_refused_before_anyone_waits(monkeypatch):
    """Each in one sentence that says what to start instead."""
    for env, options, says in [
            ({"WORLD_SIZE": "2"}, {}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start with torchrun"),
            ({}, {"parallel": "zero"}, "--parallel zero is unknown; use ddp, fsdp or none"),
            ({}, {"tp": 2}, "1 process.es. do not split into groups of 2"),
            ({"NANOLLM_TIMEOUT": "soon"}, {}, "NANOLLM_TIMEOUT is 'soon': give a number of seconds")]:
        with monkeypatch.context() as m:
            for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                m.delenv(key, raising=False)
            for key, value in env.items():
                m.setenv(key, value)
            with pytest.raises(UserError, match=says):
                dist.init("cpu", **options)
    world = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, value in world.items():
        monkeypatch.setenv(key, value)
    for options in ({"parallel": "none"}, {"tp": 2}, {"parallel": "none", "tp": 2}):
        with pytest.raises(UserError, match="leaves no work for 4 processes: use --parallel fsdp"):
            dist.init("cpu", **options)
    with pytest.raises(UserError, match="do not split into groups of 3"):
        dist.init("cpu", parallel="fsdp", tp=3)


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    """--device cuda:0 under torchrun: the processes would share one GPU and its memory, and NCCL would fail later."""
    cuda(monkeypatch, 8, 0)
    with pytest.raises(UserError, match="--device cuda:0 would put all 4 processes of this machine on one GPU; use --device cuda$"):
        dist.choose_device("cuda:0", 0, 4)


def test_processes_share_the_cores(monkeypatch):
    """torchrun sets OMP_NUM_THREADS=1 where nobody has chosen; half the cores each is better. A choice is left alone."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for local_size, chosen in (("2", "1"), ("2", "3"), ("16", "1"), ("1", "1")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_size)
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
        dist.finish(dist.init("cpu"))
    assert threads == [4, 1]


def test_an_error_of_a_collective_becomes_a_sentence_with_its_likely_cause():
    """As gloo, the store and NCCL word them; any other RuntimeError stays what it is."""
    for text, says in [("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:59293.", "it has ended"),
                       ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete", "it hangs"),
                       ("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error", "it hangs")]:
        assert says in config.unanswered(RuntimeError(text))
    assert "--master_addr" in config.unanswered(torch_dist.DistNetworkError("The client socket has timed out while trying to connect to (192.0.2.1, 1)"))
    assert config.unanswered(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")) is None


def test_autocast_keeps_master_weights_and_gradients_in_fp32():
    model, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with dist.autocast(torch.device("cpu"), torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and model.weight.dtype == model.weight.grad.dtype == torch.float32
    with dist.autocast(torch.device("cpu"), torch.float32):
        assert model(x).dtype == torch.float32


def test_compile_falls_back_with_one_line(monkeypatch, capsys):
    """No compiler on the machine: the run goes on, and says so."""
    def broken(*a, **k):
        raise RuntimeError("no C++ compiler\nlong story")
    monkeypatch.setattr(torch, "compile", broken)
    model = torch.nn.Linear(1, 1)
    assert dist.compiled(model, True) is model
    assert capsys.readouterr().out == "warning: --compile has no effect: RuntimeError, no C++ compiler\n"
    assert dist.compiled(model, False) is model


def test_compile_changes_no_result():
    """Compiled in place: same tree, same names, same loss and gradients; an answer with a cache does not run into it."""
    from nanollm.generate import generate
    torch._dynamo.reset()
    model, plain = tiny_lm(n_layers=1), tiny_lm(n_layers=1)
    assert dist.compiled(model, True) is model and str(model) == str(plain) and model.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(0, 300, (3, 33), generator=torch.Generator().manual_seed(0))
    losses = [linear_cross_entropy(m.hidden(ids[:, :-1]), m.output.weight, ids[:, 1:])[0] for m in (model, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert difference(*({n: p.grad for n, p in m.named_parameters()} for m in (model, plain))) < 1e-4
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert list(generate(model, [1, 2, 3], 4, temperature=0)) == list(generate(plain, [1, 2, 3], 4, temperature=0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_compile_never_recompiles_after_warm_up(monkeypatch):
    """Two rounds over everything a run does: full and ragged batches, with segments and without, activation checkpointing, validation
    without gradients, a new lambda as head each time. The first round may compile, the second may not, although it has a batch shape
    more. (Which graphs there are is decided before the code generator, so the test leaves that out.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = dist.compiled(tiny_lm(n_layers=1), True)
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0))
    segments = torch.arange(32).expand(4, 32) // 20

    def losses(shapes):
        found = []
        for rows in shapes:
            x, y = ids[:rows, :-1], ids[:rows, 1:]
            for s in (None, segments[:rows]):
                for model.checkpointing in (False, True) if s is None else (False,):
                    loss, _, _ = model.train()(x, s, head=lambda h, output: linear_cross_entropy(h, output.weight, y))
                    loss.backward()
                    found.append(loss.item())
                with torch.no_grad():
                    found.append(model.eval()(x, s, head=lambda h, output: linear_cross_entropy(h, output.weight, y))[0].item())
        return found

    first = losses((4, 3))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert losses((4, 3, 2))[: len(first)] == pytest.approx(first, rel=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 1


def test_finish_gives_ctrl_c_back(monkeypatch):
    """After a run in a notebook, Ctrl-C is the notebook's again; a stopped run ends with code 130."""
    import signal
    before = signal.getsignal(signal.SIGINT)
    ctx = dist.init("cpu")
    assert signal.getsignal(signal.SIGINT) is not before
    os.kill(os.getpid(), signal.SIGTERM)
    assert ctx.stop_requested()
    with pytest.raises(SystemExit) as stop:
        dist.finish(ctx)
    assert stop.value.code == 130 and signal.getsignal(signal.SIGINT) is before
