"""LoRA against its own claims (step 0, counts, merge, switch) and the peft library (forward, gradients, files)."""
import json
import math
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import (AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig,
                  get_peft_model)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nanollm.config import UserError
from nanollm.adapter_files import load_adapter, save_adapter
from nanollm.hf import to_hf_config, to_hf_name, to_hf_state
from nanollm.model import ModelArgs, Transformer
from nanollm.peft import (TARGETS, LoRALinear, adapter_config, add_adapter, add_orthogonality, disable_adapter, inject_lora, load_lora_state_dict, lora_config,
                          lora_layers, lora_state_dict, merge_lora, reallocate)

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=32)
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


class Ids:
    eos_id, im_end_id, pad_id = 60, 61, 62


def build(seed=0):
    """A small model in eval mode, its weights enlarged so that differences show."""
    torch.manual_seed(seed)
    model = Transformer(ARGS).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() > 1 else None
    return model


def adapted(seed=0, **kwargs):
    """build() with an adapter whose B is not zero any more, as after some training."""
    model = build(seed)
    inject_lora(model, **kwargs)
    with torch.no_grad():
        for _, m in lora_layers(model):
            m.lora_B.normal_(std=0.1)
    return model


def llama():
    """transformers' model with build()'s weights."""
    hf = LlamaForCausalLM(LlamaConfig(**to_hf_config(ARGS, Ids))).eval()
    hf.load_state_dict(to_hf_state(build().state_dict(), ARGS), strict=False)
    hf.tie_weights()
    return hf


@torch.no_grad()
def logits(model):
    return model(IDS)


# ---- what LoRA promises ----------------------------------------------------------------------------------------

def test_step_0_is_the_base_model():
    """B is zero, so an untrained adapter changes nothing at all; a trained one does."""
    base, model = logits(build()), build()
    names = inject_lora(model)
    assert torch.equal(logits(model), base)
    assert len(names) == 14 and names == [n for n, m in build().named_modules() if n.split(".")[-1] in TARGETS]
    assert (logits(adapted()) - base).abs().max() > 0.1


def test_a_is_uniform_within_one_over_root_in():
    """kaiming_uniform(a = sqrt 5) over the input width; with A stored transposed it would be 1 / sqrt(r)."""
    torch.manual_seed(0)
    A = LoRALinear(nn.Linear(400, 50), r=8, alpha=16).lora_A
    assert A.shape == (8, 400) and A.abs().max() <= 1 / 20 and A.abs().max() > 0.99 / 20
    assert A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("targets", [TARGETS, ["wq", "wv"], ["w2"]])
@pytest.mark.parametrize("r", [1, 4])
def test_the_trainable_count_is_r_times_in_plus_out(targets, r):
    """For each target, over all layers, and nothing else: the embedding, tied or not, stays frozen."""
    width = {"wq": 64, "wk": 32 + 16, "wv": 32 + 16, "wo": 64, "w1": 32 + 96, "w2": 96 + 32, "w3": 32 + 96}
    model = build()
    inject_lora(model, r=r, targets=targets)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == 2 * sum(r * width[t] for t in targets)
    assert all(n.endswith(("lora_A", "lora_B")) for n in trainable)
    assert not model.tok_embeddings.weight.requires_grad and model.output.weight is model.tok_embeddings.weight


def test_a_100_by_100_matrix_at_rank_2_trains_400_numbers():
    """The notes' example: 400 numbers in place of 10,000."""
    layer = LoRALinear(nn.Linear(100, 100, bias=False), r=2, alpha=4)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 400
    assert sum(p.numel() for p in layer.parameters() if not p.requires_grad) == 10_000


def test_only_a_and_b_get_gradients_and_training_moves_only_them():
    """Also through a tied embedding, the one weight that would be easy to forget."""
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        adapter = name.endswith(("lora_A", "lora_B"))
        assert (p.grad is not None and p.grad.abs().max() > 0) == adapter, name
        assert torch.equal(p, before[name]) != adapter, name


def test_the_disabled_adapter_is_the_base_bit_for_bit():
    """Inside the block only, also after an exception, and nested."""
    base, model = logits(build()), adapted()
    on = logits(model)
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
        with disable_adapter(model):
            pass
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)
    with pytest.raises(RuntimeError), disable_adapter(model):
        raise RuntimeError
    assert torch.equal(logits(model), on) and not torch.equal(on, base)


def test_merged_equals_unmerged_and_is_a_plain_model():
    """The same logits, the plain names and module types, everything trainable; merging again is refused."""
    model = adapted()
    want = logits(model)
    assert merge_lora(model) is model
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=0)
    assert str(model) == str(build()) and model.state_dict().keys() == build().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="merged before"):
        merge_lora(model)
    assert torch.equal(model.tok_embeddings.weight, build().tok_embeddings.weight)


def test_merging_adds_up_in_fp32_when_the_base_is_bf16():
    """The one rounding is the last: the sum is the nearest bf16 to the fp32 sum."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 64, bias=False).bfloat16(), r=4, alpha=8)
    layer.lora_B.data.normal_()
    exact = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    assert layer.merged_weight().dtype == torch.bfloat16
    assert (layer.merged_weight() == exact.float().bfloat16()).float().mean() > 0.999


def test_dropout_acts_only_on_the_update_and_only_in_training():
    """A model in eval mode stays deterministic after injection."""
    model = adapted(dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(build()))


def test_a_state_dict_with_its_config_rebuilds_the_adapted_model():
    """What a checkpoint stores: base weights under their plain names, A and B beside them, the arguments in JSON."""
    model = adapted(r=3, alpha=5, dropout=0.25, targets=["w3", "wq"])
    state, config = model.state_dict(), json.loads(json.dumps(lora_config(model)))
    assert config == {"method": "lora", "r": 3, "alpha": 5, "dropout": 0.25, "targets": ["w3", "wq"]}
    assert build().state_dict().keys() == {k for k in state if "lora" not in k}
    assert state.keys() - build().state_dict().keys() == lora_state_dict(model).keys()
    other = Transformer(ARGS).eval()
    add_adapter(other, **config)
    other.load_state_dict(state)                                           # strict
    assert torch.equal(logits(other), logits(model))
    assert lora_config(build()) is None


def test_an_adapter_alone_can_be_moved_to_the_same_base():
    """lora_state_dict and its inverse; a wrong rank or a missing matrix is refused by name."""
    model, other = adapted(r=4), build()
    inject_lora(other, r=4)
    load_lora_state_dict(other, lora_state_dict(model))
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(UserError, match="28 tensors .* layers.0.attention.wq.lora_A"):
        load_lora_state_dict(other, lora_state_dict(adapted(r=2)))
    some = dict(list(lora_state_dict(model).items())[1:])
    with pytest.raises(UserError, match="1 tensors .* layers.0.attention.wq.lora_A"):
        load_lora_state_dict(other, some)


@pytest.mark.parametrize("wrong, match", [
    (dict(targets=["wq", "q_proj"]), "'q_proj'; choose from wq wk wv wo w1 w2 w3"), (dict(targets=[]), "none given"),
    (dict(targets=["output"]), "'output'"), (dict(r=0), "at least 1"), (dict(dropout=1.0), r"\[0, 1\)"),
])
def test_impossible_adapters_are_refused(wrong, match):
    """In words, and before the model is touched."""
    model = build()
    with pytest.raises(UserError, match=match):
        inject_lora(model, **wrong)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_on_top_of_one_is_refused():
    """It would silently train an adapter of an adapter."""
    with pytest.raises(UserError, match="already"):
        inject_lora(adapted())


# ---- against peft ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets", [["wq", "wv", "w2"], list(TARGETS)])
def test_forward_and_gradients_equal_peft(targets):
    """The same weights, A and B in get_peft_model(LlamaForCausalLM): the same logits and the same gradients."""
    ours = adapted(r=4, alpha=16, targets=targets)
    theirs = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=sorted(
        {to_hf_name(n).split(".")[-1] for n, _ in lora_layers(ours)}))).eval()
    twins = {n: theirs.get_submodule("base_model.model." + to_hf_name(n)) for n, _ in lora_layers(ours)}
    for name, m in lora_layers(ours):
        twins[name].lora_A["default"].weight.data.copy_(m.lora_A.data)
        twins[name].lora_B["default"].weight.data.copy_(m.lora_B.data)
    a, b = ours(IDS), theirs(input_ids=IDS).logits
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    for out in (a, b):
        F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, m in lora_layers(ours):
        for mine, their in ((m.lora_A, twins[name].lora_A), (m.lora_B, twins[name].lora_B)):
            torch.testing.assert_close(mine.grad, their["default"].weight.grad, atol=1e-6, rtol=1e-5, msg=name)
    trainable = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert trainable[0] == trainable[1]
    merged = theirs.merge_and_unload()                                     # and merged models agree too
    want = {k: v for k, v in merged.state_dict().items() if k != "lm_head.weight"}
    got = to_hf_state(merge_lora(ours).state_dict(), ARGS)
    assert got.keys() == want.keys()
    for k in want:
        torch.testing.assert_close(got[k], want[k], atol=1e-6, rtol=1e-6, msg=k)


def test_peft_loads_our_adapter_files(tmp_path):
    """PeftModel.from_pretrained on what save_adapter wrote computes what we compute."""
    ours = adapted(r=4, alpha=16, dropout=0.1, targets=["wq", "wk", "w1"])
    save_adapter(ours, tmp_path / "adapter", base="some/base")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), theirs(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)
        with theirs.disable_adapter(), disable_adapter(ours):
            torch.testing.assert_close(logits(ours), theirs(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)
    theirs.save_pretrained(tmp_path / "again")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(build(), tmp_path / "nothing")


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_peft_adapter_files(tmp_path, rslora):
    """And the reverse, for plain LoRA and for rsLoRA, whose scaling is alpha / sqrt(r)."""
    torch.manual_seed(0)
    theirs = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=rslora,
                                                target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    for n, p in theirs.named_parameters():
        if "lora_B" in n:
            p.data.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = build()
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours), theirs(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)
    assert (logits(ours) - logits(build())).abs().max() > 0.1


KINDS = {                                    # --peft, our options, peft's configuration of the same
    "rslora": (dict(r=4, alpha=6.0), lambda: LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=EACH, task_type="CAUSAL_LM")),
    "dora": (dict(r=4, alpha=16.0), lambda: LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=EACH, task_type="CAUSAL_LM")),
    "adalora": (dict(r=4, r0=6, alpha=16.0), lambda: AdaLoraConfig(init_r=6, target_r=4, lora_alpha=16, total_step=9, target_modules=EACH, task_type="CAUSAL_LM")),
    "ia3": ({}, lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")),
    "prompt": (dict(n=5), lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "ptuning": (dict(n=5, hidden=24), lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=24, task_type="CAUSAL_LM")),
    "ptuning-lstm": (dict(n=5, hidden=24, network="lstm"), lambda: PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=24, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM")),
    "ptuning_v2": (dict(n=5), lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "prefix": (dict(n=5, hidden=24), lambda: PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24, task_type="CAUSAL_LM")),
}
EACH = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(kind, options):
    """build() with an adapter of this kind that is no longer at its start."""
    model, g = build(), torch.Generator().manual_seed(2)
    add_adapter(model, kind.partition("-")[0], **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_our_files_of_every_kind(tmp_path, kind):
    """What each of our adapters computes, peft's model computes from the files, base weights untouched."""
    ours = trained(kind, KINDS[kind][0])
    with torch.no_grad():
        want = ours(IDS)
    save_adapter(ours, tmp_path, base="some/base")
    assert torch.equal(logits(ours), want) and adapter_config(ours)["method"] == kind.partition("-")[0]       # saving has changed nothing
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask                 # others may read it
    theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        got = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.size(1):]      # peft keeps the virtual tokens' columns
        torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-5)
    assert (want - logits(build())).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_peft_files_of_every_kind(tmp_path, kind):
    """And the reverse; both train the same number of numbers."""
    options, config = KINDS[kind]
    theirs, g = get_peft_model(llama(), config()).eval(), torch.Generator().manual_seed(2)
    fresh = build()
    add_adapter(fresh, kind.partition("-")[0], **options)
    assert count(fresh) == count(theirs)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(0.2 * torch.randn(p.shape, generator=g))
    theirs.save_pretrained(tmp_path)
    ours = build()
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        want = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.size(1):]
    torch.testing.assert_close(logits(ours), want, atol=5e-6, rtol=1e-5)
    assert (want - logits(build())).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["dora", "adalora", "ia3"])
def test_gradients_equal_peft_on_every_weight_that_both_train(tmp_path, kind):
    """DoRA's length is a constant in the backward pass on both sides; else the gradient of m would not be peft's."""
    ours = trained(kind, KINDS[kind][0])
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    for out in (ours(IDS), theirs(input_ids=IDS).logits):
        F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    twins = {n.replace(".default", "").removesuffix(".weight"): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    checked = 0
    for name, p in ours.named_parameters():
        if p.requires_grad:
            module, _, leaf = name.rpartition(".")
            torch.testing.assert_close(p.grad, twins[f"base_model.model.{to_hf_name(module)}.{leaf}"], atol=1e-6, rtol=1e-4, msg=name)
            checked += 1
    assert checked == {"dora": 42, "adalora": 42, "ia3": 6}[kind]


def test_adalora_moves_rank_as_peft_does():
    """Twelve updates side by side: the orthogonality term, the budget's table and every triplet that lives."""
    settings = dict(init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=12, lora_alpha=16, orth_reg_weight=0.5)
    theirs = get_peft_model(llama(), AdaLoraConfig(**settings, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")).eval()
    ours = build()
    adapter = add_adapter(ours, "adalora", r=2, r0=6, alpha=16.0, targets=["wq", "wv", "w2"], start=2 / 12, end=3 / 12)
    twins = {name: theirs.get_submodule("base_model.model." + to_hf_name(name)) for name in adapter.parts}
    for name, part in adapter.parts.items():
        for leaf in "AEB":
            getattr(part, f"lora_{leaf}").data.copy_(getattr(twins[name], f"lora_{leaf}")["default"].data)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.3) for m in (ours, theirs)]
    alive = []
    for step in range(1, 13):
        ours.train()
        loss, _, metrics = add_orthogonality(ours, F.cross_entropy(ours(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()), 1, {})
        out = theirs(input_ids=IDS, labels=IDS)
        assert loss.item() == pytest.approx(out.loss.item(), abs=1e-5) and metrics["orthogonality"] > 0
        loss.backward()
        out.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        reallocate(ours, step, 12)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, part in adapter.parts.items():
            torch.testing.assert_close(part.lora_E, twins[name].lora_E["default"], atol=1e-6, rtol=1e-4, msg=f"{step} {name}")
        alive.append(sum(int((part.lora_E != 0).sum()) for part in adapter.parts.values()))
    assert alive == [36, 36, 27, 20, 16, 13, 12, 12, 12, 12, 12, 12]
    assert len({int((part.lora_E != 0).sum()) for part in adapter.parts.values()}) > 1                  # not the same rank everywhere


def test_a_rank_pattern_of_peft_is_read_with_zeros_for_what_it_dropped(tmp_path):
    """After its schedule peft writes only the triplets that live, another number for each matrix."""
    theirs = get_peft_model(llama(), AdaLoraConfig(init_r=6, target_r=2, total_step=4, tfinal=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for step in range(1, 5):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with torch.no_grad():
        want = theirs.eval()(input_ids=IDS).logits
    theirs.save_pretrained(tmp_path)
    ours = build()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), want, atol=5e-6, rtol=1e-5)
    assert (want - logits(build())).abs().max() > 1e-3


def test_what_cannot_be_read_or_written_is_refused(tmp_path):
    """A kind that we do not have, a pattern of ranks, a pickle, a missing or broken file; a kind that peft does not have."""
    get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "loha")
    with pytest.raises(UserError, match="this is LOHA; what can be read is plain"):
        load_adapter(build(), tmp_path / "loha")
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, rank_pattern={"q_proj": 2})).save_pretrained(tmp_path / "mixed")
    with pytest.raises(UserError, match="LORA with rank_pattern"):
        load_adapter(build(), tmp_path / "mixed")
    for init in ("pissa", "olora"):                          # these take A and B out of W: beside the W of before they compute something else
        get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=init, target_modules=["q_proj"])).save_pretrained(tmp_path / init)
        with pytest.raises(UserError, match=f"LORA with init_lora_weights {init}, which changes the base"):
            load_adapter(build(), tmp_path / init)
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        load_adapter(build(), tmp_path / "nowhere")
    (tmp_path / "mixed" / "adapter_model.safetensors").rename(tmp_path / "mixed" / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle, which may run code"):
        load_adapter(build(), tmp_path / "mixed")
    model = trained("lora", dict(r=4, targets=["wq"]))
    save_adapter(model, tmp_path / "good")
    config, file = tmp_path / "good" / "adapter_config.json", tmp_path / "good" / "adapter_model.safetensors"
    whole, table = file.read_bytes(), json.loads(config.read_text(encoding="utf-8"))
    for text, data, match in [(json.dumps({**table, "r": 2}), whole, "r is 2, by .* it is 4"), ("[]", whole, "no table of settings"),
                              (json.dumps({k: v for k, v in table.items() if k != "lora_alpha"}), whole, "alpha must be a finite number of at least 0, got None"),
                              (json.dumps({**table, "r": "4"}), whole, "r is '4', by .* it is 4"),
                              (json.dumps({**table, "lora_alpha": "x"}), whole, "alpha must be a finite number of at least 0, got 'x'"),
                              (json.dumps({**table, "fan_in_fan_out": True}), whole, "LORA with fan_in_fan_out"),
                              (json.dumps({**table, "alora_invocation_tokens": [5]}), whole, "LORA with alora_invocation_tokens"),
                              (json.dumps(table), whole[:-9], "safetensors: .*the file is damaged")]:
        config.write_text(text, encoding="utf-8")
        file.write_bytes(data)
        plain = build()
        with pytest.raises(UserError, match=match):
            load_adapter(plain, tmp_path / "good")
        assert torch.equal(logits(plain), logits(build())) and not lora_layers(plain)
    (tmp_path / "loha" / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        load_adapter(build(), tmp_path / "loha")
    for kind in ("adapter", "bitfit"):
        with pytest.raises(UserError, match=f"the peft library has no {kind}"):
            save_adapter(trained(kind, {}), tmp_path / kind)


NONSENSE = {
    "lora": [("r", 0), ("r", 4.0), ("r", True), ("r", -4), ("r", 10**12), ("r", None), ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_alpha", "x"),
             ("lora_alpha", -16), ("lora_alpha", 0), ("lora_alpha", True), ("lora_alpha", [16]), ("lora_alpha", 10**400), ("lora_dropout", 1.0),
             ("lora_dropout", -0.1), ("lora_dropout", math.nan), ("lora_dropout", "0.1"), ("lora_dropout", None), ("target_modules", []),
             ("target_modules", ""), ("target_modules", ["q_proj"]), ("target_modules", "q_proj"), ("target_modules", "["), ("target_modules", 7),
             ("target_modules", ["q_proj", "v_proj", "k_proj"]), ("target_modules", [["q_proj"]]), ("use_dora", "no"), ("use_rslora", 1),
             ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", "x"), ("peft_type", ["LORA"]), ("peft_type", "PROMPT_TUNING")],
    "adalora": [("init_r", 0), ("init_r", 6.0), ("init_r", 10**12), ("init_r", "6"), ("target_r", None), ("target_r", 0), ("target_r", -1), ("lora_alpha", math.nan),
                ("lora_dropout", 2), ("rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [True, False]}), ("rank_pattern", 3), ("rank_pattern", ["q_proj"]),
                ("rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [False] * 6}), ("rank_pattern", {"model.layers.0.self_attn.k_proj.lora_E": [True] * 6}),
                ("rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [1] * 6})],
    "prompt": [("num_virtual_tokens", 0), ("num_virtual_tokens", 4), ("num_virtual_tokens", 5.0), ("num_virtual_tokens", "5"), ("num_virtual_tokens", None)],
    "ptuning_v2": [("num_virtual_tokens", 50), ("num_layers", 1), ("num_attention_heads", 4), ("num_attention_heads", math.nan)],
    "ia3": [("target_modules", []), ("target_modules", ["k_proj"])],
}


@pytest.mark.parametrize("method", NONSENSE)
def test_a_configuration_that_makes_no_sense_costs_one_sentence(tmp_path, method):
    """Each entry of adapter_config.json, spoilt alone, is refused by a sentence that says where and what; the model stays plain. Whole, it is read."""
    options = {"lora": dict(r=4, targets=["wq", "wv"]), "adalora": dict(r=4, r0=6, targets=["wq", "wv"]), "ia3": {}}.get(method, dict(n=5))
    save_adapter(trained(method, options), tmp_path)
    config, plain = tmp_path / "adapter_config.json", build()
    table = json.loads(config.read_text(encoding="utf-8"))
    for key, value in NONSENSE[method]:
        config.write_text(json.dumps({**table, key: value}), encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(str(tmp_path))) as e:
            load_adapter(plain, tmp_path)
        said = str(e.value)
        assert any(word in said for word in (key, key.removeprefix("lora_"), "peft_type", "rank", "this is", "prompt_embeddings")), (key, value, said)
        assert "\n" not in said and "Error(" not in said, said
        assert adapter_config(plain) is None
    for kept in ({}, {"target_modules": "all-linear"}, {"target_modules": None}, {"target_modules": table.get("target_modules", []) + ["c_attn"]} if "r" in table else {}):
        config.write_text(json.dumps({**table, **kept}), encoding="utf-8")
        load_adapter(build(), tmp_path)


@pytest.mark.parametrize("method, option, value", [
    ("lora", "r", 0), ("lora", "r", 2.0), ("lora", "r", True), ("lora", "r", "8"), ("lora", "alpha", math.nan), ("lora", "alpha", math.inf), ("lora", "alpha", "x"),
    ("lora", "alpha", -1.0), ("lora", "alpha", 0.0), ("lora", "dropout", 1.0), ("lora", "dropout", math.nan), ("lora", "dropout", False), ("lora", "targets", "wq"),
    ("lora", "targets", []), ("lora", "targets", ["q_proj"]), ("lora", "rank", 8), ("lora", "rank", None), ("lora", "alpha", 2**63), ("qlora", "double", 1), ("adalora", "orthogonality", math.nan),
    ("adalora", "start", -0.1), ("adalora", "r0", 7.5), ("adapter", "size", 0), ("adapter", "size", 3.5), ("prompt", "n", math.nan), ("prefix", "hidden", -5),
    ("ptuning", "network", None)])
def test_an_option_that_makes_no_sense_is_refused_wherever_it_comes_from(method, option, value):
    """add_adapter is what --peft, a checkpoint's meta.json and a file of peft's go through: the model is untouched by a refusal."""
    plain = build()
    with pytest.raises(UserError, match=option if option not in ("r", "targets", "network") else "rank|whole|target|network|list"):
        add_adapter(plain, method, **{option: value})
    assert adapter_config(plain) is None and all(p.requires_grad for p in plain.parameters())
