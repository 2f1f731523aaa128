"""The comparison of tokenizers: counted by hand on small texts, the notes' share of the embedding, table and picture."""
import pytest

from nanollm import tokenizer as T
from nanollm.config import UserError
from nanollm.corpus import compare as C
from nanollm.corpus.bpe import train_bpe

ZH = ["清晨的集市上，卖菜的人把白菜和萝卜摆成一排。", "老人坐在桥边，看着河水慢慢地流过村庄。", "孩子们跑过田野，风筝在天上越飞越高。"]
EN = ["The baker opened his shop before sunrise and swept the floor.", "A letter came from the coast, with sand between its pages.",
      "They counted 365 lamps along the river, one for every day."]
TEXTS = [f"{a} {i}" for i in range(40) for a in ZH + EN]


def test_the_embedding_of_the_notes_is_72_percent_of_the_model():
    """64,793 x 512 for the input and again for the output, of 91.65 million; with 6,400 ids it is a fifth; tied, a half of both."""
    embedding, total = C.parameters(64_793, dim=512, n_layers=8, hidden_dim=1376, tied=False)
    assert (embedding, total) == (66_348_032, 91_653_632) and round(embedding / total, 2) == 0.72
    small, of = C.parameters(6400, dim=512, n_layers=8, hidden_dim=1376, tied=False)
    assert round(small / of, 2) == 0.21
    assert C.parameters(6400, dim=512, n_layers=8, hidden_dim=1376, tied=True)[0] == small // 2


def test_what_a_token_carries_is_counted():
    """Bytes alone: one byte a token, a third of a Chinese character, half of the tokens no UTF-8. Characters: one each."""
    plain, char = T.bpe_tokenizer([], T.pattern_for(320)), T.char_tokenizer("".join(EN))
    rows = C.compare({"bytes": plain, "char": char}, {"en": EN, "zh": ZH})
    assert rows[0]["zh"] == {"bytes_per_token": 1.0, "chars_per_token": pytest.approx(1 / 3)} and rows[0]["en"]["chars_per_token"] == 1.0
    assert rows[0]["partial"] == 0.5 and rows[0]["lossless"] == 1.0 and rows[0]["vocab_size"] == 320
    assert rows[1]["en"] == {"bytes_per_token": 1.0, "chars_per_token": 1.0} and rows[1]["partial"] == 0
    assert rows[1]["zh"]["chars_per_token"] == 1.0 and rows[1]["lossless"] == 0.5            # no Chinese sentence comes back
    assert all(row["encode_mb_s"] > 0 and row["embedding"] == row["vocab_size"] * 1024 for row in rows)
    with pytest.raises(UserError, match="no text to compare"):
        C.compare({"bytes": plain}, {"en": []})


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one():
    """our_sizes trains once a pattern; each of its tokenizers is what training for that size alone gives."""
    sizes = C.our_sizes(TEXTS, [300, 400, 10_000])
    assert [*sizes] == ["bpe 300", "bpe 400", "bpe 10,000"]
    for size, tok in zip((300, 400, 10_000), sizes.values()):
        alone = T.bpe_tokenizer(train_bpe(TEXTS, size, T.pattern_for(size), say=None), T.pattern_for(size))
        assert tok.hash == alone.hash
    rows = C.compare(sizes, {"en": EN})
    assert [r["en"]["bytes_per_token"] for r in rows] == sorted(r["en"]["bytes_per_token"] for r in rows)


def test_a_text_and_its_copies_are_on_one_side():
    """Learned from or measured on, never both; about a tenth is measured on, whatever the order."""
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 5)]
    learn, held = C.split(lambda: iter(texts * 2))
    assert not set(learn) & set(held) and set(learn) | set(held) == set(texts)
    assert 0.05 < len(held) / len(texts) / 2 < 0.15
    assert [sorted(part) for part in C.split(lambda: reversed(texts * 2))] == [sorted(learn), sorted(held)]
    assert {k: len(v) for k, v in C.by_language(ZH + EN[:2]).items()} == {"en": 2, "zh": 3}


def test_the_table_and_the_picture_show_every_tokenizer(tmp_path):
    """One line each, as wide as the head; a PNG."""
    toks = C.our_sizes(TEXTS, [300, 400]) | {"char": T.char_tokenizer("".join(TEXTS))}
    rows = C.compare(toks, C.by_language(ZH + EN))
    lines = C.table(rows).splitlines()
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1
    assert lines[0].count("a token") == 2 and lines[2].startswith("| bpe 300 | 320 |") and "100.0%" in lines[4]
    C.plot(rows, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
