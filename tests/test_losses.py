"""Losses by hand-made numbers, by identities they must obey, and against PyTorch's own."""
import math

import pytest
import torch
import torch.nn.functional as F

from nanollm.losses import (IGNORE_INDEX, cross_entropy, dpo_loss, linear_cross_entropy, linear_sequence_logps, reward_loss,
                            sequence_logps)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_by_hand():
    """Two classes with odds 3 : 1 and 1 : 1; one target ignored."""
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0], [9.0, 0.0]]])
    loss, count, metrics = cross_entropy(logits, torch.tensor([[0, 1, IGNORE_INDEX]]))
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2)) and count == 2 and metrics == {}


def test_cross_entropy_is_a_sum_that_adds_over_splits():
    """Sum and count of parts add up to those of the whole, which makes the mean independent of the batch split."""
    logits, targets = random(4, 5, 7), torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(1))
    targets[0, :4] = IGNORE_INDEX
    whole = cross_entropy(logits, targets)
    parts = [cross_entropy(logits[i : i + 1], targets[i : i + 1]) for i in range(4)]
    assert sum(p[0] for p in parts).item() == pytest.approx(whole[0].item(), rel=1e-6)
    assert sum(p[1] for p in parts) == whole[1]
    assert (whole[0] / whole[1]).item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-6)


def test_a_micro_batch_without_targets_gives_a_connected_zero():
    """Not NaN, and backward works: a rank without rows still takes part in the synchronisation."""
    logits = random(2, 3, 5).requires_grad_()
    loss, count, _ = cross_entropy(logits, torch.full((2, 3), IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and count == 0 and logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_fp32():
    """2,000 tokens of ln 2: in fp16 the sum would stick, in bf16 it would be off by per cents."""
    loss, _, _ = cross_entropy(torch.zeros(1, 2000, 2, dtype=torch.bfloat16), torch.zeros(1, 2000, dtype=torch.long))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(2000 * math.log(2), rel=1e-5)


def projection(seed=0, ignored=True):
    """hidden (3, 7, 16), weight (50, 16), targets (3, 7) of which one row and some more are ignored."""
    targets = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    if ignored:
        targets[1], targets[2, :3] = IGNORE_INDEX, IGNORE_INDEX
    return random(3, 7, 16, seed=seed).requires_grad_(), random(50, 16, seed=seed + 1).requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 4, 21, 100])
@pytest.mark.parametrize("ignored", [True, False])
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones(chunk, ignored):
    """In fp32 to 1e-6, whatever the chunk, with a factor behind the sum as the mean or a GradScaler puts it."""
    hidden, weight, targets = projection(ignored=ignored)
    plain, count, _ = cross_entropy(F.linear(hidden, weight), targets)
    want = torch.autograd.grad(plain * 0.37, (hidden, weight))
    loss, n, metrics = linear_cross_entropy(hidden, weight, targets, chunk)
    got = torch.autograd.grad(loss * 0.37, (hidden, weight))
    assert n == count and metrics == {} and loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(got, want):
        assert (a - b).abs().max() <= 1e-6 * max(1, b.abs().max()) and b.abs().max() > 0.1


def test_the_chunked_loss_in_float64_is_exact():
    """To rounding, so what remains in fp32 is rounding too and no approximation."""
    hidden, weight, targets = projection()
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum"), (hidden, weight))
    for a, b in zip(torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 4)[0], (hidden, weight)), want):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


class LargestTensor(torch.overrides.TorchFunctionMode):
    """The most elements that any torch call inside returned, views of the weight aside."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.most = weight, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        new = isinstance(out, torch.Tensor) and out.data_ptr() != self.weight.data_ptr()
        self.most = max(self.most, out.numel() if new else 0)
        return out


def test_the_chunked_loss_never_holds_all_logits():
    """Neither kept for the backward pass nor for a moment: nothing as large as tokens x vocabulary exists."""
    hidden, weight, targets = projection()
    with LargestTensor(weight) as seen:
        linear_cross_entropy(hidden, weight, targets, 2)
    assert seen.most == 50 * 16                              # the weight's own gradient is the largest; 21 x 50 logits would be 1,050
    with LargestTensor(weight) as seen:
        cross_entropy(F.linear(hidden, weight), targets)
    assert seen.most == 21 * 50


def test_the_chunked_loss_without_targets_is_a_connected_zero():
    hidden, weight, targets = projection()
    loss, count, _ = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX), 4)
    loss.backward()
    assert loss == 0 and count == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_the_chunked_loss_does_no_work_for_gradients_nobody_wants():
    """A frozen matrix (LoRA) gets none and costs none; under no_grad there is none at all."""
    hidden, weight, targets = projection()
    with LargestTensor(weight) as seen:
        loss, _, _ = linear_cross_entropy(hidden, weight.detach(), targets, 2)
    loss.backward()
    assert seen.most < 50 * 16 and hidden.grad is not None and weight.grad is None
    with torch.no_grad(), LargestTensor(weight) as seen:
        alone, _, _ = linear_cross_entropy(hidden, weight, targets, 2)
    assert seen.most == 21 * 16 and alone == loss and not alone.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_chunked_loss_under_autocast_is_as_near_to_the_truth_as_the_plain_one(dtype):
    """Products in half precision, sums in fp32; gradients arrive in fp32 for fp32 masters."""
    hidden, weight, targets = projection()
    truth = torch.autograd.grad(cross_entropy(F.linear(hidden, weight), targets)[0], (hidden, weight))
    errors = []
    for loss_of in (lambda: linear_cross_entropy(hidden, weight, targets, 4)[0], lambda: cross_entropy(F.linear(hidden, weight), targets)[0]):
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of()
        got = torch.autograd.grad(loss, (hidden, weight))
        assert loss.dtype == got[0].dtype == got[1].dtype == torch.float32
        errors.append([(a - b).abs().max().item() for a, b in zip(got, truth)])
    assert all(0 < ours < 2 * plain for ours, plain in zip(*errors))


def test_small_gradients_survive_fp16_in_the_chunked_loss():
    """One sure prediction among 50: p of the others is 1e-8, below what fp16 can hold. They arrive, as with GradScaler's factor."""
    hidden, weight = torch.zeros(1, 1, 50), torch.eye(50).requires_grad_()
    hidden[0, 0, 0] = -math.log(1e-8)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _, _ = linear_cross_entropy(hidden, weight, torch.tensor([[0]]))
    (loss * 65536).backward()
    assert hidden.grad[0, 0, 1].item() / 65536 == pytest.approx(1e-8, rel=0.2)


def test_sequence_logps_by_hand():
    """log p of the supervised tokens only, summed: ln(3/4) and 2 ln(1/2)."""
    logits = torch.tensor([[[math.log(3), 0.0], [5.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    logps, counts = sequence_logps(logits, torch.tensor([[0, IGNORE_INDEX], [1, 0]]))
    torch.testing.assert_close(logps, torch.tensor([math.log(3 / 4), -2 * math.log(2)]))
    assert counts.tolist() == [1, 2]


def test_linear_sequence_logps_equals_logits_for_all():
    """Sums, counts and gradients as if every place had logits; a row without targets counts as nothing."""
    g = torch.Generator().manual_seed(3)
    hidden, output = torch.randn(4, 6, 8, generator=g), torch.nn.Linear(8, 11, bias=False)
    targets = torch.randint(0, 11, (4, 6), generator=g).masked_fill(torch.rand(4, 6, generator=g) < 0.5, IGNORE_INDEX)
    targets[2] = IGNORE_INDEX
    results = []
    for logps_of in (lambda h: sequence_logps(output(h), targets), lambda h: linear_sequence_logps(h, output, targets)):
        h = hidden.clone().requires_grad_()
        logps, counts = logps_of(h)
        results.append((logps, counts, *torch.autograd.grad((logps * torch.arange(1.0, 5)).sum(), (h, output.weight))))
    for plain, chosen in zip(*results):
        torch.testing.assert_close(chosen, plain)
    assert results[1][1][2] == 0 and results[1][0][2] == 0


def test_prompts_and_padding_get_no_logits_on_the_cpu():
    seen = []
    output = lambda h: seen.append(len(h)) or h
    linear_sequence_logps(torch.randn(2, 5, 7), output, torch.tensor([[IGNORE_INDEX] * 4 + [1], [IGNORE_INDEX, 2, 3, IGNORE_INDEX, IGNORE_INDEX]]))
    assert seen == [3]


def dpo(logps, ref, counts=None, beta=0.1):
    logps = torch.as_tensor(logps, dtype=torch.float64)
    counts = torch.ones(len(logps)) if counts is None else torch.tensor(counts)
    return dpo_loss(logps, torch.as_tensor(ref, dtype=torch.float64), counts, beta)


def test_dpo_loss_by_hand():
    """One pair: log-ratios +3 and -2, beta 0.2, so the margin is 1 and the loss -log sigmoid(1)."""
    loss, count, metrics = dpo([-7.0, -12.0], [-10.0, -10.0], beta=0.2)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1))) and count == 1
    assert metrics["margin"].item() == pytest.approx(1.0) and metrics["accuracy"] == 1
    assert metrics["chosen_reward"].item() == pytest.approx(0.6) and metrics["rejected_reward"].item() == pytest.approx(-0.4)
    assert metrics["chosen_logp"] == -7 and metrics["rejected_logp"] == -12


def test_dpo_loss_is_ln_2_when_policy_equals_reference():
    """And nothing counts as preferred yet: accuracy is strict."""
    logps = random(8).double() * 10
    loss, count, metrics = dpo(logps, logps)
    assert (loss / count).item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0


def test_dpo_swap_changes_the_loss_by_the_margin():
    """L(-d) - L(d) = d, which pins sign and scale of beta at once."""
    logps, ref = random(2).double() * 5, random(2, seed=1).double() * 5
    loss, _, metrics = dpo(logps, ref)
    swapped, _, _ = dpo(logps.flip(0), ref.flip(0))
    assert (swapped - loss).item() == pytest.approx(metrics["margin"].item())


def test_dpo_gradient_is_that_of_the_paper():
    """d loss / d chosen log-probability = -beta sigmoid(-margin), opposite for rejected (Rafailov et al. 2023, section 4)."""
    logps = torch.tensor([-7.0, -12.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(logps, torch.tensor([-10.0, -10.0]), torch.ones(2), 0.2)[0].backward()
    want = 0.2 / (1 + math.e)
    torch.testing.assert_close(logps.grad, torch.tensor([-want, want], dtype=torch.float64))


def test_a_filler_pair_counts_as_nothing_in_dpo():
    """The pair without answer tokens changes neither loss, count nor any metric, and gets no gradient."""
    logps, ref = torch.tensor([-3.0, 0.0, -5.0, 0.0]).double().requires_grad_(), torch.tensor([-4.0, 0.0, -4.0, 0.0]).double()
    with_filler = dpo_loss(logps, ref, torch.tensor([2, 0, 3, 0]), 0.1)
    alone = dpo([-3.0, -5.0], [-4.0, -4.0], [2, 3])
    assert with_filler[0].item() == alone[0].item() and with_filler[1] == alone[1] == 1
    assert {k: v.item() for k, v in with_filler[2].items()} == {k: v.item() for k, v in alone[2].items()}
    with_filler[0].backward()
    assert logps.grad[1] == logps.grad[3] == 0


def scores(c, r, **kw):
    """reward_loss on rewards whose last real entries are c and r."""
    n = len(c)
    rewards = random(2 * n, 4)
    lengths = torch.arange(2 * n) % 3 + 2
    rewards[torch.arange(2 * n), lengths - 1] = torch.cat([torch.as_tensor(c), torch.as_tensor(r)]).float()
    return reward_loss(rewards, lengths, **kw)


def test_reward_loss_by_hand():
    """Scores 2 and 1: -log sigmoid(1), plus center * (2 + 1)^2."""
    loss, count, metrics = scores([2.0], [1.0], center=0.01)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.09, rel=1e-6) and count == 1
    assert metrics["accuracy"] == 1 and metrics["margin"].item() == pytest.approx(1.0) and metrics["ties"] == 0


def test_reward_loss_is_binary_cross_entropy_of_the_difference():
    c, r = random(6), random(6, seed=1)
    loss, count, metrics = scores(c, r)
    want = F.binary_cross_entropy_with_logits(c - r, torch.ones(6), reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert count == 6 and metrics["accuracy"] == (c > r).sum()


def test_reward_swap_changes_the_loss_by_the_difference():
    loss, swapped = scores([1.5], [0.25])[0], scores([0.25], [1.5])[0]
    assert (swapped - loss).item() == pytest.approx(1.25, rel=1e-5)


def test_only_score_differences_matter_unless_centred():
    """A constant added to all scores is invisible at center 0 and visible at center > 0."""
    c, r = random(5), random(5, seed=1)
    assert scores(c + 7, r + 7)[0].item() == pytest.approx(scores(c, r)[0].item(), rel=1e-4)
    assert scores(c + 7, r + 7, center=0.01)[0] > scores(c, r, center=0.01)[0] + 1


def test_a_tie_is_not_a_hit():
    _, _, metrics = scores([1.0, 2.0], [1.0, 3.0])
    assert metrics["accuracy"] == 0 and metrics["ties"] == 1


def test_scores_are_read_by_length_and_padding_never_matters():
    """Whatever stands behind a row's end, and however much of it: same loss, and no gradient there."""
    rewards, lengths = random(4, 6), torch.tensor([3, 6, 1, 4])
    wide = torch.cat([rewards, random(4, 3, seed=5) * 100], 1)
    behind = torch.arange(9)[None] >= lengths[:, None]
    wide[behind] += 50
    wide.requires_grad_()
    loss, _, _ = reward_loss(wide, lengths)
    assert loss.item() == reward_loss(rewards, lengths)[0].item()
    loss.backward()
    assert wide.grad[behind].abs().sum() == 0 and (wide.grad != 0).sum() == 4


def test_a_filler_pair_counts_as_nothing_in_the_reward_loss():
    rewards = random(4, 3)
    loss, count, metrics = reward_loss(rewards, torch.tensor([2, 0, 3, 0]), center=0.1)
    alone = reward_loss(rewards[[0, 2]], torch.tensor([2, 3]), center=0.1)
    assert loss.item() == pytest.approx(alone[0].item()) and count == 1
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx({k: v.item() for k, v in alone[2].items()})


def test_padding_never_changes_a_log_probability():
    """Longer rows of ignored targets, whatever the logits there: same sums, zero gradient at ignored positions."""
    logits, targets = random(2, 5, 11), torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(3))
    targets[:, 0] = IGNORE_INDEX
    wide = torch.cat([logits, random(2, 4, 11, seed=9) * 30], 1).requires_grad_()
    wide_targets = torch.cat([targets, torch.full((2, 4), IGNORE_INDEX)], 1)
    logps, counts = sequence_logps(wide, wide_targets)
    torch.testing.assert_close(logps, sequence_logps(logits, targets)[0])
    assert counts.tolist() == [4, 4]
    logps.sum().backward()
    assert wide.grad[wide_targets == IGNORE_INDEX].abs().sum() == 0


def test_the_chunked_loss_does_not_overflow_in_fp16_where_hidden_states_are_large():
    """One frequent target and hidden states of 10: a sum over 4,096 tokens leaves fp16's range, and since it is taken before the
    loss scale is applied, no smaller scale could help."""
    torch.manual_seed(0)
    hidden, weight = (10 + torch.randn(1, 4096, 16)).requires_grad_(), (0.02 * torch.randn(50, 16)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _, _ = linear_cross_entropy(hidden, weight, torch.zeros(1, 4096, dtype=torch.long), chunk=4096)
    loss.backward()
    exact, = torch.autograd.grad(cross_entropy(hidden.detach() @ weight.T, torch.zeros(1, 4096, dtype=torch.long))[0], weight)
    assert weight.grad.isfinite().all() and (weight.grad - exact).abs().max() < 0.02 * exact.abs().max()
