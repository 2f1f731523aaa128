"""export.py in both directions: what transformers computes from our files, what we compute from theirs."""
import json
import os
import shutil
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import export
from nanollm import checkpoint, tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.corpus.bpe import train_bpe
from nanollm.foreign_tokenizers import to_hf_json
from nanollm.generate import generate
from nanollm.hf import from_hf_config, from_hf_name, to_hf_config, to_hf_name
from nanollm.model import ModelArgs, RewardModel, Transformer
from nanollm.peft import inject_lora, lora_layers
from nanollm.variants import build as build_variants

TEXTS = ["The red cat sat on the mat, and the red cat said: 12 + 30 = 42!",
         "小明有三只红色的猫，猫在花园里。", "it's  two\n\n blanks\t🙂"] * 3
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "你好, who are you?"},
        {"role": "assistant", "content": "A cat.\nReally 🙂"}, {"role": "user", "content": " and now? "}]


@pytest.fixture(scope="module")
def tok():
    pattern = tokenizers.pattern_for(400)
    return tokenizers.bpe_tokenizer(train_bpe(TEXTS, 320, pattern, say=None), pattern)


def build(tok, **changes):
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=2, n_heads=4, vocab_size=tok.vocab_size, max_seq_len=64)
    model = Transformer(ModelArgs(**{**shape, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def ids_of(tok, n=20):
    return torch.randint(0, tok.vocab_size, (2, n), generator=torch.Generator().manual_seed(1))


def run(**options):
    export.main(export.Config(**{k: str(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}))


@pytest.mark.parametrize("changes", [
    dict(), dict(n_kv_heads=2, tie_embeddings=False, rope_theta=5e5, norm_eps=1e-4), dict(n_kv_heads=1, hidden_dim=72)],
    ids=["MHA tied", "GQA untied", "MQA tied"])
def test_there_and_back_the_logits_stay(tok, tmp_path, changes):
    """Ours -> AutoModelForCausalLM -> its save_pretrained -> ours: the same logits at each station, and bit-exact
    weights at the end of the road."""
    model, ids = build(tok, **changes), ids_of(tok)
    checkpoint.save(tmp_path / "run", 7, model, tok, "sft", None)
    run(init_from=tmp_path / "run", out=tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs) is LlamaForCausalLM and theirs.dtype == torch.float32
    with torch.no_grad():
        want = model(ids)
        torch.testing.assert_close(theirs(input_ids=ids).logits, want, atol=1e-5, rtol=0)
        assert want.std() > 0.5
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not model.args.tie_embeddings)

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")                     # several files
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    for source in ("hf", "theirs"):
        run(from_hf=tmp_path / source, out=tmp_path / f"back_{source}")
        back, tok2, meta = checkpoint.load(tmp_path / f"back_{source}")
        assert meta["stage"] == "sft" and meta["head"] == "lm"
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
        for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim", "norm_eps", "max_seq_len",
                      "rope_theta", "tie_embeddings"):
            assert getattr(back.args, field) == getattr(model.args, field), field
        with torch.no_grad():
            assert torch.equal(back(ids), want)
        for text in TEXTS:
            assert tok2.encode(text) == tok.encode(text)
        assert tokenizers.render(tok2, CHAT) == tokenizers.render(tok, CHAT) and tok2.stop_ids == tok.stop_ids


def test_autotokenizer_gives_our_ids_and_our_chat(tok, tmp_path):
    """Plain text, the chat template with and without the generation prompt, its assistant mask, and the special ids.
    Equal as long as a content does not begin with a line end: the joint string may merge it with the header's."""
    checkpoint.save(tmp_path / "run", 1, build(tok), tok, "sft", None)
    run(init_from=tmp_path / "run", out=tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [*TEXTS, " leading", "trailing ", "\n\n\n", "1234567", "naïve café ½", "\u200b\ufeffx"]:
        assert theirs.encode(text) == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == text
    for prompt in (False, True):
        assert theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"] == \
            tokenizers.render(tok, CHAT, add_generation_prompt=prompt)[0]
    masked = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert masked["assistant_masks"] == tokenizers.render(tok, CHAT)[1]
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (tok.im_end_id, tok.pad_id, None)
    assert len(theirs) == tok.vocab_size and theirs.model_max_length == 64
    turn = [tok.im_start_id, *tok.encode("hi"), tok.im_end_id, tok.eos_id]
    assert theirs.decode(turn, skip_special_tokens=True) == "hi"
    table = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert table["chat_template"] == (tmp_path / "hf" / "chat_template.jinja").read_text(encoding="utf-8")


def test_their_greedy_generation_is_ours_and_stops_at_both_tokens(tok, tmp_path):
    """generation_config.json alone makes transformers stop where we stop."""
    model, prompt = build(tok), tok.encode("The red")
    checkpoint.save(tmp_path / "run", 1, model, tok, "sft", None)
    ours = list(generate(model, prompt, 20, temperature=0))
    for stop in tok.stop_ids:                                  # swap a stop token with one that comes up half way
        assert stop not in ours
        twin, came = build(tok), ours[len(ours) // 2]
        with torch.no_grad():
            twin.tok_embeddings.weight[[stop, came]] = model.tok_embeddings.weight[[came, stop]]
        checkpoint.save(tmp_path / f"run{stop}", 1, twin, tok, "sft", None)
        run(init_from=tmp_path / f"run{stop}", out=tmp_path / f"hf{stop}")
        want = list(generate(twin, prompt, 20, temperature=0, stop_ids=tok.stop_ids))
        assert len(want) < 20
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"hf{stop}")
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
        assert out == prompt + want + [stop]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_ours_rounded(tok, tmp_path, dtype):
    """--dtype rounds once, and transformers loads the model in that type."""
    model = build(tok)
    checkpoint.save(tmp_path / "run", 1, model, tok, "pretrain", None)
    run(init_from=tmp_path / "run", out=tmp_path / "hf", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == getattr(torch, dtype)
    ours = model.layers[1].feed_forward.w2.weight
    assert torch.equal(theirs.model.layers[1].mlp.down_proj.weight, ours.to(theirs.dtype))


def test_a_lora_checkpoint_is_exported_merged_or_as_an_adapter(tok, tmp_path):
    """The merged model equals base + adapter in peft, and both equal ours. A second adapter does not overwrite the first."""
    model, ids = build(tok), ids_of(tok)
    checkpoint.save(tmp_path / "base", 1, model, tok, "pretrain", None)
    inject_lora(model, r=2, targets=["wq", "w2"])
    for _, m in lora_layers(model):
        torch.nn.init.normal_(m.lora_B, std=0.1)
    checkpoint.save(tmp_path / "lora", 2, model, tok, "sft", None)
    run(init_from=tmp_path / "base", out=tmp_path / "hf_base")
    run(init_from=tmp_path / "lora", out=tmp_path / "hf_merged")
    run(init_from=tmp_path / "lora", out=tmp_path / "adapter", adapter=True)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_base")
    with torch.no_grad():
        want, plain = model.eval()(ids), base(input_ids=ids).logits.clone()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_merged")(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits
        assert (plain - want).abs().max() > 0.1
    torch.testing.assert_close(merged, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapted, want, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="trained without --peft"):
        run(init_from=tmp_path / "base", out=tmp_path / "x", adapter=True)
    written = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "adapter").iterdir()}
    with pytest.raises(UserError, match="already holds weights .adapter_model.safetensors"):
        run(init_from=tmp_path / "lora", out=tmp_path / "adapter", adapter=True)
    assert written == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "adapter").iterdir()}


def test_a_foreign_llama_gets_our_control_tokens(tok, tmp_path):
    """A model whose tokenizer knows no chat: the four tokens are added behind, the old logits stay. A model with fewer rows than the
    tokenizer has tokens of text is another tokenizer's, and is refused."""
    torch.manual_seed(0)
    table, old_ids = to_hf_json(tok), max(tok.merge_ids.values())
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=old_ids + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(table | {"added_tokens": []}), encoding="utf-8")
    run(from_hf=tmp_path / "theirs", out=tmp_path / "run")
    model, tok2, meta = checkpoint.load(tmp_path / "run")
    assert meta["stage"] == "pretrain" and model.args.vocab_size == tok2.vocab_size > old_ids + 1 and tok2.im_end_id > old_ids
    ids = torch.randint(0, old_ids + 1, (2, 9))
    with torch.no_grad():
        old, new = model(ids).split([old_ids + 1, tok2.vocab_size - old_ids - 1], -1)
        torch.testing.assert_close(old, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)
        assert new.max() < old.max()                                         # no newcomer stands out
    theirs.resize_token_embeddings(old_ids - 4)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="5 tokens of text lie beyond the model's vocabulary"):
        run(from_hf=tmp_path / "theirs", out=tmp_path / "wrong")


def test_names_map_one_to_one():
    """Every tensor of ours has one name there, and the way back is the way there."""
    names = [n.rpartition(".")[0] for n in Transformer(ModelArgs(n_layers=12, tie_embeddings=False)).state_dict()]
    assert [from_hf_name(to_hf_name(n)) for n in names] == names and len({to_hf_name(n) for n in names}) == len(names)
    assert to_hf_name("layers.11.feed_forward.w3") == "model.layers.11.mlp.up_proj"
    names = [n.rpartition(".")[0] for n in build_variants(ModelArgs(variants=["qk_norm", "moe:n_experts=2"])).state_dict()]
    assert [from_hf_name(to_hf_name(n)) for n in names] == names
    for foreign in ("model.layers.0.self_attn.rotary", "model.vision.0.proj", "score"):
        with pytest.raises(UserError, match="no counterpart"):
            from_hf_name(foreign)


def test_rope_theta_is_read_in_the_forms_of_transformers_4_and_5(tok):
    """A top-level number there, inside rope_parameters here; ours carries both."""
    table = to_hf_config(ModelArgs(rope_theta=5e5), tok)
    assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == 5e5
    assert table["eos_token_id"] == [tok.im_end_id, tok.eos_id] and table["pad_token_id"] == tok.pad_id
    for missing in ("rope_theta", "rope_parameters"):
        assert from_hf_config({k: v for k, v in table.items() if k != missing}).rope_theta == 5e5


def test_wrong_input_is_refused_in_one_sentence(tok, tmp_path, monkeypatch):
    """Missing options, files, extras, wrong heads, damaged weights: a UserError that says what to do."""
    model = build(tok)
    checkpoint.save(tmp_path / "run", 1, model, tok, "pretrain", None)
    checkpoint.save(tmp_path / "rm", 1, RewardModel(model.args), tok, "rm", None)
    char = tokenizers.char_tokenizer("abc")
    checkpoint.save(tmp_path / "char", 1, build(char), char, "pretrain", None)
    run(init_from=tmp_path / "run", out=tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir.gguf").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "old.gguf").touch()
    for name, change in (("template", {"nanollm_template": [1]}), ("stage", {"nanollm_stage": ["x"]})):
        shutil.copytree(tmp_path / "hf", tmp_path / name)
        table = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        (tmp_path / name / "config.json").write_text(json.dumps(table | change), encoding="utf-8")
    for options, match in [
        (dict(init_from="a", from_hf="b", out="c"), "give --out and one of"), (dict(init_from="a"), "give --out"),
        (dict(init_from=tmp_path / "nowhere", out=tmp_path / "x"), "no checkpoint"),
        (dict(init_from=tmp_path / "rm", out=tmp_path / "x"), "reward model"),
        (dict(init_from=tmp_path / "char", out=tmp_path / "x"), "no tokenizer.json form"),
        (dict(init_from=tmp_path / "char", out=tmp_path / "x.gguf"), "no tokenizer.json form"),
        (dict(init_from=tmp_path / "run", out=tmp_path / "x", dtype="int8"), "--dtype must be"),
        (dict(from_hf=tmp_path / "empty", out=tmp_path / "x"), "config.json does not exist"),
        (dict(from_hf=tmp_path / "hf", out=tmp_path / "run"), "already holds checkpoints"),
        (dict(init_from=tmp_path / "run", out=tmp_path / "file"), "file is a file already"),
        (dict(init_from=tmp_path / "run", out=tmp_path / "file" / "x.gguf"), "file is a file already"),
        (dict(init_from=tmp_path / "run", out=tmp_path / "old.gguf"), "old.gguf is a file already"),
        (dict(init_from=tmp_path / "run", out=tmp_path / "dir.gguf"), "is a directory; a .gguf is one file"),
        (dict(from_hf=tmp_path / "hf", out=tmp_path / "x", dtype="bfloat16"), "--from_hf reads"),
        (dict(from_hf=tmp_path / "hf", out=tmp_path / "x", adapter=True), "--from_hf reads"),
        (dict(from_hf=tmp_path / "template", out=tmp_path / "x"), "nanollm_template must be one of"),
        (dict(from_hf=tmp_path / "stage", out=tmp_path / "x"), "nanollm_stage must be"),
    ]:
        with pytest.raises(UserError, match=match):
            run(**options)
    weights = tmp_path / "hf" / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "layers.1.mlp" not in k}, weights)
    with pytest.raises(UserError, match="weights do not fit its config.json.*feed_forward"):
        run(from_hf=tmp_path / "hf", out=tmp_path / "x")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        run(from_hf=tmp_path / "hf", out=tmp_path / "x")
    weights.unlink()
    with pytest.raises(UserError, match="no model.*safetensors"):
        run(from_hf=tmp_path / "hf", out=tmp_path / "x")
    for name in [m for m in sys.modules if m.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)                    # as if it were not installed
    with pytest.raises(UserError, match=r'pip install -e "\.\[export\]"'):
        run(init_from=tmp_path / "run", out=tmp_path / "x")
    weights.write_bytes(b"")
    with pytest.raises(UserError, match=r'pip install -e "\.\[export\]"'):
        run(from_hf=tmp_path / "hf", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()                                     # nothing half-written was left
