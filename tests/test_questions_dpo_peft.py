"""What the notes say of DPO, adapters and distillation, where no other test shows it: each a question of docs/questions/11_dpo.toml or 13_peft.toml."""
import copy
import inspect
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train_dpo
from conftest import pairs, tiny_lm, tiny_tokenizer
from nanollm import quant
from nanollm.data import IGNORE_INDEX, PreferenceRows
from nanollm.distill import kd_loss_sum
from nanollm.losses import dpo_loss, sequence_logps
from nanollm.peft import add_adapter, merge_adapter
from nanollm.peft.lora import LoRALinear

IDS = torch.randint(0, 300, (4, 12), generator=torch.Generator().manual_seed(1))


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fit(model, inputs, targets, rate, steps):
    """The loss after `steps` of AdamW on these rows."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
    return loss.item()


# ---- DPO -----------------------------------------------------------------------------------------------------------

def test_dpo_reaches_the_optimum_of_rlhf_and_its_log_ratio_is_the_reward():
    """Three actions, rewards r, Bradley-Terry preferences. The optimum of E[r] - beta KL is ref * exp(r / beta), normalised; DPO, which sees
    the preferences only, ends there, and beta log pi/ref is r but for one constant."""
    r, ref, beta = torch.tensor([1.0, 0.2, -0.5]).double(), torch.tensor([0.5, 0.2, 0.3]).double(), 0.7
    optimum = torch.softmax(ref.log() + r / beta, 0)
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def expected_loss():
        optimizer.zero_grad()
        logps, total = logits.log_softmax(0), 0
        for i in range(3):
            for j in range(3):
                if i != j:                                   # i is preferred to j with probability sigmoid(r_i - r_j)
                    total = total + torch.sigmoid(r[i] - r[j]) * dpo_loss(logps[[i, j]], ref.log()[[i, j]], torch.ones(2), beta)[0]
        total.backward()
        return total
    optimizer.step(expected_loss)
    pi = logits.detach().softmax(0)
    reward = beta * (pi / ref).log()
    assert (pi - optimum).abs().max() < 1e-4 and (optimum - ref).abs().max() > 0.2
    assert ((reward - r) - (reward - r).mean()).abs().max() < 1e-4


def test_log_probabilities_of_tokens_add_up_and_their_probabilities_may_exceed_one():
    """The notes add probabilities of tokens. The probability of an answer is their product, so what adds up is their logarithms."""
    logits, targets = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 0, 1]])
    p = logits.softmax(-1)[0, [0, 1, 2], [0, 0, 1]]
    logps, _ = sequence_logps(logits, targets)
    assert logps.exp().item() == pytest.approx(p.prod().item()) and p.sum() > 2.4


def test_a_large_beta_lets_go_once_the_gap_is_opened():
    """The weight of a pair's gradient, beta s(-beta gap): beta 0.5 pulls five times as hard as 0.1 at a gap of 0, an eighth as hard at 10."""
    def weight(beta, gap):
        logps = torch.tensor([gap, 0.0], dtype=torch.float64, requires_grad=True)
        dpo_loss(logps, torch.zeros(2), torch.ones(2), beta)[0].backward()
        return -logps.grad[0].item()
    assert [weight(0.1, 0.0), weight(0.5, 0.0)] == pytest.approx([0.05, 0.25])
    assert [weight(0.1, 10.0), weight(0.5, 10.0)] == pytest.approx([0.0269, 0.0033], abs=1e-4)


def test_the_reference_stays_and_the_policy_walks_away_from_it():
    """KL(policy || reference) over the answers' places is 0 at the start and grows; not a bit of the reference moves."""
    reference = tiny_lm().requires_grad_(False)
    policy, before = copy.deepcopy(reference).requires_grad_(True), copy.deepcopy(reference.state_dict())
    inputs, targets = IDS[:, :-1], IDS[:, 1:].clone()
    targets[:, :4] = IGNORE_INDEX                            # a prompt; rows 0 and 1 are chosen, 2 and 3 rejected
    optimizer, distances = torch.optim.AdamW(policy.parameters(), 1e-3), []
    for _ in range(12):
        with torch.no_grad():
            p, q = (F.log_softmax(m(inputs)[targets != IGNORE_INDEX], -1) for m in (policy, reference))
        distances.append((p.exp() * (p - q)).sum(-1).mean().item())
        loss, count, metrics = train_dpo.preference_loss(policy, reference, train_dpo.Config(), inputs, targets)
        if len(distances) == 1:
            assert loss.item() / count == pytest.approx(math.log(2)) and metrics["margin"] == 0
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    assert distances[0] == 0 and distances[-1] > distances[4] > distances[1] > 0
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())


def test_a_pair_is_one_prompt_two_answers_with_their_end_tokens_padded_on_the_right():
    """The prompt in the chat template up to the assistant's header, then each answer and <|im_end|>; labels on the answers only."""
    tok = tiny_tokenizer()
    rows = PreferenceRows([(f"f:{i}", row) for i, row in enumerate(pairs(3))], tok, 160)
    inputs, targets, *_ = rows.batch(range(3))
    for i, (prompt, chosen, rejected) in enumerate(rows.pairs):
        header = [tok.im_start_id, *tok.encode("assistant\n")]
        assert prompt[0] == tok.im_start_id and prompt[-len(header):] == header
        assert chosen[-1] == rejected[-1] == tok.im_end_id and chosen != rejected
        for row, answer in ((i, chosen), (3 + i, rejected)):
            n = len(prompt) + len(answer)
            assert inputs[row].tolist() == (prompt + answer)[:-1] + [tok.pad_id] * (inputs.size(1) - n + 1)
            assert targets[row, len(prompt) - 1 : n - 1].tolist() == answer
            assert (targets[row] != IGNORE_INDEX).sum() == len(answer)


# ---- adapters ------------------------------------------------------------------------------------------------------

def test_the_update_of_lora_has_rank_r_and_is_no_singular_value_decomposition():
    """B A of a trained layer has r singular values above 0, but its columns and rows are not orthogonal, as those of an SVD would be. The SVD
    answers another question: how near a matrix of rank r can come to a given change, here one whose best part is 2 directions."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(100, 100, bias=False), r=2, alpha=4)
    wanted = torch.randn(100, 2) @ torch.randn(2, 100) / 30 + torch.randn(100, 100) / 300
    x, optimizer = torch.randn(256, 100), torch.optim.AdamW([layer.lora_A, layer.lora_B], 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(layer.update(x), x @ wanted.T).backward()
        optimizer.step()
    change = (layer.merged_weight() - layer.weight).detach()
    values = torch.linalg.svdvals(change)
    assert (values[:2] > 0.5).all() and values[2] < 1e-5 * values[0]
    A = F.normalize(layer.lora_A.detach(), dim=1)
    assert (A @ A.T)[0, 1].abs() > 1e-3
    best = torch.linalg.svdvals(wanted)[2:].norm()           # Eckart-Young: nothing of rank 2 comes nearer
    assert best * 0.999 < (change - wanted).norm() < best * 1.1


def test_roberta_larges_lora_of_rank_16_is_6_megabytes_and_not_68_kilobytes():
    """24 layers, query and value, 1,024 wide: 1,572,864 numbers, 6.3 MB in fp32. Without the new classifier, which is saved with it."""
    layer = LoRALinear(nn.Linear(1024, 1024), r=16, alpha=16)
    numbers = 24 * 2 * sum(p.numel() for p in (layer.lora_A, layer.lora_B))
    assert numbers == 1_572_864 and 4 * numbers == pytest.approx(6.3e6, rel=0.01) and 4 * numbers > 90 * 68_000


def test_an_unmerged_adapter_costs_two_products_more_and_a_merged_one_none():
    """Counted in floating-point operations of a forward pass; the notes' "no inference latency" holds after merging only."""
    def work(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(IDS)
        return counter.get_total_flops()
    base, model = work(tiny_lm()), tiny_lm()
    add_adapter(model, "lora", r=4)
    more = sum(2 * IDS.numel() * 4 * (m.in_features + m.out_features) for m in model.adapter.parts.values())
    assert work(model) == base + more and more > 0
    assert work(merge_adapter(model)) == base
    bottleneck = tiny_lm()
    add_adapter(bottleneck, "adapter", size=4)               # never mergeable: a layer, not a change of a weight
    assert work(bottleneck) > base


@pytest.mark.parametrize("method", ["prefix", "prompt", "lora"])
def test_the_frozen_model_stays_in_memory_what_is_saved_are_gradients_and_adams_states(method):
    """Each weight of the base is still there; gradients and the two moments exist for the adapter's numbers alone."""
    base, model = tiny_lm(), tiny_lm()
    add_adapter(model, method)
    resident = {p.data_ptr(): p.numel() for p in [*model.parameters(), *model.buffers()]}
    assert sum(resident.values()) >= sum(p.numel() for p in base.parameters()) + sum(p.numel() for p in trained(model).values())
    optimizer = torch.optim.AdamW(trained(model).values(), 1e-3)
    F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    optimizer.step()
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    moments = sum(s[k].numel() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    whole = sum(p.numel() for p in base.parameters())
    assert gradients == sum(p.numel() for p in trained(model).values()) and moments == 2 * gradients and gradients < whole / 2


def test_prompt_tuning_trains_n_vectors_that_end_as_no_words_embedding():
    """[8, d] numbers and nothing else. They begin as embeddings of tokens and are free from then on: not an instruction in words."""
    model = tiny_lm()
    add_adapter(model, "prompt", n=8)
    (name, prompt), = trained(model).items()
    assert name == "tok_embeddings.prompt" and prompt.shape == (8, 32)
    nearest = lambda: torch.cdist(prompt.detach(), model.tok_embeddings.weight.detach()).min(1).values
    assert nearest().max() < 1e-4
    fit(model, IDS[:, :-1], IDS[:, 1:], 3e-2, 20)
    assert nearest().min() > 1e-2


def test_with_as_many_numbers_a_prompt_in_every_layer_learns_more_than_one_at_the_input():
    """P-tuning v2 against prompt tuning, 640 numbers each, on a small model, each at the better of two rates."""
    best = {}
    for method, n in (("prompt", 20), ("ptuning_v2", 10)):   # n C = 20 * 32; 2 n L G D = 2 * 10 * 2 * 16
        ends = []
        for rate in (0.03, 0.1):
            torch.manual_seed(0)
            model = tiny_lm()
            add_adapter(model, method, n=n)
            assert sum(p.numel() for p in trained(model).values()) == 640
            ends.append(fit(model, IDS[:, :-1], IDS[:, 1:], rate, 25))
        best[method] = min(ends)
    assert best["ptuning_v2"] < best["prompt"] - 0.05


# ---- distillation, quantisation ------------------------------------------------------------------------------------

def test_batchmean_of_kl_div_divides_by_the_rows_and_not_by_the_tokens():
    """On (B, T, V) the loss of the notes' listing is T times the mean over tokens; on a classifier's (B, V), for which it was written, it is
    right."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 7, 11, generator=g) for _ in range(2))
    log_p, p = F.log_softmax(student, -1), F.softmax(teacher, -1)
    total, count = kd_loss_sum(student, teacher, torch.zeros(3, 7, dtype=torch.long))
    batchmean = F.kl_div(log_p, p, reduction="batchmean")
    assert count == 21 and batchmean.item() == pytest.approx(7 * (total / count).item(), rel=1e-5)
    assert F.kl_div(log_p.flatten(0, 1), p.flatten(0, 1), reduction="batchmean").item() == pytest.approx((total / count).item(), rel=1e-5)


def test_distillation_trains_a_whole_student_quantisation_trains_nothing_and_an_adapter_a_few_numbers():
    """Three things that the notes put under one name."""
    student, teacher = tiny_lm(1), tiny_lm().requires_grad_(False)
    kd_loss_sum(student(IDS), teacher(IDS), IDS)[0].backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())
    small = tiny_lm(dim=64, multiple_of=64)
    whole = sum(p.numel() for p in small.parameters())
    quant.quantize(small, "nf4")
    assert not any(isinstance(m, nn.Linear) and m.weight.requires_grad for n, m in small.named_modules() if n.startswith("layers."))
    adapted = tiny_lm(dim=64, multiple_of=64)
    add_adapter(adapted, "lora", r=2)
    assert 0 < sum(p.numel() for p in trained(adapted).values()) < whole / 5


# ---- the Trainer of the notes' listings ----------------------------------------------------------------------------

def test_the_trainer_of_today_has_other_names_than_the_listing():
    """compute_loss gets the number of labels of a whole update, too; eval_strategy was evaluation_strategy; datasets has no load_metric any
    more; and a number in label2id that is written as a string stays one."""
    import datasets
    from transformers import PretrainedConfig, Trainer, TrainingArguments
    assert "num_items_in_batch" in inspect.signature(Trainer.compute_loss).parameters
    assert {"eval_strategy", "evaluation_strategy"} & inspect.signature(TrainingArguments).parameters.keys() == {"eval_strategy"}
    assert not hasattr(datasets, "load_metric")
    config = PretrainedConfig(num_labels=2, id2label={"0": "bad", "1": "good"}, label2id={"bad": "0", "good": "1"})
    assert config.id2label == {0: "bad", 1: "good"} and config.label2id == {"bad": "0", "good": "1"}


def test_two_updates_change_next_to_nothing_and_a_line_every_thirty_never_comes(tmp_path):
    """max_steps=2, logging_steps=30, the listing's rate: only the Trainer's own summary is logged, and the loss falls by less than 1 %."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    ask = lambda: model.eval()(input_ids=IDS, labels=IDS).loss.item()
    before = ask()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), learning_rate=2e-4, max_steps=2, logging_steps=30, save_strategy="no", report_to="none",
                                               use_cpu=True, disable_tqdm=True), train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 2 and not any("loss" in line for line in trainer.state.log_history)
    assert 0.99 * before < ask() < before
