"""Beside transformers.generate, token for token: greedy, penalties, sampling, beam search; random models, end tokens that come early."""
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from bench.rollout import both
from nanollm.beam import beam_search
from nanollm.generate import generate, generate_batch

STOPS, PAD, N = [5, 17, 41], 0, 24
PROMPTS = torch.randint(1, 64, (6, 9), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=[4, 1], ids=["MHA", "GQA"])
def pair(request):
    """(theirs, ours): the same weights, those of the blocks much larger than at the start of training, so that a text is more than its last token again."""
    theirs, ours = both(128, 2, 64, 96, n_kv_heads=request.param)
    with torch.no_grad():
        for p in (*theirs.model.layers.parameters(), *ours.layers.parameters()):
            p.mul_(12) if p.dim() > 1 else None
        for p in (theirs.lm_head.weight, ours.output.weight):
            p.mul_(8)
    return theirs, ours


def reference(theirs, prompts, stops=STOPS, **how):
    """What transformers writes after the prompts (lists of ids, padded on the left), each answer up to its end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=N, pad_token_id=PAD, eos_token_id=stops or None, return_dict_in_generate=True, **how)
    rows = out.sequences[:, width:].tolist()
    ends = [next((i for i, t in enumerate(row) if t in stops), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)], out


PENALTIES = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram": 1}, {"no_repeat_ngram": 3},
             {"repetition_penalty": 1.1, "no_repeat_ngram": 2}]


def their_words(how):
    return {"no_repeat_ngram_size" if k == "no_repeat_ngram" else k: v for k, v in how.items()}


@pytest.mark.parametrize("how", PENALTIES, ids=str)
def test_greedy_and_penalties_equal_transformers_token_for_token(pair, how):
    """As a stream and as a batch, with end tokens and without."""
    theirs, ours = pair
    for stops in (STOPS, []):
        want, _ = reference(theirs, PROMPTS, stops, do_sample=False, **their_words(how))
        assert [list(generate(ours, p, N, stops, temperature=0, **how)) for p in PROMPTS] == want
        assert generate_batch(ours, PROMPTS, N, PAD, stops, temperature=0, **how)[0] == want
        assert stops == [] or len(set(map(len, want))) > 2   # some answers end early, some do not


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_ragged_prompts_equal_transformers_left_padded(pair, penalty):
    theirs, ours = pair
    prompts = [p[: 2 + i] for i, p in enumerate(PROMPTS)]
    want, _ = reference(theirs, prompts, do_sample=False, repetition_penalty=penalty)
    assert generate_batch(ours, prompts, N, PAD, STOPS, temperature=0, repetition_penalty=penalty)[0] == want


@pytest.mark.parametrize("how", [dict(temperature=0.7), dict(top_k=5), dict(top_p=0.8), dict(min_p=0.1),
                                 dict(temperature=1.5, top_k=30, top_p=0.95, min_p=0.02, repetition_penalty=1.2, no_repeat_ngram=3)], ids=str)
def test_the_same_seed_draws_what_transformers_draws(pair, how):
    """So every filter keeps the same tokens with the same probabilities, in the same order of filters."""
    theirs, ours = pair
    for seed in range(3):
        torch.manual_seed(seed)
        want, _ = reference(theirs, PROMPTS, [], do_sample=True, **their_words({"top_k": 0, **how}))
        got, _ = generate_batch(ours, PROMPTS, N, PAD, generator=torch.Generator().manual_seed(seed), **how)
        assert got == want


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_beam_search_equals_transformers(pair, beams, length_penalty):
    """All answers in their order and their scores, where some end early and some at the last token."""
    theirs, ours = pair
    lengths = set()
    for stops in ([STOPS[0]], STOPS, []):
        for how in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram": 2}):
            want, out = reference(theirs, PROMPTS[:3], stops, do_sample=False, num_beams=beams, num_return_sequences=beams,
                                  length_penalty=length_penalty, output_scores=True, **their_words(how))
            got = [answer for p in PROMPTS[:3] for answer in beam_search(ours, p, N, beams, length_penalty, stops, **how)]
            assert [ids for ids, _ in got] == want
            torch.testing.assert_close(torch.tensor([score for _, score in got]), out.sequences_scores, atol=1e-4, rtol=1e-4)
            lengths |= set(map(len, want))
    assert len(lengths) > 2 or length_penalty > 1
