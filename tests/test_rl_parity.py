"""PPO and GRPO against trl: whitening, one full PPO iteration of two epochs, the four normalisers of GRPO. Our own models, losses and
advantages on one side, trl's trainers on the other."""
import os
import types
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import trl.experimental.ppo.ppo_trainer as trl_ppo
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from conftest import tiny_tokenizer
from nanollm import rl
from nanollm.hf import from_hf_state
from nanollm.losses import IGNORE_INDEX
from nanollm.model import ModelArgs, RewardModel, Transformer
from test_trl_parity import ARGS, config, hf_tokenizer


def test_masked_mean_and_whitening_equal_trls():
    """Variance over n - 1 as trl has it; the mean of what is whitened is 0, its variance 1, and behind the mask it is 0."""
    g, largest = torch.Generator().manual_seed(0), 0.0
    for _ in range(5):
        x, mask = 3 * torch.randn(4, 9, generator=g) + 1, torch.rand(4, 9, generator=g) < 0.6
        assert rl.masked_mean(x, mask).item() == pytest.approx(trl_ppo.masked_mean(x, mask).item(), abs=1e-6)
        ours, theirs = rl.masked_whiten(x, mask, unbiased=True), trl_ppo.masked_whiten(x, mask) * mask
        largest = max(largest, (ours - theirs).abs().max().item())
        biased = rl.masked_whiten(x, mask)[mask]
        assert abs(biased.mean()) < 1e-6 and abs(biased.var(correction=0) - 1) < 1e-5 and (ours[~mask] == 0).all()
    print(f"row 13, whitening: {largest:.1e}")
    assert largest < 1e-6


def ours_of(theirs, args):
    """A RewardModel with the weights of a sequence classifier of one label."""
    ours = RewardModel(args)
    ours.backbone.load_state_dict(from_hf_state({k: v for k, v in theirs.state_dict().items() if k.startswith("model.")}, args))
    ours.v_head.weight.data.copy_(theirs.score.weight.data)
    return ours


def test_one_ppo_iteration_equals_trls(tmp_path, monkeypatch):
    """Four prompts of three lengths, answers of six tokens of which three end early: k1 in the reward, the penalty for a missing end,
    GAE, whitening, and two clipped epochs of actor and critic. Weights equal; the KL and the score as trl logs them.

    trl places the score one token behind the end and values that padding state, so here past_end=True; we do not by default."""
    tok, R = tiny_tokenizer(), 6
    shape = dict(num_labels=1, pad_token_id=tok.pad_id, eos_token_id=tok.im_end_id)
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config(**shape)), LlamaForCausalLM(config(**shape))
    reward, value = LlamaForSequenceClassification(config(**shape)), LlamaForSequenceClassification(config(**shape))
    for model in (policy, reference, reward, value):
        for p in model.parameters():
            p.data.mul_(4) if p.dim() > 1 else None          # opinions, so that differences show
    args = ModelArgs(vocab_size=tok.vocab_size, **ARGS)
    actor, ref = Transformer(args), Transformer(args)
    actor.load_state_dict(from_hf_state(policy.state_dict(), args))
    ref.load_state_dict(from_hf_state(reference.state_dict(), args))
    judge, critic = ours_of(reward, args), ours_of(value, args)

    seen = {}

    def fixed(model, queries, *rest):
        """Answers that do not depend on the sampler, with their logits as trl scales them."""
        answers = torch.randint(0, 200, (len(queries), R), generator=torch.Generator().manual_seed(3))
        answers[0, 3] = answers[1, 5] = answers[2, 0] = tok.im_end_id
        rows, seen["queries"], seen["answers"] = torch.cat([queries, answers], 1), queries.clone(), answers
        mask = rows != tok.pad_id
        logits = model(input_ids=rows.masked_fill(~mask, 0), attention_mask=mask, position_ids=mask.cumsum(1) - mask.long()).logits
        return rows, logits[:, queries.size(1) - 1 : -1] / (0.7 + 1e-7)
    monkeypatch.setattr(trl_ppo, "batch_generation", fixed)
    data = Dataset.from_list([{"input_ids": tok.encode("ab" * (i % 3 + 1))} for i in range(4)])
    theirs = hf_tokenizer()
    theirs.padding_side = "left"
    trainer = PPOTrainer(args=PPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", per_device_train_batch_size=4,
        per_device_eval_batch_size=2, num_ppo_epochs=2, num_mini_batches=1, total_episodes=4, response_length=R, stop_token="eos",
        num_sample_generations=0, learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", save_strategy="no", kl_coef=0.05,
        missing_eos_penalty=1.0, disable_tqdm=True),
        processing_class=theirs, model=policy, ref_model=reference, reward_model=reward, value_model=value, train_dataset=data, eval_dataset=data)
    trainer.train()

    prompts = [[t for t in row if t != tok.pad_id] for row in seen["queries"].tolist()]
    rows = [p + a for p, a in zip(prompts, seen["answers"].tolist())]
    T = max(map(len, rows)) - 1
    inputs = torch.tensor([r[:-1] + [tok.pad_id] * (T + 1 - len(r)) for r in rows])          # padded on the right
    targets = torch.tensor([[IGNORE_INDEX] * (len(p) - 1) + r[len(p) :] + [IGNORE_INDEX] * (T + 1 - len(r)) for p, r in zip(prompts, rows)])
    answered, ends = targets != IGNORE_INDEX, targets == tok.im_end_id
    mask = answered & (ends.cumsum(1) - ends.long() == 0)                                    # up to and including the end token
    beyond = answered & ((ends.cumsum(1) - ends.long() == 0) | (torch.nn.functional.pad(ends, (1, 0))[:, :-1]))       # and one token more
    temperature = 0.7 + 1e-7

    def logps(model):
        return model(inputs, head=lambda h, output: rl.token_logps(h, output, targets, temperature))[0]
    with torch.no_grad():
        old, ref_logps, values = logps(actor) * mask, logps(ref) * mask, critic(inputs) * beyond
        last = mask.size(1) - 1 - mask.flip(1).int().argmax(1)
        full = torch.cat([inputs, torch.full((4, 1), tok.pad_id)], 1).scatter(1, last[:, None] + 1, targets.gather(1, last[:, None]))
        score = judge(full).gather(1, last[:, None] + 1).squeeze(1) - 1.0 * ~(mask & ends).any(1)
        rewards = rl.place_reward(-0.05 * rl.kl_k1(old, ref_logps), score, mask, past_end=False)
        # the last real place has no room behind it in a full answer; trl counts places within the answer
        at_end = (last + 1 < answered.size(1)) & answered.gather(1, (last + 1).clamp(max=T - 1)[:, None]).squeeze(1)
        rewards = torch.where(at_end[:, None], rl.place_reward(-0.05 * rl.kl_k1(old, ref_logps), score, mask, past_end=True), rewards)
        better, returns = rl.gae(rewards, values, beyond, 1.0, 0.95)
        better = rl.masked_whiten(better, mask, unbiased=True)
    optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=1e-2)
    for _ in range(2):
        loss, count, _ = rl.ppo_policy_loss(logps(actor), old, better, mask, 0.2)
        v_loss, v_count, _ = rl.ppo_value_loss(critic(inputs), values, returns, beyond, 0.2)
        (loss / count + 0.1 * v_loss / v_count).backward()
        optimizer.step()
        optimizer.zero_grad()

    moved = from_hf_state(trainer.model.policy.state_dict(), args)
    actors = max((actor.state_dict()[k] - v).abs().max().item() for k, v in moved.items())
    assert max((ref.state_dict()[k] - v).abs().max().item() for k, v in moved.items()) > 1e-4
    after = ours_of(trainer.model.value_model, args).state_dict()
    critics = max((critic.state_dict()[k] - v).abs().max().item() for k, v in after.items())
    print(f"row 11, one PPO iteration: actor's weights {actors:.1e}, critic's {critics:.1e}")
    assert actors < 1e-6 and critics < 1e-6
    line = next(line for line in trainer.state.log_history if "objective/kl" in line)
    assert line["objective/kl"] == pytest.approx((rl.kl_k1(old, ref_logps) * mask).sum(1).mean().item(), abs=1e-4)
    assert line["objective/scores"] == pytest.approx(score.mean().item(), abs=1e-4)


def grpo_stub(loss_type, beta, logps):
    """What GRPOTrainer._compute_loss needs of a trainer, so that it can be called on given log-probabilities."""
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
                                        reduce=lambda x, reduction=None: x)
    return types.SimpleNamespace(
        accelerator=accelerator, model=types.SimpleNamespace(training=True), loss_type=loss_type, beta=beta, epsilon_low=0.2, epsilon_high=0.2,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, aux_loss_enabled=False, current_gradient_accumulation_steps=1, max_completion_length=8,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.ones_like(logps), None))


@pytest.mark.parametrize("normalizer", rl.NORMALIZERS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_losses_and_gradients_equal_trls(normalizer, beta):
    """Ragged answers, ratios on both sides of the clip, with and without k3."""
    g, B, T = torch.Generator().manual_seed(1), 6, 5
    logps = torch.randn(B, T, generator=g).requires_grad_()
    old, ref = logps.detach() + 0.3 * torch.randn(B, T, generator=g), logps.detach() + 0.2 * torch.randn(B, T, generator=g)
    advantages, mask = torch.randn(B, generator=g), torch.arange(T)[None] < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    inputs = dict(prompt_ids=torch.zeros(B, 2).long(), prompt_mask=torch.ones(B, 2).long(), completion_ids=torch.zeros(B, T).long(),
                  completion_mask=mask.long(), advantages=advantages, old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum())
    theirs = GRPOTrainer._compute_loss(grpo_stub(normalizer, beta, logps), None, inputs)
    loss, count, _ = rl.grpo_loss(logps, old, ref, advantages[:, None], mask, 0.2, beta, normalizer, max_tokens=8)
    want, = torch.autograd.grad(theirs, logps, retain_graph=True)
    got, = torch.autograd.grad(loss / count, logps)
    print(f"row 12, {normalizer}, beta {beta}: loss {abs((loss / count - theirs).item()):.1e}, gradient {(got - want).abs().max():.1e}")
    assert (loss / count).item() == pytest.approx(theirs.item(), abs=1e-6)
    assert (got - want).abs().max() < 1e-6 and want.abs().max() > 1e-3
