"""22  Top-p sampling: choose only among the tokens that matter.

中文：实现 top-p（核）采样的过滤：保留概率之和达到 p 的最小词元集合，其余置零后重新归一化。

A model gives every one of its 50,000 tokens a little probability, and all the absurd ones together are drawn every few words. Always taking the likeliest is
dull and runs in circles. Top-p keeps the smallest set of likeliest tokens whose probabilities add up to p: two tokens where the model is sure, hundreds
where it is not. The token that crosses p belongs to the set, so at least one is always left. The kept ones are scaled to add up to 1.

    sort p_1 >= p_2 >= …;     token i is kept  if  p_1 + … + p_{i-1} < p,    that is, if what lies before it does not yet reach p

Holtzman et al. 2020, section 3.1 (arXiv:1904.09751). The solution: `sample` in nanollm/generate.py. Judge:  python -m learn.exercises 22
"""
import torch


def top_p(logits, p):
    """logits (B, V). p in (0, 1]. -> the probabilities to draw from (B, V), in the order of the vocabulary; 0 for what is left out."""
    # Hint 1: probs.sort(-1, descending=True) gives the values and where they came from (indices).
    # Hint 2: values.cumsum(-1) - values is what lies before each token.
    # Hint 3: back into the order of the vocabulary: torch.zeros_like(probs).scatter(-1, indices, kept_values).
    raise NotImplementedError("write top_p")
