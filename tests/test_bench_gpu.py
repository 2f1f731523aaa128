"""bench/gpu.py is written for a machine that this suite rarely sees: what can be shown without one."""
import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import gpu

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nanollm import dist
from nanollm.config import UserError
from nanollm.losses import LinearCrossEntropy
from nanollm.optim import make_optimizer


def test_without_a_gpu_the_benchmark_says_so_in_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "gpu.py")], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: bench/gpu.py needs a CUDA GPU") and done.stderr.count("\n") == 1


def test_the_benchmark_runs_on_toy_shapes_on_the_cpu(tmp_path, capsys):
    """The very functions that run on a GPU: warm-up, timed steps, the table, the JSON."""
    gpu.main(gpu.Config(device="cpu", tiny=True, modes=["eager"], out=str(tmp_path / "new" / "gpu.json")))
    figures = json.loads((tmp_path / "new" / "gpu.json").read_text(encoding="utf-8"))
    row, other = figures["rows"]
    assert row["shape"] == "toy" and (row["loss"], other["loss"]) == ("chunked", "plain")
    assert row["tokens_per_s"] > 0 and row["attention"] == "flash" and row["planned_bytes"] > 16 * 43_168 and figures["matmul_peak"] > 0
    assert "| toy | chunked | eager | 43,168 | 2 x 64 |" in capsys.readouterr().out


def test_the_shapes_are_the_notes_and_gpt2_s():
    """91.7, 218.2 and 159.4 M parameters as the notes count them; our block of GPT-2's size has 123.6 M, GPT-2 itself 124.5 with its
    vocabulary rounded up to 50,304."""
    counts = {}
    with torch.device("meta"):
        for name, (vocab_size, _, shape) in gpu.SHAPES.items():
            counts[name] = round(gpu.parameter_count(gpu.build(gpu.shape_args(shape, vocab_size)))["total"] / 1e6, 1)
    assert counts == {"baby_llama2_92m": 91.7, "baby_llama2_218m": 218.2, "zero_chatgpt_159m": 159.4, "llama_124m": 123.6, "gpt2_124m": 124.5}


def test_mfu_is_model_flops_over_the_peak():
    """GPT-2's shape at 1,024: 6 * 123.6 M and 12 * 12 * 768 * 1,024 FLOPs a token, so 350,000 tokens/s on 989 TFLOP/s are 30.2 %."""
    row = {"shape": "x", "loss": "plain", "mode": "eager", "parameters": 1, "rows": 1, "T": 1024, "ms_a_step": 1.0, "tokens_per_s": 350_000.0,
           "attention": "flash",
           "peak_bytes": 2**30, "planned_bytes": None, "flops_per_s": 350_000 * (6 * 123_553_536 + 12 * 12 * 768 * 1024)}
    assert "| 30.2 % | 60.5 % | flash | 1.00 | - |" in gpu.table([row], 989e12, 494.5e12)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunked", [True, False])
def test_an_update_reads_no_number_back(kind, dtype, chunked, monkeypatch):
    """Forward, backward, unscale, clip, step, update on fake tensors, which have no numbers: an .item(), a float(), an `if` on a
    tensor would raise. So on a GPU the CPU never waits; and the last line shows that a read would have been found."""
    cpu = torch.device("cpu")                                # on a real CPU the chunked loss drops positions without a target first; not on a GPU
    monkeypatch.setattr(gpu, "linear_cross_entropy", lambda h, weight, targets: (
        LinearCrossEntropy.apply(h.flatten(0, 1), weight, targets.flatten(), 50, [True, True]), (targets >= 0).sum(), {}))
    with FakeTensorMode():
        raw = gpu.build(gpu.shape_args(gpu.TINY["toy"][2], 512)).train()
        model = dist.DDP(raw, dist.Context(0, 0, 1, cpu, True))
        scaler, optimizer = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16), make_optimizer(raw, kind)
        for _ in range(2):                                   # the first update makes the optimizer's state
            tokens = torch.zeros(2, 64, dtype=torch.long)
            loss = gpu.train_step(model, raw, optimizer, scaler, lambda: dist.autocast(cpu, dtype), chunked, 1.0, tokens, tokens)
        with pytest.raises(DataDependentOutputException):
            float(loss)


@pytest.mark.parametrize("changes, says", [({"modes": ["fast"]}, "--modes fast is unknown"), ({"attention": "naive"}, "--attention naive"),
                                           ({"tiny": False}, "add --tiny")])
def test_a_wrong_option_of_the_benchmark_is_one_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        gpu.main(gpu.Config(**{"device": "cpu", "tiny": True, **changes}))


def test_attention_is_called_so_that_cuda_s_flash_kernel_can_take_it():
    """That kernel takes no mask: rows without segments bring none, only is_causal. Rows of several segments (packing, padding)
    bring one, and get a slower kernel. (It takes 16-bit numbers, too, which autocast gives it; on the CPU, whose kernel is slow
    in bf16, attention stays in fp32.)"""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.append(([t.dtype for t in args], kwargs["attn_mask"] is None, kwargs["is_causal"]))
            return func(*args, **(kwargs or {}))
    model = gpu.build(gpu.shape_args(gpu.TINY["toy"][2], 512))
    tokens = torch.zeros(2, 8, dtype=torch.long)
    with Watch(), dist.autocast(torch.device("cpu"), torch.bfloat16):
        model(tokens)
        model.by_runs = False                                # as on a GPU
        model(tokens, segments=torch.ones_like(tokens))
    whole, packed = seen[0], seen[-1]
    assert whole == ([torch.float32] * 3, True, True) and packed[1:] == (False, False)
