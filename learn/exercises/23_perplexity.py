"""23  Perplexity: among how many tokens does the model hesitate?

中文：实现困惑度：所有文本所有词元的负对数概率取总平均，再取指数。

The loss of a token is -log of the probability that the model gave to it. Its mean over a text, put into exp, is the perplexity: a model
that always hesitates evenly between k tokens has perplexity k. The mean goes over all tokens of all texts. The mean of the texts' means,
or of their perplexities, is something else, which short texts dominate. Evaluation neither drops out neurons nor needs gradients.

    perplexity = exp( - (1 / N) * sum over all texts and tokens of log p(token | the tokens before it) )

Jelinek et al. 1977. The solution: `continuation_losses` and `loss_table` in nanollm/evaluation.py. Judge:  python -m learn.exercises 23
"""
import torch
import torch.nn.functional as F


def perplexity(model, texts):
    """model: tokens (1, T) -> logits (1, T, V); logits at position t are about token t + 1. texts: lists of token ids of different
    lengths; the first id of each is <|endoftext|>, which is given and not predicted. A text of one id has nothing to predict.

    -> a float. The model is in evaluation mode meanwhile (no dropout), and afterwards in the mode it was in."""
    # Hint 1: one text at a time: ids[:-1] go in, ids[1:] are what should come out.
    # Hint 2: F.cross_entropy(logits[0], targets, reduction="sum"); add up sums and numbers of tokens, divide once at the end.
    # Hint 3: was = model.training; model.eval(); …; model.train(was), and `with torch.no_grad():` around it all.
    raise NotImplementedError("write perplexity")
