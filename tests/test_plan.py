"""The planner: parameters, memory, steps and hours that it prints, against what is really there."""
import contextlib
import dataclasses
import re
import subprocess
import sys
import tomllib

import pytest
import torch

import train_pretrain
from conftest import ROOT, tiny_tokenizer
from nanollm import config, plan
from nanollm.losses import linear_cross_entropy
from nanollm.model import ModelArgs, Transformer, parameter_count
from nanollm.optim import make_optimizer

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
    model = Transformer(args).train()
    model.checkpointing = checkpointing
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    tokens = torch.randint(0, args.vocab_size, (rows, args.max_seq_len))
    segments = torch.ones_like(tokens) if mask else None
    autocast = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _, _ = model(tokens, segments, head=lambda h, output: linear_cross_entropy(h, output.weight, tokens))
        held = sum(kept.values()) + loss.grad_fn.kept[0].nbytes
    with autocast:
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
    assert plan.activations(args, 4, dtype, mask=mask) == pytest.approx(held, rel=0.01)


SHAPES = {"wide vocabulary": (ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=20_000, max_seq_len=64), 4),
          "deep": (ModelArgs(dim=96, n_layers=8, n_heads=4, vocab_size=600, max_seq_len=64, tie_embeddings=False), 2),
          "long rows": (ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=600, max_seq_len=512), 8)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_four_parts_of_memory_are_what_the_tensors_add_up_to(name, optimizer):
    """Weights, gradients and optimizer states to the byte, activations and the sum to within 10 % (they come to 1 %)."""
    args, rows = SHAPES[name]
    weights, gradients, states, held = step_of(args, rows, optimizer=optimizer)
    m = plan.memory(args, rows, optimizer=optimizer)
    assert (m["weights"], m["optimizer"]) == (weights, states)
    assert gradients in (m["gradients"], 0) or optimizer == "muon"                  # Muon's step gives the blocks' gradients back
    assert m["activations"] == pytest.approx(held, rel=0.1)
    assert m["weights"] + m["gradients"] + m["optimizer"] + m["activations"] == pytest.approx(2 * weights + states + held, rel=0.1)


def test_checkpointing_keeps_the_blocks_inputs_and_the_insides_of_one():
    """What autograd keeps is the inputs; the plan adds one block's insides, which exist again during the backward pass."""
    args = ModelArgs(**SMALL)
    *_, held = step_of(args, 4, checkpointing=True)
    insides = 4 * args.max_seq_len * sum(plan.block_activations(args, torch.float32).values())
    assert plan.activations(args, 4, torch.float32, checkpointing=True) == pytest.approx(held + insides, rel=0.02)
    assert held < plan.activations(args, 4, torch.float32) / 4


RSS = """
import re, sys, torch
from nanollm.losses import linear_cross_entropy
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
    MB): within 35 % of the plan."""
    shape, rows = LARGE[name]
    out = subprocess.run([sys.executable, "-c", RSS, repr(shape), str(rows)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert out.returncode == 0, out.stderr
    assert plan.memory(ModelArgs(**shape), rows)["total"] == pytest.approx(int(out.stdout), rel=0.35)
