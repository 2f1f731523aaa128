"""Raw text -> clean -> deduplicate -> tokenizer -> token files.

    python prepare_data.py build --input books/ news.jsonl.gz --out out/mydata --vocab_size 6400

reads .txt, .jsonl, .json, .parquet (each also .gz) or directories of them, and leaves in --out one directory a stage:

    clean/      documents.jsonl, dropped.jsonl (with the reason), quarantine.jsonl (rows that could not be read)
    dedup/      documents.jsonl, removed.jsonl (with the document it repeats and their Jaccard similarity)
    tokenizer/  tokenizer.json, vocab.txt
    tokens/     train.bin, val.bin and what belongs to them: this is what `train_pretrain.py --data` wants

and in each a report.json. A stage is renamed when it is whole, and skipped if that was done for the same inputs and
settings. Each is also a command of its own and reads what the one before left (`prepare_data.py COMMAND --help`):

    demo | clean | dedup | tokenizer | tokenize | build

Chat and preference files need no preparation: train_sft.py, train_rm.py and train_dpo.py read them as they are.
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanollm import config, tokenizer as tokenizers
from nanollm.config import UserError, arg
from nanollm.corpus import bpe, clean as cleaning, dedup as deduplication, io, pack
from nanollm.corpus.stage import stage

OUT = "output directory of all stages"


@dataclass
class Demo:
    out: str = arg("out/demo/raw", "where the raw files of the embedded demo world go")
    size: str = arg("demo", "demo | smoke: minutes or seconds of training")
    seed: int = arg(0, "another seed, another world")
    force: bool = arg(False, "redo what is already there")


@dataclass
class Clean:
    input: list = arg([], "raw files or directories: .txt .jsonl .json .parquet, each also .gz")
    out: str = arg("out/data", OUT)
    doc_sep: str = arg("auto", "what ends a document in .txt: line | blank | file | auto (blank lines if any)")
    min_chars: int = arg(15, "shorter documents are dropped", unit="characters")
    max_bad: float = arg(0.01, "stop if more than this share of the documents, or of the files, cannot be read")
    force: bool = arg(False, "redo what is already there")


@dataclass
class Dedup:
    input: list = arg([], "a .jsonl file of {\"text\"} (default: OUT/clean/documents.jsonl)")
    out: str = arg("out/data", OUT)
    threshold: float = arg(0.7, "a document goes if its Jaccard similarity with a kept one reaches this")
    ngram: int = arg(5, "a document is the set of its runs of this many", unit="characters")
    num_perm: int = arg(128, "permutations of MinHash; more find the same pairs with fewer false candidates")
    force: bool = arg(False, "redo what is already there")


@dataclass
class Tokenizer:
    input: list = arg([], "a .jsonl file of {\"text\"} (default: OUT/dedup/documents.jsonl)")
    out: str = arg("out/data", OUT)
    vocab_size: int = arg(6400, "size of the vocabulary to train, control tokens included", unit="tokens")
    han_run: int = arg(16, "most Han characters that may become one token; 1 = Chinese by character", least=1)
    kind: str = arg("bpe", "bpe: byte-level BPE; char: one id a character, the baseline (unknown ones are lost)")
    tokenizer: str = arg("", "use this one instead of training: a directory, .model, tokenizer.json or .tiktoken")
    force: bool = arg(False, "redo what is already there")


@dataclass
class Tokenize:
    input: list = arg([], "a .jsonl file of {\"text\"} (default: OUT/dedup/documents.jsonl)")
    out: str = arg("out/data", OUT)
    tokenizer: str = arg("", "a directory, .model, tokenizer.json or .tiktoken (default: OUT/tokenizer)")
    val_fraction: float = arg(0.02, "share of documents held out for validation, chosen by a hash of their text")
    seed: int = arg(1234, "order of the documents in the token files")
    force: bool = arg(False, "redo what is already there")


@dataclass
class Build(Tokenize, Tokenizer, Dedup, Clean):           # only to have the options of all four
    input: list = arg([], Clean.__dataclass_fields__["input"].metadata["help"])


def shares(counts, total):
    """{"markup": 3} of 100 -> "markup 3 (3.00%)"."""
    return " | ".join(f"{name} {n:,} ({n / max(total, 1):.2%})" for name, n in counts.items()) or "none"


def head(text):
    return repr(" ".join(text[:60].split()) + ("…" if len(text) > 60 else ""))


def documents_of(cfg, *stages):
    """The documents a stage reads: --input, or what the first of `stages` that is there has left in --out."""
    if len(cfg.input) > 1:
        raise UserError(f"--input: this stage reads one .jsonl file, got {len(cfg.input)}; `clean` merges raw files")
    paths = [Path(p) for p in cfg.input] or [Path(cfg.out) / name / "documents.jsonl" for name in stages]
    return io.Documents(next((p for p in paths if p.is_file()), paths[0]))


def demo(cfg):
    """Write the raw files of the embedded demo world: documents, chats, preference pairs, a multiple-choice test."""
    if cfg.size not in ("demo", "smoke"):
        raise UserError(f"--size: {cfg.size!r} is neither demo nor smoke")
    from nanollm import world                             # only this command needs it

    def work(out):
        world.write(out, cfg.size, cfg.seed)
        files = {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
        print("\n".join(f"  {name:<18} {size:>12,} bytes" for name, size in files.items()))
        return {"files": files}
    stage(cfg, "", [], {"size": cfg.size, "seed": cfg.seed}, [world], work)


def clean(cfg):
    """Read raw files, normalise the text, and drop what is too short, or was mostly markup or repeated punctuation."""
    if not cfg.input:
        raise UserError("--input: name the raw files or directories to read")
    if cfg.doc_sep not in ("auto", "line", "blank", "file"):
        raise UserError(f"--doc_sep: {cfg.doc_sep!r} is none of auto, line, blank, file")
    files, skipped = io.find_files(cfg.input, exclude=cfg.out)

    def work(out):
        separators = {path: io.choose_separator(path, cfg.doc_sep) for path in files}
        for path, sep in separators.items():
            print(f"  reading {io.shown(path)}" + f" (--doc_sep {sep})" * (io.kind(path) == ".txt"))
        for path, why in skipped:
            print(f"  skipped {io.shown(path)}: {why}")
        r = cleaning.clean_corpus(separators, out, cfg.min_chars, cfg.max_bad)
        bad, drops = sum(r["quarantined"].values()), sum(r["dropped"].values())
        print(f"  in {r['in']:,} documents, {r['chars_in']:,} characters\n"
              f"  = kept {r['kept']:,} ({r['kept'] / r['in']:.1%}), {r['chars']:,} characters "
              f"+ dropped {drops:,} + quarantined {bad:,}\n"
              f"  edited {r['changed']:,} of the kept: {shares(r['edited'], r['kept'])}\n"
              f"  dropped: {shares(r['dropped'], r['in'])}")
        for reason, examples in r["examples"].items():
            print("\n".join(f"    {reason}: {d['id']} {head(d['text'])}" for d in examples))
        if bad:
            print(f"  quarantined: {shares(r['quarantined'], r['in'])}")
        for row in r["quarantine_examples"]:
            print(f"    {row['file']}:{row['line']}: {row['reason']} {row['error'] or head(row['head'])}")
        return r | {"skipped": [[io.shown(path), why] for path, why in skipped]}
    settings = {"doc_sep": cfg.doc_sep, "min_chars": cfg.min_chars, "max_bad": cfg.max_bad}
    stage(cfg, "clean", files, settings, [cleaning, io], work)


def dedup(cfg):
    """Remove exact copies by hash, and near copies: MinHash-LSH candidates, verified by true Jaccard similarity."""
    if not 0 < cfg.threshold <= 1 or cfg.ngram < 1 or cfg.num_perm < 4:
        raise UserError("--threshold must lie in (0, 1], --ngram be at least 1 and --num_perm at least 4")
    documents = documents_of(cfg, "clean")

    def work(out):
        b, r = deduplication.bands_and_rows(cfg.threshold, cfg.num_perm)
        miss = {s: float(f"{deduplication.miss(s, b, r):.2g}") for s in (cfg.threshold, 0.9)}
        print(f"  {cfg.num_perm} permutations in {b} bands of {r}: overlooks a pair with Jaccard "
              + ", ".join(f"{s:g} with probability {p:g}" for s, p in miss.items()))
        report = deduplication.dedup_corpus(documents, out, cfg.threshold, cfg.ngram, cfg.num_perm)
        print("  in {in:,} = kept {kept:,} + removed {removed:,} (exact {exact:,}, near {near:,}); {candidates:,} "
              "candidate pairs, {verified:,} verified".format(**report))
        for row in report["examples"]:
            print(f"    {row['id']} repeats {row['dup_of']}, Jaccard {row['jaccard']}: {head(row['text'])}")
        for original, n in report["most_copied"]:
            if n > 1:
                print(f"    {n:,} documents repeat {original}")
        return report | {"bands": b, "rows": r, "miss": miss}
    settings = {"threshold": cfg.threshold, "ngram": cfg.ngram, "num_perm": cfg.num_perm}
    stage(cfg, "dedup", [documents.path], settings, [deduplication, io], work)


def tokenizer(cfg):
    """Train our byte-level BPE (or take the tokenizer given), and say how much text a token carries."""
    if cfg.kind not in ("bpe", "char"):
        raise UserError(f"--kind {cfg.kind} is unknown; use bpe or char")
    documents = documents_of(cfg, "dedup", "clean")
    given = tokenizers.load(cfg.tokenizer) if cfg.tokenizer else None

    def work(out):
        tok, pattern = given, tokenizers.pattern_for(cfg.vocab_size, cfg.han_run)
        if tok is None:
            texts = (d["text"] for d in io.progress(documents, desc="tokenizer", unit=" docs"))
            if cfg.kind == "char":
                tok = tokenizers.char_tokenizer(bpe.train_char(texts))
            else:
                say = lambda line: print("  " + line.removeprefix("tokenizer: "))
                tok = tokenizers.bpe_tokenizer(bpe.train_bpe(texts, cfg.vocab_size, pattern, say=say), pattern)
        tok.save(out)
        spread = np.linspace(0, len(documents) - 1, min(len(documents), 2000)).astype(int)   # over the whole corpus
        texts = {"all": [documents[i]["text"] for i in spread]}
        texts |= {name: [t for t in texts["all"] if tokenizers.language(t) == name] for name in ("en", "zh")}
        carried = {name: tokenizers.compression(tok, part) for name, part in texts.items() if part}
        print(f"  {tok.kind}, {tok.vocab_size:,} ids")
        for name, c in carried.items():
            print(f"    {name}: {c['bytes_per_token']:.2f} bytes, {c['chars_per_token']:.2f} characters a token")
        return {"kind": tok.kind, "vocab_size": tok.vocab_size, "hash": tok.hash, **carried.pop("all"), **carried}
    settings = {"tokenizer": given.hash} if given else {"kind": cfg.kind, "vocab_size": cfg.vocab_size, "han_run": cfg.han_run}
    stage(cfg, "tokenizer", [documents.path], settings, [tokenizers, bpe], work)


def tokenize(cfg):
    """Split off the validation documents, shuffle, encode, and write the token files."""
    documents = documents_of(cfg, "dedup", "clean")
    tok = tokenizers.load(cfg.tokenizer or Path(cfg.out) / "tokenizer")
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"--val_fraction: {cfg.val_fraction} does not lie between 0 and 1")

    def work(out):
        report = pack.write_splits(out, documents, tok, cfg.val_fraction, cfg.seed)
        tok.save(out / "tokenizer")
        for split, m in report.items():
            print(f"  {split}: {m['n_docs']:,} documents, {m['n_tokens']:,} tokens ({m['dtype']}), "
                  f"{m['n_bytes'] / m['n_tokens']:.2f} bytes a token")
        return report
    settings = {"tokenizer": tok.hash, "val_fraction": cfg.val_fraction, "seed": cfg.seed}
    stage(cfg, "tokens", [documents.path], settings, [tokenizers, pack], work)


def build(cfg):
    """clean, dedup, tokenizer, tokenize: from raw files to what `train_pretrain.py --data` reads."""
    clean(cfg)
    then = dataclasses.replace(cfg, input=[])             # the later stages read what the one before has left
    dedup(then)
    tokenizer(then)
    tokenize(dataclasses.replace(then, tokenizer=""))
    print(f"next: python train_pretrain.py --data {Path(cfg.out, 'tokens').as_posix()}")


COMMANDS = {"demo": (demo, Demo), "clean": (clean, Clean), "dedup": (dedup, Dedup), "tokenizer": (tokenizer, Tokenizer),
            "tokenize": (tokenize, Tokenize), "build": (build, Build)}


def main(argv):
    command = argv[0] if argv else "--help"
    if command in COMMANDS:
        function, options = COMMANDS[command]
        config.run(function, options, f"prepare_data.py {command}\n\n{function.__doc__}", argv[1:])
    elif command in ("--help", "-h"):
        print(__doc__.strip())
    else:
        print(f"error: {command!r} is no command of prepare_data.py; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
