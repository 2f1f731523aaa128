"""Readers, deduplication and token files: what goes in, what comes out, and that nothing is lost between."""
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanollm.config import UserError
from nanollm.corpus import dedup, io, pack
from nanollm.tokenizer import bpe_tokenizer, char_tokenizer, pattern_for

def documents(tmp_path, texts):
    path = tmp_path / "documents.jsonl"
    rows = [json.dumps({"id": str(i), "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return io.Documents(path)


def read(tmp_path, path, doc_sep="auto"):
    """(texts, quarantine) of one file."""
    quarantine = io.Quarantine(tmp_path / "quarantine.jsonl")
    rows = list(io.read_documents({path: io.choose_separator(path, doc_sep)}, quarantine))
    quarantine.file.close()
    return [row["text"] for row in rows], quarantine


# ---- reading ---------------------------------------------------------------------------------------------------------

def test_every_format_gives_the_same_documents(tmp_path):
    """.jsonl, .json, .parquet, .txt, each also compressed."""
    texts = ["first document, 第一", "second one", "third 第三"]
    jsonl = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    pq.write_table(pa.table({"n": [1, 2, 3], "text": texts}), tmp_path / "a.parquet")
    plain = {"a.jsonl": jsonl, "a.json": json.dumps([{"text": t} for t in texts]).encode(), "b.json": jsonl,
             "a.txt": "\n".join(texts).encode(), "b.txt": "\n\n \n".join(texts).encode(),
             "a.parquet": (tmp_path / "a.parquet").read_bytes()}
    for name, data in plain.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        for file in (name, f"{name}.gz"):
            got, quarantine = read(tmp_path, tmp_path / file)
            assert got == texts and not quarantine.counts, file


def test_text_separators(tmp_path):
    """Blank lines if there are any between lines, else lines; a blank line at the end of the file is none."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n\r\nthree\r\n".encode())
    assert io.choose_separator(path, "auto") == "blank"
    assert read(tmp_path, path)[0] == ["one\r\ntwo", "three"]
    assert read(tmp_path, path, "line")[0] == ["one", "two", "three"]
    assert read(tmp_path, path, "file")[0] == ["one\r\ntwo\r\n\r\nthree"]
    path.write_bytes(b"one\ntwo\n\n")
    assert io.choose_separator(path, "auto") == "line"


@pytest.mark.parametrize("name, data, kept, reasons", [
    ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n{"text": "three"}\n', 2, {"broken_json": 1}),
    ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}\n{"text": null}\n', 1, {"missing_text": 2}),
    ("a.jsonl", b'{"text": "one"}\n{"text": 5}\n{"text": ["x"]}\n', 1, {"text_not_a_string": 2}),
    ("a.jsonl", b'{"text": "one"}\n[1]\n"str"\n7\n', 1, {"not_an_object": 3}),
    ("a.jsonl", b'{"text": "one"}\n{"text": "\xff\xfe"}\n', 1, {"not_utf8": 1}),
    ("a.jsonl", b'{"text": "one"}\n{"text": "a\x01b"}\n', 1, {"broken_json": 1}),
    ("a.jsonl", b'{"text": "one"}\n' + b"[" * 100_000 + b"\n", 1, {"broken_json": 1}),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n', 2, {}),
    ("a.jsonl", '{"text": "one\u2028\u0085more"}\n'.encode(), 1, {}),
    ("a.jsonl", b'{"text": "half \\ud83d pair"}\n', 1, {}),
    ("a.txt", b"good line\nbad \xff line\nlast\n", 2, {"not_utf8": 1}),
    ("a.json", b'[{"text": "one"}, {"text"', 0, {"unreadable_file": 1}),
    ("a.json", b'["one", {"text": "two"}]', 1, {"not_an_object": 1}),
    ("a.txt.gz", gzip.compress(os.urandom(9) * 3000 + b"\n" + b"line\n" * 9)[:-40], None, {"unreadable_file": 1}),
    ("a.jsonl.gz", b"this is not compressed", 0, {"unreadable_file": 1}),
    ("a.parquet", b"PAR1 cut off", 0, {"unreadable_file": 1}),
    ("a.parquet.gz", b"\x1f\x8b cut off", 0, {"unreadable_file": 1}),
])
def test_a_bad_row_is_quarantined_and_the_rest_is_read(tmp_path, name, data, kept, reasons):
    """Counted by reason, with file and line, and the stream goes on."""
    path = tmp_path / name
    path.write_bytes(data)
    texts, quarantine = read(tmp_path, path)
    assert {k: v for k, v in quarantine.counts.items() if k != "not_utf8" or kept is not None} == reasons
    assert kept is None or len(texts) == kept
    for text in texts:
        text.encode("utf-8")
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == quarantine.counts.total() and all(row["file"] == path.as_posix() for row in rows)


def test_a_truncated_gz_keeps_what_could_be_read(tmp_path):
    """The lines before the damage are documents, the damage is reported with their number."""
    rng = random.Random(0)
    lines = [json.dumps({"text": "".join(rng.choices("abcdefgh ", k=200))}).encode() + b"\n" for _ in range(2000)]
    data = gzip.compress(b"".join(lines))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[:len(data) // 2])
    texts, quarantine = read(tmp_path, path)
    assert 500 < len(texts) < 1500 and texts == [json.loads(line)["text"] for line in lines[:len(texts)]]
    assert quarantine.broken_files == {path.as_posix()} and str(len(texts)) in quarantine.examples[0]["error"]


@pytest.mark.parametrize("row, script", [
    ({"messages": [{"role": "user", "content": "hi"}]}, "train_sft.py"), ({"conversations": []}, "train_sft.py"),
    ({"instruction": "a", "output": "b"}, "train_sft.py"), ({"prompt": "a", "response": "b"}, "train_sft.py"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "train_dpo.py"),
])
def test_chats_and_preferences_are_sent_to_their_script(tmp_path, row, script):
    """Both as JSON lines and as parquet."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    pq.write_table(pa.table({k: [json.dumps(v)] for k, v in row.items()}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=script):
            read(tmp_path, tmp_path / name)


def test_files_are_found_in_a_fixed_order_once_and_skipped_with_a_reason(tmp_path):
    """A directory and a file in it, an unknown extension, an empty file, our own output."""
    for name, data in {"b.txt": "x", "a/c.jsonl": "x", "a/d.csv": "x", "e.txt": "", "out/f.jsonl": "x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(data, encoding="utf-8")
    files, skipped = io.find_files([tmp_path / "b.txt", tmp_path], exclude=tmp_path / "out")
    assert [f.name for f in files] == ["b.txt", "c.jsonl"]
    assert {f.name: why.split()[0] for f, why in skipped} == {"d.csv": "unknown", "e.txt": "empty", "f.jsonl": "lies"}
    with pytest.raises(UserError, match="does not exist"):
        io.find_files([tmp_path / "nowhere"], exclude=tmp_path)


# ---- deduplication ---------------------------------------------------------------------------------------------------

def words(rng, n):
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(n))


def edited(text, rng, share):
    """`text` with about `share` of its words replaced."""
    return " ".join(words(rng, 1) if rng.random() < share else word for word in text.split())


def decide(docs, **options):
    return [gone for _, gone in dedup.deduplicate(docs, **options)]


def test_bands_miss_next_to_nothing_at_the_threshold():
    """And the formula is what MinHash really does: the share of pairs found at a known J, by simulation."""
    for threshold in (0.4, 0.5, 0.7, 0.85, 0.95):
        b, r = dedup.bands_and_rows(threshold, 128)
        assert b * r <= 128 and dedup.miss(threshold, b, r) <= dedup.MAX_MISS
    equal = np.random.default_rng(0).random((200_000, 20)) < 0.8                    # J = 0.8, 4 bands of 5
    missed = 1 - equal.reshape(-1, 4, 5).all(axis=2).any(axis=1).mean()
    assert abs(missed - dedup.miss(0.8, 4, 5)) < 0.005


def test_shingles_are_character_n_grams():
    """A text shorter than n is one shingle, so that short texts match only if equal."""
    text = {s.decode("utf-32-le") for s in dedup.shingles("我喜欢健身房", 5)}
    assert text == {"我喜欢健身", "喜欢健身房"}
    assert len(dedup.shingles("我", 5)) == 1 and dedup.jaccard(dedup.shingles("我", 5), dedup.shingles("你", 5)) == 0


def test_copies_go_and_the_first_stays(tmp_path):
    """Exact and near copies name a kept document; what lies below the threshold stays."""
    rng = random.Random(1)
    base = words(rng, 80)
    near, far = edited(base, rng, 0.02), edited(base, rng, 0.3)
    assert dedup.jaccard(dedup.shingles(base), dedup.shingles(near)) > 0.85
    assert dedup.jaccard(dedup.shingles(base), dedup.shingles(far)) < 0.7
    gone = decide(documents(tmp_path, [base, far, base, near, near, "我喜欢健身", "我喜欢普洱茶"]))
    assert [g and (g["dup_of"], g["kind"]) for g in gone] == [
        None, None, ("0", "exact"), ("0", "near"), ("0", "near"), None, None]


def test_every_planted_pair_is_found_and_no_removal_is_below_the_threshold(tmp_path):
    """Against brute force: 160 documents, a quarter of them copies with 0 to 20 % of their words changed."""
    rng = random.Random(2)
    texts = [words(rng, 60) for _ in range(120)]
    texts += [edited(rng.choice(texts), rng, rng.choice([0, 0.01, 0.03, 0.06, 0.1, 0.2])) for _ in range(40)]
    rng.shuffle(texts)
    sets = [dedup.shingles(t) for t in texts]
    kept, want = [], []
    for i, own in enumerate(sets):
        want.append(any(dedup.jaccard(own, sets[j]) >= 0.7 for j in kept))
        kept += [] if want[-1] else [i]
    gone = decide(documents(tmp_path, texts), threshold=0.7)
    assert [g is not None for g in gone] == want and 15 < sum(want) < 40
    for i, g in enumerate(gone):
        if g:
            true = dedup.jaccard(sets[i], sets[int(g["dup_of"])])
            assert true >= 0.7 and g["jaccard"] == round(true, 4) and int(g["dup_of"]) in kept


def test_chains_do_not_remove_for_the_sake_of_a_removed_document(tmp_path):
    """A~B and B~C but not A~C: B goes, C stays."""
    letters = [chr(0x4e00 + i) for i in range(140)]
    a, b, c = "".join(letters[:100]), "".join(letters[12:112]), "".join(letters[24:124])
    j = [dedup.jaccard(dedup.shingles(x), dedup.shingles(y)) for x, y in ((a, b), (b, c), (a, c))]
    assert j[0] > 0.7 and j[1] > 0.7 and j[2] < 0.7
    assert [g is not None for g in decide(documents(tmp_path, [a, b, c]))] == [False, True, False]


def test_decisions_do_not_depend_on_the_hash_seed(tmp_path):
    """Python salts hash(str) per process; ours must not care."""
    rng = random.Random(3)
    texts = [words(rng, 30) for _ in range(60)]
    docs = documents(tmp_path, texts + [edited(t, rng, 0.03) for t in texts])
    code = ("import sys; from nanollm.corpus import io, dedup, pack; d = io.Documents(sys.argv[1]); "
            "print([g for _, g in dedup.deduplicate(d)], [pack.in_validation(x['text'], 0.3) for x in d])")
    other = subprocess.run([sys.executable, "-c", code, str(docs.path)], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONHASHSEED": "7"}).stdout
    assert other == f"{decide(docs)} {[pack.in_validation(d['text'], 0.3) for d in docs]}\n" and "dup_of" in other


# ---- token files -----------------------------------------------------------------------------------------------------

def small_tokenizer():
    return bpe_tokenizer([(104, 101), (108, 108), (256, 257)], pattern_for(512))


def test_token_files_hold_each_document_and_one_eos(tmp_path):
    """Sizes, offsets, counts; and the text comes back."""
    tok, texts = small_tokenizer(), [f"hello {i} 你好 <|endoftext|>" for i in range(600)]
    meta = pack.write_tokens(tmp_path, "train", iter(texts), tok)
    tokens, ends = np.fromfile(tmp_path / "train.bin", "<u2"), np.fromfile(tmp_path / "train.idx", "<u8")
    assert meta == json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert meta["n_tokens"] == len(tokens) == ends[-1]
    assert meta["n_docs"] == len(ends) == 600 == (tokens == tok.eos_id).sum()
    assert meta["n_bytes"] == sum(len(t.encode()) for t in texts) and meta["tokenizer_hash"] == tok.hash
    starts = [0, *ends[:-1].tolist()]
    assert [tok.decode(tokens[a:b - 1].tolist()) for a, b in zip(starts, ends.tolist())] == texts
    assert all(tokens[int(b) - 1] == tok.eos_id for b in ends)


def test_a_vocabulary_over_65536_takes_four_bytes(tmp_path):
    """The switch lies exactly at 65,536; id 70,000 survives."""
    assert pack.token_dtype(65536) == np.dtype("<u2") and pack.token_dtype(65537) == np.dtype("<u4")
    tok = char_tokenizer("".join(chr(0x10000 + i) for i in range(70_000)))
    meta = pack.write_tokens(tmp_path, "train", [chr(0x10000 + 69_999)], tok)
    tokens = np.fromfile(tmp_path / "train.bin", "<u4")
    assert meta["dtype"] == "uint32" and tok.decode(tokens.tolist()) == chr(0x10000 + 69_999) and tokens[0] > 65_535


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    """Rather than wrapped round by the cast."""
    class Broken:
        vocab_size, eos_id, hash = 64, 63, ""
        encode_batch = staticmethod(lambda texts: [[70_000] for _ in texts])
    with pytest.raises(UserError, match="70000"):
        pack.write_tokens(tmp_path, "train", ["x"], Broken())


def test_splits_are_disjoint_complete_shuffled_and_stable(tmp_path):
    """Each document on one side, by its content alone: it stays there when others come; about the share asked for."""
    tok, texts = small_tokenizer(), [f"document number {i}" for i in range(500)]
    report = pack.write_splits(tmp_path, documents(tmp_path, texts), tok, 0.1, seed=1)

    def read_back(split):
        tokens, ends = np.fromfile(tmp_path / f"{split}.bin", "<u2"), np.fromfile(tmp_path / f"{split}.idx", "<u8")
        return [tok.decode(tokens[int(a):int(b) - 1].tolist()) for a, b in zip([0, *ends[:-1]], ends)]

    train, val = read_back("train"), read_back("val")
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)
    assert 25 <= len(val) == report["val"]["n_docs"] <= 80 and train != sorted(train, key=texts.index)
    assert all(pack.in_validation(t, 0.1) for t in val)
    pack.write_splits(tmp_path, documents(tmp_path, texts[::-1] + ["one more"]), tok, 0.1, seed=2)
    assert set(val) <= set(read_back("val")) | {"one more"}


def test_a_split_without_a_document_is_refused(tmp_path):
    """One document cannot be on both sides."""
    with pytest.raises(UserError, match="--val_fraction"):
        pack.write_splits(tmp_path, documents(tmp_path, ["alone"]), small_tokenizer(), 0.5, seed=1)
