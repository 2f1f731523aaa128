"""The planner: parameters, memory, steps and hours that it prints, against what is really there."""
import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tomllib
import types

import pytest
import torch

import train_pretrain
from conftest import ROOT, tiny_tokenizer
from nanollm import config, plan
from nanollm.losses import cross_entropy, linear_cross_entropy
from nanollm.model import KVCache, ModelArgs, parameter_count
from nanollm.optim import make_optimizer
from nanollm.sampler import Sampler
from nanollm.tools import scaling
from nanollm.variants import build

NOTES = sorted((ROOT / "configs" / "notes").glob("*.toml"))
SMALL = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=500, multiple_of=8, max_seq_len=48, tie_embeddings=False)


def planned(capsys, *words):
    """What `python -m nanollm.plan WORDS` prints."""
    plan.main(config.parse(plan.Config, list(words)))
    return capsys.readouterr().out


def lines_with(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


# ---- memory: what is counted, tensor by tensor ------------------------------------------------------------------------


def step_of(args, rows, dtype=torch.float32, optimizer="adamw", checkpointing=False, mask=False, seed=0):
    """One training step -> (bytes of weights, gradients, optimizer states, activations), counted: the activations are the storages
    that autograd keeps when the forward pass ends, each once, parameters and buffers aside, and the chunked loss's gradient
    with respect to the hidden states."""
    torch.manual_seed(seed)
    model = build(args).train()
    model.checkpointing = checkpointing
    tokens = torch.randint(0, args.vocab_size, (rows, args.max_seq_len))
    segments = torch.ones_like(tokens) if mask else None
    autocast = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with autocast:
        (loss, _, _), held = plan.kept_by_autograd(
            model, lambda: model(tokens, segments, head=lambda h, output: linear_cross_entropy(h, output.weight, tokens)))
    held += loss.grad_fn.kept[0].nbytes
    loss.backward()
    adam = make_optimizer(model, optimizer)
    adam.step()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = sum(t.nbytes for state in adam.state.values() for t in state.values() if t.dim())
    return sum(p.nbytes for p in model.parameters()), gradients, states, held


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"attention": "naive"}, {"n_layers": 1, "dim": 128, "hidden_dim": 96}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_the_formula_for_activations_is_what_autograd_keeps(changes, dtype, mask):
    """To within 1 %: so that a change of the model that keeps more or less shows here, and the plan cannot rot."""
    args = ModelArgs(**SMALL | changes)
    *_, held = step_of(args, 4, dtype, mask=mask)
    assert plan.activations(args, 4, dtype, mask=mask, device="cpu") == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"attention": "naive"}], ids=str)
def test_the_formula_for_a_gpu_is_that_of_the_plain_path(changes, dtype, monkeypatch):
    """A GPU runs the plain formulas, attention in the compute type. The CPU can be made to: by_hand off, and attention not told
    of autocast. (The fused kernels keep the same tensors on both.)"""
    args = ModelArgs(**SMALL | changes)
    monkeypatch.setattr("nanollm.model.by_hand", lambda x: False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False)
    model, tokens = build(args).train(), torch.randint(0, args.vocab_size, (4, args.max_seq_len))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        _, held = plan.kept_by_autograd(model, lambda: model.hidden(tokens))
    d_hidden = 4 * args.dim * tokens.numel()
    assert plan.activations(args, 4, dtype) == pytest.approx(held + d_hidden, rel=0.01)


SHAPES = {"wide vocabulary": (ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=20_000, max_seq_len=64), 4),
          "deep": (ModelArgs(dim=96, n_layers=8, n_heads=4, vocab_size=600, max_seq_len=64, tie_embeddings=False), 2),
          "long rows": (ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=600, max_seq_len=512), 8)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_four_parts_of_memory_are_what_the_tensors_add_up_to(name, optimizer):
    """Weights, gradients and optimizer states to the byte, activations and the sum to within 10 % (they come to 1 %)."""
    args, rows = SHAPES[name]
    weights, gradients, states, held = step_of(args, rows, optimizer=optimizer)
    m = plan.memory(args, rows, optimizer=optimizer, device="cpu")
    assert (m["weights"], m["optimizer"]) == (weights, states)
    assert gradients == m["gradients"]
    assert m["activations"] == pytest.approx(held, rel=0.1)
    assert m["weights"] + m["gradients"] + m["optimizer"] + m["activations"] == pytest.approx(weights + gradients + states + held, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_working_part_is_what_the_loss_allocates_at_its_peak(dtype):
    """Two chunks of 4,096 tokens, a GPU's, one after the other: above the gradients that stay, one chunk's logits and log-probabilities
    are there at once, and under autocast the 16-bit weight and its gradient. Counted allocation by allocation, to 10 %."""
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=2000, max_seq_len=1024)
    hidden, weight = torch.randn(8, 1024, 16, requires_grad=True), torch.nn.Parameter(torch.randn(2000, 16))
    tokens = torch.randint(0, 2000, (8, 1024))
    memory = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with memory, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss, _, _ = linear_cross_entropy(hidden, weight, tokens, chunk=4096)
    changes = [event.nbytes() for event in memory.profiler.kineto_results.events() if event.name() == "[memory]"]
    stay = sum(kept.nbytes for kept in loss.grad_fn.kept[:2])
    assert max(itertools.accumulate(changes)) - stay == pytest.approx(plan.working(args, 8, dtype, 1, "ddp", False), rel=0.1)


def test_checkpointing_keeps_the_blocks_inputs_and_the_insides_of_one():
    """What autograd keeps is the inputs; the plan adds one block's insides, which exist again during the backward pass."""
    args = ModelArgs(**SMALL)
    *_, held = step_of(args, 4, checkpointing=True)
    insides = 4 * args.max_seq_len * sum(plan.block_activations(args, torch.float32, "cpu").values())
    assert plan.activations(args, 4, torch.float32, checkpointing=True, device="cpu") == pytest.approx(held + insides, rel=0.02)
    assert held < plan.activations(args, 4, torch.float32, device="cpu") / 3


RSS = """
import re, sys, torch
from nanollm.losses import cross_entropy, linear_cross_entropy
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import make_optimizer
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status", encoding="utf-8").read())[1]) * 1024
def train(args, rows, steps):
    model = Transformer(args).train()
    optimizer = make_optimizer(model)
    for _ in range(steps):
        tokens = torch.randint(0, args.vocab_size, (rows, args.max_seq_len))
        loss, count, _ = model(tokens, head=lambda h, output: linear_cross_entropy(h, output.weight, tokens))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
train(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=32, max_seq_len=8), 1, 1)
before = peak()
train(ModelArgs(**eval(sys.argv[1])), int(sys.argv[2]), 3)
print(peak() - before)
"""
LARGE = {"wide vocabulary": (dict(dim=256, n_layers=2, n_heads=4, vocab_size=30_000, max_seq_len=128), 4),
         "many weights": (dict(dim=512, n_layers=6, n_heads=8, vocab_size=2_000, max_seq_len=64), 2),
         "long rows": (dict(dim=128, n_layers=4, n_heads=4, vocab_size=1_000, max_seq_len=512), 12)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", LARGE)
def test_the_plan_is_near_the_memory_that_a_process_really_takes(name):
    """Peak resident memory of a fresh process, above what it held after one step of a tiny model (PyTorch itself is 200 to 300
    MB): within 35 % of what the plan says a process will hold."""
    shape, rows = LARGE[name]
    out = subprocess.run([sys.executable, "-c", RSS, repr(shape), str(rows)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert out.returncode == 0, out.stderr
    assert plan.memory(ModelArgs(**shape), rows, device="cpu")["total"] * plan.HEAP == pytest.approx(int(out.stdout), rel=0.35)


# ---- what is printed --------------------------------------------------------------------------------------------------


def test_the_notes_two_examples_of_steps(capsys):
    """1,280,000 rows: 32 a GPU on 4 GPUs are 10,000 updates; 16 rows, 4 micro-batches a GPU, 4 GPUs are 5,000. The notes count
    accumulation per rank, our flag counts all ranks: 4 x 4 = 16."""
    shape = ["--vocab_size", "1000", "--dataset_rows", "1280000", "--gpus", "4"]
    assert "= 10,000 updates an epoch" in planned(capsys, *shape, "--batch_size", "32", "--gradient_accumulation_steps", "4")
    per_rank = planned(capsys, *shape, "--batch_size", "16", "--accumulation_per_rank", "4")
    assert "1,280,000 / (16 x 4 x 4) = 5,000 updates an epoch" in per_rank
    assert per_rank == planned(capsys, *shape, "--batch_size", "16", "--gradient_accumulation_steps", "16")
    assert plan.steps(1_280_000, 32, 4) == 10_000 and plan.steps(1_280_000, 16, 16) == 5_000
    assert "= 65,536 tokens" in planned(capsys, *shape, "--batch_size", "16", "--accumulation_per_rank", "2", "--max_seq_len", "512")


@pytest.mark.parametrize("rows, batch, G, epochs", [(100, 8, 1, 1.0), (101, 8, 2, 1.0), (1000, 16, 4, 2.5), (3, 8, 1, 0.1)])
def test_planned_steps_are_the_samplers(rows, batch, G, epochs):
    """What the training loop will count, the last, smaller update included."""
    one = types.SimpleNamespace(rank=0, world_size=1)
    assert plan.steps(rows, batch, G, epochs) == Sampler(rows, one, batch, G, 0, epochs).steps(0)


def test_chinchilla_is_20_tokens_a_parameter(capsys):
    """0.1 B parameters want 2 B tokens, not the 20 B of the notes."""
    text = planned(capsys, "--dim", "512", "--n_layers", "12", "--n_heads", "8", "--vocab_size", "64793", "--no_tie_embeddings")
    assert "parameters    104.31 M" in text and "20 tokens a parameter: 2.09 B tokens" in text
    assert 20 * 0.1e9 == 2e9


def test_hours_follow_from_flops_peak_and_utilisation(capsys):
    """tokens x FLOPs a token / (GPUs x peak x MFU)."""
    words = ["--vocab_size", "1000", "--hardware", "h100", "--batch_size", "100", "--max_seq_len", "100"]
    args = ModelArgs(dim=128, n_layers=4, n_heads=4, vocab_size=1000, max_seq_len=100)
    seconds = 1e10 * plan.flops_per_token(plan.on_meta(args), 100) / (2 * 989e12 * 0.4)
    assert plan.duration(seconds) in planned(capsys, *words, "--gpus", "2", "--gradient_accumulation_steps", "2", "--max_steps", "500000")
    assert [plan.duration(s) for s in (90, 600, 10_000, 300_000)] == ["90 s", "10.0 min", "2.8 h", "3.5 days"]


def test_zero_and_fsdp_share_out_what_they_say():
    """Rajbhandari et al. 2020, figure 1, in fp32 masters: 16 bytes a parameter; ZeRO-1 on 4 GPUs leaves 10, ZeRO-2 7, ZeRO-3 4.
    Under accumulation whole gradients wait for the last micro-batch."""
    args = ModelArgs(**SMALL)
    P = parameter_count(plan.on_meta(args))["total"]

    def states(how, **more):
        m = plan.memory(args, 1, parallel=how, gpus=4, **more)
        return (m["weights"] + m["gradients"] + m["optimizer"]) / P
    assert [round(states(how), 3) for how in ("ddp", "zero1", "zero2", "fsdp")] == [16, 10, 7, 4]
    assert round(states("fsdp", accumulating=True), 3) == 7
    whole, tp = (plan.memory(args, 4, parallel=how, gpus=4) for how in ("ddp", "tp"))
    assert tp["weights"] < whole["weights"] and tp["activations"] < whole["activations"]


def test_what_does_not_fit_is_said_with_what_would(capsys):
    text = planned(capsys, "--vocab_size", "32000", "--dim", "2048", "--n_layers", "24", "--n_heads", "16", "--max_seq_len", "2048",
                   "--batch_size", "8", "--hardware", "a100_40gb")
    assert "DOES NOT FIT" in text and "warning:" in text and "--activation_checkpointing" in lines_with(text, "warning")[0]
    small = planned(capsys, "--vocab_size", "1000", "--hardware", "t4")
    assert "warning" not in small and ": fits" in small and "float16 compute" in small          # a T4 has no bf16


def test_the_vocabulary_comes_from_the_data_or_is_asked_for(capsys, world):
    text = planned(capsys, "--data", str(world / "tokens"), "--max_seq_len", "64")
    assert f"vocabulary    {tiny_tokenizer().vocab_size:,}, of the tokenizer in" in text and "the data" in text
    with pytest.raises(config.UserError, match="--vocab_size"):
        planned(capsys, "--data", str(world / "nowhere"))
    for words, message in ((["--hardware", "abacus"], "h100"), (["--parallel", "magic"], "zero1"), (["--gpus", "3", "--gradient_accumulation_steps", "4"],
                           "divisible"), (["--dim", "30", "--n_heads", "4"], "RoPE"), (["--optimizer", "sgd"], "muon"), (["--dtype", "int8"], "bfloat16")):
        with pytest.raises(config.UserError, match=message):
            planned(capsys, "--vocab_size", "100", *words)


def test_the_shape_of_a_checkpoint_is_planned_with(capsys, world):
    assert f"vocabulary    {tiny_tokenizer().vocab_size:,}\n" in planned(capsys, "--init_from", str(world / "base"), "--data", str(world / "none"))


def test_a_preset_is_the_first_word_and_what_plays_no_part_is_named(capsys, tmp_path):
    preset = tmp_path / "x.toml"
    preset.write_text('dim = 64\nn_heads = 2\nlearning_rate = 1e-3\n', encoding="utf-8")
    text = planned(capsys, str(preset), "--vocab_size", "300")
    assert "learning_rate play no part here" in text and "vocabulary    300" in text
    assert "a row at the full context of 256" in text


def test_the_planners_defaults_are_the_scripts():
    """So that a preset means the same to both."""
    theirs = {f.name: f for f in dataclasses.fields(train_pretrain.Config)}
    ours = {f.name: getattr(plan.Config(), f.name) for f in dataclasses.fields(plan.Config)}
    own = {"gpus", "hardware", "mfu", "dataset_rows", "accumulation_per_rank"}
    for name in ours.keys() - own - {"data"}:
        assert ours[name] == getattr(train_pretrain.Config(), name), name
    assert ours["data"] == [train_pretrain.Config().data] and own.isdisjoint(theirs)


def test_the_kv_cache_is_two_vectors_a_layer_and_kv_head():
    """And a real cache of 48 tokens has exactly these bytes."""
    args = ModelArgs(**SMALL)
    cache = KVCache()
    build(args).eval()(torch.zeros(2, 48, dtype=torch.long), cache=cache)
    held = sum(t.nbytes for pair in cache.kv.values() for t in pair)
    assert plan.kv_cache(args, torch.float32) * 2 * 48 == held


# ---- the presets of the notes -----------------------------------------------------------------------------------------


def arithmetic(path):
    """The lines of a preset's comment that are computed, for the vocabulary named in its first line."""
    words = re.search(r"nanollm\.plan (.*)", path.read_text(encoding="utf-8"))[1].split()
    cfg = config.parse(plan.Config, [str(path), *words[1:]])
    args = plan.model_args(cfg)
    n, rows = parameter_count(plan.on_meta(args))["total"], cfg.batch_size * cfg.gradient_accumulation_steps
    T, tokens = args.max_seq_len, rows * args.max_seq_len
    gb = [plan.memory(args, cfg.batch_size, torch.bfloat16, checkpointing=c, accumulating=rows > cfg.batch_size)["total"] / 1e9 for c in (False, True)]
    return [f"# = {plan.show(n)} parameters; {cfg.batch_size} rows * {T} tokens * {cfg.gradient_accumulation_steps} micro-batches = {tokens:,} tokens an update",
            f"# = {cfg.max_steps:,} updates = {plan.show(cfg.max_steps * tokens)} tokens; Chinchilla: {plan.show(20 * n)} tokens, {-(-20 * n // tokens):,} updates",
            f"# = {gb[0]:.1f} GB in bfloat16 on one GPU, {gb[1]:.1f} GB with --activation_checkpointing"]


COUNTS = {"baby_llama2_92m": 91.65, "baby_llama2_104m": 104.31, "baby_llama2_218m": 218.16, "zero_chatgpt_159m": 159.41,
          "listing_5_1": 10.81, "gpt2_124m": 124.44, "small_20m": 19.90}


@pytest.mark.parametrize("path", NOTES, ids=lambda p: p.stem)
def test_the_arithmetic_in_a_preset_of_the_notes_is_true(path, capsys):
    """Parameters, tokens an update, Chinchilla's tokens and the memory in its comment are what the plan computes."""
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("# = ")] == arithmetic(path)
    assert f"# = {COUNTS[path.stem]:.2f} M parameters" in text
    assert tomllib.loads(text)["max_steps"]


def test_every_shape_of_the_notes_has_a_preset():
    assert {p.stem for p in NOTES} == set(COUNTS)


# ---- the notes' claims and the scaling law ----------------------------------------------------------------------------


def test_the_notes_arithmetic():
    """What docs/planner.md says is right and wrong, computed."""
    assert [round(x, 2) for x in (10**0.73, 10**0.27, 8**0.74)] == [5.37, 1.86, 4.66] and 3.162**2 == pytest.approx(10, rel=1e-3)
    assert 1e9 * 1e-6 == pytest.approx(1_000) and 1e9 * 1e-5 == pytest.approx(10_000)
    assert 32 * 1023 * 64793 * 4 / 1e9 == pytest.approx(8.48, abs=0.005)                      # logits of [32, 1023, 64793] in fp32
    assert (70e9 * 4 / 1e9, 70e9 * 16 / 1e12, 65e9 * 12 / 1e9, 65e9 * 16 / 1e9) == (280, 1.12, 780, 1040)
    assert 6.7e9 * 2 / 2**30 == pytest.approx(12.48, abs=0.005)                               # OPT-6.7B
    assert 129 * 16 * 6 == 12_384 and 129 * 16 * 6 != 12_392
    args = ModelArgs(dim=512, n_layers=12, n_heads=8, vocab_size=64793, max_seq_len=512, tie_embeddings=False)
    kept = sum(plan.block_activations(args, torch.bfloat16).values())
    assert kept == 28_456 and round(kept / (512 * 2)) == 28                                   # the notes count one of these tensors
    assert sum(plan.block_activations(args, torch.float32, "cpu").values()) == 27_432
    m, P = plan.memory(args, 16, torch.bfloat16), parameter_count(plan.on_meta(args))["total"]
    assert m["weights"] + m["gradients"] + m["optimizer"] == 16 * P                           # weights are a quarter of the states
    states = 16 * P / 1e9
    logits = 16 * 512 * 64793 * (2 + 4 + 4 + 4 + 2) / 1e9          # fp16, its fp32 copy, log-softmax, and the two gradients
    assert states == pytest.approx(1.67, abs=0.01) and 11 < states + m["activations"] / 1e9 + logits < 14         # the notes' 13 GB a card


def test_a_power_law_is_found_again():
    """From exact points the fit returns E, A and alpha; with E given, A and alpha; and a logarithm explains them less well."""
    n = [6_736, 13_944, 39_880, 76_440, 189_112]
    points = [(k, 0.5 + 30 * k**-0.4) for k in n]
    found = scaling.laws(points, floor=0.5)
    free, known, log = found.values()
    assert free[1] == pytest.approx({"E": 0.5, "A": 30, "alpha": 0.4}, rel=1e-3)
    assert known[1] == pytest.approx({"E": 0.5, "A": 30, "alpha": 0.4}, rel=1e-6)
    assert free[0](400_000) == pytest.approx(0.5 + 30 * 400_000**-0.4, rel=1e-4)
    assert scaling.r2(log[0], points) < 0.98 < 0.9999 < scaling.r2(free[0], points)
    assert log[0](1e9) < 0 < 0.5 < free[0](1e9)                                               # it falls through every floor


def test_five_models_predict_a_sixth(tmp_path, world, capsys):
    """The whole tool on a corpus of a few stories: runs, fits, prediction, JSON and picture; not the demo's text, so no floor."""
    preset = tmp_path / "recipe.toml"
    preset.write_text('rows = "documents"\nn_layers = 1\nmultiple_of = 8\nmax_seq_len = 32\nbatch_size = 2\nwarmup_steps = 1\neval_every = 4\n'
                      'save_every = 4\neval_batches = 2\n', encoding="utf-8")
    cfg = scaling.Config(data=str(world / "tokens"), preset=str(preset), out_dir=str(tmp_path / "out"), sizes=["1x8", "1x16", "1x24"], predict="1x32",
                         max_steps=4, jobs=2)
    scaling.main(cfg)
    result = json.loads((tmp_path / "out" / "scaling.json").read_text(encoding="utf-8"))
    assert set(result["points"]) == {"1x8", "1x16", "1x24"} and result["floor"] is None and result["sixth"]["N"] > result["points"]["1x24"]["N"]
    for law in result["laws"].values():
        assert law["error"] == pytest.approx(law["prediction"] / result["sixth"]["loss"] - 1)
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG") and "error of each prediction" in capsys.readouterr().out


def test_scaling_refuses_sizes_that_predict_nothing():
    for bad, message in ((dict(predict="2x16"), "larger"), (dict(sizes=["2x16"]), "three"), (dict(sizes=["2x16", "2by24", "2x40"]), "LAYERSxWIDTH"),
                         (dict(sizes=["2x16", "2x30", "2x40"]), "8 divides")):
        with pytest.raises(config.UserError, match=message):
            scaling.main(scaling.Config(**bad))


@pytest.mark.parametrize("page", ["docs/planner.md", "docs/zh/planner.md"])
def test_the_tables_of_the_page_are_computed(page):
    """Memory of the notes' 12 layers on four cards, the presets and the bytes of a block, as the page quotes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    args = ModelArgs(dim=512, n_layers=12, n_heads=8, vocab_size=64793, max_seq_len=512, tie_embeddings=False)
    for how, checkpointing, name in (("ddp", False, "ddp"), ("ddp", True, "ddp + checkpointing"), ("zero1", False, "zero1"),
                                     ("fsdp", False, "fsdp (ZeRO-3)"), ("tp", False, "tp"), ("pipeline", False, "pipeline")):
        m = plan.memory(args, 16, torch.bfloat16, parallel=how, gpus=4, checkpointing=checkpointing, accumulating=True)
        assert f"| {name} | " + " | ".join(f"{b / 1e9:.2f}" for b in m.values()) + " |" in text
    gpu, cpu = plan.block_activations(args, torch.bfloat16), plan.block_activations(args, torch.float32, "cpu")
    for a, b in (*zip(gpu.values(), cpu.values()), (sum(gpu.values()), sum(cpu.values()))):
        assert re.search(rf"\| {a:,} \|.*\| {b:,} \|", text)
    for path in NOTES:
        first, second, _ = arithmetic(path)
        tokens, best = re.search(r"= ([\d,]+) tokens an update", first)[1], re.search(r"Chinchilla: (.*) tokens,", second)[1]
        assert re.search(rf"`{path.stem}`.* \| {first[4:].split(' parameters')[0]} \| .* \| {tokens} \| {best} \|", text)


@pytest.mark.parametrize("page", ["docs/distributed.md", "docs/zh/distributed.md"])
def test_the_plan_on_the_page_about_many_gpus_is_computed(page):
    """The notes' 218 M shape on four GPUs, whole, in slices of each kind, and cut in pieces."""
    text = (ROOT / page).read_text(encoding="utf-8")
    preset = tomllib.loads((ROOT / "configs" / "notes" / "baby_llama2_218m.toml").read_text(encoding="utf-8"))
    args = ModelArgs(vocab_size=64793, **{f.name: preset[f.name] for f in dataclasses.fields(ModelArgs) if f.name in preset})
    for how, names in (("ddp", "DDP"), ("zero1", "ZeRO-1"), ("fsdp", "FSDP"), ("tp", "tensor parallel|张量并行"), ("pipeline", "pipeline|流水线")):
        m = plan.memory(args, preset["batch_size"], torch.bfloat16, parallel=how, gpus=4, checkpointing=True, accumulating=True)
        assert re.search(rf"\| ({names}) \| " + r" \| ".join(f"{b / 1e9:.2f}" for b in m.values()) + r" \|", text), how


def test_the_bytes_on_the_page_about_the_model_are_counted(monkeypatch):
    """What autograd keeps of a step at dim 512, 8 layers, T 512, batch 4, in MB of 10^6 bytes: one row is counted, times four. With
    the chunked loss nothing that is kept is as long as the vocabulary, so the two columns are one."""
    import nanollm.model
    by_hand, tokens, found = nanollm.model.by_hand, torch.zeros(1, 512, dtype=torch.long), {}
    heads = {"plain": lambda h, output: cross_entropy(output(h), tokens), "chunked": lambda h, output: linear_cross_entropy(h, output.weight, tokens)}
    for vocab, ways in ((6_400, [("autograd", "plain", False), ("hand", "plain", False), ("hand", "chunked", False), ("hand", "chunked", True)]),
                        (64_793, [("autograd", "plain", False), ("hand", "plain", False)])):
        model = build(ModelArgs(dim=512, n_layers=8, n_heads=8, vocab_size=vocab, max_seq_len=512))
        for derivatives, loss, model.checkpointing in ways:
            monkeypatch.setattr(nanollm.model, "by_hand", by_hand if derivatives == "hand" else lambda x: False)
            _, held = plan.kept_by_autograd(model, lambda: model(tokens, head=heads[loss]))
            found.setdefault((derivatives, loss, model.checkpointing), []).append(f"{4 * held / 1e6:,.0f}")
    for page in ("docs/model.md", "docs/zh/model.md"):
        text = (ROOT / page).read_text(encoding="utf-8").split("--activation_checkpointing")[1]
        table = re.findall(r"^\| .* \| ([\d,]+) \| ([\d,]+) \|$", text, re.M)
        assert table[:4] == [(columns[0], columns[-1]) for columns in found.values()]
