"""Quantisation by hand: weights stored in 8 or 4 bits, computed with in floating point (weight-only, after training).

    W is cut into blocks of consecutive numbers (the whole tensor, a row, or 64 of them); each block has a scale of its own.

    absmax      code = round(W / s),       s = max|W| / 127           symmetric: one number a block
    zero point  code = round(W / s) + z,   s = (max - min) / 255      asymmetric: no code is wasted on an empty side
    NF4         code = nearest of 16 levels to W / max|W|             as many weights near each level, if they are normal

    quantize(model, "nf4")                 every Linear of the blocks, in place; chat.py and evaluate.py: --quantize nf4
    NF4Linear(linear)                      one layer, the frozen base of QLoRA

Absmax and zero point: Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339), section 2.1. NF4 and double quantisation: Dettmers et al.
2023, QLoRA (arXiv:2305.14314), section 3. What each costs in perplexity and saves in memory: docs/quantization.md.
"""
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError


def blocks_of(W, size):
    """W of any shape -> (blocks, size) fp32, row after row, the last block filled up with zeros."""
    flat = W.detach().float().flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def pack(codes):
    """4-bit codes (n,), n even -> (n / 2,): two in a byte, the first in its high half."""
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed):
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


# ----------------------------------------------------------------------------------------------------------------
# Integers: levels in equal steps


@dataclass
class Int:
    codes: torch.Tensor              # uint8, (n,) or packed (n / 2,)
    scale: torch.Tensor              # (blocks, 1) fp32: the step between two levels
    zero: torch.Tensor | None        # (blocks, 1) uint8: the code of 0; None = 2^(bits - 1), the middle one
    shape: torch.Size
    bits: int
    size: int                        # of a block


def quantize_int(W, bits=8, block="row", zero_point=False):
    """W -> Int. block: "tensor", "row" (the weights of one output) or how many weights. 0 stays exactly 0, any other weight moves by
    half a step at most. Raises UserError for other than 8 or 4 bits."""
    if bits not in (4, 8):
        raise UserError(f"integers of {bits} bits: use 8 or 4")
    size = {"tensor": W.numel(), "row": W.size(-1)}.get(block, block)
    x, top = blocks_of(W, size), 2**bits - 1                                             # codes are 0 … top
    if zero_point:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
    else:                                                                                # -127 … 127 around the middle: -128 stays unused
        scale = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale[scale == 0] = 1                                                                # a block of zeros
    zero = (-low / scale).round() if zero_point else torch.full_like(scale, 2 ** (bits - 1))
    codes = ((x / scale).round() + zero).clamp(0, top).to(torch.uint8).flatten()
    codes = pack(F.pad(codes, (0, len(codes) % 2))) if bits == 4 else codes
    return Int(codes, scale, zero.to(torch.uint8) if zero_point else None, W.shape, bits, size)


def dequantize_int(q):
    """(code - zero) * scale, fp32 in the shape of W."""
    codes = (unpack(q.codes)[: len(q.scale) * q.size] if q.bits == 4 else q.codes).float()                 # a copy, so what follows works in its place
    zero = 2 ** (q.bits - 1) if q.zero is None else q.zero.float()
    return codes.view(-1, q.size).sub_(zero).mul_(q.scale).flatten()[: q.shape.numel()].view(q.shape)


# ----------------------------------------------------------------------------------------------------------------
# NormalFloat: levels at the quantiles of a normal distribution

# QLoRA, appendix E: 8 quantiles of N(0, 1) above 0, 7 below, evenly spaced in probability, 0 itself; divided by the largest
NF4_LEVELS = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                           -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                           0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


NF4_PAIRS = torch.cartesian_prod(NF4_LEVELS, NF4_LEVELS)     # (256, 2): what the two codes of each byte say


def float8_levels():
    """(256,), ascending: bitsandbytes' dynamic 8-bit float in [-1, 1] (Dettmers et al. 2022, arXiv:2110.02861, section 2.1): 2^e values
    evenly inside [0.1, 1] * 10^(e - 6) for e = 0 … 6, each with both signs, then 0 and 1. Fine near 0, coarse far from it."""
    values = [torch.tensor([0.0, 1.0])]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (e - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


FLOAT8_LEVELS = float8_levels()


def nearest(x, levels):
    """Index of the level next to each x, uint8, shaped as x; halfway between two the lower one."""
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


@dataclass
class NF4:
    codes: torch.Tensor              # uint8 (n / 2,), packed
    absmax: torch.Tensor             # (blocks,) fp32; double: uint8, indices into FLOAT8_LEVELS
    shape: torch.Size
    size: int                        # of a block
    mean: torch.Tensor | None = None           # double: () fp32, of the absmax
    absmax2: torch.Tensor | None = None        # double: (blocks / 256,) fp32, the absmax of 256 (absmax - mean)


def quantize_nf4(W, blocksize=64, double=False):
    """W -> NF4, 4 + 32/64 = 4.5 bits a weight. double: the absmax in 8 bits, in blocks of 256: 4 + 8/64 + 32/(64 * 256) = 4.127 bits."""
    x = blocks_of(W, blocksize)
    absmax = x.abs().amax(1)
    codes = pack(nearest(x / absmax.clamp(min=1e-38)[:, None], NF4_LEVELS.to(W.device)).flatten())
    if not double:
        return NF4(codes, absmax, W.shape, blocksize)
    mean = absmax.mean()
    y = blocks_of(absmax - mean, 256)
    absmax2 = y.abs().amax(1)
    y = y / absmax2.clamp(min=1e-38)[:, None]
    y = ((y + 1) * 32767.5).round() / 32767.5 - 1            # bitsandbytes' CPU library looks them up in a table of 2^16 places
    index = nearest(y, FLOAT8_LEVELS.to(W.device)).flatten()[: len(absmax)]
    return NF4(codes, index, W.shape, blocksize, mean, absmax2)


def dequantize_nf4(q):
    """level[code] * absmax, fp32 in the shape of W."""
    absmax = q.absmax
    if q.absmax2 is not None:
        absmax = FLOAT8_LEVELS.to(absmax.device)[absmax.long()] * q.absmax2.repeat_interleave(256)[: len(absmax)] + q.mean
    x = F.embedding(q.codes.int(), NF4_PAIRS.to(absmax.device)).view(-1, q.size).mul_(absmax[:, None])
    return x.flatten()[: q.shape.numel()].view(q.shape)


# ----------------------------------------------------------------------------------------------------------------
# Layers


class Through(torch.autograd.Function):
    """y = x W^T, dx = g W with the W of `layer`, unpacked for the product and forgotten: autograd would keep it for the backward pass,
    and with it of every layer at once."""
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))
    @staticmethod
    def backward(ctx, g):
        return g @ ctx.layer.weight.to(g.dtype), None


class QuantLinear(nn.Module):
    """A Linear that holds its weight as `q` (Int or NF4), the tensors of q as buffers. Frozen; a bias stays as it is.
    x (…, in) -> (…, out) in the dtype of x."""

    def __init__(self, linear, q):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        found = {f.name: getattr(q, f.name) for f in fields(q) if isinstance(getattr(q, f.name), torch.Tensor)}      # a buffer is named as its field
        for name, tensor in found.items():
            self.register_buffer(name, tensor)
        self.q = replace(q, **dict.fromkeys(found))          # shape and sizes alone: a tensor left in q would not follow .to(device)
        self.requires_grad_(False)
        self.train(linear.training)

    @property
    def weight(self):
        """(out, in) fp32, made anew each time."""
        q = replace(self.q, **dict(self.named_buffers()))    # put back, from wherever they are now
        return dequantize_nf4(q) if isinstance(q, NF4) else dequantize_int(q)

    def forward(self, x):
        y = Through.apply(x, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, {type(self.q).__name__}"


class NF4Linear(QuantLinear):
    def __init__(self, linear, blocksize=64, double=False):
        super().__init__(linear, quantize_nf4(linear.weight, blocksize, double))


# ----------------------------------------------------------------------------------------------------------------
# A model

METHODS = {"int8": lambda W: quantize_int(W, 8), "int4": lambda W: quantize_int(W, 4, 64, zero_point=True), "nf4": lambda W: quantize_nf4(W, double=True)}


def matrices(model):
    """{name: Linear} of what is quantised: all in the blocks but a router's gate, which is small and decides."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n.split(".") and not n.endswith(".gate")}


def quantize(model, method):
    """Put a QuantLinear in the place of each of `matrices`. For using the model: its weights train no more. Raises UserError for an unknown
    method and for a Linear with an adapter inside."""
    if method not in METHODS:
        raise UserError(f"--quantize {method} is unknown; use {', '.join(METHODS)}, or leave it out for the weights as they are")
    found = matrices(model)
    for name, linear in found.items():
        if not {n for n, _ in linear.named_parameters()} <= {"weight", "bias"}:
            raise UserError(f"--quantize {method}: {name} has an adapter inside; merge that first, or, as bitfit and adapter cannot be, leave --quantize out")
    for name, linear in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantLinear(linear, METHODS[method](linear.weight)))
    return model


def as_stored(model, stored, asked, path):
    """Make a fresh model ready for the weights of a checkpoint of nanollm.tools.quantize, whose meta.json says `stored`. Raises UserError
    unless whoever loads it has `asked` for the same: what trains or exports has not."""
    if stored and stored != asked:
        raise UserError(f"{path} holds {stored} weights: chat.py and evaluate.py take it with --quantize {stored}; for all else name the checkpoint that it "
                        "was made from")
    if stored:
        quantize(model, stored)


def weight_bytes(model):
    """Bytes of all that a checkpoint of the model would hold, a tied matrix counted once."""
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
