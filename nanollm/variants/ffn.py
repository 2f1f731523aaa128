"""The feed-forwards that SwiGLU is compared with, each with as many parameters as SwiGLU's three matrices of width ffn_dim
(Shazeer 2020, arXiv:2002.05202):

    relu     w2 max(0, w1 x)            eq. 2; two matrices, so their width is 3/2 ffn_dim
    gelu     w2 gelu(w1 x)              eq. 3
    geglu    w2 (gelu(w1 x) * w3 x)     eq. 6; SwiGLU with another gate
"""
import torch.nn as nn
import torch.nn.functional as F

from nanollm.model import FeedForward


class GEGLU(FeedForward):
    def forward(self, x):
        return self.dropout(self.w2(F.gelu(self.w1(x)) * self.w3(x)))


class PlainFeedForward(nn.Module):
    """One matrix up, a function of each number, one matrix down. x (B, T, C) -> (B, T, C)."""

    def __init__(self, args, activation, width=0, bias=False):
        super().__init__()
        self.activation, width = activation, width or 3 * args.ffn_dim // 2
        self.w1 = nn.Linear(args.dim, width, bias=bias)
        self.w2 = nn.Linear(width, args.dim, bias=bias)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x):
        return self.dropout(self.w2(self.activation(self.w1(x))))


def geglu(model):
    for block in model.layers:
        block.feed_forward = GEGLU(model.args)


def gelu(model):
    for block in model.layers:
        block.feed_forward = PlainFeedForward(model.args, F.gelu)


def relu(model):
    for block in model.layers:
        block.feed_forward = PlainFeedForward(model.args, F.relu)
