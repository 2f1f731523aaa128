"""Heads: a decoder that says something about a text instead of going on with it.

    sequence   one label for a text           read at the text's last token, the only one that has seen all of it
    token      one label for each word        read at the word's last token, for the same reason
    answer     where an answer stands         two numbers a token: an answer to the question begins here, it ends here

A head is one Linear on the normed hidden states, trained together with the body (Radford et al. 2018, section 3.2, for a decoder;
Devlin et al. 2019, section 4, for all three tasks). See docs/classify.md for what it costs that a decoder only looks back.
"""
import torch
import torch.nn as nn

from nanollm.losses import IGNORE_INDEX, cross_entropy

TASKS = ("sequence", "token", "answer")


class Classifier(nn.Module):
    """backbone (a Transformer, whose output layer goes) and a fresh head. tokens (B, T) -> logits (B, T, labels), fp32."""

    def __init__(self, backbone, task, labels):
        super().__init__()
        self.args, self.task, self.labels = backbone.args, task, list(labels)
        self.backbone = backbone
        self.backbone.output = None          # no vocabulary here: the embedding stays, the output matrix goes
        self.head = nn.Linear(backbone.args.dim, len(self.labels))
        nn.init.normal_(self.head.weight, std=0.02)          # all labels alike at first: the loss begins at the logarithm of their number
        nn.init.zeros_(self.head.bias)

    checkpointing = property(lambda self: self.backbone.checkpointing, lambda self, on: setattr(self.backbone, "checkpointing", on))

    def forward(self, tokens, segments=None):
        h = self.backbone.hidden(tokens, segments)                                        # (B, T, C)
        with torch.autocast(h.device.type, enabled=False):
            return self.head(h.float())                                                   # (B, T, labels)


# For the task `answer` the targets (B, T) are IGNORE_INDEX where no answer can stand (the question, padding), else BEGINS and ENDS, added up.
BEGINS, ENDS = 1, 2


def span_loss(logits, targets):
    """Two softmaxes over a row's places, not over labels: -(log p(begins at the true place) + log p(ends there)) / 2, a sum over rows
    (Devlin et al. 2019, section 4.2). logits (B, T, 2), targets (B, T) -> (sum in nats, number of rows with an answer, {})."""
    logp = places(logits, targets)                                                        # (B, T, 2)
    true = torch.stack([(targets == BEGINS) | (targets == BEGINS + ENDS), targets >= ENDS], dim=-1)
    return -(logp * true).sum() / 2, asked("answer", targets), {}


def asked(task, targets):
    """What the loss is divided by: rows with an answer, or labels."""
    return (targets > 0).any(1).sum() if task == "answer" else (targets != IGNORE_INDEX).sum()


def places(logits, targets):
    """log p of each place of a row, (B, T, 2); nearly minus infinity where no answer can stand."""
    return logits.float().masked_fill((targets == IGNORE_INDEX)[..., None], -1e9).log_softmax(1)


def classification_loss(task, logits, targets):
    """(sum, count, metrics) of any task; a sequence is a row with one target."""
    return span_loss(logits, targets) if task == "answer" else cross_entropy(logits, targets)


def decide(task, logits, targets, longest=64):
    """What the model says wherever something is asked: labels (n,), in the order of the targets; for `answer` (B, 2), first and last
    place of the likeliest span of at most `longest` tokens."""
    if task != "answer":
        return logits.argmax(-1)[targets != IGNORE_INDEX]
    begins, ends = places(logits, targets).unbind(-1)                                     # (B, T)
    T = begins.size(1)
    span = torch.ones(T, T, dtype=torch.bool, device=logits.device).triu().tril(longest - 1)
    score = (begins[:, :, None] + ends[:, None, :]).masked_fill(~span, float("-inf"))     # (B, T, T)
    best = score.flatten(1).argmax(1)
    return torch.stack([best // T, best % T], dim=1)
