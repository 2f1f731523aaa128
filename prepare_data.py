"""Raw text -> clean -> deduplicate -> tokenizer -> token files.

    python prepare_data.py build --input books/ news.jsonl.gz --out out/mydata --vocab_size 6400

reads .txt, .jsonl, .json, .parquet (each also .gz) or directories of them, and leaves in --out one directory a stage:

    clean/      documents.jsonl, dropped.jsonl (with the reason), quarantine.jsonl (rows that could not be read)
    dedup/      documents.jsonl, removed.jsonl (with the document it repeats and their Jaccard similarity)
    tokenizer/  tokenizer.json, vocab.txt
    tokens/     train.bin, val.bin and what belongs to them: this is what `train_pretrain.py --data` wants

and in each a report.json. A stage is written aside and renamed when it is whole; one whose result is already there for
the same inputs and settings is skipped. Each stage is also a command of its own, and reads what the one before it left:

    demo | clean | dedup | tokenizer | tokenize | build        (`prepare_data.py COMMAND --help` lists its options)

Chat and preference files need no preparation: train_sft.py, train_rm.py and train_dpo.py read them as they are.
"""
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from nanollm import config, tokenizer as tokenizers, world
from nanollm.config import UserError, arg
from nanollm.corpus import bpe, clean as cleaning, dedup as deduplication, io, pack

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
    doc_sep: str = arg("auto", "what ends a document in .txt files: line | blank (line) | file | auto (blank if there are any)")
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


def stage(target, inputs, settings, force, work):
    """Run work(directory) -> report, and make its directory `target` once it is whole; skip it if that was done before.

    "Done before" means the same settings and input files of the same size and time, as report.json remembers.
    """
    target = Path(target)
    signature = {"settings": settings, "inputs": [[p.as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in inputs]}
    name, report_file, aside = target.name, target / "report.json", target.with_name(target.name + ".tmp")
    if report_file.exists():
        old = json.loads(report_file.read_text(encoding="utf-8"))
        if old["signature"] == signature and not force:
            print(f"{name}: {target} is already complete, skipped (--force redoes it)")
            return old
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out: {target} holds something that is not ours; choose another directory")
    shutil.rmtree(aside, ignore_errors=True)              # the rest of an interrupted run
    try:
        aside.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--out: cannot make {aside}: {e.strerror}") from None
    start = time.time()
    report = work(aside)
    report |= {"seconds": round(time.time() - start, 2), "peak_rss_mb": peak_rss_mb(), "signature": signature}
    (aside / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    print(f"  {name} took {report['seconds']:.1f} s, peak memory {report['peak_rss_mb'] or '?'} MB -> {target}", flush=True)
    return report


def peak_rss_mb():
    """The most memory this process has held so far, or None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def table(counts, total):
    """{"markup": 3} of 100 -> "markup 3 (3.00%)"."""
    return " | ".join(f"{name} {n:,} ({n / max(total, 1):.2%})" for name, n in counts.items()) or "none"


def head(text, width=70):
    return " ".join(text[:width].split()) + ("…" if len(text) > width else "")


def write_row(file, row):
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def source(cfg, *stages):
    """The documents a stage reads: --input, or what the first of `stages` that exists has left."""
    if len(cfg.input) > 1:
        raise UserError(f"--input: this stage reads one .jsonl file, got {len(cfg.input)}; `clean` merges raw files")
    choices = [Path(p) for p in cfg.input] or [Path(cfg.out) / name / "documents.jsonl" for name in stages]
    return next((p for p in choices if p.is_file()), choices[0])


def demo(cfg):
    if cfg.size not in ("demo", "smoke"):
        raise UserError(f"--size: {cfg.size!r} is neither demo nor smoke")

    def work(out):
        world.write(out, cfg.size, cfg.seed)
        files = {p.name: p.stat().st_size for p in sorted(out.iterdir())}
        print("demo\n" + "\n".join(f"  {name:<20} {size:>12,} bytes" for name, size in files.items()))
        return {"files": files}
    return stage(cfg.out, [], {"size": cfg.size, "seed": cfg.seed}, cfg.force, work)


def clean(cfg):
    """Read, normalise, drop; every document ends up kept, dropped with one reason, or in quarantine."""
    if not cfg.input:
        raise UserError("--input: name the raw files or directories to read")
    if cfg.doc_sep not in io.SEPARATORS:
        raise UserError(f"--doc_sep: {cfg.doc_sep!r} is none of {', '.join(io.SEPARATORS)}")
    files, skipped = io.find_files(cfg.input, exclude=cfg.out)

    def work(out):
        separators = {path: io.choose_separator(path, cfg.doc_sep) for path in files}
        for path, sep in separators.items():
            note = f", a document ends at each {sep}".replace("each blank", "a blank line").replace("each file", "its end")
            print(f"  {path.as_posix()}{note + ' (--doc_sep)' if io.kind(path) == '.txt' else ''}")
        for path, why in skipped:
            print(f"  skipped {path.as_posix()}: {why}")
        quarantine = io.Quarantine(out / "quarantine.jsonl")
        dropped, edited, examples, kept, chars_in, chars_out = Counter(), Counter(), {}, 0, 0, 0
        with (open(out / "documents.jsonl", "w", encoding="utf-8", newline="\n") as documents,
              open(out / "dropped.jsonl", "w", encoding="utf-8", newline="\n") as rest):
            for document in io.read_documents(separators, quarantine):
                text, reason, edits = cleaning.clean(document["text"], cfg.min_chars)
                chars_in += len(document["text"])
                edited.update(edits)
                if reason:
                    dropped[reason] += 1
                    write_row(rest, document | {"reason": reason})
                    if len(examples.setdefault(reason, [])) < 3:
                        examples[reason].append({"id": document["id"], "head": head(document["text"])})
                else:
                    kept, chars_out = kept + 1, chars_out + len(text)
                    write_row(documents, {"id": document["id"], "text": text})
        ...
    return stage(Path(cfg.out) / "clean", files, {k: v for k, v in asdict(cfg).items() if k in SETTINGS["clean"]}, cfg.force, work)
