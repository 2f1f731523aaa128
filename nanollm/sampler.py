"""Which rows an update reads: pure functions of the seed and the sample's number.

Update `step` takes the samples step * B … step * B + B - 1 of one endless stream. What stands at each place of that
stream (a shuffle; a mixture of sources or a curriculum: mixture.py) is computed where it is needed and never stored:
the state of the data is the step number, resuming is a seek, and neither ranks nor micro-batches change what an update
reads.
"""
import functools

import numpy as np

from nanollm.config import UserError

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

    def rows(self, step):
        """All rows of update `step`, of all ranks: where to look when something is wrong with it."""
        samples = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        return self.order(samples[samples < self.total] if self.total else samples)
