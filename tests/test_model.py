"""The model against transformers' LlamaForCausalLM, its own slow paths, and the numbers of the notes."""
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import nanollm.by_hand
import nanollm.model
from nanollm.hf import to_hf_state
from nanollm.losses import cross_entropy, linear_cross_entropy
from nanollm.model import (FeedForward, KVCache, Linear, ModelArgs, RewardModel, RMSNorm, Transformer, apply_rope, flops_per_token,
                           naive_attention, parameter_count, rope_table, swiglu)

SMALL = dict(dim=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=32)


def build(seed=0, scale=5.0, **changes):
    """A small model in eval mode. Its weights are enlarged: at 0.02 attention is so flat that masks hardly matter."""
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(B=2, T=12, seed=1, vocab=61):
    return torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def llama(model):
    """LlamaForCausalLM with the same weights. Its config is written out here, not taken from the code under test."""
    a = model.args
    hf = LlamaForCausalLM(LlamaConfig(
        vocab_size=a.vocab_size, hidden_size=a.dim, intermediate_size=model.layers[0].feed_forward.w1.out_features,
        num_hidden_layers=a.n_layers, num_attention_heads=a.n_heads, num_key_value_heads=a.n_kv_heads,
        rms_norm_eps=a.norm_eps, max_position_embeddings=a.max_seq_len, tie_word_embeddings=a.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta})).eval()
    missing, unexpected = hf.load_state_dict(to_hf_state(model.state_dict(), a), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if a.tie_embeddings else set())
    hf.tie_weights()
    return hf


# ---- against transformers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_logits_equal_transformers_llama(n_kv_heads, tied, attention):
    """MHA, GQA and one shared head; tied and untied; in one pass and with a cache fed in uneven chunks."""
    model = build(n_kv_heads=n_kv_heads, tie_embeddings=tied, attention=attention, rope_theta=500.0)
    hf, ids = llama(model), tokens()
    with torch.no_grad():
        want = hf(input_ids=ids).logits
        torch.testing.assert_close(model(ids), want, atol=1e-5, rtol=0)
        ours, theirs, got, expected = KVCache(), DynamicCache(config=hf.config), [], []
        for chunk in ids.split([5, 1, 1, 3, 2], dim=1):
            got.append(model(chunk, cache=ours))
            expected.append(hf(input_ids=chunk, past_key_values=theirs).logits)
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=0)
    assert want.std() > 0.5                                # the logits are not all the same small number


def test_gradients_equal_transformers_llama():
    """The same loss pulls the same weights in the same direction, also through the tied matrix."""
    model = build(n_kv_heads=2)
    hf, ids = llama(model), tokens()
    for logits in (model(ids), hf(input_ids=ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours = to_hf_state({n: p.grad for n, p in model.named_parameters()}, model.args)
    theirs = {n: p.grad for n, p in hf.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=name)


# ---- the parts -------------------------------------------------------------------------------------------------

def test_rmsnorm_is_computed_in_fp32_for_half_inputs():
    """300^2 overflows fp16 and 1e-4^2 underflows it; the norm must survive both, and equal its formula."""
    norm = RMSNorm(8, 1e-12)
    for size in (300.0, 1e-4, 1.0):
        x = size * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        want = x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        torch.testing.assert_close(norm(x), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(norm(x.half()).float(), want, atol=3e-3, rtol=3e-3)


class Kept:
    """How many bytes autograd keeps for the backward pass, a storage counted once, parameters left out."""

    def __init__(self, model=None):
        self.bytes, self.seen = 0, {p.untyped_storage().data_ptr() for p in model.parameters()} if model else set()
        self.alive = []

    def keep(self, t):
        if t.untyped_storage().data_ptr() not in self.seen:
            self.seen.add(t.untyped_storage().data_ptr())
            self.alive.append(t)
            self.bytes += t.untyped_storage().nbytes()
        return t

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("part", ["rms_norm", "rope", "swiglu", "linear", "feed_forward"])
def test_derivatives_by_hand_equal_autograds(part, monkeypatch):
    """Each part with its derivative by hand against the plain formula differentiated by PyTorch, on the CPU in fp32; by hand
    keeps no more for the backward pass than the formula does."""
    draw = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    norm, linear, table = RMSNorm(512, 1e-5), Linear(512, 96, bias=False), rope_table(64, 512, 100.0)
    with torch.no_grad():
        norm.weight.add_(draw(512, seed=1))
    x = draw(1, 512, 512, seed=2)
    heads, block = lambda x: x.view(1, 512, 8, 64).transpose(1, 2), FeedForward(ModelArgs(dim=512, n_heads=8))
    run, given = {"rms_norm": (lambda: norm(x), (x, norm.weight)), "rope": (lambda: apply_rope(heads(x), *table), (x,)),
                  "swiglu": (lambda: swiglu(x[..., :256], x[..., 256:]), (x,)), "linear": (lambda: linear(x), (x, linear.weight)),
                  "feed_forward": (lambda: block(x), (x, *block.parameters()))}[part]
    results = []
    for by_hand in (True, False):
        monkeypatch.setattr(nanollm.model, "by_hand", lambda x: by_hand)
        with Kept(block if part == "feed_forward" else linear) as kept:
            y = run()
        assert ("ByHand" in type(y.grad_fn).__name__) == (by_hand and (part != "linear" or bool(nanollm.by_hand.ONEDNN)))
        results.append((y, torch.autograd.grad(y, given, draw(*y.shape, seed=3).detach()), kept.bytes))
    (a, grads_a, kept_a), (b, grads_b, kept_b) = results
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for got, want in zip(grads_a, grads_b):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()
    assert kept_a <= kept_b


def test_rope_depends_only_on_the_distance():
    """<R_m q, R_n k> is a function of m - n, and position 0 is left alone."""
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 50, 16)
    cos, sin = rope_table(16, 50, 10000.0)
    scores = (apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).transpose(-2, -1))[0, 0]       # (50, 50)
    for distance in (-7, 0, 3, 20):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-4, rtol=0)
    assert scores.std() > 0.1
    torch.testing.assert_close(apply_rope(q, cos, sin)[:, :, 0], q[:, :, 0])


def test_naive_attention_is_the_formula_for_one_query():
    """Against a loop in plain Python over one head."""
    q, k, v = torch.randn(3, 1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    out = naive_attention(q, k, v, torch.ones(4, 4, dtype=torch.bool).tril())[0, 0]
    for t in range(4):
        weights = [math.exp(sum(a * b for a, b in zip(q[0, 0, t].tolist(), k[0, 0, s].tolist())) / math.sqrt(8))
                   for s in range(t + 1)]
        want = sum(w / sum(weights) * v[0, 0, s] for s, w in enumerate(weights))
        torch.testing.assert_close(out[t], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("segmented", [False, True])
def test_naive_attention_equals_sdpa_forward_and_backward(n_kv_heads, segmented):
    """The spelled-out formula and the fused kernel are one function, with and without segments."""
    ids = tokens()
    segments = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3, [0] * 3 + [1] * 9]) if segmented else None
    results = []
    for attention in ("naive", "sdpa"):
        model = build(attention=attention, n_kv_heads=n_kv_heads)
        logits = model(ids, segments)
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    (a, grad_a), (b, grad_b) = results
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for name in grad_a:
        torch.testing.assert_close(grad_a[name], grad_b[name], atol=1e-5, rtol=1e-4, msg=name)


# ---- what a token may see --------------------------------------------------------------------------------------

def test_a_token_sees_no_later_token():
    """Changing token 7 leaves the logits before it bit-exact and changes those from it on."""
    model, ids = build(), tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert ((a[:, 7:] - b[:, 7:]).abs().amax(-1) > 1e-3).all()


def test_segments_keep_packed_documents_apart():
    """Packed logits equal those of each document alone; without segments they would not."""
    model, ids = build(n_kv_heads=2), tokens(B=1)
    lengths = [5, 4, 3]
    segments = torch.tensor([sum(([i + 1] * n for i, n in enumerate(lengths)), [])])
    with torch.no_grad():
        alone = torch.cat([model(piece) for piece in ids.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(model(ids, segments), alone, atol=1e-5, rtol=0)
        assert (model(ids) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_attention_by_runs_equals_attention_under_a_mask(attention):
    """On a CPU packed rows are attended segment by segment, without a (T, T) mask: the same logits and gradients, padding and GQA included."""
    model, ids = build(n_kv_heads=2, attention=attention), tokens(B=2)
    segments = torch.tensor([[1] * 5 + [2] * 6 + [3], [0] + [1] * 6 + [2] * 3 + [0] * 2])
    found = []
    for model.by_runs in (True, False):
        model.zero_grad()
        logits = model(ids, segments)[segments > 0]
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nothing_is_computed_for_padding():
    """On a CPU the blocks see the text alone, end to end in one row, also a row longer than the context; padding comes out as 0, and a
    batch of nothing but padding still gives logits that can be differentiated."""
    model, ids, seen = build(max_seq_len=12), tokens(B=3), []
    segments = torch.tensor([[1] * 12, [1] * 2 + [0] * 10, [0] * 5 + [1] * 3 + [2] * 4])
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    logits = model(ids, segments)
    assert seen.pop() == (1, 12 + 2 + 7, model.args.dim) and logits[segments == 0].abs().max() == 0
    torch.testing.assert_close(logits[0], model(ids[:1])[0], atol=1e-5, rtol=0)
    model(ids, 0 * segments).sum().backward()


def test_left_padding_changes_nothing():
    """Rows of 4 and 9 tokens padded on the left, prefilled and continued, equal each row alone; so does dropping
    the finished row from the cache half way (KVCache.keep)."""
    model = build(n_kv_heads=2)
    rows, more = [tokens(1, 4, 3), tokens(1, 9, 4)], tokens(2, 3, 5)
    ids = torch.cat([F.pad(r, (9 - r.size(1), 0), value=60) for r in rows])
    segments = torch.cat([F.pad(torch.ones_like(r), (9 - r.size(1), 0)) for r in rows])
    cache, one = KVCache(), torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        alone = [model(torch.cat((r, more[i:i + 1]), 1))[0] for i, r in enumerate(rows)]
        prefill = model(ids, segments, cache)
        torch.testing.assert_close(prefill[0, 5:], alone[0][:4], atol=1e-5, rtol=0)
        torch.testing.assert_close(prefill[1], alone[1][:9], atol=1e-5, rtol=0)
        both = model(more[:, :1], one, cache)
        torch.testing.assert_close(both[:, 0], torch.stack((alone[0][4], alone[1][9])), atol=1e-5, rtol=0)
        cache.keep(torch.tensor([1]))
        assert cache.segments.shape == (1, 10)
        rest = model(more[1:, 1:], one[:1].expand(1, 2), cache)
    assert cache.length == 12
    torch.testing.assert_close(rest[0], alone[1][10:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [6, 6], [3, 1, 5, 3]])
def test_a_kv_cache_changes_nothing(attention, chunks):
    """Token by token, prefill then steps, or prefill in chunks: the same logits as in one pass."""
    model, ids, cache = build(n_kv_heads=2, attention=attention), tokens(), KVCache()
    assert cache.length == 0
    with torch.no_grad():
        got = torch.cat([model(c, cache=cache) for c in ids.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(got, model(ids), atol=1e-5, rtol=0)
    assert cache.length == 12


def test_more_tokens_than_max_seq_len_are_refused():
    """Also when only the cache makes them too many; RoPE's table ends there."""
    model, cache = build(), KVCache()
    with pytest.raises(ValueError, match="33 tokens do not fit"):
        model(tokens(T=33))
    model(tokens(T=32), cache=cache)
    with pytest.raises(ValueError, match="33 tokens do not fit"):
        model(tokens(T=1), cache=cache)


# ---- numbers of the notes --------------------------------------------------------------------------------------

TREE = """\
Transformer(
  (tok_embeddings): Embedding(64793, 512)
  (dropout): Dropout(p=0.0, inplace=False)
  (layers): ModuleList(
    (0-7): 8 x TransformerBlock(
      (attention): Attention(
        (wq): Linear(in_features=512, out_features=512, bias=False)
        (wk): Linear(in_features=512, out_features=512, bias=False)
        (wv): Linear(in_features=512, out_features=512, bias=False)
        (wo): Linear(in_features=512, out_features=512, bias=False)
        (attn_dropout): Dropout(p=0.0, inplace=False)
        (resid_dropout): Dropout(p=0.0, inplace=False)
      )
      (feed_forward): FeedForward(
        (w1): Linear(in_features=512, out_features=1376, bias=False)
        (w2): Linear(in_features=1376, out_features=512, bias=False)
        (w3): Linear(in_features=512, out_features=1376, bias=False)
        (dropout): Dropout(p=0.0, inplace=False)
      )
      (attention_norm): RMSNorm()
      (ffn_norm): RMSNorm()
    )
  )
  (norm): RMSNorm()
  (output): Linear(in_features=512, out_features=64793, bias=False)
)"""


def on_meta(**args):
    """A model of any size that takes no memory: shapes without numbers."""
    with torch.device("meta"):
        return Transformer(ModelArgs(**args))


def test_the_printed_module_tree_equals_the_notes():
    """Names, order and shapes, line by line."""
    assert str(on_meta(dim=512, n_layers=8, n_heads=8, vocab_size=64793, max_seq_len=512)) == TREE


@pytest.mark.parametrize("millions, args", [
    (91.65, dict(dim=512, n_layers=8, n_heads=8, vocab_size=64793, tie_embeddings=False)),
    (58.48, dict(dim=512, n_layers=8, n_heads=8, vocab_size=64793)),
    (218.16, dict(dim=1024, n_layers=12, n_heads=8, vocab_size=64793)),
    (159.41, dict(dim=512, n_layers=24, n_heads=16, vocab_size=32006, hidden_dim=2752, tie_embeddings=False)),
])
def test_parameter_counts_equal_the_notes(millions, args):
    """In all and by part; a tied matrix is counted once."""
    model = on_meta(**args)
    n, dim, layers = parameter_count(model), args["dim"], args["n_layers"]
    assert round(n["total"] / 1e6, 2) == millions
    assert n["embedding"] == dim * args["vocab_size"]
    assert n["output"] == (0 if model.args.tie_embeddings else dim * args["vocab_size"])
    assert n["attention"] == layers * 4 * dim * dim
    assert n["feed_forward"] == layers * 3 * dim * model.args.ffn_dim
    assert n["norm"] == (2 * layers + 1) * dim
    assert n["total"] == sum(p.numel() for p in model.parameters())


def test_most_of_the_small_model_is_vocabulary():
    """The notes' 91.65 M model spends 72.4 % on its embedding and output matrices."""
    n = parameter_count(on_meta(dim=512, n_layers=8, n_heads=8, vocab_size=64793, tie_embeddings=False))
    assert round(100 * (n["embedding"] + n["output"]) / n["total"], 1) == 72.4


@pytest.mark.parametrize("dim, multiple_of, width", [
    (512, 32, 1376), (512, 256, 1536), (1024, 32, 2752), (4096, 256, 11008)])
def test_ffn_width(dim, multiple_of, width):
    """m * ceil(int(2 * 4 * d / 3) / m); hidden_dim overrides it."""
    assert ModelArgs(dim=dim, multiple_of=multiple_of).ffn_dim == width
    assert ModelArgs(dim=dim, multiple_of=multiple_of, hidden_dim=2752).ffn_dim == 2752


def test_flops_per_token_by_hand():
    """6 per multiplying weight + 12 * layers * dim * T. The embedding multiplies only where it is also the output."""
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 96)
    for model, output in [(on_meta(**SMALL), 61 * 32), (on_meta(**SMALL, tie_embeddings=False), 61 * 32),
                          (RewardModel(ModelArgs(**SMALL)), 32)]:
        assert flops_per_token(model, 16) == 6 * (weights + output) + 12 * 2 * 32 * 16


@pytest.mark.parametrize("wrong, match", [
    (dict(dim=30), "an even number"), (dict(n_kv_heads=3), "not divisible by n_kv_heads"),
    (dict(dim=12), "an even number"), (dict(attention="flash"), "'sdpa' or 'naive'"), (dict(n_layers=0), "n_layers must be at least 1"), (dict(norm_eps=0.0), "norm_eps must be above 0"), (dict(n_heads=0), "n_heads must be at least 1"),
])
def test_impossible_shapes_are_refused(wrong, match):
    """In one sentence that names the numbers."""
    with pytest.raises(ValueError, match=match):
        ModelArgs(**{**SMALL, **wrong})


# ---- initialisation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_init_std_by_role(tied):
    """0.02 everywhere, 0.02 / sqrt(2 * n_layers) where a matrix writes into the residual stream: wo and w2, not w3."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=256, n_layers=8, n_heads=4, vocab_size=1000, tie_embeddings=tied))
    for name, p in model.named_parameters():
        role = name.split(".")[-2]
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(0.005 if role in ("wo", "w2") else 0.02, rel=0.02), name
            assert abs(p.mean().item()) < 4 * p.std().item() / math.sqrt(p.numel()), name


@pytest.mark.parametrize("vocab", [512, 6400])
def test_the_first_loss_is_ln_v(vocab):
    """An untrained model knows nothing: every token is equally likely, to within 5 %."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=64, n_layers=4, n_heads=4, vocab_size=vocab)).eval()
    ids = tokens(4, 65, vocab=vocab)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(vocab), rel=0.05)


def test_tied_means_one_matrix():
    """Sharing is real: one parameter, one gradient, and it survives load_state_dict."""
    model = build()
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())
    other = build(seed=9)
    other.load_state_dict(model.state_dict())
    assert other.output.weight is other.tok_embeddings.weight
    assert torch.equal(other(tokens()), model(tokens()))
    assert build(tie_embeddings=False).output.weight is not build(tie_embeddings=False).tok_embeddings.weight


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_dropout_acts_only_in_training(attention):
    """In eval the model is a function; in train each of the four dropouts makes it random."""
    model, ids = build(dropout=0.5, attention=attention), tokens()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), build(attention=attention)(ids))
    block = model.layers[0]
    for where in (model.dropout, block.feed_forward.dropout, block.attention.resid_dropout, block.attention):
        model.eval()
        where.training = True                          # Attention itself decides about the dropout of its weights
        assert not torch.equal(model(ids), model(ids)), where


# ---- heads and activation checkpointing ------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_a_head_computes_the_loss_inside_forward(tied):
    """The chunked loss as head: the plain loss, and the same gradient for every weight, the tied matrix included."""
    ids = tokens(T=13)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    results = []
    for chunked in (True, False):
        model = build(tie_embeddings=tied)
        if chunked:
            loss, _, _ = model(inputs, head=lambda h, output: linear_cross_entropy(h, output.weight, targets, 5))
        else:
            loss, _, _ = cross_entropy(model(inputs), targets)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (a, grad_a), (b, grad_b) = results
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    for name in grad_b:
        assert (grad_a[name] - grad_b[name]).abs().max() <= 2e-6 * grad_b[name].abs().max(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(dropout):
    """Bit for bit, dropout included: the second forward pass draws the masks of the first. And it keeps less."""
    ids, results = tokens(), []
    for on in (False, True):
        model = build(dropout=dropout).train()
        model.checkpointing = on
        torch.manual_seed(3)
        with Kept(model) as kept:
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        torch.rand(1)                                        # the random state has moved on when the backward pass begins
        loss.backward()
        results.append(({n: p.grad for n, p in model.named_parameters()}, kept.bytes))
    (plain, all_kept), (again, few_kept) = results
    assert all(torch.equal(plain[n], again[n]) for n in plain) and few_kept < all_kept / 2


def test_activation_checkpointing_leaves_generation_alone():
    """With a cache nothing is computed twice: it would be extended twice."""
    model, ids, cache = build(), tokens(), KVCache()
    want = model(ids)
    model.checkpointing = True
    assert torch.equal(torch.cat([model(c, cache=cache) for c in ids.split(12, dim=1)], 1), want) and cache.length == 12
    reward = RewardModel(ModelArgs(**SMALL))
    reward.checkpointing = True
    assert reward.backbone.checkpointing


# ---- reward model ----------------------------------------------------------------------------------------------

def test_the_reward_model_gives_one_number_a_position():
    """(B, T) -> (B, T) in fp32, causal, with the backbone's own hidden states and without an output matrix."""
    torch.manual_seed(0)
    model, ids = RewardModel(ModelArgs(**SMALL)).eval(), tokens()
    assert sorted(n for n, _ in model.named_parameters() if "output" in n or "v_head" in n) == ["v_head.weight"]
    with torch.no_grad():
        reward = model(ids)
        assert reward.shape == ids.shape and reward.dtype == torch.float32
        torch.testing.assert_close(model(ids[:, :5]), reward[:, :5], atol=1e-5, rtol=0)
        torch.testing.assert_close(reward, (model.backbone.hidden(ids) @ model.v_head.weight.T)[..., 0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(ids).dtype == torch.float32
    plain = Transformer(ModelArgs(**SMALL))
    model.backbone.load_state_dict(plain.state_dict())                     # starts from any language model
    assert torch.equal(model.backbone.hidden(ids), plain.eval().hidden(ids))


def test_under_the_cpus_autocast_attention_stays_in_fp32(monkeypatch):
    """PyTorch's bf16 kernel for the CPU takes several times as long backward as the fp32 one; products of matrices gain from bf16."""
    seen, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **kw: seen.append({q.dtype, k.dtype, v.dtype}) or kernel(q, k, v, **kw))
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=60, max_seq_len=16))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.arange(12)[None])
    assert seen == [{torch.float32}] and logits.dtype == torch.bfloat16
