"""Sampling with a KV cache: one prompt as a stream, or many prompts as a batch."""
import torch

from nanollm.model import KVCache


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seen=None, generator=None):
    """Draw one token a row. logits (B, V) -> (B,).

    repetition_penalty > 1 makes the tokens in `seen` (list of B lists) less likely (Keskar et al. 2019, eq. 2:
    positive logits divided, negative multiplied). temperature 0 is greedy. top_k keeps the k likeliest (0 = all);
    top_p keeps the smallest set whose probability reaches p (Holtzman et al. 2020), at least one token.
    """
    logits = logits.float()
    if repetition_penalty != 1.0 and seen is not None:
        logits = logits.clone()
        for row, ids in zip(logits, seen):
            ids = torch.tensor(sorted(set(ids)), device=row.device)
            row[ids] = torch.where(row[ids] > 0, row[ids] / repetition_penalty, row[ids] * repetition_penalty)
    if temperature == 0:
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
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(model, ids, max_new_tokens, stop_ids=(), generator=None, **sampling):
    """Yield new token ids after the prompt `ids` (a list), a stop id excluded. Stops at a stop id, after max_new_tokens,
    or at the end of the context, unless the model's cache is endless. A prompt longer than the context keeps its tail."""
    room = model.args.max_seq_len
    ids = list(ids)[-(room - 1):]
    device, cache = next(model.parameters()).device, model.cache(model)
    fresh = ids
    for _ in range(max_new_tokens if cache.endless else min(max_new_tokens, room - len(ids))):
        with torch.compiler.set_stance("force_eager"):            # a token a call: no shape stays long enough to compile for it
            logits = model(torch.tensor([fresh], device=device), cache=cache)[:, -1]
        token = sample(logits, seen=[ids], generator=generator, **sampling).item()
        if token in stop_ids:
            return
        ids.append(token)
        fresh = [token]
        yield token


def generate_batch(model, prompts, max_new_tokens, pad_id, stop_ids=(), generator=None, **sampling):
    """Answers to many prompts at once: prompts is a list of lists of ids -> (list of new ids, list of bool).

    The flag tells whether the row ended with a stop id (which is not returned)."""
    def pick(logits, rows, answers):
        return sample(logits, seen=[prompts[i] + answers[i] for i in rows], generator=generator, **sampling)

    prompts = [list(p)[-(model.args.max_seq_len - 1):] for p in prompts]
    answers = write_batch(model, prompts, max_new_tokens, pad_id, stop_ids, pick)
    stopped = [bool(answer) and answer[-1] in stop_ids for answer in answers]
    return [answer[:-1] if ended else answer for answer, ended in zip(answers, stopped)], stopped


class RoomyCache(KVCache):
    """A KVCache with room for the whole text from the start: a new token is written into its place and nothing before it is copied,
    while a growing cache copies all of it for each token, which costs as much as reading the weights."""

    def __init__(self, room):
        super().__init__()
        self.room, self.size = room, {}                           # Attention module -> columns in use

    @property
    def length(self):
        return next(iter(self.size.values()), 0)

    def extend(self, module, k, v):
        start = self.size.get(module, 0)
        end = self.size[module] = start + k.size(2)
        if module not in self.kv:
            self.kv[module] = [x.new_empty(*x.shape[:2], self.room, x.size(3)) for x in (k, v)]                              # (B, G, room, D)
        for buffer, new in zip(self.kv[module], (k, v)):
            buffer[:, :, start:end] = new
        return [buffer[:, :, :end] for buffer in self.kv[module]]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
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
        tokens = torch.tensor([[pad_id] * (width - len(prompts[i])) + prompts[i] for i in group], device=device)               # (B, T)
        segments = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=device)
        if bool((segments == 1).all()):
            segments = None                                       # nothing to hide: the faster causal path
        for _ in range(min(max_new_tokens, room - width)):
            logits = model(tokens, segments=segments, cache=cache, head=lambda h, output: output(h[:, -1]))                  # (alive, V)
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
