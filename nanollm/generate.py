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


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def generate_batch(model, prompts, max_new_tokens, pad_id, stop_ids=(), generator=None, **sampling):
    """Answers to many prompts at once: prompts is a list of lists of ids -> (list of new ids, list of bool).

    Prompts are padded on the left, so that all answers start in the same column; segments 0 (pad) and 1 (text) keep
    the pads out of every real token's sight, and RoPE only sees distances, so each row is what it would be alone.
    A finished row leaves the batch. The flag tells whether the row ended with a stop id (which is not returned).
    """
    device, cache, room = next(model.parameters()).device, KVCache(), model.args.max_seq_len
    prompts = [list(p)[-(room - 1):] for p in prompts]
    tight = [i for i, p in enumerate(prompts) if len(p) + max_new_tokens > room]
    if tight and len(prompts) > 1:                                # alone: its width must not shorten the others' answers
        rest = [i for i in range(len(prompts)) if i not in tight]
        answers, stopped = [[] for _ in prompts], [False] * len(prompts)
        for group in [*([i] for i in tight), *([rest] if rest else [])]:
            new = generate_batch(model, [prompts[i] for i in group], max_new_tokens, pad_id, stop_ids, generator, **sampling)
            for i, answer, ended in zip(group, *new):
                answers[i], stopped[i] = answer, ended
        return answers, stopped
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)        # (B, T)
    segments = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    if bool((segments == 1).all()):
        segments = None                                           # nothing to hide: the faster causal path
    answers, stopped = [[] for _ in prompts], [False] * len(prompts)
    alive = list(range(len(prompts)))
    for _ in range(min(max_new_tokens, room - width)):
        logits = model(tokens, segments=segments, cache=cache)[:, -1]                               # (alive, V)
        new = sample(logits, seen=[prompts[i] + answers[i] for i in alive], generator=generator, **sampling).tolist()
        for i, token in zip(alive, new):
            if token in stop_ids:
                stopped[i] = True
            else:
                answers[i].append(token)
        rows = [r for r, i in enumerate(alive) if not stopped[i]]
        if not rows:
            break
        if len(rows) < len(alive):
            cache.keep(torch.tensor(rows, device=device))
        alive = [alive[r] for r in rows]
        tokens = torch.tensor([[new[r]] for r in rows], device=device)                              # (alive, 1)
        segments = None if segments is None else torch.ones_like(tokens)
    return answers, stopped
