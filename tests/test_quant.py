"""Quantised weights: what rounding may do, NF4 equal to bitsandbytes bit for bit, and a model that still works."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import chat
import evaluate
from conftest import stories, tiny_lm, tiny_tokenizer, write_jsonl
from nanollm import checkpoint, config, peft, quant
from nanollm.generate import generate
from nanollm.tools import quantize as tool
from nanollm.quant import (FLOAT8_LEVELS, NF4_LEVELS, NF4Linear, QuantLinear, dequantize_int, dequantize_nf4, pack, quantize_int, quantize_nf4, unpack,
                           weight_bytes)

KINDS = [(bits, block, zero) for bits in (8, 4) for block in ("tensor", "row", 64) for zero in (False, True)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative(W, restored):
    return ((restored - W).norm() / W.norm()).item()


# ---- integers

@pytest.mark.parametrize("bits, block, zero", KINDS)
@pytest.mark.parametrize("shape", [(7, 33), (16, 64)])
def test_rounding_moves_a_weight_by_half_a_step_at_most_and_leaves_zero(bits, block, zero, shape):
    """For every size of block, also where blocks do not divide the matrix; a row of zeros stays one."""
    W = normal(*shape)
    W[0] = 0
    W[1, :5] = 0
    q = quantize_int(W, bits, block, zero)
    restored = dequantize_int(q)
    size = {"tensor": W.numel(), "row": shape[1]}.get(block, block)
    step = q.scale.expand(-1, size).flatten()[: W.numel()].view(shape)
    assert ((restored - W).abs() <= 0.5 * step * 1.0001).all() and restored.shape == W.shape
    assert torch.equal(restored[W == 0], W[W == 0])
    assert q.codes.numel() == math.ceil(len(q.scale) * size * bits / 8)


def test_finer_blocks_and_a_zero_point_each_round_better():
    """One outlier spoils its whole block: of a tensor, of a row, of 64. Weights that lie on one side waste half of absmax' codes, so a
    zero point is worth one bit there."""
    W = normal(64, 256)
    W[3, 7] = 1.0
    for bits in (8, 4):
        errors = [relative(W, dequantize_int(quantize_int(W, bits, block))) for block in ("tensor", "row", 64)]
        assert errors[0] > 2 * errors[1] > 2 * errors[2]
    ones = normal(64, 256).abs()
    absmax, zero = (relative(ones, dequantize_int(quantize_int(ones, 4, 64, z))) for z in (False, True))
    assert zero < 0.6 * absmax


def test_two_codes_share_a_byte_the_first_in_its_high_half():
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes)[0].item() == 0x01 and pack(codes)[7].item() == 0xEF and torch.equal(unpack(pack(codes)), codes)


# ---- NF4

def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """8 above zero, 7 below, zero itself; evenly spaced in probability up to the mean of 1 - 1/30 and 1 - 1/32."""
    end = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    quantiles = lambda n: torch.special.ndtri(torch.linspace(end, 0.5, n, dtype=torch.float64)[:-1])
    levels = torch.cat([-quantiles(8), torch.zeros(1), quantiles(9)]).sort().values
    torch.testing.assert_close((levels / levels.max()).float(), NF4_LEVELS, atol=2e-7, rtol=0)
    assert 0.0 in NF4_LEVELS and not torch.equal(-NF4_LEVELS.flip(0), NF4_LEVELS)


def test_nf4_fits_normal_weights_better_than_equal_steps_and_uniform_ones_worse():
    """The notes' claim, and where it ends: the gain is the distribution's, not the format's."""
    W, uniform = normal(256, 256), torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) - 0.5
    error = lambda W: (relative(W, dequantize_nf4(quantize_nf4(W))), relative(W, dequantize_int(quantize_int(W, 4, 64))))
    nf4, int4 = error(W)
    assert nf4 == pytest.approx(0.0926, abs=0.002) and nf4 < 0.9 * int4
    nf4, int4 = error(uniform)
    assert nf4 > 1.1 * int4


def test_a_block_of_zeros_and_a_ragged_last_block_come_back():
    W = normal(5, 33)
    W[:2] = 0
    for double in (False, True):
        restored = dequantize_nf4(quantize_nf4(W, double=double))
        assert restored.shape == W.shape and torch.isfinite(restored).all() and (restored[:1] == 0).all()
        assert (restored - W).abs().max() < 0.16 * W.abs().max()             # the widest gap between two levels is 0.304


def test_bits_a_weight():
    """4.5, with double quantisation 4.127: QLoRA, section 3."""
    W = normal(512, 512)
    bits = lambda q: 8 * sum(t.numel() * t.element_size() for t in vars(q).values() if isinstance(t, torch.Tensor)) / W.numel()
    assert bits(quantize_nf4(W)) == 4.5
    assert bits(quantize_nf4(W, double=True)) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-4)


@pytest.mark.parametrize("shape", [(96, 128), (17, 64), (256, 1000), (128, 352)])
def test_nf4_equals_bitsandbytes_bit_for_bit(shape):
    """Codes, packing, absmax and what comes back; with double quantisation also the absmax' 8-bit codes, their mean and scales. The
    weights go in as one row: bitsandbytes 0.50.2 restores fp32 wrongly where a row is an odd number of half blocks (352) wide."""
    import bitsandbytes.functional as bnb
    W = normal(*shape, seed=shape[0])
    for double in (False, True):
        theirs, state = bnb.quantize_4bit(W.flatten(), blocksize=64, quant_type="nf4", compress_statistics=double)
        ours = quantize_nf4(W, double=double)
        assert torch.equal(ours.codes, theirs.flatten()) and torch.equal(ours.absmax, state.absmax)
        assert torch.equal(dequantize_nf4(ours).flatten(), bnb.dequantize_4bit(theirs, state).flatten())
    assert torch.equal(FLOAT8_LEVELS, bnb.create_dynamic_map())
    assert torch.equal(ours.mean, state.offset) and torch.equal(ours.absmax2, state.state2.absmax)


# ---- layers and models

@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_with_the_restored_weight_and_keeps_no_copy_of_it(bias):
    """y and dx are those of a Linear with that weight; between forward and backward autograd holds nothing of its size."""
    linear = torch.nn.Linear(96, 80, bias=bias)
    layer, x, kept = NF4Linear(linear, double=True), torch.randn(3, 5, 96), []
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(a)
    want = F.linear(b, layer.weight, linear.bias)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(y, want) and torch.allclose(a.grad, b.grad, rtol=1e-5)
    assert all(n < layer.weight.numel() for n in kept) and not any(p.requires_grad for p in layer.parameters())
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method, most", [("int8", 0.03), ("int4", 0.3), ("nf4", 0.3)])
def test_a_quantised_model_loses_little_and_is_small(method, most):
    """Its logits (without the blocks' matrices they would be off by more than their own size), what it holds (those matrices in so many
    bits, all else untouched), and that it writes text with a cache."""
    model, ids = tiny_lm(dim=64, multiple_of=64), torch.tensor([tiny_tokenizer().encode("".join(stories(3)))[:64]])
    before, size, embedding = model(ids), weight_bytes(model), model.tok_embeddings.weight.clone()
    quant.quantize(model, method)
    assert 0 < relative(before, model(ids)) < most
    blocks = [m for m in model.modules() if isinstance(m, QuantLinear)]
    n = sum(m.in_features * m.out_features for m in blocks)
    assert len(blocks) == 7 * model.args.n_layers and torch.equal(model.output.weight, embedding) and model.output.weight is model.tok_embeddings.weight
    bits = {"int8": 8 + 32 * sum(m.out_features for m in blocks) / n, "int4": 4 + 40 / 64, "nf4": 4 + 8 / 64 + 32 / 2**14}[method]
    assert weight_bytes(model) == pytest.approx(size - n * (4 - bits / 8), rel=0.01)
    assert len(list(generate(model, [1, 2, 3], 8, temperature=0))) == 8


def test_what_an_adapter_brings_is_not_quantised():
    """A prefix' network stays in fp32; a matrix with an adapter inside is refused, not left in fp32 without a word."""
    model = tiny_lm()
    peft.add_adapter(model, "prefix", n=2)
    quant.quantize(model, "nf4")
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 7 * model.args.n_layers
    assert not any(isinstance(m, QuantLinear) for m in model.soft.modules())
    for method in ("adapter", "bitfit", "lora"):
        model = tiny_lm()
        peft.add_adapter(model, method)
        with pytest.raises(config.UserError, match="--quantize nf4: layers.0.* has an adapter inside"):
            quant.quantize(model, "nf4")
        assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_one_flag_quantises_in_chat_and_evaluate(tmp_path, capsys):
    """--quantize is checkpoint.load's; an unknown name is refused in one sentence; the checkpoint itself stays as it is."""
    checkpoint.save(tmp_path / "lm", 1, tiny_lm(), tiny_tokenizer(), "pretrain", None)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in stories(12)])
    losses = {}
    for method in ("", "nf4"):
        evaluate.main(evaluate.Config(init_from=str(tmp_path / "lm"), data=[texts], out=str(tmp_path), quantize=method, device="cpu"))
        losses[method] = float(capsys.readouterr().out.split("loss")[1].split()[0])
    assert losses[""] != losses["nf4"] == pytest.approx(losses[""], rel=0.1)
    chat.main(chat.Config(init_from=[str(tmp_path / "lm")], prompt=["Anna"], quantize="int4", max_new_tokens=4, device="cpu"))
    with pytest.raises(config.UserError, match="--quantize int3 is unknown; use int8, int4, nf4"):
        checkpoint.load(tmp_path / "lm", quantize="int3")
    with pytest.raises(config.UserError, match="8 or 4"):
        quantize_int(normal(4, 4), 3)
    assert not any(isinstance(m, QuantLinear) for m in checkpoint.load(tmp_path / "lm")[0].modules())


def test_a_quantised_checkpoint_is_small_equals_one_quantised_while_loading_and_is_not_trained(tmp_path):
    """Whoever does not ask for its kind of weights is refused in one sentence: training, export, another kind."""
    checkpoint.save(tmp_path / "lm", 3, tiny_lm(dim=64, vocab_size=tiny_tokenizer().vocab_size), tiny_tokenizer(), "pretrain", None)
    tool.main(tool.Config(init_from=str(tmp_path / "lm"), out=str(tmp_path / "q"), method="int8"))
    model, _, meta = checkpoint.load(tmp_path / "q", quantize="int8")
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), checkpoint.load(tmp_path / "lm", quantize="int8")[0](ids)) and (meta["stage"], meta["step"]) == ("pretrain", 3)
    size = lambda run: (checkpoint.find(tmp_path / run) / "model.pt").stat().st_size
    assert size("q") < 0.6 * size("lm")                      # the embedding of so small a model is much of it
    for quantize in ("", "nf4"):
        with pytest.raises(config.UserError, match="holds int8 weights: chat.py and evaluate.py take it with --quantize int8"):
            checkpoint.load(tmp_path / "q", quantize=quantize)
    with pytest.raises(config.UserError, match="quantised already"):
        tool.main(tool.Config(init_from=str(tmp_path / "q"), out=str(tmp_path / "r"), method="int8"))


def test_the_experiment_and_the_benchmark_run(tmp_path, capsys, monkeypatch):
    """On toy shapes: no figure of these runs means anything."""
    from bench import quant as bench
    from conftest import write_world
    from learn.studies import quantization
    world = write_world(tmp_path / "world", n_train=20)
    quantization.main(quantization.Config(init_from=str(world / "base"), data=str(world / "tokens"), max_tokens=200, out=str(tmp_path / "q.json"),
                                          picture=str(tmp_path / "q.png")))
    out = capsys.readouterr().out
    assert out.count("\n| ") == 1 + 1 + len(quantization.ROWS) and "| NF4, 64 weights, double | 4." in out and (tmp_path / "q.png").stat().st_size > 5000
    bench.measure(bench.Config(new_tokens=2), world / "base", "nf4")
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < record["weights_mb"] < record["peak_mb"]
    monkeypatch.setattr(bench, "ask", lambda *words, **variables: record)
    bench.main(bench.Config(shapes=["32x1"], rounds=2, out=str(tmp_path / "b.json")))
    assert capsys.readouterr().out.count("\n| ") == 1 + len(bench.SIDES)
