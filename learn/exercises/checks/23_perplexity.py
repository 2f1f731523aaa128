"""What is asked of exercise 23, and the solution: nanollm.evaluation.continuation_losses and loss_table."""
import math

import torch
import torch.nn.functional as F

from learn.exercises.judge import Hint, on, randint, same
from nanollm.evaluation import continuation_losses
from nanollm.model import ModelArgs, Transformer

NAME = "perplexity"
V = 16


def reference(model, texts):
    losses = torch.cat(continuation_losses(model, [(ids[:1], ids[1:]) for ids in texts if len(ids) > 1]))
    return math.exp(losses.mean())


def a_model(dropout=0.0):
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=V, max_seq_len=32, multiple_of=8, dropout=dropout))
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(40)                     # a model with opinions
    return model


def given(*lengths):
    return [[0, *randint(V, n - 1, seed=n).tolist()] for n in lengths]


def even(attempt):
    """a model that knows nothing: perplexity V"""
    model = a_model()
    with torch.no_grad():
        model.tok_embeddings.weight.zero_()
    same(attempt(model, given(5, 9)), float(V), f"the perplexity of a model that gives each of the {V} tokens 1/{V}", "", {
        "this is the mean loss in nats; the perplexity is exp of it": math.log(V),
        "this is the mean loss in bits; the perplexity is exp of the mean in nats": 4.0,
        "2 to the power of a loss in nats: either 2 and bits, or e and nats": 2 ** math.log(V), "wrong sign: exp(-mean log p)": 1 / V,
        "divided by the number of ids; the first of each text is not predicted": math.exp(12 / 14 * math.log(V)),
        "the loss was added up, not averaged": math.exp(12 * math.log(V))})


def values(attempt):
    """exp of the mean over all tokens of all texts"""
    model, texts = a_model().eval(), given(3, 20, 9)
    with torch.no_grad():
        logits = [model(torch.tensor([ids]))[0] for ids in texts]
        nll = [F.cross_entropy(z[:-1], torch.tensor(ids[1:]), reduction="none") for z, ids in zip(logits, texts)]
        same_place = [F.cross_entropy(z, torch.tensor(ids), reduction="none") for z, ids in zip(logits, texts)]
    every, counts = torch.cat(nll), torch.tensor([len(ids) for ids in texts])
    same(attempt(model, texts), reference(model, texts), "the perplexity", "", {
        "the mean of the texts' means: short texts count too much; add up all losses and divide once by all tokens":
            math.exp(torch.stack([x.mean() for x in nll]).mean()),
        "the mean of the texts' perplexities: take the mean of the losses first, exp once at the end": torch.stack([x.mean().exp() for x in nll]).mean().item(),
        "the mean of the tokens' exp(loss): exp comes after the mean": every.exp().mean().item(),
        "the shift is missing: logits at t are about token t + 1, so compare logits[:-1] with ids[1:]": math.exp(torch.cat(same_place).mean()),
        "the shift is missing: the model is asked for the token that it has just read": math.exp(torch.cat([x[:-1] for x in same_place]).mean()),
        "the shift is missing: the model is asked for the token that it has just read ": math.exp(torch.cat([x[1:] for x in same_place]).mean()),
        "the shift goes the wrong way: logits at t are about token t + 1, not t - 1":
            math.exp(torch.cat([F.cross_entropy(z[1:], torch.tensor(ids[:-1]), reduction="none") for z, ids in zip(logits, texts)]).mean()),
        "divided by the number of ids; the first of each text is not predicted": math.exp(every.sum() / counts.sum()),
        "divided by the number of texts, not of tokens": math.exp(min(700, every.sum() / 3)),
        "only the last text counts: add up over the texts": math.exp(nll[-1].mean()),
        "only the first text counts; is the `return` inside the loop?": math.exp(nll[0].mean()),
        "this is the mean loss; the perplexity is exp of it": every.mean().item()}, 1e-3)


def single(attempt):
    """a text of one id has nothing to predict"""
    model, texts = a_model().eval(), given(9, 1, 5)
    with on("a text that is only <|endoftext|>"):
        same(attempt(model, texts), reference(model, texts), "the perplexity", tolerance=1e-3)


def dropout(attempt):
    """without dropout, and the mode is given back"""
    for training in (True, False):
        model, texts = a_model(0.5).train(training), given(9, 20)
        got = attempt(model, texts)
        if model.training != training:
            raise Hint("the model was in training mode and comes back in evaluation mode: the loop that called you would go on without dropout" if training else
                       "the model was in evaluation mode and comes back in training mode: remember model.training and give it back")
        same(got, reference(model, texts), "the perplexity of a model with dropout", mistakes=None if not training else {
            "dropout was on: model.eval() first": got if abs(float(got) - reference(model, texts)) > 1e-3 else math.nan}, tolerance=1e-3)


def no_graph(attempt):
    """no graph is kept"""
    model, seen = a_model(), []
    model.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    got = attempt(model, given(9, 5))
    if any(seen):
        raise Hint("the forward pass builds a graph that nobody will use: with torch.no_grad(), or memory runs out on a long evaluation")
    if isinstance(got, torch.Tensor) and got.numel() != 1:
        raise Hint("return one number")


CHECKS = [even, values, single, dropout, no_graph]
