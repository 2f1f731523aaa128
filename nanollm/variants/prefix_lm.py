"""Prefix-LM: the prompt reads itself in both directions, the answer is causal (Dong et al. 2019, arXiv:1905.03197, section 2.2;
Raffel et al. 2020, figure 4; the mask of ChatGLM). For the stages after pretraining, whose rows have a prompt:
`train_sft.py --variants prefix_lm`; plain text has none and stays causal.

A row says where its prompt ends: it is all tokens up to the first supervised one's predecessor. Later turns of a conversation
are causal, although they are given too: an answer in the middle is both a target and, for the turns behind it, a part of the
prompt, and a row cannot hide it and show it in one pass.
"""
import torch

from nanollm.losses import IGNORE_INDEX
from nanollm.model import causal_mask
from nanollm.variants.sliding_window import segment_starts


def mark_prefix(model, segments, targets):
    """segments (B, T) or None -> the same with a minus on the prefix of each segment. Unchanged unless the model is a prefix-LM."""
    if not any(getattr(m, "mask", None) is prefix_mask for m in model.modules()):
        return segments
    segments = torch.ones_like(targets) if segments is None else segments
    supervised = (targets != IGNORE_INDEX).long()
    before = supervised.cumsum(1) - supervised               # supervised targets to the left: in the row …
    inside = before - before.gather(1, segment_starts(segments))                          # … and in the same segment
    return torch.where(inside == 0, -segments, segments)


def prefix_mask(T, cache=None, segments=None, seen=None, device=None):
    """causal_mask, and within the same prefix in both directions. What an empty cache reads first is a prompt, all of it."""
    prompt = cache is not None and cache.length == 0
    if segments is None:
        return torch.ones(T, T, dtype=torch.bool, device=device) if prompt else causal_mask(T, cache, device=device)
    same = segments.abs()[:, None, :, None] == seen.abs()[:, None, None, :]               # (B, 1, T, S)
    if prompt:
        return same
    start = seen.size(1) - T
    causal = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)
    return same & (causal | (segments < 0)[:, None, :, None] & (seen < 0)[:, None, None, :])


def prefix_lm(model):
    model.mask = prefix_mask
