"""Hashes of n-grams over a batch: equal to what a slow loop over each text says, wherever the text stands in the batch."""
import random

import numpy as np
import pytest

from nanollm.corpus import ngrams

MIXED = ["", "今天9:30去ＰＡＲＫ看Ｃafé，好吗？", "x" * 40, "。。。", "The cat's hat, 3.14 — 第12章《红楼梦》", "がんばれ KABUTO カブト", "a", "中"]


def slow_units(text):
    """What a unit is, one character after the other."""
    found, before = [], 0
    for at, char in enumerate(text):
        code = int(ngrams.folding()[ord(char)])
        kind, folded = code >> 24 << 24, chr(code & 0xFFFFFF)
        if kind and kind == before and kind != ngrams.HAN:
            found[-1] = (found[-1][0] + folded, found[-1][1], at + 1)
        elif kind:
            found.append((folded, at, at + 1))
        before = kind
    return found


def slow_hash(numbers):
    """sum_j x[j] B^j mod 2^64 in Python's own integers, mixed."""
    return int(ngrams.mix64(np.array([sum(x * pow(ngrams.GAMMA, j, 2**64) for j, x in enumerate(numbers)) % 2**64], dtype=np.uint64))[0])


def random_texts(count, seed=0):
    rng, pool = random.Random(seed), "abcXYZ012 ,.\n，。的一是不了人我在有他这中大来上国“”éＡ１"
    return ["".join(rng.choice(pool) for _ in range(rng.choice([0, 1, 2, 5, 40, 300]))) for _ in range(count)]


def test_uniform_draws_are_uniform_and_two_purposes_are_independent():
    """Means and the correlation of 100,000 draws, each within 5 standard deviations; negative seeds are seeds too."""
    a, b = (ngrams.draws(-3, np.arange(100_000), purpose) for purpose in ("thin", "quality"))
    assert 0 <= a.min() and a.max() < 1
    assert abs(a.mean() - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5 and abs(np.corrcoef(a, b)[0, 1]) < 5 / 1e5**0.5


@pytest.mark.parametrize("text, want", [
    ("Hello, World!", ["hello", "world"]),
    ("深度学习2024年", ["深", "度", "学", "习", "2024", "年"]),
    ("DNA双螺旋 ＤＮＡ", ["dna", "双", "螺", "旋", "dna"]),
    ("Café CAFÉ", ["cafe", "cafe"]),
    ("3.14", ["3", "14"]),
    ("“……”！ \n\u3000", []),
])
def test_a_unit_is_a_han_character_a_word_or_a_number(text, want):
    """Case, width and accents are folded; blanks and punctuation part units and are none."""
    assert [unit for unit, _, _ in slow_units(text)] == want
    batch = ngrams.units([text])
    assert batch.hashes.tolist() == [slow_hash([int(ngrams.folding()[ord(c)]) for c in unit]) for unit in want]


def test_the_units_of_a_batch_are_those_of_its_texts():
    """Hashes and places in the text, by the loop over characters; a unit never runs on into the next document."""
    texts = MIXED + random_texts(200)
    batch = ngrams.units(texts)
    for number, text in enumerate(texts):
        own = slice(batch.offsets[number], batch.offsets[number + 1])
        assert list(zip(batch.starts[own].tolist(), batch.ends[own].tolist())) == [(s, e) for _, s, e in slow_units(text)]
        assert batch.hashes[own].tolist() == ngrams.units([text]).hashes.tolist()


def test_the_rolling_hash_is_the_polynomial_of_the_slice_alone():
    """(P[e] - P[s]) B^-s against the sum written out."""
    x = np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64)
    starts, ends = np.array([0, 0, 7, 299, 120]), np.array([0, 300, 20, 300, 180])
    assert ngrams.Slices(x).hash(starts, ends).tolist() == [slow_hash(map(int, x[s:e])) for s, e in zip(starts, ends)]


def test_shingles_are_the_windows_of_each_text_and_a_short_text_is_one():
    """Counts by arithmetic; equal windows in two documents get equal hashes."""
    texts = ["一二三四五", "一二三", "一二", "", "a b c"]
    hashes, counts = ngrams.shingles(texts, 3)
    assert counts.tolist() == [3, 1, 1, 0, 1]
    assert hashes[0] == hashes[3] and len(set(hashes.tolist())) == 5


@pytest.mark.parametrize("limit", [1, 50, 10**9])
def test_chunks_cover_all_documents_once(limit):
    texts = MIXED + random_texts(50)
    cut = list(ngrams.chunks(texts, limit))
    assert [n for first, end in cut for n in range(first, end)] == list(range(len(texts)))


def test_document_frequencies_of_two_halves_add_up_and_count_documents_not_occurrences():
    texts = random_texts(60) + ["重复的话重复的话重复的话"]
    whole = ngrams.document_frequency(texts, 2, bits=12)
    assert np.array_equal(whole, ngrams.document_frequency(texts[:23], 2, bits=12) + ngrams.document_frequency(texts[23:], 2, bits=12))
    own = {tuple(w[0] for w in slow_units(texts[-1])[i:i + 2]) for i in range(11)}
    assert ngrams.document_frequency(texts[-1:], 2, bits=20).sum() == len(own)
