"""Which rows an update reads: pure functions of the seed and the sample's number.

Update `step` takes the samples step * B … step * B + B - 1 of one endless stream. What stands at each place of that
stream (a shuffle, a mixture of sources, a curriculum) is computed where it is needed and never stored: the state of the
data is the step number, resuming is a seek, and neither ranks nor micro-batches change what an update reads.
"""
import functools
import math
import tomllib
from dataclasses import dataclass

import numpy as np

from nanollm.config import UserError

BLOCK = 4096                      # samples in which a mixture keeps its shares exactly
GAMMA = 0x9E3779B97F4A7C15        # 2^64 / golden ratio, odd: the step of splitmix64


def permute(index, n, key):
    """The place of each `index` (array of int64 in 0..n-1) in a keyed pseudo-random permutation of n items.

    A Feistel network on just enough bits, walked until it lands below n (Black & Rogaway 2002): a permutation that
    is computed where it is needed instead of being stored, so a corpus of any size costs no memory to shuffle.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    half, x = np.uint64(half), np.asarray(index).astype(np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for round in range(4):
            h = (right + np.uint64((key * 4 + round) % 2**31)) * np.uint64(GAMMA)
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((h ^ (h >> np.uint64(32))) & mask)
        x[todo] = (left << half) | right
        todo = x >= n
    return x.astype(np.int64)


def mix64(x):
    """A bijection of uint64 (an array) in which each input bit changes each output bit with probability 1/2: the finalizer
    of MurmurHash3 with Stafford's constants (variant 13), as in splitmix64. Returns a new array."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def splitmix64(seed, index):
    """One random uint64 for each `index` (array of integers >= 0): the numbers of the generator of Steele, Lea & Flood
    2014, figure 16, started at `seed`, each computed from its place in the stream."""
    index = np.atleast_1d(np.asarray(index)).astype(np.uint64)             # arrays wrap at 2^64 without a warning
    return mix64((index + np.uint64(1)) * np.uint64(GAMMA) + np.uint64(seed % 2**64))


def uniform(seed, index):
    """A number in [0, 1) for each `index`. Seeds are scattered first: those of one generator are places of one stream. Of
    64 bits the upper 53 count, what a float64 holds: dividing all 64 by 2^64 would round the largest ones up to 1.0, and
    the row behind the last would be read."""
    start = int(mix64(np.array([seed % 2**64], np.uint64))[0])
    return (splitmix64(start, index) >> np.uint64(11)) * 2.0 ** -53


def shuffled(samples, n_rows, seed):
    """Row numbers of `samples` in a stream that runs through all rows, in a new order each epoch."""
    rows = np.empty(len(samples), np.int64)
    for epoch in np.unique(samples // n_rows):
        here = samples // n_rows == epoch
        rows[here] = permute(samples[here] % n_rows, n_rows, seed * 1_000_003 + int(epoch))
    return rows


class Sampler:
    """Update `step` reads the samples step * B … step * B + B - 1 of an endless stream that runs through all rows
    in a new order each epoch. B = batch_size * gradient_accumulation_steps, whatever the number of ranks: rank r
    takes every world_size-th micro-batch, so 1, 2 or 4 GPUs make the same updates from the same rows. `order` says
    which row each sample is; a Mixture or a Curriculum may take its place."""

    def __init__(self, n_rows, ctx, batch_size, gradient_accumulation_steps, seed, epochs=0.0):
        G, W = gradient_accumulation_steps, ctx.world_size
        if G < 1 or batch_size < 1:
            raise UserError(f"--batch_size {batch_size} and --gradient_accumulation_steps {G} must be at least 1")
        if G % W:
            raise UserError(f"--gradient_accumulation_steps {G} counts the micro-batches of all ranks and must be divisible by "
                            f"the {W} ranks; {f'the nearest values are {G // W * W} and {(G // W + 1) * W}' if G > W else f'the smallest value is {W}'}")
        self.batch_size, self.G, self.rank, self.world_size = batch_size, G, ctx.rank, W
        self.order = functools.partial(shuffled, n_rows=n_rows, seed=seed)
        self.total = max(1, round(epochs * n_rows)) if epochs else None   # None = endless
        self.rows_per_step = batch_size * G

    def steps(self, max_steps):
        """Number of updates: max_steps, or what --epochs comes to, the last update possibly smaller."""
        if not self.total and not max_steps:
            raise UserError("how long shall the run be? give --max_steps or --epochs")
        return -(-self.total // self.rows_per_step) if self.total else max_steps

    def micro_batches(self, step):
        """This rank's share of update `step`: a list of index arrays, some possibly empty in the last update."""
        samples = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        parts = [samples[m * self.batch_size : (m + 1) * self.batch_size] for m in range(self.rank, self.G, self.world_size)]
        return [self.order(part[part < self.total] if self.total else part) for part in parts]


# ----------------------------------------------------------------------------------------------------------------
# Several sources, by weight


def read_phases(mix, path):
    """[(until, {name: weight})] from the words of --mix ("web:0.8", one phase) or the TOML file of --phases, in which
    every phase names the share of the run at which it ends:

        [[phase]]
        until = 0.9
        mix = { web = 0.8, wiki = 0.2 }
        [[phase]]
        until = 1.0
        mix = { books = 0.5, web = 0.5 }

    Without either: []. Weights are shares of the rows; they need not add up to 1."""
    if mix and path:
        raise UserError("--mix and --phases both say what is read; give one of them")
    if mix:
        words = [word.rpartition(":") for word in mix]
        if not all(name for name, _, _ in words):
            raise UserError(f"--mix {' '.join(mix)}: write NAME:WEIGHT for each source, as in --mix web:0.8 wiki:0.2")
        phases, where = [{"until": 1.0, "mix": {name: weight for name, _, weight in words}}], "--mix"
        if len(phases[0]["mix"]) < len(words):
            raise UserError(f"--mix {' '.join(mix)} names a source twice")
    elif path:
        where = f"--phases {path}"
        try:
            with open(path, "rb") as f:
                table = tomllib.load(f)
            phases = table.pop("phase")
            if table or not all(set(p) == {"until", "mix"} for p in phases):
                raise KeyError
        except OSError as e:
            raise UserError(f"{where} cannot be read: {e.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: not a TOML file of [[phase]] tables with the keys until and mix") from None
    else:
        return []
    try:
        phases = [(float(p["until"]), {name: float(weight) for name, weight in p["mix"].items()}) for p in phases]
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{where}: until and the weights are numbers, mix is a table {{ name = weight }}") from None
    ends = [until for until, _ in phases]
    if not ends or ends[-1] != 1 or any(b <= a for a, b in zip([0.0, *ends], ends)):
        raise UserError(f"{where}: until must rise from phase to phase, and the last phase ends at 1.0; it is {ends}")
    if not all(weights and all(0 < w < math.inf for w in weights.values()) for _, weights in phases):
        raise UserError(f"{where}: every phase needs at least one source, and every weight must be above 0; leave out what is not read")
    return phases


def sources_of(phases):
    """The names in the order of their first mention."""
    return list(dict.fromkeys(name for _, weights in phases for name in weights))


def quotas(weights, n):
    """n places for the sources by largest remainder (Hamilton's rule): each gets the whole part of its share, the largest
    fractions get what is left. weights: array of shape (S,) -> int64 array (S,) that adds up to n."""
    shares = np.asarray(weights, float) / np.sum(weights) * n
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: n - counts.sum()]] += 1
    return counts


@functools.lru_cache(maxsize=4)
def dealt(counts, key):
    """A block dealt out at random: for each of its sum(counts) samples (source, how many of that source stand before it)."""
    n = sum(counts)
    source = np.searchsorted(np.cumsum(counts), permute(np.arange(n), n, key), side="right")
    before = np.empty(n, np.int64)
    for s in range(len(counts)):
        before[source == s] = np.arange(counts[s])
    return source, before


class Mixture:
    """Samples of several sources by weight, in phases. The samples of source s (0, 1, …) come in the order in which a Sampler
    with the seed `seed` + s would read it alone: when all its rows are used, its next epoch begins in a new order.

    The stream is cut into blocks of 4,096 samples, the last block of a phase possibly shorter. In each a source gets its
    quota, dealt out at random, so the number of its samples before any place has a closed form and nothing is counted.

    sizes: rows of each source. phases: [(until, {name: weight})] as read_phases gives them. total: samples of the run, of
    which `until` is a share. Row numbers run through the first source, then the second, … as in data.Joined.
    """

    def __init__(self, sizes, phases, total, seed):
        self.names, self.sizes, self.seed, self.total = sources_of(phases), np.array(sizes), seed, total
        self.weights = [np.array([weights.get(name, 0.0) for name in self.names]) for _, weights in phases]
        self.begins = np.array([round(until * total) for until, _ in [(0.0, {}), *phases[:-1]]])
        self.ends = np.array([*self.begins[1:], np.iinfo(np.int64).max])   # behind the planned end, as in the last update, the last phase goes on
        self.before = np.zeros((len(phases), len(sizes)), np.int64)        # samples of each source before each phase
        for w in self.weights:
            for name in [n for n, weight, quota in zip(self.names, w, quotas(w, BLOCK)) if weight and not quota]:
                raise UserError(f"the weight of {name} is less than one sample in {BLOCK:,}; raise it or leave {name} out")
        for p in range(1, len(phases)):
            self.before[p] = self.counts(self.begins[p], p - 1)

    def block(self, phase, b):
        """(samples of each source before block b of the phase, samples of each source in it)."""
        length = min(BLOCK, int(self.ends[phase] - self.begins[phase]) - b * BLOCK)
        return self.before[phase] + b * quotas(self.weights[phase], BLOCK), quotas(self.weights[phase], length)

    def counts(self, sample, phase=None):
        """Samples of each source before number `sample`, int64 (S,)."""
        phase = int(np.searchsorted(self.ends, sample, side="right")) if phase is None else phase
        b, rest = divmod(int(sample - self.begins[phase]), BLOCK)
        before, inside = self.block(phase, b)
        if rest:
            source, _ = dealt(tuple(inside.tolist()), self.key(phase, b))
            before = before + np.bincount(source[:rest], minlength=len(self.sizes))
        return before

    def key(self, phase, b):
        return self.seed * 1_000_003 + int(self.begins[phase]) + b * BLOCK

    def __call__(self, samples):
        """Row numbers (int64, as many as samples) of the given sample numbers."""
        source, turn = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        phases = np.searchsorted(self.ends, samples, side="right")
        blocks = (samples - self.begins[phases]) // BLOCK
        for phase, b in sorted(set(zip(phases.tolist(), blocks.tolist()))):
            here = (phases == phase) & (blocks == b)
            before, inside = self.block(phase, b)
            of, nth = (x[samples[here] - self.begins[phase] - b * BLOCK] for x in dealt(tuple(inside.tolist()), self.key(phase, b)))
            source[here], turn[here] = of, before[of] + nth
        rows, first = np.empty(len(samples), np.int64), np.cumsum(self.sizes) - self.sizes
        for s in np.unique(source):
            here = source == s
            rows[here] = first[s] + shuffled(turn[here], int(self.sizes[s]), self.seed + int(s))
        return rows

    def report(self, rows_per_step, continued=False):
        """Lines to print before the first update: what each phase reads, how often each source is read, and a warning where
        the usual limits are passed: four epochs (Muennighoff et al. 2023), and in continued pretraining 15 % of text
        other than the first source, which is taken for the general one."""
        lines = []
        for p, begin in enumerate(self.begins):
            end = min(int(self.ends[p]), self.total)
            read = self.counts(end, p) - self.before[p]
            shares = ", ".join(f"{name} {n / max(1, end - begin):.1%}" for name, n in zip(self.names, read) if n)
            lines.append(f"phase {p + 1}: samples {begin:,} to {end:,} (from update {begin // rows_per_step:,} on): {shares}")
        read = self.counts(self.total)
        for name, n, size in zip(self.names, read.tolist(), self.sizes.tolist()):
            note = "; note: more than 4 epochs, new text would teach more" if n > 4 * size else "" if n else "; note: never read"
            lines.append(f"  {name}: {n:,} samples of {size:,} rows = {n / size:.2f} epochs{note}")
        domain = 1 - read[0] / self.total
        if continued and domain > 0.15:
            lines.append(f"note: {domain:.0%} of this continued pretraining is not {self.names[0]}; beyond about 15 % general skills fade")
        return lines


# ----------------------------------------------------------------------------------------------------------------
# Easy rows first


def competence(t, start, full_at, kind="sqrt"):
    """The share of the rows, easiest first, that is in reach at time t (array, 0..1 of the run): start at t = 0, all from
    t = full_at on. linear: Campos 2021, algorithm 1. sqrt: Platanios et al. 2019, eq. 8: each newly reached row gets the
    same time although ever more are in reach."""
    x = np.minimum(1.0, np.asarray(t) / full_at)
    return start + x * (1 - start) if kind == "linear" else np.sqrt(x * (1 - start**2) + start**2)


@dataclass
class Curriculum:
    """Samples drawn, with replacement, from the easiest c(t) * n rows: competence-based learning without state. Sample i is
    easiest_first[floor(u_i * max(1, c(i / total) * n))], u_i uniform from (seed, i).

    From sample number `switch` on, the rows stand in the order `later` instead (CLIMB, Martinez et al. 2023: the order of
    unigram perplexity gives way to that of the model's own)."""
    easiest_first: np.ndarray            # row numbers, (n,)
    seed: int
    total: int                           # samples of the run
    start: float = 0.1
    full_at: float = 0.5
    kind: str = "sqrt"
    switch: int = 0                      # 0 = never
    later: np.ndarray | None = None

    def __call__(self, samples):
        n = len(self.easiest_first)
        reach = np.maximum(1, competence(samples / self.total, self.start, self.full_at, self.kind) * n)
        place = np.floor(uniform(self.seed, samples) * reach).astype(np.int64)
        rows = self.easiest_first[place].astype(np.int64)
        after = samples >= self.switch if self.switch else np.zeros(len(samples), bool)
        if after.any():
            rows[after] = self.later[place[after]]
        return rows
