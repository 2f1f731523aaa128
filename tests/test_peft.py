"""LoRA against its own claims (step 0, counts, merge, switch) and the peft library (forward, gradients, files)."""
import json
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nanollm.config import UserError
from nanollm.hf import load_adapter, save_adapter, to_hf_config, to_hf_name, to_hf_state
from nanollm.model import ModelArgs, Transformer
from nanollm.peft import (TARGETS, LoRALinear, disable_adapter, inject_lora, load_lora_state_dict, lora_config,
                          lora_layers, lora_state_dict, merge_lora)

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
    assert config == {"r": 3, "alpha": 5, "dropout": 0.25, "targets": ["wq", "w3"]}
    assert build().state_dict().keys() == {k for k in state if "lora" not in k}
    assert state.keys() - build().state_dict().keys() == lora_state_dict(model).keys()
    other = Transformer(ARGS).eval()
    inject_lora(other, **config)
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
    with pytest.raises(UserError, match="no LoRA adapter"):
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


def test_adapters_of_another_kind_are_refused(tmp_path):
    """DoRA files would load as LoRA and compute something else; a missing file is named."""
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(UserError, match="only plain LoRA .* use_dora"):
        load_adapter(build(), tmp_path / "dora")
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        load_adapter(build(), tmp_path / "nowhere")
    (tmp_path / "dora" / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        load_adapter(build(), tmp_path / "dora")
