"""Sampling and beam search: the cache, the batch and every option against the slow and obvious way."""
import copy
import gc
import itertools
import random
from functools import partial

import pytest
import torch

from conftest import SHAPE, tiny_lm
from nanollm import peft
from nanollm.beam import beam_search
from nanollm.decode import KEPT, Decoder, RoomyCache, decoder
from nanollm.generate import Step, StopStrings, generate, generate_batch, sample, show_step, steps
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import make_optimizer
from nanollm.variants import build

PROMPT = [5, 9, 2, 31, 7]
PROMPTS = [[5, 9, 2], [11], [7, 7, 40, 3, 1, 8, 22], [60, 61]]


@pytest.fixture(scope="module")
def model():
    return tiny_lm(seed=3)


@torch.no_grad()
def slow_greedy(model, ids, n, stop_ids=()):
    """No cache, no batch: the whole text through the model for each token."""
    ids, out = list(ids), []
    for _ in range(n):
        token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token in stop_ids:
            break
        ids.append(token)
        out.append(token)
    return out


def test_greedy_with_the_cache_equals_without(model):
    assert list(generate(model, PROMPT, 30, temperature=0)) == slow_greedy(model, PROMPT, 30)


def test_batched_equals_single(model):
    """Prompts of four lengths, padded on the left, each as if it were alone."""
    answers, stopped = generate_batch(model, PROMPTS, 20, pad_id=63, temperature=0)
    assert answers == [slow_greedy(model, p, 20) for p in PROMPTS] and not any(stopped)


def test_a_batch_of_equal_lengths_equals_single(model):
    """The unpadded fast path."""
    prompts = [[5, 9, 2], [11, 4, 4]]
    assert generate_batch(model, prompts, 9, pad_id=63, temperature=0)[0] == [slow_greedy(model, p, 9) for p in prompts]


def test_rows_that_stop_leave_and_the_others_go_on(model):
    """A stop id found in some answers: it is not returned, its row says stopped, the other rows are unchanged."""
    full = [slow_greedy(model, p, 20) for p in PROMPTS]
    stop = next(t for t in full[0][2:] if 0 < sum(t in f for f in full) < 4)
    answers, stopped = generate_batch(model, PROMPTS, 20, pad_id=63, temperature=0, stop_ids=(stop, 1000))
    assert answers == [f[: f.index(stop)] if stop in f else f for f in full]
    assert stopped == [stop in f for f in full]
    assert list(generate(model, PROMPTS[0], 20, temperature=0, stop_ids=(stop,))) == full[0][: full[0].index(stop)]


def test_context_limit_ends_the_text_without_a_crash(model):
    """64 positions: an endless request ends, a too long prompt keeps its tail, and the last token is still right."""
    room = model.args.max_seq_len
    assert len(list(generate(model, PROMPT, 10_000, temperature=0))) == room - len(PROMPT)
    long = [i % 60 for i in range(200)]
    assert list(generate(model, long, 5, temperature=0)) == slow_greedy(model, long[-(room - 1):], 1)
    answers, stopped = generate_batch(model, [long, [3]], 5, pad_id=63, temperature=0)
    assert answers[0] == slow_greedy(model, long[-(room - 1):], 1) and not any(stopped)


def test_zero_new_tokens_is_an_empty_answer(model):
    assert list(generate(model, PROMPT, 0)) == [] and generate_batch(model, PROMPTS, 0, pad_id=63)[0] == [[]] * 4


def test_the_same_seed_gives_the_same_text(model):
    def draw(seed):
        return list(generate(model, PROMPT, 25, generator=torch.Generator().manual_seed(seed)))
    assert draw(1) == draw(1) != draw(2)
    batch = [generate_batch(model, PROMPTS, 9, pad_id=63, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert batch[0] == batch[1]


def frequencies(logits, n=4000, **kw):
    rows = torch.tensor(logits).expand(n, -1)
    drawn = sample(rows, generator=torch.Generator().manual_seed(0), **kw)
    return torch.bincount(drawn, minlength=len(logits)) / n


def test_temperature_zero_is_greedy_and_one_is_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().tolist()
    assert frequencies(logits, temperature=0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(frequencies(logits), probs, atol=0.03, rtol=0)
    sharp = (probs ** 2) / (probs ** 2).sum()
    torch.testing.assert_close(frequencies(logits, temperature=0.5), sharp, atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest_and_may_exceed_the_vocabulary():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert (frequencies(logits, top_k=2) > 0).tolist() == [True, True, False, False]
    assert frequencies(logits, top_k=99).tolist() == frequencies(logits, top_k=0).tolist()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    """In any order of the vocabulary; p near 0 keeps exactly one token."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().tolist()
    assert (frequencies(logits, top_p=0.7) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, top_p=0.9) > 0).tolist() == [False, True, True, True]
    for p in (0.0, 1e-6, 0.5 - 1e-4):
        assert frequencies(logits, top_p=p).tolist() == [0, 1, 0, 0]


def test_repetition_penalty_lowers_seen_tokens_only():
    """Positive logits are divided, negative multiplied: both become less likely, the unseen stay."""
    logits = torch.tensor([[2.0, 1.5, -1.0, -0.5], [2.0, 1.5, -1.0, -0.5]])
    assert sample(logits, temperature=0, repetition_penalty=2.0, seen=[[0, 0], [3]]).tolist() == [1, 0]
    kept = logits.clone()
    sample(logits, repetition_penalty=2.0, seen=[[0], [2]], generator=torch.Generator())
    assert torch.equal(logits, kept)                                       # the caller's logits are not touched
    low = [[0.5, -0.6]]
    assert sample(torch.tensor(low), temperature=0, repetition_penalty=1.5, seen=[[1]]).tolist() == [0]
    assert sample(torch.tensor([[-0.5, -0.6]]), temperature=0, repetition_penalty=1.5, seen=[[0]]).tolist() == [1]


def test_a_strong_repetition_penalty_prevents_loops(model):
    text = list(generate(model, PROMPT, 40, temperature=0, repetition_penalty=1e6))
    assert len(set(text)) == len(text) and not set(text) & set(PROMPT)


def test_sampling_options_reach_the_batch(model):
    """top_k = 1 is greedy, whatever the temperature."""
    assert generate_batch(model, PROMPTS, 8, pad_id=63, temperature=5.0, top_k=1)[0] == [slow_greedy(model, p, 8) for p in PROMPTS]


def test_a_long_prompt_does_not_shorten_the_answers_beside_it():
    """A batch is as wide as its widest prompt; one near the context's end must not take the room of the short ones."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=64, max_seq_len=32)).eval()
    short, long = [1, 2, 3], list(range(1, 30))
    together, _ = generate_batch(model, [short, long], 16, pad_id=0, temperature=0)
    alone, _ = generate_batch(model, [short], 16, pad_id=0, temperature=0)
    assert together[0] == alone[0] and len(together[0]) == 16 and len(together[1]) == 3


def test_min_p_keeps_what_is_not_much_less_likely_than_the_likeliest():
    """min_p 0.3 of a likeliest 0.5: all from 0.15 on. In a flat distribution the same number keeps everything."""
    logits = torch.tensor([0.05, 0.5, 0.16, 0.29]).log().tolist()
    assert (frequencies(logits, min_p=0.3) > 0).tolist() == [False, True, True, True]
    assert frequencies(logits, min_p=1.0).tolist() == frequencies(logits, min_p=2.0).tolist() == [0, 1, 0, 0]
    assert (frequencies([0.0] * 4, min_p=0.3) > 0).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_n_tokens_come_twice(model, n):
    """Greedy repeats itself; forbidden to, it does not, prompt and all, alone and in a batch."""
    def repeats(ids):
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        return len(set(grams)) < len(grams)
    prompts = [list(dict.fromkeys(p)) for p in PROMPTS]      # that do not repeat themselves
    free = [p + list(generate(model, p, 40, temperature=0)) for p in prompts]
    kept = [p + list(generate(model, p, 40, temperature=0, no_repeat_ngram=n)) for p in prompts]
    assert all(map(repeats, free)) and not any(map(repeats, kept))
    assert [p + a for p, a in zip(prompts, generate_batch(model, prompts, 40, 63, temperature=0, no_repeat_ngram=n)[0])] == kept


# ---- a step, seen from inside ------------------------------------------------------------------------------------


def test_a_step_tells_the_models_own_probabilities(model):
    """At temperature 1 and before any filter, whatever was asked of the sampling; the likeliest first."""
    text = list(PROMPT)
    for step in steps(model, PROMPT, 12, top=3, temperature=0.5, top_k=2, repetition_penalty=1.5, generator=torch.Generator().manual_seed(0)):
        with torch.no_grad():
            probs = model(torch.tensor([text]))[0, -1].softmax(-1)
        assert step.logprob == pytest.approx(probs[step.token].log().item(), abs=1e-4)
        assert [token for token, _ in step.top] == probs.topk(3).indices.tolist()
        assert [p for _, p in step.top] == pytest.approx(probs.topk(3).values.tolist(), abs=1e-4)
        text.append(step.token)
    assert len(text) == len(PROMPT) + 12 and next(steps(model, PROMPT, 1)).top == []


def test_a_step_is_shown_beside_what_it_might_have_been():
    """An arrow at the token taken, at the end if it was none of the likeliest."""
    decode = lambda ids: "".join("ab\ncd"[i] for i in ids)
    lines = show_step(Step(1, -1.2, [(0, 0.5), (1, 0.301), (2, 0.1)]), decode, width=10).split("\n")
    assert lines == ["    50.0% #####      'a'", "->  30.1% ###        'b'", "    10.0% #          '\\n'"]
    assert show_step(Step(4, -4.0, [(0, 0.9)]), decode, width=10).split("\n")[1] == "->   1.8%            'd'"


def test_a_stream_that_is_left_early_leaves_nothing_behind(model):
    """A reader that walks away, as a browser does: gradients are on again, and the next text is the same as ever."""
    stream = steps(model, PROMPT, 30, temperature=0)
    first = [next(stream).token for _ in range(3)]
    assert torch.is_grad_enabled()                           # also between two tokens
    stream.close()
    assert torch.is_grad_enabled() and first == slow_greedy(model, PROMPT, 3)
    assert list(generate(model, PROMPT, 5, temperature=0)) == slow_greedy(model, PROMPT, 5)


# ---- stop strings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops,text,shown", [
    (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"), (["END", "ENOUGH"], "the ENd, ENO, ENOUGH!", "the ENd, ENO, "), (["user:"], "I am a user", "I am a user"),
    (["abcX", "bc"], "abcX", "a"), (["bc", "abc"], "zabc", "z"), (["aab"], "aaaab", "aa"), (["。好"], "你好。好", "你好"), ([], "all of it", "all of it"),
    (["", "x"], "yx", "y")])
def test_stop_strings_end_a_text_however_it_comes_in_pieces(stops, text, shown):
    """Nothing of a stop string is ever shown, all before it is; the one that is complete first decides."""
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(6)))
        stop, out = StopStrings(stops), ""
        for a, b in itertools.pairwise([0, *cuts, len(text)]):
            out += stop.feed(text[a:b])
            assert shown.startswith(out)
        assert out + stop.flush() == shown and stop.done == (shown != text)


def test_only_what_may_begin_a_stop_string_is_held_back():
    """A stream should not stutter: each character is shown as soon as it cannot belong to a stop string."""
    stop = StopStrings(["<|end|>"])
    assert [stop.feed(c) for c in "a<b<|enx"] == ["a", "", "<b", "", "", "", "", "<|enx"] and stop.flush() == ""


# ---- the cache ---------------------------------------------------------------------------------------------------


def test_the_cache_is_allocated_once_and_holds_key_value_heads_only(model, monkeypatch):
    """2 layers * 2 * 2 of the 4 heads * 8 numbers a place; 20 steps later the same memory, and no key was copied for a query head."""
    caches, init = [], RoomyCache.__init__
    monkeypatch.setattr(RoomyCache, "__init__", lambda self, room: (init(self, room), caches.append(self))[0])
    stream = steps(model, PROMPT, 20, temperature=0)
    next(stream)
    at = [buffer.data_ptr() for pair in caches[0].kv.values() for buffer in pair]
    assert sum(buffer.nbytes for pair in caches[0].kv.values() for buffer in pair) == 2 * 2 * 2 * 8 * (len(PROMPT) + 20) * 4
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", None)
    assert len(list(stream)) == 19 and [buffer.data_ptr() for pair in caches[0].kv.values() for buffer in pair] == at


# ---- one token in few calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [dict(n_kv_heads=4), dict(n_kv_heads=1, tie_embeddings=False),
                                   dict(n_kv_heads=2, dim=512, multiple_of=512, vocab_size=600)], ids=str)
@pytest.mark.parametrize("rows, threads", [(1, 1), (1, 2), (1, 3), (3, 2), (0, 2)])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_decoder_equals_the_model(shape, rows, threads, ragged, request):
    """Three tokens after a prompt, small and large matrices, as they are, in oneDNN's blocks and in a part for each thread, where so many
    parts are possible and where not, with pads on the left and without: model.py's logits and keys."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    model = tiny_lm(**{"multiple_of": 16, **shape})
    ids = torch.randint(0, 320, (3, 12), generator=torch.Generator().manual_seed(0))[-rows:]
    segments = (torch.arange(9) >= torch.tensor([[0], [4], [7]])).long()[-rows:] if ragged else None
    one, caches, logits = torch.ones(len(ids), 1, dtype=torch.long) if ragged else None, [], []
    with torch.no_grad():
        for read in (Decoder(model, rows), lambda *a: model(*a, head=lambda h, output: output(h[:, -1]))):
            caches.append(RoomyCache(12))
            model(ids[:, :9], segments, caches[-1])
            logits.append([read(ids[:, t : t + 1], one, caches[-1]) for t in (9, 10, 11)])
    torch.testing.assert_close(torch.stack(logits[0]), torch.stack(logits[1]), atol=1e-4, rtol=1e-4)
    for layer, buffers in caches[0].kv.items():
        torch.testing.assert_close(buffers, caches[1].kv[layer], atol=1e-4, rtol=1e-4)
    assert Decoder.suits(model) and caches[0].length == 12 and (not ragged or torch.equal(caches[0].segments, caches[1].segments))


def test_what_is_not_the_plain_model_goes_through_the_model(model):
    """Adapters, variants, hooks, half precision, dropout at work: the Decoder knows none of them, so it must leave them alone. Other
    positions alone are only another table."""
    longer = build(ModelArgs(**SHAPE, vocab_size=64, variants=["rope_scaling:kind=yarn,factor=4"])).eval()
    assert Decoder.suits(model) and Decoder.suits(longer) and list(generate(longer, PROMPT, 20, temperature=0)) == slow_greedy(longer, PROMPT, 20)
    adapted, hooked = tiny_lm(), tiny_lm()
    peft.inject_lora(adapted, r=4)
    torch.nn.init.normal_(adapted.layers[0].attention.wo.lora_B)
    hooked.layers[0].feed_forward.register_forward_hook(lambda m, args, out: out * 0)
    biased = tiny_lm()
    biased.layers[0].attention.wq.bias = torch.nn.Parameter(torch.ones(32))
    variant = build(ModelArgs(**SHAPE, vocab_size=64, variants=["qk_norm"])).eval()
    for other in (adapted, hooked, biased, variant, tiny_lm().train(), tiny_lm().bfloat16(), tiny_lm(attention="naive")):
        assert not Decoder.suits(other)
    for other in (adapted, hooked, biased):
        assert list(generate(other, PROMPT, 20, temperature=0)) == slow_greedy(other, PROMPT, 20)


# ---- beam search -------------------------------------------------------------------------------------------------


def test_a_kept_copy_of_the_weights_is_left_when_they_change(model):
    """For one text at a time the blocks that decoding reads are made once and kept. An update in place, by our optimizer, through .data, through one
    flat tensor of which the weights are views (ZeRO), of nothing but signs or order, of the positions' table, and the model's end all make an end of them."""
    model = copy.deepcopy(model)
    kept = decoder(model, 1)
    assert decoder(model, 1) is kept and decoder(model, 2) is not decoder(model, 2)
    with torch.no_grad():
        model.tok_embeddings.weight.add_(torch.randn(model.tok_embeddings.weight.shape, generator=torch.Generator().manual_seed(1)))
    assert decoder(model, 1) is not kept and list(generate(model, PROMPT, 12, temperature=0)) == slow_greedy(model, PROMPT, 12)
    optimizer = make_optimizer(model.train(), learning_rate=0.1)                # fused: it raises no version counter
    model(torch.tensor([PROMPT])).logsumexp(-1).sum().backward()
    optimizer.step()
    model.eval().zero_grad()
    assert list(generate(model, PROMPT, 12, temperature=0)) == slow_greedy(model, PROMPT, 12)
    weight = model.layers[0].feed_forward.w1.weight
    weight.data.mul_(-3)
    assert list(generate(model, PROMPT, 12, temperature=0)) == slow_greedy(model, PROMPT, 12)
    flat = torch.cat((weight.detach().flatten(), torch.zeros(1)))
    weight.data = flat[:-1].view_as(weight)
    list(generate(model, PROMPT, 12, temperature=0))
    flat.mul_(-3)
    assert list(generate(model, PROMPT, 12, temperature=0)) == slow_greedy(model, PROMPT, 12)
    for change in (flat.neg_, model.rope_sin.neg_, lambda: weight.data.copy_(weight.flip(0))):      # no norm changes, in the last no sum
        kept = decoder(model, 1)
        change()
        assert decoder(model, 1) is not kept and list(generate(model, PROMPT, 12, temperature=0)) == slow_greedy(model, PROMPT, 12)
    known, other = len(KEPT), copy.deepcopy(model)
    other.layers[0].feed_forward.w1.weight.data = weight.detach().clone()
    decoder(other, 1)
    assert len(KEPT) == known + 1
    del other
    gc.collect()
    assert len(KEPT) == known


def test_beam_search_wide_enough_finds_the_likeliest_answer():
    """3 tokens of a vocabulary of 8, all 512 texts compared; greedy, one beam, misses it in some prompts."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=8, max_seq_len=16)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() > 1 else None
        texts, greedy_misses = torch.cartesian_prod(*[torch.arange(8)] * 3), 0                # (512, 3)
        for prompt in ([1], [2, 3], [7, 7], [4, 0, 6]):
            ids = torch.cat((torch.tensor(prompt).expand(512, -1), texts), 1)
            logps = model(ids[:, :-1]).log_softmax(-1)[:, len(prompt) - 1 :]
            total = logps.gather(2, texts[..., None]).sum((1, 2))                             # (512,)
            (best, score), *rest = beam_search(model, prompt, 3, 64, length_penalty=0.0)
            assert best == texts[total.argmax()].tolist() and score == pytest.approx(total.max().item(), abs=1e-4)
            assert [s for _, s in rest] == sorted((s for _, s in rest), reverse=True) and len(rest) == 63
            greedy_misses += beam_search(model, prompt, 3, 1)[0][0] != best
    assert greedy_misses


def test_one_beam_is_greedy_and_the_context_ends_the_search(model):
    room = model.args.max_seq_len
    for prompt in PROMPTS:
        assert beam_search(model, prompt, 15, 1)[0][0] == slow_greedy(model, prompt, 15)
    assert all(len(ids) == room - len(PROMPT) for ids, _ in beam_search(model, PROMPT, 10_000, 2))


def test_a_length_penalty_chooses_short_or_long_answers(model):
    """Every token costs probability: 0 ends early, a high one late."""
    stops = range(0, 320, 8)
    mean = lambda penalty: sum(len(beam_search(model, p, 30, 4, penalty, stops)[0][0]) for p in PROMPTS)
    assert mean(-2.0) <= mean(0.0) < mean(5.0)
