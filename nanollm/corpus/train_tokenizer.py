"""One call for every kind of tokenizer that can be trained here: BPE, WordPiece, characters, SentencePiece's two."""
import io
from collections import Counter

import sentencepiece

from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.corpus.bpe import sample, train_bpe, train_char
from nanollm.corpus.wordpiece import train_wordpiece

TRAINABLE = ("bpe", "char", "wordpiece", "sp_bpe", "sp_unigram")
LINE = 1000               # characters; SentencePiece leaves out lines of more than 4,192 bytes with no more than a warning


def check(kind, vocab_size):
    """UserError for a kind or a size that no corpus can help."""
    if kind not in TRAINABLE:
        raise UserError(f"--kind {kind} is unknown; use one of {', '.join(TRAINABLE)}")
    least = {"bpe": 256 + len(tokenizers.CONTROL), "sp_bpe": 304, "sp_unigram": 304}.get(kind, 1)
    if vocab_size < least:
        raise UserError(f"--vocab_size {vocab_size} is too small for {kind}: 256 bytes and {len(tokenizers.CONTROL)} control tokens come first; 512 is a "
                        "sensible least")


def train_tokenizer(kind, texts, vocab_size, han_run=16, max_bytes=None, say=print):
    """A `Tokenizer` of `kind` learned from an iterable of texts; never more than `max_bytes` of them in memory (default:
    the trainer's own). At most `vocab_size` ids, reserved ones aside. `han_run` is for bpe: WordPiece takes Chinese by
    character, as BERT does, and SentencePiece at most 16. UserError for an unknown kind, no text, no room."""
    limit = {"max_bytes": max_bytes} if max_bytes else {}
    if kind == "bpe":
        pattern = tokenizers.pattern_for(vocab_size, han_run)
        return tokenizers.bpe_tokenizer(train_bpe(texts, vocab_size, pattern, say=say, **limit), pattern)
    if kind == "char":
        return tokenizers.char_tokenizer(train_char(texts))
    if kind == "wordpiece":
        return tokenizers.wordpiece_tokenizer(*train_wordpiece(texts, vocab_size, say=say, **limit))
    if kind in ("sp_bpe", "sp_unigram"):
        model = train_sentencepiece(texts, vocab_size, kind.removeprefix("sp_"), say=say, **limit)
        return tokenizers.sentencepiece_tokenizer(model)
    raise UserError(f"--kind {kind} is unknown; use one of {', '.join(TRAINABLE)}")


def train_sentencepiece(texts, vocab_size, algorithm, max_bytes=16 << 20, say=print):
    """A SentencePiece model (the bytes of its .model file) by `algorithm` "bpe" or "unigram".

    BPE (on characters, Sennrich et al. 2016) builds up by joining. Unigram (Kudo 2018) starts from very many
    substrings, fits their probabilities by EM and throws out what the corpus can do without; it then cuts a text in
    the most probable way. Nothing is lost: bytes for rare characters, no normalisation, all blanks kept, none added.

    SentencePiece holds its whole input in memory, hence the sample. One thread, for then twice the same is the same.
    """
    size = vocab_size - len(tokenizers.CONTROL)
    if size < 300:
        raise UserError(f"--vocab_size {vocab_size} is too small: 256 bytes and {len(tokenizers.CONTROL)} control tokens "
                        "come first; 512 is a sensible least")
    texts = list(sample(texts, max_bytes, say))
    count = Counter("".join(texts))
    # Every character of the alphabet takes an id, and Chinese has thousands: at most half of the room. A rarer one is a
    # line end to the trainer (as are U+2581, its blank, and U+2585, for which it skips the line) and bytes to the encoder.
    alphabet = {c for c, _ in count.most_common((size - 257) // 2)} - set("\u2581\u2585")
    rare = {ord(c): "\n" for c in count if c not in alphabet}
    lines = [line[i:i + LINE] for text in texts for line in text.translate(rare).split("\n") for i in range(0, len(line), LINE)]
    if not lines:
        raise UserError("the tokenizer needs text to learn from, and there was none; check the input files")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type=algorithm, vocab_size=size, hard_vocab_limit=False,
            character_coverage=1.0, byte_fallback=True, split_digits=vocab_size <= 8192,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            bos_id=-1, eos_id=-1, pad_id=-1, num_threads=1, minloglevel=2)
    except RuntimeError as e:
        raise UserError(f"SentencePiece cannot train on this text: {str(e).splitlines()[-1].strip()}") from None
    return model.getvalue()
