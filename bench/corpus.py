"""A corpus for the data benchmarks: mixed Chinese and English documents, near-copies of known similarity planted among them.

    python bench/corpus.py --docs 200000 --out out/bench/corpus.jsonl

Every fifth document is English-like, the others Chinese-like: words and characters drawn by Zipf's law, real function words
on the first ranks, sentences of 8 to 30 units, about 900 characters a document. One document in twenty copies an earlier one
with a share of its sentences replaced. `planted.jsonl` beside the corpus says which, with the true Jaccard similarity of
their character 5-grams. The same arguments give the same bytes.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanollm import config
from nanollm.config import arg
from nanollm.corpus.io import progress

FUNCTION_EN = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which".split()
FUNCTION_ZH = list("的一是在了不和有大这主中人上为们地个用工时要动国产以我到他会作来分生对于学下级就年")
SYLLABLES = [c + v + e for c in "b c d f g h k l m n p r s t v w st tr pl gr".split() for v in "a e i o u ea ou".split() for e in ("", "n", "r", "s", "t", "l")]


@dataclass
class Config:
    docs: int = arg(200_000, "documents", least=100)
    out: str = arg("out/bench/corpus.jsonl", "the file to write")
    copies: float = arg(0.05, "share of near-copies")
    seed: int = arg(0, "another seed, another corpus")


def vocabulary(rng):
    """(English words, Chinese characters), the most frequent first."""
    words = {"".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=n)) for n in rng.integers(1, 4, size=30_000)}
    words = FUNCTION_EN + sorted(words - set(FUNCTION_EN))
    han = [chr(c) for c in range(0x4E00, 0x4E00 + 6000)]
    rest = [c for c in han if c not in FUNCTION_ZH]
    return words, FUNCTION_ZH + [rest[i] for i in rng.permutation(len(rest))[:3500]]


def zipf(rng, n, size):
    """Ranks 0..n-1 with probability proportional to 1 / (rank + 3)."""
    return np.searchsorted(np.cumsum(1 / np.arange(3, n + 3)) / np.sum(1 / np.arange(3, n + 3)), rng.random(size))


def sentences(rng, english, words, han):
    """The sentences of one document."""
    if english:
        lengths = rng.integers(8, 22, size=rng.integers(6, 14))
        drawn = iter(zipf(rng, len(words), int(lengths.sum())).tolist())
        chosen = [[words[next(drawn)] for _ in range(n)] for n in lengths]
        return [(" ".join(s[:-5]) + ", " + " ".join(s[-5:]) + ". ").capitalize() for s in chosen]
    lengths = rng.integers(12, 36, size=rng.integers(24, 52))
    text = "".join(han[i] for i in zipf(rng, len(han), int(lengths.sum())).tolist())
    ends = np.cumsum(lengths).tolist()
    return [text[a:b - 6] + "，" + text[b - 6:b] + "。" for a, b in zip([0, *ends], ends)]


def grams(text):
    text = "".join(c for c in text.lower() if c.isalnum())
    return {text[i:i + 5] for i in range(len(text) - 4)}


def main(cfg):
    """Write the corpus and planted.jsonl."""
    rng = np.random.default_rng(cfg.seed)
    words, han = vocabulary(rng)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    recent = []
    with open(out, "w", encoding="utf-8") as f, open(out.with_name("planted.jsonl"), "w", encoding="utf-8") as planted:
        for i in progress(range(cfg.docs), desc="corpus"):
            if recent and rng.random() < cfg.copies:
                j, text = recent[int(rng.integers(len(recent)))]
                copy, share = list(text), rng.uniform(0, 0.3)
                other = sentences(rng, i % 5 == 0, words, han)
                for k in np.flatnonzero(rng.random(len(copy)) < share):
                    copy[k] = other[k % len(other)]
                a, b = grams("".join(text)), grams("".join(copy))
                planted.write(json.dumps({"a": j, "b": i, "jaccard": round(len(a & b) / len(a | b), 4)}) + "\n")
                doc = copy
            else:
                doc = sentences(rng, i % 5 == 0, words, han)
                if rng.random() < 0.2:
                    recent = [*recent[-999:], (i, doc)]
            f.write(json.dumps({"text": "".join(doc)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    config.run(main, Config, __doc__)
