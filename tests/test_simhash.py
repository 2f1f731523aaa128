"""SimHash: the fingerprint of the notes with the step they leave out, the search in four blocks, and what it can be used for."""
import random
import subprocess
import sys
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from datasketch import MinHash

from nanollm.corpus import dedup, ngrams, simhash
from nanollm.corpus.dedup import DedupConfig

RNG = random.Random(5)
VOCABULARY = ["".join(RNG.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(RNG.randint(3, 8))) for _ in range(2000)]
HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 800)]


def page(rng, paragraphs=10, words=50):
    """A document as a list of paragraphs, each a list of words."""
    return [[rng.choice(VOCABULARY) for _ in range(words)] for _ in range(paragraphs)]


def text_of(paragraphs):
    return "\n".join(" ".join(words) + "." for words in paragraphs)


def mixed_texts(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choice(HAN) for _ in range(rng.choice([0, 1, 2, 3, 90]))) + " " * (i % 3) + text_of(page(rng, 1, i % 40))
            for i in range(count)]


def removed(pairs, count):
    """Keep first, greedily: a document goes if a kept one before it is its partner."""
    partners, gone = {}, set()
    for i, j in pairs:
        partners.setdefault(int(j), []).append(int(i))
    for j in range(count):
        if any(i not in gone for i in partners.get(j, ())):
            gone.add(j)
    return gone


def edges_within(prints, k=3, near=dedup.simhash_edges):
    """The edges that deduplication finds, each once: int64 (M, 2), sorted."""
    edges = dedup.distinct(np.concatenate([np.zeros(0, np.uint64), *near(np.asarray(prints, dtype=np.uint64), k)]))
    pairs = np.stack(dedup.unpack(edges), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def unverified(prints, k):
    """All pairs that agree in one table, however far apart."""
    return (edges for mask in simhash.tables(k) for edges in dedup.edges_of_band(prints & mask))


def clustered(count, seed=0, flips=12):
    """Random fingerprints, two thirds of them an earlier one with 0 to `flips` - 1 bits flipped."""
    rng = np.random.default_rng(seed)
    prints = rng.integers(0, 2**64, count, dtype=np.uint64)
    for i in range(1, count):
        if rng.random() < 2 / 3:
            prints[i] = prints[rng.integers(i)]
            for bit in rng.choice(64, rng.integers(flips), replace=False):
                prints[i] ^= np.uint64(1) << np.uint64(bit)
    return prints


# ---- the fingerprint -------------------------------------------------------------------------------------------------

def test_the_step_missing_in_the_notes_accumulates_plus_and_minus_the_weight():
    """E21. Features 0b1100 (weight 3), 0b1010 (weight 1), 0b0110 (weight 1): the sums by position, highest first, are
    +3+1-1 = 3, +3-1+1 = 3, -3+1+1 = -1, -3-1-1 = -5; their signs make 0b1100. Without the -w every position would be
    positive but the last: 0b1110."""
    features, weights = np.array([0b1100, 0b1010, 0b0110], dtype=np.uint64), np.array([3, 1, 1])
    assert simhash.signs(features, weights, np.array([3])).tolist() == [0b1100]


def test_a_sum_of_zero_gives_the_bit_0():
    """As the notes say: 1 only if the value is positive."""
    assert simhash.signs(np.array([0b01, 0b10], dtype=np.uint64), 1, np.array([2])).tolist() == [0]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_vectorised_fingerprint_is_that_of_the_loop(weighted):
    """Feature by feature and bit by bit, as one would write it down; weight 1 an occurrence, or idf."""
    texts = mixed_texts(40)
    frequency = ngrams.document_frequency(texts, 3, bits=16)
    idf = np.rint(16 * ngrams.idf(frequency, len(texts))).astype(int)
    want = []
    for text in texts:
        sums = [0] * 64
        for feature in map(int, ngrams.shingles([text], 3)[0]):
            weight = int(idf[feature >> 48]) if weighted else 1
            sums = [s + weight if feature >> bit & 1 else s - weight for bit, s in enumerate(sums)]
        want.append(sum(1 << bit for bit, s in enumerate(sums) if s > 0))
    found = simhash.fingerprints(texts, frequency=frequency, documents=len(texts)) if weighted else simhash.fingerprints(texts)
    assert found.tolist() == want


@pytest.mark.parametrize("size", [1, 7, 1024])
def test_fingerprints_do_not_depend_on_the_batch(size):
    texts = mixed_texts(100)
    parts = [simhash.fingerprints(texts[i:i + size]) for i in range(0, len(texts), size)]
    assert np.array_equal(np.concatenate(parts), simhash.fingerprints(texts))


def test_builtin_hash_differs_between_processes_and_our_fingerprint_does_not():
    """E20: the notes' `hash(feature) & ((1 << f) - 1)` is salted, so a fingerprint stored today is worthless tomorrow."""
    code = ("from nanollm.corpus import simhash\n"
            "print(hash('我喜欢健身') & (2**64 - 1), int(simhash.fingerprints(['我喜欢健身，也喜欢普洱茶'])[0]))")
    lines = [subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": ""},
                            capture_output=True, text=True, check=True).stdout.split() for seed in ("1", "2")]
    assert lines[0][0] != lines[1][0] and lines[0][1] == lines[1][1]


def test_idf_weights_let_the_content_speak_louder_than_the_boilerplate():
    """Pages that share a footer, half of each: with weight 1 they are near each other, with tf-idf they are not."""
    rng = random.Random(3)
    footer = text_of(page(rng, 1, 100))
    texts = [text_of(page(rng, 1, 100)) + "\n" + footer for _ in range(20)]
    frequency = ngrams.document_frequency(texts, 3)
    apart = {}
    for name, prints in (("tf", simhash.fingerprints(texts)), ("tf-idf", simhash.fingerprints(texts, 3, frequency, len(texts)))):
        apart[name] = np.mean([simhash.hamming(prints[i:i + 1], prints[j:j + 1])[0] for i, j in combinations(range(20), 2)])
    assert apart["tf"] < 24 < 29 < apart["tf-idf"]        # 32 is what unrelated documents have


# ---- the search ------------------------------------------------------------------------------------------------------

def test_hamming_counts_differing_bits():
    a, b = np.random.default_rng(0).integers(0, 2**64, (2, 1000), dtype=np.uint64)
    assert simhash.hamming(a, b).tolist() == [int(x ^ y).bit_count() for x, y in zip(a.tolist(), b.tolist())]


@pytest.mark.parametrize("k", range(11))
def test_blocks_part_the_64_bits(k):
    """k + 1 of them, disjoint, together all, sizes within one: 16 bits four times for k = 3."""
    masks = [int(m) for m in simhash.blocks(k)]
    sizes = [m.bit_count() for m in masks]
    assert sum(masks) == 2**64 - 1 and sum(sizes) == 64 and max(sizes) - min(sizes) <= 1 and len(masks) == k + 1


def test_three_flipped_bits_always_leave_one_of_four_blocks_intact():
    """Q42, the pigeonhole, for every one of the 41,664 triples of bits; four flips can touch all four."""
    masks = simhash.blocks(3)
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    triples = np.array(list(combinations(range(64), 3)))
    flipped = bits[triples].sum(axis=1, dtype=np.uint64)
    assert len(flipped) == 41_664 and np.logical_or.reduce([(flipped & m) == 0 for m in masks]).all()
    assert all(bits[[0, 16, 32, 48]].sum(dtype=np.uint64) & m for m in masks)
    tables = simhash.tables(3)
    assert len(tables) == 16 and {int(t).bit_count() for t in tables} == {28}
    assert np.logical_or.reduce([(flipped & t) == 0 for t in tables]).all()


@pytest.mark.parametrize("k", [0, 1, 2, 3, 6, 10])
def test_edges_are_exactly_the_pairs_of_brute_force(k):
    prints = clustered(300)
    want = [(i, j) for i, j in combinations(range(300), 2) if int(prints[i] ^ prints[j]).bit_count() <= k]
    assert len(want) > 10 and edges_within(prints, k).tolist() == [list(pair) for pair in want]


def test_every_pair_at_distance_three_is_found_whatever_bits_differ():
    """41,664 random fingerprints, each with a partner in which another one of all triples of bits is flipped."""
    triples = np.array(list(combinations(range(64), 3)))
    flips = (np.uint64(1) << triples.astype(np.uint64)).sum(axis=1, dtype=np.uint64)
    prints = np.random.default_rng(1).integers(0, 2**64, len(flips), dtype=np.uint64)
    edges = edges_within(np.concatenate([prints, prints ^ flips]), 3)
    assert edges.tolist() == [[i, i + len(flips)] for i in range(len(flips))]


def test_a_template_is_no_square():
    """20,000 pages with one fingerprint: each is paired with the first and its neighbour, not with all 200 million pairs, and
    a page three bits off finds the first, too."""
    prints = np.full(20_000, 0x0123456789ABCDEF, dtype=np.uint64)
    prints[-1] ^= np.uint64(1 | 1 << 20 | 1 << 63)
    assert sum(len(edges) for edges in dedup.simhash_edges(prints, 3)) <= 16 * 2 * 20_000
    edges = edges_within(prints)
    assert len(edges) <= 2 * 20_000 and set(edges[edges[:, 0] == 0, 1].tolist()) == set(range(1, 20_000))


def test_texts_without_letters_and_digits_have_no_fingerprint_and_no_partner():
    """They would all collide at 0: rows of signs and emoji go only if equal."""
    texts = ["😀" * 30, "🚀" * 30 + "=", "+" * 40, "😀" * 30]
    assert not simhash.fingerprints(texts).any()
    table = dedup.sketch(pa.table({"text": texts}), DedupConfig(sketch="simhash"))
    assert table["units"].to_pylist() == [0] * 4
    assert dedup.deduplicate_texts(texts, DedupConfig(sketch="simhash")) == [None, None, None, (0, "exact", 1.0)]


def test_few_or_no_documents_have_no_edges():
    for prints in ([], [5]):
        assert edges_within(np.array(prints, dtype=np.uint64)).shape == (0, 2)


# ---- what follows for deduplication ----------------------------------------------------------------------------------

def test_verification_changes_what_is_removed():
    """Candidates only share a block. Documents removed by them, by Hamming distance and by true Jaccard are three
    different sets: else the verification would be computed and not used."""
    rng = random.Random(2)
    base = text_of(page(rng))
    laughs = ["哈" * 400 + "".join(rng.choice(HAN) for _ in range(12)) for _ in range(2)]       # one feature outweighs all
    texts = [base, base + " again", *laughs] + [text_of(page(rng, 2)) for _ in range(1500)]
    prints = simhash.fingerprints(texts)
    prints[-1] = prints[-2] ^ np.uint64(0x0000000FFFFFFFFF)                    # one equal table of 16, and 36 other bits
    candidates = edges_within(prints, near=unverified)
    edges = edges_within(prints)
    sets = [set(ngrams.shingles([text], 3)[0].tolist()) for text in texts]
    true = [(i, j) for i, j in edges.tolist() if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.7]
    by_block, by_hamming, by_jaccard = (removed(pairs, len(texts)) for pairs in (candidates, edges, true))
    assert by_jaccard == {1} and by_hamming == {1, 3} and by_block > by_hamming and len(texts) - 1 in by_block


def test_a_larger_threshold_never_removes_less_but_a_larger_distance_is_less_similar():
    """E22, Q43: the notes say "the larger the Hamming distance, the higher the share removed". That holds for the
    threshold k (documents near any earlier one, kept or not), and the other way round for the distance itself."""
    prints = clustered(600, seed=4)
    gone = [len(np.unique(edges_within(prints, k)[:, 1])) for k in range(11)]
    assert gone == sorted(gone) and gone[0] < gone[3] < gone[10]
    rng = random.Random(8)
    base = page(rng)
    distances = []
    for share in (0.01, 0.05, 0.2, 0.8):
        edited = [text_of([[rng.choice(VOCABULARY) if rng.random() < share else w for w in p] for p in base]) for _ in range(10)]
        distances.append(simhash.hamming(simhash.fingerprints([text_of(base)]), simhash.fingerprints(edited)).mean())
    assert distances == sorted(distances) and distances[0] < 8 < 24 < distances[-1]


def test_keeping_first_greedily_a_larger_threshold_can_remove_less():
    """Why the claim above needs "kept or not". A centre has three leaves, 2 bits from it and 4 from each other: at k = 2 it
    removes all three. At k = 3 the centre itself goes, for an earlier document 3 bits away, and the leaves, 5 bits from
    that one, stay."""
    earlier, centre = 0b0, 0b111
    prints = np.array([earlier, centre, *(centre | 0b11 << place for place in (3, 5, 7))], dtype=np.uint64)
    assert removed(edges_within(prints, 2), 5) == {2, 3, 4}
    assert removed(edges_within(prints, 3), 5) == {1}


def test_minhash_and_simhash_find_different_edits():
    """Q44, E24: shares of 60 pages of 500 words that are found again, by MinHash (128 permutations, estimate >= 0.7) and
    by SimHash with k = 3 and k = 10. "MinHash is better" compares thresholds, not methods: at k = 3 SimHash is far
    stricter, at k = 10 it finds a shuffle as surely; neither finds a page of which half is new."""
    rng = random.Random(7)

    def insert_one_word(doc):
        doc = [list(p) for p in doc]
        doc[rng.randrange(10)].insert(rng.randrange(50), rng.choice(VOCABULARY))
        return doc

    edits = {"insert": insert_one_word, "shuffle": lambda doc: rng.sample(doc, len(doc)),
             "replace half": lambda doc: doc[:5] + page(rng, 5)}
    docs = [page(rng) for _ in range(60)]

    def minhashes(texts):
        for text in texts:
            sketch = MinHash(num_perm=128)
            sketch.update_batch([int(h).to_bytes(8, "little") for h in ngrams.shingles([text], 3)[0]])
            yield sketch

    table = {}
    originals = [text_of(doc) for doc in docs]
    for name, edit in edits.items():
        copies = [text_of(edit(doc)) for doc in docs]
        distance = simhash.hamming(simhash.fingerprints(originals), simhash.fingerprints(copies))
        estimates = np.array([a.jaccard(b) for a, b in zip(minhashes(originals), minhashes(copies))])
        table[name] = [(estimates >= 0.7).mean(), (distance <= 3).mean(), (distance <= 10).mean()]
    assert table["insert"][0] == 1 and 0.5 < table["insert"][1] < 1 and table["insert"][2] == 1
    assert table["shuffle"][0] == 1 and table["shuffle"][1] < 0.5 and table["shuffle"][2] > 0.9
    assert table["replace half"] == [0, 0, 0]
