"""Token files: every document once and whole, in an order that neither workers nor parts nor interruptions change, and
nothing read that does not fit together."""
import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from conftest import ROOT, stories, tiny_lm, tiny_tokenizer
from nanollm.config import UserError
from nanollm.corpus import pack
from nanollm.corpus.pack import content_hash, describe, write_splits, write_tokens
from nanollm.data import Joined, TokenFile, open_tokens
from nanollm.losses import IGNORE_INDEX, cross_entropy
from nanollm.sampler import permute, shuffled
from nanollm.tokenizer import char_tokenizer


def read_back(directory, split, tok):
    """The documents of a split as texts, in its order."""
    _, tokens, ends = open_tokens(directory, split)
    return [tok.decode(tokens[a : b - 1].tolist()) for a, b in zip([0, *ends[:].tolist()], ends[:].tolist())]


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}


TEXTS = stories(300)


def make_parts(folder, cuts=(), texts=TEXTS, sources=("web", "wiki", "wiki")):
    """The texts as Parquet parts, cut before the given documents; sources in turn."""
    folder.mkdir()
    borders = [0, *cuts, len(texts)]
    for k, (a, b) in enumerate(zip(borders, borders[1:])):
        columns = {"id": [f"s:{i}" for i in range(a, b)], "text": pa.array(texts[a:b], pa.large_string()),
                   "source": [sources[i % len(sources)] for i in range(a, b)]}
        pq.write_table(pa.table(columns), folder / f"part-{k:05d}.parquet")
    return sorted(folder.glob("*.parquet"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tok):
    """300 documents as one part, as five (one of them empty), and the tokenizer's directory."""
    root = tmp_path_factory.mktemp("corpus")
    tok.save(root / "tok")
    return {"one": make_parts(root / "one"), "five": make_parts(root / "five", (10, 10, 150, 290)), "tok": root / "tok"}


@pytest.fixture(scope="module")
def split(corpus, tmp_path_factory):
    """The directory of the straightforward run: one part, one process, shards of 1,500 tokens."""
    out = tmp_path_factory.mktemp("split") / "out"
    write_splits(corpus["one"], out, corpus["tok"], 0.1, seed=1, shard_tokens=1500)
    return out


# ---- what is in the files ------------------------------------------------------------------------------------------

def test_a_shard_is_nothing_but_ids_with_one_eos_a_document(tmp_path, tok):
    """Sizes, offsets and counts of the JSON are those of the files; EOS ends every document and stands nowhere else, even
    where a text spells it; and the text comes back."""
    texts = [f"hello {i} 你好 <|endoftext|>" for i in range(600)] + [""]
    meta = write_tokens(tmp_path, "train", iter(texts), tok)
    tokens, ends = np.fromfile(tmp_path / "train-00000.bin", "<u2"), np.fromfile(tmp_path / "train-00000.idx", "<u8")
    assert meta == json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert meta["n_tokens"] == len(tokens) == ends[-1] == meta["shards"][0]["n_tokens"] and meta["shards"][0]["bytes"] == 2 * len(tokens)
    assert np.array_equal(ends - 1, np.flatnonzero(tokens == tok.eos_id)) and meta["n_docs"] == len(ends) == 601
    assert meta["n_bytes"] == sum(len(t.encode()) for t in texts) and meta["tokenizer_hash"] == tok.hash
    assert read_back(tmp_path, "train", tok) == texts
    assert tok.decode(tokens[: int(ends[2])].tolist()) == "".join(texts[:3])            # EOS has a place but no text


@pytest.mark.parametrize("limit", [1, 50, 333, 10**6])
def test_documents_never_span_shards_and_nothing_is_lost_at_their_ends(tmp_path, tok, limit):
    """Whatever the limit: each shard keeps it or holds one longer document, none is empty, and all documents are there, in
    order. (A writer that cuts an array before it takes the rest loses the overflow at each file's end.)"""
    meta = write_tokens(tmp_path, "train", TEXTS, tok, shard_tokens=limit)
    assert all(0 < s["n_tokens"] <= limit or s["n_docs"] == 1 for s in meta["shards"])
    n = len(meta["shards"])
    assert n == 300 if limit == 1 else n == 1 if limit == 10**6 else 1 < n <= 300
    assert read_back(tmp_path, "train", tok) == TEXTS
    for shard in meta["shards"]:
        assert np.fromfile(tmp_path / shard["file"], "<u2")[-1] == tok.eos_id
    raw = b"".join((tmp_path / s["file"]).read_bytes() for s in meta["shards"])
    write_tokens(tmp_path, "train", TEXTS, tok)                              # fewer shards: those of before are gone
    assert (tmp_path / "train-00000.bin").read_bytes() == raw and len(list(tmp_path.glob("train*.bin"))) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 60), st.integers(1, 7))
def test_the_two_cuts_agree_with_filling_one_by_one(lengths, limit, batch):
    """Known lengths (places of length 0 belong to the other split) and a stream in batches are cut where a person would cut."""
    want, room = [], 0
    for i, n in enumerate(lengths):
        if n:
            if not want or n > room:
                want.append([])
                room = limit
            want[-1].append(i)
            room -= n
    stretches = pack.cut(np.array(lengths, np.uint32), limit)
    assert [[i for i in range(a, b) if lengths[i]] for a, b in stretches] == want
    present = [(i, n) for i, n in enumerate(lengths) if n]
    blocks = [(np.repeat(*np.array(present[k : k + batch]).T), np.array([n for _, n in present[k : k + batch]])) for k in range(0, len(present), batch)]
    got = [set() for _ in want]
    for number, ids, sizes in pack.cut_stream(blocks, limit):
        got[number] |= set(ids.tolist())
        assert len(ids) == sizes.sum()
    assert [sorted(g) for g in got] == want


def test_the_dtype_switches_between_65536_and_65537(tmp_path):
    """Because uint16 would wrap: numpy turns id 70,000 into 4,464 without a word. It is stored in four bytes and survives."""
    assert np.array([70_000]).astype(np.uint16)[0] == 70_000 - 65_536 == 4_464
    assert pack.token_dtype(65_536) == np.dtype("<u2") and pack.token_dtype(65_537) == np.dtype("<u4")
    tok = char_tokenizer("".join(chr(0x10000 + i) for i in range(70_000)))
    meta = write_tokens(tmp_path, "train", [chr(0x10000 + 69_999)] * 2, tok)
    assert meta["dtype"] == "uint32" and read_back(tmp_path, "train", tok) == [chr(0x10000 + 69_999)] * 2
    x, y, _ = TokenFile(tmp_path, "train", 8, "documents").batch([0])
    assert y[0, 0] > 65_535 and y[0, 1] == x[0, 0] == tok.eos_id


@pytest.mark.parametrize("ids, says", [([70_000], "70000"), ([-1, 3], "vocab_size"), ([63], "inside a document")])
def test_ids_that_a_file_may_not_hold_are_refused(tmp_path, ids, says):
    """Beyond the vocabulary, rather than wrapped round by the cast; or the separator inside a document."""
    class Broken:
        vocab_size, eos_id, hash = 64, 63, ""
        encode = staticmethod(lambda text: list(ids))
    with pytest.raises(UserError, match=says):
        write_tokens(tmp_path, "train", ["x"], Broken())
    assert not (tmp_path / "train.json").exists()


def test_the_notes_arithmetic_of_disk_space():
    """63.4 billion tokens are 126.8 GB in two bytes each, 253.6 in four; the 12 GB of the notes hold 6 billion. Uncut, they are
    237 shards of 2^28 tokens, half a GiB each."""
    assert 63.4e9 * 2 / 1e9 == pytest.approx(126.8) and 12e9 / 2 == 6e9
    assert -(-63.4e9 // pack.SHARD) == 237 and pack.SHARD * 2 == 2**29


# ---- a whole corpus ------------------------------------------------------------------------------------------------

def test_splits_are_disjoint_complete_and_shuffled_over_the_whole_corpus(split, tok):
    """The held-out documents are those of the content hash; each side stands in the order of permute(number, N, seed), which
    brings first and last documents together."""
    train, val = read_back(split, "train", tok), read_back(split, "val", tok)
    assert sorted(train + val) == sorted(TEXTS) and not set(train) & set(val) and 15 < len(val) < 60
    place = permute(np.arange(300), 300, 1)
    for texts, held in ((train, False), (val, True)):
        assert texts == [TEXTS[i] for i in np.argsort(place) if (content_hash(TEXTS[i]) < 0.1 * 2**64) == held]
    numbers = [TEXTS.index(t) for t in train]
    assert abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.2


def test_the_json_adds_up(split, tok):
    """Shards, sources, bytes of text and digests are those of the files."""
    import hashlib
    for name in ("train", "val"):
        meta, texts = json.loads((split / f"{name}.json").read_text(encoding="utf-8")), read_back(split, name, tok)
        assert meta["n_docs"] == len(texts) == sum(s["n_docs"] for s in meta["shards"])
        assert meta["n_bytes"] == sum(len(t.encode()) for t in texts)
        assert sum(meta["sources"].values()) == meta["n_tokens"] == sum(s["n_tokens"] for s in meta["shards"])
        web = [t for t in texts if TEXTS.index(t) % 3 == 0]
        assert meta["sources"]["web"] == sum(len(tok.encode(text)) + 1 for text in web)
        for s in meta["shards"]:
            assert hashlib.blake2b((split / s["file"]).read_bytes(), digest_size=16).hexdigest() == s["blake2b"]
    assert len(meta["shards"]) >= 1 and not (split / "encoded").exists() and (split / "tokenizer").is_dir()


def pool(workers, function, items, label):
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as p:
        return list(p.map(function, items))


def test_worker_processes_write_the_same_bytes(split, corpus, tmp_path):
    """Two processes, started afresh with another salt of hash(), and a corpus cut elsewhere."""
    os.environ["PYTHONHASHSEED"] = "7"
    try:
        write_splits(corpus["five"], tmp_path / "out", corpus["tok"], 0.1, 1, functools.partial(pool, 2), 1500)
    finally:
        del os.environ["PYTHONHASHSEED"]
    assert files(tmp_path / "out") == files(split)


@pytest.mark.parametrize("cuts, run_tokens", [((), 100), ((1, 2, 3, 299), 2**24), ((10, 10, 150, 290), 700), (tuple(range(7, 300, 7)), 333)])
def test_neither_the_cut_into_parts_nor_the_size_of_the_runs_shows(split, corpus, tmp_path, monkeypatch, cuts, run_tokens):
    """The global order decides alone: any parts, empty ones too, and any amount of memory give the same bytes."""
    monkeypatch.setattr(pack, "RUN", run_tokens)
    write_splits(make_parts(tmp_path / "parts", cuts), tmp_path / "out", corpus["tok"], 0.1, 1, shard_tokens=1500)
    assert files(tmp_path / "out") == files(split)


def test_shards_hold_what_writing_in_that_order_would_write(split, tmp_path, tok):
    """The parallel road and the straight one end in the same files."""
    train = read_back(split, "train", tok)
    write_tokens(tmp_path, "train", train, tok, shard_tokens=1500)
    assert {k: v for k, v in files(tmp_path).items() if not k.endswith("json")} == {
        k: v for k, v in files(split).items() if k.startswith("train") and not k.endswith("json")}


class Killed(Exception):
    pass


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_at_random_and_run_again_the_bytes_are_the_same(split, corpus, tmp_path, monkeypatch, seed):
    """Some write fails half done, thrice; what is whole is not done again, and no document is there twice (as it is where
    row groups are appended to the file of a crash)."""
    rng, whole, left = np.random.default_rng(seed), pack.written, [0]
    monkeypatch.setattr(pack, "RUN", 2000)

    def failing(path):
        left[0] -= 1
        if not left[0]:
            Path(f"{path}.tmp").write_bytes(b"half")
            raise Killed
        return whole(path)
    monkeypatch.setattr(pack, "written", failing)
    for _ in range(3):
        left[0] = int(rng.integers(1, 60))
        try:
            write_splits(corpus["five"], tmp_path / "out", corpus["tok"], 0.1, 1, shard_tokens=1500)
        except Killed:
            for name in ("train", "val"):                                    # a split can be opened only when it is whole
                with contextlib.suppress(UserError):
                    assert np.array_equal(open_tokens(tmp_path / "out", name)[2][:], open_tokens(split, name)[2][:])
    monkeypatch.setattr(pack, "written", whole)
    write_splits(corpus["five"], tmp_path / "out", corpus["tok"], 0.1, 1, shard_tokens=1500)
    assert files(tmp_path / "out") == files(split)


def test_what_is_encoded_is_not_encoded_again(corpus, tmp_path, monkeypatch):
    """A second try takes over the parts of the first; another seed, or a part that has changed, is new work."""
    encoded, whole = [], pack.encode
    monkeypatch.setattr(pack, "encode", lambda texts, tok: (encoded.append(len(texts)), whole(texts, tok))[1])

    def stop_before_shards(function, items, label):
        if label == "shuffle":
            raise Killed
        return [function(item) for item in items]

    def attempt(seed=1):
        encoded.clear()
        with pytest.raises(Killed):
            write_splits(corpus["five"], tmp_path / "out", corpus["tok"], 0.1, seed, stop_before_shards)
        return sum(encoded)
    assert [attempt(), attempt(), attempt(seed=2), attempt(seed=2)] == [300, 0, 300, 0]
    run = next((tmp_path / "out" / "encoded").glob("part-00002-*.ids"))
    run.write_bytes(run.read_bytes()[:-2])                                   # damaged: part 2 is done again, 140 documents
    assert attempt(seed=2) == 140


def test_a_source_can_have_a_directory_of_its_own(corpus, tmp_path, tok):
    """To be mixed by weight: the same documents, apart; each with its own validation document, were it only one."""
    result = write_splits(corpus["five"], tmp_path, corpus["tok"], 0.0, 1, by_source=True)
    assert set(result) == {"web", "wiki"} and (tmp_path / "tokenizer").is_dir()
    for source, numbers in (("web", range(0, 300, 3)), ("wiki", [i for i in range(300) if i % 3])):
        train, val = (read_back(tmp_path / source, s, tok) for s in ("train", "val"))
        assert sorted(train + val) == sorted(TEXTS[i] for i in numbers)
        assert val == [min((TEXTS[i] for i in numbers), key=content_hash)]
        assert result[source]["train"]["sources"] == {source: result[source]["train"]["n_tokens"]}
    both = Joined([TokenFile(tmp_path / s, "train", 32) for s in ("web", "wiki")])
    assert len(both) == sum(map(len, both.parts)) and both.meta["n_docs"] == 298
    x, y, _ = both.batch([0, len(both) - 1])
    assert torch_equal(x[0], both.parts[0].batch([0])[0][0]) and torch_equal(y[1], both.parts[1].batch([len(both.parts[1]) - 1])[1][0])


def torch_equal(a, b):
    return a.tolist() == b.tolist()


@pytest.mark.parametrize("sources, says", [(("a b", "a/b"), "would share the directory a_b"), (("tokenizer",), "rename"), (("encoded", "x"), "rename")])
def test_sources_that_cannot_be_told_apart_on_the_disk_are_refused(corpus, tmp_path, sources, says):
    with pytest.raises(UserError, match=says):
        write_splits(make_parts(tmp_path / "parts", sources=sources), tmp_path / "out", corpus["tok"], 0.1, 1, by_source=True)


def test_encoding_opens_no_threads(corpus, tmp_path, monkeypatch):
    """There is a process for each core already; a pool of threads for every batch made each of them slower."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread was started"))
    texts = ["a text", "and another one"]
    ids, lengths = pack.encode(texts, tiny_tokenizer())
    assert lengths.tolist() == [len(tiny_tokenizer().encode(text)) + 1 for text in texts] and len(ids) == lengths.sum()


def test_weights_are_shares_of_rows_and_not_of_tokens_where_rows_are_padded(tmp_path, tok):
    """Rows of documents: long texts fill theirs, one short text that fits with no other leaves most of its row empty. At 1:1
    the long ones then give far more of the targets; in streams, where no row is padded, as many."""
    for name, texts in (("long", ["the dog ran home and " * 40] * 20), ("short", ["the cat sat"] * 5)):
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name, "train", texts, tok)
    targets = {}
    for rows in ("documents", "stream"):
        both = [TokenFile(tmp_path / name, "train", 32, rows) for name in ("long", "short")]
        targets[rows] = [float((data.batch([0])[1] != IGNORE_INDEX).sum()) for data in both]
    assert targets["stream"] == [32, 32] and targets["documents"][0] == 32 > targets["documents"][1]


def test_at_least_one_document_is_held_out_and_the_smallest_hash_decides(corpus, tmp_path, tok):
    """A share too small for a small corpus still leaves something to validate on, whatever the cut into parts."""
    for k, parts in enumerate((corpus["one"], corpus["five"])):
        write_splits(parts, tmp_path / str(k), corpus["tok"], 1e-9, 1)
        assert read_back(tmp_path / str(k), "val", tok) == [min(TEXTS, key=content_hash)]
    assert files(tmp_path / "0") == files(tmp_path / "1")


def test_a_document_keeps_its_side_when_the_corpus_grows(corpus, tmp_path, tok, split):
    """In another order and among others; equal texts are never on both sides."""
    texts = [*TEXTS[::-1], "one more", *TEXTS[:20]]
    write_splits(make_parts(tmp_path / "parts", (100,), texts), tmp_path / "out", corpus["tok"], 0.1, seed=2)
    train, val = (set(read_back(tmp_path / "out", s, tok)) for s in ("train", "val"))
    assert not train & val and set(read_back(split, "val", tok)) == val - {"one more"}


def test_a_corpus_without_two_sides_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="--val_fraction"):
        write_splits(make_parts(tmp_path / "1", texts=["alone"]), tmp_path / "out", corpus["tok"], 0.5, 1)
    with pytest.raises(UserError, match="no document"):
        write_splits(make_parts(tmp_path / "0", texts=[]), tmp_path / "out", corpus["tok"], 0.5, 1)
    with pytest.raises(UserError, match="of rare fell on one side"):
        write_splits(make_parts(tmp_path / "2", texts=TEXTS[:9], sources=("web",) * 8 + ("rare",)), tmp_path / "out", corpus["tok"], 0.2, 1, by_source=True)
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column `text`"):
        write_splits([tmp_path / "x.parquet"], tmp_path / "out", corpus["tok"], 0.5, 1)
    with pytest.raises(UserError, match="document 1 has no text"):
        write_splits(make_parts(tmp_path / "3", texts=["a", None]), tmp_path / "out", corpus["tok"], 0.5, 1)


def test_a_full_disk_is_one_sentence(corpus, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not write .*No space left on device; free some space and run the same command again"):
        write_splits(corpus["five"], tmp_path, corpus["tok"], 0.1, 1)


def test_a_file_that_cannot_be_read_is_named_and_not_taken_for_a_full_disk(corpus, tmp_path):
    """A run that vanishes before the shards are written: the sentence names it and does not advise to free space."""
    def lose_a_run(function, items, label):
        if label == "shuffle":
            next((tmp_path / "encoded").glob("*.ids")).unlink()
        return [function(item) for item in items]
    with pytest.raises(UserError, match=r"could not write .*\.ids: No such file or directory; run the same") as e:
        write_splits(corpus["one"], tmp_path, corpus["tok"], 0.1, 1, lose_a_run)
    assert "space" not in str(e.value)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path, corpus):
    """Ten times the documents, the same peak within 60 MB (of which 20 B a document are the places)."""
    code = ("import sys, resource; sys.path[:0] = [sys.argv[4]]; from pathlib import Path; from nanollm.corpus import pack; pack.RUN = 2**20\n"
            "pack.write_splits(sorted(Path(sys.argv[1]).glob('*.parquet')), sys.argv[2], sys.argv[3], 0.01, 0, shard_tokens=2**22)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
    peak = []
    for n in (4, 40):
        texts = [" ".join(TEXTS[i : i + 40]) for i in range(250)]
        parts = make_parts(tmp_path / f"parts{n}", range(250, 250 * n, 250), texts * n)
        out = subprocess.run([sys.executable, "-c", code, parts[0].parent, tmp_path / f"out{n}", corpus["tok"], ROOT], capture_output=True, text=True, check=True)
        peak.append(float(out.stdout))
    assert peak[1] < peak[0] + 60, peak


# ---- reading -------------------------------------------------------------------------------------------------------

def test_the_size_of_the_shards_changes_nothing_that_training_reads(tmp_path, tok):
    """Windows run over the borders of shards, documents never do: the same rows, batches and openings from 1 and from 40 files."""
    for name, limit in (("one", 10**6), ("many", 300)):
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name, "train", TEXTS, tok, shard_tokens=limit)
    for rows in ("stream", "documents"):
        one, many = (TokenFile(tmp_path / name, "train", 48, rows) for name in ("one", "many"))
        assert len(one) == len(many) and len(many.tokens.arrays) > 30 and one.openings(tok) == many.openings(tok)
        for a, b in zip(one.batch(range(len(one))), many.batch(range(len(many)))):
            assert a is b is None or torch_equal(a, b)
    flat = np.concatenate(many.tokens.arrays)
    for begin, end in ((0, 0), (0, len(flat)), (299, 301), (17, 5000), (len(flat) - 1, len(flat)), (len(flat), len(flat) + 9)):
        assert many.tokens[begin:end].tolist() == flat[begin:end].tolist()


def test_empty_shards_and_version_1_are_read(tmp_path, tok):
    """A shard of no tokens cannot be mapped and is passed over; a single train.bin with its old JSON is a shard."""
    meta = write_tokens(tmp_path, "train", TEXTS[:20], tok)
    want = TokenFile(tmp_path, "train", 16).batch([0, 3])[0].tolist()
    for ending in ("bin", "idx"):
        (tmp_path / f"train-00001.{ending}").write_bytes(b"")
    empty = {"file": "train-00001.bin", "n_tokens": 0, "n_docs": 0}
    for shards in ([*meta["shards"], empty], [{**empty}, *meta["shards"]]):
        (tmp_path / "train.json").write_text(json.dumps({**meta, "shards": shards}), encoding="utf-8")
        assert TokenFile(tmp_path, "train", 16).batch([0, 3])[0].tolist() == want
    for ending in ("bin", "idx"):
        (tmp_path / f"train-00000.{ending}").rename(tmp_path / f"train.{ending}")
    old = {k: v for k, v in meta.items() if k not in ("shards", "sources")} | {"version": 1}
    (tmp_path / "train.json").write_text(json.dumps(old), encoding="utf-8")
    assert TokenFile(tmp_path, "train", 16).batch([0, 3])[0].tolist() == want and read_back(tmp_path, "train", tok) == TEXTS[:20]


def swap(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("harm, says", [
    (lambda d: swap(d / "train.json", version=3), "version 3; .* a newer one"),
    (lambda d: swap(d / "train.json", dtype="int16"), "does not describe"),          # OLMo read unknown dtypes as uint16
    (lambda d: swap(d / "train.json", vocab_size=100), "beyond the vocabulary of 100"),
    (lambda d: swap(d / "train.json", n_docs=5), "do not add up"),
    (lambda d: (d / "train-00001.bin").unlink(), "train-00001.bin is missing"),
    (lambda d: (d / "train-00001.idx").write_bytes((d / "train-00000.idx").read_bytes()), "train-00001.idx does not belong"),
    (lambda d: (d / "train-00001.bin").write_bytes((d / "train-00001.bin").read_bytes()[:-2]), "train-00001.bin .*truncated copy"),
])
def test_shards_that_do_not_fit_together_are_one_sentence(tmp_path, tok, harm, says):
    write_tokens(tmp_path, "train", TEXTS[:60], tok, shard_tokens=1000)
    harm(tmp_path)
    with pytest.raises(UserError, match=says):
        TokenFile(tmp_path, "train", 32)


@pytest.mark.parametrize("n_tokens, rows", [(15, None), (16, None), (17, 1), (33, 2)])
def test_a_file_as_long_as_a_row_works_and_a_shorter_one_says_so(tmp_path, n_tokens, rows):
    """T = 16 needs 17 tokens, the shift included; stride T = no target is left out between rows (X = row[:-1], Y = row[1:] of
    rows that do not overlap loses one in T)."""
    class Ones:
        vocab_size, eos_id, hash = 9, 8, ""
        encode = staticmethod(lambda text: full[: n_tokens - 1])
    full = [1, 2, 3, 4, 5, 6, 7] * 6
    write_tokens(tmp_path, "train", ["x"], Ones())
    if rows is None:
        with pytest.raises(UserError, match="less than one row of --max_seq_len 16"):
            TokenFile(tmp_path, "train", 16)
    else:
        data = TokenFile(tmp_path, "train", 16)
        assert len(data) == rows and data.batch(range(rows))[1].flatten().tolist() == [*full[: n_tokens - 1], 8][1 : rows * 16 + 1]


def test_all_batches_of_document_rows_have_one_shape(tmp_path, tok):
    """Else torch.compile would begin anew with each."""
    write_tokens(tmp_path, "train", TEXTS, tok)
    data = TokenFile(tmp_path, "train", 200, "documents")
    assert {tuple(data.batch([r])[0].shape) for r in range(len(data))} == {(1, 200)}


def test_another_cut_is_another_validation_loss(tmp_path, tok):
    """The same model on the same text: rows that begin at documents against a stream. A "gain" from a change of packing is none,
    so losses compare only under the same --rows and --max_seq_len (which a checkpoint therefore remembers)."""
    write_tokens(tmp_path, "val", TEXTS[:100], tok)
    model, loss = tiny_lm(), {}
    for rows in ("stream", "documents"):
        data = TokenFile(tmp_path, "val", 64, rows)
        x, y, s = data.batch(range(len(data)))
        total, count, _ = cross_entropy(model(x, s), y)
        loss[rows] = (total / count).item()
    assert abs(loss["stream"] - loss["documents"]) > 1e-3


def test_a_position_behind_4_gib_is_found(tmp_path):
    """Byte offsets in int64: a sparse file of 2^31 + 65 two-byte ids, whose last row is read from behind 2^32 bytes."""
    n = 2**31 + 65
    with open(tmp_path / "train.bin", "wb") as f:
        f.truncate(n * 2)
        f.seek((n - 3) * 2)
        f.write(np.array([5, 6, 7], "<u2").tobytes())
    np.array([n - 3, n], "<u8").tofile(tmp_path / "train.idx")
    (tmp_path / "train.json").write_text(json.dumps({"version": 1, "dtype": "uint16", "vocab_size": 8, "eos_id": 7, "tokenizer_hash": "",
                                                     "n_tokens": n, "n_docs": 2, "n_bytes": 0}), encoding="utf-8")
    data = TokenFile(tmp_path, "train", 64)
    assert len(data) == 2**25 + 1 and data.batch([len(data) - 1])[1][0, -4:].tolist() == [0, 5, 6, 7]


def test_mapping_a_file_reads_nothing_and_changes_nothing(tmp_path):
    """np.memmap of 200 MB costs less than 5 MB of memory until it is read, and in mode "r" cannot be written to (the default is
    "r+", which can)."""
    with open(tmp_path / "x.bin", "wb") as f:
        f.truncate(200 << 20)
    code = ("import numpy as np, resource, sys; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "a = peak(); m = np.memmap(sys.argv[1], '<u2', 'r'); m[5], m[-1]; print(peak() - a, m.flags.writeable, np.memmap(sys.argv[1], '<u2').flags.writeable)")
    grown, ours, default = subprocess.run([sys.executable, "-c", code, tmp_path / "x.bin"], capture_output=True, text=True, check=True).stdout.split()
    assert int(grown) < 5 << 10 and (ours, default) == ("False", "True")


# ---- files of other programs ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_bare_file_is_read_once_its_dtype_is_told(tmp_path, tok, dtype):
    """nanoGPT, llama2.c and others write ids and nothing else. We do not guess: without a JSON it is refused, with it the file is
    like our own; the text behind the last EOS counts as a document."""
    rows = [tok.encode(text) + [tok.eos_id] for text in TEXTS[:30]]
    np.concatenate([*rows, tok.encode("The end")]).astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="does not say what its bytes are"):
        TokenFile(tmp_path, "train", 32)
    meta = describe(tmp_path, "train", tok, dtype)
    assert meta["n_docs"] == 31 and meta["n_bytes"] == sum(len(t.encode()) for t in [*TEXTS[:30], "The end"])
    assert read_back(tmp_path, "train", tok)[:30] == TEXTS[:30] and len(TokenFile(tmp_path, "train", 32, "documents", tok.hash)) > 10


def test_a_bare_file_of_another_kind_is_refused(tmp_path, tok):
    """The wrong dtype or tokenizer shows in ids that the vocabulary does not have."""
    np.array([1, 2, 3, 4], "<u4").tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="must exist, and its dtype be"):
        describe(tmp_path, "train", tok, "int32")
    np.array([70_000], "<u4").tofile(tmp_path / "train.bin")
    for dtype in ("uint16", "uint32"):
        with pytest.raises(UserError, match="another tokenizer or dtype"):
            describe(tmp_path, "train", tok, dtype)
    (tmp_path / "train.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match="no whole number of uint16"):
        describe(tmp_path, "train", tok, "uint16")
