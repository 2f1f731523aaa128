"""The model families of transformers, into our model and out again: the same logits at each station."""
import io
import json
import os
import pickle
import re
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import evaluate
import export
import train_sft
from conftest import metrics, options, tiny_tokenizer
from nanollm import checkpoint, foreign_tokenizers, tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.foreign_tokenizers import chat_note, to_hf_json
from nanollm.generate import generate
from nanollm.hf import architecture, from_hf_config, from_hf_state, to_hf_state
from nanollm.model import ModelArgs, parameter_count
from nanollm.variants import build
from test_tokenizer import PROSE, words

V = tiny_tokenizer().vocab_size
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {                                                     # name: (class in transformers, settings, our variants)
    "llama 2": ("Llama", {"num_key_value_heads": 4}, []), "tinyllama": ("Llama", {"rms_norm_eps": 1e-5, "num_key_value_heads": 1}, []),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}, ["rope_scaling:kind=llama3"]),
    "llama 3.2": ("Llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 16}, ["rope_scaling:kind=llama3"]),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, []),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, ["rope_scaling:kind=linear"]),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, []),
    "yarn": ("Llama", {"rope_parameters": YARN}, ["rope_scaling:kind=yarn"]),
    "yarn by hand": ("Qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
                     ["qkv_bias", "rope_scaling:kind=yarn"]),
    "deepseek's yarn": ("Llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, ["rope_scaling:kind=yarn"]),
    "biased llama": ("Llama", {"attention_bias": True}, ["qkv_bias:output=true"]), "llama with gelu": ("Llama", {"hidden_act": "gelu"}, ["geglu"]),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, ["qkv_bias"]),
    "windowed qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, ["qkv_bias", "sliding_window:window=9,sinks=0"]),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}, ["qk_norm"]),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 12}, ["sliding_window:window=9,sinks=0"]),
    "mistral 0.3": ("Mistral", {"sliding_window": None}, []),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, ["moe:n_experts=4,top_k=2"]),
    "gpt2": ("GPT2", {}, ["gpt2"]), "gpt2 of another width": ("GPT2", {"n_inner": 80, "tie_word_embeddings": False}, ["gpt2"]),
}
GPT2_SHAPE = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def enlarged(model, seed=1):
    """Weights so large that attention is not flat, norms and biases that are not 1 and 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def theirs_of(name, **changes):
    """A random model of transformers."""
    family, settings, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**((GPT2_SHAPE if family == "GPT2" else SHAPE) | settings | changes))
    return enlarged(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def save(theirs, directory, **how):
    """As transformers saves it, with a tokenizer that knows nothing of chats."""
    theirs.save_pretrained(directory, **how)
    (directory / "tokenizer.json").write_text(json.dumps(to_hf_json(tiny_tokenizer())), encoding="utf-8")
    return directory


def ids_of(n=40):
    return torch.randint(0, V, (2, n), generator=torch.Generator().manual_seed(1))


def logits(model, ids=None):
    ids = ids_of() if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids).logits.float() if hasattr(model, "config") else model(ids)


def run(**how):
    export.main(export.Config(**{k: str(v) if isinstance(v, os.PathLike) else v for k, v in how.items()}))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_comes_in_and_goes_out_with_the_same_logits(name, tmp_path):
    """transformers -> ours -> transformers, in shards both times: equal logits, and at the end the very weights."""
    theirs = theirs_of(name)
    want = logits(theirs)
    assert want.std() > 0.5
    save(theirs, tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2
    run(from_hf=tmp_path / "in", out=tmp_path / "run")
    ours, _, _ = checkpoint.load(tmp_path / "run")
    torch.testing.assert_close(logits(ours), want, atol=2e-5, rtol=1e-5)
    assert len(ours.args.variants) == len(FAMILIES[name][2]) and all(
        word.startswith(expected) for word, expected in zip(ours.args.variants, FAMILIES[name][2]))
    run(init_from=tmp_path / "run", out=tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(back), want, atol=2e-5, rtol=1e-5)
    state = back.state_dict()
    assert all(torch.equal(state[k], v) for k, v in theirs.state_dict().items()) and len(state) == len(theirs.state_dict())


PUBLISHED = {                                                    # the config.json of real models as published: (settings, variants, parameters)
    "Llama 2 7B": (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
                        max_position_embeddings=4096, rms_norm_eps=1e-5), [], 6_738_415_616),
    "TinyLlama 1.1B": (dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000,
                            max_position_embeddings=2048, rope_scaling=None, rope_theta=10000.0), [], 1_100_048_384),
    "SmolLM2 135M": (dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
                          max_position_embeddings=8192, rope_theta=100000, tie_word_embeddings=True), [], 134_515_008),
    "Llama 3.2 1B": (dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                          vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True, rope_scaling={
                              "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                              "rope_type": "llama3"}),
                     ["rope_scaling:kind=llama3,factor=32.0,context=131072,original=8192,beta_slow=1.0,beta_fast=4.0"], 1_235_814_400),
    "Mistral 7B": (dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                        vocab_size=32000, max_position_embeddings=32768, sliding_window=4096), ["sliding_window:window=4096,sinks=0"], 7_241_732_096),
    "Mixtral 8x7B": (dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                          vocab_size=32000, max_position_embeddings=32768, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.02,
                          sliding_window=None), ["moe:n_experts=8,top_k=2,balance=0.04,hidden_dim=14336"], 46_702_792_704),
    "Qwen2.5 0.5B": (dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                          vocab_size=151936, max_position_embeddings=32768, max_window_layers=24, sliding_window=32768, use_sliding_window=False,
                          rope_theta=1000000.0, tie_word_embeddings=True), ["qkv_bias"], 494_032_768),
    "Qwen3 0.6B": (dict(model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                        head_dim=128, vocab_size=151936, max_position_embeddings=40960, max_window_layers=28, sliding_window=None, use_sliding_window=False,
                        attention_bias=False, rope_theta=1000000, tie_word_embeddings=True), ["qk_norm"], 596_049_920),
    "GPT-2": (dict(model_type="gpt2", n_embd=768, n_layer=12, n_head=12, n_positions=1024, n_ctx=1024, vocab_size=50257, layer_norm_epsilon=1e-5,
                   activation_function="gelu_new"), ["gpt2"], 124_439_808),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_give_the_published_number_of_parameters(name):
    """transformers 4 wrote them: theta and scaling at the top level, much left to defaults. On a device without numbers 46 billion cost nothing."""
    settings, words, parameters = PUBLISHED[name]
    args = from_hf_config({"model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16"} | settings)
    assert args.variants == words
    with torch.device("meta"):
        assert parameter_count(build(args))["total"] == parameters


OURS = {                                                         # variants, width of the heads: the class in transformers
    ("", 20): "Llama", ("qk_norm", 20): "Qwen3", ("qkv_bias", 0): "Qwen2", ("qkv_bias:output=true", 20): "Llama", ("geglu", 0): "Llama", ("gpt2", 0): "GPT2",
    ("moe:n_experts=4", 0): "Mixtral", ("moe:n_experts=3,hidden_dim=24 sliding_window:window=5,sinks=0", 20): "Mixtral",
    ("sliding_window:window=9,sinks=0", 0): "Mistral", ("sliding_window", 0): "Llama", ("qk_norm sliding_window:window=5,sinks=0", 0): "Qwen3",
    ("rope_scaling:kind=yarn", 20): "Llama", ("rope_scaling:kind=ntk,factor=3", 0): "Llama", ("rope_scaling:kind=linear,factor=2", 0): "Llama",
    ("rope_scaling:kind=llama3 qkv_bias", 0): "Qwen2",
}


def ours_of(words, head_dim=0, seed=1, **shape):
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4 if "gpt2" in words else 2, head_dim=head_dim, vocab_size=V, max_seq_len=64) | shape
    torch.manual_seed(0)
    return enlarged(build(ModelArgs(**shape, variants=words.split())), seed)


@pytest.mark.parametrize("words, head_dim", OURS)
def test_a_model_of_ours_goes_to_the_family_that_computes_the_same(words, head_dim, tmp_path):
    """Whatever variants it has; and comes back as it was."""
    model = ours_of(words, head_dim)
    checkpoint.save(tmp_path / "run", 1, model, tiny_tokenizer(), "sft", None)
    run(init_from=tmp_path / "run", out=tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == (OURS[words, head_dim] + "ForCausalLM").replace("GPT2ForCausalLM", "GPT2LMHeadModel")
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=1e-5)
    run(from_hf=tmp_path / "hf", out=tmp_path / "back")
    back, _, _ = checkpoint.load(tmp_path / "back")
    torch.testing.assert_close(logits(back), logits(model), atol=0 if "ntk" not in words else 1e-5, rtol=0)


@pytest.mark.parametrize("words, says", [
    ("prefix_lm", "no Hugging Face family computes this model's prefix_lm"), ("relu", "relu"), ("gelu", "gelu"), ("moe:top_k=1", "not divided by their sum"),
    ("sliding_window:window=9", "keeps sinks; only :sinks=0 is Mistral's"), ("qkv_bias:output=true sliding_window:window=9,sinks=0", "no Hugging Face family")])
def test_what_no_family_computes_is_not_exported(words, says, tmp_path):
    checkpoint.save(tmp_path / "run", 1, ours_of(words), tiny_tokenizer(), "sft", None)
    with pytest.raises(UserError, match=says):
        run(init_from=tmp_path / "run", out=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    checkpoint.save(tmp_path / "grouped", 1, ours_of("gpt2", n_kv_heads=2), tiny_tokenizer(), "sft", None)
    with pytest.raises(UserError, match="GPT-2 knows no grouped queries"):
        run(init_from=tmp_path / "grouped", out=tmp_path / "hf")


def test_half_precision_comes_in_exactly_and_goes_out_rounded_once(tmp_path):
    """bf16 files of a real model are fp32 masters here, the very numbers; written as bf16 again they are the same file."""
    theirs = theirs_of("qwen2").to(torch.bfloat16)
    run(from_hf=save(theirs, tmp_path / "in"), out=tmp_path / "run")
    ours, _, _ = checkpoint.load(tmp_path / "run")
    assert ours.tok_embeddings.weight.dtype == torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), atol=2e-5, rtol=1e-5)
    run(init_from=tmp_path / "run", out=tmp_path / "out", dtype="bfloat16")
    stored, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "in" / "model.safetensors")
    assert stored.keys() == before.keys() and all(torch.equal(v, before[k]) and v.dtype == torch.bfloat16 for k, v in stored.items())


@pytest.mark.parametrize("name", ["mistral", "llama 3.2", "gpt2", "qwen3"])
def test_greedy_text_of_an_imported_model_is_that_of_transformers(name, tmp_path):
    """Token by token through either cache, past the end of a window."""
    theirs = theirs_of(name)
    run(from_hf=save(theirs, tmp_path / "in"), out=tmp_path / "run")
    ours, _, _ = checkpoint.load(tmp_path / "run")
    prompt = [5, 9, 2, 40, 3, 77, 1]
    want = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
    assert list(generate(ours, prompt, 30, temperature=0)) == want


def test_a_table_of_shards_says_what_is_where(tmp_path):
    """--shard_size cuts between tensors, each file holds at most that much, and the index names each tensor's file."""
    model = ours_of("", dim=128, hidden_dim=1536, max_seq_len=16)
    checkpoint.save(tmp_path / "run", 1, model, tiny_tokenizer(), "sft", None)
    run(init_from=tmp_path / "run", out=tmp_path / "hf", shard_size=2)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) == 3 and files[0].name == "model-00001-of-00003.safetensors" and not (tmp_path / "hf" / "model.safetensors").exists()
    held = {file.name: load_file(file) for file in files}
    assert all(sum(v.nbytes for v in part.values()) <= 2 * 2**20 for part in held.values())
    assert index["weight_map"] == {k: name for name, part in held.items() for k in part}
    assert index["metadata"]["total_size"] == sum(v.nbytes for part in held.values() for v in part.values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(logits(theirs, ids_of(16)), logits(model, ids_of(16)), atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="already holds weights"):
        run(init_from=tmp_path / "run", out=tmp_path / "hf")


# ---- what is refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, says", [
    (dict(model_type="gemma2"), "model_type 'gemma2' is none of those that can be read .*what differs: soft-capped scores"),
    (dict(model_type="marvin", brain_size=1, mood="low"), "what differs: at least the settings brain_size, mood$"),
    (dict(model_type=None), "model_type None"), (dict(mlp_bias=True), "biases in its feed-forward"), (dict(hidden_act="relu"), "the activation 'relu'"),
    (dict(model_type="qwen3", attention_bias=True), "biases in its attention"),
    (dict(model_type="mistral", layer_types=["full_attention", "sliding_attention"]), "layers that alternate"),
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), "layers that alternate"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantised weights .gptq."),
    (dict(rope_parameters={"rope_type": "longrope"}), "RoPE scaled by 'longrope'"),
    (dict(rope_parameters={"rope_type": "linear"}), "RoPE scaled by 'linear' without a factor"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}), "RoPE with the settings full_attention, sliding"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "RoPE on 0.5 of each head"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0, "truncate": False}), "YaRN without rounding"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 2.0}), "not that of a llama model: KeyError.'low_freq_factor'"),
    (dict(model_type="gpt2"), "n_embd must be a whole number"), (dict(hidden_size="x"), "hidden_size must be a whole number from 1 to 16777216, got 'x'"),
    (dict(model_type=["x"]), "model_type .'x'. is none"), (dict(intermediate_size=-1), "intermediate_size must be"), (dict(rms_norm_eps="x"), "rms_norm_eps must be a number"),
    (dict(vocab_size=float("inf")), "vocab_size must be"), (dict(num_hidden_layers=10**30), "num_hidden_layers must be"), (dict(head_dim=1.5), "head_dim must be"),
    (dict(max_position_embeddings=True), "max_position_embeddings must be"), (dict(rms_norm_eps=float("nan")), "rms_norm_eps must be"),
    (dict(rope_parameters={"rope_type": "linear", "factor": float("nan")}), "factor must be a number above 0, got nan"), (dict(rope_theta=-1), "rope_theta must be"),
    (dict(rope_parameters=[1]), "rope_parameters must be a table"), (dict(tie_word_embeddings="no"), "tie_word_embeddings must be true or false, got 'no'"),
    (dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=5), "num_experts_per_tok must be a whole number from 1 to 4"),
    (dict(num_attention_heads=3, head_dim=None), "not that of a llama"), (dict(num_attention_heads=0), "num_attention_heads must be"),
])
def test_what_our_model_does_not_compute_is_named(change, says):
    """One sentence that says what differs: reading it as something near would give a model that talks nonsense without an error."""
    with pytest.raises(UserError, match=says):
        from_hf_config(architecture(ModelArgs()) | change)


def test_settings_of_gpt2_that_change_its_arithmetic_are_named():
    for change, says in [(dict(activation_function="relu"), "'relu'"), (dict(scale_attn_weights=False), "not divided"),
                         (dict(scale_attn_by_inverse_layer_idx=True), "layer's number"), (dict(add_cross_attention=True), "cross-attention")]:
        with pytest.raises(UserError, match=says):
            from_hf_config(architecture(ModelArgs(variants=["gpt2"])) | change)
    with pytest.raises(UserError, match="no table of settings"):
        from_hf_config([])


def test_the_first_gpt2_files_are_read_too(tmp_path):
    """Without `transformer.` in front, and with the causal mask among the weights."""
    state = theirs_of("gpt2").state_dict()
    old = {k.removeprefix("transformer."): v for k, v in state.items() if k != "lm_head.weight"} | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=V, max_seq_len=64, variants=["gpt2"])
    ours = from_hf_state(old, args)
    assert all(torch.equal(v, state[k]) for k, v in to_hf_state(ours, args).items())
    with pytest.raises(UserError, match="'h.0.crossattention.q.weight' has no counterpart"):
        from_hf_state({"h.0.crossattention.q.weight": torch.ones(1)}, args)


def test_a_broken_directory_is_refused_in_one_sentence(tmp_path):
    """A shard missing, of another model or cut short, an index that is none, weights as a pickle: what, where, what to do."""
    good = save(theirs_of("llama 2"), tmp_path / "good", max_shard_size="20KB")
    index, first = good / "model.safetensors.index.json", sorted(good.glob("model-*"))[0]

    def refused(says):
        with pytest.raises(UserError, match=says) as error:
            run(from_hf=good, out=tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    refused("the file is damaged, download it again")
    first.unlink()
    refused(f"the shard {first.name}, which model.safetensors.index.json names, is missing")
    save_file({"model.norm.weight": torch.ones(32)}, first)
    refused(f"{first.name} lacks .*shards of different models")
    first.write_bytes(whole)
    text = index.read_text(encoding="utf-8")
    for broken in ("{", "[1]", '{"weight_map": 3}'):
        index.write_text(broken, encoding="utf-8")
        refused("is not an index of shards")
    index.write_text(text.replace(first.name, f"../../{first.name}"), encoding="utf-8")              # a name is not followed out of the directory
    run(from_hf=good, out=tmp_path / "inside")
    index.unlink()
    first.unlink()
    refused("weights do not fit its config.json")
    for file in good.glob("*.safetensors"):
        file.unlink()
    refused("holds no model.*safetensors")
    (good / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": [1.0]}))
    refused("as a pickle .pytorch_model.bin., and opening a pickle runs whatever code is inside it")
    (good / "config.json").write_text("[1]", encoding="utf-8")
    refused("no table of settings")


# ---- chats and tokenizers --------------------------------------------------------------------------------------

CHATML = ("{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{%- endif %}"
          "{%- for message in messages %}\n{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
          "{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\n' }}{%- endif %}")


@pytest.mark.parametrize("template, says", [
    (CHATML, "is ChatML, as ours, but begins a chat without a system message with one of its own.*You are kind"),
    (CHATML[CHATML.index("{%- for"):], "is ChatML, as ours$"), ("{{ bos_token }}" + CHATML, "is not ChatML"), ("{{ messages[0].content }}", "is not ChatML"),
    ("{% for x in %}", "could not be tried .TemplateSyntaxError."),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "could not be tried .SecurityError."),
    (None, "has no chat template")])
def test_a_chat_template_is_tried_and_not_guessed(template, says, tmp_path):
    """In jinja's sandbox, from either file; what it would do to the machine is not done."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    from_config = chat_note(tmp_path)
    if template:
        (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        assert chat_note(tmp_path) == from_config
    assert re.search(says, from_config), from_config


def exported(tok, directory):
    """What AutoTokenizer makes of our tokenizer's files."""
    foreign_tokenizers.write_files(directory, foreign_tokenizers.hf_files(tok, tokenizers.chat_template(tok)))
    return AutoTokenizer.from_pretrained(directory)


def alike(tok, theirs, texts):
    """Every text encoded alone, and chats of three texts with and without the prompt for an answer and with the mask of answers."""
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [tok.encode(text) for text in texts]
    chats = [[{"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), texts[i : i + 3])] for i in range(0, len(texts) - 2, 3)]
    for prompt in (False, True):
        want = [tokenizers.render(tok, chat, add_generation_prompt=prompt) for chat in chats]
        got = theirs.apply_chat_template(chats, add_generation_prompt=prompt, return_dict=True, return_assistant_tokens_mask=True)
        assert got["input_ids"] == [ids for ids, _ in want] and got["assistant_masks"] == [mask for _, mask in want]


@pytest.mark.parametrize("n", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_autotokenizer_encodes_and_renders_random_strings_as_we_do(n, tmp_path):
    """Our own tokenizer's files in transformers: any Unicode, emoji, CRLF, blanks at both ends. The two exceptions are the next test."""
    texts = [text.lstrip("\r\n") for text in words(9, n)]
    alike(tiny_tokenizer(), exported(tiny_tokenizer(), tmp_path), texts)


def test_the_two_exceptions_of_the_exported_tokenizer(tmp_path):
    """A control token spelled out in text: theirs becomes the token, ours stays letters. A content that begins with a line end: theirs
    may join it to the header's. Both read back as the same text."""
    tok = tiny_tokenizer()
    theirs = exported(tok, tmp_path)
    assert tok.im_end_id in theirs.encode("a<|im_end|>b") and tok.im_end_id not in tok.encode("a<|im_end|>b")
    merged = tokenizers.bpe_tokenizer([(10, 10)], tokenizers.pattern_for(320))                   # a token for two line ends
    chat = [{"role": "user", "content": "\nx"}]
    ours, got = tokenizers.render(merged, chat)[0], exported(merged, tmp_path / "merged").apply_chat_template(chat)["input_ids"]
    assert len(got) == len(ours) - 1 and merged.decode(got) == merged.decode(ours)


def spm_model(**how):
    """A SentencePiece BPE model, its bytes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in PROSE * 9 for line in text.splitlines()]), model_writer=out, vocab_size=450, minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False, **{"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True} | how)
    return out.getvalue()


@pytest.mark.parametrize("blank, template", [(True, "chatml"), (False, "chatml"), (True, "bos"), (True, "raw")])
def test_a_sentencepiece_tokenizer_goes_out_with_the_same_ids_and_chats(blank, template, tmp_path):
    """Llama 2's, TinyLlama's and Mistral's kind: as tokenizer.json, whose chat template writes the blank that SentencePiece puts before
    each content. Only a U+2581 in the text differs: there it is a blank."""
    (tmp_path / "tokenizer.model").write_bytes(spm_model(add_dummy_prefix=blank))
    tok = tokenizers.load(tmp_path / "tokenizer.model")
    assert tok.added_blank == blank
    tok.template = template
    theirs = exported(tok, tmp_path / "out")
    texts = ["\nbegins with a line end", "x", " ", *[""] * 3 * (template == "chatml")] + [text.replace("\u2581", "_") or "x" for text in words(10, 600)]
    alike(tok, theirs, texts)
    assert [theirs.decode(tok.encode(text)) for text in texts] == texts
    assert tokenizers.load(tmp_path / "out" / "tokenizer.model").hash == tok.hash


@pytest.mark.parametrize("how, says", [
    (dict(model_type="unigram"), "it must be a BPE one"), (dict(normalization_rule_name="nmt_nfkc"), "changes no character"),
    (dict(byte_fallback=False), "by their bytes"), (dict(user_defined_symbols=["<|im_start|>"]), "no two pieces make its '<|im_start|>'")], ids=str)
def test_a_sentencepiece_model_of_another_kind_is_not_written_wrongly(how, says, tmp_path):
    """Not BPE, one that normalises, one without bytes for the unknown, one that finds whole symbols in text."""
    (tmp_path / "tokenizer.model").write_bytes(spm_model(**how))
    with pytest.raises(UserError, match=f"no tokenizer.json form.*{re.escape(says)}"):
        to_hf_json(tokenizers.load(tmp_path / "tokenizer.model"))


def test_tiktoken_ranks_go_out_with_the_same_ids(tmp_path):
    """Their merges are found again: the last two parts of each token."""
    tiny = tiny_tokenizer()
    foreign_tokenizers.write_files(tmp_path, foreign_tokenizers.tiktoken_files(tiny))
    tok = tokenizers.load(tmp_path / "ranks.tiktoken")
    table = to_hf_json(tok)["model"]
    assert table["merges"] == to_hf_json(tiny)["model"]["merges"] and tok.kind == "tiktoken"
    alike(tok, exported(tok, tmp_path / "out"), [text.lstrip("\r\n") for text in words(11, 300)])


def test_smollm2_and_llama_3_cut_text_as_their_files_say(tmp_path):
    """Digits one by one before GPT-2's pattern; merges that list every way to make a token."""
    import tokenizers as theirs
    both = theirs.pre_tokenizers.Sequence([theirs.pre_tokenizers.Digits(individual_digits=True), theirs.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    llama = to_hf_json(tiny_tokenizer())
    pieces = {token: i for token, i in llama["model"]["vocab"].items()}
    llama["model"] |= {"ignore_merges": True, "merges": [[token[:k], token[k:]] for token in pieces for k in range(1, len(token))
                                                         if token[:k] in pieces and token[k:] in pieces]}
    llama["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = foreign_tokenizers.LLAMA3_PATTERN
    smol = theirs.Tokenizer(theirs.models.BPE())
    smol.pre_tokenizer = both
    smol.train_from_iterator(PROSE * 9, theirs.trainers.BpeTrainer(vocab_size=450, show_progress=False,
                                                                  initial_alphabet=theirs.pre_tokenizers.ByteLevel.alphabet()))
    for name, text in (("smol", smol.to_str()), ("llama", json.dumps(llama))):
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        tok, hf = tokenizers.load(tmp_path / f"{name}.json"), theirs.Tokenizer.from_str(text)
        for sample in [*PROSE, *words(12, 400), "a  12 3\n\n4  ", "\u00b2\u2167 7x"]:
            assert tok.encode(sample) == hf.encode(sample, add_special_tokens=False).ids, (name, sample)


# ---- a model from outside, used ----------------------------------------------------------------------------------

def test_an_imported_model_is_tuned_measured_and_talked_to(world, tmp_path, capsys):
    """A Qwen2 with more rows than its tokenizer has tokens, and its own ChatML: train_sft.py, evaluate.py, chat.py, and out again."""
    theirs = theirs_of("qwen2", vocab_size=V + 128)
    save(theirs, tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    run(from_hf=tmp_path / "in", out=tmp_path / "base")
    assert "is ChatML, as ours" in capsys.readouterr().out
    train_sft.main(train_sft.Config(**options("sft", world, tmp_path / "sft", init_from=str(tmp_path / "base"), max_steps=30, learning_rate=1e-3)))
    loss = [row["train/loss"] for row in metrics(tmp_path / "sft") if "train/loss" in row]
    assert loss[-1] < 0.8 * loss[0]
    model, tok, _ = checkpoint.load(tmp_path / "sft")
    assert tok.vocab_size == model.args.vocab_size == V + 128 and tok.decode([V + 100]) == ""
    (tmp_path / "text.txt").write_text("The sun is warm and the sky is blue.", encoding="utf-8")
    evaluate.main(evaluate.Config(init_from=str(tmp_path / "sft"), data=[str(tmp_path / "text.txt")], device="cpu"))
    chat.main(chat.Config(init_from=[str(tmp_path / "sft")], prompt=["What has Anna?"], max_new_tokens=12, device="cpu"))
    run(init_from=tmp_path / "sft", out=tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(back).__name__ == "Qwen2ForCausalLM" and len(AutoTokenizer.from_pretrained(tmp_path / "out")) == V + 128
    torch.testing.assert_close(logits(back), logits(model), atol=2e-5, rtol=1e-5)


# ---- GGUF ------------------------------------------------------------------------------------------------------

def read_gguf(path):
    """({name: tensor in fp32}, {key: value}) by the format's own reader."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return tensors, {key: field.contents() for key, field in reader.fields.items()}


def neighbours(x, heads):
    """Row by row, as llama.cpp's RoPE wants it: of each head 0, D/2, 1, D/2 + 1 …"""
    D = x.size(0) // heads
    return torch.stack([x[h * D + (k // 2 if k % 2 == 0 else D // 2 + k // 2)] for h in range(heads) for k in range(D)])


@pytest.mark.parametrize("words, dtype", [("", "float32"), ("qkv_bias", "float16"), ("qk_norm", "bfloat16"), ("gpt2", "bfloat16"),
                                          ("qkv_bias:output=true", "float32")])
def test_the_reference_reader_gets_every_tensor_back_from_gguf(words, dtype, tmp_path):
    """Bit by bit what was written, under GGUF's names; rows of q and k in llama's order only where the architecture is llama."""
    model = ours_of(words, 20 if not words else 0, tie_embeddings=False)
    checkpoint.save(tmp_path / "run", 1, model, tiny_tokenizer(), "sft", None)
    run(init_from=tmp_path / "run", out=tmp_path / "deep" / "model.gguf", dtype=dtype)
    tensors, fields = read_gguf(tmp_path / "deep" / "model.gguf")
    arch = {"": "llama", "qkv_bias": "qwen2", "qk_norm": "qwen3", "gpt2": "gpt2"}.get(words, "llama")
    assert fields["general.architecture"] == arch and fields[f"{arch}.block_count"] == 2 and fields[f"{arch}.context_length"] == 64
    theirs = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
              "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "w1": "ffn_up" if arch == "gpt2" else "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
              "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    want = {}
    for key, x in model.state_dict().items():
        *where, name, leaf = key.split(".")
        if name in ("wq", "wk") and arch == "llama":
            x = neighbours(x, 4 if name == "wq" else 2)
        if leaf == "positions":
            want["position_embd.weight"] = x[0]
        else:
            want[(f"blk.{where[1]}." if where else "") + f"{theirs[name]}.{leaf}"] = x if x.dim() == 1 else x.to(getattr(torch, dtype)).float()
    if arch == "gpt2":
        for n in range(2):
            for leaf in ("weight", "bias"):
                want[f"blk.{n}.attn_qkv.{leaf}"] = torch.cat([want.pop(f"blk.{n}.attn_{p}.{leaf}") for p in "qkv"])
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[k], v) for k, v in want.items())


@pytest.mark.parametrize("words, head_dim", [("", 0), ("qkv_bias", 0), ("qk_norm", 128), ("gpt2", 0)])
def test_transformers_computes_our_logits_from_gguf(words, head_dim, tmp_path):
    """Its reader turns names, settings and the order of the rows back by its own code; its tokenizer gives our ids for words."""
    model = ours_of(words, head_dim, n_kv_heads=4, max_seq_len=1024 if words == "gpt2" else 64)          # it does not read GPT-2's
    checkpoint.save(tmp_path / "run", 1, model, tiny_tokenizer(), "sft", None)
    run(init_from=tmp_path / "run", out=tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-5, rtol=1e-5)


def test_gguf_holds_the_vocabulary_the_ends_and_the_chat_template(tmp_path):
    """Of byte-level BPE its tokens and merges, of SentencePiece its pieces and scores; each id once, control tokens marked."""
    tok = tiny_tokenizer()
    checkpoint.save(tmp_path / "run", 1, ours_of(""), tok, "sft", None)
    run(init_from=tmp_path / "run", out=tmp_path / "model.gguf")
    _, fields = read_gguf(tmp_path / "model.gguf")
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    table = to_hf_json(tok)["model"]
    assert of["model"] == "gpt2" and of["pre"] == "qwen2" and of["merges"] == [" ".join(m) for m in table["merges"]]
    assert {token: i for i, token in enumerate(of["tokens"])} == table["vocab"] | tok.control
    assert [i for i, kind in enumerate(of["token_type"]) if kind == 3] == sorted(tok.control[name] for name in tokenizers.CONTROL)
    assert (of["eos_token_id"], of["eot_token_id"], of["padding_token_id"], of["add_bos_token"]) == (tok.im_end_id, tok.eos_id, tok.pad_id, False)
    assert fields["tokenizer.chat_template"] == tokenizers.chat_template(tok)

    (tmp_path / "tokenizer.model").write_bytes(spm_model())
    spm = tokenizers.load(tmp_path / "tokenizer.model")
    checkpoint.save(tmp_path / "spm", 1, ours_of("", vocab_size=spm.vocab_size), spm, "sft", None)
    run(init_from=tmp_path / "spm", out=tmp_path / "spm.gguf")
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in read_gguf(tmp_path / "spm.gguf")[1].items()}
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    n = sp.GetPieceSize()
    assert of["model"] == "llama" and of["tokens"][:n] == [sp.IdToPiece(i) for i in range(n)] and of["scores"][:n] == [sp.GetScore(i) for i in range(n)]
    assert of["token_type"][:4] == [2, 3, 3, 6] and len(of["tokens"]) == spm.vocab_size and of["add_space_prefix"]


@pytest.mark.parametrize("word, says", [("sliding_window:window=9,sinks=0", "sliding_window"), ("moe:n_experts=4", "moe"), ("geglu", "geglu")])
def test_what_llama_cpp_would_compute_otherwise_is_refused(word, says, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "run", 1, ours_of(word), tiny_tokenizer(), "sft", None)
    with pytest.raises(UserError, match=f"would not compute this model's {says}"):
        run(init_from=tmp_path / "run", out=tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)                                               # as if it were not installed
    with pytest.raises(UserError, match=r'pip install -e "\.\[gguf\]"'):
        run(init_from=tmp_path / "run", out=tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_scaled_rope_in_gguf_is_what_llama_cpp_multiplies_with(tmp_path):
    """llama3 as a divisor of each pair's frequency; linear and YaRN as settings."""
    fields = {}
    for kind in ("llama3", "linear", "yarn"):
        checkpoint.save(tmp_path / kind, 1, ours_of(f"rope_scaling:kind={kind},factor=4"), tiny_tokenizer(), "sft", None)
        run(init_from=tmp_path / kind, out=tmp_path / f"{kind}.gguf")
        tensors, fields[kind] = read_gguf(tmp_path / f"{kind}.gguf")
        assert ("rope_freqs.weight" in tensors) == (kind == "llama3")
        if kind == "llama3":
            plain = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
            angle = (plain / tensors["rope_freqs.weight"] * 9).repeat(2)                          # at position 9
            model, _, _ = checkpoint.load(tmp_path / kind)
            torch.testing.assert_close(model.rope_cos[9], angle.cos(), atol=1e-5, rtol=0)
    assert fields["linear"]["llama.rope.scaling.type"] == "linear" and fields["linear"]["llama.rope.scaling.factor"] == 4.0
    yarn = {key.removeprefix("llama.rope.scaling."): value for key, value in fields["yarn"].items()}
    assert (yarn["type"], yarn["original_context_length"], yarn["yarn_beta_fast"], yarn["yarn_attn_factor"]) == ("yarn", 16, 32.0, 1.0)
