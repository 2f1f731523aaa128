"""Pairs: the reward model's and DPO's losses, their rows, the prompt that is read once, the reference and its file, easy pairs first."""
import copy
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_dpo
import train_rm
from conftest import metrics, options, pairs as some_pairs, tiny_lm, tiny_tokenizer, weights, write_jsonl
from nanollm import checkpoint, dist, evaluation, peft
from nanollm import pairs as pairs_module
from nanollm.config import UserError
from nanollm.data import PreferenceRows, fit_pair, margin_of, to_labelled, to_preference
from nanollm.losses import IGNORE_INDEX, KINDS, REFERENCE_FREE, divergence_loss, dpo_loss, kto_loss, reward_loss, sequence_logps
from nanollm.model import ModelArgs, RewardModel, Transformer
from nanollm.pairs import PairCurriculum, answer_logps, easiest_first, precompute

EPS = {"cdpo": 0.2, "robust": 0.2}
PAIRWISE = [kind for kind in KINDS if kind != "kto"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(rows, max_len=160, **options):
    return PreferenceRows([(f"f:{i}", row) for i, row in enumerate(rows)], tiny_tokenizer(), max_len, **options)


def alone():
    return dist.Context(0, 0, 1, torch.device("cpu"), True)


# ---- the reward model ----------------------------------------------------------------------------------------------


def divergence_by_hand(rewards, ids, lengths):
    """The definition, pair by pair: from the first different position to the end of the longer row."""
    B, T = len(ids) // 2, ids.size(1)
    losses = []
    for i in range(B):
        differ = [t for t in range(T) if ids[i, t] != ids[B + i, t]]
        first, end = (differ[0], max(lengths[i], lengths[B + i])) if differ else (T - 1, T)
        losses.append(sum(-math.log(1 / (1 + math.exp(-(rewards[i, t] - rewards[B + i, t])))) for t in range(first, end)) / (end - first))
    return losses


# padding is 0; chosen, rejected
FIVE = {"different ends": ([1, 2, 3, 4, 0, 0], [1, 2, 5, 6, 7, 0]), "a prefix": ([1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 0]),
        "identical": ([1, 2, 3, 0, 0, 0], [1, 2, 3, 0, 0, 0]), "cut at the width": ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]),
        "different from the start": ([2, 1, 1, 0, 0, 0], [1, 2, 2, 2, 0, 0])}


def five(names=tuple(FIVE)):
    ids = torch.tensor([FIVE[n][0] for n in names] + [FIVE[n][1] for n in names])
    return ids, (ids != 0).sum(1)


def test_the_exact_divergence_loss_is_its_definition_in_five_cases():
    """R2: value pair by pair, for different ends, a prefix, identical, cut and wholly different rows."""
    ids, lengths = five()
    rewards = random(10, 6)
    want = divergence_by_hand(rewards.numpy(), ids, lengths.tolist())
    loss, count, _ = divergence_loss(rewards, ids, lengths, exact=True)
    print(f"\n| 6 | divergence loss, five cases, by hand | {abs(loss.item() - sum(want)):.0e} |")
    assert loss.item() == pytest.approx(sum(want), rel=1e-6) and count == 5
    assert want[2] == pytest.approx(math.log(1 + math.exp(-(rewards[2, 5] - rewards[7, 5]).item())), rel=1e-6)


def test_the_divergence_loss_trains_no_padding_and_no_identical_pair():
    """R6, and the prefix: the original's whole gradient for the shorter answer lies on its padding; here on its last real token."""
    for name in FIVE:
        ids, lengths = five([name])
        rewards = random(2, 6).requires_grad_()
        loss, count, _ = divergence_loss(rewards, ids, lengths)
        loss.backward()
        behind = torch.arange(6)[None] >= lengths[:, None]
        assert (rewards.grad[behind] == 0).all(), name
        assert count == (name != "identical") and (rewards.grad.abs().sum() > 0) == (name != "identical"), name
    ids, lengths = five(["a prefix"])
    rewards = random(2, 6).requires_grad_()
    divergence_loss(rewards, ids, lengths, exact=True)[0].backward()
    assert (rewards.grad[0, :3] == 0).all() and rewards.grad[0, 3] != 0
    clamped = random(2, 6).requires_grad_()
    divergence_loss(clamped, ids, lengths)[0].backward()
    assert clamped.grad[0].nonzero().flatten().tolist() == [2]


def test_an_identical_pair_has_no_gradient_in_the_network():
    """R6 in both losses: two equal rows get equal scores, whose gradients cancel."""
    model = reward_model()
    ids = torch.randint(1, 300, (1, 7)).repeat(2, 1)
    for loss in (lambda r: reward_loss(r, torch.tensor([7, 7]))[0], lambda r: divergence_loss(r, ids, torch.tensor([7, 7]), exact=True)[0]):
        model.zero_grad()
        loss(model(ids)).backward()
        assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6


def test_a_margin_asks_for_so_much_distance():
    """-log sigmoid(d - m): a margin of its own for each pair, and 0 changes nothing."""
    rewards, lengths = random(4, 3), torch.full((4,), 3)
    d = rewards[:2, 2] - rewards[2:, 2]
    loss, _, _ = reward_loss(rewards, lengths, margin=torch.tensor([0.5, 2.0]))
    assert loss.item() == pytest.approx(-F.logsigmoid(d - torch.tensor([0.5, 2.0])).sum().item(), rel=1e-6)
    assert torch.equal(reward_loss(rewards, lengths, margin=torch.zeros(2))[0], reward_loss(rewards, lengths)[0])


def test_a_row_brings_its_own_margin_or_takes_the_flag():
    plain, own = some_pairs(2)
    rows = rows_of([plain, {**own, "margin": 2.5}])
    assert rows.scored_batch([0, 1], margin=0.5)[3].tolist() == [0.5, 2.5]
    for bad in ("high", True, float("nan")):
        with pytest.raises(ValueError, match="margin"):
            margin_of({"margin": bad})


def reward_model(seed=0):
    torch.manual_seed(seed)
    model = RewardModel(tiny_lm(max_seq_len=160).args)
    model.backbone.load_state_dict({k: v for k, v in tiny_lm(seed, max_seq_len=160).state_dict().items() if k != "output.weight"})
    return model.eval()


def test_a_score_ignores_padding_and_neighbours():
    """R3: the same pair alone, beside a longer one, and with thirty more pads on the right."""
    rows, model = rows_of([*some_pairs(2), {"prompt": "hello " * 20, "chosen": "good " * 9, "rejected": "bad"}]), reward_model()
    def score(ids, lengths):
        return evaluation.score_table(model(ids), lengths)[0]
    ids, lengths, *_ = rows.scored_batch([0])
    want = score(ids, lengths)[:2]
    torch.testing.assert_close(score(*rows.scored_batch([0, 2])[:2])[:2], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score(F.pad(ids, (0, 30), value=tiny_tokenizer().pad_id), lengths)[:2], want, atol=1e-5, rtol=1e-5)


def test_the_report_counts_ties_as_misses_and_knows_length():
    """Four pairs: two right, one tie, one wrong; the longer answer wins in two; scores rise with length exactly where d = longer."""
    table = torch.tensor([[2.0, 1, 5, 4], [3, 1, 6, 4], [1, 1, 4, 4], [0, 1, 3, 4]], dtype=torch.float64)
    report = evaluation.reward_report(table)
    assert report["accuracy"] == 0.5 and report["ties"] == 0.25 and report["longer_wins"] == 0.5
    assert report["length_correlation"] == pytest.approx(1.0) and report["margin"] == 0.5
    assert (report["score_min"], report["score_max"], report["score_mean"]) == (0, 3, 1.25)
    assert report["score_std"] == pytest.approx(table[:, :2].std(correction=0).item())


def test_the_calibration_error_is_zero_for_honest_probabilities_and_large_for_boasts():
    """Says 0.75 and is right in 75 %: 0. Says 0.99 and is right in 60 %: 0.39. Seen from both sides, each pair counts as yes and as no."""
    honest = torch.tensor([0.75] * 6 + [0.25] * 2, dtype=torch.float64)
    boast = torch.tensor([0.99] * 6 + [0.01] * 4, dtype=torch.float64)
    assert evaluation.calibration_error(honest) == pytest.approx(0, abs=1e-9)
    assert evaluation.calibration_error(boast) == pytest.approx(0.39)


def test_a_small_reward_model_learns_which_answer_has_more_sevens():
    """R7: sequences of 16 tokens, chosen = more sevens; held-out accuracy at least 0.97 after 60 updates of 128 pairs."""
    torch.manual_seed(0)
    model = RewardModel(ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=16, max_seq_len=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def draw(n):
        a, b = torch.randint(1, 16, (2, n, 11))
        more = (a[:, 3:] == 7).sum(1) - (b[:, 3:] == 7).sum(1)
        a, b, more = a[more != 0], b[more != 0], more[more != 0]
        return torch.cat([torch.where(more[:, None] > 0, a, b), torch.where(more[:, None] > 0, b, a)])
    for _ in range(60):
        ids = draw(200)
        loss, count, _ = train_rm.pair_loss(model, train_rm.Config(), ids, torch.full((len(ids),), 11))
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    ids = draw(1500)
    with torch.no_grad():
        report = evaluation.reward_report(evaluation.score_table(model(ids), torch.full((len(ids),), 11)))
    assert report["accuracy"] > 0.97 and abs(report["length_correlation"]) == 0


def test_the_reward_model_tells_mean_and_spread_of_its_scores(world, tmp_path):
    """In meta.json, equal to the last evaluation, also of a resumed run that has not evaluated yet."""
    train_rm.main(train_rm.Config(**options("rm", world, tmp_path)))
    last = [r for r in metrics(tmp_path) if "val/loss" in r][-1]
    meta = checkpoint.load(tmp_path)[2]
    assert meta["scores"] == {"mean": last["val/score_mean"], "std": last["val/score_std"]} and meta["scores"]["std"] > 0
    more = dict(max_steps=5, save_every=1, eval_every=100, keep=0, resume="auto", override_schedule=True)
    train_rm.main(train_rm.Config(**options("rm", world, tmp_path, **more)))
    assert checkpoint.load(tmp_path / "step_00000004")[2]["scores"] == meta["scores"] != checkpoint.load(tmp_path)[2]["scores"]


@pytest.mark.parametrize("changes", [{"loss": "divergence"}, {"loss": "divergence", "exact": True}, {"margin": 0.5, "center": 0.01}])
def test_the_other_reward_losses_run(world, tmp_path, changes):
    train_rm.main(train_rm.Config(**options("rm", world, tmp_path, **changes)))
    lines = [r for r in metrics(tmp_path) if "val/loss" in r]
    assert lines[-1]["val/loss"] != lines[0]["val/loss"] and {"val/ece", "val/nll", "val/length_correlation"} <= lines[-1].keys()


# ---- DPO and its family --------------------------------------------------------------------------------------------


def loss_of(kind, logps, ref, counts, beta=0.1, **more):
    return dpo_loss(logps, None if kind in REFERENCE_FREE else ref, counts, beta, kind, EPS.get(kind, 0.0), **more)[0]


def test_every_kind_starts_where_its_formula_says():
    """D1, policy = reference: ln 2 for the sigmoid ones, 1 for the hinge, 1 / (4 beta^2) = 25 for IPO, and 1/2 a row for KTO."""
    logps, counts = -random(8).double().abs() * 9, torch.tensor([3, 5, 2, 7] * 2)
    for kind in ("sigmoid", "cdpo", "sigmoid_norm"):
        assert loss_of(kind, logps, logps, counts).item() / 4 == pytest.approx(math.log(2))
    assert loss_of("robust", logps, logps, counts).item() / 4 == pytest.approx(math.log(2))
    assert loss_of("hinge", logps, logps, counts).item() / 4 == 1 and loss_of("ipo", logps, logps, counts).item() / 4 == pytest.approx(25)
    loss, count, m = kto_loss(logps[:4], logps[4:], logps, counts[:4], torch.tensor([True, False, True, False]), 0.1)
    assert (loss / count).item() == 0.5 and m["accuracy"] == 0 and m["kl"] == 0


def test_the_gradient_for_the_logits_is_the_papers():
    """D2: -(beta s(-z) / B) (onehot - softmax) at the chosen answer's positions, the opposite at the rejected one's, 0 elsewhere."""
    B, T, V, beta = 2, 5, 7, 0.3
    logits, ref = random(2 * B, T, V).double().requires_grad_(), random(2 * B, T, V, seed=1).double()
    targets = torch.randint(0, V, (2 * B, T), generator=torch.Generator().manual_seed(2))
    targets[:, :2] = targets[1, 4:] = IGNORE_INDEX
    logps, counts = sequence_logps(logits.float(), targets)
    loss = dpo_loss(logps, sequence_logps(ref.float(), targets)[0], counts, beta)[0] / B
    got, = torch.autograd.grad(loss, logits)
    z = beta * (logps - sequence_logps(ref.float(), targets)[0]).view(2, B)
    weight = (beta * torch.sigmoid(z[1] - z[0]) / B).detach()
    mask = (targets != IGNORE_INDEX)[..., None]
    want = torch.cat([-weight, weight])[:, None, None] * mask * (F.one_hot(targets.clamp(min=0), V) - logits.softmax(-1))
    torch.testing.assert_close(got, want.double(), atol=1e-6, rtol=1e-5)


def test_swapping_the_answers_changes_the_loss_by_z():
    """D3 for the kinds whose loss is -log s(z): L(-z) - L(z) = z; cdpo keeps the share 1 - 2 eps of it, and robust divides by that."""
    logps, ref, counts = random(2).double() * 5, random(2, seed=1).double() * 5, torch.tensor([3, 3])
    z = 0.1 * (logps - ref)[0].item() - 0.1 * (logps - ref)[1].item()
    for kind, factor in (("sigmoid", 1), ("cdpo", 0.6), ("robust", 1 / 0.6), ("sigmoid_norm", 1 / 3)):
        change = loss_of(kind, logps.flip(0), ref.flip(0), counts) - loss_of(kind, logps, ref, counts)
        assert change.item() == pytest.approx(factor * z), kind


def test_shared_tokens_cancel_in_sums_and_not_in_means():
    """D4: a beginning that both answers share moves both sums alike; divided by unequal lengths, it does not cancel."""
    logps, ref, counts = torch.tensor([-7.0, -12.0]), torch.tensor([-8.0, -9.0]), torch.tensor([4, 9])
    for kind in ("sigmoid", "hinge", "ipo", "sigmoid_norm"):
        same = torch.equal(loss_of(kind, logps, ref, counts), loss_of(kind, logps - 2, ref, counts))
        assert same == (kind in ("sigmoid", "hinge")), kind


def test_half_of_the_labels_wrong_teaches_nothing():
    """D8: cdpo with eps = 0.5 has its minimum where policy and reference agree."""
    logps = torch.tensor([-7.0, -12.0], requires_grad=True)
    dpo_loss(logps, logps.detach(), torch.ones(2), 0.1, "cdpo", 0.5)[0].backward()
    assert logps.grad.abs().max() == 0


@pytest.mark.parametrize("kind", PAIRWISE)
def test_a_filler_pair_counts_as_nothing_in_any_kind(kind):
    logps, counts = torch.tensor([-3.0, 0.0, -5.0, 0.0], requires_grad=True), torch.tensor([2, 0, 3, 0])
    ref = torch.tensor([-4.0, 0.0, -4.0, 0.0])
    loss, count, m = dpo_loss(logps, ref, counts, 0.1, kind, EPS.get(kind, 0.0))
    only = dpo_loss(logps[[0, 2]], ref[[0, 2]], counts[[0, 2]], 0.1, kind, EPS.get(kind, 0.0))
    assert torch.allclose(loss, only[0]) and count == only[1] == 1 and all(torch.allclose(m[k].double(), only[2][k].double()) for k in m)
    loss.backward()
    assert logps.grad[1] == logps.grad[3] == 0 and torch.isfinite(logps.grad).all()


def test_dpop_gives_no_credit_for_a_chosen_answer_that_falls():
    """Both fall, the rejected one more: DPO is content, DPO-Positive asks for the chosen one back."""
    logps, ref, counts = torch.tensor([-9.0, -20.0], requires_grad=True), torch.tensor([-8.0, -9.0]), torch.tensor([3, 3])
    plain, _, _ = dpo_loss(logps, ref, counts, 0.1)
    held, _, _ = dpo_loss(logps, ref, counts, 0.1, dpop=5.0)
    assert held.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * (10 - 5 * 1)))), rel=1e-6) and held > plain
    risen, _, _ = dpo_loss(logps + torch.tensor([3.0, 0]), ref, counts, 0.1, dpop=5.0)
    assert risen == dpo_loss(logps + torch.tensor([3.0, 0]), ref, counts, 0.1)[0]


def test_ktos_metrics_are_means_over_their_own_side():
    """Three good rows and one bad, in two micro-batches: summed and divided by all rows, chosen_* is the mean over the good ones."""
    logps, ref, counts = torch.tensor([-1.0, -2.0, -3.0, -8.0]), torch.full((8,), -4.0), torch.tensor([1, 2, 3, 4])
    good = torch.tensor([True, True, True, False])
    parts = [kto_loss(logps[i], ref[i], torch.cat([ref[i], ref[i]]), counts[i], good[i], 0.5, share=0.75)[2] for i in ([0, 3], [1, 2])]
    mean = {k: sum(p[k] for p in parts).item() / 4 for k in parts[0]}
    assert mean["chosen_reward"] == pytest.approx(0.5 * (3 + 2 + 1) / 3) and mean["rejected_reward"] == pytest.approx(0.5 * -4)
    assert mean["chosen_tokens"] == 2 and mean["rejected_tokens"] == 4 and mean["accuracy"] == 1
    assert mean["margin"] == pytest.approx(mean["chosen_reward"] - mean["rejected_reward"])


def toy():
    """A small model that knows a Markov chain, and pairs of one of its walks and the same with one wrong token."""
    V, g = 16, torch.Generator().manual_seed(0)
    chain = torch.softmax(2 * torch.randn(V, V, generator=g), -1)

    def walk(n):
        x = torch.randint(0, V, (n, 1), generator=g)
        for _ in range(10):
            x = torch.cat([x, torch.multinomial(chain[x[:, -1]], 1, generator=g)], 1)
        return x
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=16, tie_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(160):
        x = walk(64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
    chosen = walk(192)
    rejected, at = chosen.clone(), torch.randint(3, 11, (192,), generator=g)
    rejected[torch.arange(192), at] = (chosen[torch.arange(192), at] + torch.randint(1, V, (192,), generator=g)) % V
    return model, chosen, rejected


def test_plain_dpo_lowers_the_chosen_answers_and_the_remedies_hold_them():
    """D9: all looks well, the loss falls and accuracy is 1, while the chosen answers lose more than 5 % of their log-probability; with
    rpo_alpha 1 or dpop 5 they do not."""
    base, chosen, rejected = toy()
    ended = {}
    for name, changes in {"plain": {}, "rpo": {"rpo_alpha": 1.0}, "dpop": {"dpop": 5.0}}.items():
        cfg, model, reference = train_dpo.Config(**changes), copy.deepcopy(base), base
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        for step in range(70):
            i = torch.randint(0, 192, (32,), generator=torch.Generator().manual_seed(step))
            x = torch.cat([chosen[i], rejected[i]])
            targets = x[:, 1:].clone()
            targets[:, :2] = IGNORE_INDEX                                     # a prompt of three tokens, an answer of eight
            loss, count, m = train_dpo.preference_loss(model, reference, cfg, x[:, :-1], targets, nll_weight=cfg.rpo_alpha / 8)
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
        x = torch.cat([chosen, rejected])
        targets = x[:, 1:].clone()
        targets[:, :2] = IGNORE_INDEX
        with torch.no_grad():
            loss, count, m = train_dpo.preference_loss(model, reference, train_dpo.Config(), x[:, :-1], targets)
        m = {k: v.item() / 192 for k, v in m.items()}
        before = m["chosen_logp"] - m["chosen_reward"] / 0.1
        ended[name] = (loss.item() / 192, m["accuracy"], (before - m["chosen_logp"]) / -before)
    assert ended["plain"][0] < 0.6 and ended["plain"][1] > 0.9 and ended["plain"][2] > 0.05, ended
    assert ended["rpo"][2] < 0.05 and ended["dpop"][2] < 0.05, ended


FAMILY = [{"loss": kind, **({"label_smoothing": 0.1} if kind in EPS else {}), **({"beta": 2.0} if kind == "simpo" else {})} for kind in KINDS]


@pytest.mark.parametrize("changes", [*FAMILY, {"loss": "hinge", "dpop": 5.0, "rpo_alpha": 0.2}, {"loss": "simpo", "peft": "qlora"}], ids=lambda c: "-".join(map(str, c.values())))
def test_every_kind_trains(world, tmp_path, changes):
    """Three steps through the script; chosen_fall is 0 before the first; ln 2 where the formula says so."""
    train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path, **changes)))
    lines = [r for r in metrics(tmp_path) if "val/loss" in r]
    assert lines[0]["val/chosen_fall"] == pytest.approx(0, abs=1e-6) and lines[-1]["val/loss"] != lines[0]["val/loss"]
    assert all(math.isfinite(v) for r in lines for k, v in r.items() if k.startswith("val/"))
    if changes["loss"] in ("sigmoid", "cdpo", "robust", "sigmoid_norm"):
        assert lines[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_chosen_answer_that_falls_is_warned_of(world, tmp_path, capsys):
    """Beside a reference that has learnt the chosen answers, the policy's stand lower from the start: one line says how far, and the
    number is in metrics.jsonl; of a policy that has them higher nothing is said."""
    train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "better", learning_rate=3e-3)))
    assert metrics(tmp_path / "better")[-1]["val/chosen_fall"] < 0 and "warning: the chosen" not in capsys.readouterr().out
    train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "worse", reference=str(tmp_path / "better"))))
    first, now = metrics(tmp_path / "worse")[0], metrics(tmp_path / "better")[-1]["val/chosen_logp"]
    assert first["val/chosen_fall"] == pytest.approx((now - first["val/chosen_logp"]) / -now, rel=1e-4) and first["val/chosen_fall"] > 0.05
    assert "warning: the chosen answers' log-probability is" in capsys.readouterr().out


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_labelled_rows_and_pairs_are_what_kto_reads():
    """A completion with a label, chat messages with a label, and a pair, which is two rows; all good ones stand before all bad ones,
    and in the other answer's place is the next row's."""
    assert to_labelled({"prompt": "Q", "completion": "A", "label": True}) == [([{"role": "user", "content": "Q"}], "A", True)]
    assert to_labelled({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "label": 0})[0][1:] == ("A", False)
    rows = rows_of([{"prompt": "one", "completion": "bad one", "label": False}, {"prompt": "two", "chosen": "good two", "rejected": "bad two"}], labelled=True)
    tok = tiny_tokenizer()
    assert rows.desirable.tolist() == [True, False, False] and len(rows) == 3
    assert [tok.decode(a[:-1]) for _, a, _ in rows.pairs] == ["good two", "bad one", "bad two"]
    assert [tok.decode(b[:-1]) for _, _, b in rows.pairs] == ["bad one", "bad two", "good two"]
    for row, says in (({"prompt": "Q", "completion": "A"}, "train_sft.py"), ({"text": "once"}, "prepare_data.py")):
        with pytest.raises(ValueError, match=says):
            to_labelled(row)
    with pytest.raises(UserError, match="both labels"):
        rows_of([{"prompt": "Q", "completion": "A", "label": True}], labelled=True)


def test_a_row_of_another_kind_names_its_script():
    for row, says in (({"prompt": "Q", "completion": "A", "label": True}, "--loss kto"), ({"instruction": "Q", "output": "A"}, "train_sft.py"),
                      ({"text": "once"}, "prepare_data.py")):
        with pytest.raises(ValueError, match=says):
            to_preference(row)


def test_dpo_cuts_answers_last_and_a_cut_one_has_no_end(capsys):
    """First old turns, then the question down to a quarter of the context, then both answers' ends, the short one untouched. The reward
    model leaves such a pair out. What was cut is counted."""
    tok, prompt = tiny_tokenizer(), [{"role": "user", "content": "why? " * 40}]
    ids, chosen, rejected = fit_pair(tok, prompt, "because " * 40, "no", 60, cut_answers=True)
    assert len(ids) + len(chosen) == 60 and chosen[-1] != tok.im_end_id and rejected == [*tok.encode("no"), tok.im_end_id]
    assert chosen == tok.encode("because " * 40)[: len(chosen)] and ids[0] == tok.im_start_id
    assert fit_pair(tok, prompt, "because " * 40, "no", 60) is None
    row = {"prompt": "why?", "chosen": "because " * 40, "rejected": "no"}
    rows_of([row, *some_pairs(1)], 60, cut_answers=True)
    assert "cut an answer's end in 1 of 2 pairs" in capsys.readouterr().out


def test_answers_that_are_equal_once_cut_are_left_out_and_counted(capsys):
    long = {"prompt": "why?", "chosen": "because " * 40 + "yes", "rejected": "because " * 40 + "no"}
    rows = rows_of([long, *some_pairs(2)], 60, cut_answers=True)
    assert len(rows) == 2 and "left out 1 of 3 pairs: the two answers are the same tokens" in capsys.readouterr().out


# ---- the prompt that is read once ----------------------------------------------------------------------------------

LONG = [{"prompt": "Tell me about it. " * n, "chosen": "Well " * (i + 1), "rejected": "No" + "!" * i} for i, n in enumerate((5, 3, 4, 6))]


def both_ways(rows=LONG, labelled=False):
    """The same rows with their prompts apart and in place."""
    apart, within = (rows_of(rows, labelled=labelled, share=share) for share in (True, False))
    assert apart.batch(range(len(apart)))[2] is not None and within.batch(range(len(apart)))[2] is None
    return apart, within


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b):
    assert a.keys() == b.keys()
    scale = max(g.abs().max() for g in b.values())
    assert max((a[k] - b[k]).abs().max() for k in b) < 1e-6 * max(1, scale)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "orpo", "kto"])
def test_a_prompt_read_once_gives_the_loss_and_gradient_of_two_whole_rows(kind):
    """Prompts of four lengths, padded on the left; the rejected answer sees the prompt and not the chosen answer."""
    model, reference = tiny_lm(1, max_seq_len=160), tiny_lm(2, max_seq_len=160)
    cfg, found = train_dpo.Config(loss=kind), []
    for rows in both_ways(labelled=kind == "kto"):
        loss, count, m = train_dpo.preference_loss(model, reference, cfg, *rows.batch(range(len(rows))), nll_weight=0.01 * (kind != "kto"))
        found.append((loss / count, m, gradients(model, loss / count)))
    (a, m_a, g_a), (b, m_b, g_b) = found
    assert a.item() == pytest.approx(b.item(), rel=1e-6, abs=1e-6)
    assert {k: float(v) for k, v in m_a.items()} == pytest.approx({k: float(v) for k, v in m_b.items()}, rel=1e-5, abs=1e-5)
    same_gradients(g_a, g_b)


@pytest.mark.parametrize("loss", ["bt_last", "divergence"])
def test_a_prompt_read_once_gives_the_reward_loss_and_gradient_of_two_whole_rows(loss):
    model, cfg, found = reward_model(1), train_rm.Config(loss=loss), []
    for rows in both_ways():
        total, count, m = train_rm.pair_loss(model, cfg, *rows.scored_batch(range(4)))
        found.append((total / count, gradients(model, total / count)))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6, abs=1e-6)
    same_gradients(found[0][1], found[1][1])


def test_prompts_are_shared_where_it_saves_work_and_fits():
    """Long prompts: yes. Short prompts with long answers, one row too long for its neighbour's prompt, rows of which more is padding
    than prompt where padding is free, or a variant: no. Tokens are counted alike either way."""
    apart, within = both_ways()
    pad = tiny_tokenizer().pad_id
    counts = [(x != pad).sum() + pairs_module.spared(p) for x, _, p, _ in (rows.batch(range(4)) for rows in (apart, within))]
    assert counts[0] == counts[1]
    short = rows_of([{"prompt": "Q", "chosen": "yes " * 200, "rejected": "no " * 200}], 1600, share=True)
    assert short.batch([0])[2] is None
    apart.max_seq_len = 100
    assert apart.batch(range(4))[2] is None
    uneven = [{"prompt": "question " * (1 + 3 * i), "chosen": "yes " * 40, "rejected": "no " * 2} for i in range(4)]        # what padding costs, reading
    assert [rows_of(uneven, 400, share=True, tight=tight).batch(range(4))[2] is None for tight in (False, True)] == [False, True]       # twice does not
    cfg = train_dpo.Config()
    assert pairs_module.can_share(tiny_lm(), cfg)
    assert not pairs_module.can_share(types.SimpleNamespace(args=types.SimpleNamespace(variants=["gpt2"])), cfg)
    assert not pairs_module.can_share(tiny_lm(), train_dpo.Config(activation_checkpointing=True))


def test_a_shared_prompt_makes_the_same_run(tmp_path, world):
    """Six updates of either script with prompts apart and in place: the same losses to 1e-4. In the context of 64 all batches are shared."""
    pairs = [{"prompt": f"Say it. Say it. {i}", "chosen": "Yes" + "!" * (i % 5), "rejected": "No" + "." * (i % 3)} for i in range(40)]
    data, rows = write_jsonl(tmp_path / "long.jsonl", pairs), rows_of(pairs, 64, share=True)
    assert all(rows.scored_batch([i, i + 1])[2] is not None for i in range(0, 40, 2))
    for stage, script in (("dpo", train_dpo), ("rm", train_rm)):
        runs = []
        for share in (True, False):
            out = tmp_path / f"{stage}{share}"
            script.main(script.Config(**options(stage, world, out, data=[data], val_data=[data], max_steps=6, share_prompt=share)))
            runs.append([(r["train/loss"], r["tokens"]) for r in metrics(out) if "train/loss" in r])
        for a, b in zip(*runs):
            assert a == pytest.approx(b, rel=1e-4)


# ---- the reference -------------------------------------------------------------------------------------------------


def test_the_reference_computed_beforehand_is_the_one_asked_every_time(world, tmp_path):
    """Losses and weights of a run with --precompute_ref and of one with a frozen copy, 1e-6; no copy is made; a second run with another
    beta and another loss reads the same file."""
    for name, changes in {"online": {}, "cached": {"precompute_ref": True}, "again": {"precompute_ref": True, "beta": 0.5, "loss": "ipo"}}.items():
        train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / name, ref_cache=str(tmp_path / "cache"), **changes)))
        if name == "cached":
            files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert len(files) == 2 and {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == files
    a, b = ([r["train/loss"] for r in metrics(tmp_path / n) if "train/loss" in r] for n in ("online", "cached"))
    assert a == pytest.approx(b, abs=1e-6)
    mine, theirs = weights(tmp_path / "online"), weights(tmp_path / "cached")
    assert max((mine[k] - theirs[k]).abs().max() for k in mine) < 1e-6


def test_the_references_file_is_named_by_weights_pairs_and_type(tmp_path, capsys):
    """Other weights, another pair or another type: another file. A damaged one is a sentence."""
    rows, other = rows_of(some_pairs(4)), rows_of(some_pairs(5))
    keys = {pairs_module.key_of(m, r, t) for m in (tiny_lm(0), tiny_lm(1)) for r in (rows, other) for t in (torch.float32, torch.bfloat16)}
    assert len(keys) == 8 and pairs_module.key_of(tiny_lm(0), rows, torch.float32) in keys
    model = tiny_lm(0, max_seq_len=160)
    precompute(model, rows, alone(), torch.no_grad, torch.float32, 3, tmp_path)
    want = torch.stack(answer_logps(model, *rows.batch(range(4))[:2])[0].chunk(2), 1)
    torch.testing.assert_close(rows.ref_logps, want.detach(), atol=1e-5, rtol=1e-6)
    file, = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="delete it"):
        precompute(model, rows, alone(), torch.no_grad, torch.float32, 3, tmp_path)


def test_going_on_from_a_trained_adapter_has_that_adapter_as_reference(world, tmp_path):
    """A first run trains an adapter; a second one starts from it with a new adapter: ln 2 and no fall at step 0, which the base alone as
    reference would not give; base and first adapter stay as they were."""
    first = options("dpo", world, tmp_path / "first", peft="lora", lora_rank=4, learning_rate=1e-2, max_steps=6)
    train_dpo.main(train_dpo.Config(**first))
    train_dpo.main(train_dpo.Config(**{**first, "init_from": str(tmp_path / "first"), "out_dir": str(tmp_path / "second")}))
    start = metrics(tmp_path / "second")[0]
    assert start["val/loss"] == pytest.approx(math.log(2), abs=1e-6) and start["val/chosen_fall"] == pytest.approx(0, abs=1e-6)
    trained, base = checkpoint.load(tmp_path / "first")[0].state_dict(), weights(world / "base")
    second = weights(tmp_path / "second")
    assert all(torch.equal(second[k], v) for k, v in trained.items()) and any((trained[k] - base[k]).abs().max() > 1e-4 for k in base)


def test_the_adapter_switched_off_is_the_base_and_gets_no_gradient():
    """D7: log-probabilities equal bit for bit, and the backward pass reaches A and B only."""
    rows, base, model = rows_of(some_pairs(3)), tiny_lm(3, max_seq_len=160), tiny_lm(3, max_seq_len=160)
    peft.inject_lora(model, 4, 16, 0.0)
    for _, layer in peft.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    batch = rows.batch(range(3))[:2]
    off = pairs_module.reference_logps(model, None, *batch)
    assert torch.equal(off, pairs_module.reference_logps(None, base, *batch)) and not off.requires_grad
    assert not torch.equal(off, answer_logps(model, *batch)[0])
    loss, _, _ = train_dpo.preference_loss(model, None, train_dpo.Config(), *batch)
    assert {n.rpartition(".")[2] for n in gradients(model, loss)} == {"lora_A", "lora_B"}


def test_another_model_may_be_the_reference(world, tmp_path):
    """--reference: not ln 2 at the start, and the policy begins at --init_from all the same."""
    checkpoint.save(tmp_path / "other", 1, tiny_lm(5), tiny_tokenizer(), "sft", None)
    train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "run", reference=str(tmp_path / "other"))))
    assert abs(metrics(tmp_path / "run")[0]["val/loss"] - math.log(2)) > 1e-3


# ---- easy pairs first ----------------------------------------------------------------------------------------------


def test_the_share_of_hard_pairs_follows_k_t():
    """f(t) = k t, cut at 1: in each tenth of the run the share of hard pairs is its mean there, within 3 %; both halves are drawn
    whole; the order depends on seed and place only."""
    n, total = 101, 40_000
    order = np.random.default_rng(0).permutation(n)
    hard = set(order[n // 2:].tolist())
    for k in (1.0, 2.0):
        curriculum = PairCurriculum(order, 3, total, k)
        drawn = curriculum(np.arange(total))
        for tenth in range(10):
            part = drawn[tenth * total // 10 : (tenth + 1) * total // 10]
            want = np.minimum(1, k * (np.arange(tenth * total // 10, (tenth + 1) * total // 10) / total)).mean()
            assert np.mean([r in hard for r in part]) == pytest.approx(want, abs=0.03), (k, tenth)
        assert set(drawn.tolist()) == set(range(n))
        assert np.array_equal(curriculum(np.arange(500, 600)), drawn[500:600])


def test_easy_pairs_are_those_whose_answers_lie_far_apart():
    """By the rows' own margins; without them by what the reference prefers, a token."""
    rows = rows_of([{**p, "margin": m} for p, m in zip(some_pairs(4), (0.5, 3.0, -1.0, 1.0))])
    assert easiest_first(rows).tolist() == [1, 3, 0, 2]
    rows = rows_of(some_pairs(3))
    tokens = torch.tensor([[len(c), len(r)] for _, c, r in rows.pairs])
    rows.ref_logps = -tokens * torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 5.0]])
    assert easiest_first(rows).tolist() == [2, 0, 1]


def test_the_curriculum_chooses_the_runs_pairs(world, tmp_path):
    """The script asks it: pairs by margin, k so small that only the easy half comes, whose chosen answers are one character long."""
    data = write_jsonl(tmp_path / "m.jsonl", [{"prompt": f"Q{i}", "chosen": "y" * (1 + 9 * (i % 2)), "rejected": "no", "margin": 1 - i % 2} for i in range(40)])
    for k in (0.0, 1e-9):
        out = tmp_path / str(k)
        train_dpo.main(train_dpo.Config(**options("dpo", world, out, data=[data], max_steps=6, pair_curriculum=k, ref_cache=str(tmp_path / "cache"))))
        assert ({r["train/chosen_tokens"] for r in metrics(out) if "train/loss" in r} == {2}) == (k > 0)          # a character and the end


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED = {"unknown kind": ({"loss": "dpo"}, "is unknown"), "beta 0": ({"beta": 0.0}, "above 0"),
           "cdpo without noise": ({"loss": "cdpo"}, "label_smoothing"), "noise in sigmoid": ({"label_smoothing": 0.1}, "label_smoothing"),
           "dpop in ipo": ({"loss": "ipo", "dpop": 5.0}, "dpop"), "rpo in kto": ({"loss": "kto", "rpo_alpha": 0.1}, "rpo_alpha"),
           "kto alone": ({"loss": "kto", "batch_size": 1}, "at least 2"), "a file for simpo": ({"loss": "simpo", "precompute_ref": True}, "no reference")}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together_are_refused(name):
    changes, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        pairs_module.check(train_dpo.Config(**changes))


@pytest.mark.parametrize("changes, says", [({"loss": "bt"}, "bt_last or divergence"), ({"exact": True}, "belongs to divergence"),
                                           ({"loss": "divergence", "center": 0.1}, "no --center")])
def test_reward_options_that_do_not_go_together_are_refused(world, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        train_rm.main(train_rm.Config(**options("rm", world, tmp_path, **changes)))


def test_a_reference_of_another_shape_is_refused(world, tmp_path):
    checkpoint.save(tmp_path / "wide", 1, tiny_lm(dim=64), tiny_tokenizer(), "sft", None)
    with pytest.raises(UserError, match="another tokenizer or shape"):
        train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "a", reference=str(tmp_path / "wide"))))
