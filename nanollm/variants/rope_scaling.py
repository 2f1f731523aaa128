"""RoPE for longer contexts than the model was trained on. It has no weights: put it on a trained model and train on,

    python train_pretrain.py --init_from OUT --variants rope_scaling:kind=yarn,factor=4,original=256

Beyond the trained length, slow pairs reach angles that the model has never seen. With s = factor and the frequencies
theta^(-2i/D) of Su et al. 2021:

    linear    all frequencies / s: positions are squeezed into the old range (Chen et al. 2023, arXiv:2306.15595, section 2.3)
    ntk       theta * s^(D/(D-2)): the slowest pair is squeezed by s, the fastest not at all ("NTK-aware"; Peng et al. 2023,
              arXiv:2309.00071, section 3.1)
    yarn      pairs that turn more than beta_fast times within the old context are left alone, those that turn less than
              beta_slow times are squeezed, the others mixed (section 3.2), and the scores made sharper by
              (0.1 ln s + 1)^2, here through the length of cos and sin (section 3.4)
    llama3    the same three groups, bounded by 4 turns and 1, mixed by the number of turns and not by the pair's number, and
              no sharper scores (Llama 3.1; Grattafiori et al. 2024, arXiv:2407.21783, has the theta, Meta's code the formula)
"""
import math

import torch

from nanollm.config import UserError


def scaled_frequencies(head_dim, theta, kind, factor, original, beta_fast=0.0, beta_slow=1.0, attention_factor=0.0):
    """(frequencies (D/2,) in radians a token, length of cos and sin). 0 stands for the kind's own beta_fast and attention_factor."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim               # (D/2,)
    freq = theta**-exponent
    if kind == "linear":
        return freq / factor, 1.0
    if kind == "ntk":
        return (theta * factor ** (head_dim / (head_dim - 2))) ** -exponent, 1.0
    if kind == "llama3":
        turns = original * freq / (2 * math.pi)              # within the old context
        squeeze = ((beta_fast or 4.0) - turns).div((beta_fast or 4.0) - beta_slow).clamp(0, 1)                   # 0 … 1
        return freq * (1 - squeeze) + freq / factor * squeeze, 1.0
    pair = lambda turns: head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))       # that turns so often
    low, high = max(math.floor(pair(beta_fast or 32.0)), 0), min(math.ceil(pair(beta_slow)), head_dim - 1)
    squeeze = ((torch.arange(head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)                     # 0 … 1
    return freq * (1 - squeeze) + freq / factor * squeeze, attention_factor or 0.1 * math.log(factor) + 1


def rope_scaling(model, kind="yarn", factor=4.0, original=0, context=0, beta_fast=0.0, beta_slow=1.0, attention_factor=0.0):
    """original: the context before, in tokens; the new one is `context`, or factor times that. Both 0: the model's max_seq_len is the new one."""
    args = model.args
    if kind not in ("linear", "ntk", "yarn", "llama3") or factor < 1 or min(original, context) < 0 or kind == "ntk" and args.head_dim == 2:
        raise UserError(f"--variants rope_scaling: kind {kind}, factor {factor}, original {original}: kind is linear, ntk, yarn or llama3 "
                        "and factor at least 1")
    args.max_seq_len = context or round(original * factor) or args.max_seq_len
    before = original or args.max_seq_len / factor
    freq, length = scaled_frequencies(args.head_dim, args.rope_theta, kind, factor, before, beta_fast, beta_slow, attention_factor)
    angle = torch.outer(torch.arange(args.max_seq_len, dtype=torch.float32), freq).repeat(1, 2)              # (max_seq_len, D)
    model.rope_cos, model.rope_sin = angle.cos() * length, angle.sin() * length
