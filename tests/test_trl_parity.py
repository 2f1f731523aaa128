"""Reward model, DPO and DPO with LoRA against trl (SFT: test_sft_parity.py): the same tokens, labels, losses and weights, from our own rows,
collators, losses and normalisation on one side and trl's trainers on the other."""
import copy
import json
import os
import types
from collections import defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer as HFTokenizer
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import train_dpo
import train_rm
from conftest import tiny_tokenizer
from nanollm import peft
from nanollm.data import PreferenceRows
from nanollm.distill import kd_loss_sum
from nanollm.foreign_tokenizers import to_hf_json
from nanollm.hf import from_hf_state, to_hf_name
from nanollm.losses import IGNORE_INDEX, sequence_logps
from nanollm.model import ModelArgs, RewardModel, Transformer
from nanollm.tokenizer import CHAT_TEMPLATE

ARGS = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, max_seq_len=160, tie_embeddings=False, norm_eps=1e-6)
COMMON = dict(use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
              per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0,
              optim="sgd", seed=0, disable_tqdm=True)
# trl scores an answer at its very last token; our rows end with <|im_end|>, so here the template ends there as well
NO_LAST_NEWLINE = CHAT_TEMPLATE.replace("{{ '\n' }}", "{% if not (loop.last and message['role'] == 'assistant') %}{{ '\n' }}{% endif %}")


def hf_tokenizer(template=CHAT_TEMPLATE):
    """Our tokenizer, exported to transformers."""
    assert template.count("{{ '\n' }}") == 1
    tok = PreTrainedTokenizerFast(tokenizer_object=HFTokenizer.from_str(json.dumps(to_hf_json(tiny_tokenizer()))), eos_token="<|im_end|>",
                                  pad_token="<|pad|>")
    tok.chat_template = template
    return tok


def config(**more):
    return LlamaConfig(vocab_size=tiny_tokenizer().vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=160, tie_word_embeddings=False, attention_dropout=0.0, rms_norm_eps=1e-6,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **more)


def llama(seed=0):
    """A random Llama whose weights are large enough to have opinions, and ours with the same weights."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(config()).float()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(4) if p.dim() > 1 else None
    args = ModelArgs(vocab_size=tiny_tokenizer().vocab_size, **ARGS)
    ours = Transformer(args)
    ours.load_state_dict(from_hf_state(theirs.state_dict(), args))
    return theirs, ours


def in_order(trainer):
    """A trainer that reads its rows in order."""
    return type(trainer.__name__, (trainer,), {"_get_train_sampler": lambda self, dataset=None: SequentialSampler(self.train_dataset)})


def train(trainer):
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def largest(ours, theirs_state):
    mine = ours.state_dict()
    theirs = from_hf_state(theirs_state, ours.args)
    return max((mine[k] - theirs[k]).abs().max().item() for k in mine)


PAIRS = [{"prompt": [{"role": "user", "content": f"hi {i}"}], "chosen": "good " + "Anna likes it. " * i + "好", "rejected": "bad" + "!" * i} for i in range(6)]
TRL_PAIRS = [{"prompt": p["prompt"], "chosen": [{"role": "assistant", "content": p["chosen"]}],
              "rejected": [{"role": "assistant", "content": p["rejected"]}]} for p in PAIRS]


def where(rows):
    return [(f"row:{i}", row) for i, row in enumerate(rows)]


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_model_losses_and_weights_equal_trls(tmp_path, center):
    """Bradley-Terry on the score of the closing <|im_end|>, with and without centring, three updates, and its metrics."""
    base, lm = llama()
    torch.manual_seed(1)
    theirs = LlamaForSequenceClassification(config(num_labels=1, pad_token_id=tiny_tokenizer().pad_id))
    theirs.model.load_state_dict(base.model.state_dict())
    ours = RewardModel(lm.args)
    ours.backbone.load_state_dict({k: v for k, v in lm.state_dict().items() if k != "output.weight"})
    ours.v_head.weight.data.copy_(theirs.score.weight.data)
    trainer = in_order(RewardTrainer)(model=theirs, args=RewardConfig(output_dir=str(tmp_path), max_length=160, center_rewards_coefficient=center or None,
                                                                      **COMMON),
                                      train_dataset=Dataset.from_list(TRL_PAIRS), processing_class=hf_tokenizer(NO_LAST_NEWLINE))
    rows = PreferenceRows(where(PAIRS), tiny_tokenizer(), 160)
    for row, (prompt, chosen, rejected) in zip(trainer.train_dataset, rows.pairs):
        assert row["chosen_ids"] == prompt + chosen and row["rejected_ids"] == prompt + rejected
    logs, off = train(trainer), 0.0
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    for step in range(3):
        loss, count, metrics = train_rm.pair_loss(ours, train_rm.Config(center=center), *rows.scored_batch([2 * step, 2 * step + 1]))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        off = max(off, abs((loss / count).item() - logs[step]["loss"]))
        assert (metrics["margin"] / count).item() == pytest.approx(logs[step]["margin"], abs=1e-4)
        assert (metrics["accuracy"] / count).item() == logs[step]["accuracy"]
    mine, state = ours.state_dict(), trainer.model.state_dict()
    body = from_hf_state({k: v for k, v in state.items() if k.startswith("model.")}, ours.args)
    moved = max(*((mine[f"backbone.{k}"] - v).abs().max().item() for k, v in body.items()), (mine["v_head.weight"] - state["score.weight"]).abs().max().item())
    print(f"\n| 5 | reward model, 3 updates, center {center} | loss {off:.0e} | weights {moved:.0e} |")
    assert off < 1e-6 and moved < 1e-6


def dpo_trainer(tmp_path, model, peft_config=None, **more):
    return in_order(DPOTrainer)(model=model, ref_model=None if peft_config else copy.deepcopy(model), peft_config=peft_config,
                                args=DPOConfig(output_dir=str(tmp_path), beta=0.1, max_length=160, **{**COMMON, **more}),
                                train_dataset=Dataset.from_list(TRL_PAIRS), processing_class=hf_tokenizer(NO_LAST_NEWLINE))


def same_pairs(trainer, rows):
    for row, pair in zip(trainer.train_dataset, rows.pairs):
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == pair


def compare_dpo(model, reference, optimizer, rows, logs):
    """Three updates beside trl's logs: loss, margin, log-probabilities, accuracy. The first loss is ln 2. -> the largest difference of a loss."""
    off = 0.0
    for step, line in enumerate(logs):
        loss, count, m = train_dpo.preference_loss(model, reference, train_dpo.Config(), *rows.batch([2 * step, 2 * step + 1]))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        off = max(off, abs((loss / count).item() - line["loss"]))
        assert off < 1e-5
        assert (m["margin"] / count).item() == pytest.approx(line["rewards/margins"], abs=1e-4)
        assert (m["chosen_logp"] / count).item() == pytest.approx(line["logps/chosen"], rel=1e-5)
        assert (m["accuracy"] / count).item() == line["rewards/accuracies"]
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and abs(logs[-1]["rewards/margins"]) > 1e-3
    return off


def test_dpo_losses_and_weights_equal_trls(tmp_path):
    """Three updates of the full model against a frozen copy."""
    theirs, ours = llama()
    reference = copy.deepcopy(ours).requires_grad_(False)
    trainer = dpo_trainer(tmp_path, theirs)
    rows = PreferenceRows(where(PAIRS), tiny_tokenizer(), 160)
    same_pairs(trainer, rows)
    off = compare_dpo(ours, reference, torch.optim.SGD(ours.parameters(), lr=1e-2), rows, train(trainer))
    moved = largest(ours, trainer.model.state_dict())
    print(f"\n| 8 | DPO, 3 updates of the full model | loss {off:.0e} | weights {moved:.0e} |")
    assert moved < 1e-5


def test_dpo_with_lora_equals_trl_with_peft(tmp_path):
    """The reference is the adapter switched off, on both sides; base weights stay, A and B move alike."""
    theirs, ours = llama()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    targets = {"wq": "q_proj", "wv": "v_proj", "w2": "down_proj"}
    torch.manual_seed(11)
    trainer = dpo_trainer(tmp_path, theirs, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=list(targets.values())), learning_rate=0.1)
    peft.inject_lora(ours, 4, 16, 0.0, list(targets))
    their_layer = {n: trainer.model.get_submodule("base_model.model." + to_hf_name(n)) for n, _ in peft.lora_layers(ours)}
    with torch.no_grad():
        for name, layer in peft.lora_layers(ours):
            layer.lora_A.copy_(their_layer[name].lora_A["default"].weight)
    rows = PreferenceRows(where(PAIRS), tiny_tokenizer(), 160)
    same_pairs(trainer, rows)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    off = compare_dpo(ours, None, optimizer, rows, train(trainer))
    moved = max((layer.lora_B - their_layer[name].lora_B["default"].weight).abs().max().item() for name, layer in peft.lora_layers(ours))
    print(f"\n| 9 | DPO with LoRA, reference = adapter off | loss {off:.0e} | lora_B {moved:.0e} |")
    for name, layer in peft.lora_layers(ours):
        assert (layer.lora_A - their_layer[name].lora_A["default"].weight).abs().max() < 1e-6, name
        assert (layer.lora_B - their_layer[name].lora_B["default"].weight).abs().max() < 1e-6, name
        assert layer.lora_B.abs().max() > 1e-5
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in before.items())


def trl_stub():
    """What DPOTrainer._compute_loss needs of a trainer, so that it can be called on given logits."""
    accelerator = types.SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda m: m)
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, loss_types=["sigmoid"], loss_weights=[1.0], beta=0.1, label_smoothing=0.0,
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, ref_model=None,
        args=types.SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None))


@pytest.mark.parametrize("rpo_alpha", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_dpo_loss_and_gradient_on_random_logits_equal_trls(seed, rpo_alpha):
    """Value and gradient with respect to every logit, for ragged prompts and answers, also with the chosen answers' own loss."""
    g, B, V = torch.Generator().manual_seed(seed), 4, 13

    def ids(low, high):
        return torch.randint(1, V, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    batch = DataCollatorForPreference(pad_token_id=0)([{"prompt_ids": ids(2, 5), "chosen_ids": ids(1, 6), "rejected_ids": ids(1, 6)} for _ in range(B)])
    T = batch["input_ids"].size(1)
    logits = (3 * torch.randn(2 * B, T, V, generator=g)).requires_grad_()
    reference = 3 * torch.randn(2 * B, T, V, generator=g)
    targets = torch.where(batch["completion_mask"][:, 1:] == 1, batch["input_ids"][:, 1:], IGNORE_INDEX)
    ref_logps, counts = sequence_logps(reference[:, :-1], targets)

    class Given(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = logits

        def forward(self, inputs, segments, cache, head):
            return head(self.logits[:, :-1], torch.nn.Identity())
    loss, count, _ = train_dpo.preference_loss(Given(logits), Given(reference), train_dpo.Config(), None, targets, nll_weight=rpo_alpha * B / counts[:B].sum())
    ours, = torch.autograd.grad(loss / count, logits)

    class Model(torch.nn.Module):
        def forward(self, **inputs):
            return types.SimpleNamespace(logits=logits)
    inputs = {**batch, "ref_chosen_logps": ref_logps[:B], "ref_rejected_logps": ref_logps[B:]}
    stub = trl_stub()
    stub.loss_types, stub.loss_weights = ["sigmoid", "sft"], [1.0, rpo_alpha]
    want = DPOTrainer._compute_loss(stub, Model(), inputs, False)
    theirs, = torch.autograd.grad(want, logits)
    assert (loss / count).item() == pytest.approx(want.item(), abs=1e-6)
    assert (ours - theirs).abs().max() < 1e-6 and theirs.abs().max() > 1e-3


@pytest.mark.parametrize("kind, beta", [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5)])
def test_distillation_losses_and_gradients_equal_gkd(kind, beta):
    """Row 14: GKDTrainer.generalized_jsd_loss, the mean over supervised positions, which has no factor T^2."""
    from trl.experimental.gkd import GKDTrainer
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 9, requires_grad=True), torch.randn(2, 4, 9)
    targets, T = torch.tensor([[IGNORE_INDEX, 1, 2, 3], [IGNORE_INDEX, IGNORE_INDEX, 5, 6]]), 2.0
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels=targets, beta=beta, temperature=T) * T**2
    ours, count = kd_loss_sum(student, teacher, targets, T, kind)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (theirs, ours / count)]
    print(f"KD {kind}: loss {abs(theirs - ours / count):.1e}, gradient {(grads[0] - grads[1]).abs().max():.1e}")
    assert abs(theirs - ours / count) < 1e-6 and (grads[0] - grads[1]).abs().max() < 1e-6
