"""What else may stand in the sampler's stream: several sources by weight, in phases, easy rows first, rows of like length together.

All are functions of (seed, sample number) like the plain shuffle of sampler.py, and take its place as `sampler.order`.
"""
import functools
import math
import tomllib
from dataclasses import dataclass

import numpy as np

from nanollm.config import UserError
from nanollm.sampler import permute, shuffled, uniform

BLOCK = 4096                      # samples in which a mixture keeps its shares exactly


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
    which `until` is a share. block: samples of a block; fewer than 4,096 keep the shares in a short run, too. Row numbers
    run through the first source, then the second, … as in data.Joined.
    """

    def __init__(self, sizes, phases, total, seed, block=BLOCK):
        self.names, self.sizes, self.seed, self.total, self.width = sources_of(phases), np.array(sizes), seed, total, block
        self.weights = [np.array([weights.get(name, 0.0) for name in self.names]) for _, weights in phases]
        self.begins = np.array([round(until * total) for until, _ in [(0.0, {}), *phases[:-1]]])
        self.ends = np.array([*self.begins[1:], np.iinfo(np.int64).max])   # behind the planned end, as in the last update, the last phase goes on
        self.before = np.zeros((len(phases), len(sizes)), np.int64)        # samples of each source before each phase
        for w in self.weights:
            for name in [n for n, weight, quota in zip(self.names, w, quotas(w, self.width)) if weight and not quota]:
                raise UserError(f"the weight of {name} is less than one sample in {self.width:,}; raise it or leave {name} out")
        for p in range(1, len(phases)):
            self.before[p] = self.counts(self.begins[p], p - 1)

    def block(self, phase, b):
        """(samples of each source before block b of the phase, samples of each source in it)."""
        length = min(self.width, int(self.ends[phase] - self.begins[phase]) - b * self.width)
        return self.before[phase] + b * quotas(self.weights[phase], self.width), quotas(self.weights[phase], length)

    def counts(self, sample, phase=None):
        """Samples of each source before number `sample`, int64 (S,)."""
        phase = int(np.searchsorted(self.ends, sample, side="right")) if phase is None else phase
        b, rest = divmod(int(sample - self.begins[phase]), self.width)
        before, inside = self.block(phase, b)
        if rest:
            source, _ = dealt(tuple(inside.tolist()), self.key(phase, b))
            before = before + np.bincount(source[:rest], minlength=len(self.sizes))
        return before

    def key(self, phase, b):
        return self.seed * 1_000_003 + int(self.begins[phase]) + b * self.width

    def __call__(self, samples):
        """Row numbers (int64, as many as samples) of the given sample numbers."""
        source, turn = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        phases = np.searchsorted(self.ends, samples, side="right")
        blocks = (samples - self.begins[phases]) // self.width
        for phase, b in sorted(set(zip(phases.tolist(), blocks.tolist()))):
            here = (phases == phase) & (blocks == b)
            before, inside = self.block(phase, b)
            of, nth = (x[samples[here] - self.begins[phase] - b * self.width] for x in dealt(tuple(inside.tolist()), self.key(phase, b)))
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


class ByLength:
    """Rows of like length in one update: a row is padded to the longest beside it. Of every `window` updates' rows (as many
    as `order` gives) the shortest make one update, the next longer ones another, and so on; then these updates are shuffled."""

    def __init__(self, sampler, lengths, seed, window=8):
        self.order, self.lengths, self.seed, self.window = sampler.order, np.asarray(lengths), seed, window
        self.B, self.total = sampler.rows_per_step, sampler.total

    def __call__(self, samples):
        rows = np.empty(len(samples), np.int64)
        for w in np.unique(samples // (self.window * self.B)):
            begin = w * self.window * self.B
            end = min(begin + self.window * self.B, self.total or np.inf)
            there = self.order(np.arange(begin, end, dtype=np.int64))
            there = there[np.argsort(self.lengths[there], kind="stable")]
            whole = len(there) // self.B                     # a ragged last update of the run stays the last, with the longest
            updates = there[: whole * self.B].reshape(whole, self.B)[permute(np.arange(whole), whole, self.seed * 1_000_003 + int(w))]
            here = samples // (self.window * self.B) == w
            rows[here] = np.concatenate((updates.ravel(), there[whole * self.B :]))[samples[here] - begin]
        return rows
