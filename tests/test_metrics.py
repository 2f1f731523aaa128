"""ROUGE, BLEU, repetition and error bars, against rouge-score, sacrebleu, by hand, and against what statistics promises."""
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from nanollm import metrics

EN = ["The cat sat on the mat.", "It's 3.5 km - or 1,200 m (say) - to the well-known \"lake\".", "A red kite, a blue kite & two balls!", "yes",
      "Anna has a cat. The cat has a ball. Anna likes the cat very much.", "the the the the", "no punctuation at all here my friend", "«Café» naïve?"]
ZH = ["小明有一只红色的猫。", "今天天气很好，我们去公园玩（下午3点）。", "他说：“你好！”", "猫", "GPT-4是一个大模型，参数有1.8万亿。", "小红喜欢小明的猫，猫也喜欢小红。"]


class Characters:
    """For rouge-score, whose own tokenizer knows no Chinese."""
    tokenize = staticmethod(metrics.words)


def pairs(texts, n, seed=0):
    """(reply, reference): a text against a disturbed copy of itself or of another one."""
    rng = random.Random(seed)
    for _ in range(n):
        reference = rng.choice(texts)
        reply = list(rng.choice([reference, reference, rng.choice(texts)]))
        for _ in range(rng.randrange(6)):
            at = rng.randrange(len(reply)) if reply else 0
            reply[at : at + rng.randrange(4)] = rng.choice(["", " ", "a", reference[-3:-1], ". "])
        yield "".join(reply), reference


@pytest.mark.parametrize("texts, tokenizer", [(EN, None), (ZH, Characters()), (EN + ZH, Characters())], ids=["English", "Chinese", "mixed"])
def test_rouge_equals_rouge_score(texts, tokenizer):
    """ROUGE-1, ROUGE-2 and ROUGE-L on 300 disturbed copies; English with the package's own tokenizer, Chinese by character."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer)
    for reply, reference in pairs(texts, 300):
        want = scorer.score(reference, reply)
        a, b = metrics.words(reply), metrics.words(reference)
        got = {"rouge1": metrics.rouge_n(a, b, 1), "rouge2": metrics.rouge_n(a, b, 2), "rougeL": metrics.rouge_l(a, b)}
        assert got == pytest.approx({name: score.fmeasure for name, score in want.items()}, abs=1e-12), (reply, reference)


@pytest.mark.parametrize("texts, tokenize", [(EN, "13a"), (EN + ZH, "zh")])
def test_bleu_equals_sacrebleu(texts, tokenize):
    """Corpora of 1 to 20 replies, so that there are some without any 4-gram in common, and some without any 4-gram at all."""
    for size in (1, 2, 3, 20):
        for seed in range(25):
            replies, references = zip(*pairs(texts, size, seed))
            parts = np.array([metrics.bleu_parts(*(metrics.signs(text, tokenize == "zh") for text in pair)) for pair in zip(replies, references)]).sum(0)
            want = sacrebleu.corpus_bleu(list(replies), [list(references)], tokenize=tokenize)
            assert [*parts[2:6], *parts[6:]] == [*want.counts, *want.totals], (replies, references)
            assert 100 * float(metrics.bleu(parts)) == pytest.approx(want.score, abs=1e-9)


def test_surfaces_are_what_rouge_and_bleu_see():
    """The lesson: a good paraphrase scores below a wrong near-copy; a copy scores 1 and a text without a common word 0."""
    reference, paraphrase, wrong = "The meeting begins at nine in the morning.", "It starts at 9 a.m.", "The meeting begins at five in the morning."
    for score in (lambda a, b: metrics.rouge_l(metrics.words(a), metrics.words(b)),
                  lambda a, b: float(metrics.bleu(metrics.bleu_parts(metrics.signs(a), metrics.signs(b))))):
        assert score(reference, reference) == pytest.approx(1) and score("Nothing alike", reference) == 0
        assert score(paraphrase, reference) < 0.4 < score(wrong, reference)


def test_a_loop_repeats_itself_and_a_sentence_does_not():
    """seq-rep-4 of a loop nears 1; distinct-n falls when all replies are one; both by hand."""
    sentence, loop = metrics.words("every word of this sentence is another one"), metrics.words("I am a cat. " * 25)
    assert metrics.repetition(sentence) == 0 and metrics.repetition(loop) == 1 - 4 / 97 and metrics.repetition(["too", "short"]) == 0
    assert metrics.distinct([["a", "b", "a"], ["a", "b"]], 1) == 2 / 5 and metrics.distinct([["a", "b", "a"], ["a", "b"]], 2) == 2 / 3
    assert metrics.distinct([sentence] * 10, 2) == 0.1 and metrics.distinct([[]], 1) == 0


def test_bootstrap_is_as_wide_as_theory_says_and_holds_the_truth_as_often():
    """A share: half its width is 1.96 standard errors. Of 100 samples with a known mean, the interval misses it in about 5 %."""
    hits = [i < 300 for i in range(1000)]
    share = metrics.share(hits)
    assert share["accuracy"] == 0.3 and (share["high"] - share["low"]) / 2 == pytest.approx(1.96 * share["stderr"], rel=0.1)
    assert metrics.share(hits) == share and metrics.share([])["n"] == 0
    assert metrics.share([True] * 60)["low"] == 0.95 and metrics.share([False] * 60)["high"] == 0.05          # the rule of three
    assert metrics.mean([1.0] * 3) == {"value": 1, "low": 0, "high": 1} and metrics.mean([0.5] * 30) == {"value": 0.5, "low": 0.45, "high": 0.55}
    rng, missed = np.random.default_rng(1), 0
    for _ in range(100):
        low, high = metrics.bootstrap(np.stack([rng.random(60) < 0.4, np.ones(60)], 1), tries=200)
        missed += not low <= 0.4 <= high
    assert 1 <= missed <= 14


def test_the_interval_of_a_corpus_number_is_around_it():
    """BLEU and bits per byte are no means over rows; summed parts give them an interval all the same."""
    replies, references = zip(*pairs(EN, 80))
    found = metrics.generation(replies, references)
    for name in ("rouge1", "rouge2", "rougeL", "bleu", "repetition"):
        assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1
    assert 0.02 < found["bleu"]["high"] - found["bleu"]["low"] < 0.6


def test_wins_count_a_tie_as_half():
    assert metrics.wins([1, 0, 2, 2], [0, 1, 2, 1]) == [1.0, 0.0, 0.5, 1.0]
