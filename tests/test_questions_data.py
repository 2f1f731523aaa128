"""Claims of the notes about data and scaling that no test of the code shows by itself: docs/questions/01_data.toml."""
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from learn import lab
from nanollm import generate, world
from nanollm.corpus.clean import clean_text
from nanollm.corpus.dedup import deduplicate_texts
from nanollm.corpus.pack import token_dtype
from nanollm.corpus.train_tokenizer import train_tokenizer
from nanollm.tokenizer import char_tokenizer


def test_one_adam_step_moves_the_output_of_a_wider_layer_further():
    """Adam's first step moves every weight by lr, so the output y = w x of a layer of d inputs of size 1 moves by lr * d: a layer four
    times as wide wants a quarter of the rate for the same move."""
    moved = {}
    for d in (64, 256):
        w, x = torch.zeros(1, d, requires_grad=True), torch.randn(d, generator=torch.Generator().manual_seed(0)).sign()
        optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=0.0)
        (w @ x).sum().backward()
        optimizer.step()
        moved[d] = (w @ x).abs().item()
    assert moved[64] == pytest.approx(0.064, rel=1e-3) and moved[256] == pytest.approx(4 * moved[64], rel=1e-3)


def test_one_bad_gradient_moves_adam_by_half_a_step_and_sgd_by_its_size():
    """After many gradients of size 1 comes one of size 1000 the other way. SGD goes 1000 ordinary steps; Adam at most
    (1 - b1) / sqrt(1 - b2) = 0.45 of one, clipping to norm 1 makes it one. But then Adam hardly moves: v remembers the 1000."""
    def steps(clip, make):
        w = torch.zeros(1, requires_grad=True)
        optimizer, path = make([w]), []
        for t in range(110):
            w.grad = torch.tensor([-1000.0 if t == 100 else 1.0])
            if clip:
                torch.nn.utils.clip_grad_norm_([w], 1.0)
            before = w.item()
            optimizer.step()
            path.append(before - w.item())
        return path
    sgd = steps(False, lambda p: torch.optim.SGD(p, lr=1e-3))
    adam = steps(False, lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0))
    assert sgd[100] == pytest.approx(-1.0, rel=1e-3) and steps(True, lambda p: torch.optim.SGD(p, lr=1e-3))[100] == pytest.approx(-1e-3, rel=1e-3)
    assert adam[99] == pytest.approx(1e-3, rel=0.01) and adam[100] == pytest.approx(-0.447e-3, rel=0.02)
    assert all(step < 0 for step in adam[101:])                           # the momentum of the bad gradient goes on for nine steps at least


def test_a_prompt_changes_no_weight():
    """The notes: a model can be trained "in real time" by prompting it. No weight moves; only the input is another."""
    tok = char_tokenizer("abcdefgh ")
    model = lab.tiny(tok.vocab_size, dim=32, n_layers=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    said = [list(generate.generate(model, tok.encode(prompt), 8, temperature=0.0)) for prompt in ("abc abc ab", "hgf hgf hg")]
    assert said[0] != said[1] and all(len(ids) == 8 for ids in said)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_parquet_is_smaller_than_json_lines_and_keeps_its_columns_apart(tmp_path):
    """500 rows of text, number and source: under half the bytes of JSON lines, and whoever wants the number and the source only
    reads under 5 % of it."""
    rows = [{"text": doc.text, "id": i, "source": doc.kind} for i, doc in enumerate(itertools.islice(world.documents(10**9, 0), 500))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    lines, columns = (tmp_path / "x.jsonl").stat().st_size, (tmp_path / "x.parquet").stat().st_size
    group = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0)
    size = {group.column(i).path_in_schema: group.column(i).total_compressed_size for i in range(group.num_columns)}
    assert columns < lines / 2 and size["id"] + size["source"] < 0.05 * columns


def test_filtering_first_leaves_less_to_deduplicate_and_loses_no_good_copy_to_a_bad_one():
    """A cheap filter before the expensive step: the same texts stay and half as many are hashed. And where a bad page is the first of
    two near copies, deduplicating first keeps the bad one, which the filter then drops: both are lost."""
    def kept(texts):
        return [text for text, gone in zip(texts, deduplicate_texts(texts)) if not gone]

    def clean(texts):
        return [text for text in texts if clean_text(text)[1] is None]
    good = [doc.text for doc in itertools.islice(world.documents(10**9, 0), 20)]
    texts = [text for pair in zip(good, ["短。"] * 5 + ["!!!???" * 9] * 15) for text in pair] + good[:4]
    assert clean(kept(texts)) == kept(clean(texts)) == good and len(clean(texts)) == 24 and len(texts) == 44
    long = max(good, key=len)
    bad = long + "!" * (len(long) // 3)
    assert clean_text(bad)[1] is not None
    assert kept(clean([bad, long])) == [long] and clean(kept([bad, long])) == []


def test_a_trained_vocabulary_needs_under_one_token_a_chinese_character_and_bytes_need_three():
    """GPT-2's vocabulary learnt from English text, so Chinese falls back to single bytes."""
    texts = lab.texts(200, 0, "zh")
    own, english = (train_tokenizer("bpe", docs, 640, say=lambda *_: None) for docs in (texts, lab.texts(200, 0, "en")))
    han = "".join(c for text in texts for c in text if "\u4e00" <= c <= "\u9fff")[:3000]
    assert len(own.encode(han)) < len(han) and len(english.encode(han)) > 2.5 * len(han)


def test_the_larger_data_set_of_the_notes_is_the_smaller_one():
    """Samples times length, as the notes count them: baby read 129 w * 16 * 6 rows of 512, zero 48,355 * 24 * 6 of 1,024: a ninth of it. And
    10 B tokens in uint16 are 20 GB, 63.4 B are 127: 19 G and 12 G compare a whole with a part."""
    baby, zero = 1_290_000 * 16 * 6 * 512, 48_355 * 24 * 6 * 1024
    assert baby == pytest.approx(63.4e9, rel=1e-3) and zero == pytest.approx(7.13e9, rel=1e-3) and 8.5 < baby / zero < 9.5
    assert 10e9 * token_dtype(32_006).itemsize == 20e9 and 63.4e9 * token_dtype(64_793).itemsize == pytest.approx(126.8e9)
