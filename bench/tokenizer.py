"""The tokenizer against the libraries it is measured by, in one process, taking turns.

    python bench/tokenizer.py --part speed --input docs.jsonl         our BPE trainer, Hugging Face's, a tutorial's; encoding
    python bench/tokenizer.py --part patterns --input docs.jsonl      pre-tokenizers: compression by language
    python bench/tokenizer.py --part foreign --input docs.jsonl --tokenizer a.model b.tiktoken tokenizer.json

`--input`: .txt, or .jsonl with {"text"}. Times are of this process's CPU, so that other jobs disturb little; what counts
are the ratios.
"""
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"     # before tokenizers is imported
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import sentencepiece
import tiktoken
import tiktoken.load
import tokenizers as hf
from peers import minbpe_like

from nanollm import foreign_tokenizers, tokenizer as ours
from nanollm.config import UserError, arg, run
from nanollm.corpus import bpe, compare


@dataclass
class Config:
    part: str = arg("speed", "speed | patterns | foreign")
    input: list = arg([], "text: .txt (blank lines between documents) or .jsonl with {\"text\"}")
    tokenizer: list = arg([], "for --part foreign: .model, .tiktoken or tokenizer.json files")
    megabytes: float = arg(9.0, "how much of the input is taken, evenly", unit="MB")
    vocab_size: int = arg(8192, "ids to learn", unit="tokens")
    rounds: int = arg(3, "turns of each trainer; the median counts")


def read(cfg):
    """About cfg.megabytes of the documents in cfg.input."""
    documents = []
    for path in map(Path, cfg.input):
        text = path.read_text(encoding="utf-8")
        documents += [json.loads(line)["text"] for line in text.splitlines()] if path.suffix == ".jsonl" else text.split("\n\n")
    if not documents:
        raise UserError("--input: name a .txt or .jsonl file with text")
    step = max(1.0, size(documents) / (cfg.megabytes * 1e6))
    return [documents[int(i)] for i in np.arange(0, len(documents), step)]


def size(texts):
    return sum(len(text.encode("utf-8")) for text in texts)


def cpu_seconds(function, *args):
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def train_hf(texts, pattern, vocab_size):
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"), hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator(texts, hf.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), min_frequency=2, show_progress=False))
    return theirs


def speed(cfg):
    texts, pattern = read(cfg), ours.pattern_for(cfg.vocab_size)
    n_merges = cfg.vocab_size - 256
    times = {"pieces": [], "merges": [], "theirs": []}
    for _ in range(cfg.rounds):
        seconds, counts = cpu_seconds(bpe.count_pieces, texts, pattern)
        times["pieces"].append(seconds)
        seconds, merges = cpu_seconds(bpe.learn_merges, counts, n_merges)
        times["merges"].append(seconds)
        seconds, theirs = cpu_seconds(train_hf, texts, pattern, cfg.vocab_size)
        times["theirs"].append(seconds)
    pieces, learn, other = (statistics.median(times[k]) for k in ("pieces", "merges", "theirs"))
    tok = ours.bpe_tokenizer(merges, pattern)
    name = ["".join(foreign_tokenizers.BYTE_CHAR[b] for b in piece) for piece in tok.pieces]
    same = [[name[a], name[b]] for a, b in merges] == [list(m) for m in json.loads(theirs.to_str())["model"]["merges"]]
    print(f"text {size(texts) / 1e6:.1f} MB: {sum(counts.values()):,} pieces, {len(counts):,} distinct, "
          f"{sum(len(p.encode('utf-8')) for p in counts) / 1e6:.1f} MB of them; {len(merges):,} merges")
    print(f"ours: {pieces:.2f} s to count pieces + {learn:.2f} s to learn; Hugging Face {other:.2f} s; the same merges: {same}")
    print(f"  speed over Hugging Face's: {other / (pieces + learn):.2f}  (to reach: 0.6)")

    tracemalloc.start()
    bpe.learn_merges(counts, 50)                          # the peak is at the beginning, when all pairs are sorted
    print(f"  memory of learn_merges: {tracemalloc.get_traced_memory()[1] / 1e6:.0f} MB")
    tracemalloc.stop()

    find = bpe.regex.compile(pattern).findall
    words = [word for text in texts for word in find(text)]
    encoded = {word: tok.encode(word) for word in counts}
    begin, _ = cpu_seconds(minbpe_like.train, [list(word.encode("utf-8")) for word in words], 2)
    end, _ = cpu_seconds(minbpe_like.train, [encoded.get(word, [0]) for word in words], 2, 256 + len(merges))
    print(f"a tutorial's trainer: {begin / 2:.2f} s a merge at the beginning, {end / 2:.2f} s at the end; so between "
          f"{end / 2 * n_merges / 3600:.1f} and {begin / 2 * n_merges / 3600:.1f} hours in all (extrapolated)")
    print(f"  speed over the tutorial's: at least {end / 2 * n_merges / (pieces + learn):,.0f}  (to reach: 50)")

    ranks = {piece: i for i, piece in enumerate(tok.pieces[:256 + len(merges)])}
    plain = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ratios = []
    for _ in range(2 * cfg.rounds):
        mine, _ = cpu_seconds(lambda: [tok.encode(text) for text in texts])
        raw, _ = cpu_seconds(lambda: [plain.encode_ordinary(text) for text in texts])
        ratios.append(raw / mine)
    print(f"encoding: {size(texts) / 1e6 / mine:.1f} MB/s on one thread, {statistics.median(ratios):.0%} of bare tiktoken's  (to reach: 95 %)")


def patterns(cfg):
    """The same merges algorithm on differently cut text; compression of held-out text."""
    texts = read(cfg)
    learn, held_out = compare.split(lambda: texts)
    no_han = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}{1,32}|\p{N}{1,2}| ?[^\s\p{L}\p{N}]{1,32}[\r\n]{0,8}|\s{0,31}[\r\n]|\s{1,32}(?!\S)|\s{1,32}"
    ours_2 = ours.pattern_for(10_000)
    named = {"GPT-4's, bounded, digits by 2": no_han, "ours, digits by 2": ours_2, "ours, single digits": ours.pattern_for(512),
             "ours, digits by 3": ours_2.replace(r"\p{N}{1,2}", r"\p{N}{1,3}"), "ours, Chinese by character": ours.pattern_for(512, 1),
             "GPT-2's": foreign_tokenizers.GPT2_PATTERN}
    rows = compare.compare({name: ours.bpe_tokenizer(bpe.learn_merges(bpe.count_pieces(learn, p), cfg.vocab_size - 260), p)
                            for name, p in named.items()}, compare.by_language(held_out))
    print(compare.table(rows))


def foreign(cfg):
    """Each tokenizer through our reader and through its own library: ids on the input, and what comes back."""
    texts = read(cfg)
    for path in cfg.tokenizer:
        tok = ours.load(path)
        if tok.kind == "sentencepiece":
            theirs = sentencepiece.SentencePieceProcessor(model_file=path).encode
        elif tok.kind == "tiktoken":
            ranks = tiktoken.load.load_tiktoken_bpe(path)
            theirs = tiktoken.Encoding("t", pat_str=tok.spec["pattern"], mergeable_ranks=ranks, special_tokens={}).encode_ordinary
        else:
            library = hf.Tokenizer.from_file(path)
            theirs = lambda text: library.encode(text, add_special_tokens=False).ids
        ids = [tok.encode(text) for text in texts]
        same = sum(list(theirs(text)) == i for text, i in zip(texts, ids))
        back = sum(tok.decode(i) == text for text, i in zip(texts, ids))
        brought = [name for name in tok.control if not name.startswith("<|reserved_")]
        print(f"{Path(path).name}: {tok.kind}, {tok.vocab_size:,} ids, highest from text {max(map(max, filter(None, ids))):,}; "
              f"same ids as its library {same:,} of {len(texts):,}, comes back unchanged {back:,}; control tokens {' '.join(brought)}")


def main(cfg):
    print(f"Python {platform.python_version()}, numpy {np.__version__}, tokenizers {hf.__version__}, "
          f"tiktoken {tiktoken.__version__}, sentencepiece {sentencepiece.__version__}")
    parts = {"speed": speed, "patterns": patterns, "foreign": foreign}
    if cfg.part not in parts:
        raise UserError(f"--part {cfg.part} is unknown; use one of {', '.join(parts)}")
    parts[cfg.part](cfg)


if __name__ == "__main__":
    run(main, Config, __doc__)
