"""What the notes say about precision, run: the formats, what autocast does, what loss scaling and fp32 master weights are for."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import nanollm.model
import train_pretrain
from conftest import metrics, options, tiny_lm, weights
from nanollm import checkpoint, dist
from nanollm.config import UserError
from nanollm.losses import cross_entropy
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import make_optimizer

HALF = [torch.float16, torch.bfloat16]


# ----------------------------------------------------------------------------------------------------------------
# The formats


def test_bf16_has_the_range_and_fp16_the_digits():
    """Two bytes each: 5 exponent and 10 mantissa bits in fp16, 8 and 7 in bf16, which has fp32's range."""
    fp16, bf16, fp32 = (torch.finfo(d) for d in (*HALF, torch.float32))
    assert fp16.bits == bf16.bits == 16
    assert (fp16.eps, bf16.eps) == (2**-10, 2**-7)                        # 9.8e-4, 7.8e-3
    assert fp16.max == 65504 and fp16.smallest_normal == 2**-14
    assert bf16.max == pytest.approx(3.39e38, rel=1e-3) and bf16.smallest_normal == fp32.smallest_normal == 2**-126
    assert torch.tensor(2**-24).half() > 0 and torch.tensor(2**-25).half() == 0          # 5.96e-8, the smallest subnormal


def test_a_thousandth_survives_in_fp16_only_and_a_hundred_thousand_in_bf16_only():
    one_and_a_bit, large = torch.tensor(1.001), torch.tensor(1e5)
    assert one_and_a_bit.half() > 1 and one_and_a_bit.bfloat16() == 1
    assert large.half() == math.inf and large.bfloat16() == 99840        # off by 0.2 %, but there


@pytest.mark.parametrize("k", [-60, 0, 60])
def test_large_weights_need_no_larger_type(k):
    """A floating point number keeps its digits at any scale: times 2^k, a bf16 product has the very same relative error."""
    w, x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    exact, rounded = x.double() @ w.bfloat16().double(), (x.bfloat16() @ w.bfloat16()).double()
    scaled = (x.bfloat16() @ (w * 2.0**k).bfloat16()).double()
    assert torch.equal(scaled / 2.0**k, rounded) and (rounded - exact).norm() / exact.norm() < 2**-7


# ----------------------------------------------------------------------------------------------------------------
# What autocast runs in which type

# operator -> its result's type on the CPU, on CUDA, given bf16 numbers ("fp32 in" = fp32 ones; 16 = the type asked for)
X, H, Q = torch.randn(4, 8), torch.randn(4, 8).bfloat16(), torch.randn(1, 2, 4, 8)
OPERATORS = {
    "linear, fp32 in": (lambda x, h, q: F.linear(x, x), 16, 16),
    "matmul, fp32 in": (lambda x, h, q: x @ x.T, 16, 16),
    "scaled_dot_product_attention, fp32 in": (lambda x, h, q: F.scaled_dot_product_attention(q, q, q), 16, 16),
    "silu": (lambda x, h, q: F.silu(h), 16, 16),
    "softmax": (lambda x, h, q: h.softmax(-1), 16, 32),
    "logsumexp": (lambda x, h, q: h.logsumexp(-1), 16, 32),
    "rms_norm": (lambda x, h, q: F.rms_norm(h, (8,)), 16, 32),
    "layer_norm": (lambda x, h, q: F.layer_norm(h, (8,)), 16, 32),
    "sum": (lambda x, h, q: h.sum(), 16, 32),
    "pow": (lambda x, h, q: h**2, 16, 32),
    "cross_entropy": (lambda x, h, q: F.cross_entropy(h, h.argmax(-1)), 32, 32),
    "addition of fp32 and bf16": (lambda x, h, q: x + h, 32, 32),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_softmax_falls_back_to_fp32_on_cuda_but_not_on_the_cpu(operator):
    """Matrix products run in the 16-bit type on both; the list of fp32 operators is CUDA's, the CPU keeps a short one.
    CUDA's half of the table needs no GPU: fake tensors have a device and a type but no numbers, and obey its rules."""
    f, cpu, cuda = OPERATORS[operator]
    for dtype in HALF:
        types = {16: dtype, 32: torch.float32}
        with torch.autocast("cpu", dtype=dtype):
            assert f(X, H.to(dtype), Q).dtype == types[cpu]
        torch.set_autocast_enabled("cuda", True)               # torch.autocast("cuda") itself refuses where no GPU is
        torch.set_autocast_dtype("cuda", dtype)
        try:
            with FakeTensorMode() as fake:
                x, h, q = (torch.empty(t.shape, dtype=d, device="cuda") for t, d in ((X, torch.float32), (H, dtype), (Q, torch.float32)))
                assert fake is not None and f(x, h, q).dtype == types[cuda]
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


@pytest.mark.parametrize("dtype", HALF)
def test_weights_gradients_and_the_residual_stream_stay_fp32(dtype):
    """Mixed precision does not turn weights and gradients into 16 bits: autocast rounds a copy for each product. In our
    model every linear layer answers in 16 bits, and the sums that add up over the layers stay fp32."""
    model, seen = tiny_lm().train(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=dtype):
        loss, _, _ = cross_entropy(model(torch.arange(8)[None]), torch.arange(8)[None])
    loss.backward()
    for name, out in seen.items():
        linear = name == "output" or name.split(".")[-1] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
        assert out == dtype if linear or not name else out == torch.float32 or "attention" in name or "feed_forward" in name or "dropout" in name, name
    assert seen["layers.0"] == seen["layers.1"] == seen["norm"] == loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_our_losses_do_their_sums_in_fp32_wherever_they_run():
    """10,000 equal bf16 logits: log V is exact in our loss; logsumexp of bf16 numbers has two digits."""
    logits = torch.zeros(1, 1, 10_000, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, count, _ = cross_entropy(logits, torch.zeros(1, 1, dtype=torch.long))
        naive = logits.logsumexp(-1)
    assert (loss / count).item() == pytest.approx(math.log(10_000), rel=1e-6)
    assert abs(naive.item() - math.log(10_000)) > 1e-3


# ----------------------------------------------------------------------------------------------------------------
# Small numbers: loss scaling, master weights, accumulation


def test_a_gradient_of_1e_8_is_lost_in_fp16_and_saved_by_scaling():
    """GradScaler multiplies the loss, so every gradient, by 65,536; bf16 needs none."""
    gradient = torch.tensor(1e-8)
    assert gradient.half() == 0
    assert (gradient * 65536).half().float() / 65536 == pytest.approx(1e-8, rel=1e-3)
    assert gradient.bfloat16().float() == pytest.approx(1e-8, rel=2**-8)


@pytest.mark.parametrize("scale, lost", [(1.0, True), (65536.0, False)])
def test_scaling_the_loss_saves_the_gradients_of_a_whole_network(scale, lost):
    """A layer whose outgoing gradients are about 1e-9, forward under fp16 autocast: without a scale its weights get exactly
    zero, although they are kept in fp32; with it, the true gradient to three digits."""
    layer, x = torch.nn.Linear(16, 16, bias=False), torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = layer(x).float().sum() * 1e-9
    (loss * scale).backward()
    true = (x.sum(0) * 1e-9).expand(16, 16)
    found = layer.weight.grad / scale
    assert (found == 0).all() if lost else torch.allclose(found, true, rtol=5e-3, atol=1e-12)


@pytest.mark.parametrize("dtype, moved", [(torch.float32, 0.1), (torch.float16, 0), (torch.bfloat16, 0)])
def test_without_master_weights_small_updates_vanish(dtype, moved):
    """1,000 updates of 1e-4 on a weight of 1: fp32 arrives at 0.9; a 16-bit weight rounds each one away and stays."""
    w = torch.ones((), dtype=dtype)
    for _ in range(1000):
        w -= torch.tensor(1e-4, dtype=dtype)
    assert 1 - w.item() == pytest.approx(moved, abs=1e-4)


def learn_by_heart(weights=torch.float32, compute=torch.float32, scale=0.0, sgd=False, learning_rate=3e-3, steps=60):
    """The losses of 60 updates of a one-block model on 128 random next tokens, in the types given."""
    tokens = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0))
    model = tiny_lm(n_layers=1).to(weights).train()
    optimizer = (torch.optim.SGD(model.parameters(), lr=learning_rate) if sgd
                 else make_optimizer(model, learning_rate=learning_rate, weight_decay=0.0))
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=scale or 1, enabled=scale > 0), []
    for _ in range(steps):
        with dist.autocast(torch.device("cpu"), compute):
            loss, count, _ = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        scaler.scale(loss / count).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append((loss / count).item())
    return losses


def test_mixed_precision_learns_like_fp32_and_pure_16_bits_do_not():
    """AdamW from 5.887: fp32, bf16 autocast and fp16 autocast with scaling all end at 0.39; with bf16 weights 0.70 is left,
    with fp16 weights 4.67: in fp16 the square of a gradient below 2e-4 is zero, and Adam divides by its root."""
    fp32 = learn_by_heart()
    bf16, fp16 = learn_by_heart(compute=torch.bfloat16), learn_by_heart(compute=torch.float16, scale=65536.0)
    for mixed in (bf16, fp16):
        assert max(abs(a - b) / a for a, b in zip(fp32, mixed)) < 5e-3
    assert fp32[-1] < 0.5 and learn_by_heart(weights=torch.bfloat16)[-1] > 1.3 * fp32[-1] and learn_by_heart(weights=torch.float16)[-1] > 4


def test_a_small_rate_stalls_in_bf16_weights():
    """SGD at 1e-3: fp32 weights learn ten times what bf16 weights do, whose steps are rounded away."""
    fall = {d: (losses := learn_by_heart(weights=d, sgd=True, learning_rate=1e-3))[0] - losses[-1] for d in (torch.float32, torch.bfloat16)}
    assert fall[torch.float32] > 5 * fall[torch.bfloat16] > 0


def accumulate(parts, dtype, steps=10):
    """The weights after ten SGD updates on batches of 32, each fed in `parts` micro-batches."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).to(dtype)
    x, y = torch.randn(steps, 32, 32).to(dtype), torch.randn(steps, 32, 8).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        for inputs, targets in zip(x[step].chunk(parts), y[step].chunk(parts)):
            (F.mse_loss(model(inputs), targets) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


@pytest.mark.parametrize("dtype, least, most", [(torch.float32, 0, 1e-7), (torch.float16, 1e-5, 1e-3), (torch.bfloat16, 1e-4, 1e-2)])
def test_accumulation_2x16_is_1x32_up_to_rounding(dtype, least, most):
    """Not worse, not better: the same, to 1.5e-8 in fp32, 1.2e-4 with everything in fp16, 9.8e-4 in bf16 (largest difference
    of weights of about 0.2 after ten updates). Ours accumulate in fp32 under any autocast."""
    difference = (accumulate(1, dtype) - accumulate(2, dtype)).abs().max().item()
    assert least < difference < most


# ----------------------------------------------------------------------------------------------------------------
# Unscale, clip, step, update


def sgd_step(unscale_first):
    """How far one SGD update at rate 1 with fp16 loss scaling and clipping to norm 1 moves a weight whose gradient is 0.5."""
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer, scaler = torch.optim.SGD([w], lr=1.0), torch.amp.GradScaler("cpu")
    scaler.scale((0.5 * w).sum()).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([w], 1.0)
    scaler.step(optimizer)
    scaler.update()
    return -w.item()


def test_clipping_before_unscaling_shrinks_the_update():
    """The gradient 0.5 is within the limit of 1. Clipped while it is still 32,768, it becomes 1, then 1 / 65,536."""
    assert sgd_step(unscale_first=True) == 0.5
    assert sgd_step(unscale_first=False) == pytest.approx(1 / 65536, rel=1e-4)


def test_after_clipping_the_norm_is_at_most_the_limit():
    model = tiny_lm()
    cross_entropy(model(torch.arange(8)[None]), torch.arange(8)[None])[0].backward()
    before = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert before > 1 and torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) <= 1 + 1e-6


# ----------------------------------------------------------------------------------------------------------------
# Bytes


def test_opt_6_7b_in_fp16_is_12_48_gib():
    assert 6.7e9 * 2 / 2**30 == pytest.approx(12.48, abs=0.005)


def test_training_with_adamw_takes_16_bytes_a_parameter():
    """fp32 weights 4, gradients 4, Adam's two moments 8: so 16 GB for 1 B parameters before any activation; the 4 bytes of the
    "4 times the parameters" rule are the weights alone. Autocast changes nothing about it."""
    model = tiny_lm().train()
    optimizer = make_optimizer(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cross_entropy(model(torch.arange(8)[None]), torch.arange(8)[None])[0].backward()
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    n = sum(p.numel() for p in model.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert size(model.parameters()) == 4 * n and size(p.grad for p in model.parameters()) == 4 * n and size(moments) == 8 * n


def saved_bytes(model, rows, T, dtype):
    """Bytes that autograd keeps for the backward pass of our loss: each storage once, weights and tables left out.
    -> (activations, 16-bit copies of weights, which autocast makes and autograd keeps)"""
    own, kept = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}, {}
    shapes = {s for p in model.parameters() for s in (tuple(p.shape), tuple(p.shape[::-1]))}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t                     # a reference, so that no address is used twice
        return t
    tokens = torch.randint(0, model.args.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), dist.autocast(torch.device("cpu"), dtype):
        loss, _, _ = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    copies = sum(t.untyped_storage().nbytes() for t in kept.values() if t.dtype == dtype != torch.float32 and tuple(t.shape) in shapes)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) - copies, copies


ROWS, LENGTH = 4, 112


def activation_model(n_layers=4):
    return Transformer(ModelArgs(dim=128, n_layers=n_layers, n_heads=4, vocab_size=1024, max_seq_len=LENGTH))


def test_activations_are_an_order_of_magnitude_more_than_one_output_a_layer():
    """The notes count dim * rows * length * 2 bytes a layer. A block keeps 30 times that: about a dozen tensors, three of them as
    wide as the feed-forward part, in fp32. (What two blocks more add; the logits and the ends of the model are not in it.)"""
    four, two = (saved_bytes(activation_model(n), ROWS, LENGTH, torch.float32)[0] for n in (4, 2))
    assert (four - two) / 2 == pytest.approx(30 * (128 * ROWS * LENGTH * 2), rel=0.1)


def test_autocast_saves_activations_and_pays_with_copies_of_the_weights(monkeypatch):
    """About 30 % of the activations, not half: the residual stream, what the norms keep and the logits stay fp32. And each
    weight is kept a second time, in 16 bits (2 bytes a parameter; embedding and norms are in no product). That is a GPU's path
    through the model. On the CPU fp32 has derivatives by hand that keep less, attention stays fp32, and autocast saves nothing."""
    model = activation_model()
    (fp32, none), (bf16, copies) = (saved_bytes(model, ROWS, LENGTH, d) for d in (torch.float32, torch.bfloat16))
    assert none == 0 and copies == 2 * sum(p.numel() for p in model.parameters() if p.dim() > 1) and bf16 > 0.95 * fp32
    monkeypatch.setattr(nanollm.model, "by_hand", lambda x: False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)       # the model asks before it casts attention up
    fp32, bf16 = (saved_bytes(model, ROWS, LENGTH, d)[0] for d in (torch.float32, torch.bfloat16))
    assert 0.6 < bf16 / fp32 < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_keeps_less_than_half(dtype):
    """Only the inputs of the blocks, the logits and the 16-bit copies of the output matrix stay; the rest is computed again. (How much
    is left depends on the vocabulary: --activation_checkpointing does nothing about the logits.)"""
    model = activation_model()
    plain = sum(saved_bytes(model, ROWS, LENGTH, dtype))
    model.checkpointing = True
    assert sum(saved_bytes(model, ROWS, LENGTH, dtype)) < 0.5 * plain


# ----------------------------------------------------------------------------------------------------------------
# In a run


def pretrain(world, out, **changes):
    train_pretrain.main(train_pretrain.Config(**options("pretrain", world, out, **changes)))
    return [r for r in metrics(out) if "train/loss" in r]


def test_fp16_with_loss_scaling_trains_on_the_cpu_like_fp32(world, tmp_path):
    """The scale stands in the checkpoint, the weights in it are fp32."""
    fp16, fp32 = (pretrain(world, tmp_path / d, dtype=d, max_steps=4) for d in ("float16", "float32"))
    for a, b in zip(fp16, fp32):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)
    scaler = torch.load(checkpoint.find(tmp_path / "float16") / "training.pt", weights_only=True)["scaler"]
    assert scaler["scale"] == 65536 and scaler["_growth_tracker"] == 4
    assert {v.dtype for v in weights(tmp_path / "float16").values()} == {torch.float32}


def test_an_overflow_skips_the_update_halves_the_scale_and_keeps_the_rate(world, tmp_path, monkeypatch):
    """One infinite loss in the second update: its line says null, the third update gets the second one's rate, 65,536 becomes
    32,768, and the checkpoint knows that one was skipped."""
    real, calls = train_pretrain.pretrain_loss, [0]

    def broken(model, *batch):
        loss, count, m = real(model, *batch)
        calls[0] += model.training                           # two micro-batches an update
        return loss * (math.inf if calls[0] == 3 else 1), count, m
    monkeypatch.setattr(train_pretrain, "pretrain_loss", broken)
    lines = pretrain(world, tmp_path, dtype="float16", max_steps=5, warmup_steps=4)
    assert [r["grad_norm"] is None for r in lines] == [False, True, False, False, False]
    assert lines[0]["lr"] < lines[1]["lr"] == lines[2]["lr"] < lines[3]["lr"]
    path = checkpoint.find(tmp_path)
    assert torch.load(path / "training.pt", weights_only=True)["scaler"]["scale"] == 32768 and checkpoint.meta_of(path)["progress"]["skipped"] == 1
