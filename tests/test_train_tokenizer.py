"""WordPiece and SentencePiece behind the interface of our BPE: on five words to follow by hand, and on prose."""
import json
from collections import Counter

import pytest
import tokenizers

from nanollm import tokenizer as T
from nanollm.config import UserError
from nanollm.corpus.bpe import learn_merges
from nanollm.corpus.train_tokenizer import TRAINABLE, train_tokenizer
from nanollm.corpus.wordpiece import learn_pieces
from test_tokenizer import PROSE, words

FIVE = {"sun": 6, "sung": 3, "run": 9, "rung": 2, "zip": 4}               # the five words of docs/tokenizer.md
TEXTS = PROSE * 40


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(kind, TEXTS, 700, say=None) for kind in TRAINABLE}


# ---- five words ------------------------------------------------------------------------------------------------------

def test_bpe_joins_what_occurs_most():
    """un occurs 6 + 3 + 9 + 2 = 20 times, then run 11 (r + un), then sun 9 (s + un), ng being gone by then."""
    pieces = [bytes([b]) for b in range(256)]
    for a, b in learn_merges(FIVE, 3):
        pieces.append(pieces[a] + pieces[b])
    assert pieces[256:] == [b"un", b"run", b"sun"]


def test_wordpiece_joins_what_rarely_occurs_apart():
    """z, i and p occur four times each and only together: i + p and z + ip score 4 / (4 · 4) = 1/4. u + n occurs five
    times as often, but its score is 20 / (20 · 20) = 1/20."""
    assert learn_pieces(FIVE, 100, min_count=1)[9:12] == ["##ip", "zip", "##ng"]
    assert learn_pieces(FIVE, 100, min_count=1)[:9] == ["[UNK]", "##n", "##u", "r", "s", "##g", "##i", "##p", "z"]


def test_the_score_is_the_documented_one():
    """Each joined piece is the pair with the largest count(ab) / (count(a) count(b)), by a recount after every merge."""
    counts = Counter(word for text in PROSE for word in text.split() for _ in range(len(word)))
    pieces = learn_pieces(counts, 200, min_count=4)
    start = 1 + min(len({s for word in counts for s in [word[0], *("##" + c for c in word[1:])]}), 100)
    split = {word: [word[0], *("##" + c for c in word[1:])] for word in counts}
    split = {word: symbols for word, symbols in split.items() if set(symbols) <= set(pieces)}
    joined = []
    while start + len(joined) < len(pieces):
        single, pairs = Counter(), Counter()
        for word, symbols in split.items():
            single.update({s: counts[word] * n for s, n in Counter(symbols).items()})
            pairs.update({p: counts[word] * n for p, n in Counter(zip(symbols, symbols[1:])).items()})
        score = {p: n / (single[p[0]] * single[p[1]]) for p, n in pairs.items() if n >= 4}
        a, b = min(score, key=lambda p: (-score[p], p))
        if (new := a + b.removeprefix("##")) not in joined:
            joined.append(new)
        split = {word: T.merge(symbols, (a, b), new) for word, symbols in split.items()}
    assert len(joined) > 20 and pieces[start:] == joined


def test_what_hugging_face_calls_a_wordpiece_trainer_is_bpe():
    """Its vocabulary is that of its BPE trainer with the mark ## switched on, not that of the score."""
    def vocabulary(model, trainer):
        theirs = tokenizers.Tokenizer(model)
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        theirs.train_from_iterator([" ".join([word] * n) for word, n in FIVE.items()], trainer)
        return {piece for piece in theirs.get_vocab() if len(piece.removeprefix("##")) > 1}

    settings = dict(vocab_size=17, show_progress=False, continuing_subword_prefix="##")
    wordpiece = vocabulary(tokenizers.models.WordPiece(unk_token="[UNK]"), tokenizers.trainers.WordPieceTrainer(**settings))
    bpe = vocabulary(tokenizers.models.BPE(continuing_subword_prefix="##"), tokenizers.trainers.BpeTrainer(**settings))
    assert wordpiece == bpe and "##un" in wordpiece and "zip" not in wordpiece


def test_unigram_keeps_what_makes_the_corpus_probable(trained):
    """SentencePiece is a library, its models differ: the same corpus and size, two vocabularies and two ways to cut."""
    bpe, unigram = trained["sp_bpe"], trained["sp_unigram"]
    assert bpe.kind == unigram.kind == "sentencepiece" and set(bpe.pieces) != set(unigram.pieces)
    assert any(bpe.encode(t) != unigram.encode(t) for t in PROSE)


# ---- WordPiece -------------------------------------------------------------------------------------------------------

def test_wordpiece_cuts_as_hugging_faces_encoder(trained):
    """Given the vocabulary and the words, tokenizers' WordPiece gives the same ids: greedy, the longest piece first."""
    tok = trained["wordpiece"]
    vocab = {piece: i for i, piece in enumerate(tok.spec["pieces"])}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tok.spec["pattern"]), "isolated")
    for text in [*PROSE, *words(8)]:
        assert tok.encode(text) == theirs.encode(text).ids


def test_the_longest_piece_is_greedy_not_best():
    """abcd as abc + d is impossible without ##d: the whole word is lost, though ab + cd was there."""
    ids = {piece: i for i, piece in enumerate(["[UNK]", "a", "ab", "abc", "##cd", "##c"])}
    assert T.longest_pieces("abcd", ids) == [0] and T.longest_pieces("abccd", ids) == [3, 4] and T.longest_pieces("ac", ids) == [1, 5]


def test_wordpiece_loses_words_with_unknown_characters_only(trained):
    """Blanks and ## come back, BERT's own way drops them; an unseen character takes its word with it."""
    tok = trained["wordpiece"]
    for text in [PROSE[0], "  two  blanks ", "今天 天气\n", " jump over it"]:
        assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode("She qu\u0416ick dog")) == "She\ufffd dog"
    hashes = train_tokenizer("wordpiece", ["## a ### b (## c)" * 9], 400, say=None)
    assert hashes.decode(hashes.encode("### (## b")) == "### (## b"
    assert tok.decode(tok.encode("[UNK] [SEP]")).count("[") <= 2           # nothing typed is a control token


# ---- SentencePiece ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sp_bpe", "sp_unigram"])
def test_sentencepiece_as_we_train_it_loses_nothing(trained, kind):
    """Bytes for rare characters, no normalisation, all blanks, none added, even its own mark U+2581; digits stand alone."""
    tok = trained[kind]
    for text in [*PROSE, *words(9), "", " ", " a", "\u2581", "a\u2581\u2581 b\u2581", "︰ Ａ ﬁ\r\n\t\x00", "<unk><0x0A></s>"]:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and all(0 < i < tok.vocab_size for i in ids)
        assert not set(ids) & set(tok.control.values())
    assert not any(len(piece) > 1 and piece.isdigit() for piece in tok.pieces)
    assert tok.encode("a")[0] == tok.encode(" a"[1:])[0] and not tok.added_blank


def test_a_vocabulary_too_small_for_all_characters_uses_bytes():
    """3,000 different characters and 600 ids: at most half of the room goes to characters, the rest are spelled."""
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    for kind in ("sp_bpe", "sp_unigram"):
        tok = train_tokenizer(kind, [rare, *TEXTS], 600, say=None)
        assert tok.decode(tok.encode(rare)) == rare and tok.vocab_size <= 640
        assert len(tok.encode("天气")) <= 2 < len(tok.encode(rare[2990:2992]))


# ---- all of them -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", TRAINABLE)
def test_every_kind_stands_behind_the_same_interface(trained, kind, tmp_path):
    """Saved and loaded, trained twice, control tokens, sizes: what one can do with BPE one can do with each."""
    tok = trained[kind]
    tok.save(tmp_path)
    again = train_tokenizer(kind, iter(TEXTS), 700, say=None)
    for other in (T.load(tmp_path), again):
        assert other.hash == tok.hash and [other.encode(t) for t in PROSE] == [tok.encode(t) for t in PROSE]
    assert tok.vocab_size % 64 == 0 and tok.vocab_size <= 704
    assert tok.decode(tok.encode(PROSE[1])) == PROSE[1]
    stream = T.StreamDecoder(tok)
    assert "".join(map(stream.feed, tok.encode(PROSE[1]))) + stream.flush() == PROSE[1]
    ids, mask = T.render(tok, [{"role": "user", "content": "jump"}, {"role": "assistant", "content": "over"}])
    assert ids.count(tok.im_end_id) == 2 and sum(mask) == len(tok.encode("over")) + 1
    assert len(json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["control"]) == 4


@pytest.mark.parametrize("kind, texts, vocab_size, match", [
    ("magic", TEXTS, 700, "--kind magic is unknown; use one of bpe, char"), ("wordpiece", [], 700, "needs text"), ("bpe", [], 700, "needs text"),
    ("sp_bpe", [], 700, "needs text"), ("sp_unigram", ["\n"], 700, "needs text"), ("sp_bpe", TEXTS, 280, "too small"), ("bpe", TEXTS, 100, "too small"),
    ("wordpiece", TEXTS, 4, "too small")])
def test_what_cannot_be_trained_is_refused_in_one_sentence(kind, texts, vocab_size, match):
    with pytest.raises(UserError, match=match):
        train_tokenizer(kind, texts, vocab_size, say=None)
