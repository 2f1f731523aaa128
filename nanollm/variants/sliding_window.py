"""Each token looks at the last `window` tokens (itself included) and at the first `sinks` tokens of its segment.

The window: Beltagy et al. 2020, arXiv:2004.05150, section 3.1. The sinks: a softmax must spend its weight somewhere, and a
trained model spends it on the first tokens; take them away and it breaks (StreamingLLM, Xiao et al. 2023, arXiv:2309.17453,
section 3). With both, a cache of fixed size is enough, and a text may grow past max_seq_len. It has no weights, so it can be
put on a trained model: `chat.py --variants sliding_window`.
"""
from functools import partial

import torch

from nanollm.config import UserError
from nanollm.model import KVCache, apply_rope, causal_mask


def segment_starts(segments):
    """Where each token's own segment begins: (B, S) -> column numbers (B, S). A segment is one run of equal numbers."""
    column = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, column, 0).cummax(1).values


def window_mask(window, sinks, T, cache=None, segments=None, seen=None, device=None):
    """causal_mask without what is neither near nor a sink."""
    start = cache.length if cache is not None else 0
    if segments is None and start + T <= window + sinks:     # all is in reach
        return causal_mask(T, cache, device=device)
    key = torch.arange(start + T, device=device)                                          # (S,)
    query = key[start:, None]                                                             # (T, 1)
    rank = key if segments is None else (key - segment_starts(seen))[:, None, None, :]    # place in its own segment
    mask = (key <= query) & ((key > query - window) | (rank < sinks))
    return mask if segments is None else mask & (segments[:, None, :, None] == seen[:, None, None, :])


class RollingCache(KVCache):
    """Keeps the sinks and the last window - 1 tokens. Positions are true until max_seq_len; from there on, new tokens stand at
    its end and all but the sinks move back (Xiao et al. 2023, section 3.2: positions inside the cache, not in the text). So
    keys are kept unrotated, and all of them are rotated each time."""
    endless = True

    def __init__(self, window, sinks, model):
        super().__init__()
        self.window, self.sinks, self.cos, self.sin = window, sinks, model.rope_cos, model.rope_sin
        self.read = {}                                       # Attention module -> tokens read so far

    @property
    def position(self):
        return min(next(iter(self.read.values()), 0), len(self.cos) - 1)

    def trim(self, x, dim):
        """The sinks and the last window - 1 of x along dim: with the next token, all that it may look at."""
        n, last = x.size(dim), self.window - 1
        if n <= self.sinks + last:
            return x
        return torch.cat((x.narrow(dim, 0, self.sinks), x.narrow(dim, n - last, last)), dim)

    def extend(self, module, k, v):
        T, read = k.size(2), self.read.get(module, 0)
        end = min(read, len(self.cos) - 1) + T               # hidden() has put the new tokens at [end - T, end)
        cos, sin = self.cos[end - T : end], self.sin[end - T : end]
        k = apply_rope(k, cos, -sin) / (cos**2 + sin**2).type_as(k)      # turned back; a scaled table (YaRN) is not of length 1
        k, v = super().extend(module, k, v)                                                # (B, G, S, D)
        self.kv[module], self.read[module] = (self.trim(k, 2), self.trim(v, 2)), read + T
        at = torch.arange(end - k.size(2), end, device=k.device)                           # of the S tokens; the sinks stay where they were
        at[: self.sinks] = torch.arange(min(self.sinks, len(at)), device=k.device)
        return apply_rope(k, self.cos[at], self.sin[at]), v

    @property
    def segments(self):
        return self._segments

    @segments.setter
    def segments(self, value):
        self._segments = value if value is None else self.trim(value, 1)


def sliding_window(model, window=0, sinks=4):
    """window 0: all of max_seq_len but the sinks, so that nothing changes until a text outgrows it."""
    room = model.args.max_seq_len
    window = window or room - sinks
    if not (window >= 1 and sinks >= 0 and window + sinks <= room):
        raise UserError(f"--variants sliding_window: window {window} and sinks {sinks} must fit into max_seq_len {room}")
    model.mask, model.cache = partial(window_mask, window, sinks), partial(RollingCache, window, sinks)
