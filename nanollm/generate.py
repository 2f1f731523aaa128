"""Sampling with a KV cache: one prompt as a stream, or many prompts as a batch."""
import math
from dataclasses import dataclass

import torch

from nanollm.decode import RoomyCache, cache_for, reader


def penalise(logits, seen, repetition_penalty=1.0, no_repeat_ngram=0):
    """Make what is already there less likely. logits (B, V), or log-probabilities; seen: the B texts so far, lists of ids -> (B, V).

    repetition_penalty > 1: positive numbers of the tokens in the text are divided by it, negative multiplied (Keskar et al. 2019, eq. 2).
    no_repeat_ngram n > 0: no n tokens in a row may come twice (Paulus et al. 2018, arXiv:1705.04304, section 2.5): banned is what
    followed wherever the text's last n - 1 tokens stand in it before."""
    if repetition_penalty == 1.0 and not no_repeat_ngram:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen):
        ids = torch.tensor(ids, device=row.device)           # (T,)
        if repetition_penalty != 1.0:
            row[ids] = torch.where(row[ids] > 0, row[ids] / repetition_penalty, row[ids] * repetition_penalty)
        if 0 < no_repeat_ngram <= len(ids):
            ngrams = ids.unfold(0, no_repeat_ngram, 1)       # (T - n + 1, n)
            again = (ngrams[:, :-1] == ids[len(ids) - no_repeat_ngram + 1 :]).all(1)
            row[ngrams[again, -1]] = float("-inf")
    return logits


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram=0, seen=None, generator=None):
    """Draw one token a row. logits (B, V) -> (B,).

    In this order: penalties on the tokens in `seen` (see penalise); temperature, 0 is greedy; top_k keeps the k likeliest (0 = all);
    top_p the smallest set whose probability reaches p (Holtzman et al. 2020); min_p what is at least min_p times as likely as the
    likeliest (Nguyen et al. 2024, arXiv:2407.01082). At least one token stays.
    """
    logits = penalise(logits.float(), seen, repetition_penalty, no_repeat_ngram)
    if temperature < 1e-9:                                   # 0, or so near to it that logits / temperature overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        order = logits.sort(-1, descending=True)
        probs = order.values.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= max(top_p, 1e-9)    # what lies before it already reaches p
        logits = logits.masked_fill(beyond.scatter(-1, order.indices, beyond), float("-inf"))
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min(min_p, 1.0)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@dataclass
class Step:
    """One new token. Probabilities are the model's own: at temperature 1, before penalties and filters."""
    token: int
    logprob: float                                            # natural logarithm
    top: list                                                 # [(token, probability)], the likeliest first; empty unless asked for


@torch.no_grad()
def steps(model, ids, max_new_tokens, stop_ids=(), generator=None, top=0, **sampling):
    """Yield a Step for each new token after the prompt `ids` (a list), a stop id excluded. sampling: options of `sample`.
    Stops at a stop id, after max_new_tokens, or at the end of the context, unless the model's cache is endless. A prompt longer
    than the context keeps its tail. top: how many of the likeliest tokens to name in each step."""
    room = model.args.max_seq_len
    ids = list(ids)[-(room - 1):]
    device, fresh = next(model.parameters()).device, ids
    cache = cache_for(model, min(len(ids) + max_new_tokens, room))
    read = reader(model, cache)
    for _ in range(max_new_tokens if cache.endless else min(max_new_tokens, room - len(ids))):
        logits = read(torch.tensor([fresh], device=device))                                                                  # (1, V)
        token = sample(logits, seen=[ids], generator=generator, **sampling).item()
        if token in stop_ids:
            return
        ids.append(token)
        fresh = [token]
        logps = logits[0].float().log_softmax(-1)
        best = logps.topk(min(top, len(logps))) if top else None
        yield Step(token, logps[token].item(), list(zip(best.indices.tolist(), best.values.exp().tolist())) if top else [])


def generate(model, ids, max_new_tokens, stop_ids=(), generator=None, **sampling):
    """The new token ids alone: see `steps`."""
    for step in steps(model, ids, max_new_tokens, stop_ids, generator, **sampling):
        yield step.token


def show_step(step, decode, width=20):
    """What a Step might have been, a line of text for each candidate: its probability, a bar and the token. An arrow marks the token
    that was taken, on a last line if it is not among the likeliest. decode: a tokenizer's, list of ids -> text."""
    rows = step.top + [(step.token, math.exp(step.logprob))] * (step.token not in dict(step.top))
    return "\n".join(f"{'->' if token == step.token else '  '} {p:6.1%} {'#' * round(width * p):<{width}} {decode([token])!r}" for token, p in rows)


class StopStrings:
    """Ends a stream of text at the first of some strings, which need not begin or end with a token.

    What may be the beginning of one is held back until it is known. Which pieces the text comes in changes nothing."""

    def __init__(self, stops):
        self.stops, self.held, self.done = [s for s in stops if s], "", False

    def feed(self, text):
        """The next piece of text -> what may be shown now; nothing once `done`: a stop string was met, it is not shown."""
        if self.done:
            return ""
        text = self.held + text
        met = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
        self.done = bool(met)                                # the string that is complete first ends the text
        cut = min(met)[1] if met else len(text) - max((n for s in self.stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        self.held = "" if met else text[cut:]
        return text[:cut]

    def flush(self):
        """The text is over -> what was held back."""
        held, self.held = self.held, ""
        return held


def generate_batch(model, prompts, max_new_tokens, pad_id, stop_ids=(), generator=None, **sampling):
    """Answers to many prompts at once: prompts is a list of lists of ids -> (list of new ids, list of bool).

    The flag tells whether the row ended with a stop id (which is not returned)."""
    def pick(logits, rows, answers):
        return sample(logits, seen=[prompts[i] + answers[i] for i in rows], generator=generator, **sampling)

    prompts = [list(p)[-(model.args.max_seq_len - 1):] for p in prompts]
    answers = write_batch(model, prompts, max_new_tokens, pad_id, stop_ids, pick)
    stopped = [bool(answer) and answer[-1] in stop_ids for answer in answers]
    return [answer[:-1] if ended else answer for answer, ended in zip(answers, stopped)], stopped


@torch.no_grad()
def write_batch(model, prompts, max_new_tokens, pad_id, stop_ids, pick):
    """The loop below generate_batch and the rollouts of PPO: lists of ids -> lists of new ids, a stop id included.
    pick(logits (n, V), rows, answers) -> the next token (n,) of each of the n rows (a list) that are still being written.

    Prompts are padded on the left, so that all answers start in the same column; segments 0 (pad) and 1 (text) keep
    the pads out of every real token's sight, and RoPE only sees distances, so each row is what it would be alone.
    A finished row leaves the batch.
    """
    device, room = next(model.parameters()).device, model.args.max_seq_len
    answers = [[] for _ in prompts]
    tight = [i for i, p in enumerate(prompts) if len(p) + max_new_tokens > room]
    rest = [i for i in range(len(prompts)) if i not in tight]     # tight ones alone: their width must not shorten the others' answers
    for group in [*([i] for i in tight), *([rest] if rest else [])]:
        width = max(len(prompts[i]) for i in group)
        cache = RoomyCache(min(width + max_new_tokens, room))
        read = reader(model, cache, len(group) if max_new_tokens >= 32 else 0)      # fewer are not worth the copy
        tokens = torch.tensor([[pad_id] * (width - len(prompts[i])) + prompts[i] for i in group], device=device)               # (B, T)
        segments = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=device)
        if bool((segments == 1).all()):
            segments = None                                       # nothing to hide: the faster causal path
        for _ in range(min(max_new_tokens, room - width)):
            logits = read(tokens, segments)                                                                                  # (alive, V)
            drawn = pick(logits, group, answers)
            new = drawn.tolist()
            for i, token in zip(group, new):
                answers[i].append(token)
            rows = [r for r, token in enumerate(new) if token not in stop_ids]
            if not rows:
                break
            if len(rows) < len(group):
                group, rows = [group[r] for r in rows], torch.tensor(rows, device=device)
                cache.keep(rows)
                drawn = drawn[rows]
            tokens = drawn[:, None]                                                                                          # (alive, 1)
            segments = None if segments is None else torch.ones_like(tokens)
    return answers
