"""Sentence-level deduplication: lines that stand in many documents stay in the first only."""
import random
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from nanollm.config import UserError
from nanollm.corpus import sentences
from nanollm.corpus.sentences import Sentences

FOOTER = "版权所有，未经本站书面许可不得以任何形式转载、摘编或用于其他商业用途，违者必究。"            # 41 characters
HEADER = "Subscribe to our newsletter and never miss a story about gardens again."


def body(i, rng=random.Random(0)):
    """Two lines that are in no other document."""
    return f"第{i}篇：" + "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(60)) + f"。\nStory number {i} is about {rng.random()}."


def table_of(texts, start=0, metas=None):
    return pa.table({"text": pa.array(texts, pa.large_string()), "meta": metas or [""] * len(texts),
                     "docno": np.arange(start, start + len(texts))})


def deduplicated(tmp_path, texts, cfg=Sentences(), batch=4, parts=3, limit=1 << 22, metas=None):
    """Both passes as a driver runs them: tables of `batch`, a file a part, merged."""
    table, files = table_of(texts, metas=metas), []
    for part in range(parts):
        rows = range(part * len(texts) // parts, (part + 1) * len(texts) // parts)
        tables = [table.slice(i, min(batch, rows.stop - i)) for i in range(rows.start, rows.stop, batch)]
        files.append(tmp_path / f"segments-{part}.npy")
        np.save(files[-1], sentences.merge([sentences.segments_of(t, cfg) for t in tables]))
    out = tmp_path / "repeated.npy"
    sentences.merge_files(files, out, cfg.min_documents, limit)
    sentences.load_repeated.cache_clear()
    cfg = Sentences(cfg.unit, cfg.span, cfg.min_chars, cfg.min_documents, str(out))
    return pa.concat_tables([sentences.cut_repeated(table.slice(i, batch), cfg) for i in range(0, len(texts), batch)])


def segment_texts(text, **settings):
    cfg = Sentences(**{"min_chars": 1} | settings)
    _, _, start, end = sentences.segments([text], cfg)
    return [text[s:e] for s, e in zip(start, end)]


@pytest.mark.parametrize("text, want", [
    ("一二三。四五六！真的？？他说：“走吧。”然后走了……完", ["一二三。", "四五六！", "真的？？", "他说：“走吧。”", "然后走了……", "完"]),
    ("It costs 3.14 now. Buy it! No.\nNew line", ["It costs 3.14 now.", "Buy it!", "No.", "New line"]),
    ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
    ("他说（“走吧。”）然后离开了。", ["他说（“走吧。”）", "然后离开了。"]),
    ('He left (she said "why?"). "Stop," he cried.\n"No." (He ran.)', ['He left (she said "why?").', '"Stop," he cried.', '"No."', "(He ran.)"]),
    ("  \n\n ", []),
])
def test_sentences_end_where_a_reader_would_say(text, want):
    """Closing quotes and brackets belong to the sentence, however many; a quote behind a blank begins the next one. A point in a
    number ends none, a line end always does."""
    assert segment_texts(text, unit="sentence") == want


def test_a_quote_that_begins_a_document_does_not_belong_to_the_one_before():
    """Whatever stands before it in its batch."""
    _, document, start, end = sentences.segments(["完了。", '"Go" is a word.'], Sentences(unit="sentence", min_chars=1))
    assert list(zip(document.tolist(), start.tolist(), end.tolist())) == [(0, 0, 3), (1, 0, 15)]


def test_lines_are_lines_without_the_blanks_around_them():
    assert segment_texts("  甲 乙 \r\n\n\t丙丁\n") == ["甲 乙", "丙丁"]


def test_three_sentences_in_a_row_are_a_span_and_spans_overlap():
    """C4's unit; a document of fewer has none."""
    assert segment_texts("甲。乙。丙。丁。", unit="sentence", span=3) == ["甲。乙。丙。", "乙。丙。丁。"]
    assert segment_texts("甲。乙。", unit="sentence", span=3) == []


def test_short_lines_are_no_segments():
    """29 and 30 characters that are not blank."""
    assert [len(s) for s in segment_texts("一" * 29 + "\n" + "一 " * 29 + "一\n" + "二" * 30, min_chars=30)] == [59, 30]


def test_segments_are_those_of_a_loop_over_the_texts():
    """The same line in two places of two batches has the same hash, different lines different ones."""
    rng = random.Random(1)
    lines = ["".join(rng.choice("甲乙丙丁ab ") for _ in range(rng.randrange(12))) for _ in range(60)]
    texts = ["\n".join(rng.choice(lines) for _ in range(rng.randrange(8))) for _ in range(80)]
    hashes, document, start, end = sentences.segments(texts, Sentences(min_chars=3))
    want = [(d, line) for d, text in enumerate(texts) for line in text.split("\n") if len(line.replace(" ", "")) >= 3]
    assert [(d, texts[d][s:e]) for d, s, e in zip(document.tolist(), start, end)] == [(d, line.strip()) for d, line in want]
    by_hash = defaultdict(set)
    for h, (_, line) in zip(hashes.tolist(), want):
        by_hash[h].add(line.replace(" ", ""))
    assert all(len(s) == 1 for s in by_hash.values()) and len(by_hash) == len({line.replace(" ", "") for _, line in want})


@pytest.mark.parametrize("batch, parts, limit", [(1, 1, 1 << 22), (7, 3, 10), (1024, 2, 1 << 22), (4, 5, 1)])
def test_headers_and_footers_stay_in_the_first_document_only(tmp_path, batch, parts, limit):
    """30 documents, 15 with the footer from number 5 on, 12 with the header; whatever the tables, parts and slices."""
    own = [body(i) for i in range(30)]
    texts = [(HEADER + "\n\n" if i % 2 and i > 5 else "") + own[i] + ("\n" + FOOTER if i >= 5 and i < 20 else "") for i in range(30)]
    out = deduplicated(tmp_path, texts, batch=batch, parts=parts, limit=limit).to_pylist()
    for i, row in enumerate(out):
        assert row["text"] == (HEADER + "\n\n" if i == 7 else "") + own[i] + ("\n" + FOOTER if i == 5 else "")
        changed = i % 2 and i > 7 or 5 < i < 20
        assert row["edits"] == ("repeated_sentences" if changed else "") and row["drop_reason"] is None


@pytest.mark.parametrize("documents, cut", [(9, False), (10, True)])
def test_ten_documents_are_many_and_nine_are_not(tmp_path, documents, cut):
    texts = [body(i) + "\n" + FOOTER for i in range(documents)]
    out = deduplicated(tmp_path, texts)["text"].to_pylist()
    assert [FOOTER in text for text in out] == [True] + [not cut] * (documents - 1)


def test_a_line_that_one_document_repeats_is_not_in_many_documents(tmp_path):
    texts = ["\n".join([FOOTER] * 50)] + [body(i) for i in range(5)]
    assert deduplicated(tmp_path, texts)["text"].to_pylist() == texts


def test_a_sentence_goes_from_the_middle_of_a_paragraph(tmp_path):
    """What stands before and after it stays, on the same line."""
    texts = [f"开头{i}不同。" + FOOTER + f"结尾{i}也不同。" for i in range(12)]
    out = deduplicated(tmp_path, texts, Sentences(unit="sentence"))["text"].to_pylist()
    assert out == texts[:1] + [f"开头{i}不同。结尾{i}也不同。" for i in range(1, 12)]


def test_a_document_of_nothing_else_is_dropped_with_its_text(tmp_path):
    out = deduplicated(tmp_path, [FOOTER] * 12).to_pylist()
    assert [row["drop_reason"] for row in out] == [None] + ["repeated_sentences"] * 11
    assert all(row["text"] == FOOTER and row["edits"] == "" for row in out)


def test_chats_are_left_alone_and_do_not_count(tmp_path):
    metas = ['{"messages": []}'] * 8 + [""] * 8
    texts = [body(i) + "\n" + FOOTER for i in range(16)]
    assert deduplicated(tmp_path, texts, metas=metas)["text"].to_pylist() == texts


def test_merging_adds_documents_and_keeps_the_first(tmp_path):
    """In any grouping: 12 tables at once, or two files of six."""
    rows = [sentences.segments_of(table_of([FOOTER + f"\n{HEADER}" * (i % 2)], start=20 - i), Sentences()) for i in range(12)]
    whole = sentences.merge(rows)
    assert np.array_equal(whole, sentences.merge([sentences.merge(rows[6:]), sentences.merge(rows[:6])]))
    assert sorted(whole[["documents", "first"]].tolist()) == [(6, 9), (12, 9)]


def test_empty_tables_and_a_corpus_without_repetitions_pass(tmp_path):
    assert len(sentences.segments_of(table_of(["x"]).slice(0, 0), Sentences())) == 0
    texts = [body(i) for i in range(3)] + [""]
    assert deduplicated(tmp_path, texts)["text"].to_pylist() == texts


def test_statistics_of_something_else_are_refused(tmp_path):
    with pytest.raises(UserError, match="line or sentence"):
        Sentences(unit="word")
    np.save(tmp_path / "x.npy", np.zeros(3))
    for name in ("x.npy", "missing.npy"):
        with pytest.raises(UserError, match="first pass again"):
            sentences.load_repeated(str(tmp_path / name))
