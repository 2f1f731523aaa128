"""Token files: what training reads.

    train-00000.bin    nothing but token ids, little-endian, one document after the other, one end-of-text token behind each
    train-00000.idx    the document ends as uint64 offsets into it
    train-00001.bin    … a shard holds at most 2^28 tokens and whole documents only
    train.json         the rest: dtype, vocabulary, tokenizer, counts, and the shards with their digests

Two ways to write them: write_tokens takes texts in the order given; write_splits takes Parquet parts, holds out the
validation documents, and shuffles all others over the whole corpus, in parallel and in bounded memory:

    encode_part   one part -> runs of at most 2^24 tokens, each sorted by where its documents shall stand
    write_shard   one shard <- the documents of all runs whose places fall into its range

The place of document number d of N is permute(d, N, seed), so nobody has to hold the order, and neither the number of
workers nor the cut into parts shows in the files. What is written is written aside, brought to the disk and renamed.
"""
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.sampler import permute

BATCH = 256                               # documents encoded at a time
SHARD = 2 ** 28                           # most tokens of a shard
RUN = 2 ** 24                             # most tokens in memory while documents are put in order
PLACED = np.dtype([("place", "<u8"), ("end", "<u8")])        # a document of a run: where it goes, where it ends in the run


def token_dtype(vocab_size):
    """uint16 holds the ids 0..65535, so vocabularies up to 65,536; a larger id would silently wrap round."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def content_hash(text):
    """The first 64 bits of blake2b of the text, by which documents are held out: one keeps its side when the corpus grows, and
    equal texts are never on both. The same in every process, as hash() is not."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


@contextlib.contextmanager
def written(path):
    """A binary file that appears under its name only when it is whole and on the disk."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as e:                                              # the file may also be one that the body reads
        about = f"{e.filename}: " if e.filename and str(e.filename) != str(aside) else ""
        space = "free some space and " * (e.errno == errno.ENOSPC)
        raise UserError(f"could not write {path}: {about}{e.strerror or e}; {space}run the same command again: it goes on from here") from None


def write_json(path, value):
    with written(path) as f:
        f.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def encode(texts, tokenizer):
    """Texts to (the ids of all of them, each text closed by the end-of-text token, in the dtype of the vocabulary; their
    lengths, int64). In the calling thread: there is a process for each core, and threads within one only wait for Python's
    lock. Raises UserError for an id that the vocabulary or a document may not hold."""
    rows = [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts]
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in rows])
    if flat.min() < 0 or flat.max() >= tokenizer.vocab_size:
        raise UserError(f"the tokenizer made id {flat.max()}, but its vocab_size is {tokenizer.vocab_size}: "
                        "its files do not belong together")
    if (flat == tokenizer.eos_id).sum() != len(rows):
        raise UserError(f"the tokenizer wrote its end-of-text id {tokenizer.eos_id} inside a document; there it must stand for the end alone")
    return flat.astype(token_dtype(tokenizer.vocab_size)), np.array([len(ids) for ids in rows])


def cut(lengths, limit):
    """[(first, last + 1)] of stretches of at most `limit` tokens; a longer document has a stretch to itself. lengths: tokens
    by place, int (n,); places of length 0 belong to nobody."""
    total = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    stretches, begin = [], 0
    while total[begin] < total[-1]:
        end = int(np.searchsorted(total, total[begin] + limit, side="right")) - 1
        end = max(end, int(np.searchsorted(total, total[begin], side="right")))             # at least one document
        stretches.append((begin, end))
        begin = end
    return stretches


def cut_stream(blocks, limit):
    """The same cut of a stream whose lengths are not yet known: (ids, lengths) -> (number of the shard, ids, lengths)."""
    number = filled = 0
    for ids, lengths in blocks:
        while len(lengths):
            fit = int(np.searchsorted(np.cumsum(lengths), limit - filled, side="right"))
            if not fit and filled:
                number, filled = number + 1, 0
                continue
            fit = max(fit, 1)
            n = int(lengths[:fit].sum())
            yield number, ids[:n], lengths[:fit]
            ids, lengths, filled = ids[n:], lengths[fit:], filled + n


def save_shard(directory, split, number, blocks):
    """Write DIR/SPLIT-NUMBER.bin and .idx from blocks of (ids, lengths); returns the shard's entry in the JSON."""
    path, digest, n_tokens, n_docs = Path(directory) / f"{split}-{number:05d}.bin", hashlib.blake2b(digest_size=16), 0, 0
    with written(path) as bin_file, written(path.with_suffix(".idx")) as idx_file:
        for ids, lengths in blocks:
            raw = ids.tobytes()
            digest.update(raw)
            bin_file.write(raw)
            idx_file.write((n_tokens + np.cumsum(lengths)).astype("<u8").tobytes())
            n_tokens, n_docs = n_tokens + len(ids), n_docs + len(lengths)
    return {"file": path.name, "n_tokens": n_tokens, "n_docs": n_docs, "bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def save_meta(directory, split, tokenizer, shards, n_bytes, sources):
    """Write DIR/SPLIT.json, last: with it the split is whole. Shards of an earlier, larger one go. Returns it as a dict."""
    meta = {"format": "nanollm-tokens", "version": 2, "dtype": token_dtype(tokenizer.vocab_size).name,
            "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash,
            "n_tokens": sum(s["n_tokens"] for s in shards), "n_docs": sum(s["n_docs"] for s in shards), "n_bytes": n_bytes,
            "sources": sources, "shards": shards}
    write_json(Path(directory) / f"{split}.json", meta)
    named = {s["file"] for s in shards}
    for path in Path(directory).glob(f"{split}-*"):
        if re.fullmatch(rf"{split}-\d{{5}}\.(bin|idx)", path.name) and path.with_suffix(".bin").name not in named:
            path.unlink()
    return meta


def write_tokens(directory, split, texts, tokenizer, shard_tokens=SHARD):
    """Encode `texts` (an iterable of str, streamed) in their order into a split of DIRECTORY; returns its JSON as a dict.

    Raises UserError if an id does not fit the tokenizer's own vocab_size.
    """
    texts, n_bytes = iter(texts), 0

    def encoded():
        nonlocal n_bytes
        while batch := list(islice(texts, BATCH)):
            n_bytes += sum(len(text.encode("utf-8")) for text in batch)
            yield encode(batch, tokenizer)
    (Path(directory) / f"{split}.json").unlink(missing_ok=True)       # no description of what is being replaced
    shards = [save_shard(directory, split, number, (block[1:] for block in blocks))
              for number, blocks in groupby(cut_stream(encoded(), shard_tokens), key=itemgetter(0))]
    return save_meta(directory, split, tokenizer, shards, n_bytes, {})


def describe(directory, split, tokenizer, dtype):
    """Write what a bare SPLIT.bin of another program lacks, SPLIT.idx and SPLIT.json: dtype "uint16" or "uint32" must be
    known, a file cannot tell. Raises UserError if the ids are not this tokenizer's. Returns the JSON as a dict."""
    path = Path(directory) / f"{split}.bin"
    if dtype not in ("uint16", "uint32") or not path.is_file():
        raise UserError(f"{path} must exist, and its dtype be uint16 or uint32, not {dtype!r}")
    if path.stat().st_size % np.dtype(dtype).itemsize or not path.stat().st_size:
        raise UserError(f"{path} is no whole number of {dtype}")
    tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    size, n_bytes, ends = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]), 0, []
    for begin in range(0, len(tokens), RUN):
        part = tokens[begin : begin + RUN]
        if part.max() >= tokenizer.vocab_size:
            raise UserError(f"{path} holds id {part.max()}, the vocabulary ends at {tokenizer.vocab_size}: another tokenizer or dtype")
        n_bytes += int(size[part].sum())
        ends.append(begin + 1 + np.flatnonzero(part == tokenizer.eos_id))
    ends = np.concatenate(ends)
    if not len(ends) or ends[-1] < len(tokens):                       # a text that was never closed ends with the file
        ends = np.append(ends, len(tokens))
    with written(path.with_suffix(".idx")) as f:
        f.write(ends.astype("<u8").tobytes())
    meta = {"format": "nanollm-tokens", "version": 1, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
            "tokenizer_hash": tokenizer.hash, "n_tokens": len(tokens), "n_docs": len(ends), "n_bytes": n_bytes}
    write_json(path.with_suffix(".json"), meta)
    return meta


# ----------------------------------------------------------------------------------------------------------------
# A whole corpus: encode in parallel, shuffle on the disk


def signature_of(item):
    return hashlib.blake2b(json.dumps(item, sort_keys=True).encode("utf-8"), digest_size=16).hexdigest()


def finished(path, signature, files=lambda record: []):
    """What an earlier try recorded in `path` for the same work, if its files are there in their sizes; else None."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = record["signature"] == signature and all(p.stat().st_size == size for p, size in files(record))
        return record if whole else None
    except (OSError, ValueError, KeyError):
        return None


def in_place_order(ids, lengths, places):
    """Documents laid end to end in `ids`, put in the order of their places: (ids, lengths, places)."""
    order, ends = np.argsort(places), np.cumsum(lengths)
    ids = np.concatenate([ids[end - n : end] for n, end in zip(lengths[order].tolist(), ends[order].tolist())])
    return ids, lengths[order], places[order]


@functools.lru_cache(maxsize=2)
def cached_tokenizer(directory):
    return tokenizers.load(directory)


def group_of(source, by_source):
    """The directory that a document's source gets: its name with nothing but letters, digits and ._- in it; "" for all."""
    return (re.sub(r"[^\w.-]+", "_", source).strip(".") or "unnamed") if by_source else ""


def encode_part(item):
    """Encode one Parquet part into runs sorted by place; returns (and records, so that a second call is free)

        {"signature", "runs": [[group, split, stem, n_docs, n_tokens]], "least": {group: smallest content hash},
         "counts": {group: {split: {source: [documents, tokens, bytes]}}}}

    item: {"part": path, "state": [size, time], "number", "first": number of its first document, "n_docs": of the whole
    corpus, "seed", "val_below": content hashes below it are held out, "val_below_of": {group: the same for one group},
    "by_source", "tokenizer": directory, "tokenizer_hash", "out": where the runs go}.
    """
    out, signature = Path(item["out"]), signature_of(item)
    record_path, tokenizer = out / f"part-{item['number']:05d}.json", cached_tokenizer(item["tokenizer"])
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    if record := finished(record_path, signature, lambda r: [x for _, _, stem, n_docs, n_tokens in r["runs"] for x in (
            (out / f"{stem}.ids", n_tokens * itemsize), (out / f"{stem}.docs", n_docs * PLACED.itemsize))]):
        return record
    record = {"signature": signature, "runs": [], "least": {}, "counts": {}}
    waiting, held, docno = defaultdict(list), 0, item["first"]         # (group, split) -> blocks of (ids, lengths, places)

    def flush():
        for (group, split), blocks in sorted(waiting.items()):
            ids, lengths, places = in_place_order(*map(np.concatenate, zip(*blocks)))
            stem = f"part-{item['number']:05d}-{len(record['runs']):05d}"
            docs = np.empty(len(lengths), PLACED)
            docs["place"], docs["end"] = places, np.cumsum(lengths)
            for name, array in (("ids", ids), ("docs", docs)):
                with written(out / f"{stem}.{name}") as f:
                    f.write(array.tobytes())
            record["runs"].append([group, split, stem, len(docs), len(ids)])
        waiting.clear()

    file = pq.ParquetFile(item["part"])
    columns = [name for name in ("text", "source") if name in file.schema_arrow.names]
    if "text" not in columns:
        raise UserError(f"{item['part']} has no column `text`; its columns are {', '.join(file.schema_arrow.names)}")
    for table in file.iter_batches(batch_size=BATCH, columns=columns):
        texts = table.column("text").to_pylist()
        sources = [s or "" for s in table.column("source").to_pylist()] if "source" in columns else [""] * len(texts)
        if None in texts:
            raise UserError(f"{item['part']}: document {texts.index(None) + docno - item['first']} has no text; clean drops such rows")
        ids, lengths = encode(texts, tokenizer)
        places = permute(np.arange(docno, docno + len(texts)), item["n_docs"], item["seed"])
        rows, ends = defaultdict(list), np.cumsum(lengths)
        for i, (text, source) in enumerate(zip(texts, sources)):
            group, number = group_of(source, item["by_source"]), content_hash(text)
            split = "val" if number < item["val_below_of"].get(group, item["val_below"]) else "train"
            rows[group, split].append(i)
            record["least"][group] = min(number, record["least"].get(group, number))
            count = record["counts"].setdefault(group, {}).setdefault(split, {}).setdefault(source, [0, 0, 0])
            for k, n in enumerate((1, int(lengths[i]), len(text.encode("utf-8")))):
                count[k] += n
        for key, chosen in rows.items():
            waiting[key].append((np.concatenate([ids[ends[i] - lengths[i] : ends[i]] for i in chosen]), lengths[chosen], places[chosen]))
        docno, held = docno + len(texts), held + len(ids)
        if held >= RUN:
            flush()
            held = 0
    flush()
    write_json(record_path, record)
    return record


def write_shard(item):
    """Write shard number `number` of a split: the documents of all runs whose place lies in item["places"] = [from, to),
    in the order of their places, a stretch of at most 2^24 tokens at a time. Returns the shard's entry in the JSON.

    item: {"out": directory, "runs": [path without ending], "work": where the record goes, "split", "number", "places",
    "dtype", "encoded": digest of what the runs hold}.
    """
    out, signature, dtype = Path(item["out"]), signature_of(item), np.dtype(item["dtype"])
    record_path = Path(item["work"]) / f"{out.name}-{item['split']}-{item['number']:05d}.json"
    if record := finished(record_path, signature, lambda r: [(out / r["shard"]["file"], r["shard"]["bytes"])]):
        return record["shard"]

    def part_of(stem, lo, hi):
        """(places, lengths, first token) of a run's documents with lo <= place < hi."""
        docs = np.fromfile(f"{stem}.docs", PLACED)
        a, b = np.searchsorted(docs["place"], [lo, hi])
        ends = np.concatenate(([0], docs["end"])).astype(np.int64)
        return docs["place"][a:b].astype(np.int64), np.diff(ends[a : b + 1]), int(ends[a])

    def blocks():
        runs = [(stem, *part_of(stem, *item["places"])) for stem in item["runs"]]
        places = np.concatenate([run[1] for run in runs])
        order = np.argsort(places)
        places, lengths = places[order], np.concatenate([run[2] for run in runs])[order]
        for begin, end in cut(lengths, RUN):
            found = []
            for stem, at, sizes, first in runs:
                a, b = np.searchsorted(at, [places[begin], places[end - 1] + 1])
                if a < b:
                    skip = (first + int(sizes[:a].sum())) * dtype.itemsize
                    found.append((np.fromfile(f"{stem}.ids", dtype, int(sizes[a:b].sum()), offset=skip), sizes[a:b], at[a:b]))
            yield in_place_order(*map(np.concatenate, zip(*found)))[:2]

    shard = save_shard(out, item["split"], item["number"], blocks())
    write_json(record_path, {"signature": signature, "shard": shard})
    return shard


def serial(function, items, label):
    """The simplest `run`: one after the other, here."""
    return [function(item) for item in items]


def write_splits(parts, out, tokenizer_dir, val_fraction, seed, run=serial, shard_tokens=SHARD, by_source=False):
    """Tokenize Parquet parts (paths, in the global order; columns text and source) into OUT: train and val, each shuffled
    over the whole corpus. Returns {"train": meta, "val": meta}; by_source: one directory OUT/SOURCE for each source, to be
    mixed by weight, and {SOURCE: {"train": meta, "val": meta}}.

    run(function, items, label) -> results in their order: how the work is done, serially or by a pool. A document is held
    out if its content hash lies below val_fraction * 2^64, and at least the one with the smallest hash is. Interrupted, it
    goes on from the parts and shards that are whole. Raises UserError if a side stays empty.
    """
    out, tokenizer = Path(out), tokenizers.load(tokenizer_dir)
    work = out / "encoded"
    work.mkdir(parents=True, exist_ok=True)
    sizes = [pq.ParquetFile(part).metadata.num_rows for part in parts]
    n_docs, firsts = sum(sizes), np.concatenate(([0], np.cumsum(sizes))).tolist()
    states = [[Path(part).stat().st_size, Path(part).stat().st_mtime_ns] for part in parts]
    items = [{"part": str(part), "state": state, "number": number, "first": first, "n_docs": n_docs, "seed": seed,
              "val_below": val_fraction * 2 ** 64, "val_below_of": {}, "by_source": by_source, "tokenizer": str(tokenizer_dir),
              "tokenizer_hash": tokenizer.hash, "out": str(work)}
             for number, (part, first, size, state) in enumerate(zip(parts, firsts, sizes, states)) if size]
    encoded = run(encode_part, items, "encode")
    groups = sorted({group for record in encoded for group in record["counts"]})

    for group in groups:                                              # nothing held out: then the document of the smallest hash
        if not any("val" in record["counts"].get(group, {}) for record in encoded):
            least = min(record["least"][group] for record in encoded if group in record["least"])
            for item, record in zip(items, encoded):
                if record["least"].get(group) == least:
                    item["val_below_of"] |= {group: least + 1}
    again = [k for k, item in enumerate(items) if item["val_below_of"]]
    for k, record in zip(again, run(encode_part, [items[k] for k in again], "encode") if again else []):
        encoded[k] = record

    counts = {group: {split: sum_counts(record["counts"].get(group, {}).get(split, {}) for record in encoded)
                      for split in ("train", "val")} for group in groups}
    for group, sides in counts.items():
        names = sorted({name for side in sides.values() for name in side})
        if not sides["train"] or not sides["val"]:
            n = sum(n for side in sides.values() for n, _, _ in side.values())
            raise UserError(f"all {n:,} documents{f' of {group}' if group else ''} fell on one side of the validation split; use more documents "
                            "(--doc_sep says where one ends) or another --val_fraction")
        if by_source and (len(names) > 1 or group in ("encoded", "tokenizer")):
            raise UserError(f"the sources {', '.join(map(repr, names))} would share the directory {group}; rename one")
    if not groups:
        raise UserError("there is no document to tokenize")

    digest, dtype, items = signature_of([record["signature"] for record in encoded]), token_dtype(tokenizer.vocab_size), []
    for group in groups:
        (out / group).mkdir(exist_ok=True)
        tokenizer.save(out / group / "tokenizer")
        for split in ("train", "val"):
            (out / group / f"{split}.json").unlink(missing_ok=True)   # no description of what is being replaced
            stems = [str(work / stem) for record in encoded for g, s, stem, _, _ in record["runs"] if (g, s) == (group, split)]
            lengths = np.zeros(n_docs, np.uint32)                     # by place; the only array over all documents
            for stem in stems:
                docs = np.fromfile(f"{stem}.docs", PLACED)
                lengths[docs["place"]] = np.diff(docs["end"], prepend=np.uint64(0))
            items += [{"out": str(out / group), "runs": stems, "work": str(work), "split": split, "number": number, "places": places,
                       "dtype": dtype.str, "encoded": digest} for number, places in enumerate(cut(lengths, shard_tokens))]
    shards = list(zip(items, run(write_shard, items, "shuffle")))

    result = {}
    for group in groups:
        result[group] = {split: save_meta(
            out / group, split, tokenizer, [s for item, s in shards if (item["out"], item["split"]) == (str(out / group), split)],
            sum(n for _, _, n in side.values()), {name: n for name, (_, n, _) in sorted(side.items())}) for split, side in counts[group].items()}
    if by_source:
        tokenizer.save(out / "tokenizer")
    shutil.rmtree(work)
    return result if by_source else result[""]


def sum_counts(tables):
    """{source: [documents, tokens, bytes]} of all parts added up."""
    total = {}
    for table in tables:
        for name, counts in table.items():
            total[name] = [a + b for a, b in zip(total.get(name, (0, 0, 0)), counts)]
    return total
