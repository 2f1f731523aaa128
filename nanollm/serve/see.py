"""What the page draws: tokens, how likely each was, what else might have stood there, and what a head looked at."""
import math

import torch

from nanollm.model import apply_rope


def named(tok, i):
    """A token by name: its text, or the name of a control token; bytes that are no whole character become U+FFFD."""
    control = next((name for name, c in tok.control.items() if c == i), None)
    return {"id": i, "token": control or tok.token_bytes(i).decode("utf-8", errors="replace"), "bytes": None if control else list(tok.token_bytes(i))}


def entry(tok, i, logprob, top):
    """One element of OpenAI's logprobs.content. top: [(token, probability)], the likeliest first."""
    return {**named(tok, i), "logprob": logprob, "top_logprobs": [{**named(tok, t), "logprob": math.log(max(p, 1e-45))} for t, p in top]}


@torch.no_grad()
def look(model, ids, layer, head, top=5):
    """One forward pass over `ids`, T tokens -> (steps, attention): for each token but the first [(log-probability given what stands
    before it, the `top` likeliest with their probabilities)]; and the attention (T, T) of that layer and head; a row sums to 1, or with virtual tokens
    in front (prompt and prefix tuning) to what they leave.

    No layer keeps its attention: fused kernels never hold the (T, T) matrix. So the layer's input is caught on its way, and
    softmax(Q K^T / sqrt(D)) computed from it as `naive_attention` does."""
    device, caught = next(model.parameters()).device, []
    attention = model.layers[layer].attention
    hook = attention.register_forward_pre_hook(lambda module, inputs: caught.append(inputs))
    try:
        logits = model(torch.tensor([ids], device=device))[0].float()                     # (T, V)
    finally:
        hook.remove()
    x, cos, sin, mask, cache = (*caught[0], None)[:5]
    q, k, _ = attention.qkv(x)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)                               # (1, H, T, D), (1, G, T, D)
    k = k if cache is None else cache.kv[attention][0]       # a trained prefix comes as a cache; it and a trained prompt stand in front
    q, k = q[0, head].float(), k[0, head * k.size(1) // q.size(1)].float()                # (T, D), (S, D): H / G query heads share a key head
    scores = q @ k.T / math.sqrt(q.size(-1))                                              # (T, S)
    mask = torch.ones_like(scores, dtype=torch.bool).tril(len(k) - len(q)) if mask is None else mask.reshape(-1, *scores.shape)[0]
    logps = logits.log_softmax(-1)
    best = logps.topk(min(top, logps.size(-1)))
    likely = [list(zip(i, p)) for i, p in zip(best.indices.tolist(), best.values.exp().tolist())]
    steps = list(zip(logps[:-1].gather(-1, torch.tensor(ids[1:], device=device)[:, None])[:, 0].tolist(), likely))
    return steps, scores.masked_fill(~mask, float("-inf")).softmax(-1)[-len(ids):, -len(ids):]
