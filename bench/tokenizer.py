"""Tokenizers on given text: what the pre-tokenizer decides, and foreign files against the libraries they belong to.

    python bench/tokenizer.py --what patterns --text FILES                                  the same BPE on differently cut text
    python bench/tokenizer.py --what foreign --text FILES --tokenizer a.model b.tiktoken    ids as its own library gives them?

(How fast they are trained and encode: bench/data.py --what bpe, --what encode.)
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.peers import need
from nanollm import foreign_tokenizers, tokenizer as tokenizers
from nanollm.config import UserError, arg, run
from nanollm.corpus import bpe, compare, io


@dataclass
class Config:
    what: str = arg("patterns", "patterns | foreign")
    text: list = arg([], "raw files or directories")
    tokenizer: list = arg([], "for foreign: .model, .tiktoken or tokenizer.json files")
    vocab_size: int = arg(8192, "for patterns: ids to learn", unit="tokens", least=512)


def texts_of(cfg):
    """Yields the documents of --text."""
    if not cfg.text:
        raise UserError("--text: name files or directories with text")
    for task in io.plan(io.find_files(cfg.text, exclude=os.devnull)[0]):
        for row in io.documents(task, lambda *bad: None):
            if row["drop_reason"]:
                continue
            yield row["text"]


def patterns(cfg):
    """Compression of held-out text by BPE with the same number of merges; digits and Han runs are the difference."""
    ours = tokenizers.pattern_for(10_000)                                  # digits by two at most
    joined = ours.replace(r"(?:(?!\p{Han})\p{L})", r"\p{L}").replace(r"|\p{Han}{1,16}", "")
    named = {"Han runs of 16, single digits": tokenizers.pattern_for(512), "digits by two": ours,
             "digits by three": ours.replace(r"\p{N}{1,2}", r"\p{N}{1,3}"), "Chinese by character": tokenizers.pattern_for(512, han_run=1),
             "no branch for Han (as GPT-4)": joined, "GPT-2's": foreign_tokenizers.GPT2_PATTERN}
    learn, held_out = compare.split(lambda: texts_of(cfg))
    tried = {}
    for name, pattern in named.items():
        merges = bpe.learn_merges(bpe.count_pieces(learn, pattern), cfg.vocab_size - 256 - len(tokenizers.CONTROL))
        tried[name] = tokenizers.bpe_tokenizer(merges, pattern)
    print(compare.table(compare.compare(tried, compare.by_language(held_out))))


def library(path, tok):
    """encode(text) of the library that the file belongs to, nothing of ours in between."""
    need("sentencepiece" if tok.kind == "sentencepiece" else "tiktoken" if tok.kind == "tiktoken" else "tokenizers")
    if tok.kind == "sentencepiece":
        import sentencepiece
        return sentencepiece.SentencePieceProcessor(model_file=path).encode
    if tok.kind == "tiktoken":
        import tiktoken.load
        return tiktoken.Encoding("bench", pat_str=tok.spec["pattern"], special_tokens={},
                                 mergeable_ranks=tiktoken.load.load_tiktoken_bpe(path)).encode_ordinary
    import tokenizers as hugging_face
    encode = hugging_face.Tokenizer.from_file(path).encode
    return lambda text: encode(text, add_special_tokens=False).ids


def foreign(cfg):
    texts = list(texts_of(cfg))
    for path, tok, encode in [(path, tok, library(path, tok)) for path in cfg.tokenizer for tok in [tokenizers.load(path)]]:
        ids = [tok.encode(text) for text in texts]
        same = sum(list(encode(text)) == i for text, i in zip(texts, ids))
        back = sum(tok.decode(i) == text for text, i in zip(texts, ids))
        names = " ".join(name for name in tok.control if not name.startswith("<|reserved_"))
        print(f"{Path(path).name}: {tok.kind}, {tok.vocab_size:,} ids; of {len(texts):,} texts {same:,} with the ids of its "
              f"library, {back:,} come back unchanged; control tokens {names}")


def main(cfg):
    whats = {"patterns": patterns, "foreign": foreign}
    if cfg.what not in whats:
        raise UserError(f"--what {cfg.what} is unknown; use one of {', '.join(whats)}")
    whats[cfg.what](cfg)


if __name__ == "__main__":
    run(main, Config, __doc__)
