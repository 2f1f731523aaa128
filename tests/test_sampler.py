"""The order of the rows is a function of the seed and the sample's number: shuffles, mixtures, phases and curricula can be
entered anywhere, and ranks and micro-batches do not change what an update reads."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanollm.config import UserError
from nanollm.dist import Context
from nanollm.mixture import BLOCK, ByLength, Curriculum, Mixture, competence, quotas, read_phases, sources_of
from nanollm.sampler import GAMMA, Sampler, permute, shuffled, splitmix64, uniform


def ctx(rank=0, world_size=1):
    return Context(rank, rank, world_size, torch.device("cpu"), rank == 0)


def update(sampler, step):
    """[the rows of each micro-batch] of an update on this rank."""
    return [rows.tolist() for rows in sampler.micro_batches(step)]


# ---- which rows, in which order ------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 65537])
def test_permute_is_a_bijection(n):
    for key in (0, 1, 7_000_021):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_depends_on_the_key_and_not_on_the_question():
    """Another key is another order; asking for one place gives what asking for all gives; nothing stays in line."""
    a, b = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (a == b).mean() < 0.02 and (a == np.arange(1000)).mean() < 0.02
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1
    assert [permute(np.array([i]), 1000, 1)[0] for i in (0, 500, 999)] == a[[0, 500, 999]].tolist()


def test_permute_of_a_billion_rows_needs_no_memory():
    places = permute(np.arange(1000), 3_000_000_000, 5)
    assert len(set(places.tolist())) == 1000 and places.max() < 3_000_000_000 and places.max() > 2_000_000_000


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_very_micro_batches_of_one_process(world_size):
    """Disjoint over ranks, and together exactly what one process reads, update by update, over three epochs."""
    one = Sampler(29, ctx(), 3, 4, seed=5)
    many = [Sampler(29, ctx(r, world_size), 3, 4, seed=5) for r in range(world_size)]
    for step in range(8):
        parts = [update(s, step) for s in many]
        assert {len(p) for p in parts} == {4 // world_size}                  # equal numbers of micro-batches: nobody waits in vain
        assert sorted(sum(parts, [])) == sorted(update(one, step))


def test_an_epoch_reads_each_row_once_and_the_next_in_another_order():
    sampler = Sampler(20, ctx(), 5, 2, seed=0)
    first, second = (sum(update(sampler, 2 * e) + update(sampler, 2 * e + 1), []) for e in range(2))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert first != sum(update(Sampler(20, ctx(), 5, 2, seed=1), 0) + update(Sampler(20, ctx(), 5, 2, seed=1), 1), [])


def test_an_update_across_two_epochs_takes_the_rest_and_goes_on():
    sampler = Sampler(7, ctx(), 5, 1, seed=3)
    stream = sum((update(sampler, i)[0] for i in range(7)), [])
    assert all(sorted(stream[7 * e : 7 * e + 7]) == list(range(7)) for e in range(5))


def test_resuming_is_a_seek():
    """A new sampler asked for step 1,000,000 gives what one that ran there gives: there is no state."""
    ran = Sampler(31, ctx(), 2, 2, seed=4)
    for step in range(50):
        want = update(ran, step)
        assert update(Sampler(31, ctx(), 2, 2, seed=4), step) == want
    update(Sampler(31, ctx(), 2, 2, seed=4), 1_000_000)


def test_epochs_end_with_a_smaller_update():
    """Two epochs of 11 rows, 8 an update: 8, 8, 6, and each row twice; ranks then have unequal, even empty micro-batches."""
    sampler = Sampler(11, ctx(), 2, 4, seed=0, epochs=2.0)
    assert sampler.steps(999) == 3
    read = [sum(update(sampler, i), []) for i in range(3)]
    assert [len(r) for r in read] == [8, 8, 6] and sorted(sum(read, [])) == sorted([*range(11)] * 2)
    assert [len(r) for r in update(Sampler(11, ctx(1, 2), 2, 4, seed=0, epochs=2.0), 2)] == [2, 0]


def test_a_fraction_of_an_epoch_is_at_least_one_row():
    """Not zero rows, which would mean endless."""
    sampler = Sampler(10, ctx(), 2, 1, seed=0, epochs=0.01)
    assert sampler.steps(999) == 1 and len(sum(update(sampler, 0), [])) == 1


@pytest.mark.parametrize("batch, G, ranks, says", [
    (2, 3, 2, "divisible by the 2 ranks; the nearest values are 2 and 4"), (2, 1, 4, "smallest value is 4"),
    (0, 1, 1, "at least 1"), (1, 0, 1, "at least 1")])
def test_an_impossible_batch_is_refused_with_the_nearest_possible(batch, G, ranks, says):
    with pytest.raises(UserError, match=says):
        Sampler(10, ctx(0, ranks), batch, G, 0)


def test_the_order_of_a_single_data_set_never_changes():
    """The rows that runs of earlier versions have read: with another order their checkpoints could not be resumed."""
    assert [update(Sampler(1000, ctx(), 4, 2, seed=3), step) for step in (0, 124, 125, 1_000_000)] == [
        [[155, 99, 788, 278], [447, 237, 825, 935]], [[104, 394, 620, 716], [640, 455, 740, 84]],
        [[792, 398, 714, 630], [2, 686, 587, 716]], [[868, 966, 542, 586], [480, 215, 768, 567]]]
    assert [update(Sampler(7, ctx(), 2, 2, seed=0, epochs=2.0), step) for step in range(4)] == [
        [[4, 5], [6, 3]], [[0, 1], [2, 4]], [[1, 0], [2, 3]], [[5, 6], []]]


def test_numbers_are_those_of_the_published_generator():
    """SplitMix64 seeded with 0 begins with these three, and seeded with 1234567 with these five, as the reference in C prints
    them; place 2 is known without the ones before it; seeds do not overlap, not even when one is a place of the other."""
    assert splitmix64(0, [0, 1, 2]).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(1234567, np.arange(5)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(GAMMA, 0) == splitmix64(0, 1) and uniform(GAMMA, 0) != uniform(0, 1)
    assert splitmix64(0, 2)[0] == 0x06C45D188009454F
    assert len({int(x) for seed in range(50) for x in splitmix64(seed, np.arange(100))}) == 5000


def test_a_uniform_number_never_reaches_one():
    """64 random bits divided by 2^64 do, by rounding: the row behind the last would be read. 53 bits cannot."""
    largest = np.array([2**64 - 1], np.uint64)
    assert largest[0] / 2.0**64 == 1.0 and (largest >> np.uint64(11))[0] * 2.0**-53 < 1.0
    u = uniform(5, np.arange(100_000))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(np.histogram(u, 10)[0] - 10_000).max() < 500


# ---- mixtures ------------------------------------------------------------------------------------------------------

def mixture(sizes=(5000, 900, 300), mix=(("web:0.7", "wiki:0.2", "code:0.1")), total=30_000, seed=3, phases=None):
    return Mixture(list(sizes), phases or read_phases(list(mix), ""), total, seed)


def owner(m, rows):
    """The source of each row number."""
    return np.searchsorted(np.cumsum(m.sizes), rows, side="right")


TWO_PHASES = [(0.9, {"web": 0.8, "wiki": 0.2}), (1.0, {"books": 0.5, "web": 0.3, "wiki": 0.2})]


def test_quotas_are_the_largest_remainders():
    """Whole parts first, then one more for the largest fractions; never off by a whole sample."""
    assert quotas([0.8, 0.2], 4096).tolist() == [3277, 819]                  # 3276.8 and 819.2
    assert quotas([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert quotas([0.3, 0.7], 10).tolist() == [3, 7]                         # although 0.3 * 10 is not exactly 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=8), st.integers(1, 5000))
def test_quotas_add_up_and_stay_within_one_of_the_share(weights, n):
    counts, shares = quotas(weights, n), np.array(weights) / sum(weights) * n
    assert counts.sum() == n and (np.abs(counts - shares) < 1).all() and (counts >= 0).all()


def test_every_block_has_exactly_its_shares():
    """In each of 4,096 samples the quotas to the sample, in a random order: no half of the block is far from them."""
    m = mixture()
    for b in range(6):
        sources = owner(m, m(np.arange(b * BLOCK, (b + 1) * BLOCK)))
        assert np.bincount(sources).tolist() == quotas([0.7, 0.2, 0.1], BLOCK).tolist()
        assert abs(np.bincount(sources[: BLOCK // 2]) / (BLOCK // 2) - [0.7, 0.2, 0.1]).max() < 0.04


def test_a_source_is_read_as_if_it_were_alone():
    """Its samples, picked out of the mixture, are what shuffled() gives for it: each epoch every row once, the next epoch in
    another order. code is read 10 times while web is read 4 times."""
    m = mixture()
    rows = m(np.arange(30_000))
    for s, (size, first) in enumerate(zip(m.sizes, (0, 5000, 5900))):
        own = rows[owner(m, rows) == s] - first
        assert np.array_equal(own, shuffled(np.arange(len(own)), int(size), 3 + s))
        epochs = [own[k : k + size] for k in range(0, len(own) - size + 1, size)]
        assert epochs and all(np.array_equal(np.sort(e), np.arange(size)) for e in epochs)
        assert all((a != b).any() for a, b in zip(epochs, epochs[1:]))


def test_a_mixture_of_one_source_is_the_plain_order():
    samples = np.arange(9000)
    assert np.array_equal(mixture((700,), ["web:2.5"])(samples), shuffled(samples, 700, 3))


@pytest.mark.parametrize("phases", [None, TWO_PHASES])
def test_counts_before_a_sample_have_a_closed_form(phases):
    """They equal counting from the start, in the middle of blocks, at borders of phases and behind the planned end."""
    m = mixture(phases=phases)
    sources = owner(m, m(np.arange(40_000)))
    for i in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 26_999, 27_000, 27_001, 30_000, 39_999]:
        assert m.counts(i).tolist() == np.bincount(sources[:i], minlength=3).tolist(), i


def test_phases_change_at_the_very_sample():
    """No book before 90 % of the run, and its full share from there on: 27,000 = 6 blocks and a shorter one with quotas of its own."""
    m = mixture(phases=TWO_PHASES)
    sources = owner(m, m(np.arange(30_000)))
    assert sources_of(TWO_PHASES) == m.names == ["web", "wiki", "books"]
    assert np.bincount(sources[:27_000], minlength=3).tolist() == (6 * quotas([0.8, 0.2, 0], BLOCK) + quotas([0.8, 0.2, 0], 27_000 - 6 * BLOCK)).tolist()
    assert np.bincount(sources[24_576:27_000], minlength=3)[2] == 0
    short = mixture(total=100, phases=TWO_PHASES)
    assert np.bincount(owner(short, short(np.arange(90))), minlength=3).tolist() == [72, 18, 0]
    assert abs(np.bincount(sources[27_000:], minlength=3) / 3000 - [0.3, 0.2, 0.5]).max() < 0.03


@pytest.mark.parametrize("phases", [None, TWO_PHASES])
def test_a_mixture_is_entered_anywhere(phases):
    """Asked for one update by a new object, across blocks and phases, it gives what a straight run gives."""
    straight = mixture(phases=phases)(np.arange(30_000))
    for begin in (0, 4090, 12_345, 26_995, 29_990):
        assert np.array_equal(mixture(phases=phases)(np.arange(begin, begin + 10)), straight[begin : begin + 10])


@pytest.mark.parametrize("world_size, batch_size, G", [(2, 3, 4), (4, 3, 4), (1, 12, 1), (1, 1, 12), (2, 6, 2)])
def test_ranks_and_micro_batches_do_not_change_what_an_update_reads(world_size, batch_size, G):
    """12 rows an update, however they are split: the same rows, and for the whole stream as a list the same places."""
    def rows(batch_size, G, world_size, step):
        samplers = [Sampler(6200, ctx(r, world_size), batch_size, G, seed=3) for r in range(world_size)]
        for s in samplers:
            s.order = mixture(phases=TWO_PHASES)
        micro = [update(s, step) for s in samplers]
        return sum((micro[m % world_size][m // world_size] for m in range(G)), [])
    for step in (0, 341, 2249, 2250):
        assert rows(batch_size, G, world_size, step) == rows(3, 4, 1, step)


def test_a_longer_run_keeps_what_was_read_but_not_with_phases():
    """Without phases the length of the run plays no part, so a run may be lengthened on resuming. Phases end at shares of the
    run: lengthened from 8,192 to 16,384 samples, its second half would read all 4,096 of b a second time."""
    assert np.array_equal(mixture(total=5000)(np.arange(20_000)), mixture(total=90_000)(np.arange(20_000)))
    short, long = (mixture((10_000, 10_000), total=n, phases=[(0.5, {"a": 1.0}), (1.0, {"b": 1.0})]) for n in (8192, 16_384))
    assert set(short(np.arange(4096, 8192)).tolist()) <= set(long(np.arange(8192, 16_384)).tolist())


def test_the_report_says_how_often_each_source_is_read():
    """30,000 samples, a tenth of them from 300 rows: ten epochs, and a note, since more than four teach little."""
    lines = "\n".join(mixture().report(rows_per_step=10))
    assert "web: 21,0" in lines and "4.20 epochs" in lines and "9.99 epochs" in lines and lines.count("more than 4 epochs") == 3
    lines = mixture((90_000, 90_000, 90_000), phases=TWO_PHASES).report(rows_per_step=10)
    assert "phase 2: samples 27,000 to 30,000 (from update 2,700 on): web 29.7%" in lines[1] and "note" not in "".join(lines)


@pytest.mark.parametrize("domain, general, warned", [(100, 700, False), (100, 1000, False), (15, 85, False), (50, 50, True)])
def test_more_than_15_percent_of_domain_text_is_noted_in_continued_pretraining(domain, general, warned):
    """The notes' arithmetic: 100 B of domain text with 700 to 1,000 B of general text are 12.5 to 9.1 %. From scratch no note."""
    m = mixture((10**6, 10**6), [f"general:{general}", f"domain:{domain}"], total=40_960)
    assert m.counts(40_960)[1] / 40_960 == pytest.approx(domain / (domain + general), abs=2e-4)
    assert ("general skills fade" in "".join(m.report(8, continued=True))) == warned
    assert "general skills fade" not in "".join(m.report(8))


def phases_file(tmp_path, text):
    (tmp_path / "phases.toml").write_text(text, encoding="utf-8")
    return str(tmp_path / "phases.toml")


def test_phases_are_read_from_words_or_from_a_file(tmp_path):
    path = phases_file(tmp_path, "[[phase]]\nuntil = 0.9\nmix = { web = 0.8, wiki = 0.2 }\n[[phase]]\nuntil = 1\nmix = { books = 0.5, web = 0.3, wiki = 0.2 }\n")
    assert read_phases([], path) == TWO_PHASES and read_phases([], "") == []
    assert read_phases(["a/b:0.5", "C:\\data:2"], "") == [(1.0, {"a/b": 0.5, "C:\\data": 2.0})]


@pytest.mark.parametrize("mix, text, says", [
    (["web"], "", "NAME:WEIGHT"), (["web:x"], "", "numbers"), (["web:0"], "", "above 0"), (["web:inf"], "", "above 0"), (["web:nan"], "", "above 0"),
    (["a:1", "a:2"], "", "twice"), (["a:1"], "x", "one of them"), ([], "x = [", "not a TOML file"), ([], "", "not a TOML file"),
    ([], "[[phase]]\nuntil = 1", "not a TOML file"), ([], "[[phase]]\nuntil = 1\nmix = {a = 1}\nname = 'x'", "not a TOML file"),
    ([], "seed = 3\n[[phase]]\nuntil = 1\nmix = {a = 1}", "not a TOML file"), ([], "phase = 3", "not a TOML file"),
    ([], "[[phase]]\nuntil = 'x'\nmix = {a = 1}", "numbers"), ([], "[[phase]]\nuntil = 1\nmix = 3", "numbers"),
    ([], "[[phase]]\nuntil = 0.9\nmix = {a = 1}", "must rise"), ([], "[[phase]]\nuntil = 1\nmix = {}", "at least one source"),
    ([], "[[phase]]\nuntil = 0.9\nmix = {a = 1}\n[[phase]]\nuntil = 0.5\nmix = {a = 1}\n[[phase]]\nuntil = 1\nmix = {a = 1}", "must rise")])
def test_a_mix_that_makes_no_sense_is_one_sentence(tmp_path, mix, text, says):
    with pytest.raises(UserError, match=says):
        read_phases(mix, phases_file(tmp_path, text) if text or not mix else "")


def test_a_missing_file_or_a_weight_too_small_to_be_read_is_one_sentence():
    with pytest.raises(UserError, match="cannot be read"):
        read_phases([], "nowhere.toml")
    with pytest.raises(UserError, match="weight of b is less than one sample in 4,096"):
        mixture((10, 10), ["a:1", "b:0.0001"])


# ---- curriculum ----------------------------------------------------------------------------------------------------

def test_competence_is_campos_line_and_platanios_root():
    """Both begin at c0, end at 1 when full and stay there; the root is ahead of the line in between."""
    t = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    assert competence(t, 0.1, 0.5, "linear").tolist() == pytest.approx([0.1, 0.55, 1, 1, 1])
    assert competence(t, 0.1, 0.5, "sqrt").tolist() == pytest.approx([0.1, np.sqrt(0.5 * 0.99 + 0.01), 1, 1, 1])
    assert competence(t, 1.0, 0.5, "linear").tolist() == competence(t, 1.0, 0.5, "sqrt").tolist() == [1.0] * 5


@pytest.mark.parametrize("kind", ["linear", "sqrt"])
def test_no_sample_is_harder_than_the_competence(kind):
    """epsilon = (place + 1) / n <= c(t), the rule of the notes; and what is allowed is used, up to the edge."""
    n, total = 1000, 20_000
    order = permute(np.arange(n), n, 9).astype(np.uint32)
    place = np.empty(n, int)
    place[order] = np.arange(n)
    i = np.arange(total)
    epsilon = (place[Curriculum(order, 1, total, 0.1, 0.5, kind)(i)] + 1) / n
    c = competence(i / total, 0.1, 0.5, kind)
    assert (epsilon <= c + 1 / n).all() and (epsilon > 0.9 * c).mean() > 0.08
    assert epsilon[:200].max() < 0.2 and epsilon[total // 2 :].max() == 1.0


def test_full_competence_is_sampling_at_random():
    """lambda_0 = 1 is "no curriculum": all rows from the start, each as likely, but with replacement: of as many samples as
    rows, 1 - 1/e = 63 % of the rows are read. A shuffle reads all."""
    order = np.arange(2000, dtype=np.uint32)
    rows = Curriculum(order, 0, 20_000, 1.0, 0.5)(np.arange(20_000))
    assert abs(np.histogram(rows, 10)[0] / 2000 - 1).max() < 0.08
    assert len(np.unique(rows[:2000])) / 2000 == pytest.approx(1 - 1 / np.e, abs=0.03)
    assert len(np.unique(shuffled(np.arange(2000), 2000, 0))) == 2000


def test_from_the_switch_on_the_rows_stand_in_the_later_order():
    """CLIMB: the same draw u picks a place; which row stands there changes at the named sample, and nowhere else."""
    a, b, i = np.arange(100, dtype=np.uint32), np.arange(100, dtype=np.uint32)[::-1].copy(), np.arange(1000)
    plain, other = Curriculum(a, 7, 1000)(i), Curriculum(b, 7, 1000)(i)
    both = Curriculum(a, 7, 1000, switch=400, later=b)(i)
    assert np.array_equal(both, np.where(i < 400, plain, other)) and (plain != other).mean() > 0.9


def test_a_curriculum_is_entered_anywhere_by_any_number_of_ranks():
    order = permute(np.arange(500), 500, 1).astype(np.uint32)
    make = lambda: Curriculum(order, 4, 4000, switch=2000, later=order[::-1])
    straight = make()(np.arange(4000))
    for begin in (0, 1995, 3990):
        assert np.array_equal(make()(np.arange(begin, begin + 10)), straight[begin : begin + 10])
    ranks = [Sampler(500, ctx(r, 2), 3, 4, seed=4) for r in range(2)]
    for sampler in ranks:
        sampler.order = make()
    micro = [update(s, 166) for s in ranks]                                  # samples 1992 to 2003, over the switch
    assert sum((micro[m % 2][m // 2] for m in range(4)), []) == straight[1992:2004].tolist()


# ---- rows of like length together ----------------------------------------------------------------------------------

def by_length(n=203, batch=4, epochs=2.0, world_size=1, rank=0, accumulate=2, seed=0):
    lengths = np.random.default_rng(7).integers(5, 200, n)
    sampler = Sampler(n, ctx(rank, world_size), batch, accumulate, seed, epochs)
    sampler.order = ByLength(sampler, lengths, seed)
    return sampler, lengths


def test_by_length_changes_the_company_and_not_the_rows():
    """Two epochs still read every row twice, and 8 updates read the rows that the plain shuffle would have given them."""
    sampler, _ = by_length()
    steps = sampler.steps(0)
    rows = [sampler.rows(step) for step in range(steps)]
    assert sorted(np.concatenate(rows).tolist()) == sorted(2 * list(range(203)))
    plain = shuffled(np.arange(64), 203, 0)
    assert sorted(np.concatenate(rows[:8]).tolist()) == sorted(plain.tolist()) and len(rows[-1]) == 406 % 8


def test_by_length_leaves_less_padding():
    """Share of real tokens when each update is padded to its longest row: more than nine tenths, against about a half."""
    sampler, lengths = by_length(n=2000, batch=16, accumulate=1, epochs=1.0)
    def fill(order):
        batches = [lengths[order(np.arange(i, i + 16))] for i in range(0, 1920, 16)]
        return sum(b.sum() for b in batches) / sum(16 * b.max() for b in batches)
    assert fill(sampler.order) > 0.9 and fill(sampler.order.order) < 0.6


def test_by_length_can_be_entered_anywhere_and_by_any_rank():
    whole, _ = by_length()
    parts = [by_length(world_size=2, rank=r)[0] for r in (0, 1)]
    for step in (33, 7, 50):
        assert update(whole, step) == [rows for pair in zip(*(update(p, step) for p in parts)) for rows in pair]
    assert whole.order(np.array([300])) == whole.order(np.arange(290, 310))[10]


def test_by_length_does_not_go_from_short_to_long():
    sampler, lengths = by_length(n=2000, batch=16, accumulate=1, epochs=1.0)
    means = np.array([lengths[sampler.rows(step)].mean() for step in range(120)])
    assert abs(np.corrcoef(means, np.arange(120))[0, 1]) < 0.3
