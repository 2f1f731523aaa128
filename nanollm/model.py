"""A LLaMA-2/3 decoder by hand: pre-RMSNorm, RoPE, causal (grouped-query) attention, SwiGLU, no biases.

Names follow Meta's LLaMA, so a printed module tree equals the one in the literature. RoPE is in the half-split
form that Hugging Face uses, so exporting is a renaming of tensors and nothing else.

Legend of shapes:  B batch   T time (tokens)   C = dim   H query heads   G key/value heads   D = head_dim   V vocabulary
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanollm.by_hand import (LinearByHand, RMSNormByHand, RotateByHand, SwiGLUByHand, SwiGLULinearByHand, by_hand, scaled_dot_product_attention,
                            step, worth_onednn)


@dataclass
class ModelArgs:
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 0            # 0 = as many as n_heads (MHA); fewer = grouped-query attention (GQA)
    head_dim: int = 0              # 0 = dim / n_heads; otherwise the width of a head itself
    vocab_size: int = 1024
    multiple_of: int = 32          # the FFN width is rounded up to a multiple of this
    hidden_dim: int = 0            # 0 = two thirds of 4 * dim, rounded; otherwise the FFN width itself
    norm_eps: float = 1e-5
    max_seq_len: int = 256
    rope_theta: float = 10000.0
    dropout: float = 0.0
    tie_embeddings: bool = True    # one matrix for the input embedding and the output projection
    attention: str = "sdpa"        # "sdpa": F.scaled_dot_product_attention; "naive": the formula spelled out
    variants: list = field(default_factory=list)      # what nanollm/variants puts in place of a part; this file only keeps the words

    def __post_init__(self):
        """Raises ValueError for a shape that cannot be built."""
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}: it is what a row of zeros is divided by")
        if not self.head_dim and self.dim % self.n_heads or (self.head_dim or self.dim // self.n_heads) % 2:
            raise ValueError(f"dim {self.dim} must be n_heads {self.n_heads} times an even number, or head_dim one: RoPE rotates pairs")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if self.attention not in ("sdpa", "naive"):
            raise ValueError(f"attention must be 'sdpa' or 'naive', got {self.attention!r}")

    @property
    def ffn_dim(self):
        """SwiGLU has three matrices where a plain FFN has two; 2/3 * 4 * dim keeps the parameter count equal
        (Shazeer 2020, arXiv:2002.05202). dim 512, multiple_of 32 -> 1376."""
        m = self.multiple_of
        return self.hidden_dim or m * math.ceil(int(2 * 4 * self.dim / 3) / m)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4). No mean is subtracted and there is no bias.
    Computed in fp32 whatever the input: the sum of squares overflows fp16 already at |x| = 256 in one element."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if by_hand(x):
            return step(RMSNormByHand, x, self.weight, self.eps)
        return F.rms_norm(x.float(), (x.size(-1),), eps=self.eps).type_as(x) * self.weight


def rope_table(head_dim, length, theta, device=None):
    """cos and sin of position * frequency, each (length, D): frequency_i = theta^(-2i/D) (Su et al. 2021, eq. 15),
    the D/2 frequencies written twice, once for each half."""
    freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)      # (D/2,)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), freq).repeat(1, 2)    # (length, D)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotate each pair (x_i, x_{i+D/2}) of x (B, H, T, D) by its position's angle; cos and sin are (T, D).
    The dot product of a rotated q and k depends only on the distance of their positions."""
    if by_hand(x):
        return step(RotateByHand, x, cos, sin)
    x1, x2 = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-x2, x1), dim=-1) * sin).type_as(x)


def naive_attention(q, k, v, mask, dropout_p=0.0):
    """softmax(Q K^T / sqrt(D)) V (Vaswani et al. 2017, eq. 1). q (B, H, T, D), k and v (B, H, S, D),
    mask (…, T, S) with True where a query may look. F.scaled_dot_product_attention computes the same
    without ever holding the (T, S) matrix."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))          # (B, H, T, S)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    probs = F.dropout(scores.softmax(dim=-1).type_as(q), dropout_p)
    return probs @ v                                                  # (B, H, T, D)


def attention_of_runs(q, k, v, runs, attend):
    """Causal attention inside each run of tokens and nowhere else: attend(q, k, v) on one run after the other, so the work grows with
    the squares of the runs and no (T, T) mask is made. q (1, H, T, D), k and v alike; runs: lengths that add up to T."""
    parts = zip(*(t.split(runs, dim=2) for t in (q, k, v)))                                   # (1, H, run, D)
    return torch.cat([attend(*part).transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


class Linear(nn.Linear):
    """y = x W^T, by the faster of the CPU's two matrix libraries (by_hand.py)."""

    def plain(self):             # no adapter, no bias, no slice
        return self.bias is None and type(self.weight) is nn.Parameter

    def forward(self, x):
        if by_hand(x) and self.plain() and worth_onednn(x, self.weight):
            return step(LinearByHand, x, self.weight)
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = args.n_heads, args.n_kv_heads, args.head_dim
        self.naive = args.attention == "naive"
        self.wq = Linear(args.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = Linear(self.n_heads * self.head_dim, args.dim, bias=False)
        self.attn_dropout = nn.Dropout(args.dropout)
        self.resid_dropout = nn.Dropout(args.dropout)

    def qkv(self, x):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)         # (B, H, T, D)
        k = self.wk(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)      # (B, G, T, D)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)      # (B, G, T, D)
        return q, k, v

    def attend(self, q, k, v, mask=None):
        """(B, H, T, D): every query over the keys that mask (…, T, S) allows; None is plain causal, with T queries that end the S keys."""
        p, T, S = self.attn_dropout.p if self.training else 0.0, q.size(2), k.size(2)
        if self.naive:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if mask is None else mask
            return naive_attention(q, k, v, mask, p)
        causal = mask is None and T > 1                      # a lone query may look at every key
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)

    def forward(self, x, cos, sin, mask, cache=None):
        B, T, _ = x.shape
        q, k, v = self.qkv(x)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self, k, v)                                            # (B, G, S, D), S >= T
        if self.n_kv_heads < self.n_heads:                   # GQA: each key/value head serves H / G query heads
            k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)            # (B, H, S, D)
            v = v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        out = attention_of_runs(q, k, v, mask, self.attend) if isinstance(mask, list) else self.attend(q, k, v, mask)
        out = out.transpose(1, 2).reshape(B, T, self.n_heads * self.head_dim)          # (B, T, H * D)
        return self.resid_dropout(self.wo(out))


def swiglu(gate, up):
    return step(SwiGLUByHand, gate, up) if by_hand(gate) else F.silu(gate) * up


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). w1 is the gate, w3 the up and w2 the down projection."""

    def __init__(self, args):
        super().__init__()
        self.w1 = Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = Linear(args.dim, args.ffn_dim, bias=False)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x):
        gate, up = self.w1(x), self.w3(x)
        if by_hand(gate) and isinstance(self.w2, Linear) and self.w2.plain():
            return self.dropout(step(SwiGLULinearByHand, gate, up, self.w2.weight))
        return self.dropout(self.w2(swiglu(gate, up)))


class TransformerBlock(nn.Module):
    """Pre-norm: each sub-layer reads a normalised copy and adds to an untouched residual stream."""

    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, cos, sin, mask, cache=None):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


def causal_mask(T, cache=None, segments=None, seen=None, device=None):
    """Which of the S tokens read so far (their segments: seen) each of the T newest may look at: itself and what came
    before, in its own segment. (…, T, S) bool, or None where attention needs no mask to be causal."""
    start = cache.length if cache is not None else 0
    if segments is None and (start == 0 or T == 1):          # is_causal does it (it assumes S = T), or a lone query sees all
        return None
    if T == 1:
        return segments[:, None, :, None] == seen[:, None, None, :]                       # (B, 1, 1, S)
    mask = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)
    return mask if segments is None else mask & (segments[:, None, :, None] == seen[:, None, None, :])     # (B, 1, T, S)


def end_to_end(tokens, segments):
    """The segments of all rows (B, T) in one row, without the padding (segment 0): tokens (1, N), where each stood (rows (N,),
    columns (N,)), and the segments' lengths."""
    text = segments.nonzero(as_tuple=True)
    number = text[0] * (segments.size(1) + 1) + segments[text]          # of the segment, over all rows
    return tokens[text][None], text, number.unique_consecutive(return_counts=True)[1].tolist()


class KVCache:
    """Keys and values of the tokens already read, so that each new token costs one column and not a square."""
    endless = False             # True: forgets what is far away, so that a text may outgrow max_seq_len

    def __init__(self, model=None):
        self.kv = {}                # Attention module -> (k, v), each (B, G, S, D), keys already rotated
        self.segments = None        # (B, S): see Transformer.forward

    @property
    def length(self):
        return next(iter(self.kv.values()))[0].size(2) if self.kv else 0

    @property
    def position(self):         # of the next token
        return self.length

    def extend(self, module, k, v):
        if module in self.kv:
            old_k, old_v = self.kv[module]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.kv[module] = (k, v)
        return k, v

    def keep(self, rows):
        """Go on with only these batch rows (a LongTensor): finished answers need no more work."""
        self.kv = {m: (k[rows], v[rows]) for m, (k, v) in self.kv.items()}
        if self.segments is not None:
            self.segments = self.segments[rows]


class Transformer(nn.Module):
    """tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_table(args.head_dim, args.max_seq_len, args.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.mask, self.cache = causal_mask, KVCache          # a variant may put another function and another class here
        self.by_runs = True                  # segments on a CPU: attention_of_runs. False where a mask of one shape is wanted
        self.checkpointing = False           # True: keep only the blocks' inputs, compute the rest again in the backward pass
        self.init_weights()

    def init_weights(self):
        """
        tok_embeddings, output, wq wk wv, w1 w3    N(0, 0.02)
        wo, w2                                     N(0, 0.02 / sqrt(2 * n_layers))   (GPT-2, section 2.3)
        norms                                      1

        wo and w2 are the two matrices of a block that write into the residual stream: 2 * n_layers of them add up,
        so each is made smaller by the square root of their number. Chosen by role: in these names w2, not w3,
        is the down projection.
        """
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
        for name, p in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.args.n_layers))

    def hidden(self, tokens, segments=None, cache=None):
        """tokens (B, T) -> the final normed hidden states (B, T, C).

        segments (B, T): tokens attend only inside their own segment, a run of equal numbers. This one mechanism keeps packed documents
        apart (1, 2, 3, … along a row) and hides left padding in batched generation (0 for pads, 1 for text).
        Positions need no reset: RoPE only sees distances. None = the whole row is one segment.

        On a CPU the segments are laid end to end without the padding (segment 0, at the ends of a row or between segments), for which
        nothing is computed: it comes out as 0.
        """
        T, start = tokens.size(1), cache.position if cache is not None else 0
        if start + T > len(self.rope_cos):                   # virtual tokens, too, stand in there (peft/soft.py)
            raise ValueError(f"{start + T} tokens do not fit into max_seq_len {len(self.rope_cos)}")
        seen = segments
        if cache is not None and segments is not None:
            seen = cache.segments = segments if cache.segments is None else torch.cat((cache.segments, segments), 1)    # (B, S)
        shape, at = tokens.shape, slice(start, start + T)
        runs = segments is not None and cache is None and tokens.device.type == "cpu" and self.by_runs and self.mask is causal_mask and segments.any()
        if runs:
            tokens, text, mask = end_to_end(tokens, segments)                             # (1, N)
            at = torch.cat([torch.arange(n) for n in mask])                               # (N,)
        else:
            mask = self.mask(T, cache, segments, seen, tokens.device)
        cos, sin = self.rope_cos[at], self.rope_sin[at]
        x = self.dropout(self.tok_embeddings(tokens))                                     # (B, T, C)
        again = self.checkpointing and torch.is_grad_enabled() and cache is None          # Chen et al. 2016, arXiv:1604.06174;
        for layer in self.layers:                                                         # dropout draws the same masks again
            x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False) if again else layer(x, cos, sin, mask, cache)
        h = self.norm(x)
        return h.new_zeros(*shape, h.size(-1)).index_put(text, h[0]) if runs else h

    def forward(self, tokens, segments=None, cache=None, head=None):
        """Logits (B, T, V), or with a head whatever head(hidden (B, T, C), self.output) returns: a loss that never holds all
        logits is computed in here, inside the one call that DDP, FSDP and torch.compile see."""
        h = self.hidden(tokens, segments, cache)                                          # (B, T, C)
        return self.output(h) if head is None else head(h, self.output)


class RewardModel(nn.Module):
    """A Transformer whose output layer is one number per position: r_t = v_head(h_t). tokens (B, T) -> (B, T).
    The head reads the normed hidden state once, in fp32; a reward is unbounded, only differences mean anything."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.backbone = Transformer(args)
        self.backbone.output = None          # no vocabulary here: the embedding stays, the output matrix goes
        self.v_head = nn.Linear(args.dim, 1, bias=False)
        nn.init.normal_(self.v_head.weight, std=1 / math.sqrt(args.dim + 1))

    checkpointing = property(lambda self: self.backbone.checkpointing, lambda self, on: setattr(self.backbone, "checkpointing", on))

    def forward(self, tokens, segments=None, cache=None):
        h = self.backbone.hidden(tokens, segments, cache)                                 # (B, T, C)
        with torch.autocast(h.device.type, enabled=False):
            return self.v_head(h.float()).squeeze(-1)                                     # (B, T)


def parameter_count(model):
    """Parameters by part, a tied matrix counted once: {"embedding", "attention", "feed_forward", "norm", "output",
    "total", …}."""
    parts, seen = {"embedding": 0, "attention": 0, "feed_forward": 0, "norm": 0, "output": 0}, set()
    for name, p in model.named_parameters():
        if id(p) in seen:
            continue
        seen.add(id(p))
        words = name.split(".")
        part = ("norm" if "norm" in words[-2] else "attention" if "attention" in words
                else "feed_forward" if "feed_forward" in words else "embedding" if {"tok_embeddings", "positions"} & set(words)
                else "output")
        parts[part] += p.numel()
    parts["total"] = sum(parts.values())
    return parts


def flops_per_token(model, seq_len):
    """Training FLOPs per token: 6 for each weight that multiplies (2 forward, 4 backward; Kaplan et al. 2020,
    table 1) plus 12 * n_layers * H * D * T for the attention scores and values (the causal half not subtracted).
    A tied output multiplies too, an embedding is only looked up. An expert's `share` is the part of the tokens it sees."""
    a = model.args
    multiplied = sum(m.weight.numel() * getattr(m, "share", 1) for m in model.modules() if isinstance(m, nn.Linear))
    return round(6 * multiplied) + 12 * a.n_layers * a.n_heads * a.head_dim * seq_len
