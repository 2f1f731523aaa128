"""Numbers about texts and outcomes, and how far they can be trusted. Pure functions of strings and lists: no model is in sight.

    ROUGE   how many of the reference's n-grams (or how long a subsequence of it) the reply has, as F1 (Lin 2004)
    BLEU    how many of the reply's n-grams the reference has, and a penalty for brevity (Papineni et al. 2002)
    distinct-n and repetition say how much a model repeats itself, without any reference

ROUGE and BLEU see surfaces. A paraphrase without a common word scores 0; a sentence with one digit wrong scores nearly 1.
"""
import math
import re
from collections import Counter

import numpy as np

HAN = "\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# what stands alone on a Chinese page: characters, their punctuation (。「」 and, at 2001 to 2a6d, “”…—), full-width letters, symbols
WIDE = HAN + "\u2001-\u2a6d\u2ff0-\u303f\u3100-\u312f\u31a0-\u31ef\u3200-\u33ff\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef"
# the language-independent part of mteval-v13a: punctuation apart, but not a point or comma within a number
SIGNS = [(re.compile(r"([{-~[-` -&(-+:-@/])"), r" \1 "), (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
         (re.compile(r"([.,])([^0-9])"), r" \1 \2"), (re.compile(r"([0-9])(-)"), r"\1 \2 ")]


# ---- units -----------------------------------------------------------------------------------------------------------

def words(text):
    """What ROUGE counts: runs of a-z and 0-9 in lower case, as the package rouge-score has them, and each Chinese character."""
    return re.findall(f"[a-z0-9]+|[{HAN}]", text.lower())


def signs(text, chinese=False):
    """What BLEU counts: words and punctuation as sacrebleu parts them, by its rule 13a, or zh, where each Chinese character and
    sign stands alone."""
    if chinese:
        text = re.sub(f"([{WIDE}])", r" \1 ", text.strip())
    else:
        for entity, char in (("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            text = text.replace(entity, char)
        text = f" {text} "
    for pattern, apart in SIGNS:
        text = pattern.sub(apart, text)
    return text.split()


def ngrams(tokens, n):
    """Counter of the n-grams of a list."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


# ---- reply against reference -----------------------------------------------------------------------------------------

def f1(common, a, b):
    """The harmonic mean of common / a and common / b."""
    return 2 * common / (a + b) if common else 0.0


def rouge_n(reply, reference, n):
    """F1 of the n-grams that two lists of words have in common, each counted as often as it is in both."""
    a, b = ngrams(reply, n), ngrams(reference, n)
    return f1((a & b).total(), a.total(), b.total())


def longest_common(a, b):
    """Length of the longest subsequence of both lists (its words in order, with gaps), by the textbook's table, a row at a time."""
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for j, y in enumerate(b, 1):
            row.append(before[j - 1] + 1 if x == y else max(before[j], row[j - 1]))
    return row[-1]


def rouge_l(reply, reference):
    """F1 of the longest common subsequence of two lists of words."""
    return f1(longest_common(reply, reference), len(reply), len(reference))


def bleu_parts(reply, reference, order=4):
    """What one reply adds to a corpus' BLEU, two lists of signs -> [lengths of both, n-grams found (order), n-grams written (order)]."""
    pairs = [(ngrams(reply, n), ngrams(reference, n)) for n in range(1, order + 1)]
    return [len(reply), len(reference), *((a & b).total() for a, b in pairs), *(a.total() for a, _ in pairs)]


def bleu(parts):
    """BLEU, from 0 to 1, of summed bleu_parts (..., 2 + 2 * order) -> (...); sacrebleu prints 100 times that.

    exp(mean over n of ln p_n) times min(1, exp(1 - reference / reply)). A p_n without any hit would make it 0: the first such
    one counts as 1/2 a hit, the second as 1/4 … (Chen & Cherry 2014, method 3: sacrebleu's "exp").
    """
    parts = np.asarray(parts, float)
    order = (parts.shape[-1] - 2) // 2
    reply, reference, hits, written = parts[..., 0], parts[..., 1], parts[..., 2 : 2 + order], parts[..., 2 + order :]
    smoothed = np.where(hits > 0, hits, 0.5 ** np.cumsum(hits == 0, -1))
    real = (written > 0).all(-1) & (hits > 0).any(-1)               # no 4-gram at all: 0, there is nothing to take the mean of
    precision = np.where(real[..., None], smoothed / np.maximum(written, 1), 1.0)
    brevity = np.exp(np.minimum(0.0, 1 - reference / np.maximum(reply, 1)))
    return np.where(real, brevity * np.exp(np.log(precision).mean(-1)), 0.0)


# ---- replies alone ---------------------------------------------------------------------------------------------------

def distinct(replies, n):
    """Share of different n-grams among all n-grams of all replies, lists of words (Li et al. 2016): low if they are all alike."""
    grams = [ngrams(reply, n) for reply in replies]
    return len(set().union(*grams)) / max(sum(g.total() for g in grams), 1)


def repetition(reply, n=4):
    """Share of the n-grams of one reply that it has said before (Welleck et al. 2020, seq-rep-n): 0, or near 1 in a loop."""
    grams = ngrams(reply, n)
    return 1 - len(grams) / grams.total() if grams else 0.0


# ---- how far to trust a number ---------------------------------------------------------------------------------------

def ratio(sums):
    """sums (..., 2) -> first / second."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-300)


def bootstrap(parts, of=ratio, tries=1000, seed=0):
    """(low, high): where 95 % of the values lie if the rows are drawn anew, with replacement, `tries` times (Efron 1979).

    parts (n, k): what each row adds. of: sums (..., k) -> (...), so that whatever is made of sums (accuracy, bits per byte, BLEU)
    gets its error bar in the same way. The seed is fixed: two runs print the same.
    """
    parts, rng, n = np.asarray(parts, float), np.random.default_rng(seed), len(parts)
    if not n:
        return 0.0, 0.0
    sums = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ parts for _ in range(tries)])        # (tries, k)
    return tuple(np.quantile(of(sums), [0.025, 0.975]).tolist())


def mean(values, name="value"):
    """{name: mean, "low", "high"} of a list of numbers from 0 to 1, with bootstrap's interval. Where all are equal, drawing anew
    tells nothing: by the rule of three (Hanley & Lippman-Hand 1983) a share of up to 3 / n may still be others, all 0 or all 1."""
    low, high = bootstrap([(v, 1) for v in values])
    if len(set(values)) == 1:
        value, others = float(values[0]), min(1.0, 3 / len(values))
        low, high = value * (1 - others), value + (1 - value) * others
    return {name: sum(values) / max(len(values), 1), "low": low, "high": high}


def share(hits, name="accuracy"):
    """A list of booleans as {name: share, "low", "high", "stderr": sqrt(p (1 - p) / n), "n"}."""
    found, n = mean(hits, name), len(hits)
    return found | {"stderr": math.sqrt(found[name] * (1 - found[name]) / max(n, 1)), "n": n}


def wins(ratings, other):
    """For each prompt 1 if `ratings` lies above `other`, 1/2 if they are equal, else 0: against itself a model stands at 0.5."""
    return [0.5 if a == b else float(a > b) for a, b in zip(ratings, other)]


def generation(replies, references):
    """Strings against strings: {"rouge1", "rouge2", "rougeL", "bleu", "repetition", "distinct1", "distinct2"}, each
    {"value", "low", "high"} (distinct-n is no sum over replies and comes without an interval). ROUGE is the mean over replies,
    BLEU that of the corpus."""
    said, wanted = [words(r) for r in replies], [words(r) for r in references]
    chinese = [bool(re.search(f"[{HAN}]", b)) for b in references]
    parts = np.array([bleu_parts(signs(a, zh), signs(b, zh)) for a, b, zh in zip(replies, references, chinese)], float)
    low, high = bootstrap(parts, bleu)
    return {"rouge1": mean([rouge_n(a, b, 1) for a, b in zip(said, wanted)]), "rouge2": mean([rouge_n(a, b, 2) for a, b in zip(said, wanted)]),
            "rougeL": mean([rouge_l(a, b) for a, b in zip(said, wanted)]), "bleu": {"value": float(bleu(parts.sum(0))), "low": low, "high": high},
            "repetition": mean([repetition(a) for a in said]), "distinct1": {"value": distinct(said, 1)}, "distinct2": {"value": distinct(said, 2)}}
