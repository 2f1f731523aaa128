"""Token files: what training reads.

SPLIT.bin is nothing but token ids, little-endian, one document after the other with one end-of-text token behind each;
SPLIT.idx holds the document ends as uint64 offsets into it; SPLIT.json says the rest.
"""
import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np

from nanollm.config import UserError
from nanollm.corpus.io import progress

BATCH = 256                               # documents encoded at a time


def token_dtype(vocab_size):
    """uint16 holds the ids 0..65535, so vocabularies up to 65,536; a larger id would silently wrap round."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def write_tokens(directory, split, texts, tokenizer):
    """Encode `texts` (an iterable of str, streamed) into DIRECTORY/SPLIT.{bin,idx,json}; returns the JSON as a dict.

    Raises UserError if an id does not fit the tokenizer's own vocab_size.
    """
    directory, texts = Path(directory), iter(texts)
    dtype = token_dtype(tokenizer.vocab_size)
    n_tokens = n_docs = n_bytes = 0
    with open(directory / f"{split}.bin", "wb") as bin_file, open(directory / f"{split}.idx", "wb") as idx_file:
        while batch := list(islice(texts, BATCH)):
            rows = [ids + [tokenizer.eos_id] for ids in tokenizer.encode_batch(batch)]
            lengths = np.array([len(ids) for ids in rows], dtype=np.uint64)
            flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in rows])
            if flat.min() < 0 or flat.max() >= tokenizer.vocab_size:
                raise UserError(f"the tokenizer made id {flat.max()}, but its vocab_size is {tokenizer.vocab_size}: "
                                "its files do not belong together")
            bin_file.write(flat.astype(dtype).tobytes())
            idx_file.write((n_tokens + np.cumsum(lengths)).astype("<u8").tobytes())
            n_tokens += len(flat)
            n_docs += len(batch)
            n_bytes += sum(len(text.encode("utf-8")) for text in batch)
    meta = {"format": "nanollm-tokens", "version": 1, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash, "n_tokens": n_tokens, "n_docs": n_docs,
            "n_bytes": n_bytes}
    (directory / f"{split}.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def in_validation(text, fraction):
    """Split by the content: a document keeps its side when the corpus grows, and equal texts are never on both."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2 ** 64


def write_splits(directory, documents, tokenizer, val_fraction, seed):
    """Split `documents` (a sequence of {"text"}), shuffle each side and write it; returns {"train": …, "val": …}.

    Shuffled because corpora come sorted by source, and neighbours share a row. Only the order is in memory, and one
    batch of texts.
    """
    held_out = np.array([in_validation(d["text"], val_fraction) for d in documents])
    if held_out.all() or not held_out.any():
        raise UserError(f"all {len(held_out):,} documents fell on one side of the validation split; use more documents "
                        "(--doc_sep says where one ends) or another --val_fraction")
    order, report = np.random.default_rng(seed).permutation(len(documents)), {}
    for split in ("train", "val"):
        numbers = order[held_out[order] == (split == "val")]
        texts = (documents[i]["text"] for i in progress(numbers, desc=split, unit=" docs"))
        report[split] = write_tokens(directory, split, texts, tokenizer)
    return report
