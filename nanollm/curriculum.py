"""How difficult each row of a token file is, and the files that hold rows in that order.

    length               mean length of the documents that the row's tokens belong to
    unigram              sum over the row of -log p(w), p(w) = count(w) / number of tokens: rare words are hard
    bigram, trigram      the same of whole n-grams: p(w1 w2 w3) = count(w1 w2 w3) / number of trigrams, the joint frequency,
                         not the conditional probability of the last word (Campos 2021, section 3)
    unigram_perplexity   exp(-1/n sum log p(w)), what CLIMB begins with (Martinez et al. 2023)
    model                the perplexity of a trained model, what CLIMB goes on with

Only the rank counts: epsilon = the share of the rows that are not harder (the empirical distribution function), in (0, 1].
What a run does with the order is mixture.Curriculum.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from nanollm.config import UserError
from nanollm.losses import sequence_logps
from nanollm.mixture import Curriculum, Mixture

MEASURES = ("length", "unigram", "bigram", "trigram", "unigram_perplexity", "model")
CHUNK = 2 ** 20                   # tokens looked at together
TABLE = 2 ** 24                   # counters for n-grams; where more are possible, several share one


def ngrams(tokens, n, vocab_size, eos_id):
    """The n-gram that ends at each of tokens[n - 1 :]: (its counter in 0..TABLE - 1, whether it lies in one document). An
    end-of-text token may stand at its end, not before. Counters are exact while vocab_size^n <= 2^24; beyond, n-grams are
    hashed to counters, and one that shares its counter with a common one looks common too."""
    length = len(tokens) - n + 1
    key, inside = np.zeros(length, np.uint64), np.ones(length, bool)
    for k in range(n):
        words = tokens[k : k + length]
        key = key * np.uint64(vocab_size) + words.astype(np.uint64)
        inside &= (words != eos_id) | (k == n - 1)
    if vocab_size ** n > TABLE:
        key = (key ^ (key >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)     # the upper 24 bits mix best
    return key.astype(np.int64), inside


def chunks(data, n):
    """(number of the first n-gram's last token, tokens) so that each n-gram of the file is in one chunk."""
    for begin in range(0, len(data.tokens), CHUNK):
        first = max(0, begin - n + 1)
        tokens = data.tokens[first : begin + CHUNK]
        if len(tokens) >= n:
            yield first + n - 1, tokens


def ngram_counts(data, n):
    """(how often each counter's n-grams occur, int64 array; number of n-grams) over the whole file."""
    V, eos = data.meta["vocab_size"], data.meta["eos_id"]
    counts = np.zeros(min(V ** n, TABLE), np.int64)
    for _, tokens in chunks(data, n):
        key, inside = ngrams(tokens, n, V, eos)
        np.add.at(counts, key[inside], 1)
    return counts, int(counts.sum())


def difficulty(data, measure):
    """How difficult each row of a TokenFile is, float64 (rows,); measure: one of MEASURES but model."""
    if measure not in MEASURES[:-1]:
        raise UserError(f"--curriculum {measure} is unknown; use {', '.join(MEASURES)}, with a minus in front for hard to easy")
    begin, end, row = data.spans()
    total, size = np.zeros(len(data)), np.zeros(len(data))
    np.add.at(size, row, end - begin)
    n = {"bigram": 2, "trigram": 3}.get(measure, 1)
    if measure == "length":
        ends = data.ends[:]
        lengths = np.diff(ends, prepend=0)
    else:
        counts, all_ngrams = ngram_counts(data, n)
    for at, tokens in chunks(data, n):
        places = at + np.arange(len(tokens) - n + 1)
        if measure == "length":
            scores = lengths[np.searchsorted(ends, places, side="right")].astype(float)
        else:
            key, inside = ngrams(tokens, n, data.meta["vocab_size"], data.meta["eos_id"])
            scores = np.where(inside, -np.log(np.maximum(counts[key], 1) / max(1, all_ngrams)), 0.0)
        span = np.searchsorted(begin, places, side="right") - 1
        target = (span >= 0) & (places < end[span])                  # the first token and the tail of a stream are none
        np.add.at(total, row[span[target]], scores[target])
    return total / size if measure == "length" else np.exp(total / size) if measure == "unigram_perplexity" else total


@torch.no_grad()
def model_difficulty(model, data, ctx, autocast, batch_size):
    """Mean -log p of each row's targets under the model, float32 (rows,), the logarithm of its perplexity; the rows spread
    over the ranks, the result on all of them."""
    loss = torch.zeros(len(data))
    model.eval()
    for batch in ctx.share([range(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]):
        inputs, targets, segments = (t if t is None else t.to(ctx.device) for t in data.batch(batch))
        with autocast():
            logps, counts = sequence_logps(model(inputs, segments), targets)
        loss[list(batch)] = (-logps / counts).float().cpu()
    model.train()
    return ctx.sum(loss).cpu().numpy()


def easiest_first(difficulties, hardest=False):
    """Row numbers (uint32) from easy to hard, equals in the order of the file; hardest: from hard to easy. The row at place k
    has epsilon = (k + 1) / n."""
    order = np.argsort(difficulties, kind="stable")
    return (order[::-1] if hardest else order).astype(np.uint32)


def identity(data):
    """What an order belongs to: these token files, cut in this way."""
    digest = hashlib.blake2b((data.directory / f"{data.split}.json").read_bytes(), digest_size=16).hexdigest()
    return {"tokens": digest, "rows": data.rows, "max_seq_len": data.T, "n_rows": len(data)}


def save_order(path, order, data, **about):
    """Write order.u32 (row numbers, little-endian uint32) and order.json, each aside and then renamed."""
    path = Path(path)
    for file, raw in ((path, order.astype("<u4").tobytes()), (path.with_suffix(".json"), json.dumps({**about, **identity(data)}, indent=1).encode("utf-8"))):
        aside = Path(f"{file}.tmp")
        aside.write_bytes(raw)
        os.replace(aside, file)


def load_order(path, data):
    """The order in `path`, uint32 (rows,). Raises UserError if it is missing or made for other rows."""
    path = Path(path)
    try:
        about, order = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), np.fromfile(path, "<u4")
        if {k: about[k] for k in identity(data)} != identity(data) or len(order) != len(data):
            raise UserError(f"{path} orders other rows (other token files, --rows or --max_seq_len); remove it and score again")
        return order
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} and its .json are not there or cannot be read; score the rows again, or resume where the run wrote them") from None


def order_path(data, measure):
    """Where score leaves the order of a token file's rows."""
    return data.directory / f"order-{measure}-{data.rows}-{data.T}.u32"


def order_of(data, words):
    """The rows in the order that --curriculum asks for: read if score has written it, else computed now, which gives the
    same. A minus in front of the measure means from hard to easy."""
    measure, hardest = words.removeprefix("-"), words.startswith("-")
    if order_path(data, measure).exists():
        order = load_order(order_path(data, measure), data)
    elif measure == "model":
        raise UserError(f"--curriculum model needs {order_path(data, measure)}: make it with `python -m nanollm.tools.difficulty "
                        f"--data {data.directory} --rows {data.rows} --max_seq_len {data.T} --difficulty model --init_from RUN`")
    else:
        order = easiest_first(difficulty(data, measure))
    return order[::-1] if hardest else order


def score(data, measure, tokenizer, model=None, ctx=None, autocast=None, batch_size=16):
    """Order the rows of a TokenFile, write the order beside it and show what is easy and what is hard. measure "model" needs
    the model, its ctx (dist.init) and autocast. Returns {"file", "rows", "easiest", "hardest"}: two openings of texts."""
    values = model_difficulty(model, data, ctx, autocast, batch_size) if measure == "model" else difficulty(data, measure)
    order = easiest_first(values)
    save_order(order_path(data, measure), order, data, measure=measure)
    ends = [tokenizer.decode(data.examples(int(order[k]))[0][1][:40].tolist()) for k in (0, -1)]
    return {"file": order_path(data, measure).name, "rows": len(order), "easiest": ends[0], "hardest": ends[1]}


def reorder(model, data, ctx, autocast, cfg, step):
    """CLIMB's switch: the order of the rows by this model's own perplexity, kept in OUT_DIR for runs that resume later."""
    order = easiest_first(model_difficulty(model, data, ctx, autocast, cfg.batch_size))
    if ctx.main:
        save_order(switch_path(cfg), order, data, measure="model", step=step)
        print(f"step {step}: the curriculum goes on in the order of the model's own perplexity -> {switch_path(cfg)}", flush=True)
    ctx.barrier()
    return order


def switch_path(cfg):
    return Path(cfg.out_dir) / "order-model.u32"


def sample_order(cfg, train, sampler, max_steps, phases, step):
    """Which row each sample of the run is: the sampler's own shuffle, or what --mix, --phases or --curriculum ask for."""
    total = sampler.total or max_steps * sampler.rows_per_step
    if phases:
        order = Mixture([len(part) for part in train.parts], phases, total, cfg.seed)
        print("\n".join(order.report(sampler.rows_per_step, bool(cfg.init_from))), flush=True)
        return order
    if not cfg.curriculum:
        return sampler.order
    if not (0 < cfg.competence_start <= 1 and 0 < cfg.competence_end <= 1 and cfg.competence in ("sqrt", "linear")):
        raise UserError("--competence is sqrt or linear, and --competence_start and --competence_end lie in (0, 1]")
    later = load_order(switch_path(cfg), train.parts[0]) if 0 < cfg.curriculum_switch < step else None
    return Curriculum(order_of(train.parts[0], cfg.curriculum), cfg.seed, total, cfg.competence_start, cfg.competence_end,
                      cfg.competence, cfg.curriculum_switch * sampler.rows_per_step, later)
