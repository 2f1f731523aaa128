"""Deduplication of a corpus on disk: exact copies by a hash of the text, near copies by MinHash-LSH, every pair verified.

    sketch    each document -> a 128-bit key of its text and one 64-bit number for each LSH band (minhash.py)
    exact     equal keys: the first one in keep order stays, and alone goes on
    join      each band's column sorted: documents with equal numbers are candidate pairs
    verify    the candidates are read again, and the true Jaccard similarity of each pair is computed
    cluster   greedy, keep first: a document goes if a *kept* one before it reaches the threshold

Candidates are not duplicates: every pair of unrelated texts has a small chance to share a band, and a document of a large
corpus has millions of partners to do so with. Hence the verification. And because each removed document names a kept one
that is as similar as promised, a chain A~B~C does not remove C for the sake of B (connected components would).

A document's number is its place in the corpus: parts in order, rows in order. Its rank is its place among the documents
that may have near copies, in the order in which one would keep them. An edge is a pair of ranks, packed as later << 32 |
earlier, so that sorting edges sorts them by the later document. In memory are a few arrays of 8 bytes a document and one
band at a time, never the corpus; what each step has found lies in `work`, so an interrupted run goes on where it was.
"""
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasketch import MinHash, MinHashLSH

from nanollm.config import UserError
from nanollm.corpus import minhash, simhash
from nanollm.corpus.parts import written

BATCH_CHARS = 65_536                      # characters sketched at once: their arrays stay in the cache
MAX_RUN = 64                              # documents with one band value: up to here all pairs are candidates
EDGES = 1 << 22                           # edges held in memory at once (32 MB)
PAIRS = 1 << 16                           # pairs verified in one task, about a second
DATASKETCH_LIMIT = 200_000                # documents; its index of Python dicts takes about 10 KB for each
SAMPLE = 2_000                            # documents from which the false candidates are estimated
EARLIER = (1 << 32) - 1                   # the lower half of an edge
VERIFIED = np.dtype([("edge", "<u8"), ("jaccard", "<f8")])
KINDS = (None, "exact", "near")           # what kind.npy counts in


@dataclass(frozen=True)
class DedupConfig:
    threshold: float = 0.7                # a document goes if its Jaccard similarity with a kept one reaches this
    ngram: int = 5                        # units in a shingle
    num_perm: int = 256                   # length of the signature
    bands: int = 0                        # 0: chosen from the threshold, by minhash.bands_and_rows
    rows: int = 0
    fn_weight: float = 0.5                # weight of an overlooked pair in that choice, against a false candidate
    sketch: str = "numpy"                 # numpy | oph (one permutation, 3x faster) | datasketch (in memory, small corpora) | simhash
    shingle: str = "char"                 # unit: char | word | jieba
    cluster: str = "greedy"               # greedy | cc (connected components)
    keep: str = "first"                   # which of several copies stays: first | longest | best (column quality)
    verify: bool = True                   # False believes every candidate: only to see what that costs
    min_units: int = 20                   # shorter documents go only if equal to the character
    hamming: int = 3                      # simhash: candidates differ in at most so many of 64 bits
    seed: int = 1


def config_of(options):
    """The DedupConfig of the command line's options. Raises UserError if it makes no sense."""
    cfg = DedupConfig(seed=options.hash_seed, **{f.name: getattr(options, f.name) for f in dataclasses.fields(DedupConfig) if f.name != "seed"})
    bands_of(cfg)
    return cfg


def bands_of(cfg):
    """(bands, rows) of a configuration. Raises UserError if it makes no sense."""
    for name, choices in (("sketch", ("numpy", "oph", "datasketch", "simhash")), ("shingle", ("char", "word", "jieba")),
                          ("cluster", ("greedy", "cc")), ("keep", ("first", "longest", "best"))):
        if getattr(cfg, name) not in choices:
            raise UserError(f"--{name}: {getattr(cfg, name)!r} is none of {', '.join(choices)}")
    if not 0 < cfg.threshold <= 1 or not 0 < cfg.fn_weight < 1:
        raise UserError("--threshold must lie in (0, 1] and --fn_weight in (0, 1)")
    if cfg.ngram < 1 or cfg.num_perm < 1 or cfg.min_units < 1:
        raise UserError("--ngram, --num_perm and --min_units must be at least 1")
    if (cfg.bands > 0) != (cfg.rows > 0) or cfg.bands * cfg.rows > cfg.num_perm or min(cfg.bands, cfg.rows) < 0:
        raise UserError(f"--bands {cfg.bands} --rows {cfg.rows}: give both, with bands * rows <= --num_perm {cfg.num_perm}, "
                        "or neither")
    if cfg.bands:
        return cfg.bands, cfg.rows
    return minhash.bands_and_rows(cfg.threshold, cfg.num_perm, 1 - cfg.fn_weight, cfg.fn_weight)


# ---- sketch ----------------------------------------------------------------------------------------------------------

def slices(texts):
    """(begin, end) of stretches of `texts` with at most BATCH_CHARS characters, or one text."""
    begin = size = 0
    for i, text in enumerate(texts):
        if size + len(text) > BATCH_CHARS and i > begin:
            yield begin, i
            begin, size = i, 0
        size += len(text)
    if texts:
        yield begin, len(texts)


def text_keys(texts, short):
    """blake2b-128 of each text, as (documents, 2) uint64: two texts with one key are exact copies. Prose counts without case,
    blanks and punctuation, but with the signs of arithmetic and code (minhash.characters, signs=True): nobody verifies
    these copies. The texts that are `short`, bool (documents,), are compared as they are, in NFC."""
    codes, offsets = minhash.characters(texts, signs=True)
    data = codes.astype("<u4").tobytes()
    digests = [hashlib.blake2b(b"\0" + unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass") if alone else data[4 * a:4 * b],
                               digest_size=16).digest()
               for text, alone, a, b in zip(texts, short.tolist(), offsets.tolist(), offsets[1:].tolist())]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def signatures(texts, cfg):
    """(signatures (documents, num_perm) uint32, number of units of each text)."""
    numbers, offsets = minhash.units(texts, cfg.shingle)
    hashes, starts = minhash.ngrams(numbers, offsets, cfg.ngram)
    if cfg.sketch == "oph":
        return minhash.one_permutation(hashes, starts, cfg.num_perm, cfg.seed), np.diff(offsets)
    return minhash.signatures(minhash.upper_half(hashes), starts, cfg.num_perm, cfg.seed), np.diff(offsets)


def sketch(table, cfg):
    """Documents -> what deduplication needs to know of each: its key (key_0, key_1), its number of units, its priority
    (the higher, the rather it is kept) and the value of each band (band_00, ...; none with --sketch datasketch, the
    fingerprint with --sketch simhash).

    A table function: rows in = rows out, in order, each row's result its own. Raises UserError if `keep` wants a column
    that the table does not have.
    """
    (bands, rows), texts = bands_of(cfg), [text or "" for text in table["text"].to_pylist()]
    keys, lengths = np.zeros((len(texts), 2), dtype=np.uint64), np.zeros(len(texts), dtype=np.int64)
    values = np.zeros((len(texts), {"datasketch": 0, "simhash": 1}.get(cfg.sketch, bands)), dtype=np.uint64)
    for a, b in slices(texts):
        if cfg.sketch in ("datasketch", "simhash"):
            lengths[a:b] = np.diff(minhash.units(texts[a:b], cfg.shingle)[1])
            if cfg.sketch == "simhash":
                values[a:b, 0] = simhash.fingerprints(texts[a:b])
                lengths[a:b][values[a:b, 0] == 0] = 0     # no letter and no digit: all such texts would be near each other
        else:
            signature, lengths[a:b] = signatures(texts[a:b], cfg)
            values[a:b] = minhash.band_hashes(signature, bands, rows)
        keys[a:b] = text_keys(texts[a:b], lengths[a:b] < cfg.min_units)
    if cfg.keep == "best":
        if "quality" not in table.column_names or len(table) and table["quality"].null_count == len(table):
            raise UserError("--keep best: the documents have no quality; run `prepare_data.py score` before, and then dedup --input OUT/score")
        priority = np.nan_to_num(table["quality"].to_numpy().astype(np.float64), nan=-np.inf)
    else:
        priority = lengths.astype(np.float64) * (cfg.keep == "longest")
    return pa.table({"key_0": keys[:, 0], "key_1": keys[:, 1], "units": lengths.astype(np.int32), "priority": priority,
                     **{f"band_{k:02d}": values[:, k] for k in range(values.shape[1])}})


# ---- files -----------------------------------------------------------------------------------------------------------

def save(path, array):
    with written(path) as aside, open(aside, "wb") as file:
        np.save(file, array)


def load(path):
    return np.load(path, mmap_mode="r")


def numbers_in(path, count, dtype=np.uint64):
    """The memory map of a flat file of `count` numbers. Raises UserError if it has another size."""
    size, want = os.path.getsize(path), count * np.dtype(dtype).itemsize
    if size != want:
        raise UserError(f"{path} is damaged: {size} bytes instead of {want}; delete its directory and run again")
    return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype)      # an empty file cannot be mapped


def batches(path, columns, rows=None):
    """Tables of up to 1,024 documents at a time; only of the sorted row numbers `rows`, if given: then row groups without
    one are not read. Columns that the file does not have are left out."""
    with pq.ParquetFile(path) as file:
        columns, first = [name for name in columns if name in file.schema_arrow.names], 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if rows is None or np.searchsorted(rows, first) < np.searchsorted(rows, last):
                for batch in file.iter_batches(1024, row_groups=[group], columns=columns):
                    table = pa.Table.from_batches([batch])
                    yield table if rows is None else table.take(rows[(rows >= first) & (rows < first + len(table))] - first)
                    first += len(table)
            first = last


def rows_of_parts(parts, starts, numbers):
    """(part, its row numbers) of the documents with the sorted `numbers`."""
    cuts = np.searchsorted(numbers, starts).tolist()
    return [(part, numbers[a:b] - start) for part, a, b, start in zip(parts, cuts, cuts[1:], starts.tolist())]


def texts_at(parts, starts, numbers):
    """The texts of the documents with the sorted `numbers`."""
    return [text or "" for part, rows in rows_of_parts(parts, starts, numbers) for table in batches(part, ["text"], rows)
            for text in table["text"].to_pylist()]


# ---- the steps -------------------------------------------------------------------------------------------------------

def sketch_part(item):
    """(part, sketch file, cfg): the sketch of one part, batch by batch."""
    part, path, cfg = item
    if os.path.exists(path):
        return
    with written(path) as aside:
        schema = sketch(pa.table({"text": pa.array([], pa.large_string()), "quality": pa.array([], pa.float32())}), cfg).schema
        with pq.ParquetWriter(aside, schema, compression="none", use_dictionary=False, write_statistics=False) as out:
            for table in batches(part, ["text"] + ["quality"] * (cfg.keep == "best")):
                out.write_table(sketch(table, cfg))


def column(sketches, name):
    """One column of all sketches, as an array over the documents."""
    return np.concatenate([pq.read_table(path, columns=[name])[name].to_numpy() for path in sketches])


def find_exact_copies(sketches, work, cfg):
    """exact.npy: for each document the number of the one that it repeats (of equal ones, the one to keep), or its own.
    order.npy: rank -> number; rank.npy: number -> rank, -1 for copies and for documents of fewer than min_units units."""
    keys = column(sketches, "key_0"), column(sketches, "key_1")
    number = np.arange(len(keys[0]))
    in_order = number if cfg.keep == "first" else np.argsort(-column(sketches, "priority"), kind="stable")
    place = np.empty_like(number)
    place[in_order] = number
    by_key = np.lexsort((place, *keys))
    new = np.ones(len(number), dtype=bool)
    new[1:] = (keys[0][by_key[1:]] != keys[0][by_key[:-1]]) | (keys[1][by_key[1:]] != keys[1][by_key[:-1]])
    exact = np.empty_like(number)
    exact[by_key] = by_key[new][np.cumsum(new) - 1]
    order = in_order[((exact == number) & (column(sketches, "units") >= cfg.min_units))[in_order]]
    rank = np.full(len(number), -1)
    rank[order] = np.arange(len(order))
    save(work / "exact.npy", exact)
    save(work / "order.npy", order)
    save(work / "rank.npy", rank)


def edges_of_runs(values, ranks):
    """Candidate pairs among documents with equal values, the arrays sorted by (value, rank): yields arrays of edges.

    In a run of up to MAX_RUN documents all pairs; in a longer one, where that would be quadratic, each with the first and
    with the one before it. If the first is kept, and in such a run all are nearly equal, that decides the same.
    """
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[:len(values)])
    lengths = np.diff(starts, append=len(values))
    run, place = np.repeat(lengths, lengths), np.arange(len(values)) - np.repeat(starts, lengths)
    for distance in range(1, min(int(lengths.max(initial=1)), MAX_RUN)):
        later = np.flatnonzero((place >= distance) & ((run <= MAX_RUN) | (distance == 1)))
        yield pack(ranks[later - distance], ranks[later])
    later = np.flatnonzero((run > MAX_RUN) & (place > 1))
    yield pack(ranks[later - place[later]], ranks[later])


def distinct(numbers):
    """The sorted distinct values of an array; several times as fast as np.unique, which hashes."""
    numbers = np.sort(numbers)
    return numbers[np.append(numbers[:-1] != numbers[1:], True)[:len(numbers)]]


def pack(earlier, later):
    return later.astype(np.uint64) << np.uint64(32) | earlier.astype(np.uint64)


def unpack(edges):
    """(earlier ranks, later ranks) of an array of edges."""
    return (edges & np.uint64(EARLIER)).astype(np.int64), (edges >> np.uint64(32)).astype(np.int64)


def edges_of_band(values):
    """The edges of one band from its values by rank: sort, and look at the runs."""
    by_value = np.argsort(values)
    same = values[by_value[1:]] == values[by_value[:-1]]
    in_run = np.zeros(len(values), dtype=bool)
    in_run[1:] |= same
    in_run[:-1] |= same
    ranks = by_value[in_run]
    ranks = ranks[np.lexsort((ranks, values[ranks]))]
    yield from edges_of_runs(values[ranks], ranks)


def simhash_edges(fingerprints, k):
    """Yields arrays of edges: the pairs whose fingerprints (N,), by rank, differ in at most k bits, with the shortcut of
    `edges_of_runs` for templates. A pair comes once for each table in which its two meet."""
    for mask in simhash.tables(k):
        for edges in edges_of_band(fingerprints & mask):
            earlier, later = unpack(edges)
            yield edges[simhash.hamming(fingerprints[earlier], fingerprints[later]) <= k]


def band_rows(table, cfg):
    """For a join by another engine: a sketch table with the column rank -> one row (band, value, rank) for each band of
    each document that takes part. Grouped by (band, value), `edges_of_group` of each group gives the edges."""
    table, (bands, _) = table.filter(pc.greater_equal(table["rank"], 0)), bands_of(cfg)
    return pa.table({"band": np.repeat(np.arange(bands, dtype=np.int32), len(table)),
                     "value": np.concatenate([table[f"band_{k:02d}"].to_numpy() for k in range(bands)]),
                     "rank": np.tile(table["rank"].to_numpy(), bands)})


def edges_of_group(table):
    """Rows of `band_rows` of one band -> {"edge"}, as the local join finds them: all rows of a value must be there, and rows
    of other values may be."""
    values, ranks = table["value"].to_numpy(), table["rank"].to_numpy()
    order = np.lexsort((ranks, values))
    return pa.table({"edge": np.concatenate([np.zeros(0, dtype=np.uint64), *edges_of_runs(values[order], ranks[order])])})


def ranked_sketch(sketch_path, begin, work):
    """A sketch table with the column rank, for `band_rows`; `begin` is the number of its first document."""
    table = pq.read_table(sketch_path)
    return table.append_column("rank", [np.array(load(Path(work) / "rank.npy")[begin:begin + len(table)])])


def datasketch_edges(documents, cfg):
    """The join as datasketch does it, in memory: MinHash, MinHashLSH, query before insert. Yields arrays of edges.

    `documents` are (rank, 64-bit shingle hashes). Fed with the same 32-bit hashes and seed, its candidates are those of
    the numpy sketch, bit for bit (runs over MAX_RUN aside, of which it knows no shortcut).
    """
    index = MinHashLSH(num_perm=cfg.num_perm, params=bands_of(cfg))
    empty = MinHash(num_perm=cfg.num_perm, seed=cfg.seed, hashfunc=int)
    for rank, hashes in documents:
        signature = empty.copy()
        signature.update_batch(minhash.upper_half(hashes).tolist())
        others = np.array(index.query(signature), dtype=np.int64)           # a query returns candidates, not duplicates
        index.insert(rank, signature)
        yield pack(np.minimum(others, rank), np.maximum(others, rank))


def shingles_of_parts(parts, rank, cfg):
    """(rank, shingle hashes) of each document that takes part, for the join above."""
    first = 0
    for part in parts:
        for table in batches(part, ["text"]):
            for number, text in enumerate(table["text"].to_pylist(), start=first):
                if rank[number] >= 0:
                    yield int(rank[number]), minhash.ngrams(*minhash.units([text or ""], cfg.shingle), cfg.ngram)[0]
            first += len(table)


def store_edges(arrays, work):
    """Write arrays of edges to segments.u64, in sorted segments of about EDGES, and then their lengths to segments.npy."""
    lengths, waiting, size = [], [], 0

    def flush(file):
        segment = distinct(np.concatenate(waiting))
        segment.tofile(file)
        lengths.append(len(segment))
        waiting.clear()
    with written(work / "segments.u64") as aside, open(aside, "wb") as file:
        for edges in arrays:
            waiting.append(edges)
            size += len(edges)
            if size >= EDGES:
                flush(file)
                size = 0
        if size:
            flush(file)
    save(work / "segments.npy", np.array(lengths, dtype=np.int64))


def merge_edges(work, documents):
    """edges.u64: the edges of all segments, sorted, each once; candidates.npy: the numbers of the documents they touch.

    A segment is sorted, so its edges between two bounds are found by bisection. The bounds are taken so that no segment
    has more than its share of EDGES between two of them.
    """
    cuts = np.cumsum(np.load(work / "segments.npy")).tolist()
    edges = numbers_in(work / "segments.u64", cuts[-1] if cuts else 0)
    segments = [edges[a:b] for a, b in zip([0, *cuts], cuts)]
    share = max(EDGES // max(len(segments), 1), 1)
    bounds = np.unique(np.concatenate([np.zeros(1, dtype=np.uint64), *(segment[::share] for segment in segments)]))
    places = [np.append(np.searchsorted(segment, bounds), len(segment)).tolist() for segment in segments]
    order, touched = load(work / "order.npy"), np.zeros(documents, dtype=bool)
    with written(work / "edges.u64") as aside, open(aside, "wb") as file:
        for k in range(len(bounds)):
            pieces = [segment[place[k]:place[k + 1]] for segment, place in zip(segments, places) if place[k] < place[k + 1]]
            if pieces:
                edges = distinct(np.concatenate(pieces))
                edges.tofile(file)
                for ranks in unpack(edges):
                    touched[order[ranks]] = True
    save(work / "candidates.npy", np.flatnonzero(touched))


def write_shingles(item):
    """(part, path, rows, cfg): path.u64, the sorted distinct shingle hashes of the documents in `rows` (sorted row numbers),
    one after the other; path.npy, where each begins and ends."""
    part, path, rows, cfg = item
    if os.path.exists(f"{path}.npy"):
        return
    lengths = [0]
    with written(f"{path}.u64") as aside, open(aside, "wb") as file:
        for table in batches(part, ["text"], rows):
            texts = [text or "" for text in table["text"].to_pylist()]
            for a, b in slices(texts):
                hashes, offsets = minhash.ngrams(*minhash.units(texts[a:b], cfg.shingle), cfg.ngram)
                for begin, end in zip(offsets.tolist(), offsets[1:].tolist()):
                    shingles = distinct(hashes[begin:end])
                    shingles.tofile(file)
                    lengths.append(len(shingles))
    save(f"{path}.npy", np.cumsum(lengths))


def open_shingles(path):
    offsets = np.load(f"{path}.npy")
    return numbers_in(f"{path}.u64", int(offsets[-1])), offsets


def jaccard_of(a, b):
    """J of two sets given as sorted arrays of distinct numbers."""
    both = np.concatenate([a, b])
    both.sort(kind="stable")                                                # which merges two sorted runs: five times as fast here
    common = np.count_nonzero(both[1:] == both[:-1])
    return common / (len(both) - common)


def verify_pairs(item):
    """(work, path, begin, end, cfg): edges begin..end of edges.u64 whose true Jaccard similarity reaches the threshold ->
    `path`, an array of VERIFIED."""
    work, path, begin, end, cfg = item
    if os.path.exists(path):
        return
    work = Path(work)
    edges = np.fromfile(work / "edges.u64", dtype=np.uint64, count=end - begin, offset=8 * begin)
    order, candidates = load(work / "order.npy"), load(work / "candidates.npy")
    firsts = np.searchsorted(candidates, load(work / "starts.npy"))         # of each part, its first candidate
    opened = lru_cache(maxsize=256)(open_shingles)                          # each holds a file open, and there is a limit

    def places(ranks):
        at = np.searchsorted(candidates, order[ranks])
        part = np.searchsorted(firsts, at, "right") - 1
        return zip(part.tolist(), (at - firsts[part]).tolist())

    def shingles(part, row):
        hashes, offsets = opened(work / f"shingles-{part:05d}")
        return hashes[offsets[row]:offsets[row + 1]]
    similarity = np.zeros(len(edges))
    earlier, later = unpack(edges)
    for k, (one, two) in enumerate(zip(places(earlier), places(later))):
        a, b = shingles(*one), shingles(*two)
        if min(len(a), len(b)) >= cfg.threshold * max(len(a), len(b)) - 1:  # J <= |smaller| / |larger|; - 1 for rounding
            similarity[k] = jaccard_of(a, b)
        if k % 1024 == 1023:
            opened.cache_clear()                                            # pages once mapped count as memory until they are let go
    good = similarity >= cfg.threshold
    found = np.empty(np.count_nonzero(good), dtype=VERIFIED)
    found["edge"], found["jaccard"] = edges[good], similarity[good]
    save(path, found)


def greedy(chunks, n):
    """Keep first: walk the documents in order; one goes if it has an edge to a kept document before it, to the most similar.

    `chunks`: arrays of VERIFIED, sorted by edge, hence by the later document: when its turn comes, all before it are
    decided. Returns for each of n ranks (rank of the document that stays for it, their similarity). So no two kept ones
    have an edge, and each removed one has an edge to the one it names.
    """
    keeper, similarity, kept = np.arange(n), np.ones(n), bytearray(b"\1") * n
    for chunk in chunks:
        for edge, jaccard in zip(chunk["edge"].tolist(), chunk["jaccard"].tolist()):
            earlier, later = edge & EARLIER, edge >> 32
            if kept[earlier] and (kept[later] or jaccard > similarity[later]):
                kept[later], keeper[later], similarity[later] = 0, earlier, jaccard
    return keeper, similarity


def components(chunks, n):
    """Connected components: of each, only the first document stays. The same arguments and results as `greedy`; the
    similarity is NaN where a document and the one that stays have no edge: they may be quite different.

    Each round hangs the larger label of every edge under the smaller one, then lets all labels point to the end of their
    chain (Shiloach & Vishkin 1982): about log n rounds, and no recursion. Holds all edges in memory, 16 bytes each.
    """
    edges = np.concatenate([np.zeros(0, VERIFIED), *chunks])
    (earlier, later), label = unpack(edges["edge"]), np.arange(n)
    while True:
        a, b = label[earlier], label[later]
        if (a == b).all():
            break
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while (label != label[label]).any():
            label = label[label]
    similarity = np.where(label == np.arange(n), 1.0, np.nan)
    direct = label[later] == earlier
    similarity[later[direct]] = edges["jaccard"][direct]
    return label, similarity


def believed(edges):
    """The chunks of `greedy` without verification: every candidate, its similarity unknown."""
    for begin in range(0, len(edges), PAIRS):
        chunk = np.empty(len(edges[begin:begin + PAIRS]), dtype=VERIFIED)
        chunk["edge"], chunk["jaccard"] = edges[begin:begin + PAIRS], np.nan
        yield chunk


def decide(work, chunks, cfg):
    """Decide on every document from `chunks`, arrays of VERIFIED, and write four arrays over all documents to `work`:

        dup_of.npy      number of the document that stays for it, its own if it stays itself
        similarity.npy  with that one; an exact copy of a near copy is as near to it as the near copy is
        kind.npy        0 kept, 1 exact, 2 near
        dup_size.npy    size of its cluster
    """
    exact, order = np.load(work / "exact.npy"), load(work / "order.npy")
    keeper, jaccard = (greedy if cfg.cluster == "greedy" else components)(chunks, len(order))
    number, similarity = np.arange(len(exact)), np.ones(len(exact))
    stays = number.copy()
    stays[order], similarity[order] = order[keeper], jaccard
    dup_of = stays[exact]
    kind = np.where(dup_of == number, 0, np.where(dup_of == exact, 1, 2)).astype(np.int8)
    save(work / "similarity.npy", similarity[exact])
    save(work / "kind.npy", kind)
    save(work / "dup_size.npy", np.bincount(dup_of, minlength=len(exact))[dup_of].astype(np.int32))
    save(work / "dup_of.npy", dup_of)


def write_clusters(parts, starts, work):
    """clusters.parquet: id and docno of each document that stays for others, and members: [{id, docno, kind, jaccard}], for
    people. representatives.arrow: (docno, id) of the documents that stay for others, sorted: mapped by drop_duplicates."""
    dup_of, dup_size, kind = load(work / "dup_of.npy"), load(work / "dup_size.npy"), load(work / "kind.npy")
    similarity = load(work / "similarity.npy")
    wanted = np.flatnonzero(dup_size > 1)
    ids = [chunk for part, rows in rows_of_parts(parts, starts, wanted) for table in batches(part, ["id"], rows)
           for chunk in table["id"].cast(pa.large_string()).chunks]
    ids = pa.concat_arrays([pa.array([], pa.large_string()), *ids])
    stays = wanted[kind[wanted] == 0]
    gone = wanted[kind[wanted] != 0]
    gone = gone[np.lexsort((gone, dup_of[gone]))]
    names = ids.take(np.searchsorted(wanted, stays))
    with written(work / "representatives.arrow") as aside:
        table = pa.table({"docno": stays, "id": names})
        with pa.ipc.new_file(aside, table.schema) as file:
            file.write_table(table)
    members = pa.StructArray.from_arrays(
        [ids.take(np.searchsorted(wanted, gone)), pa.array(gone), pa.array([*KINDS]).take(kind[gone]),
         pa.array(similarity[gone], from_pandas=True)], ["id", "docno", "kind", "jaccard"])
    cuts = np.concatenate([np.searchsorted(dup_of[gone], stays), [len(gone)]]).astype(np.int64)
    with written(work / "clusters.parquet") as aside:
        pq.write_table(pa.table({"id": names, "docno": stays, "size": dup_size[stays],
                                 "members": pa.LargeListArray.from_arrays(cuts, members)}), aside, compression="zstd")


# ---- the pipeline ----------------------------------------------------------------------------------------------------

def contents_of(part):
    """What identifies a part on every machine, whatever its directory is called there: the hash in its sidecar, else when it was written."""
    sidecar = Path(part).with_suffix(".json")
    known = json.loads(sidecar.read_text(encoding="utf-8"))["blake2b"] if sidecar.exists() else os.stat(part).st_mtime_ns
    return [Path(part).name, os.stat(part).st_size, known]


def begin(parts, work, cfg):
    """Make `work` ready and write its deduplication.json; work that was begun with other settings or other parts is thrown away."""
    code = hashlib.blake2b(b"".join(Path(m).read_bytes() for m in (__file__, minhash.__file__, simhash.__file__)), digest_size=8).hexdigest()
    plan = {"config": dataclasses.asdict(cfg), "code": code, "parts": [contents_of(p) for p in parts]}
    text = json.dumps(plan, ensure_ascii=False, indent=1) + "\n"
    if (work / "deduplication.json").exists():
        if (work / "deduplication.json").read_text(encoding="utf-8") == text:
            return
        shutil.rmtree(work)
    elif work.exists() and any(path.suffix != ".tmp" for path in work.iterdir()):
        raise UserError(f"{work} holds something that deduplication did not write; choose another directory")
    work.mkdir(parents=True, exist_ok=True)
    with written(work / "deduplication.json") as aside:
        Path(aside).write_text(text, encoding="utf-8")


def find_candidates(parts, work, cfg, run, join=None):
    """sketch, exact, join: leaves edges.u64, candidates.npy and starts.npy in `work`; returns (starts, number of edges). The
    arguments are those of `deduplicate`."""
    bands, _ = bands_of(cfg)
    counts = [pq.read_metadata(part).num_rows for part in parts]
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    documents = int(starts[-1])
    if not documents:
        raise UserError("there are no documents to deduplicate")
    if cfg.sketch == "datasketch" and documents > DATASKETCH_LIMIT:
        raise UserError(f"--sketch datasketch holds about 10 KB a document in memory, {documents * 1e4 / 1e9:.0f} GB for {documents:,}; "
                        "--sketch numpy does the same on disk")
    begin(parts, work, cfg)
    save(work / "starts.npy", starts)

    sketches = sketch_files(parts, work)
    run(sketch_part, list(zip(parts, sketches, [cfg] * len(parts))), "sketch")
    if not (work / "rank.npy").exists():
        find_exact_copies(sketches, work, cfg)
    order = load(work / "order.npy")
    if len(order) > EARLIER:
        raise UserError(f"{len(order):,} documents are more than an edge of two 32-bit ranks can name; deduplicate in shards")

    if not (work / "segments.npy").exists():
        if cfg.sketch == "datasketch":
            edges = datasketch_edges(shingles_of_parts(parts, load(work / "rank.npy"), cfg), cfg)
        elif cfg.sketch == "simhash":
            edges = simhash_edges(column(sketches, "band_00")[order], cfg.hamming)
        elif join:
            edges = join(sketches, work, cfg)
        else:
            edges = (found for band in range(bands) for found in edges_of_band(column(sketches, f"band_{band:02d}")[order]))
        store_edges(edges, work)
    if not (work / "candidates.npy").exists():
        merge_edges(work, documents)
    return starts, os.path.getsize(work / "edges.u64") // 8


def sketch_files(parts, work):
    return [work / f"sketch-{i:05d}.parquet" for i in range(len(parts))]


def sketch_shard(parts, work, cfg, run, shard, of):
    """The first step alone, and of it only every `of`-th part from number `shard` on: for launchers on several machines."""
    parts, work = list(parts), Path(work)
    begin(parts, work, cfg)
    items = list(zip(parts, sketch_files(parts, work), [cfg] * len(parts)))
    run(sketch_part, items[shard::of], "sketch")


def candidate_pairs(parts, work, cfg, run):
    """int64 (M, 2): document numbers, the earlier first, of all pairs that LSH proposes, not verified."""
    work = Path(work)
    _, pairs = find_candidates(list(parts), work, cfg, run)
    order = np.load(work / "order.npy")
    return np.stack([order[ranks] for ranks in unpack(numbers_in(work / "edges.u64", pairs))], axis=1)


def deduplicate(parts, work, cfg, run, join=None):
    """Decide on every document of `parts`, a list of Parquet files with the columns id and text; returns the report.

    `work`: a directory for what the steps leave; what is there already is not done again. In the end it holds what
    `drop_duplicates` reads, and clusters.parquet. `run(function, items, label)` -> list of function(item), in order: a
    pool's map, or a loop. `join(sketch files, work, cfg)`, if given, yields arrays of edges in place of the local join:
    another engine may group the `band_rows` of each `ranked_sketch`. Raises UserError for a bad configuration.
    """
    bands, rows = bands_of(cfg)
    parts, work = list(parts), Path(work)
    begin(parts, work, cfg)
    if (work / "report.json").exists():
        return json.loads((work / "report.json").read_text(encoding="utf-8"))
    starts, pairs = find_candidates(parts, work, cfg, run, join)
    documents, order = int(starts[-1]), load(work / "order.npy")
    edges = numbers_in(work / "edges.u64", pairs)
    index = sum(path.stat().st_size for path in sketch_files(parts, work))
    if cfg.verify:
        candidates = rows_of_parts(parts, starts, np.load(work / "candidates.npy"))
        run(write_shingles, [(part, work / f"shingles-{i:05d}", rows, cfg) for i, (part, rows) in enumerate(candidates)], "shingles")
        verified = [work / f"verified-{i:05d}.npy" for i in range(math.ceil(pairs / PAIRS))]
        run(verify_pairs, [(work, path, PAIRS * i, min(PAIRS * (i + 1), pairs), cfg) for i, path in enumerate(verified)], "verify")
    if not (work / "dup_of.npy").exists():
        decide(work, map(np.load, verified) if cfg.verify else believed(edges), cfg)
    if not (work / "clusters.parquet").exists():
        write_clusters(parts, starts, work)

    kind, dup_size = load(work / "kind.npy"), load(work / "dup_size.npy")
    sizes, how_many = np.unique(dup_size[kind == 0], return_counts=True)
    kinds = np.bincount(kind, minlength=3).tolist()
    report = {"in": documents, "kept": kinds[0], "exact": kinds[1], "near": kinds[2],
              "only_exact": int(documents - (load(work / "exact.npy") != np.arange(documents)).sum() - len(order)),
              "bands": bands, "rows": rows, "threshold": cfg.threshold, "candidates": pairs, "index_bytes": index,
              "verified": sum(len(load(path)) for path in verified) if cfg.verify else None,
              "expected_false_candidates": expected_false_candidates(parts, starts, order, cfg) if cfg.sketch != "simhash" else None,
              "cluster_sizes": {str(size): int(n) for size, n in zip(sizes, how_many)}}
    del edges, order                                                        # Windows cannot remove what is mapped
    with written(work / "report.json") as aside:
        Path(aside).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for pattern in ("sketch-*", "segments.*", "edges.u64", "shingles-*", "verified-*", "candidates.npy", "order.npy", "rank.npy", "exact.npy"):
        for path in work.glob(pattern):
            path.unlink()
    return report


@dataclass(frozen=True)
class Decisions:
    work: str                             # the directory that `deduplicate` has filled


def drop_duplicates(table, cfg):
    """Documents with their numbers in the int64 column docno -> the same with drop_reason "exact" or "near" (null: stays),
    dup_size, the id of the document that stays instead (dup_of) and their similarity (jaccard, null if never computed).

    A table function; the arrays are mapped, not loaded.
    """
    work, number = Path(cfg.work), table["docno"].to_numpy()
    kind, dup_of = load(work / "kind.npy")[number], load(work / "dup_of.npy")[number]
    gone = kind != 0
    with pa.memory_map(str(work / "representatives.arrow")) as file:
        names = pa.ipc.open_file(file).read_all()
        at = np.searchsorted(names["docno"].to_numpy(), dup_of[gone])
        place = np.zeros(len(table), dtype=np.int64)
        place[gone] = at
        ids = names["id"].take(pa.array(place, mask=~gone)).cast(pa.string()).combine_chunks()
    similarity = load(work / "similarity.npy")[number]
    new = {"drop_reason": pa.array([KINDS[k] for k in kind.tolist()], pa.string()),
           "dup_size": pa.array(load(work / "dup_size.npy")[number]), "dup_of": ids,
           "jaccard": pa.array(similarity.astype(np.float32), mask=~gone | np.isnan(similarity))}
    for name, values in new.items():
        at = table.schema.get_field_index(name)
        table = table.append_column(name, values) if at < 0 else table.set_column(at, name, values)
    return table


# ---- what people want to know ----------------------------------------------------------------------------------------

def expected_false_candidates(parts, starts, order, cfg, sample=SAMPLE):
    """How many pairs below the threshold become candidates by chance, from the signatures of `sample` evenly spaced
    documents: {"pairs": in the whole corpus, "per_document": on average, "removed_if_believed": the share of documents
    that has at least one, 1 - e^-per_document, and would go if candidates were believed}."""
    (bands, rows), n = bands_of(cfg), len(order)
    numbers = np.sort(order[np.linspace(0, n - 1, min(sample, n)).astype(np.int64)]) if n else np.zeros(0, dtype=np.int64)
    texts = texts_at(parts, starts, numbers)
    signature = np.concatenate([np.zeros((0, cfg.num_perm), dtype=np.uint32), *(signatures(texts[a:b], cfg)[0] for a, b in slices(texts))])
    pairs = n * (n - 1) / 2 * minhash.expected_candidates(signature, bands, rows, cfg.threshold)
    each = 2 * pairs / max(n, 1)
    return {"pairs": round(pairs, 1), "per_document": round(each, 4), "removed_if_believed": round(-math.expm1(-each), 4)}


def lines(report):
    """What a person wants to know of a report."""
    b, r, t, false = report["bands"], report["rows"], report["threshold"], report["expected_false_candidates"]
    chance = ", ".join(f"{minhash.candidate_probability(s, b, r):.3f} at {s:g}" for s in (t, min(t + 0.1, 1.0)))
    said = [f"{b} bands of {r} rows: a pair is looked at with probability {chance}",
            f"by chance {false['pairs']:,.0f} pairs below the threshold were expected, which unverified would cost "
            f"{false['removed_if_believed']:.2%} of the documents"] if false else []
    return said + [f"{report['candidates']:,} candidate pairs; exact copies {report['exact']:,}, near copies {report['near']:,}; "
                   f"{report['only_exact']:,} documents are too short for near copies"]


def largest_clusters(parts, work, count=10, members=3, chars=None):
    """The `count` largest clusters: [{"size", "id", "text", "members": the first few as {"id", "kind", "jaccard", "text"}}], of the
    texts the first `chars` characters."""
    work = Path(work)
    table = pq.read_table(work / "clusters.parquet")
    rows = table.take(np.argsort(-table["size"].to_numpy(), kind="stable")[:count]).to_pylist()
    for row in rows:
        row["members"] = row["members"][:members]
    wanted = np.array(sorted({document["docno"] for row in rows for document in (row, *row["members"])}), dtype=np.int64)
    texts = dict(zip(wanted.tolist(), texts_at(parts, np.load(work / "starts.npy"), wanted)))
    return [{"size": row["size"], "id": row["id"], "text": texts[row["docno"]][:chars],
             "members": [{k: m[k] for k in ("id", "kind", "jaccard")} | {"text": texts[m["docno"]][:chars]} for m in row["members"]]}
            for row in rows]


def deduplicate_texts(texts, cfg=DedupConfig()):
    """The same for a list of texts, in a temporary directory: [None, or (index of the text that stays, kind, Jaccard)]."""
    with tempfile.TemporaryDirectory() as directory:
        part, work = Path(directory, "part.parquet"), Path(directory, "work")
        pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], "text": pa.array(texts, pa.large_string())}), part,
                       row_group_size=1024)
        deduplicate([part], work, cfg, run=lambda function, items, label: [function(item) for item in items])
        dup_of, kind, similarity = (np.load(work / f"{name}.npy").tolist() for name in ("dup_of", "kind", "similarity"))
    return [(of, KINDS[k], s) if k else None for of, k, s in zip(dup_of, kind, similarity)]
