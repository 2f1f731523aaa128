"""PPO and GRPO: each formula against its definition, and the whole of them against optima that are known in closed form."""
import math
import types

import pytest
import torch

import train_ppo
from conftest import ROOT, tiny_lm, tiny_rm
from nanollm import dist, peft, rl
from nanollm import world as demo_world
from nanollm.config import UserError
from nanollm.losses import IGNORE_INDEX
from nanollm.model import ModelArgs
from nanollm.optim import make_optimizer, update
from nanollm.rollout import PromptRows, State, backward, draw, experience, load_reward, make_critic, minibatches, shape, write_answers
from nanollm.tokenizer import render
from nanollm.variants import build
from test_scripts import start, train_lines
from train_ppo import advantages, policy_loss, value_loss


def masks(*lengths, prompt=2, width=9):
    """A prompt of two places, then the answer."""
    at = torch.arange(width)[None]
    return (at >= prompt) & (at < prompt + torch.tensor(lengths)[:, None])


def test_the_critic_begins_as_the_reward_model_unless_that_carries_an_adapter(tok):
    """Then, as with a rule, it begins as the policy. Its first values are 0 either way."""
    lm, rm, cfg = tiny_lm(), tiny_rm(), types.SimpleNamespace(critic="")
    with torch.no_grad():
        rm.backbone.tok_embeddings.weight.add_(1)
    for adapt, body in ((False, rm.backbone), (True, lm)):
        if adapt:
            peft.add_adapter(rm, method="bitfit")
        critic = make_critic(cfg, lm, rm, tok, dist.Context(0, 0, 1, torch.device("cpu"), True))
        assert torch.equal(critic.backbone.tok_embeddings.weight, body.tok_embeddings.weight) and not critic.v_head.weight.any()


def test_gae_at_both_ends_of_lambda():
    """lambda 1, gamma 1: what really followed, minus the value; lambda 0: the TD error. Nothing outside the answer counts, and behind its
    end the value is 0, whatever the critic says of padding."""
    g, mask = torch.Generator().manual_seed(0), masks(4, 7, 1)
    rewards, values = torch.randn(3, 9, generator=g), torch.randn(3, 9, generator=g)
    follows = (rewards * mask).flip(1).cumsum(1).flip(1)
    better, returns = rl.gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(better, (follows - values) * mask)
    torch.testing.assert_close(returns, follows * mask)
    better, _ = rl.gae(rewards, values, mask, 0.9, 0.0)
    following = torch.nn.functional.pad(values * mask, (0, 1))[:, 1:]
    torch.testing.assert_close(better, (rewards + 0.9 * following - values) * mask)
    noise = torch.where(mask, 0, 100.0)
    torch.testing.assert_close(rl.gae(rewards + noise, values - noise, mask), rl.gae(rewards, values, mask))


def test_the_score_stands_at_the_last_real_token():
    """Also at the end of the row, where there is no room behind; past_end is one later."""
    mask, score = masks(4, 7), torch.tensor([3.0, 5.0])
    placed = rl.place_reward(torch.zeros(2, 9), score, mask)
    assert placed.nonzero().tolist() == [[0, 5], [1, 8]] and placed.sum(1).tolist() == [3.0, 5.0]
    assert rl.place_reward(torch.zeros(2, 9), score, mask, past_end=True).nonzero().tolist() == [[0, 6], [1, 8]]


def test_the_three_estimators_of_the_kl():
    """Means over samples of pi: k1 and k3 are the KL, k2 is near it; k3 is never negative, and all are 0 where the models agree."""
    pi, ref = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    exact = (pi.exp() * (pi - ref)).sum()
    for estimator, near in ((rl.kl_k1, 1e-6), (rl.kl_k3, 1e-6), (rl.kl_k2, 0.1 * exact)):
        assert abs((pi.exp() * estimator(pi, ref)).sum() - exact) < near
        assert (estimator(pi, pi) == 0).all()
    assert (rl.kl_k3(pi, ref) >= 0).all() and (rl.kl_k1(pi, ref) < 0).any()


def test_the_gradients_of_k1_in_the_reward_and_of_k3_in_the_loss_point_to_different_optima():
    """In expectation over pi = softmax(z): k1 as a penalty inside the reward has the gradient of KL(pi || ref), k3 as a loss that of
    KL(ref || pi): the two leashes pull elsewhere."""
    z, ref = torch.randn(5, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.randn(5, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    pi = z.log_softmax(0)
    reverse, = torch.autograd.grad((pi.exp() * (pi - ref)).sum(), z, retain_graph=True)
    forward, = torch.autograd.grad((ref.exp() * (ref - pi)).sum(), z, retain_graph=True)
    weights = pi.exp().detach()
    policy_gradient, = torch.autograd.grad((weights * rl.kl_k1(pi, ref).detach() * pi).sum(), z, retain_graph=True)
    as_a_loss, = torch.autograd.grad((weights * rl.kl_k3(pi, ref)).sum(), z)
    torch.testing.assert_close(policy_gradient, reverse)
    torch.testing.assert_close(as_a_loss, forward)
    assert (reverse - forward).abs().max() > 0.01


def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_the_way_the_advantage_pushes():
    old, better = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    logps = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)                       # ratio 1.65 and 0.61
    loss, count, metrics = rl.ppo_policy_loss(logps, old, better, torch.ones(1, 4, dtype=torch.bool), 0.2)
    loss.backward()
    assert (logps.grad != 0).tolist() == [[False, True, True, False]] and metrics["clipfrac"] == 2 and count == 4
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(0.5))


def test_a_value_may_not_run_away_from_the_rollouts():
    """Further than the clip in the direction of the return: no gradient; back towards the rollout's value: the full one."""
    old, returns = torch.zeros(1, 3), torch.ones(1, 3)
    values = torch.tensor([[0.5, 0.1, -0.5]], requires_grad=True)
    loss, _, metrics = rl.ppo_value_loss(values, old, returns, torch.ones(1, 3, dtype=torch.bool), 0.2)
    loss.backward()
    assert (values.grad != 0).tolist() == [[False, True, True]] and metrics["value_clipfrac"] == 1
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 0.9**2 + 1.5**2))


def test_advantages_of_a_group():
    """Mean 0 in each group; equal scores teach nothing; leave-one-out is G / (G - 1) of the plain mean; std ends the differences of scale."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0, 7.0, 7.0, 7.0])
    plain = rl.group_advantages(scores, 4, "none")
    assert plain.tolist() == [-1.5, -0.5, 0.5, 1.5, 0, 0, 0, 0]
    torch.testing.assert_close(rl.group_advantages(scores, 4, "none", "loo"), plain * 4 / 3)
    others = (scores.view(2, 4).sum(1, keepdim=True) - scores.view(2, 4)) / 3
    torch.testing.assert_close(rl.group_advantages(scores, 4, "none", "loo"), (scores.view(2, 4) - others).flatten())
    torch.testing.assert_close(rl.group_advantages(10 * scores, 4), rl.group_advantages(scores, 4), atol=1e-3, rtol=0)


def test_the_kl_coefficient_follows_its_target():
    """Up where the policy is too far, down where it is near, at most by a fifth of n / horizon at once."""
    assert rl.adapt_kl(0.1, 6.0, 6.0, 64) == 0.1 and rl.adapt_kl(0.1, 6.6, 6.0, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert rl.adapt_kl(0.1, 100.0, 6.0, 1000) == pytest.approx(0.102) and rl.adapt_kl(0.1, 0.0, 6.0, 1000) == pytest.approx(0.098)


def test_explained_variance():
    returns, mask = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), masks(4, 7)
    assert rl.explained_variance(returns + 3, returns, mask).item() == pytest.approx(1.0)    # right but for a constant
    assert rl.explained_variance(torch.zeros(2, 9), returns, mask).item() == pytest.approx(0.0, abs=1e-6)


def test_log_probabilities_are_those_of_the_policy_that_samples():
    """At temperature 0.5 the probabilities are squared and normalised; the entropy is that policy's; nothing outside the answer."""
    model, g = tiny_lm(), torch.Generator().manual_seed(0)
    inputs, targets = torch.randint(0, 60, (2, 9), generator=g), torch.randint(0, 60, (2, 9), generator=g)
    targets[~masks(4, 7)] = IGNORE_INDEX
    logps, entropy = model(inputs, head=lambda h, output: rl.token_logps(h, output, targets, 0.5))
    probs = (model(inputs).softmax(-1) ** 2) / (model(inputs).softmax(-1) ** 2).sum(-1, keepdim=True)
    mask = masks(4, 7)
    torch.testing.assert_close(logps[mask].exp(), probs[mask].gather(1, targets[mask][:, None]).squeeze(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy[mask], torch.distributions.Categorical(probs[mask]).entropy(), atol=1e-4, rtol=1e-4)
    assert (logps[~mask] == 0).all() and (entropy[~mask] == 0).all()


# ---- rollouts ------------------------------------------------------------------------------------------------------

TOK = types.SimpleNamespace(pad_id=1, end_id=0, stop_ids=(0,), decode=str)


def test_draw_inverts_the_distribution():
    """As often as its probability; never what has none, not even at the ends of [0, 1)."""
    probs = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2, 0.0])
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1]
    drawn = draw(probs.log().expand(len(u), -1), 1.0, u)
    torch.testing.assert_close(torch.bincount(drawn, minlength=6) / len(u), probs, atol=1e-3, rtol=0)
    assert draw(probs.log().expand(2, -1), 1.0, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 4]


def test_an_answer_depends_on_its_number_and_on_nothing_beside_it():
    """Alone, in a batch, in another order: the same tokens. Another number or seed: others."""
    model, prompts = tiny_lm(seed=3), [[5, 9, 2], [11], [7, 7, 40, 3, 1, 8, 22], [60, 61]]
    def answers(prompts, samples, seed=0):
        return write_answers(model, prompts, samples, seed, 12, 1.0, TOK)
    together = answers(prompts, [4, 5, 6, 7])
    assert together == [answers([p], [i])[0] for i, p in enumerate(prompts, 4)]
    assert together == answers(prompts[::-1], [7, 6, 5, 4])[::-1]
    assert together != answers(prompts, [8, 9, 10, 11]) and together != answers(prompts, [4, 5, 6, 7], seed=1)


# ---- does it learn what it should? Optima in closed form ------------------------------------------------------------

V, P, R, N = 16, 3, 8, 64                                    # vocabulary, prompt, answer, answers a rollout


def play(algorithm, reward, steps, seed=0, eos=False, later_lr=None, places=False, **changes):
    """Train a tiny model whose output layer begins at zero, so that the reference is exactly uniform. -> ([mean score], [kl], last batch).
    places: learnt positions, and layers that begin large: what an answer's second token needs in order to know that it is the second."""
    cfg = train_ppo.Config(algorithm=algorithm, batch_size=N, max_new_tokens=R, missing_eos_penalty=0.0, stop_kl=1e9,
                           **{"ppo_epochs": 4, "minibatches": 4, **changes})
    torch.manual_seed(seed)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=P + R, tie_embeddings=False, variants=["gpt2"] * places)
    actor, reference, critic = build(args), build(args), build(args, "reward")
    for name, p in [*actor.named_parameters(), *critic.named_parameters()] if places else []:
        torch.nn.init.normal_(p, std=1.0) if "tok_emb" in name or "positions" in name else p.data.mul_(5 if p.dim() > 1 else 1)
    for head in (actor.output, reference.output, critic.v_head):
        torch.nn.init.zeros_(head.weight)
    critic = critic if algorithm == "ppo" else None
    state, ctx, scaler = State(beta=cfg.beta, mean=0.0, std=1.0, limit=math.inf), dist.Context(0, 0, 1, torch.device("cpu"), True), torch.amp.GradScaler(enabled=False)
    tools = (cfg, ctx, scaler, lambda: dist.autocast(ctx.device, torch.float32))
    models = [(m, make_optimizer(m, "adamw", 1e-3, 0.0, betas=(0.9, 0.999))) for m in (actor, critic) if m is not None]
    tok = types.SimpleNamespace(pad_id=1, end_id=0 if eos else -1, stop_ids=(0,) if eos else (), decode=str)
    copies, scores, kls = cfg.group if algorithm == "grpo" else 1, [], []
    for step in range(steps):
        prompts = torch.randint(1, V, (N // copies, P)).tolist()
        data = types.SimpleNamespace(ids=prompts, rows=prompts)
        rows, samples = [i // copies for i in range(N)], range(step * N, (step + 1) * N)
        batch, facts = advantages(experience(actor, reference, critic, reward, data, rows, samples, seed, cfg, tok, ctx, tools[-1]), cfg, state)
        for m, optimizer in models if step == later_lr else []:
            optimizer.param_groups[0]["lr"] = 3e-4
        for part in minibatches(N, step, cfg):
            for m, optimizer in models:
                loss, _ = backward(dist.DDP(m, ctx), policy_loss if m is actor else value_loss, batch, part, *tools)
                update(m, optimizer, scaler, 1.0, loss)
                m.zero_grad()
        scores.append(facts["scores"].item())
        kls.append(facts["kl"].item())
    return scores, kls, batch


def mean(values):
    return sum(values) / len(values)


def sevens(rows, prompts, answers):
    """The share of token 7 in an answer."""
    return [sum(t == 7 for t in a) / R for a in answers]


def reverse_kl_optimum(beta):
    """pi* = ref exp(r / beta) / Z factorises over the tokens, each 7 being worth 1 / R: (probability of a 7, KL of an answer)."""
    p = math.exp(1 / (beta * R)) / (math.exp(1 / (beta * R)) + V - 1)
    return p, R * (p * math.log(p * V) + (1 - p) * math.log((1 - p) * V / (V - 1)))


@pytest.mark.parametrize("beta,steps,temperature", [(0.05, 40, 0.7), pytest.param(0.05, 150, 1.0, marks=pytest.mark.slow), pytest.param(0.025, 150, 1.0, marks=pytest.mark.slow)])
def test_ppo_ends_at_the_kl_regularised_optimum(beta, steps, temperature):
    """Fixed point A. A wrong sign or scale of the KL, a score at the wrong token, a mean over padding or another temperature would all
    end elsewhere (at 0.7, log-probabilities taken at 1 end at 0.70); "the reward goes up" would not tell."""
    scores, kls, _ = play("ppo", sevens, steps, beta=beta, temperature=temperature)
    p, kl = reverse_kl_optimum(beta)
    assert abs(mean(scores[:2]) - 1 / V) < 0.03
    print(f"ppo, beta {beta}: p* {p:.3f}, measured {mean(scores[-20:]):.3f}; KL* {kl:.2f}, measured {mean(kls[-20:]):.2f}")
    assert abs(mean(scores[-20:]) - p) < 0.04
    assert mean(kls[-20:]) == pytest.approx(kl, rel=0.15)


def forward_kl_optimum(beta, c):
    """Where ((V-1)/V) / (1-p) - (1/V) / p = c / (beta R), by bisection."""
    low, high = 1 / V, 1 - 1e-9
    for _ in range(80):
        p = (low + high) / 2
        low, high = (p, high) if (V - 1) / V / (1 - p) - 1 / V / p < c / (beta * R) else (low, p)
    return p


@pytest.mark.slow
@pytest.mark.parametrize("baseline,c,p", [("loo", 1, 0.639), ("mean", 7 / 8, 0.591)])
def test_grpo_ends_at_the_optimum_of_the_other_kl(baseline, c, p):
    """Fixed point B: k3 in the loss pulls with the gradient of KL(ref || pi), whose optimum at the same coefficient is 0.639 instead of
    0.448; and a mean that includes the sample itself weakens the reward by (G - 1) / G against it."""
    assert forward_kl_optimum(0.05, c) == pytest.approx(p, abs=1e-3)
    scores, _, _ = play("grpo", sevens, 300, beta=0.05, baseline=baseline, scale="none", ppo_epochs=1, minibatches=1, group=8, later_lr=150)
    print(f"grpo, {baseline}: {p:.3f}, measured {mean(scores[-120:]):.3f}")
    assert abs(mean(scores[-120:]) - p) < 0.03


def copies_and_ends(rows, prompts, answers):
    """The answer to a prompt is its last token, and then the end."""
    return [0.7 * (a[0] == p[-1]) + 0.3 * (len(a) == 2 and a[1] == 0) for p, a in zip(prompts, answers)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm,changes", [("ppo", {"beta": 0.01}), ("grpo", {"beta": 0.0, "group": 8})])
def test_an_answer_that_depends_on_the_prompt_and_ends(algorithm, changes):
    """Task C: 0.03 at the start; above 0.95 by update 100, in answers of two tokens."""
    scores, _, batch = play(algorithm, copies_and_ends, 100, eos=True, places=True, **changes)
    print(f"{algorithm}: {scores[0]:.2f}, {scores[29]:.2f} at 30, {scores[59]:.2f} at 60, {mean(scores[-5:]):.3f} at 100")
    assert mean(scores[:2]) < 0.15 and mean(scores[-5:]) > 0.95
    assert (batch["targets"] != IGNORE_INDEX).sum(1).float().mean() < 2.2


# ---- the script ------------------------------------------------------------------------------------------------------

def test_the_first_minibatch_sees_the_policy_that_wrote_the_rollout(world, tmp_path):
    """One update a rollout: every ratio is exactly 1, nothing is clipped, no KL to the old policy, and since whitened advantages have mean 0,
    so has the loss. The KL to the reference begins at exactly 0."""
    for name, changes in (("ppo", {}), ("grpo", {"algorithm": "grpo", "group": 4, "beta": 0.04})):
        records = train_lines(start("ppo", world, tmp_path / name, ppo_epochs=1, minibatches=1, batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-3, **changes))
        for r in records:
            assert r["train/ratio_min"] == r["train/ratio_max"] == 1 and r["train/clipfrac"] == r["train/approx_kl"] == 0
        assert records[0]["train/kl"] == 0 != records[-1]["train/kl"] and (name == "grpo" or abs(records[0]["train/loss"]) < 1e-5)


@pytest.mark.parametrize("changes", [{}, {"peft": "lora"}, {"algorithm": "grpo"}])
def test_an_actor_at_rate_0_stays_at_the_reference(world, tmp_path, changes):
    """Reference a frozen copy, or the adapters switched off: the KL is exactly 0 and stays there; the rollouts are the same as before."""
    records = start("ppo", world, tmp_path, learning_rate=0.0, min_lr=0.0, eval_every=1, **changes)
    assert all(r["train/kl"] == 0 for r in train_lines(records)) and len(train_lines(records)) == 3
    assert len({str(r["samples"]) for r in records if "samples" in r}) == 1


def test_scores_of_a_reward_model_are_read_at_the_last_real_token(world, tok):
    """In a batch with longer neighbours, and whatever stands in the padding."""
    score, model = load_reward(str(world / "rm"), tok, 64, "cpu")
    prompts, answers = [[5, 9, 2], [7, 7], [1] * 20], [[4, tok.im_end_id], [3, 8, 8, 8, tok.im_end_id], [6]]
    together = score(None, prompts, answers)
    for p, a, s in zip(prompts, answers, together):
        assert model(torch.tensor([p + a]))[0, -1].item() == pytest.approx(s, abs=1e-5)


def test_a_rule_sees_the_row_and_the_answers_text(tmp_path, tok):
    (tmp_path / "rule.py").write_text("def longer(row, text):\n    return len(text) - row['at_least']\n", encoding="utf-8")
    score, model = load_reward(f"{tmp_path / 'rule.py'}:longer", tok, 64, "cpu")
    assert model is None and score([{"at_least": 2}], [[1]], [tok.encode("abcde") + [tok.im_end_id]]) == [3.0]


def test_the_demos_own_rule_can_be_the_reward(tok):
    rows, rule = demo_world.preference_rows(3, "val"), load_reward(f"{ROOT / 'nanollm' / 'world.py'}:rate", tok, 64, "cpu")[0]
    chosen, rejected = (rule(rows, [[1]] * 3, [tok.encode(row[side]) + [tok.im_end_id] for row in rows]) for side in ("chosen", "rejected"))
    assert all(c > r for c, r in zip(chosen, rejected))


def test_a_run_that_leaves_the_reference_too_far_ends(world, tmp_path, capsys):
    """More than three times the target KL: said in a sentence, evaluated and saved."""
    records = start("ppo", world, tmp_path, learning_rate=0.05, min_lr=0.05, target_kl=0.01, max_steps=30, schedule="constant")
    last = train_lines(records)[-1]
    assert last["step"] < 30 and last["train/kl"] > 0.03 and "nats an answer from the reference" in capsys.readouterr().out
    assert records[-1]["step"] == last["step"] and "val/loss" in records[-1]


def test_prompts_come_from_any_chat_or_preference_row(tok, capsys):
    """What a row holds as its last answer is not read; what is too long is counted."""
    question = [{"role": "user", "content": "Hi?"}]
    rows = [{"prompt": question, "chosen": "a", "rejected": "b"}, {"messages": [*question, {"role": "assistant", "content": "a"}]}, {"prompt": "Hi?"},
            {"instruction": "Hi?", "output": "a"}, {"conversation": [{"human": "Hi?", "assistant": "a"}]}]
    data = PromptRows([(f"row:{i}", row) for i, row in enumerate([*rows, {"prompt": "long " * 50}])], tok, 30)
    assert data.ids == [render(tok, question, True)[0]] * 5 and data.rows == rows and "left out 1 of 6 prompts" in capsys.readouterr().out


def test_scores_without_a_spread_are_refused():
    """One answer, or answers that all score alike, would make every later score plus or minus the limit."""
    batch = {"targets": torch.tensor([[IGNORE_INDEX, 4]]), "scores": torch.tensor([3.0]), "ended": torch.tensor([True]),
             "old": torch.zeros(1, 2), "ref": torch.zeros(1, 2)}
    with pytest.raises(UserError, match="the first 1 answers all score 3, no spread"):
        shape(batch, types.SimpleNamespace(missing_eos_penalty=1.0), {"mean": 0.0, "std": 0.0, "limit": 5.0, "beta": 0.1})
