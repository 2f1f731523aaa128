"""The learning-rate table of the notes, what decays, and Muon."""
import copy

import pytest
import torch

from conftest import tiny_lm
from nanollm.config import UserError
from nanollm.optim import QUINTICS, get_lr, make_optimizer, orthogonalize, update


@pytest.mark.parametrize("it, lr", [(0, 0.0), (250, 1.5e-4), (500, 3e-4), (4750, 1.55e-4), (9000, 1e-5), (9999, 1e-5)])
def test_schedule_equals_the_table_of_the_notes(it, lr):
    """Warmup 500, decay to 9,000, 3e-4 down to 1e-5."""
    assert get_lr(it, 3e-4, 1e-5, 500, 9000) == pytest.approx(lr, rel=1e-12)


def test_an_overlong_cosine_ends_above_its_floor():
    """Decay set to 110,000 of 100,000 steps: 90.9 % of the half wave are done, 2.03 % of the height are left."""
    assert get_lr(100_000, 1.0, 0.0, 0, 110_000) == pytest.approx(0.0203, abs=5e-5)


def test_wsd_holds_the_peak_and_comes_down_over_the_last_30_percent():
    lrs = [get_lr(i, 1.0, 0.1, 10, 110, "wsd") for i in range(111)]
    assert lrs[5] == 0.5 and set(lrs[10:81]) == {1.0} and lrs[95] == pytest.approx(0.55) and lrs[110] == 0.1
    assert all(a > b for a, b in zip(lrs[80:], lrs[81:]))


def test_constant_warms_up_and_stays():
    assert [get_lr(i, 1.0, 0.1, 2, 4, "constant") for i in range(6)] == [0, 0.5, 1, 1, 1, 1]


def test_no_warmup_starts_at_the_peak():
    assert get_lr(0, 1.0, 0.1, 0, 10) == 1.0


def test_an_unknown_schedule_or_optimizer_is_refused():
    with pytest.raises(UserError, match="--schedule staircase is unknown"):
        get_lr(1, 1.0, 0.1, 0, 10, "staircase")
    with pytest.raises(UserError, match="--optimizer sgd is unknown"):
        make_optimizer(tiny_lm(), "sgd")


def group_of(optimizer, p):
    return next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_falls_on_matrices_and_embeddings_only(kind):
    """Each trained parameter is in exactly one group; norm gains never decay; frozen ones are not there at all."""
    model = tiny_lm()
    model.layers[0].attention.wq.weight.requires_grad_(False)
    optimizer = make_optimizer(model, kind, weight_decay=0.3)
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert group_of(optimizer, p)["weight_decay"] == (0.3 if p.dim() >= 2 else 0.0), name


def test_adamw_shrinks_a_matrix_and_spares_a_gain():
    """With zero gradients only decay is left: matrices times 1 - lr * decay, gains untouched."""
    model = tiny_lm()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() >= 2 else 1.0))


def test_muon_takes_the_matrices_of_the_blocks_only():
    """Embedding and output (sparse or classifying rows) and gains stay with AdamW; the rate is muon_lr at the peak."""
    model = tiny_lm(tie_embeddings=False)
    optimizer = make_optimizer(model, "muon", learning_rate=1e-3, muon_lr=0.02)
    for name, p in model.named_parameters():
        group = group_of(optimizer, p)
        assert group["muon"] == (p.dim() == 2 and name.startswith("layers.")), name
        assert 1e-3 * group["lr_scale"] == pytest.approx(0.02 if group["muon"] else 1e-3)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (48, 32)])
def test_orthogonalize_brings_all_singular_values_near_one(shape):
    """Also when the smallest is but 1 % of the norm, for tall and wide matrices; and the singular vectors stay."""
    g = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=g))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=g))
    matrix = u * torch.logspace(0, -1.6, min(shape)) @ v.T
    out = orthogonalize(matrix)
    s = torch.linalg.svdvals(out)
    assert 0.72 < s.min() and s.max() < 1.28
    core = u.T @ out @ v
    assert (core - core.diag().diag()).abs().max() < 1e-3 and core.diag().min() > 0.6


def test_each_quintic_is_the_best_on_what_the_one_before_leaves():
    """Chebyshev: a polynomial of three coefficients is the best approximation of 1 on an interval if its error reaches its
    largest size four times with signs in turn. The intervals: [0.01, 1], then what comes out, symmetric about 1."""
    low, high = 0.01, 1.0
    for a, b, c in QUINTICS:
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        size = error.abs().max()
        turns = torch.unique_consecutive(error[error.abs() > 0.98 * size].sign())
        assert turns.tolist() == [-1, 1, -1, 1]
        low, high = float(1 - size), float(1 + size)
    assert low == pytest.approx(0.73, abs=0.005) and high == pytest.approx(1.27, abs=0.005)


def test_small_singular_values_grow_78_fold():
    """Below 1 % of the norm the polynomials are straight lines: noise far below the signal is not blown up to full size."""
    out = orthogonalize(torch.diag(torch.tensor([1.0, 1e-4, 1e-5])))
    assert out[1, 1] == pytest.approx(78e-4, rel=0.01) and out[2, 2] == pytest.approx(78e-5, rel=0.01)


def test_orthogonalize_runs_in_bf16_under_autocast():
    """Half the time where bf16 is native; an update direction bears the error of a few per cent."""
    g = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = orthogonalize(g)
    exact = orthogonalize(g)
    assert 0 < (out - exact).norm() < 0.05 * exact.norm()


def test_orthogonalize_of_a_stack_equals_one_by_one():
    stack = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(stack), torch.stack([orthogonalize(m) for m in stack]), rtol=1e-4, atol=1e-5)


def test_orthogonalize_survives_a_zero_matrix():
    assert orthogonalize(torch.zeros(4, 8)).abs().sum() == 0


def one_update(model, optimizer, seed):
    tokens = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_first_update_moves_every_parameter(kind):
    """Also with the first rate of a warmup, get_lr(1): at get_lr(0) nothing would move."""
    model = tiny_lm()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, kind, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = get_lr(1, 3e-4, 1e-5, 50, 100) * group["lr_scale"]
        assert group["lr"] > 0
    one_update(model, optimizer, 0)
    assert all((v != before[k]).any() for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_saves_and_loads(kind, tmp_path):
    """2 + 2 updates through a file equal 4 updates, bit for bit."""
    straight = tiny_lm()
    optimizer = make_optimizer(straight, kind)
    for i in range(4):
        one_update(straight, optimizer, i)
    first = tiny_lm()
    optimizer = make_optimizer(first, kind)
    for i in range(2):
        one_update(first, optimizer, i)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    second = tiny_lm(seed=1)
    second.load_state_dict(first.state_dict())
    optimizer = make_optimizer(second, kind)
    optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for i in range(2, 4):
        one_update(second, optimizer, i)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in straight.state_dict().items())


def test_muon_lowers_a_loss():
    """64 random next tokens to learn by heart: 30 updates bring the loss below half."""
    torch.manual_seed(0)
    model = tiny_lm(n_layers=1)
    optimizer = make_optimizer(model, "muon", learning_rate=3e-3, muon_lr=0.02, weight_decay=0.0)
    tokens = torch.randint(0, 60, (4, 17))
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_zero_learning_rate_is_no_crash():
    make_optimizer(tiny_lm(), "adamw", learning_rate=0.0)


def test_linear_is_a_straight_line_to_the_floor():
    assert [get_lr(i, 1.0, 0.2, 2, 10, "linear") for i in (0, 1, 2, 6, 10, 99)] == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("factor, left", [(0.8, 0.0), (1.0, 0.0), (1.1, 0.0203), (1.25, 0.0955)])
def test_a_cosine_longer_than_the_run_ends_above_its_floor(factor, left):
    """What --decay_factor does: the share of the height that is left at the end of 100,000 updates. The notes' 110 % leave
    2 %; a cycle a quarter too long leaves a tenth, which is where Hoffmann et al. 2022 (figure A1) see it hurt."""
    assert get_lr(100_000, 1.0, 0.0, 0, round(factor * 100_000)) == pytest.approx(left, abs=5e-5)


def updated(model, optimizer, loss=1.0, poison=None, scaler=None):
    """One backward pass and update; returns the norm."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    tokens = torch.arange(12)[None] % 7
    scaler.scale(model(tokens).square().mean()).backward()
    if poison is not None:
        model.norm.weight.grad[3] = poison
    norm = update(model, optimizer, scaler, 1.0, torch.tensor(loss))
    model.zero_grad()
    return norm


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("loss, poison", [(1.0, float("inf")), (1.0, float("nan")), (float("inf"), None), (float("nan"), None)])
def test_an_update_without_a_finite_loss_and_gradient_changes_nothing(kind, loss, poison):
    """Neither weights nor moments, momentum or step counts; and the next one is what it would have been without the failure."""
    model, twin = tiny_lm(0), tiny_lm(0)
    optimizer, other = make_optimizer(model, kind, 1e-2), make_optimizer(twin, kind, 1e-2)
    updated(model, optimizer), updated(twin, other)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    assert not torch.isfinite(updated(model, optimizer, loss, poison))
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(a, after[0][k]) for k, a in before[0].items())
    assert all(torch.equal(a, after[1][i][k]) for i, state in before[1].items() for k, a in state.items())
    assert torch.equal(updated(model, optimizer), updated(twin, other))
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_gradient_is_unscaled_before_it_is_clipped():
    """With a loss scale of 65,536 the norm that is reported and clipped is still the true one, so scale and no scale make
    the same update."""
    model, twin = tiny_lm(0), tiny_lm(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    a, b = updated(model, make_optimizer(model), scaler=scaler), updated(twin, make_optimizer(twin))
    torch.testing.assert_close(a, b)
    assert all(torch.allclose(v, twin.state_dict()[k], atol=1e-6) for k, v in model.state_dict().items())


def test_an_overflow_halves_the_scale_and_leaves_the_weights_alone():
    model = tiny_lm(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())
    updated(model, make_optimizer(model), poison=float("inf"), scaler=scaler)
    assert scaler.get_scale() == 512.0 and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
