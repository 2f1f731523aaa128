"""What makes writing a text fast: a cache with room, and for a plain LLaMA on a CPU model.py's formulas for one token again, without its
modules and in as few calls as will do.

For one token a layer's arithmetic takes as long as reading its weights, and every call of a module or a kernel takes microseconds
on top. So q, k and v are one product, gate and up are one, and q and k are rotated at once. And the large weights are copied
once into the order in which they are read fastest. `model.py` remains the definition: whatever is not exactly its
Transformer goes through it, and a test holds the two together.
"""
import weakref

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.by_hand import ONEDNN, by_hand, product
from nanollm.model import Attention, FeedForward, KVCache, Linear, RMSNorm, Transformer, TransformerBlock, causal_mask

LARGE = 2**18                                                     # numbers, 1 MB: more than a core's nearest caches hold beside other things
PLAIN = {Transformer, TransformerBlock, Attention, FeedForward, RMSNorm, Linear, nn.Embedding, nn.Dropout, nn.ModuleList}


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

    def keep(self, rows):
        """The cache of these rows alone. If rows have only left, the others move up in place, as far as columns are in use."""
        order, end = rows.tolist(), self.length
        for module, buffers in self.kv.items():
            if order != sorted(set(order)):                  # beams: some rows twice, in any order
                self.kv[module] = [buffer[rows] for buffer in buffers]
                continue
            for buffer in buffers:
                for new, old in enumerate(order):
                    if new < old:
                        buffer[new, :, :end] = buffer[old, :, :end]
            self.kv[module] = [buffer[: len(order)] for buffer in buffers]
        if self.segments is not None:
            self.segments = self.segments[rows]


def stacked(weights, rows):
    """x (rows, C) -> x [W_1; W_2; …]^T, the order of a large matrix in memory made for so many rows. rows = 0: no copies, for a model
    that might not fit twice. Of a small matrix (below LARGE numbers) a plain product takes less than the call of a better one."""
    if not rows and weights[0].numel() >= LARGE:
        return lambda x: torch.cat([product(x, w) for w in weights], 1)
    w, threads = torch.cat(weights) if len(weights) > 1 else weights[0], torch.get_num_threads()
    if w.numel() < LARGE:
        return lambda x: x @ w.t()
    if rows == 1 and torch.backends.mkl.is_available() and len(w) % threads == 0:
        parts = w.view(threads, -1, w.size(1)).mT            # (threads, C, N / threads): MKL gives one row to one thread, of several products each gets one
        if parts.size(2) > parts.size(1):                    # memory is read fastest in long runs
            runs = torch.empty(parts.shape)
            for run, part in zip(runs, parts):               # in two dimensions a transposed copy is fast
                run.copy_(part)
            parts = runs
        return lambda x: torch.bmm(x.expand(threads, 1, -1), parts).view(1, -1)
    if not ONEDNN:
        return lambda x: x @ w.t()
    # several rows, or a number of outputs that does not divide by the threads
    blocks = torch.ops.mkldnn._reorder_linear_weight(w, rows)       # its own order, into which it would copy the matrix in each call
    return lambda x: ONEDNN(x, blocks, None, "none", [], "")


def norm(x, weight, eps):
    """model.py's RMSNorm. F.rms_norm is six calls inside; of one row the mean square is a number, and three will do."""
    if len(x) > 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    mean_square = torch.dot(x[0], x[0]).item() / x.size(1)
    return (x * (mean_square + eps) ** -0.5).mul_(weight)


class Decoder:
    """For `rows` texts, while the weights stay as they are. A cache is shared with the model, so either may go on where the other was."""

    def __init__(self, model, rows):
        self.embeddings, self.norm, self.eps = model.tok_embeddings.weight.detach(), model.norm.weight.detach(), model.norm.eps
        half = model.rope_sin.size(1) // 2
        self.cos, self.sin = model.rope_cos, torch.cat((-model.rope_sin[:, :half], model.rope_sin[:, half:]), 1)              # (max_seq_len, D)
        if sum(p.nbytes for p in model.parameters()) > 2**31:
            rows = 0                                         # a second copy of a large model might not fit
        of = lambda *linears: stacked([linear.weight.detach() for linear in linears], rows)
        self.layers = [(layer.attention, layer.attention_norm.weight.detach(), of(layer.attention.wq, layer.attention.wk, layer.attention.wv),
                        of(layer.attention.wo), layer.ffn_norm.weight.detach(), of(layer.feed_forward.w1, layer.feed_forward.w3),
                        of(layer.feed_forward.w2)) for layer in model.layers]
        self.output = of(model.output)

    @staticmethod
    def suits(model):
        """Is it the Transformer of model.py as it stands there: fp32 on the CPU, each part its own, no adapter, hook or slice of a weight?"""
        return (all(type(m) in PLAIN and not (m._forward_hooks or m._forward_pre_hooks or {"forward", "hidden"} & vars(m).keys()) for m in model.modules())
                and model.mask is causal_mask and model.args.attention == "sdpa" and not model.training
                and len({m.eps for m in model.modules() if type(m) is RMSNorm}) == 1
                and all(m.plain() for m in model.modules() if type(m) is Linear) and all(by_hand(p.detach()) for p in model.parameters()))

    def __call__(self, tokens, segments, cache):
        """tokens (B, 1), segments (B, 1) or None -> logits (B, V)."""
        eps = self.eps
        cos, sin = self.cos[cache.length], self.sin[cache.length]                             # (D,)
        if segments is not None:
            cache.segments = torch.cat((cache.segments, segments), 1)                         # (B, S)
            hidden = segments != cache.segments
            segments = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]           # (B, 1, 1, S), added to the scores
        x = self.embeddings[tokens[:, 0]]                                                     # (B, C)
        for attention, attention_norm, qkv, wo, ffn_norm, gate_up, w2 in self.layers:
            H, G, D = attention.n_heads, attention.n_kv_heads, attention.head_dim
            qkv = qkv(norm(x, attention_norm, eps)).view(-1, H + 2 * G, D)
            qk = qkv[:, : H + G]
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)                            # (-x2, x1) sin = (x2, x1) (-sin, sin)
            k, v = cache.extend(attention, qk[:, H:, None], qkv[:, H + G :, None])            # (B, G, S, D)
            q = qk[:, :H].view(-1, G, H // G, D)             # the heads of a group look at the same keys, as so many tokens would: no copies
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=segments)                 # (B, G, H / G, D)
            x = x + wo(out.reshape(-1, H * D))
            gate, up = gate_up(norm(x, ffn_norm, eps)).chunk(2, 1)                            # (B, hidden_dim)
            x = x + w2(F.silu(gate) * up)
        return self.output(norm(x, self.norm, eps))


def cache_for(model, room):
    """An empty cache for a text of at most `room` tokens; a variant's own where it has one."""
    return RoomyCache(room) if model.cache is KVCache else model.cache(model)


KEPT = weakref.WeakKeyDictionary()                                # model -> what its weights were, and the Decoder made of them


def mark(w):
    """a^T w b with unequal numbers in a and b: it tells whether weights have changed. A sum would not see another order, a norm no other sign, and
    a version counter is raised neither by a fused optimizer nor by a write through .data."""
    w = w.detach().flatten(0, -2) if w.dim() > 1 else w.detach()[None]
    return (product(torch.linspace(1, 2, w.size(1))[None], w) @ torch.linspace(1, 2, w.size(0)))[0]


def decoder(model, rows):
    """For one text at a time (a chat) the last one is kept while the weights are what they were: to copy 28 M takes as long as 7 tokens."""
    if rows != 1:
        return Decoder(model, rows)
    tensors = [model.rope_cos, model.rope_sin, *model.parameters()]
    weights = torch.get_num_threads(), model.norm.eps, [w.data_ptr() for w in tensors], torch.stack([mark(w) for w in tensors]).tolist()
    if KEPT.get(model, [None])[0] != weights:
        KEPT[model] = weights, Decoder(model, rows)
    return KEPT[model][1]


def reader(model, cache, rows=1):
    """read(tokens (B, T), segments=None) -> logits (B, V) of what comes next. The first call reads prompts, by the model; the others one token
    a row, by the Decoder if it can, made for so many rows."""
    step = None

    @torch.compiler.set_stance("force_eager")                     # a token a call: no shape stays long enough to compile for it
    def whole(tokens, segments, cache):
        return model(tokens, segments, cache, head=lambda h, output: output(h[:, -1]))

    def read(tokens, segments=None):
        nonlocal step
        if not cache.length:
            return whole(tokens, segments, cache)
        step = step or (decoder(model, rows) if Decoder.suits(model) else whole)
        return step(tokens, segments, cache)
    return read
