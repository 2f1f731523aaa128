"""The DPO family against trl on the same random logits: value and gradient of every kind that trl has; its batched sums of
log-probabilities; reference computed beforehand."""
import copy
import os
import types
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import KTOTrainer

import train_dpo
from conftest import tiny_tokenizer
from nanollm import dist, pairs
from nanollm.data import PreferenceRows
from nanollm.losses import IGNORE_INDEX, dpo_loss, kto_loss, sequence_logps
from test_trl_parity import COMMON, NO_LAST_NEWLINE, PAIRS, TRL_PAIRS, hf_tokenizer, in_order, largest, llama, train, trl_stub, where

B, V, EPS = 4, 13, 0.2


class Given(torch.nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, **inputs):
        return types.SimpleNamespace(logits=self.logits)


@pytest.fixture(params=range(3))
def batch(request):
    """(trl's batch, logits, reference logits, shifted targets) of ragged prompts and answers; logits large enough to have opinions."""
    g = torch.Generator().manual_seed(request.param)

    def ids(low, high):
        return torch.randint(1, V, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    rows = DataCollatorForPreference(pad_token_id=0)([{"prompt_ids": ids(2, 5), "chosen_ids": ids(1, 6), "rejected_ids": ids(1, 6)} for _ in range(B)])
    shape = (2 * B, rows["input_ids"].size(1), V)
    logits, reference = (3 * torch.randn(shape, generator=g)).requires_grad_(), 3 * torch.randn(shape, generator=g)
    return rows, logits, reference, torch.where(rows["completion_mask"][:, 1:] == 1, rows["input_ids"][:, 1:], IGNORE_INDEX)


def compared(name, ours, theirs, logits):
    """Largest difference of the gradients for the logits, beside the largest entry if that is above 1; the values must agree to 1e-6 of
    their size. Prints a line of the table of parities."""
    mine, = torch.autograd.grad(ours, logits, retain_graph=True)
    want, = torch.autograd.grad(theirs, logits, retain_graph=True)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-6)
    assert want.abs().max() > 1e-4
    off = ((mine - want).abs().max() / want.abs().max().clamp(min=1)).item()
    print(f"\n| {name} | loss {abs(ours.item() - theirs.item()) / max(1, abs(theirs.item())):.0e} | gradient {off:.0e} |")
    return off


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"])
def test_the_kinds_that_trls_dpo_trainer_has(batch, kind):
    rows, logits, reference, targets = batch
    logps, counts = sequence_logps(logits[:, :-1], targets)
    ref_logps, _ = sequence_logps(reference[:, :-1], targets)
    loss, count, _ = dpo_loss(logps, ref_logps, counts, 0.1, kind, EPS if kind == "robust" else 0.0)
    stub = trl_stub()
    stub.loss_types, stub.label_smoothing = [kind], EPS
    theirs = DPOTrainer._compute_loss(stub, Given(logits), {**rows, "ref_chosen_logps": ref_logps[:B], "ref_rejected_logps": ref_logps[B:]}, False)
    assert compared(f"7 | {kind}", loss / count, theirs, logits) < 1e-6


def test_trls_sigmoid_ignores_label_smoothing_and_ours_has_cdpo_for_it(batch):
    """trl's DPOTrainer: the same loss with and without. Its CPOTrainer's formula on log-ratios is cdpo."""
    rows, logits, reference, targets = batch
    logps, counts = sequence_logps(logits[:, :-1], targets)
    ref_logps, _ = sequence_logps(reference[:, :-1], targets)
    values = []
    for eps in (0.0, 0.3):
        stub = trl_stub()
        stub.label_smoothing = eps
        values.append(DPOTrainer._compute_loss(stub, Given(logits), {**rows, "ref_chosen_logps": ref_logps[:B], "ref_rejected_logps": ref_logps[B:]}, False))
    assert values[0] == values[1]
    theirs, _, _ = CPOTrainer.cpo_loss(cpo(beta=0.1, label_smoothing=EPS), *(logps - ref_logps).chunk(2))
    assert compared("10 | cdpo", dpo_loss(logps, ref_logps, counts, 0.1, "cdpo", EPS)[0] / B, theirs.mean(), logits) < 1e-6


def cpo(**changes):
    accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    return types.SimpleNamespace(**{"alpha": 0.0, "beta": 2.0, "loss_type": "sigmoid", "label_smoothing": 0.0, "simpo_gamma": 1.2, "accelerator": accelerator, **changes})


def test_simpo_and_orpo_and_the_sums_of_log_probabilities(batch):
    """trl's get_batch_logps, sum and mean; SimPO; ORPO, whose odds-ratio term trl returns with the other sign, to be taken off the NLL."""
    rows, logits, _, targets = batch
    logps, counts = sequence_logps(logits[:, :-1], targets)
    labels = torch.where(rows["completion_mask"] == 1, rows["input_ids"], IGNORE_INDEX)
    for mean, ours in ((False, logps), (True, logps / counts)):
        torch.testing.assert_close(CPOTrainer.get_batch_logps(logits, labels.clone(), average_log_prob=mean), ours, atol=1e-5, rtol=1e-6)
    c, r = (logps / counts).chunk(2)
    theirs, _, _ = CPOTrainer.cpo_loss(cpo(loss_type="simpo"), c, r)
    assert compared("10 | simpo", dpo_loss(logps, None, counts, 2.0, "simpo", gamma=1.2)[0] / B, theirs.mean(), logits) < 1e-6
    theirs, *_ = ORPOTrainer.odds_ratio_loss(types.SimpleNamespace(beta=0.3, accelerator=cpo().accelerator), c, r)
    nll = -logps[:B].sum() / counts[:B].sum()
    cfg = train_dpo.Config(loss="orpo", beta=0.3)

    class Model(torch.nn.Module):
        def forward(self, inputs, segments, cache, head):
            return head(logits[:, :-1], torch.nn.Identity())
    ours, count, _ = train_dpo.preference_loss(Model(), None, cfg, None, targets, nll_weight=train_dpo.nll_alpha(cfg) * B / counts[:B].sum())
    assert compared("10 | orpo", ours / count, nll - theirs.mean(), logits) < 1e-6


@pytest.mark.parametrize("moved", [False, True])
def test_kto(batch, moved):
    """With the KL estimate cut off at 0, and above it."""
    rows, logits, reference, targets = batch
    logps, counts = sequence_logps(logits[:, :-1], targets)
    ref_logps, _ = sequence_logps(reference[:, :-1], targets)
    others = torch.randn(2 * B, generator=torch.Generator().manual_seed(7))
    ref_others = others - 3 if moved else others + 3
    good = torch.tensor([True] * B + [False] * B)
    loss, count, m = kto_loss(logps, others, torch.cat([ref_logps, ref_others]), counts, good, 0.1, (1.5, 0.5))
    assert (m["kl"] / count).item() == pytest.approx(3.0 if moved else 0.0, abs=1e-5)
    stub = types.SimpleNamespace(model=types.SimpleNamespace(training=True), accelerator=trl_stub().accelerator, aux_loss_enabled=False,
                                 precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=0.1, desirable_weight=1.5, undesirable_weight=0.5,
                                 _metrics={"train": defaultdict(list)}, _total_train_tokens=0, ref_model=None, _compute_kl_logps=lambda model, inputs: others)
    theirs = KTOTrainer._compute_loss(stub, Given(logits), {**rows, "label": good, "ref_logps": ref_logps, "ref_KL_logps": ref_others}, False)
    assert compared("10 | kto", loss / count, theirs, logits) < 1e-6


def test_the_reference_computed_beforehand_gives_trls_run(tmp_path):
    """Three updates with precompute_ref_log_probs on their side and our file on ours, and no reference model on either: losses, weights."""
    theirs, ours = llama()
    trainer = in_order(DPOTrainer)(model=theirs, ref_model=copy.deepcopy(theirs), args=DPOConfig(
        output_dir=str(tmp_path), beta=0.1, max_length=160, precompute_ref_log_probs=True, **COMMON),
        train_dataset=Dataset.from_list(TRL_PAIRS), processing_class=hf_tokenizer(NO_LAST_NEWLINE))
    logs = train(trainer)
    rows = PreferenceRows(where(PAIRS), tiny_tokenizer(), 160)
    pairs.precompute(ours, rows, dist.Context(0, 0, 1, torch.device("cpu"), True), torch.no_grad, torch.float32, 4, tmp_path / "cache")
    optimizer, off = torch.optim.SGD(ours.parameters(), lr=1e-2), 0.0
    for step, line in enumerate(logs):
        loss, count, _ = train_dpo.preference_loss(ours, None, train_dpo.Config(), *rows.batch([2 * step, 2 * step + 1]))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        off = max(off, abs((loss / count).item() - line["loss"]))
    moved = largest(ours, trainer.model.state_dict())
    print(f"\n| 9 | DPO, reference computed beforehand on both sides | loss {off:.0e} | weights {moved:.0e} |")
    assert off < 1e-5 and moved < 1e-6
