"""Sampling: the cache, the batch and every option against the slow and obvious way."""
import pytest
import torch

from conftest import tiny_lm
from nanollm.generate import generate, generate_batch, sample
from nanollm.model import ModelArgs, Transformer

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
