"""A right attempt at each exercise, as a learner would write it, and five wrong ones: (what stands there, what a learner writes instead,
words of the hint that this must bring). ALSO_RIGHT: (what stands there, another way to write it)."""

ATTEMPTS = {
    "01": ('''
from collections import Counter
def merge_step(words, counts, new):
    total = Counter()
    for ids, n in zip(words, counts):
        for pair in zip(ids, ids[1:]):
            total[pair] += n
    if not total:
        return None, words
    best = min(total, key=lambda pair: (-total[pair], pair))
    merged = []
    for ids in words:
        out, i = [], 0
        while i < len(ids):
            if tuple(ids[i:i + 2]) == best:
                out.append(new)
                i += 2
            else:
                out.append(ids[i])
                i += 1
        merged.append(out)
    return best, merged
''', [
      ("+= n", "+= 1", "every word was counted once"),
      ("min(total, key=lambda pair: (-total[pair], pair))", "max(total, key=total.get)", "not the first that you met"),
      ("i += 2", "i += 1", "go on by two"),
      ("    if not total:\n        return None, words\n", "", "words of one token: .*ValueError"),
      ("for pair in zip(ids, ids[1:])", "for pair in zip(sum(words, []), sum(words, [])[1:])", "only across words")]),
    "02": ('''
from nanollm.corpus.minhash import EMPTY, fmix32
import numpy as np
def signature(hashes, a, b):
    if len(hashes) == 0:
        return np.full(len(a), EMPTY)
    return (a[:, None] * fmix32(hashes) + b[:, None]).min(1)
''', [
      (".min(1)", ".min(0)", "over the shingles, not over the permutations"),
      (".min(1)", ".max(1)", "this is the maximum"),
      (" + b[:, None]", "", "b is missing"),
      ("fmix32(hashes)", "hashes", "not mixed"),
      ("    if len(hashes) == 0:\n        return np.full(len(a), EMPTY)\n", "", "without shingles: .*ValueError"),
      ("a[:, None] * fmix32(hashes) + b[:, None]", "a[:, None].astype(np.int64) * fmix32(hashes).astype(np.int64) + b[:, None]", "modulo is missing"),
      (".min(1)", ".argmin(1)", "the place of the minimum")]),
    "03": ('''
import torch
def rms_norm(x, weight, eps):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.type_as(x) * weight
''', [
      ("y.pow(2).mean(-1, keepdim=True)", "y.pow(2).sum(-1, keepdim=True)", "sum instead of mean"),
      (" * weight", "", "gain `weight` is missing"),
      (" + eps", "", "eps is forgotten"),
      ("y = x.float()", "y = x - x.mean(-1, keepdim=True)", "LayerNorm"),
      ("torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)", "1 / (y.pow(2).mean(-1, keepdim=True).sqrt() + eps)", "inside the root"),
      ("y = x.float()", "y = x", "overflowed fp16"),
      ("y = x.float()", "y = x.float().detach()", "no gradient"),
      ("    y = x.float()", "    x *= 1.5\n    y = x.float()", "changes its input `x`"),
      ("    y = x.float()", "    raise SystemExit", "this ends the program")]),
    "04": ('''
import torch
def rope(x, positions, theta=10000.0):
    D = x.size(-1)
    freq = theta ** (-torch.arange(0, D, 2).float() / D)
    angle = torch.outer(positions.float(), freq)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.float().chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).type_as(x)
''', [
      ("x1 * cos - x2 * sin, x2 * cos + x1 * sin", "x1 * cos + x2 * sin, x2 * cos - x1 * sin", "turns the other way"),
      ("torch.arange(0, D, 2).float()", "torch.arange(D // 2).float()", "too slowly"),
      ("positions.float()", "torch.arange(x.size(2)).float()", "`positions` is not used"),
      ("theta ** (", "10000.0 ** (", "theta is not used"),
      ("x1, x2 = x.float().chunk(2, -1)", "x1, x2 = x.float()[..., 0::2], x.float()[..., 1::2]", "here they are halves"),
      ("positions.float()", "positions.float() + 1", "counted from 1"),
      (".type_as(x)", "", "came back as float32")]),
    "05": ('''
import math, torch
def attention(q, k, v):
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return probs @ v
''', [
      (" / math.sqrt(D)", "", "sqrt.D. = 4 times too large"),
      ("math.sqrt(D)", "D", "not by D"),
      ('.masked_fill(~mask, float("-inf"))', "", "no mask is applied"),
      (".tril()", ".tril(-1)", "diagonal"),
      ("softmax(-1)", "softmax(-2)", "over the keys"),
      ('float("-inf")', "0.0", "must be -inf"),
      (".tril()", ".tril(1)", "leaks the future: when only the last"),
      ("return probs @ v", "return probs", "those are the weights")]),
    "06": ('''
import torch.nn.functional as F
def grouped_query_attention(q, k, v):
    n = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
''', [
      ("k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)", "k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1)", "0 1 0 1"),
      (", is_causal=True", "", "leaks the future"),
      ("k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)", "k[:, :1].expand_as(q), v[:, :1].expand_as(q)", "head 0"),
      ("is_causal=True", "is_causal=True, scale=1.0", "divide the scores by sqrt"),
      ("    k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)\n", "    q = q[:, :: n]\n", "only G heads"),
      ("v.repeat_interleave(n, dim=1)", "v.repeat(1, n, 1, 1)", "different orders")]),
    "07": ('''
import torch
class KVCache:
    def __init__(self):
        self.kv = {}
    @property
    def length(self):
        return next(iter(self.kv.values()))[0].size(2) if self.kv else 0
    def extend(self, layer, k, v):
        if layer in self.kv:
            k, v = torch.cat((self.kv[layer][0], k), 2), torch.cat((self.kv[layer][1], v), 2)
        self.kv[layer] = k, v
        return k, v
''', [
      ("(self.kv[layer][0], k), 2", "(k, self.kv[layer][0]), 2", "in front of the old"),
      ("(self.kv[layer][0], k), 2", "(self.kv[layer][0], k), 1", "Sizes of tensors"),
      ("    def __init__(self):\n        self.kv = {}\n", "    kv = {}\n", "shared by all caches"),
      (".size(2) if", ".size(1) if", "wrong axis"),
      ("if layer in self.kv:\n            k, v = torch.cat((self.kv[layer][0], k), 2), torch.cat((self.kv[layer][1], v), 2)", "pass", "only the new tokens"),
      ("extend(self, layer, k, v):\n", "extend(self, layer, k, v):\n        layer = 0\n", "share one store"),
      ("    @property\n", "", "method")]),
    "08": ('''
import torch.nn.functional as F
def swiglu_ffn(x, w1, w2, w3):
    gate, up = F.linear(x, w1), F.linear(x, w3)
    return F.linear(F.silu(gate) * up, w2)
''', [
      ("F.silu(gate) * up", "gate * F.silu(up)", "swapped"),
      ("F.silu(gate)", "F.sigmoid(gate)", "bare sigmoid"),
      ("F.silu(gate)", "F.gelu(gate)", "GEGLU"),
      ("F.silu(gate) * up", "F.silu(gate) + up", "a gate multiplies"),
      ("F.linear(F.silu(gate) * up, w2)", "F.silu(gate) * up", "w2 is missing"),
      ("F.silu(gate) * up", "F.silu(gate) * F.silu(up)", "both paths"),
      ("F.silu(gate)", "gate", "nonlinearity is missing")]),
    "09": ('''
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
def part(h, w, t):
    return F.cross_entropy(h @ w.T, t, ignore_index=-100, reduction="sum")
def chunked_cross_entropy(hidden, weight, targets, chunk):
    total = torch.zeros(())
    for i in range(0, len(hidden), chunk):
        total = total + checkpoint(part, hidden[i:i + chunk], weight, targets[i:i + chunk], use_reentrant=False)
    return total, (targets != -100).sum()
''', [
      ('"sum")', '"mean")', "sum of the chunks' means"),
      ("len(hidden), chunk", "len(hidden) - chunk + 1, chunk", "last, shorter chunk is left out"),
      ("(targets != -100).sum()", "len(targets)", "count too"),
      ("checkpoint(part, hidden[i:i + chunk], weight, targets[i:i + chunk], use_reentrant=False)", "part(hidden[i:i + chunk], weight, targets[i:i + chunk])",
       "wrap each chunk"),
      ("return total,", "return total.item(),", "not differentiable"),
      ("return total,", "return total / len(hidden),", "mean over the tokens"),
      ("total = total + checkpoint(part, hidden[i:i + chunk], weight, targets[i:i + chunk], use_reentrant=False)",
       "total = total + F.cross_entropy((hidden @ weight.T)[i:i + chunk], targets[i:i + chunk], reduction='sum')",
       "22 rows of logits were there at once"), ("use_reentrant=False)", "use_reentrant=False) / (targets[i:i + chunk] != -100).sum()", "chunks' means")]),
    "10": ('''
def adamw_step(p, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    p = p - lr * weight_decay * p
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v
''', [
      ("m / (1 - beta1**t)", "m", "bias correction of m is forgotten"),
      ("v / (1 - beta2**t)", "v", "bias correction of v is forgotten"),
      ("    p = p - lr * weight_decay * p\n", "    grad = grad + weight_decay * p\n", "Adam with L2"),
      ("(v_hat.sqrt() + eps)", "(v_hat + eps).sqrt()", "outside the root"),
      ("grad**2", "grad", "square is missing"),
      ("lr * weight_decay * p", "weight_decay * p", "multiplied by lr"),
      ("v_hat.sqrt()", "v_hat", "root is missing"),
      ("return p -", "return p +", "uphill"),
      ("    m = beta1 * m + (1 - beta1) * grad", "    m *= beta1\n    m += (1 - beta1) * grad", "changes its input `m`")]),
    "11": ('''
import math
def lr_at(it, peak, low, warmup, total):
    if it < warmup:
        return peak * it / warmup
    if it >= total:
        return low
    done = (it - warmup) / (total - warmup)
    return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2
''', [
      ("    if it < warmup:\n        return peak * it / warmup\n", "", "warmup is missing"),
      ("    if it >= total:\n        return low\n", "", "rises again"),
      ("done = (it - warmup) / (total - warmup)", "done = it / total", "under the warmup"),
      ("low + (peak - low) *", "peak *", "falls to 0"),
      ("    if it < warmup:", "    if it <= warmup:", "warmup = 0: .*ZeroDivisionError"),
      ("it / warmup", "(it + 1) / warmup", "counts from 1"),
      ("math.pi * done", "2 * math.pi * done", "whole cosine")]),
    "12": ('''
import torch
def scaler_step(grads, scale, streak, interval, growth=2.0, backoff=0.5):
    if not all(torch.isfinite(g).all() for g in grads):
        return None, scale * backoff, 0
    grads = [g / scale for g in grads]
    if streak + 1 == interval:
        return grads, scale * growth, 0
    return grads, scale, streak + 1
''', [
      ("g / scale", "g * scale", "divide"),
      ("not all(torch.isfinite(g).all() for g in grads)", "any(torch.isnan(g).any() for g in grads)", "isnan alone"),
      ("return None, scale * backoff, 0", "return None, scale * backoff, streak", "in a row"),
      ("streak + 1 == interval", "streak == interval", "100th good update"),
      ("scale * growth, 0", "scale * growth, streak + 1", "begin anew after growth"),
      ("for g in grads)", "for g in grads[:1])", "look at all gradients"),
      ("[g / scale for g in grads]", "[g.div_(scale) for g in grads]", "changes its input `grads`"),
      ("scale * backoff", "scale", "must fall"),
      ("g / scale for", "g / (scale * growth if streak + 1 == interval else scale) for", "divided by the next scale")]),
    "13": ('''
import torch
import torch.nn.functional as F
def accumulate(model, batches):
    model.zero_grad()
    count = sum((t != -100).sum() for _, t in batches)
    total = 0.0
    for inputs, targets in batches:
        n = (targets != -100).sum()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total
''', [
      ("/ count", "/ n / len(batches)", "mean of means"),
      (' / count', "", "sum instead of mean"),
      ("    model.zero_grad()\n", "", "old gradients"),
      ("        n =", "        model.zero_grad()\n        n =", "only the last micro-batch"),
      ("/ count", "/ len(batches)", "number of micro-batches"),
      ("loss.backward()\n", "(loss / len(batches)).backward()\n", "once is enough"),
      ("loss.item()", "loss", "still carries its graph"),
      ("/ count", "/ sum(t.numel() for _, t in batches)", "padding too"),
      ("        loss.backward()\n        total += loss.item()\n    return total", "        total = total + loss\n    total.backward()\n    return total.item()",
       "the graphs of both are in memory")]),
    "14": ('''
import torch
def average_gradients(parameters, world_size, all_reduce):
    bucket = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).detach()
    all_reduce(bucket)
    bucket /= world_size
    for p, part in zip(parameters, bucket.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
''', [
      ("    bucket /= world_size\n", "", "sum over the ranks"),
      ("    bucket = torch.cat", "    parameters = [p for p in parameters if p.grad is not None]\n    bucket = torch.cat", "None must be sent as zeros"),
      ("        p.grad = part.view_as(p)", "        pass", "not written back"),
      ("p.grad).flatten()", "p).flatten()", "weights were averaged"),
      ("    all_reduce(bucket)\n", "", "not called"),
      ("    all_reduce(bucket)\n", "    for part in bucket.split([p.numel() for p in parameters]):\n        all_reduce(part)\n", "one flat bucket"),
      ("all_reduce(bucket)", "all_reduce(bucket.clone())", "on a copy")]),
    "15": ('''
def chat_targets(tok, messages):
    ids, mask = [], []
    def add(segment, learnt):
        ids.extend(segment)
        mask.extend([learnt] * len(segment))
    for m in messages:
        add([tok.im_start_id] + tok.encode(m["role"] + "\\n"), False)
        add(tok.encode(m["content"]) + [tok.im_end_id], m["role"] == "assistant")
        add(tok.encode("\\n"), False)
    return ids[:-1], [t if learnt else -100 for t, learnt in zip(ids[1:], mask[1:])]
''', [
      ('m["role"] == "assistant"', "True", "user's words"),
      ('+ [tok.im_end_id], m["role"] == "assistant")', ', m["role"] == "assistant")\n        add([tok.im_end_id], False)', "never learn to stop"),
      ("zip(ids[1:], mask[1:])", "zip(ids[1:], mask)", "mask is not shifted"),
      ("zip(ids[1:], mask[1:])", "zip(ids[:-1], mask[:-1])", "not shifted: target t"),
      ('add(tok.encode("\\n"), False)', 'add(tok.encode("\\n"), m["role"] == "assistant")', "newline behind"),
      ('"\\n"), False)\n        add(tok.encode(m["content"])', '"\\n"), m["role"] == "assistant")\n        add(tok.encode(m["content"])', "the header"),
      ("ids[:-1], [", "ids, [", "inputs = ids"),
      ("else -100", "else 0", "0 is a token"),
      ('m["role"] == "assistant")', 'm is messages[-1])', "only the last answer")]),
    "16": ('''
import torch
import torch.nn as nn
import torch.nn.functional as F
class LoRALinear(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)
''', [
      ("torch.zeros(base", "torch.randn(base", "lora_B must begin at zero"),
      ("torch.randn(r,", "torch.zeros(r,", "both zero"),
      ("base.requires_grad_(False)", "base", "not frozen"),
      ("self.scale * ", "", "scale is missing"),
      ("alpha / r\n", "alpha / r**0.5\n", "rsLoRA"),
      ("(r, base.in_features)", "(base.in_features, r)", "wrong shape"),
      ("self.base(x) +", "F.linear(x, self.base.weight) +", "bias of the base layer is lost"),
      ("alpha / r\n", "alpha\n", "the scale is alpha;"),
      ("torch.randn(r,", "torch.ones(r,", "lora_A has rank 1, not r = 4"),
      ("self.lora_A), self", "self.lora_A.detach()), self", "lora_A gets no gradient although")]),
    "17": ('''
import torch
import torch.nn.functional as F
def reward_loss(rewards, lengths):
    scores = rewards.gather(1, (lengths - 1)[:, None]).squeeze(1)
    chosen, rejected = scores.chunk(2)
    return -F.logsigmoid(chosen - rejected).sum(), len(chosen)
''', [
      ("rewards.gather(1, (lengths - 1)[:, None]).squeeze(1)", "rewards[:, -1]", "which is padding"),
      ("chosen - rejected", "rejected - chosen", "swapped"),
      ("scores.chunk(2)", "scores[0::2], scores[1::2]", "neighbours"),
      ("F.logsigmoid(chosen - rejected)", "torch.log(torch.sigmoid(chosen - rejected))", "F.logsigmoid computes it"),
      (".sum(), len", ".mean(), len", "mean instead of sum"),
      ("(lengths - 1)", "(lengths - 2).clamp(min=0)", "off by one"),
      ("len(chosen)", "len(scores)", "2B rows are B pairs")]),
    "18": ('''
import torch
import torch.nn.functional as F
def dpo_loss(logps, ref_logps, beta):
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).sum()
''', [
      ("logps - ref_logps", "logps", "reference is not subtracted"),
      ("beta * (chosen - rejected)", "chosen - rejected", "beta is missing"),
      ("chosen - rejected)", "rejected - chosen)", "swapped"),
      ("F.logsigmoid(beta * (chosen - rejected))", "torch.log(torch.sigmoid(beta * (chosen - rejected)))", "F.logsigmoid computes it"),
      (".sum()", ".mean()", "mean instead of sum"),
      ("beta * (chosen - rejected)", "(chosen - rejected) / beta", "multiply"),
      ("return -F", "return F", "wrong sign"),
      ("(logps - ref_logps)", "(logps - ref_logps).detach()", "not differentiable")]),
    "19": ('''
import torch
def gae(rewards, values, mask, gamma, lam):
    out, after, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = (delta + gamma * lam * after) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        out[:, t] = after
    return out, (out + values) * mask
''', [
      ("reversed(range(values.size(1)))", "range(values.size(1))", "runs forwards"),
      ("gamma * lam * after", "gamma * after", "lam is missing"),
      (" + gamma * lam * after", "", "only the own step"),
      ("(delta + gamma * lam * after) * mask[:, t]", "delta + gamma * lam * after", "the mask is not used, or too late"),
      ("next_value = values[:, t] * mask[:, t]", "next_value = values[:, t]", "its value leaks in"),
      ("(out + values) * mask", "out", "the returns are the advantages"),
      ("gamma * next_value", "next_value", "gamma is missing in front"),
      ("(out + values) * mask", "out + values", "must be 0")]),
    "20": ('''
import torch
def ppo_loss(logps, old_logps, advantages, mask, clip):
    ratio = torch.exp((logps - old_logps) * mask)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(surrogate * mask).sum(), mask.sum()
''', [
      ("torch.min", "torch.max", "not the larger"),
      ("return -(", "return (", "wrong sign"),
      ("torch.exp((logps - old_logps) * mask)", "(logps - old_logps)", "exp is missing"),
      ("(surrogate * mask)", "surrogate", "mask is forgotten"),
      ("torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)", "ratio.clamp(1 - clip, 1 + clip) * advantages", "without the minimum"),
      ("1 - clip, 1 + clip", "0.8, 1.2", "clip is not used"),
      ("torch.exp((logps - old_logps) * mask)", "torch.exp(logps - old_logps)", "before exp"),
      ("mask.sum()", "mask.numel()", "all places were counted")]),
    "21": ('''
import torch.nn.functional as F
def kd_loss(student_logits, teacher_logits, targets, temperature):
    at = targets != -100
    student = F.log_softmax(student_logits[at] / temperature, -1)
    teacher = F.log_softmax(teacher_logits[at] / temperature, -1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum"), at.sum()
''', [
      ("temperature**2 * ", "", "T.2 is missing"),
      ("kl_div(student, teacher,", "kl_div(teacher, student,", "direction is turned round"),
      ('"sum"', '"batchmean"', "batchmean"),
      ("at = targets != -100", "at = targets > -1000", "padding counts too"),
      ("student_logits[at] / temperature", "student_logits[at]", "only the teacher"),
      ("log_target=True, ", "", "log_target=True"),
      ("student = F.log_softmax", "student = F.softmax", "wants log-probabilities"),
      ("temperature**2", "temperature", "should be T.2")]),
    "22": ('''
import torch
def top_p(logits, p):
    probs = logits.softmax(-1)
    values, indices = probs.sort(-1, descending=True)
    kept = values * (values.cumsum(-1) - values < p)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, indices, kept)
''', [
      ("values.cumsum(-1) - values < p", "values.cumsum(-1) <= p", "crosses p was left out"),
      ("    kept = kept / kept.sum(-1, keepdim=True)\n", "", "scaled to add up to 1"),
      ("return torch.zeros_like(probs).scatter(-1, indices, kept)", "return kept", "order of the vocabulary"),
      (", descending=True", "", "from the smallest up"),
      ("values.cumsum(-1) - values < p", "values < p", "nothing was left out"),
      ("probs.sort(-1, descending=True)", "probs, torch.arange(probs.size(-1)).expand_as(probs)", "not sorted")]),
    "23": ('''
import math, torch
import torch.nn.functional as F
def perplexity(model, texts):
    was, total, n = model.training, 0.0, 0
    model.eval()
    with torch.no_grad():
        for ids in texts:
            if len(ids) < 2:
                continue
            logits = model(torch.tensor([ids[:-1]]))[0]
            loss = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            total, n = total + loss.item(), n + len(ids) - 1
    model.train(was)
    return math.exp(total / n)
''', [
      ("math.exp(total / n)", "total / n", "perplexity is exp of it"),
      ("torch.tensor(ids[1:])", "torch.tensor(ids[:-1])", "shift is missing"),
      ("    model.eval()\n", "", "dropout was on"),
      ('reduction="sum")\n            total, n = total + loss.item(), n + len(ids) - 1',
       'reduction="mean")\n            total, n = total + loss.item(), n + 1', "texts' means"),
      ("    model.train(was)\n", "", "comes back in evaluation mode"),
      ("n + len(ids) - 1", "n + len(ids)", "is not predicted"),
      ("with torch.no_grad():", "if True:", "builds a graph"),
      ("            if len(ids) < 2:\n                continue\n", "", "one id has nothing to predict: .*attempt.py")]),
}

ALSO_RIGHT = {
    "07": [("self.kv = {}\n", "self.kv, self.position, self.segments = {}, 0, 3\n")],
    "13": [("model.zero_grad()", "for p in model.parameters():\n        p.grad = torch.zeros_like(p)"),
           ("loss.backward()", "for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):\n"
            "            p.grad = g if p.grad is None else p.grad + g")],
}
