"""Every adapter against its own claims: step 0, counts, who learns, off, merged, swapped, in front of padded and cached text, in checkpoints."""
import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_dpo
import train_ppo
import train_rm
import train_sft
from conftest import ROOT, SHAPE, largest_difference, metrics, options, tiny_lm, weights
from nanollm import checkpoint, model as model_file, peft
from nanollm.adapter_files import load_adapters
from nanollm.config import UserError
from nanollm.generate import generate, generate_batch
from nanollm.model import KVCache, ModelArgs
from nanollm.peft import (METHODS, add_adapter, adapter_config, adapter_state_dict, bake, disable_adapter, merge_adapter, set_adapter,
                          unmerge_adapter)
from nanollm.quant import NF4Linear
from nanollm.variants import build

OPTIONS = {"lora": dict(r=4), "rslora": dict(r=4), "dora": dict(r=4), "qlora": dict(r=4), "adalora": dict(r=4), "adapter": dict(size=6), "ia3": {},
           "bitfit": {}, "prefix": dict(n=5, hidden=12), "ptuning_v2": dict(n=5), "prompt": dict(n=5), "ptuning": dict(n=5, hidden=12)}
SOFT = ("prefix", "ptuning_v2", "prompt", "ptuning")
IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def fresh(method, tied=True, variants=(), **more):
    base = model = tiny_lm(tie_embeddings=tied, variants=list(variants))                     # tied and untrained, it repeats its last token
    if variants:
        model = build(base.args).eval()
        model.load_state_dict(base.state_dict())
    add_adapter(model, method, **{**OPTIONS[method], **more})
    return model


def trained(method, seed=2, **more):
    """As after some training: no number of the adapter is at its start."""
    model, g = fresh(method, **more), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


@torch.no_grad()
def logits(model, ids=IDS, **how):
    return model(ids, **how)


def loss_of(model):
    return F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


# ---- what all of them promise --------------------------------------------------------------------------------------

def test_every_method_of_the_notes_is_there():
    assert set(METHODS) == set(OPTIONS) and set(peft.ANYWHERE) | set(peft.MERGEABLE) <= set(METHODS)


@pytest.mark.parametrize("method", [m for m in OPTIONS if m not in SOFT])
def test_step_0_is_the_base_model_and_training_changes_it(method):
    """Bit for bit, where nothing is rescaled; DoRA divides lengths. QLoRA's base is the one in 4 bits."""
    base, model = tiny_lm(), fresh(method)
    if method == "qlora":
        for name in model.adapter.parts:
            peft.place(base, name, NF4Linear(base.get_submodule(name), double=True))
    tolerance = {"dora": 1e-5}.get(method, 0)
    torch.testing.assert_close(logits(model), logits(base), atol=tolerance, rtol=0)
    assert (logits(trained(method)) - logits(base)).abs().max() > 0.01


def test_virtual_tokens_are_no_identity_at_step_0_not_even_as_zeros():
    """Zero keys get the exponential of 0 in the softmax, and their values' zeros dilute what the real ones say."""
    for method in SOFT:
        assert (logits(fresh(method)) - logits(tiny_lm())).abs().max() > 1e-3, method
    model = fresh("ptuning_v2")
    torch.nn.init.zeros_(model.soft.prefix)
    assert (logits(model) - logits(tiny_lm())).abs().max() > 1e-3


def test_trained_numbers_by_formula():
    """C = dim, F = FFN width, G D = width of the keys, L layers; r, b, n, h the sizes of the adapters."""
    C, F_, K, L, r, b, n, h = 32, 96, 16, 2, 4, 6, 5, 12
    ins_and_outs = [(C, C), (C, K), (C, K), (C, C), (C, F_), (F_, C), (C, F_)]          # wq wk wv wo w1 w2 w3
    lora = L * sum(r * (i + o) for i, o in ins_and_outs)
    outs = L * sum(o for _, o in ins_and_outs)
    r0 = 3 * r // 2
    want = {"lora": lora, "rslora": lora, "qlora": lora, "dora": lora + outs, "adalora": L * sum(r0 * (i + o + 1) for i, o in ins_and_outs),
            "adapter": L * 2 * (2 * C * b + b + C), "ia3": L * (K + K + F_), "bitfit": outs,
            "prompt": n * C, "ptuning": n * C + (C * h + h) + (h * h + h) + (h * C + C),
            "ptuning_v2": n * 2 * L * K, "prefix": n * K + (K * h + h) + (h * 2 * L * K + 2 * L * K)}
    assert tiny_lm().args.ffn_dim == F_
    assert {m: sum(p.numel() for p in trainable(fresh(m)).values()) for m in OPTIONS} == want
    lstm = sum(p.numel() for p in trainable(fresh("ptuning", network="lstm")).values())
    assert lstm == n * C + sum(2 * (4 * h * (i + h) + 8 * h) for i in (C, 2 * h)) + (4 * h * h + 2 * h) + (2 * h * C + C)


@pytest.mark.parametrize("method", OPTIONS)
def test_only_the_adapter_learns_and_it_does(method):
    """Every number of it gets a gradient, the base none; thirty steps on two rows bring the loss down."""
    model = trained(method).train()
    loss_of(model).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().max() > 0)) == bool(peft.OWN.search(name)) == p.requires_grad, name
    model = fresh(method).train()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.003 if "lora" in method else 0.03)
    first = loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < 0.95 * first
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_the_gradient_reaches_the_up_projection_first():
    """U is zero, so D gets nothing at step 0: the bottleneck wakes up from its end."""
    model = fresh("adapter").train()
    loss_of(model).backward()
    for name, p in trainable(model).items():
        assert bool(p.grad.abs().max() > 0) == ("adapter_up" in name), name


@pytest.mark.parametrize("method", OPTIONS)
def test_switched_off_it_is_the_base_bit_for_bit(method):
    model = trained(method)
    base = tiny_lm() if method != "qlora" else fresh("qlora")
    on = logits(model)
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("method", OPTIONS)
def test_merged_equals_unmerged_there_and_back(method):
    """What is a change of weights becomes weights, once; what is not says so."""
    model = trained(method)
    want = logits(model)
    if method not in peft.MERGEABLE:
        with pytest.raises(UserError, match=f"kind {method} is no change of a weight"):
            merge_adapter(model)
        return
    merge_adapter(model, keep=True)
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=0)
    assert model.state_dict().keys() == tiny_lm().state_dict().keys() and not adapter_config(model)
    with pytest.raises(UserError, match="merged before"):
        merge_adapter(model)
    unmerge_adapter(model)
    assert torch.equal(logits(model), want) and trainable(model).keys() == trainable(fresh(method)).keys()
    with pytest.raises(UserError, match="nothing to unmerge"):
        unmerge_adapter(model)
    set_adapter(model, None)
    assert torch.equal(logits(model), logits(tiny_lm()))


def test_merging_gives_the_same_bits_on_every_machine():
    """An adapter knows its base by the hash of its weights, and the base may be a merged run: no matrix library's order of adding is in
    there, but r products in fp32, one after the other."""
    for method in ("lora", "adalora", "dora"):
        part = trained(method).adapter.parts["layers.0.feed_forward.w1"]
        A, B = ((part.lora_A * part.lora_E) if method == "adalora" else part.lora_A).detach().numpy(), part.lora_B.detach().numpy()
        update = B[:, :1] * A[:1]
        for k in range(1, len(A)):
            update = update + B[:, k:k + 1] * A[k:k + 1]
        want = part.weight.numpy() + np.float32(part.scaling) * update
        if method == "dora":
            length = np.linalg.norm(want.astype(np.float64), axis=1).astype(np.float32)
            want = (part.lora_magnitude_vector.detach().numpy() / length)[:, None] * want
        assert np.array_equal(part.merged_weight().numpy(), want), method


def test_what_is_trained_follows_the_adapter_on_and_off():
    """With it, the adapter and a reward model's new head; without it, everything. Merged and unmerged as well."""
    model = build(ModelArgs(**SHAPE, vocab_size=320), "reward")
    everything, adapter = set(trainable(model)), add_adapter(model, "lora")
    with_adapter = set(trainable(model))
    assert "v_head.weight" in with_adapter and all(peft.OWN.search(name) for name in with_adapter)
    assert set(trainable(merge_adapter(model, keep=True))) == everything
    assert set(trainable(unmerge_adapter(model))) == with_adapter
    set_adapter(model, None)
    assert set(trainable(model)) == everything
    set_adapter(model, adapter)
    assert set(trainable(model)) == with_adapter
    with pytest.raises(UserError, match="add_adapter or load_adapters gave, or None, not 'poet'"):
        set_adapter(model, "poet")


@pytest.mark.parametrize("method", OPTIONS)
def test_an_adapter_that_was_off_when_the_model_moved_follows_it(method):
    """To another number type here, as to another device; so does the base that a 4-bit one stands in for."""
    model = trained(method)
    want, adapter = logits(model), model.adapter
    set_adapter(model, None)
    model.double()
    set_adapter(model, adapter)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model).float(), want, atol=1e-4, rtol=1e-4)
    model.float()
    set_adapter(model, None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", OPTIONS)
def test_its_state_and_its_config_rebuild_it(method):
    """Also through JSON and in a deep copy, whose virtual tokens must be its own."""
    model = trained(method)
    other = tiny_lm()
    add_adapter(other, **json.loads(json.dumps(adapter_config(model))))
    peft.load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.equal(logits(other), logits(model))
    twin, before = copy.deepcopy(model), logits(model)
    for p in trainable(twin).values():
        p.data.zero_()
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def test_several_adapters_on_one_base_switched_as_one_likes():
    """Of any kind, in any order, with nothing left behind: each computes what it computes alone, None is the base bit for bit."""
    model, alone = tiny_lm(), {}
    bank = {}
    for seed, method in enumerate(["lora", "prompt", "ia3", "lora", "prefix", "adapter"]):
        name = f"{method}-{seed}"
        g = torch.Generator().manual_seed(seed)
        set_adapter(model, None)
        torch.manual_seed(0)
        bank[name] = add_adapter(model, method, **OPTIONS[method])
        for p in trainable(model).values():
            p.data.add_(0.2 * torch.randn(p.shape, generator=g))
        alone[name] = logits(model)
    for name in ["ia3-2", "lora-0", "prefix-4", "lora-3", "prompt-1", "adapter-5", "lora-0"]:
        set_adapter(model, bank[name])
        assert torch.equal(logits(model), alone[name]), name
        assert model.args.max_seq_len == 64 - (5 if name.startswith(("prompt", "prefix")) else 0)
    set_adapter(model, None)
    assert torch.equal(logits(model), logits(tiny_lm())) and model.state_dict().keys() == tiny_lm().state_dict().keys()
    assert len({float(x.sum()) for x in alone.values()}) == len(alone)


@pytest.mark.parametrize("method", OPTIONS)
def test_it_writes_what_it_computes(method):
    """Greedy text, adapter on, by the decoder with its cache and its shortcuts: the same as whole passes, token by token, and another
    than the base's."""
    model, ids = trained(method, tied=False), IDS[0].tolist()
    for _ in range(8):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate(model, IDS[0].tolist(), 8, temperature=0)) == ids[9:]
    assert generate_batch(model, [IDS[0].tolist(), IDS[1, :3].tolist()], 8, 0, temperature=0)[0][0] == ids[9:]
    assert ids[9:] != list(generate(tiny_lm(tie_embeddings=False), IDS[0].tolist(), 8, temperature=0))


@pytest.mark.parametrize("method", OPTIONS)
def test_it_fits_a_model_with_biases_and_heads_of_their_own_width(method):
    """As Qwen2 and Qwen3 are: off it is the base, merged it is itself, biases and all."""
    def other():
        torch.manual_seed(3)
        model = build(ModelArgs(**SHAPE, vocab_size=320, head_dim=12, variants=["qkv_bias"])).eval()
        for p in model.parameters():
            p.data.add_(0.2 * torch.randn(p.shape))
        return model
    model, base = other(), other()
    add_adapter(model, method, **OPTIONS[method])
    for p in trainable(model).values():
        p.data.add_(0.2 * torch.randn(p.shape))
    want = logits(model)
    assert (want - logits(base)).abs().max() > 0.05
    if method in peft.MERGEABLE:
        torch.testing.assert_close(logits(merge_adapter(model, keep=True)), want, atol=1e-4, rtol=1e-5)
        assert model.state_dict().keys() == base.state_dict().keys()
        unmerge_adapter(model)
    set_adapter(model, None)
    assert torch.equal(logits(model), logits(base))


# ---- one by one ----------------------------------------------------------------------------------------------------

def test_rslora_scales_by_the_root_of_the_rank():
    """At r = 16 it moves the model 4 times as far as LoRA with the same A and B."""
    plain, root = [next(iter(add_adapter(tiny_lm(), m, r=16, alpha=8.0).parts.values())) for m in ("lora", "rslora")]
    assert root.scaling == 4 * plain.scaling == 2.0


def test_dora_has_rows_of_the_length_m_in_the_direction_of_lora():
    part = trained("dora").adapter.parts["layers.0.attention.wq"]
    W = part.merged_weight()
    torch.testing.assert_close(W.norm(dim=1), part.lora_magnitude_vector.abs().detach(), atol=1e-5, rtol=1e-5)
    direction = part.weight + part.scaling * part.lora_B @ part.lora_A
    torch.testing.assert_close(torch.cosine_similarity(W, direction.detach() * part.lora_magnitude_vector.sign()[:, None].detach()), torch.ones(32))


def test_qlora_holds_the_base_in_4_127_bits():
    """Codes, scales and their scales; no fp32 copy of a weight in the state or among the parameters."""
    part = fresh("qlora").adapter.parts["layers.0.feed_forward.w1"]
    held = sum(b.numel() * b.element_size() for b in part.buffers())
    n = 32 * 96
    assert held == n // 2 + n // 64 + 4 * 1 + 4 and "weight" not in part.state_dict()      # one scale of scales, one mean
    assert {k for k, _ in part.named_parameters()} == {"lora_A", "lora_B"}


# ---- virtual tokens in front of whatever text ----------------------------------------------------------------------

@pytest.mark.parametrize("method", SOFT)
def test_the_cache_holds_the_virtual_tokens_once(method):
    """Read in pieces with a cache, a text gives the logits of one pass: the positions go on behind the virtual tokens."""
    model, cache = trained(method), KVCache()
    pieces = [logits(model, part, cache=cache) for part in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:])]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model), atol=1e-5, rtol=1e-5)
    assert cache.length == 9 + 5


@pytest.mark.parametrize("variants", [[], ["rope_scaling:kind=yarn,factor=4"]])
@pytest.mark.parametrize("method", SOFT)
def test_padding_on_the_left_changes_nothing(method, variants):
    """The virtual tokens stand next to the text, however far the pads push it to the right; YaRN's rotation, which also stretches, only
    turns a prefix's keys."""
    model = trained(method, variants=variants)
    padded = torch.cat((torch.full((2, 3), 7), IDS), 1)
    segments = torch.tensor([[0] * 3 + [1] * 9] * 2)
    torch.testing.assert_close(logits(model, padded, segments=segments)[:, 3:], logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prefix", "ptuning"])
def test_a_batch_of_ragged_prompts_answers_as_each_alone(method, tok):
    """Greedy, with caches of fixed size, to the very end of a context that is shorter by n."""
    model = trained(method, tied=False)
    assert model.args.max_seq_len == 64 - 5
    prompts = [IDS[0, :k].tolist() for k in (9, 2, 5)]
    alone = [list(generate(model, p, 100, temperature=0)) for p in prompts]
    together, _ = generate_batch(model, prompts, 20, tok.pad_id, temperature=0)
    assert together == [answer[:20] for answer in alone] and len({t for answer in together for t in answer}) > 10
    assert [len(p) + len(a) for p, a in zip(prompts, alone)] == [59] * 3


@pytest.mark.parametrize("method", SOFT)
def test_a_row_of_several_texts_is_refused(method):
    """The second text would have no virtual tokens in front of it, and nobody would notice."""
    with pytest.raises(UserError, match="--no_pack"):
        trained(method)(IDS, segments=torch.tensor([[1] * 4 + [2] * 5] * 2))


@pytest.mark.parametrize("method, options", [("prefix", {}), ("ptuning", {}), ("ptuning", {"network": "lstm"})])
def test_baking_keeps_the_output_of_the_network_and_nothing_else(method, options):
    """What is saved for use is the (n, C) or (n, 2 L G D) table; it reproduces the outputs exactly."""
    model = trained(method, **options)
    want = logits(model)
    bake(model)
    assert torch.equal(logits(model), want)
    assert [tuple(v.shape) for v in adapter_state_dict(model).values()] == [(5, 64) if method == "prefix" else (5, 32)]
    assert adapter_config(model) == {"method": "ptuning_v2" if method == "prefix" else "prompt", "n": 5}


@pytest.mark.parametrize("method", OPTIONS)
def test_under_autocast_every_part_answers_in_the_type_of_the_base(method, monkeypatch):
    """The adapter's numbers stay fp32, what leaves it is bf16: a GPU's attention refuses queries and keys of two types. It trains so, too."""
    seen, attention = set(), model_file.scaled_dot_product_attention
    monkeypatch.setattr(model_file, "scaled_dot_product_attention", lambda q, k, v, **how: seen.add((q.dtype, k.dtype, v.dtype)) or attention(q, k, v, **how))
    model = trained(method).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert seen == {(torch.bfloat16,) * 3} and abs(loss.item() - loss_of(model).item()) < 0.1
    assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trainable(model).values())


def test_one_prompt_for_two_tasks_that_contradict_each_other_is_worse_than_two():
    """The notes have one general prompt serve all tasks. Two tasks on the same inputs: one prompt cannot tell which is wanted."""
    tasks = [IDS[:, 1:], IDS.flip(1)[:, 1:]]

    def learn(targets):
        model = fresh("ptuning_v2").train()
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
        for _ in range(40):
            optimizer.zero_grad()
            loss = sum(F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), t.flatten()) for t in targets) / len(targets)
            loss.backward()
            optimizer.step()
        return loss.item()
    assert learn(tasks) > (learn(tasks[:1]) + learn(tasks[1:])) / 2 + 0.2


# ---- refusals ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, match", [
    ({"peft": "lorra"}, "--peft lorra is unknown; did you mean 'lora'"),
    ({"peft": "prompt:k=3"}, "'k=3' is no option; prompt takes n=16"), ({"peft": "lora:r=4"}, "'r=4' is no option; lora takes none and the flags --lora_rank"),
    ({"peft": "prompt:n=x"}, "wants int"), ({"peft": "prompt:n=64"}, "leave room in the context of 64"), ({"peft": "ptuning:network=gru"}, "mlp or lstm"),
    ({"peft": "adalora:start=nan"}, "start must be a finite number of at least 0, got nan"), ({"peft": "adalora:r0=2"}, "r0 2 must be at least r 8"),
    ({"peft": "adapter:size=0"}, "at least 1"), ({"adapter_only": True}, "without --peft"),
    ({"peft": "prefix", "merge_on_save": True}, "cannot be merged"), ({"peft": "prefix", "activation_checkpointing": True}, "compute twice"),
    ({"peft": "dora", "tp": 2}, "leave --tp out"), ({"peft": "lora", "tp": 2}, "leave --tp out"),
    ({"peft": "dora", "parallel": "fsdp"}, "use lora or rslora there"),
    ({"peft": "prompt", "variants": ["sliding_window"]}, "its mask counts columns"),
])
def test_what_cannot_be_is_refused_before_training(world, tmp_path, monkeypatch, flags, match):
    monkeypatch.setattr(train_sft.dist, "init", lambda *a, init=train_sft.dist.init: init(a[0]))
    with pytest.raises(UserError, match=match):
        train_sft.main(train_sft.Config(**options("sft", world, tmp_path, **flags)))


def test_a_flag_that_the_method_does_not_know_is_told(world, tmp_path, capsys):
    """--lora_rank and --lora_targets do nothing for (IA)³; without the flags nothing is said."""
    for flags, said in (({}, False), ({"lora_rank": 64, "lora_targets": ["nonsense"]}, True)):
        peft.read(train_sft.Config(**options("sft", world, tmp_path, peft="ia3", **flags)))
        assert ("note: --peft ia3 has no r, targets" in capsys.readouterr().out) == said


def test_a_second_adapter_and_training_on_from_a_prompt_are_refused(world, tmp_path):
    """The one would train an adapter of an adapter, the other weights that a prompt was made for."""
    with pytest.raises(UserError, match="already .ia3."):
        add_adapter(trained("ia3"), "lora")
    train_sft.main(train_sft.Config(**options("sft", world, tmp_path / "prompt", peft="prompt:n=4", learning_rate=1e-2, max_steps=1)))
    with pytest.raises(UserError, match="a prompt adapter, which cannot be merged into the weights; train from its base"):
        train_sft.main(train_sft.Config(**options("sft", world, tmp_path / "more", init_from=str(tmp_path / "prompt"))))
    with pytest.raises(UserError, match="adalora is for train_sft.py only"):
        train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "dpo", peft="adalora")))


# ---- checkpoints ---------------------------------------------------------------------------------------------------

def sft(world, out, method, **more):
    """Three updates. The base has never seen the chat tokens; what matters here is that the numbers are the same."""
    train_sft.main(train_sft.Config(**options("sft", world, out, **{"peft": method, "lora_rank": 2, "learning_rate": 1e-2, **more})))
    return out


@pytest.mark.parametrize("method", [m if m in ("lora", "adalora", "ptuning") else pytest.param(m, marks=pytest.mark.slow) for m in OPTIONS])
def test_a_resumed_run_is_the_run_and_a_loaded_checkpoint_the_model(world, tmp_path, method):
    """Stopped after two of four updates and resumed, with the adapter alone in the checkpoint: the weights of the run in one piece,
    bit for bit. Then loaded: what validation said, the loaded model says."""
    whole = sft(world, tmp_path / "whole", method, max_steps=4)
    sft(world, tmp_path / "parts", method, max_steps=4, save_every=2, keep=0, adapter_only=True)
    (tmp_path / "parts" / "step_00000004").rename(tmp_path / "later")
    sft(world, tmp_path / "parts", method, max_steps=4, save_every=2, keep=0, adapter_only=True, resume="auto")
    a, b = weights(whole), weights(tmp_path / "parts")
    assert b.keys() == {k for k in a if peft.OWN.search(k)} and all(torch.equal(a[k], b[k]) for k in b)
    small, large = [(checkpoint.find(p) / "model.pt").stat().st_size for p in (tmp_path / "parts", whole)]
    assert small < 0.9 * large
    models = [checkpoint.load(p)[0] for p in (whole, tmp_path / "parts")]
    assert torch.equal(logits(models[0]), logits(models[1])) and not torch.equal(logits(models[0]), logits(tiny_lm()))
    assert (adapter_config(models[0]) is None) == (method in peft.MERGEABLE)


def test_an_adapter_alone_knows_its_base_by_its_weights(world, tmp_path):
    """Another base, of the same shape, is refused in a sentence, whether it has taken the old one's place or an adapter is brought to it;
    a base that has gone is named."""
    base = tmp_path / "base"
    checkpoint.save(base, 7, tiny_lm(), checkpoint.load(world / "base")[1], "pretrain", None)
    run = sft(world, tmp_path / "run", "lora", adapter_only=True, init_from=str(base), save_every=1, keep=0)
    meta = checkpoint.meta_of(checkpoint.find(run))
    assert meta["adapter"]["base"] == {"path": str(base), "hash": peft.fingerprint(tiny_lm())} and meta["adapter"]["alone"]
    model = checkpoint.load(base)[0]
    want = logits(checkpoint.load(run)[0])
    set_adapter(model, load_adapters(model, {"run": run})["run"])
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="is an adapter for another base: it was trained on .*base with weights"):
        load_adapters(tiny_lm(seed=3), {"run": run})
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapters(tiny_lm(), {"base": base})
    checkpoint.save(base, 8, tiny_lm(seed=3), checkpoint.load(world / "base")[1], "pretrain", None)
    with pytest.raises(UserError, match="another base"):
        checkpoint.load(run)
    with pytest.raises(UserError, match="is no longer its base"):
        (run / "step_00000003").rename(tmp_path / "gone")
        sft(world, run, "lora", adapter_only=True, init_from=str(base), save_every=1, keep=0, resume="auto")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="wants its base, .*base: .*holds no checkpoint"):
        checkpoint.load(run)
    model, tok, _ = checkpoint.load(world / "base")
    add_adapter(model, "lora")                                             # not by peft.adapt, so of no base that a checkpoint could name
    with pytest.raises(UserError, match="does not know its base"):
        checkpoint.save(tmp_path / "lost", 1, model, tok, "sft", train_sft.Config(**options("sft", world, tmp_path, peft="lora", adapter_only=True)))


@pytest.mark.parametrize("method", ["dora", pytest.param("adapter", marks=pytest.mark.slow)])
def test_dpo_ppo_and_a_reward_model_train_an_adapter_beside_the_sft_model(world, tmp_path, method):
    """DPO begins at ln 2 and PPO at a KL of 0, since the adapter switched off is the reference; the reward model's new head trains, too,
    and is kept with the adapter."""
    more = dict(peft=method, lora_rank=2, adapter_only=True, max_steps=1, learning_rate=1e-2)
    train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "dpo", **more)))
    assert metrics(tmp_path / "dpo")[0]["val/loss"] == pytest.approx(0.6931, abs=1e-4)
    train_ppo.main(train_ppo.Config(**options("ppo", world, tmp_path / "ppo", **more)))
    assert metrics(tmp_path / "ppo")[0]["val/kl"] == pytest.approx(0, abs=1e-4)
    train_rm.main(train_rm.Config(**options("rm", world, tmp_path / "rm", **more)))
    assert "v_head.weight" in weights(tmp_path / "rm") and "backbone.tok_embeddings.weight" not in weights(tmp_path / "rm")
    reward = checkpoint.load(tmp_path / "rm")[0]
    assert logits(reward).shape == IDS.shape
    assert largest_difference({"w": reward.backbone.tok_embeddings.weight}, {"w": tiny_lm().tok_embeddings.weight}) == 0


@pytest.mark.parametrize("tied, variants", [(True, []), (False, ["rope_scaling:kind=yarn,factor=4"]), (True, ["sliding_window:window=16"]),
                                            (False, ["qkv_bias"]), (True, ["gpt2"]), (False, ["moe:n_experts=4"]), (True, ["qk_norm"])])
def test_a_base_quantised_out_of_its_file_is_the_base_quantised_in_memory(tmp_path, tok, tied, variants):
    """Bit for bit, before and after the matrices are in 4 bits; a tied matrix stays one, the fingerprint the same, the file untouched and let go."""
    torch.manual_seed(3)
    checkpoint.save(tmp_path, 1, build(ModelArgs(**{**SHAPE, "vocab_size": tok.vocab_size, "tie_embeddings": tied, "variants": variants})), tok, "sft", None)
    file = tmp_path / "step_00000001" / "model.pt"
    before, (memory, _, _), (mapped, _, _) = file.read_bytes(), checkpoint.load(tmp_path), checkpoint.load(tmp_path, mapped=True)
    assert torch.equal(logits(mapped), logits(memory)) and (mapped.output.weight is mapped.tok_embeddings.weight) == tied
    for model in (memory, mapped):
        torch.manual_seed(4)
        peft.adapt(model, type("Cfg", (), {"init_from": str(tmp_path)}), "qlora", {"r": 4})
    assert torch.equal(logits(mapped), logits(memory)) and mapped.adapter.base == memory.adapter.base
    assert (mapped.output.weight is mapped.tok_embeddings.weight) == tied and trainable(mapped).keys() == trainable(memory).keys()
    mapped.norm.weight.data.zero_()
    assert file.read_bytes() == before


PEAK = """
import sys, threading
import torch
from nanollm import checkpoint, peft
from nanollm.model import ModelArgs, Transformer
def own():                                               # memory that cannot be dropped and read again, MB
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024
with torch.device("meta"):
    Transformer(ModelArgs(dim=8, n_heads=1, vocab_size=9))   # what PyTorch imports for this is no weight
begin, seen, done = own(), [], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(own())
threading.Thread(target=watch).start()
model = checkpoint.load(sys.argv[1], mapped=sys.argv[2] == "mapped")[0]
peft.adapt(model, type("Cfg", (), {"init_from": ""}), "qlora", {"r": 8})
done.set()
print(max(seen) - begin)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_qlora_never_holds_its_base_in_full_precision(tmp_path, tok):
    """22 M parameters, 85 MB in fp32: taken out of the file one by one, the process's own memory stays below that (loaded whole it is twice that)."""
    model = build(ModelArgs(dim=512, n_layers=7, n_heads=8, vocab_size=tok.vocab_size, max_seq_len=64))
    checkpoint.save(tmp_path, 1, model, tok, "sft", None)
    full = sum(p.nbytes for p in model.parameters()) / 2**20
    peak = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), "mapped"], capture_output=True, text=True, check=True, cwd=ROOT,        # freed memory goes back at once
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert float(peak.stdout) < 0.8 * full
