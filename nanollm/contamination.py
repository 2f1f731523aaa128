"""Was the exam in the textbook? How much of each question stands in the text that a model was trained on.

The rules are those of decontamination (nanollm/corpus/decontaminate.py), read in the other direction: there a document that holds a
question loses it, here a question that a document holds is named. A model may then be judged on the other questions alone.
"""
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from nanollm.corpus import decontaminate


def coverage(questions, texts, n=13):
    """For each question the share (0 to 1) of its telling n-grams that stand in `texts`, or None if it has none that tell.

    questions: dicts with "question" and perhaps "options"; texts: an iterable of strings, read once. 1 is a copy with its
    options; a copied question alone has less, a chance phrase some percent (docs/decontamination.md).
    """
    lines = [json.dumps({"question": q["question"], "options": q.get("options", [])}, ensure_ascii=False) for q in questions]
    lines = [line.encode("utf-8", "replace").decode() for line in lines]         # JSON can hold half a character, a file cannot
    first = {line: i for i, line in reversed(list(enumerate(lines)))}            # equal questions are one item of the index
    with tempfile.TemporaryDirectory() as folder:
        source, path, counts = Path(folder, "items.jsonl"), str(Path(folder, "index.npz")), str(Path(folder, "counts.npy"))
        source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        decontaminate.build_index([source], path, n)
        index, texts = decontaminate.load_index(path), iter(texts)
        documents = np.zeros(len(index.keys), dtype=np.int64)                    # (K,): in how many of the texts each n-gram stands
        while some := list(itertools.islice(texts, 1000)):
            documents += decontaminate.document_counts(pa.table({"text": some}), decontaminate.Decontaminate(path))
        np.save(counts, documents)
        telling = decontaminate.evidence(decontaminate.Decontaminate(path, counts))
    items = [int(name.rpartition(":")[2]) - 1 for name in index.items.tolist()]
    size, found = (np.bincount(index.owner[which], minlength=len(items)) for which in (telling, telling & (documents > 0)))
    shares = {i: float(f / s) if s else None for i, s, f in zip(items, size, found)}
    return [shares.get(first[line]) for line in lines]
