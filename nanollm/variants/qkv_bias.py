"""Biases on the projections to queries, keys and values, as in Qwen2 (Yang et al. 2024, arXiv:2407.10671, section 2.2.1), where all
other biases of the transformer are gone; with output=true on wo, too, as LLaMA files with `attention_bias` have them."""
import torch.nn as nn


def qkv_bias(model, output=False):
    for block in model.layers:
        for name in ("wq", "wk", "wv", "wo")[: 3 + output]:
            plain = getattr(block.attention, name)
            plain.bias = nn.Parameter(plain.weight.new_zeros(plain.out_features))
