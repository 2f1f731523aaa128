"""What a model knows: perplexity, bits per byte, generated answers, rewards. Multiple choice stands in choices.py, whatever needs no
model in metrics.py.

Every function takes a model and plain data and returns plain numbers; nothing is sampled without a seed, so two runs
give the same table. Log-probabilities are in nats unless a name says bits.
"""
import collections
import hashlib
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanollm import metrics
from nanollm.config import UserError
from nanollm.generate import generate_batch
from nanollm.losses import last_scores
from nanollm.tokenizer import render


@torch.no_grad()
def continuation_losses(model, pairs):
    """[(context ids, continuation ids)] -> for each a float tensor (len(continuation),) of -log p of its tokens.

    The one place where this file runs a model on given text. Contexts are not empty; context + continuation has at
    most max_seq_len + 1 tokens. Pairs that feed the model the same ids share one forward pass (four options of one
    token each cost one question). Rows of like length are padded on the right, where causal attention never looks.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    rows = {}                                                # input ids -> the pairs that read this row
    for i, (context, continuation) in enumerate(pairs):
        rows.setdefault((*context, *continuation)[:-1], []).append(i)
    order = sorted(rows, key=len)
    # the two large tensors are the hidden states and the logits: bound both, whatever the vocabulary
    budget = max(256, 2**24 // max(model.args.vocab_size, 4 * model.args.dim))
    losses, start = [None] * len(pairs), 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(order[end]) <= budget:
            end += 1
        batch, start = order[start:end], end
        tokens = torch.zeros(len(batch), len(batch[-1]), dtype=torch.long)
        for b, row in enumerate(batch):
            tokens[b, : len(row)] = torch.tensor(row)
        hidden = model.hidden(tokens.to(device))                                        # (B, T, C)
        wanted = [(b, i) for b, row in enumerate(batch) for i in rows[row]]
        picked = torch.cat([hidden[b, len(pairs[i][0]) - 1 : len(pairs[i][0]) - 1 + len(pairs[i][1])] for b, i in wanted])
        targets = torch.tensor([t for _, i in wanted for t in pairs[i][1]], device=device)
        nll = F.cross_entropy(model.output(picked).float(), targets, reduction="none").cpu()   # (N,)
        for (_, i), part in zip(wanted, nll.split([len(pairs[i][1]) for _, i in wanted])):
            losses[i] = part
    model.train(was_training)
    return losses


def pieces(data, tok, max_seq_len):
    """Documents as pairs for continuation_losses, each token predicted once, the first from the <|endoftext|> before it.
    data: a TokenFile with rows="documents", or an iterable of texts. What is longer than the context is cut into
    windows of max_seq_len that begin without memory."""
    if hasattr(data, "piece"):
        yield from ((inputs[:1].tolist(), targets.tolist()) for inputs, targets in map(data.piece, range(len(data.begin))))
        return
    for text in data:
        ids = [tok.eos_id] + tok.encode(text) + [tok.eos_id]
        for start in range(0, len(ids) - 1, max_seq_len):
            yield ids[start : start + 1], ids[start + 1 : start + 1 + max_seq_len]


def document_losses(model, tok, data, max_tokens=0):
    """What each document (see pieces) adds to a loss: float64 (D, 4), nats of all its tokens, their number, nats of those that are
    text (not the closing <|endoftext|>), its UTF-8 bytes. max_tokens 0 = all
    documents, else about so many tokens of them."""
    rows, row, seen = [], np.zeros(4), 0
    size = [len(tok.token_bytes(i)) for i in range(tok.vocab_size)]
    stream = pieces(data, tok, model.args.max_seq_len)
    while (part := list(itertools.islice(stream, 128))) and not (max_tokens and seen >= max_tokens):
        for (_, ids), nll in zip(part, continuation_losses(model, part)):
            weight = torch.tensor([size[t] for t in ids])
            row += (nll.sum().item(), len(ids), nll[weight > 0].sum().item(), int(weight.sum()))
            if ids[-1] == tok.eos_id:                                    # the piece that ends its document
                rows.append(row)
                row, seen = np.zeros(4), seen + row[1]
    rows = np.array(rows).reshape(-1, 4)
    if isinstance(data, list):                       # a tokenizer may put a blank in front: what counts is the text itself
        rows[:, 3] = [len(text.encode("utf-8", "surrogatepass")) for text in data[: len(rows)]]
    return rows


def bits_per_byte(sums):
    """Sums (..., 4) of document_losses -> (...)."""
    return sums[..., 2] / math.log(2) / np.maximum(sums[..., 3], 1)


def loss_table(rows):
    """document_losses as numbers: loss is the mean over tokens, EOS included; ppl = exp(loss) and depends on the tokenizer.
    bits_per_byte divides the bits of all text tokens by the UTF-8 bytes they stand for, which no choice of tokens can change: compare
    that, on the same documents, with low and high (metrics.bootstrap over documents) around it."""
    if not len(rows):
        raise UserError("there is no text to evaluate on: the split is empty")
    total, tokens, _, n_bytes = (sums := rows.sum(0)).tolist()
    low, high = metrics.bootstrap(rows, bits_per_byte)
    return {"loss": total / tokens, "ppl": math.exp(min(total / tokens, 700)), "bits_per_byte": float(bits_per_byte(sums)), "low": low, "high": high,
            "tokens": int(tokens), "bytes": int(n_bytes), "documents": len(rows)}


def lm_loss(model, tok, data, max_tokens=0):
    """Loss on held-out documents, each of which begins its window: loss_table of document_losses."""
    return loss_table(document_losses(model, tok, data, max_tokens))


def token_losses(model, tok, texts):
    """For each text: (ids incl. the closing <|endoftext|>, -log p of each)."""
    cut = [list(pieces([text], tok, model.args.max_seq_len)) for text in texts]
    losses = iter(continuation_losses(model, [pair for parts in cut for pair in parts]))
    return [([t for _, ids in parts for t in ids], torch.cat([next(losses) for _ in parts])) for parts in cut]


def loss_by_kind(model, tok, texts, parse):
    """The loss of each kind of token beside its floor: {kind: {"loss", "floor", "tokens"}} and "all" of them together.

    parse(text) -> an object with .spans [(start_char, end_char, kind, nats)], or None for a foreign text, which is
    left out. A token that writes any part of a choice is a choice, else a copy if it writes part of one, else grammar:
    a BPE token often begins before the word it decides (" red", "一只红色"). The nats of a span belong to its kind; the
    closing <|endoftext|> is grammar (the text before determines it).
    """
    known = [(text, parsed.spans) for text in texts if (parsed := parse(text)) is not None]
    if not known:
        raise UserError("no document could be parsed back: the data are not of the demo world")
    kinds = collections.defaultdict(lambda: {"loss": 0.0, "floor": 0.0, "tokens": 0})
    for (text, spans), (ids, nll) in zip(known, token_losses(model, tok, [text for text, _ in known])):
        at = list(itertools.accumulate((len(c.encode("utf-8")) for c in text), initial=0))         # character -> byte
        kind_of_byte = ["grammar"] * (at[-1] + 1)
        for start, end, kind, nats in spans:
            kind_of_byte[at[start] : at[end]] = [kind] * (at[end] - at[start])
            kinds[kind]["floor"] += nats
        byte = 0
        for token, loss in zip(ids, nll.tolist()):
            size = len(tok.token_bytes(token))
            kind = kinds[min(kind_of_byte[byte : byte + max(size, 1)], key=("choice", "copy", "grammar").index)]
            kind["loss"], kind["tokens"] = kind["loss"] + loss, kind["tokens"] + 1
            byte += size
    kinds["all"] = {key: sum(k[key] for k in kinds.values()) for key in ("loss", "floor", "tokens")}
    return {kind: {"loss": k["loss"] / max(k["tokens"], 1), "floor": k["floor"] / max(k["tokens"], 1), "tokens": k["tokens"]}
            for kind, k in kinds.items()}


# ---------------------------------------------------------------------------------------------------- a killed run

def weights_hash(model):
    """blake2b of all parameters, sizes and kinds of layers: a changed (or a quantised) model must not go on from another one's scores."""
    total = hashlib.blake2b(f"{model.args} {model}".encode(), digest_size=16)
    for name, p in sorted(model.state_dict().items()):
        total.update(name.encode() + p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Done(dict):
    """{number of a part: its result (JSON)}, kept in the file `log` as well (None: nowhere), a line a part, so that a killed run goes on
    behind its last one. Found are the parts that were done with the same weights and the same `work` (JSON: whatever the results depend on);
    a torn last line is dropped, and a file of anything else begun anew."""

    def __init__(self, log, model, work):
        self.log = Path(log) if log else None
        if not log:
            return
        key = hashlib.blake2b((weights_hash(model) + json.dumps(work)).encode(), digest_size=16).hexdigest()
        try:
            lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").split("\n")[:-1]] if self.log.exists() else []
            if lines[:1] == [{"key": key}]:
                self.update(lines[1:])
            elif lines:
                print(f"{log} is of another model, other questions or other options: asking from the beginning", flush=True)
        except (ValueError, TypeError):
            raise UserError(f"{log} is damaged; delete it and ask again") from None
        except OSError as e:
            raise UserError(f"{log} cannot be read: {e}; delete it and ask again") from None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        aside = self.log.with_name(self.log.name + ".tmp")
        aside.write_text("".join(json.dumps(line) + "\n" for line in [{"key": key}, *self.items()]), encoding="utf-8")
        os.replace(aside, self.log)

    def __setitem__(self, number, result):
        super().__setitem__(number, result)
        if self.log:
            with open(self.log, "a", encoding="utf-8") as f:
                f.write(json.dumps([number, result]) + "\n")


# ---------------------------------------------------------------------------------------------------- generation

def answers(model, tok, prompts, *args, **options):
    """The model's answers: [(text, whether it ended by itself)]. prompts: strings are continued as documents, lists of
    messages are answered as chats. For the rest see answer_ids."""
    ids = [[tok.eos_id] + tok.encode(p) if isinstance(p, str) else render(tok, p, add_generation_prompt=True)[0] for p in prompts]
    return [(tok.decode(answer), ended) for answer, ended in answer_ids(model, tok, ids, *args, **options)]


def answer_ids(model, tok, ids, max_new_tokens=128, temperature=0.0, seed=0, batch_size=64, log=None, **sampling):
    """[(new ids without the end token, whether it ended by itself)] after each prompt (a list of ids). temperature 0 is greedy;
    otherwise the same seed gives the same answers. log: a file from which a killed run goes on, batch by batch (see Done)."""
    was_training, out = model.training, [None] * len(ids)
    model.eval()
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))           # like lengths together: little padding
    done = Done(log, model, [ids, max_new_tokens, temperature, seed, batch_size, sampling, tok.stop_ids, str(generator.device)])
    if done:
        print(f"{min(len(done) * batch_size, len(ids))} of {len(ids)} answers stand in {log}", flush=True)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        if start in done:
            generator.set_state(torch.tensor(list(bytes.fromhex(done[start][2])), dtype=torch.uint8))
        else:
            new, stopped = generate_batch(model, [ids[i] for i in part], max_new_tokens, tok.pad_id, stop_ids=tok.stop_ids,
                                          generator=generator, temperature=temperature, **sampling)
            done[start] = [new, stopped, bytes(generator.get_state().tolist()).hex()]         # so that the next batch draws what it would have drawn
        for i, answer, ended in zip(part, *done[start][:2]):
            out[i] = (answer, ended)
    model.train(was_training)
    return out


def sample_prompts(model, tok, prompts, stage="pretrain", max_new_tokens=64):
    """Greedy texts for a few fixed prompts (strings), for the log: [{"prompt", "text"}]. A pretrained model goes on with
    the text; after any other stage the text is a user's message."""
    asked = prompts if stage == "pretrain" else [[{"role": "user", "content": p}] for p in prompts]
    return [{"prompt": p, "text": text} for p, (text, _) in zip(prompts, answers(model, tok, asked, max_new_tokens))]


def exact_match(rows, replies, correct):
    """Share of right answers, in all and by row["task"], and of answers that ended by themselves.
    replies: what answers() returned; correct(row, text) -> bool."""
    hits, tasks = [correct(row, text) for row, (text, _) in zip(rows, replies)], {}
    for row, hit in zip(rows, hits):
        tasks.setdefault(row.get("task", "all"), []).append(hit)
    return {**metrics.share(hits, "exact_match"), "stop_rate": sum(ended for _, ended in replies) / max(len(replies), 1),
            "by_task": {task: metrics.share(h, "exact_match") for task, h in sorted(tasks.items())}}


def win_rate(ratings, other):
    """Share of prompts on which `ratings` lies above `other`, a tie being half a win. Both are lists of numbers, one a prompt."""
    return sum(metrics.wins(ratings, other)) / max(len(ratings), 1)


def score_table(rewards, lengths):
    """rewards (2B, T) and lengths (2B,), chosen rows first -> (B, 4) float64 on the CPU: both scores, both lengths."""
    return torch.stack([*last_scores(rewards, lengths).chunk(2), *lengths.chunk(2)], 1).double().cpu()


def calibration_error(p, bins=10):
    """Expected calibration error of p (n,), the model's probabilities for what has happened (Guo et al. 2017, eq. 3). Each pair is
    seen from both sides, "chosen wins" with p and "rejected wins" with 1 - p, since always asking about the winner would make
    every answer yes: sum over bins of share * |hit rate - mean probability|. 0 = when it says 70 %, it is right in 70 %."""
    p, happened = torch.cat([p, 1 - p]), torch.cat([torch.ones_like(p), torch.zeros_like(p)])
    bin = (p * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=p.dtype).index_add(0, bin, happened - p)
    return float(gap.abs().sum() / len(p))


def reward_report(table):
    """How well a reward model ranks pairs, and whether it knows more than their lengths: numbers, explained in docs/reward_model.md.
    table: rows of score_table, (n, 4)."""
    scores, (c, r, *lengths) = table[:, :2], table.T
    d, longer = c - r, lengths[0] - lengths[1]
    related = float(torch.corrcoef(torch.stack([d, longer]))[0, 1]) if len(d) > 1 and d.std() > 0 and longer.std() > 0 else 0.0
    return {"nll": float(-F.logsigmoid(d).mean()), "accuracy": float((d > 0).double().mean()), "ties": float((d == 0).double().mean()),
            "chosen_mean_scores": float(c.mean()), "rejected_mean_scores": float(r.mean()), "margin": float(d.mean()),
            "score_mean": float(scores.mean()), "score_std": float(scores.std(correction=0)), "score_min": float(scores.min()),
            "score_max": float(scores.max()), "ece": calibration_error(torch.sigmoid(d)),
            "longer_wins": float((longer > 0).double().mean()), "length_correlation": related}


@torch.no_grad()
def away_from(base, model, reward, tok, prompts, answers):
    """Where alignment has taken a model that began as `base`, measured on answers [(ids, ended)] that it sampled at temperature 1:

    kl      mean over the answers of log p_model(answer) - log p_base(answer), in nats: an unbiased estimate of KL(model || base)
    reward  mean score of a reward model
    tokens  mean length, the end token included
    """
    full = [ids + [tok.end_id] * ended for ids, ended in answers]
    pairs = [(prompt, ids) for prompt, ids in zip(prompts, full) if ids]
    kl = sum((b.sum() - m.sum()).item() for m, b in zip(continuation_losses(model, pairs), continuation_losses(base, pairs)))
    device, score = next(reward.parameters()).device, 0.0
    for prompt, ids in zip(prompts, full):
        score += reward(torch.tensor([prompt + ids], device=device))[0, -1].item()
    return {"kl": kl / len(full), "reward": score / len(full), "tokens": sum(map(len, full)) / len(full)}


@torch.no_grad()
def rm_accuracy(model, pairs, batch_size=32):
    """How often a reward model scores the chosen answer above the rejected: metrics.share plus the mean margin and the share
    of ties. pairs: PreferenceRows."""
    device, table = next(model.parameters()).device, []
    for start in range(0, len(pairs), batch_size):
        ids, lengths, *_ = pairs.scored_batch(range(start, min(start + batch_size, len(pairs))))
        table.append(score_table(model(ids.to(device)), lengths.to(device)))
    table = torch.cat(table)
    report = reward_report(table)
    return metrics.share((table[:, 0] > table[:, 1]).tolist()) | {"margin": report["margin"], "ties": report["ties"]}
