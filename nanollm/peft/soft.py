"""Virtual tokens by hand: n vectors in front of every text are trained, and the model reads them like tokens.

    prompt        the n vectors stand among the input embeddings           prompt tuning   (Lester et al. 2021, arXiv:2104.08691)
    ptuning       the same, made by a small network (MLP or LSTM)          P-tuning v1     (Liu et al. 2021, arXiv:2103.10385)
    ptuning_v2    n keys and n values in every layer                       P-tuning v2     (Liu et al. 2021, arXiv:2110.07602)
    prefix        the same, made by a small network                        prefix tuning   (Li & Liang 2021, arXiv:2101.00190)

The network only helps training: afterwards its output is all that counts (bake). Step 0 is not the base model: even keys of
zeros take their share of the softmax. The context is shorter by n, since the virtual tokens stand in it.
"""
import dataclasses
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.model import KVCache, Transformer, apply_rope, causal_mask


def pads_before(segments):
    """How many pads each row begins with: segments (B, T) -> (B,). Raises UserError for a row of several texts: the virtual tokens would
    stand in front of the first one only."""
    if bool(((segments > 0) & (segments != segments.amax(1, keepdim=True))).any()):
        raise UserError("virtual tokens (--peft prompt, prefix …) stand in front of a row's only text, and this row holds several: add --no_pack")
    return (segments.cumsum(1) == 0).sum(1)


# ----------------------------------------------------------------------------------------------------------------
# Among the input embeddings


class PromptEmbedding(nn.Embedding):
    """The embedding `base` with n more tokens, V … V + n - 1, which are the only ones trained. ids (B, T) -> (B, T, C)."""

    def __init__(self, base, n, network=None):
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.weight, self.enabled = base.weight.requires_grad_(False), True
        start = base.weight[torch.randperm(base.num_embeddings)[:n].to(base.weight.device)]              # like real words, which the model can read
        self.prompt = nn.Parameter(start.detach().clone())                                               # (n, C)
        self.prompt_network = network.to(base.weight.device) if network else None
        self.train(base.training)

    def table(self):
        return self.prompt if self.prompt_network is None else self.prompt_network(self.prompt)

    def forward(self, ids):
        virtual = ids >= self.num_embeddings
        x = F.embedding(ids.masked_fill(virtual, 0), self.weight)
        if not bool(virtual.any()):
            return x
        rows = F.embedding((ids - self.num_embeddings).clamp(min=0), self.table().type_as(x))
        return torch.where(virtual[..., None], rows, x)

    @torch.no_grad()
    def bake(self):
        self.prompt, self.prompt_network = nn.Parameter(self.table()), None


class MLP(nn.Sequential):
    def __init__(self, dim, hidden):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))


class LSTM(nn.Module):
    """Two layers in both directions, so that neighbouring virtual tokens know of each other, and a small MLP (P-tuning, eq. 4)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))

    def forward(self, x):
        return self.mlp(self.lstm(x[None])[0][0])


def hidden_with_prompt(model, tokens, segments=None, cache=None):
    """Transformer.hidden of [virtual tokens, tokens], without the virtual ones' columns. A cache that has begun already holds them."""
    embedding = model.tok_embeddings
    if not embedding.enabled or cache is not None and cache.length:
        return Transformer.hidden(model, tokens, segments, cache)
    (B, T), n = tokens.shape, len(embedding.prompt)
    virtual = torch.arange(embedding.num_embeddings, embedding.num_embeddings + n, device=tokens.device).expand(B, n)
    tokens = torch.cat((virtual, tokens), dim=1)                                                         # (B, n + T)
    if segments is not None:                                 # [pads, virtual, text]: next to the text, as in a row without pads
        pads, column = pads_before(segments)[:, None], torch.arange(n + T, device=tokens.device)
        order = torch.where(column < pads, column + n, torch.where(column < pads + n, column - pads, column))           # (B, n + T)
        tokens = tokens.gather(1, order)
        segments = torch.cat((segments.amax(1, keepdim=True).expand(B, n), segments), dim=1).gather(1, order)
    make_room(cache, n)
    return Transformer.hidden(model, tokens, segments, cache)[:, n:]


def make_room(cache, n):
    """A cache of fixed size (generate.py) was measured for the text alone."""
    if hasattr(cache, "room"):
        cache.room += n


# ----------------------------------------------------------------------------------------------------------------
# In front of every layer's keys and values


class Prefix(nn.Module):
    """n keys and n values for each of the L layers: table() is (n, 2 L G D), the key of layer l in place 2 l, its value in 2 l + 1."""

    def __init__(self, args, n, hidden=0):
        super().__init__()
        self.n_layers, self.n_kv_heads, self.enabled = args.n_layers, args.n_kv_heads, True
        width = args.head_dim * args.n_kv_heads                                               # G D
        self.prefix = nn.Parameter(torch.randn(n, width if hidden else 2 * args.n_layers * width))
        self.prefix_network = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 2 * args.n_layers * width)) if hidden else None

    def table(self):
        return self.prefix if self.prefix_network is None else self.prefix_network(self.prefix)

    def keys_and_values(self, B, dtype):
        """[(k, v)] of the layers, each (B, G, n, D)."""
        kv = self.table().to(dtype).view(len(self.prefix), 2 * self.n_layers, self.n_kv_heads, -1)       # (n, 2L, G, D)
        kv = kv.permute(1, 2, 0, 3)[:, None].expand(-1, B, -1, -1, -1)                                   # (2L, B, G, n, D)
        return list(zip(kv[0::2], kv[1::2]))

    @torch.no_grad()
    def bake(self):
        self.prefix, self.prefix_network = nn.Parameter(self.table()), None


def hidden_with_prefix(model, tokens, segments=None, cache=None):
    """Transformer.hidden with a cache that begins with the prefix. Its keys are not rotated: it stands at position 0 of whatever text
    comes, so where a row has pads in front, it is turned by as much as they push the text on."""
    if not model.soft.enabled or cache is not None and cache.length:
        return Transformer.hidden(model, tokens, segments, cache)
    cache, n, B, device = KVCache() if cache is None else cache, len(model.soft.prefix), len(tokens), tokens.device
    make_room(cache, n)
    pads = None if segments is None else pads_before(segments)                                           # (B,)
    if pads is not None:
        cache.segments = segments.amax(1, keepdim=True).expand(B, n)
    weight = model.layers[0].attention.wk.weight
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
    for layer, (k, v) in zip(model.layers, model.soft.keys_and_values(B, dtype)):
        if pads is not None:
            cos, sin = [table[pads][:, None, None] / model.rope_cos[0, 0] for table in (model.rope_cos, model.rope_sin)]    # yarn's are longer than 1
            k = apply_rope(k, cos, sin)
        cache.extend(layer.attention, k, v)
    return Transformer.hidden(model, tokens, segments, cache)


# ----------------------------------------------------------------------------------------------------------------
# What --peft names: a function (model, option=default, …) -> {place in the model: what is to stand there}


def shorter(model, n):
    """The ModelArgs of `model` with n virtual tokens in its context."""
    args = model.args
    if not 1 <= n < args.max_seq_len - 1:
        raise UserError(f"virtual tokens: n must be at least 1 and leave room in the context of {args.max_seq_len}, got {n}")
    if getattr(model, "mask", None) is not causal_mask or model.cache is not KVCache:
        raise UserError(f"virtual tokens cannot stand in front of a model with {' '.join(args.variants)} (--variants): its mask counts columns; use lora")
    return dataclasses.replace(args, max_seq_len=args.max_seq_len - n)


def with_prompt(model, n, network=None):
    args = shorter(model, n)
    if n > args.vocab_size:
        raise UserError(f"--peft prompt: n {n} is more than the vocabulary of {args.vocab_size} from which the virtual tokens start; use less")
    return {"tok_embeddings": PromptEmbedding(model.tok_embeddings, n, network), "hidden": partial(hidden_with_prompt, model), "args": args}


def with_prefix(model, n, hidden=0):
    args, device = shorter(model, n), model.tok_embeddings.weight.device
    return {"soft": Prefix(args, n, hidden).to(device).train(model.training), "hidden": partial(hidden_with_prefix, model), "args": args}


def prompt(model, n=16):
    """n: virtual tokens."""
    return with_prompt(model, n)


def ptuning(model, n=16, network="mlp", hidden=0):
    """network: mlp or lstm; hidden: its width, 0 = the model's."""
    if network not in ("mlp", "lstm"):
        raise UserError(f"--peft ptuning: network must be mlp or lstm, got {network!r}")
    return with_prompt(model, n, {"mlp": MLP, "lstm": LSTM}[network](model.args.dim, hidden or model.args.dim))


def ptuning_v2(model, n=16):
    return with_prefix(model, n)


def prefix(model, n=16, hidden=0):
    """hidden: width of the network that makes keys and values, 0 = the model's."""
    return with_prefix(model, n, hidden or model.args.dim)
