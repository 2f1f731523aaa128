"""The data road against its peers, and its own speed: prints tables, writes a JSON.

    python bench/data.py --what minhash            signatures: ours, one-permutation hashing, datasketch's loop and its bulk path
    python bench/data.py --what dedup              the whole deduplication against a datasketch MinHashLSH script
    python bench/data.py --what bpe                BPE training: ours, Hugging Face tokenizers, a straightforward trainer
    python bench/data.py --what encode             encoding: ours against bare tiktoken
    python bench/data.py --what filters            nanoseconds a character of every edit and filter
    python bench/data.py --what stages             prepare_data.py, stage by stage, and the projection to 5.63 million documents
    python bench/data.py --what memory             peak memory at 5, 50 and --mb megabytes of input

Every side of a comparison runs alone in a fresh process with one thread, A B A B …; figures are medians. Peak memory is the
process's largest resident set less what it held after its imports. The corpus is bench/corpus.py's, made on first use; with
--text FILES the BPE and encoding figures are of those files.
"""
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from bench.peers import need
from nanollm import config
from nanollm.config import UserError, arg
from nanollm.corpus.driver import peak_rss_mb

BAIKE = 5_634_898                         # documents of the notes' corpus


@dataclass
class Config:
    what: str = arg("minhash", "minhash | dedup | bpe | encode | filters | stages | memory")
    docs: int = arg(20_000, "documents of the corpus to use", least=100)
    text: list = arg([], "raw files for bpe and encode instead of the made corpus")
    vocab_size: int = arg(8192, "for bpe and encode")
    mb: int = arg(1000, "for memory: the largest input", unit="MB")
    repeats: int = arg(3, "times each side is run", least=1)
    workers: int = arg(0, "processes for stages; 0 = one a core")
    out: str = arg("out/bench", "where the corpus and the results go")


def corpus(cfg, docs):
    """The path of the made corpus of `docs` documents."""
    path = Path(cfg.out) / f"corpus-{docs}.d" / "corpus.jsonl"
    if not path.exists():
        subprocess.run([sys.executable, str(ROOT / "bench/corpus.py"), "--docs", str(docs), "--out", str(path)], check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})
    return path


def texts_of(path, n=None):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line)["text"] for _, line in zip(range(n or 1 << 60), f)]


def _child(function, args, pipe):
    function.__globals__["IMPORTS"][function.__name__]() if function.__name__ in IMPORTS else None
    before = peak_rss_mb()
    report = function(*args)
    report["mb"] = peak_rss_mb() - before
    pipe.send(report)


def alone(function, *args):
    """function(*args) -> {"seconds", …} in a fresh process, with "mb", the peak above its imports, added."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(function, args, there))
    process.start()
    there.close()
    try:
        report = here.recv()
    except EOFError:
        raise UserError(f"{function.__name__} died in its process") from None
    process.join()
    return report


def side_by_side(cfg, sides, once=()):
    """{name: (function, args)} -> {name: median figures}; one of each, then again, `repeats` times; the slow ones only `once`."""
    runs = {name: [] for name in sides}
    for i in range(cfg.repeats):
        for name, (function, args) in sides.items():
            if not i or name not in once:
                runs[name].append(alone(function, *args))
    return {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in runs.items()}


def table(rows, columns):
    """Rows as aligned text."""
    cells = [columns] + [[row.get(c, "") if not isinstance(row.get(c), float) else f"{row[c]:,.4g}" for c in columns] for row in rows]
    widths = [max(len(str(line[i])) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(str(value).rjust(width) for value, width in zip(line, widths)))


# ---- MinHash signatures ---------------------------------------------------------------------------------------------

def gram_bytes(text):
    text = "".join(c for c in text.lower() if c.isalnum())
    return {text[i:i + 5].encode("utf-8") for i in range(len(text) - 4)}


def sketch_update(path, n):
    from datasketch import MinHash
    texts = texts_of(path, n)
    start = time.perf_counter()
    for text in texts:
        m = MinHash(num_perm=256)
        for gram in gram_bytes(text):
            m.update(gram)
    return {"seconds": time.perf_counter() - start}


def sketch_bulk(path, n):
    """datasketch's fastest way: many sets at once, and crc32 instead of SHA-1."""
    import zlib
    from datasketch import MinHash
    texts = texts_of(path, n)
    start = time.perf_counter()
    MinHash.bulk([gram_bytes(text) for text in texts], num_perm=256, hashfunc=zlib.crc32)
    return {"seconds": time.perf_counter() - start}


def sketch_ours(path, n, name):
    from nanollm.corpus import minhash
    texts = texts_of(path, n)
    start = time.perf_counter()
    for i in range(0, n, 1024):
        hashes, offsets = minhash.ngrams(*minhash.units(texts[i:i + 1024]), 5)
        minhash.signatures(hashes.astype("uint32"), offsets, 256) if name == "numpy" else minhash.one_permutation(hashes, offsets, 256)
    return {"seconds": time.perf_counter() - start}


def minhash(cfg):
    """Signatures of 256 permutations over character 5-grams, text to signature."""
    path, n = corpus(cfg, cfg.docs), min(cfg.docs, 2000)
    sides = {"ours": (sketch_ours, (path, n, "numpy")), "datasketch bulk, crc32": (sketch_bulk, (path, n)),
             "ours, one permutation": (sketch_ours, (path, n, "oph")), "datasketch update loop": (sketch_update, (path, n))}
    found = side_by_side(cfg, sides)
    ours = found["ours"]["seconds"]
    rows = [{"side": k, "docs/s": n / v["seconds"], "ours is faster by": v["seconds"] / ours, "MB": v["mb"]} for k, v in found.items()]
    table(rows, ["side", "docs/s", "ours is faster by", "MB"])
    return rows


# ---- the whole deduplication ----------------------------------------------------------------------------------------

def dedup_datasketch(path, n, fast):
    """A script as the notes have it: a MinHash a document, updated gram by gram, an index of dicts, candidates taken for
    duplicates. `fast`: the same with crc32 for SHA-1 and one update_batch a document."""
    import zlib
    from datasketch import MinHash, MinHashLSH
    start = time.perf_counter()
    lsh, gone = MinHashLSH(threshold=0.7, num_perm=256), {}
    with open(path, encoding="utf-8") as f:
        for i, line in zip(range(n), f):
            grams = gram_bytes(json.loads(line)["text"])
            m = MinHash(num_perm=256, hashfunc=zlib.crc32) if fast else MinHash(num_perm=256)
            if fast:
                m.update_batch(grams)
            else:
                for gram in grams:
                    m.update(gram)
            if found := lsh.query(m):
                gone[i] = found
            else:
                lsh.insert(i, m)
    return {"seconds": time.perf_counter() - start, "removed": len(gone)}


def dedup_ours(path, n, out):
    """prepare_data.py's own stage on the same file, one process: JSON in, parts out, every candidate verified."""
    import shutil
    import prepare_data
    shutil.rmtree(out, ignore_errors=True)
    head = Path(out).parent / f"head-{n}.jsonl"
    if not head.exists():
        with open(path, "rb") as f, open(head, "wb") as g:
            g.writelines(line for _, line in zip(range(n), f))
    start = time.perf_counter()
    prepare_data.main(["dedup", "--input", str(head), "--out", str(out), "--workers", "1", "--show", "0"])
    report = json.loads((Path(out) / "dedup/report.json").read_text(encoding="utf-8"))
    return {"seconds": time.perf_counter() - start, "removed": sum(report["dropped"].values())}


def dedup(cfg):
    """Time, memory and index of the whole stage; recall and precision on the planted pairs."""
    from nanollm.corpus import minhash, parts
    path, out = corpus(cfg, cfg.docs), Path(cfg.out).resolve() / "dedup"
    slow, fast = "datasketch, the notes' script", "datasketch, crc32, update_batch"
    sides = {"ours": (dedup_ours, (path, cfg.docs, out)), fast: (dedup_datasketch, (path, cfg.docs, True))}
    if cfg.docs <= 20_000:                                # it takes two and a half minutes for these
        sides[slow] = dedup_datasketch, (path, cfg.docs, False)
    found = side_by_side(cfg, sides, once=[slow])
    ours, peer = found["ours"], found[fast]
    rows = [{"side": k, "docs/s": cfg.docs / v["seconds"], "ours is faster by": v["seconds"] / ours["seconds"], "MB": v["mb"],
             "bytes a document": v["mb"] * 2**20 / cfg.docs, "removed": v["removed"]} for k, v in found.items()]
    table(rows, ["side", "docs/s", "ours is faster by", "MB", "bytes a document", "removed"])
    report = json.loads((out / "dedup/report.json").read_text(encoding="utf-8"))
    gone = {int(row["id"].rsplit(":", 1)[1]) - 1: row for row in parts.dropped(out / "dedup")}
    pairs = [json.loads(line) for line in open(path.with_name("planted.jsonl"), encoding="utf-8")]
    high, all_above = [p for p in pairs if p["jaccard"] >= 0.85], [p for p in pairs if p["jaccard"] >= 0.7]
    hit = lambda some: sum(p["b"] in gone for p in some)
    b, r = report["bands"], report["rows"]
    chance = [minhash.candidate_probability(p["jaccard"], b, r) for p in all_above]
    sd = sum(c * (1 - c) for c in chance) ** 0.5
    from corpus import grams
    texts, line = texts_of(path, cfg.docs), lambda name: int(name.rsplit(":", 1)[1]) - 1
    near = [(grams(texts[i]), grams(texts[line(row["dup_of"])])) for i, row in gone.items() if row["drop_reason"] == "near"]
    wrong = sum(len(a & b) / len(a | b) < 0.69 for a, b in near)      # computed anew, with sets of strings (a mark before a digit aside)
    print(f"planted pairs with J >= 0.85: {hit(high)} of {len(high)} found ({hit(high) / len(high):.2%}); with J >= 0.7: {hit(all_above)} of "
          f"{len(all_above)}, the S-curve of {b} x {r} promises {sum(chance):.1f} +- {sd:.1f}; removed below the threshold: {wrong}; "
          f"index on disk: {report['index_bytes'] / cfg.docs:.0f} bytes a document")
    return rows + [{"recall_085": hit(high) / len(high), "found_07": hit(all_above), "promised": sum(chance), "sd": sd, "planted_07": len(all_above),
                    "removed_below": wrong, "index_bytes": report["index_bytes"] / cfg.docs, "memory_ratio": ours["mb"] / peer["mb"]}]


# ---- tokenizers -------------------------------------------------------------------------------------------------------

def sample_text(cfg):
    """About 9 MB of text: from --text, or the made corpus."""
    if not cfg.text:
        return texts_of(corpus(cfg, cfg.docs), 4000)
    from nanollm.corpus import io
    tasks, texts, size = io.plan(io.find_files(cfg.text, exclude=os.devnull)[0]), [], 0
    share = 9e6 / len(tasks)
    for task in tasks:
        size = 0
        for row in io.documents(task, lambda *bad: None):
            if row["drop_reason"]:
                continue
            texts.append(row["text"])
            size += len(row["text"].encode("utf-8"))
            if size > share:
                break
    return texts


def bpe_ours(texts, pattern, vocab_size):
    from nanollm.corpus import bpe
    start = time.perf_counter()
    merges = bpe.learn_merges(bpe.count_pieces(texts, pattern), vocab_size - 256)
    return {"seconds": time.perf_counter() - start, "merges": len(merges)}


def bpe_hf(texts, pattern, vocab_size):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    start = time.perf_counter()
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return {"seconds": time.perf_counter() - start, "merges": tok.get_vocab_size() - 256}


def bpe_plain(texts, pattern, vocab_size):
    """As minbpe does it: count all pairs of all pieces anew for each merge."""
    import regex
    start = time.perf_counter()
    ids = [list(piece.encode("utf-8")) for text in texts for piece in regex.findall(pattern, text)]
    for new in range(256, vocab_size):
        counts = {}
        for chunk in ids:
            for pair in zip(chunk, chunk[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        top = max(counts, key=counts.get)
        for k, chunk in enumerate(ids):
            i, out = 0, []
            while i < len(chunk):
                if i < len(chunk) - 1 and (chunk[i], chunk[i + 1]) == top:
                    out.append(new)
                    i += 2
                else:
                    out.append(chunk[i])
                    i += 1
            ids[k] = out
    return {"seconds": time.perf_counter() - start, "merges": vocab_size - 256}


def bpe(cfg):
    """Training to --vocab_size on the same text with the same pre-tokenizer, counting included."""
    from nanollm.tokenizer import pattern_for
    texts, pattern = sample_text(cfg), pattern_for(cfg.vocab_size)
    size = sum(len(t.encode("utf-8")) for t in texts) / 1e6
    found = side_by_side(cfg, {"ours": (bpe_ours, (texts, pattern, cfg.vocab_size)), "Hugging Face tokenizers": (bpe_hf, (texts, pattern, cfg.vocab_size))})
    ours = found["ours"]["seconds"]
    rows = [{"side": name, "MB of text": size, "seconds": v["seconds"], "ours is faster by": v["seconds"] / ours, "MB": v["mb"], "merges": v["merges"]}
            for name, v in found.items()]
    few = [text[:2000] for text in texts[:: max(1, len(texts) // 200)]][:200]       # all of its merges, but of a small text
    size = sum(len(t.encode("utf-8")) for t in few) / 1e6
    small = side_by_side(cfg, {"ours, small": (bpe_ours, (few, pattern, 1024)), "recounting": (bpe_plain, (few, pattern, 1024))}, once=["recounting"])
    rows += [{"side": name, "MB of text": size, "seconds": v["seconds"], "ours is faster by": v["seconds"] / small["ours, small"]["seconds"], "MB": v["mb"],
              "merges": v["merges"]} for name, v in small.items()]
    table(rows, ["side", "MB of text", "seconds", "ours is faster by", "MB", "merges"])
    return rows


def encode_with(texts, pattern, merges, bare):
    import tiktoken
    from nanollm.tokenizer import bpe_tokenizer
    tok = bpe_tokenizer(merges, pattern)
    encode = tiktoken.Encoding("bare", pat_str=pattern, special_tokens={}, mergeable_ranks={
        tok.token_bytes(i): i for i in range(256 + len(merges))}).encode_ordinary if bare else tok.encode
    start, n = time.perf_counter(), 0
    for text in texts:
        n += len(encode(text))
    return {"seconds": time.perf_counter() - start, "tokens": n}


def encode(cfg):
    """One thread, document by document."""
    from nanollm.corpus import bpe as trainer
    from nanollm.tokenizer import pattern_for
    texts, pattern = sample_text(cfg), pattern_for(cfg.vocab_size)
    merges = trainer.learn_merges(trainer.count_pieces(texts, pattern), cfg.vocab_size - 260)
    size = sum(len(t.encode("utf-8")) for t in texts) / 1e6
    found = side_by_side(cfg, {"ours": (encode_with, (texts, pattern, merges, False)), "bare tiktoken": (encode_with, (texts, pattern, merges, True))})
    rows = [{"side": k, "MB/s": size / v["seconds"], "of tiktoken's speed": found["bare tiktoken"]["seconds"] / v["seconds"]} for k, v in found.items()]
    table(rows, ["side", "MB/s", "of tiktoken's speed"])
    return rows


# ---- our own stages ---------------------------------------------------------------------------------------------------

def prepare(*argv):
    """One command of prepare_data.py in a process of its own: (seconds, report of nothing; output goes to the screen)."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "prepare_data.py"), *map(str, argv)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return time.perf_counter() - start


def stages(cfg):
    """Each stage on the made corpus, and what its rate comes to for 5.63 million documents of that length."""
    import shutil
    path, out = corpus(cfg, cfg.docs), Path(cfg.out) / "stages"
    shutil.rmtree(out, ignore_errors=True)
    workers = cfg.workers or os.cpu_count()
    size, rows = path.stat().st_size / 1e6, []
    for name, extra in (("clean", ["--input", path]), ("dedup", []), ("tokenizer", ["--vocab_size", 32_000]), ("tokenize", [])):
        seconds = prepare(name, "--out", out, "--workers", workers, *extra)
        report = json.loads((out / {"tokenize": "tokens"}.get(name, name) / "report.json").read_text(encoding="utf-8"))
        rows.append({"stage": name, "seconds": seconds, "docs/s a core": cfg.docs / seconds / (1 if name == "tokenizer" else workers),
                     "MB/s a core": size / seconds / (1 if name == "tokenizer" else workers), "MB a process": report["peak_rss_mb"],
                     "minutes for 5.63 M": seconds / 60 * (1 if name == "tokenizer" else BAIKE / cfg.docs)})
    rows.append({"stage": "all", "seconds": sum(r["seconds"] for r in rows), "minutes for 5.63 M": sum(r["minutes for 5.63 M"] for r in rows)})
    table(rows, ["stage", "seconds", "docs/s a core", "MB/s a core", "MB a process", "minutes for 5.63 M"])
    return rows


def memory(cfg):
    """Peak memory of a process of `build` by the size of the input."""
    import shutil
    rows = []
    for mb in sorted({5, 50, cfg.mb}):
        docs = round(mb / 0.0025 / 100) * 100
        path, out = corpus(cfg, docs), Path(cfg.out) / "memory"
        shutil.rmtree(out, ignore_errors=True)
        seconds = prepare("build", "--input", path, "--out", out, "--vocab_size", 8192)
        reports = json.loads((out / "report.json").read_text(encoding="utf-8"))
        rows.append({"MB of input": path.stat().st_size / 1e6, "seconds": seconds} | {f"{name}, MB": reports[name]["peak_rss_mb"] for name in reports})
    table(rows, list(rows[0]))
    return rows


def filter_seconds(texts, name):
    """Seconds of every edit and every filter of a recipe over the texts, each rule timed by itself, and of the whole."""
    from nanollm.corpus import clean, edits, filters
    recipe = clean.read_recipe(name)
    steps, chosen, _, _ = clean.compiled(recipe)
    start = time.perf_counter()
    for text in texts:
        clean.clean_text(text, recipe)
    seconds = {"whole": time.perf_counter() - start}
    for rule, step in steps.items():
        start = time.perf_counter()
        for text in texts:
            step(text)
        seconds[f"edit {rule}"] = time.perf_counter() - start
    docs = [filters.Doc(text, text) for text in texts]
    for rule, thresholds in chosen.items():                # in their order: what several need is computed by the first
        start = time.perf_counter()
        for doc in docs:
            filters.FILTERS[rule](doc, **thresholds)
        seconds[f"filter {rule}"] = time.perf_counter() - start
    return {"seconds": seconds["whole"], **seconds}


def filters(cfg):
    """Nanoseconds a character of the default and the web recipe, whole and rule by rule (one pass of each edit)."""
    texts, rows = sample_text(cfg), []
    chars = sum(map(len, texts))
    for name in ("default", "web"):
        found = side_by_side(cfg, {name: (filter_seconds, (texts, name))})[name]
        rows += [{"recipe": name, "rule": rule, "ns a character": s / chars * 1e9} for rule, s in found.items() if rule not in ("seconds", "mb")]
    table(rows, ["recipe", "rule", "ns a character"])
    return rows


IMPORTS = {"dedup_ours": lambda: __import__("prepare_data"), "dedup_datasketch": lambda: __import__("datasketch"),
           "sketch_ours": lambda: __import__("nanollm.corpus.minhash"), "sketch_bulk": lambda: __import__("datasketch"),
           "sketch_update": lambda: __import__("datasketch"), "bpe_ours": lambda: __import__("nanollm.corpus.bpe"),
           "bpe_hf": lambda: __import__("tokenizers")}
WHAT = {f.__name__: f for f in (minhash, dedup, bpe, encode, filters, stages, memory)}


def main(cfg):
    """Run one benchmark, and add its rows to OUT/data.json."""
    if cfg.what not in WHAT:
        raise UserError(f"--what: {cfg.what!r} is none of {', '.join(WHAT)}")
    need(*["tokenizers"] * (cfg.what == "bpe"))
    rows = WHAT[cfg.what](cfg)
    path = Path(cfg.out) / "data.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[f"{cfg.what} {cfg.docs}"] = {"rows": rows, "docs": cfg.docs, "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
                         f"{platform.python_version()}", "versions": {
                             name: version(name) for name in ("numpy", "pyarrow", "datasketch", "tokenizers", "tiktoken") if find_spec(name)},
                         "date": time.strftime("%Y-%m-%d")}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    config.run(main, Config, __doc__)
