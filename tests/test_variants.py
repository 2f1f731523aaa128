"""Architecture options: each against transformers where it has the same part, and all under the rules that the plain model obeys."""
import json
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

import chat
import export
import train_dpo
import train_pretrain
import train_rm
import train_sft
from conftest import metrics, options, run_ranks, tiny_tokenizer, weights, write_world
from nanollm import checkpoint
from nanollm.config import UserError
from nanollm.generate import generate, generate_batch
from nanollm.hf import to_hf_state
from nanollm.losses import IGNORE_INDEX, cross_entropy
from nanollm.model import KVCache, ModelArgs, RewardModel, Transformer, flops_per_token, parameter_count
from nanollm.peft import inject_lora, merge_lora
from nanollm.variants import VARIANTS, build
from nanollm.variants.moe import MoE, add_balance, train_only_experts
from nanollm.variants.prefix_lm import mark_prefix, prefix_mask
from nanollm.variants.rope_scaling import scaled_frequencies
from nanollm.variants.sliding_window import window_mask

SMALL = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, max_seq_len=32)
ALL = [[name] for name in VARIANTS] + [["sliding_window:window=6,sinks=2"], ["moe:n_experts=4,top_k=1", "qk_norm", "rope_scaling:factor=2"]]
CAUSAL = [words for words in ALL if words != ["prefix_lm"]]
name_of = "+".join


def small(*words, seed=0, scale=5.0, head="lm", **changes):
    """A small model in eval mode with enlarged weights: at 0.02 attention is so flat that masks hardly matter."""
    torch.manual_seed(seed)
    model = build(ModelArgs(**{**SMALL, **changes}, variants=list(words)), head).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(B=2, T=12, seed=1):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- what all of them keep -------------------------------------------------------------------------------------

def test_without_variants_nothing_changes():
    """Off by default: the very weights that Transformer and RewardModel draw."""
    for head, cls in (("lm", Transformer), ("reward", RewardModel)):
        torch.manual_seed(0)
        plain = cls(ModelArgs(**SMALL)).state_dict()
        torch.manual_seed(0)
        assert all(torch.equal(v, plain[k]) for k, v in build(ModelArgs(**SMALL), head).state_dict().items())


@pytest.mark.parametrize("words, says", [
    (["qknorm"], "did you mean 'qk_norm'"), (["zzz"], "choose from qk_norm"), (["moe:experts=4"], "did you mean 'n_experts'"),
    (["moe:top_k=two"], "^--variants moe:top_k=two: top_k wants int, got 'two'$"), (["moe:n_experts"], "n_experts=8"), (["qk_norm:a=1"], "it has none"),
    (["moe,qk_norm"], "separate them by spaces"), (["moe:top_k=2,qk_norm"], "separate variants by spaces"),
    (["moe", "geglu"], "moe and geglu both replace the feed_forward"), (["gpt2", "rope_scaling"], "both replace the positions"),
    (["qk_norm", "qk_norm"], "both replace"), (["moe:n_experts=2,top_k=3"], "between 1 and n_experts"),
    (["sliding_window:window=40"], "fit into max_seq_len 32"), (["rope_scaling:kind=zoom"], "linear, ntk, yarn or llama3"),
    (["qk_norm", "qkv_bias"], "both replace the attention")])
def test_a_wrong_word_is_one_sentence_with_the_nearest_right_one(words, says):
    with pytest.raises(UserError, match=says):
        build(ModelArgs(**SMALL, variants=words))


@pytest.mark.parametrize("words", ALL, ids=name_of)
def test_a_cache_and_a_batch_change_nothing(words):
    """Greedy text: one token at a time through the cache, many prompts padded on the left, and the slow way without either."""
    model, prompts = small(*words), [[5, 9, 2], [11], [7, 7, 40, 3, 1, 8, 22]]
    singles = [list(generate(model, p, 18, temperature=0)) for p in prompts]
    assert generate_batch(model, prompts, 18, pad_id=60, temperature=0)[0] == singles
    if words != ["prefix_lm"]:                               # whose prompt is marked by the cache alone
        with torch.no_grad():
            for prompt, single in zip(prompts, singles):
                logits = model(torch.tensor([prompt + single]))[0]
                assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == single


@pytest.mark.parametrize("words", CAUSAL, ids=name_of)
def test_no_variant_looks_ahead_or_into_another_document(words):
    model, ids = small(*words), tokens(B=1)
    other = ids.clone()
    other[0, 7:] = (other[0, 7:] + 1) % 61
    with torch.no_grad():
        close(model(other)[0, :7], model(ids)[0, :7])
        packed = model(torch.cat((ids, tokens(1, 9, seed=2)), 1), segments=torch.tensor([[1] * 12 + [2] * 9]))
        close(packed[:, :12], model(ids))
        close(packed[:, 12:], model(tokens(1, 9, seed=2)))


@pytest.mark.parametrize("words", ALL, ids=name_of)
def test_naive_attention_equals_sdpa_in_every_variant(words):
    ids, segments = tokens(), torch.tensor([[1] * 5 + [2] * 7, [1] * 12])
    with torch.no_grad():
        for given in (None, segments):
            close(small(*words, attention="naive")(ids, given), small(*words)(ids, given))


@pytest.mark.parametrize("words", ALL, ids=name_of)
def test_a_checkpoint_holds_its_variants(words, tmp_path):
    """Saved, rebuilt from meta.json alone, saved and rebuilt again: the same logits, context and parameter count; and a
    reward model with the same body."""
    tok = tiny_tokenizer()
    model = small(*words, vocab_size=tok.vocab_size)
    first = checkpoint.save(tmp_path / "a", 1, model, tok, "pretrain", None)
    again, _, _ = checkpoint.load(first)
    twice, _, meta = checkpoint.load(checkpoint.save(tmp_path / "b", 1, again, tok, "sft", None))
    assert meta["model"]["variants"] == words and twice.args == model.args
    assert parameter_count(twice) == parameter_count(model)
    with torch.no_grad():
        assert torch.equal(twice(tokens()), model(tokens()))
    reward = small(*words, head="reward", vocab_size=tok.vocab_size)
    reward.backbone.load_state_dict({k: v for k, v in model.state_dict().items() if k != "output.weight"})
    back, _, _ = checkpoint.load(checkpoint.save(tmp_path / "c", 1, reward, tok, "rm", None), expect="reward")
    with torch.no_grad():
        assert torch.equal(back(tokens()), reward(tokens()))


def test_a_checkpoint_from_before_variants_loads(tmp_path):
    tok, model = tiny_tokenizer(), small(vocab_size=320)
    path = checkpoint.save(tmp_path, 1, model, tok, "pretrain", None)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    del meta["model"]["variants"]
    checkpoint.write_meta(path, meta)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(path)[0](tokens()), model(tokens()))


@pytest.mark.parametrize("words", ALL, ids=name_of)
def test_lora_fits_every_variant(words):
    """Untrained adapters change nothing; trained ones can be merged."""
    model, ids = small(*words), tokens()
    with torch.no_grad():
        want = model(ids)
        names = inject_lora(model, r=2)
        assert len(names) >= 4 and torch.equal(model(ids), want)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(std=0.1)
        adapted = model(ids)
        assert not torch.allclose(adapted, want, atol=1e-2)
        close(merge_lora(model)(ids), adapted, atol=1e-4)


@pytest.mark.parametrize("words, head_dim", [(words, 0) for words in ALL] + [([], 20)], ids=str)
def test_counts_are_true_in_every_variant(words, head_dim):
    """The parts add up to the parameters, and FLOPs are those that PyTorch counts; also with heads of another width than dim / n_heads."""
    from torch.utils.flop_counter import FlopCounterMode
    model, ids = small(*words, attention="naive", head_dim=head_dim), tokens(1, 32)
    parts = parameter_count(model)
    assert sum(p.numel() for p in model.parameters()) == parts["total"] == sum(v for k, v in parts.items() if k != "total")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert 3 * counter.get_total_flops() == pytest.approx(32 * flops_per_token(model, 32), rel=1e-6)


def test_every_stage_trains_on_a_variant_body(world, tmp_path):
    """Pretraining with experts and QK-norm, SFT that adds the prefix mask, LoRA on it, DPO, a reward model."""
    base, sft = str(tmp_path / "pretrain"), str(tmp_path / "sft")
    train_pretrain.main(train_pretrain.Config(**options("pretrain", world, base, variants=["qk_norm", "moe:n_experts=4"])))
    train_sft.main(train_sft.Config(**options("sft", world, sft, init_from=base, variants=["prefix_lm"])))
    lora = options("sft", world, tmp_path / "lora", init_from=sft, peft="lora", merge_on_save=True)
    train_sft.main(train_sft.Config(**lora))
    train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "dpo", init_from=sft)))
    train_rm.main(train_rm.Config(**options("rm", world, tmp_path / "rm", init_from=sft)))
    for name in ("sft", "lora", "lora/merged", "dpo", "rm"):
        _, _, meta = checkpoint.load(tmp_path / name)
        assert meta["model"]["variants"] == ["qk_norm", "moe:n_experts=4", "prefix_lm"]
    for stage in ("pretrain", "sft"):
        record = next(r for r in metrics(tmp_path / stage) if "train/loss" in r)
        assert sum(record[f"train/expert_{e}"] for e in range(4)) == pytest.approx(1) and record["train/unbalance"] >= 0.9
    assert metrics(tmp_path / "dpo")[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)     # policy = reference, masks and all
    with pytest.raises(UserError, match="no Hugging Face family computes this model's qk_norm moe:n_experts=4 prefix_lm"):
        export.main(export.Config(init_from=sft, out=str(tmp_path / "hf")))


def test_a_variant_with_weights_cannot_be_put_on_a_trained_model(world, tmp_path):
    with pytest.raises(UserError, match="do not fit"):
        checkpoint.load(world / "base", variants=["qk_norm"])


def two_ranks(out):
    """Runs in each of two processes: pretraining with experts, most of which see no token of a tiny batch."""
    world = out.parent / "world"
    changes = dict(variants=["moe:n_experts=8,top_k=1"], batch_size=1, gradient_accumulation_steps=2)
    train_pretrain.main(train_pretrain.Config(**options("pretrain", world, out / "run", **changes)))


def test_experts_without_tokens_do_not_hang_two_processes(tmp_path):
    """Each rank uses other experts, yet both send the same gradients in the same order, and their replicas stay equal."""
    write_world(tmp_path / "world")
    run_ranks("test_variants.two_ranks", tmp_path / "two", timeout=300)
    assert len(weights(tmp_path / "two" / "run")) > 20


# ---- QK-norm and feed-forwards ---------------------------------------------------------------------------------

def test_qk_norm_equals_transformers_qwen3():
    model = small("qk_norm")
    a = model.args
    hf = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=a.ffn_dim, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rms_norm_eps=a.norm_eps, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta})).eval()
    missing, unexpected = hf.load_state_dict(to_hf_state(model.state_dict(), a), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    with torch.no_grad():
        close(model(tokens()), hf(input_ids=tokens()).logits)


def test_qk_norm_makes_scores_blind_to_the_size_of_wq_and_wk():
    """Ten times larger projections: the same attention with the norm, another one without."""
    for words, same in ((["qk_norm"], True), ([], False)):
        model = small(*words)
        with torch.no_grad():
            want = model(tokens())
            for block in model.layers:
                block.attention.wq.weight.mul_(10)
                block.attention.wk.weight.mul_(10)
            assert torch.allclose(model(tokens()), want, atol=1e-3) == same


@pytest.mark.parametrize("name", ["relu", "gelu", "geglu"])
def test_feed_forwards_have_equal_parameters_and_the_papers_formula(name):
    model, plain = small(name, dim=128), small(dim=128)
    assert parameter_count(model) == parameter_count(plain)
    ffn, x = model.layers[0].feed_forward, torch.randn(3, 5, 128)
    w1, w2 = ffn.w1.weight, ffn.w2.weight
    want = {"relu": lambda: torch.clamp(x @ w1.T, min=0) @ w2.T,
            "gelu": lambda: (x @ w1.T * 0.5 * (1 + torch.erf(x @ w1.T / math.sqrt(2)))) @ w2.T,
            "geglu": lambda: (F.gelu(x @ w1.T) * (x @ ffn.w3.weight.T)) @ w2.T}[name]()
    close(ffn(x), want)


def test_another_activation_in_trained_weights_computes_something_else():
    """GeGLU has SwiGLU's very tensors, so they load, and the function is another one: it must be trained anew (note 003)."""
    swiglu, geglu = small(), small("geglu")
    geglu.load_state_dict(swiglu.state_dict())
    with torch.no_grad():
        assert (geglu(tokens()) - swiglu(tokens())).abs().max() > 0.05


# ---- mixture of experts ----------------------------------------------------------------------------------------

def experts(n_experts=4, top_k=2, balance=0.01, hidden_dim=24, seed=0):
    torch.manual_seed(seed)
    return MoE(ModelArgs(**SMALL), n_experts, top_k, balance, hidden_dim)


def test_moe_equals_transformers_mixtral():
    """Output, and the balance loss: theirs sums over the top_k choices, ours takes their share."""
    ours, x = experts(), torch.randn(2, 9, 32)
    hf = MixtralSparseMoeBlock(MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
                                             experts_implementation="eager")).eval()
    with torch.no_grad():
        hf.gate.weight.copy_(ours.gate.weight)
        hf.experts.gate_up_proj.copy_(torch.stack([torch.cat((e.w1.weight, e.w3.weight)) for e in ours.experts]))
        hf.experts.down_proj.copy_(torch.stack([e.w2.weight for e in ours.experts]))
        close(ours(x), hf(x))
        theirs = load_balancing_loss_func((ours.gate(x.flatten(0, 1)),), 4, 2)
    close(2 * ours.unbalance.detach(), theirs)


def test_the_work_per_token_stays_while_the_parameters_grow():
    """4, 8, 16 experts of half the dense width, two a token: only the gate's E * C multiplications are added."""
    dense = small()
    counts = {E: small(f"moe:n_experts={E},top_k=2") for E in (4, 8, 16)}
    for E, model in counts.items():
        gates = 2 * E * 32
        rounding = 3 * 32 * (dense.args.ffn_dim % 2) * 2
        assert parameter_count(model)["feed_forward"] == pytest.approx(E / 2 * (parameter_count(dense)["feed_forward"] - rounding) + gates)
        assert flops_per_token(model, 32) == flops_per_token(dense, 32) + 6 * (gates - rounding)


def test_unbalance_is_one_when_even_and_the_number_of_experts_when_one_takes_all():
    moe, x = experts(top_k=1), torch.rand(1, 400, 32)
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe(torch.randn(1, 400, 32))
        assert moe.unbalance == pytest.approx(1)             # P is even, so whatever f
        moe.gate.weight[2] = 100
        moe(x)
    assert moe.unbalance == pytest.approx(4) and moe.use.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gate_is_learned_from_the_loss_alone(top_k):
    """Not k-means: gradient reaches the gate without the balance loss, and experts without a token get a zero, not nothing."""
    moe = experts(n_experts=6, top_k=top_k)
    moe(torch.randn(1, 2, 32)).square().sum().backward()
    assert moe.gate.weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in moe.parameters())
    assert any(not e.w1.weight.grad.any() for e in moe.experts)


def test_the_balance_loss_is_added_in_training_only():
    """loss + count * balance * (sum over the layers), and the shares of all experts logged."""
    model, ids = small("moe:n_experts=4,balance=0.5"), tokens()
    layers = [block.feed_forward for block in model.layers]
    loss, count, _ = cross_entropy(model(ids), ids)
    assert add_balance(model, loss, count, {}) == (loss, count, {})
    total, _, logged = add_balance(model.train(), loss, count, {})
    close(total, loss + 24 * 0.5 * (layers[0].unbalance + layers[1].unbalance))
    assert sum(logged[f"expert_{e}"] for e in range(4)) == pytest.approx(24)
    assert add_balance(small().train(), loss, count, {}) == (loss, count, {})


def collapse(balance, steps=60):
    """Largest share of one expert after training a top-1 MoE whose gate starts with a leaning to the first."""
    moe, x = experts(n_experts=4, top_k=1, balance=balance), torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(3)) + 0.5
    with torch.no_grad():
        moe.gate.weight[0] += 0.1
    target = torch.roll(x, 1, dims=-1)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = (moe(x) - target).square().mean()
        (loss + balance * moe.unbalance).backward()
        optimizer.step()
        optimizer.zero_grad()
    return moe.use.max().item()


def test_without_the_balance_loss_the_experts_collapse():
    """The rich get richer: the expert that is chosen learns, so it is chosen more. The balance loss turns that round."""
    assert collapse(balance=0.0) > 0.9 and collapse(balance=0.1) < 0.5


def test_only_gates_and_experts_are_tuned():
    """The notes' recipe for a trained MoE."""
    model = small("moe:n_experts=4").train()
    train_only_experts(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss, count, _ = cross_entropy(model(tokens()), tokens(seed=5))
    (loss / count).backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(".feed_forward." in k for k in moved) and "layers.0.feed_forward.gate.weight" in moved


# ---- sliding window and streaming ------------------------------------------------------------------------------

def test_the_window_mask_is_the_drawing_of_the_paper():
    """Window 3, two sinks, 7 tokens; and the sinks of a packed document are its own first tokens."""
    want = ["x......", "xx.....", "xxx....", "xxxx...", "xxxxx..", "xx.xxx.", "xx..xxx"]
    mask = window_mask(3, 2, 7)
    assert ["".join("x" if seen else "." for seen in row) for row in mask.tolist()] == want
    segments = torch.tensor([[0] * 4 + [1] * 7])
    assert torch.equal(window_mask(3, 2, 11, segments=segments, seen=segments)[0, 0, 4:, 4:], mask)


def streaming(model, ids):
    """[logits of each token] read one by one, and the largest number of kept tokens."""
    cache, out, kept = model.cache(model), [], 0
    with torch.no_grad():
        for token in ids:
            out.append(model(torch.tensor([[token]]), cache=cache)[0, -1])
            kept = max(kept, cache.length)
    return torch.stack(out), kept, cache


def test_text_runs_past_the_context_in_constant_memory():
    """500 tokens with 32 positions; the cache never holds more than sinks + window - 1, and the plain model stops."""
    model, plain = small("sliding_window:window=12,sinks=4"), small()
    assert len(list(generate(plain, [1, 2, 3], 500, temperature=0))) == 29
    assert len(list(generate(model, [1, 2, 3], 500, temperature=0))) == 500
    logits, kept, cache = streaming(model, tokens(1, 200)[0].tolist())
    assert kept == 15 and logits.isfinite().all()
    assert {k.size(2) for k, _ in cache.kv.values()} == {15}


def test_streaming_equals_reading_the_kept_tokens_again():
    """In one layer a token's key depends on nothing but itself: the logits after 100 tokens are those of the plain model on
    the sinks and the last tokens, in adjacent positions (StreamingLLM's)."""
    ids = tokens(1, 100)[0]
    for words in (["sliding_window:sinks=3"], ["sliding_window:sinks=3", "rope_scaling:factor=2"]):
        plain = small(*words[1:], n_layers=1)
        got = streaming(small(*words, n_layers=1), ids.tolist())[0]
        for t in (31, 32, 50, 99):
            kept = ids[: t + 1] if t < 32 else torch.cat((ids[:3], ids[t - 28 : t + 1]))
            with torch.no_grad():
                close(got[t], plain(kept[None])[0, -1], atol=1e-4)


def test_rounding_does_not_add_up_over_a_long_stream():
    """Keys are turned once, not a little more with each token: 2,000 tokens later the logits are still the plain model's."""
    ids = tokens(1, 2000)[0]
    got = streaming(small("sliding_window:sinks=2", n_layers=1), ids.tolist())[0]
    with torch.no_grad():
        close(got[-1], small(n_layers=1)(torch.cat((ids[:2], ids[-30:]))[None])[0, -1], atol=1e-4)


def test_chat_streams_with_a_window(world, capsys):
    """The option of chat.py puts the window on a checkpoint that was trained without."""
    model, tok, _ = checkpoint.load(world / "base", variants=["sliding_window"])
    assert len(list(generate(model, [1, 2, 3], 200, temperature=0))) == 200
    chat.main(chat.Config(init_from=[str(world / "base")], prompt=["Anna"], max_new_tokens=100, variants=["sliding_window"], temperature=1.0, device="cpu"))
    assert capsys.readouterr().out.count("Anna") >= 1


# ---- prefix-LM -------------------------------------------------------------------------------------------------

def test_the_prefix_mask_is_bidirectional_in_the_prompt_and_causal_behind_it():
    """Targets are supervised from column 2 on, so tokens 0-2 are the prompt; then a second example in the same row."""
    targets = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 7, IGNORE_INDEX, 7]])
    segments = mark_prefix(small("prefix_lm"), torch.tensor([[1, 1, 1, 1, 2, 2]]), targets)
    assert segments.tolist() == [[-1, -1, -1, 1, -2, -2]]
    rows = ["".join("x" if seen else "." for seen in row) for row in prefix_mask(6, segments=segments, seen=segments)[0, 0].tolist()]
    assert rows == ["xxx...", "xxx...", "xxx...", "xxxx..", "....xx", "....xx"]
    assert mark_prefix(small(), None, targets) is None       # not a prefix-LM: the fast path stays


def test_an_answer_does_not_leak_into_its_own_prediction():
    """Nor a later turn into an earlier one, although the second turn's question is given."""
    model, ids = small("prefix_lm"), tokens(1, 12)
    targets = torch.full((1, 12), IGNORE_INDEX)
    targets[0, 3:6], targets[0, 8:11] = 1, 1                 # prompt 0-3, answer 4-6, question 7-8, answer 9-11
    segments = mark_prefix(model, None, targets)
    with torch.no_grad():
        base = model(ids, segments)
        for t in range(12):
            other = ids.clone()
            other[0, t] = (other[0, t] + 1) % 61
            changed = (model(other, segments) - base)[0].abs().amax(-1) > 1e-6
            assert changed.tolist() == [t <= i or (t <= 3 and i <= 3) for i in range(12)]


def test_generation_reads_the_prompt_as_training_did():
    """The logits of the first new token, and of those after it, are those of the marked training row."""
    model, ids = small("prefix_lm"), tokens(1, 12)
    targets = ids.clone()
    targets[0, :5] = IGNORE_INDEX                            # the prompt is 0-5
    cache = KVCache()
    with torch.no_grad():
        want = model(ids, mark_prefix(model, None, targets))
        got = [model(chunk, cache=cache)[:, -1] for chunk in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1)]
    close(torch.stack(got, 1), want[:, 5:])


# ---- RoPE scaling ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("original", [16, 4096])
def test_scaled_frequencies_equal_transformers(original):
    """linear, yarn and llama3 as they are; ntk is the dynamic formula at the length factor * original (its own factor 1)."""
    def theirs(kind, factor, **more):
        config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=original,
                             rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": factor, **more})
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **({"seq_len": 4 * original} if kind == "dynamic" else {}))

    for kind, (freq, length) in {"linear": theirs("linear", 4.0), "ntk": theirs("dynamic", 1.0),
                                 "yarn": theirs("yarn", 4.0, original_max_position_embeddings=original),
                                 "llama3": theirs("llama3", 4.0, original_max_position_embeddings=original, low_freq_factor=1.0, high_freq_factor=4.0)}.items():
        got, own_length = scaled_frequencies(64, 10000.0, kind, 4.0, original)
        torch.testing.assert_close(got, freq, rtol=1e-5, atol=0)
        assert own_length == pytest.approx(length)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_logits_with_scaled_rope_equal_transformers(kind):
    model = small(f"rope_scaling:kind={kind},factor=4")
    more = {"original_max_position_embeddings": 8} if kind == "yarn" else {}
    hf = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=model.args.ffn_dim, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, max_position_embeddings=32, tie_word_embeddings=True,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more})).eval()
    hf.load_state_dict(to_hf_state(model.state_dict(), model.args), strict=False)
    hf.tie_weights()
    with torch.no_grad():
        close(model(tokens(2, 32)), hf(input_ids=tokens(2, 32)).logits)


def test_what_a_variant_needs_is_said_where_it_is_missing(world, tmp_path, capsys):
    """Plain text has no prompt for a prefix-LM, rows of documents may hold padding, and a trained model has no weights for new parts."""
    train_pretrain.main(train_pretrain.Config(**options("pretrain", world, tmp_path / "run", max_steps=1, variants=["prefix_lm"])))
    said = capsys.readouterr().out
    assert "takes effect in train_sft.py" in said and "| up to " in said
    with pytest.raises(UserError, match="with --variants qk_norm added.*only variants without weights.*Missing key"):
        checkpoint.load(world / "base", variants=["qk_norm"])


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_scaling_stretches_the_context_of_a_trained_model(world, tmp_path, kind):
    """A factor of 1 changes nothing; 64 tokens become 256, no weight is new, training goes on, and what it saves is not
    stretched again when it is loaded."""
    with torch.no_grad():
        close(small(f"rope_scaling:kind={kind},factor=1")(tokens()), small()(tokens()))
    word = f"rope_scaling:kind={kind},factor=4,original=64"
    shape = {k: v for k, v in options("pretrain", world, tmp_path / "long").items() if k not in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len")}
    train_pretrain.main(train_pretrain.Config(**shape, init_from=str(world / "base"), variants=[word]))
    model, _, meta = checkpoint.load(tmp_path / "long")
    assert model.args.max_seq_len == meta["model"]["max_seq_len"] == len(model.rope_cos) == 256
    assert weights(tmp_path / "long").keys() == weights(world / "base").keys()


# ---- GPT-2 -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_the_gpt2_block_equals_transformers_gpt2(attention):
    """Conv1D keeps its matrices transposed, and q, k and v side by side."""
    model = small("gpt2", n_kv_heads=4, attention=attention)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=1e-5)).eval()
    missing, unexpected = hf.load_state_dict(to_hf_state(model.state_dict(), model.args), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    with torch.no_grad():
        close(model(tokens(2, 32)), hf(input_ids=tokens(2, 32)).logits)
    assert parameter_count(model)["total"] == sum(p.numel() for p in hf.parameters())


def test_gpt2_starts_as_gpt2_does():
    """Biases 0, positions N(0, 0.02), residual projections smaller (GPT-2, section 2.3)."""
    torch.manual_seed(0)
    model = build(ModelArgs(dim=128, n_layers=8, n_heads=4, variants=["gpt2"]))
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    assert model.layers[0].positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].feed_forward.w2.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
