"""Stages that must see the whole corpus before they decide on one document: what they gather, and the functions that decide.

    outliers        a language model and histograms of every source            -> outliers.outliers
    decontaminate   an index of the tests, and how often each n-gram occurs     -> decontaminate.decontaminate
    sentences       lines or sentences that stand in many documents             -> sentences.cut_repeated
    weigh           the nearest neighbour, or how common a text is              -> soft.weigh_nearest, soft.weigh_commonness

Each gathers in passes over the parts, many parts at a time (`fold`), and leaves its files in `work`, written aside and
renamed: a pass that was finished is not done again. What is gathered adds up, so the order of the parts plays no role.
"""
import json
import os
from dataclasses import replace
from functools import reduce

from pathlib import Path

import numpy as np

from nanollm.corpus import decontaminate, dedup, lm, ngrams, outliers, parts, sentences, soft

GROUPS = 64                               # a pass is cut into so many pieces of work


def fold_parts(item):
    """((path, number of its first document) of some parts, function, merge, cfg): merge of function(table, cfg) over them."""
    some, function, merge, cfg = item
    return reduce(merge, (function(table, cfg) for path, first in some for table in parts.read_tables(path, first)))


def fold(source, function, merge, cfg, run, label):
    """merge of function(table, cfg) over all tables of `source` (parts.Parts); merge must be associative and commutative. The
    results of the groups are merged as they come: the one so far and those on their way are all that is in memory."""
    files, so_far = files_of(source), []
    groups = min(GROUPS, len(files))

    def add_up(result):
        so_far[:] = [merge(so_far[0], result)] if so_far else [result]
    run(fold_parts, [(files[i::groups], function, merge, cfg) for i in range(groups)], label, seen=add_up, keep=False)
    return so_far[0]


def files_of(source):
    """[(path, number of its first document)] of the parts that hold any."""
    return [(path, int(first)) for path, first, rows in zip(source.paths, source.first, source.rows) if rows]


def gathered(path, make, save):
    """The file `path`; if it is not there, save(make(), aside) and rename."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
        save(make(), aside)
        parts.publish(aside, path)
    return str(path)


def save_json(value, path):
    path.write_text(json.dumps(value), encoding="utf-8")


def save_array(array, path):
    np.save(path, array)


def add(a, b):
    return a + b


def characters_of(source):
    """Characters of the whole corpus, by the stage's report."""
    return parts.read_report(source.directory)["chars"]


# ---- outliers --------------------------------------------------------------------------------------------------------

def count_table(table, share):
    return lm.count(table["text"].to_pylist(), share=share)


def outlier_steps(source, work, cfg, run):
    """The step of the stage outliers for the options `cfg`: first the language model, then the histograms."""
    share = lm.share_for(characters_of(source))
    model = gathered(work / "lm.npz", lambda: fold(source, count_table, lm.merge, share, run, "language model"), lm.save)
    base = outliers.Outliers(lm=model, sigmas=cfg.sigmas, high=cfg.ppl_high, low=cfg.ppl_low, order=cfg.order)
    stats = gathered(work / "stats.json", lambda: fold(source, outliers.measure, outliers.merge, base, run, "measure"), save_json)
    return [(outliers.outliers, outliers.Outliers(lm=model, stats=stats, sigmas=cfg.sigmas, high=cfg.ppl_high, low=cfg.ppl_low, order=cfg.order))]


# ---- decontamination -------------------------------------------------------------------------------------------------

def decontamination_steps(source, work, cfg, run):
    """The step of the stage decontaminate: the index of the tests, then the number of documents of each of its n-grams."""
    index = gathered(work / "index.npz", lambda: None, lambda _, path: decontaminate.build_index(cfg.eval_data, path, cfg.n))
    first = decontaminate.Decontaminate(index, policy=cfg.policy)
    frequency = gathered(work / "frequency.npy", lambda: fold(source, decontaminate.document_counts, add, first, run, "count"), save_array)
    return [(decontaminate.decontaminate, decontaminate.Decontaminate(index, frequency, policy=cfg.policy))]


def found_table(table, cfg):
    return decontaminate.tally(decontaminate.decontaminate(table, cfg), cfg)


def add_pairs(a, b):
    return tuple(x + y for x, y in zip(a, b))


def contamination(source, cfg, run):
    """The report by task: how many items of each test were found, and how much of them."""
    return decontaminate.report(cfg, *fold(source, found_table, add_pairs, cfg, run, "report"))


# ---- sentences -------------------------------------------------------------------------------------------------------

def save_segments(item):
    """(path, number of its first document, cfg, file): pass 1 over one part."""
    path, first, cfg, out = item
    if not Path(out).exists():
        rows = sentences.merge([sentences.segments_of(table, cfg) for table in parts.read_tables(path, first)])
        save_array(rows, f"{out}.tmp.npy")
        parts.publish(f"{out}.tmp.npy", out)


def sentence_steps(source, work, cfg, run):
    """The step of the stage sentences: the segments of each part, then those of all."""
    settings = sentences.Sentences(cfg.unit, cfg.span, cfg.min_segment, cfg.min_documents)
    work.mkdir(parents=True, exist_ok=True)
    files = [str(work / f"segments-{i:05d}.npy") for i in range(len(source.paths))]
    run(save_segments, [(path, int(first), settings, file) for path, first, file in zip(source.paths, source.first, files)], "segments")
    repeated = gathered(work / "repeated.npy", lambda: None, lambda _, path: sentences.merge_files(files, path, cfg.min_documents))
    return [(sentences.cut_repeated, sentences.Sentences(cfg.unit, cfg.span, cfg.min_segment, cfg.min_documents, repeated))]


# ---- weights ---------------------------------------------------------------------------------------------------------

def frequencies(table, bits):
    return ngrams.document_frequency(table["text"].to_pylist(), 2, bits)


def nearest_neighbours(source, work, cfg, run):
    """Cosine of each document to its nearest earlier neighbour among the candidates of MinHash (docno order), float32."""
    frequency = fold(source, frequencies, add, 20, run, "document frequencies")
    settings = dedup.DedupConfig(threshold=cfg.threshold, min_units=1)
    pairs = dedup.candidate_pairs(source.paths, work / "candidates", settings, run)
    cosine = np.zeros(len(pairs), np.float32)
    for begin in range(0, len(pairs), 1 << 14):                        # the texts of so many pairs at a time
        some = pairs[begin:begin + (1 << 14)]
        numbers, places = np.unique(some, return_inverse=True)
        texts = dedup.texts_at(source.paths, source.first, numbers)
        cosine[begin:begin + len(some)] = soft.cosines(texts, places.reshape(-1, 2), frequency, len(source))
    return soft.nearest_earlier(pairs, cosine, len(source))


def count_ngrams(source, cfg):
    """The n-gram tables (256 MiB) of a sample of the corpus, small enough for one process."""
    counts = None
    for table in source.tables(["text"]):
        counts = soft.count_ngrams(table, cfg, counts)
    return counts


def commonness_values(table, cfg):
    return soft.commonness(table, cfg)["commonness"].to_numpy()


def joined(a, b):
    return np.concatenate([a, b])


def weigh_steps(source, work, cfg, run):
    """The steps of the stage weigh: --by tfidf (nearest neighbour) or commonness, and with --thin the lot."""
    if cfg.by == "tfidf":
        nearest = gathered(work / "nearest.npy", lambda: nearest_neighbours(source, work, cfg, run), save_array)
        steps = [(soft.weigh_nearest, soft.Soft(nearest=nearest, seed=cfg.seed))]
    else:
        base = soft.Soft(sample=min(1.0, 2 ** soft.Soft.bits / 5 / max(characters_of(source), 1)), seed=cfg.seed)      # tables stay a fifth full
        counts = gathered(work / "counts.npy", lambda: count_ngrams(source, base), save_array)
        first = replace(base, counts=counts)
        buckets = gathered(work / "buckets.npz", lambda: fold(source, commonness_values, joined, first, run, "commonness"),
                           lambda values, path: soft.save_buckets(values, path, largest=1.0 if cfg.thin else 0.0))
        both = replace(first, buckets=buckets)
        steps = [(soft.commonness, both), (soft.weigh_commonness, both)]
    return steps + [(soft.thin, soft.Soft(seed=cfg.seed))] * cfg.thin
