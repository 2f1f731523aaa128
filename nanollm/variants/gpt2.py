"""The GPT-2 block (Radford et al. 2019, section 2.3), the notes' listings' model, as the baseline to compare with: learned
positions instead of RoPE, LayerNorm instead of RMSNorm, GELU (its tanh form) of width 4 * dim instead of SwiGLU, and biases.
Its tensors equal transformers' GPT2LMHeadModel's, with c_attn cut into wq, wk and wv, and Conv1D's weights transposed."""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.model import Attention, TransformerBlock
from nanollm.variants.ffn import PlainFeedForward


class GPT2Attention(Attention):
    """Attention with biases. The table of rotations is the identity (see gpt2), so nothing else changes."""

    def __init__(self, args):
        super().__init__(args)
        for name in ("wq", "wk", "wv", "wo"):
            plain = getattr(self, name)
            setattr(self, name, nn.Linear(plain.in_features, plain.out_features))


class GPT2Block(TransformerBlock):
    def __init__(self, args):
        nn.Module.__init__(self)
        self.attention = GPT2Attention(args)
        self.feed_forward = PlainFeedForward(args, partial(F.gelu, approximate="tanh"), args.hidden_dim or 4 * args.dim, bias=True)
        self.attention_norm, self.ffn_norm = (nn.LayerNorm(args.dim, args.norm_eps) for _ in range(2))


class FirstBlock(GPT2Block):
    """Adds each position's learned vector to the embeddings before it does the same as the others."""

    def __init__(self, args):
        super().__init__(args)
        self.positions = nn.Parameter(torch.zeros(1, args.max_seq_len, args.dim))
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, cos, sin, mask, cache=None):
        if mask is None:
            start = cache.length if cache is not None else 0
            at = torch.arange(start, start + x.size(1), device=x.device)                  # (T,)
        else:                                                # counted inside the own segment: all that it sees but itself
            at = mask.sum(-1).squeeze(1) - 1 if mask.dim() == 4 else mask.sum(-1) - 1     # (B, T) or (T,)
        return super().forward(x + self.dropout(self.positions[0, at]), cos, sin, mask, cache)


def gpt2(model):
    args = model.args
    model.layers = nn.ModuleList((GPT2Block if i else FirstBlock)(args) for i in range(args.n_layers))
    model.norm = nn.LayerNorm(args.dim, args.norm_eps)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    model.by_runs = False                                    # FirstBlock counts positions in the mask
    model.rope_cos, model.rope_sin = torch.ones_like(model.rope_cos), torch.zeros_like(model.rope_sin)
