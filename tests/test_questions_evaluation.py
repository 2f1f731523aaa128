"""Small claims of the notes on the optimiser, evaluation, curricula and the rest that no other test shows: each in a second."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import SHAPE, stories, tiny_lm, tiny_tokenizer
from nanollm import choices, world
from nanollm.corpus import lm
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import get_lr, make_optimizer


# ---- the learning rate ---------------------------------------------------------------------------------------------------

def noisy_valley(rate, steps=3000, seed=0, falls=False):
    """Adam on the mean of x² / 2 over 50 numbers, each gradient with noise of its own size -> the losses of the last 500 updates."""
    torch.manual_seed(seed)
    x, losses = torch.nn.Parameter(torch.full((50,), 3.0)), []
    optimizer = torch.optim.Adam([x], rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = get_lr(step + 1, rate, rate / 100, 0, steps, "cosine" if falls else "constant")
        x.grad = x.detach() + torch.randn(50)
        optimizer.step()
        losses.append(x.detach().square().mean().item() / 2)
    return torch.tensor(losses[-500:])


def test_adam_trembles_at_a_height_that_the_rate_sets():
    """A tenth of the rate leaves about a tenth of the loss and of its trembling; Adam does not come down by itself, a falling rate does."""
    high, low, falling = noisy_valley(0.1), noisy_valley(0.01), noisy_valley(0.1, falls=True)
    assert 5 < high.mean() / low.mean() < 20 and high.std() > 5 * low.std()
    assert falling[-50:].mean() < high.mean() / 10


def test_at_rate_zero_adam_remembers_and_nothing_moves():
    """The optimizer says where, the schedule how far: both moments fill, no weight changes."""
    model = tiny_lm()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, learning_rate=0.0)
    model(torch.arange(12)[None]).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(s["exp_avg_sq"].abs().max() > 0 for s in optimizer.state.values())


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_after_the_warmup_no_schedule_ever_rises(schedule):
    rates = [get_lr(it, 3e-4, 3e-5, 50, 900, schedule) for it in range(1001)]
    assert all(a < b for a, b in zip(rates[:50], rates[1:51])) and all(a >= b for a, b in zip(rates[50:], rates[51:]))
    assert min(rates[50:]) >= 3e-5


def test_a_rate_acts_when_it_is_written_into_the_groups():
    """Decoupled decay alone, zero gradients: each matrix shrinks by 1 - lr * decay with the rate that was written last."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.AdamW([weight], lr=123.0, weight_decay=0.5)
    for rate, left in ((0.2, 0.9), (0.02, 0.9 * 0.99)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        weight.grad = torch.zeros(4, 4)
        optimizer.step()
        assert weight.detach().mean().item() == pytest.approx(left)


# ---- what a loss tells ---------------------------------------------------------------------------------------------------

def mean_loss(model, texts):
    """Nats a character of many texts under a character model."""
    sizes = np.array([len(text) + 1 for text in texts])
    return float((np.log(lm.perplexity(model, texts, leave_out=False)) * sizes).sum() / sizes.sum())


def test_later_tokens_are_cheaper_than_early_ones():
    """The notes say the opposite. Windows of 48 tokens of stories in random order: at the first token the model knows nothing of the
    text, at the last a whole story."""
    tok, rng, all_stories = tiny_tokenizer(), np.random.default_rng(0), stories(144)
    ids = torch.tensor([t for i in rng.integers(144, size=600) for t in [*tok.encode(all_stories[i]), tok.eos_id]])
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SHAPE, vocab_size=tok.vocab_size))
    optimizer = make_optimizer(model, learning_rate=2e-2)
    windows = lambda n: ids[torch.randint(len(ids) - 48, (n, 1)) + torch.arange(49)]
    for _ in range(60):
        batch = windows(16)
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = windows(300)
    with torch.no_grad():
        losses = F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none").mean(0)                     # (48,), by position
    assert losses[:8].mean() > losses[-8:].mean() + 0.2 and losses[0] == losses.max()


def test_two_predictors_of_equal_loss_differ_in_accuracy():
    """0.6 * 0.6 = 0.9 * 0.4: the same perplexity on two yes-no questions, two right answers here and one there."""
    steady, bold = torch.tensor([0.6, 0.6]), torch.tensor([0.9, 0.4])                                            # p of the right answer
    losses = [F.nll_loss(torch.stack([1 - p, p], 1).log(), torch.tensor([1, 1])) for p in (steady, bold)]
    torch.testing.assert_close(*losses)
    assert [(p > 0.5).sum().item() for p in (steady, bold)] == [2, 1]


def test_accuracy_jumps_where_the_margin_moves_smoothly(tok):
    """From one set of weights to another in 40 steps: the margin of log p moves a little in each, the answer changes at once."""
    a, b, way = tiny_lm(0, max_seq_len=96), tiny_lm(3, max_seq_len=96), tiny_lm(max_seq_len=96)
    question = {"question": "Which one?", "options": ["one", "two", "six", "ten"], "answer": 0, "subject": "s", "suite": "mmlu"}
    margins, hits = [], []
    for t in torch.linspace(0, 1, 41):
        way.load_state_dict({k: torch.lerp(v, b.state_dict()[k], t) for k, v in a.state_dict().items()})
        questions = [question | {"answer": right} for right in range(4)]
        found = choices.multiple_choice(way, tok, questions)
        scores = found["scores"][0]
        margins.append([scores[i] - max(scores[:i] + scores[i + 1 :]) for i in range(4)])
        hits.append([row["acc"] for row in found["rows"]])
    moves, flips = np.abs(np.diff(margins, axis=0)), np.abs(np.diff(np.array(hits, float), axis=0))
    assert flips.max() == 1 and moves.max() < 0.25 * np.ptp(margins, axis=0).max()
    assert all(np.array(margins)[i, k] * np.array(margins)[i + 1, k] <= 0 for i, k in zip(*flips.nonzero()))      # only where a margin crosses 0


def test_another_prompt_changes_the_accuracy_of_the_same_model(tok):
    """Forty questions, one model, three ways to ask: no two give the same answers, and the accuracy is not the same either."""
    model, rng = tiny_lm(2, max_seq_len=256), np.random.default_rng(0)
    words = ["red", "blue", "green", "a cat", "the sun", "seven", "nothing", "Anna", "a small kite", "yes"]
    questions = [{"question": f"Question {i}?", "options": list(rng.permutation(words)[:4]), "answer": int(rng.integers(4)), "subject": "s", "suite": "mmlu"}
                 for i in range(40)]
    asked = [choices.multiple_choice(model, tok, questions, score=score, chat=chat) for score, chat in (("letter", False), ("text", False), ("text", True))]
    picks = [[row["pick"] for row in found["rows"]] for found in asked]
    assert picks[0] != picks[1] != picks[2] and len({found["acc"] for found in asked}) > 1


def test_more_templates_in_the_data_lower_the_mean_loss_and_raise_that_of_prose():
    """One budget of characters: half of it spent on log lines. The mean over the mixture falls, that over prose rises: a mean tells
    nothing without its mixture."""
    docs = world.documents(10**6)
    prose = [next(docs).text for _ in range(500)]
    logs = [f"2024-01-{i % 28 + 1:02d} INFO worker {i % 9} finished step {i} without errors and went on to the next one" for i in range(4000)]
    size = lambda texts: sum(map(len, texts))
    budget = size(prose[:400])

    def cut(texts, chars):
        taken = []
        for text in texts:
            if size(taken) >= chars:
                return taken
            taken.append(text)
        return taken
    plain, mixed = cut(prose[:400], budget), cut(prose[:400], budget / 2) + cut(logs[:2000], budget / 2)
    one, two = (lm.count(texts, bits=18) for texts in (plain, mixed))
    test_prose, test_logs = prose[400:], cut(logs[2000:], size(prose[400:]))
    assert mean_loss(two, test_prose + test_logs) < mean_loss(one, test_prose) < mean_loss(two, test_prose)


# ---- curricula -----------------------------------------------------------------------------------------------------------

def test_a_tenth_of_the_good_beats_a_random_tenth_and_the_likeliest_tenth_does_not():
    """Half of a corpus has scrambled letters. A character model reads a tenth of it: drawn from the half that a small clean sample finds
    likelier, drawn at random, or the very likeliest texts, which all say the same. Nothing beats all of the good half."""
    docs, rng = world.documents(10**6), np.random.default_rng(0)
    clean = [doc.text for doc in (next(docs) for _ in range(1300)) if doc.kind.endswith("en")]
    test, judge, clean = clean[:60], lm.count(clean[60:100], bits=18), clean[100:500]
    noisy = ["".join(c if rng.random() > 0.4 else chr(97 + rng.integers(26)) for c in text) for text in clean[:200]]
    everything = noisy + clean[200:]
    likely = np.argsort(lm.perplexity(judge, everything, leave_out=False))
    assert set(likely[:200]) == set(range(200, 400))                        # the judge tells the halves apart
    chosen, random, likeliest = rng.permutation(likely[:200])[:40], rng.permutation(400)[:40], likely[:40]
    loss = lambda texts: mean_loss(lm.count(texts, bits=18), test)
    of = lambda rows: loss([everything[i] for i in rows])
    assert loss(clean[200:]) < of(chosen) < of(random) < of(likeliest)


def test_a_difficulty_of_ten_values_ties_with_a_tenth_and_orders_nine_pairs_in_ten():
    """The depth of a parse tree is a small whole number. With ten equally frequent values a sample ties with a tenth of the corpus, and the
    other nine tenths are ordered; a real number ties with none but itself."""
    rng = np.random.default_rng(0)
    depth, rarity = rng.integers(3, 13, 1000), rng.random(1000)
    ties = lambda x: np.mean([np.mean(x == v) for v in x])
    assert 0.08 < ties(depth) < 0.12 and np.mean(depth[:, None] != depth) > 0.88 and ties(rarity) == pytest.approx(1 / 1000)


def test_difficulty_by_parts_of_speech_is_the_number_of_different_ones():
    """len(set(tags)), with a dictionary in place of a tagger: the longer sentence need not be the harder one."""
    tag = dict(the="DET", a="DET", cat="NOUN", mat="NOUN", dog="NOUN", sat="VERB", saw="VERB", on="ADP", quickly="ADV", red="ADJ", it="PRON")
    diversity = lambda text: len({tag[word] for word in text.split()})
    assert diversity("the cat saw the dog the dog saw the cat") == 3 < diversity("it quickly sat on a red mat") == 7


# ---- texts and ids ---------------------------------------------------------------------------------------------------------

def test_ids_do_not_always_come_back_from_their_text(tok):
    """Single bytes are a valid spelling, too: they decode to the text, whose own encoding is another, shorter one."""
    text = "Anna has a red cat."
    singles = [next(i for i in range(tok.vocab_size) if tok.token_bytes(i) == bytes([b])) for b in text.encode("utf-8")]
    assert tok.decode(singles) == text == tok.decode(tok.encode(text)) and len(tok.encode(text)) < len(singles)


def test_without_a_control_token_bpe_merges_across_the_seam(tok):
    """Some word of the corpus, cut in two: its halves, encoded apart and joined, are other ids than the whole."""
    words = ["Anna", "David", "number", "yellow", "likes", "much"]
    assert any(tok.encode(word[:k]) + tok.encode(word[k:]) != tok.encode(word) for word in words for k in range(1, len(word)))
