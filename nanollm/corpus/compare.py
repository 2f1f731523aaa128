"""Tokenizers side by side on the same text: how much a token carries, what it costs in speed and in parameters.

    rows = compare({"mine": load("out/mine/tokenizer"), "llama2": load("llama2.model")}, by_language(texts))
    print(table(rows))

A larger vocabulary makes shorter sequences and a larger embedding; where that pays is a question to the table, and in
the end to bits per byte of trained models. (A loss per token compares nothing across tokenizers.)
"""
import hashlib
import time

from nanollm.config import UserError
from nanollm.corpus.bpe import count_pieces, learn_merges, sample
from nanollm.tokenizer import CONTROL, bpe_tokenizer, language, no_surrogates, pattern_for


def split(texts, max_bytes=16 << 20, share=0.1):
    """(texts to learn from, texts to measure on) of what texts() yields, which is called twice. By a hash of the text, so
    no copy of one is in both; samples of at most `max_bytes` and `share * max_bytes`. Measured on what it learned from, a
    tokenizer would flatter itself."""
    def held_out(text):
        digest = hashlib.blake2b(no_surrogates(text).encode("utf-8"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64
    return (sample((t for t in texts() if not held_out(t)), max_bytes, say=None),
            sample((t for t in texts() if held_out(t)), int(share * max_bytes), say=None))


def by_language(texts):
    """{"en": [...], "zh": [...]}, without the languages that do not occur."""
    groups = {}
    for text in texts:
        groups.setdefault(language(text), []).append(text)
    return dict(sorted(groups.items()))


def our_sizes(texts, sizes, han_run=16):
    """{"bpe 2,048": tokenizer, ...}: our BPE with each of `sizes` ids. Merges are learned in order of use, so a smaller
    vocabulary is the beginning of a larger one; only where the pre-tokenizer changes (digits) it is learned anew."""
    if sizes and min(sizes) < 256 + len(CONTROL):
        raise UserError(f"--vocab_size {min(sizes)} is too small: 256 bytes and {len(CONTROL)} control tokens come first")
    out = {}
    for pattern in sorted({pattern_for(size, han_run) for size in sizes}):
        same = [size for size in sizes if pattern_for(size, han_run) == pattern]
        merges = learn_merges(count_pieces(texts, pattern), max(same) - 256 - len(CONTROL))
        for size in same:
            out[f"bpe {size:,}"] = bpe_tokenizer(merges[:size - 256 - len(CONTROL)], pattern)
    return dict(sorted(out.items(), key=lambda item: item[1].vocab_size))


def parameters(vocab_size, dim, n_layers, hidden_dim, tied):
    """(of the embedding and the output matrix, of the whole LLaMA). Body: per layer 4 dim^2 attention, 3 dim hidden_dim
    feed-forward, 2 dim norms; and the last norm. 64,793 x 512 untied: 66.3 of 91.65 million, 72 %."""
    embedding = vocab_size * dim * (1 if tied else 2)
    return embedding, embedding + n_layers * (4 * dim**2 + 3 * dim * hidden_dim + 2 * dim) + dim


def valid(data):
    """Whether these bytes alone are UTF-8: no half characters."""
    try:
        data.decode("utf-8")
        return True
    except UnicodeDecodeError:
        return False


def compare(tokenizers, texts, dim=512, n_layers=8, hidden_dim=1376, tied=False):
    """A row (dict) for each of {name: Tokenizer}, measured on {language: [text]}:

    vocab_size       ids, padding to a multiple of 64 included: what the embedding has to hold
    LANGUAGE         {"bytes_per_token", "chars_per_token"}, of the text that comes back (an unknown token is one U+FFFD)
    encode_mb_s      megabytes of UTF-8 a second, one thread
    partial          share of the text tokens that are not valid UTF-8 by themselves (parts of characters)
    lossless         share of the texts that come back unchanged
    embedding, embedding_share    parameters of embedding and output matrix, and their share of a LLaMA of this shape
    """
    if not any(texts.values()):
        raise UserError("there is no text to compare the tokenizers on; check the input files")
    rows = []
    for name, tok in tokenizers.items():
        row, size, seconds, same = {"name": name, "kind": tok.kind, "vocab_size": tok.vocab_size}, 0, 0.0, 0
        for lang, group in texts.items():
            start = time.perf_counter()
            ids = [tok.encode(text) for text in group]
            seconds += time.perf_counter() - start
            back, tokens = [tok.decode(i) for i in ids], max(1, sum(map(len, ids)))
            same += sum(text == no_surrogates(original) for text, original in zip(back, group))
            size += sum(len(no_surrogates(text).encode("utf-8")) for text in group)
            row[lang] = {"bytes_per_token": sum(len(text.encode("utf-8")) for text in back) / tokens,
                         "chars_per_token": sum(map(len, back)) / tokens}
        pieces = [piece for piece in tok.pieces if piece]
        embedding, total = parameters(tok.vocab_size, dim, n_layers, hidden_dim, tied)
        rows.append(row | {
            "encode_mb_s": size / 1e6 / seconds, "partial": sum(not valid(p) for p in pieces) / len(pieces),
            "lossless": same / sum(map(len, texts.values())), "embedding": embedding, "embedding_share": embedding / total})
    return rows


def languages(rows):
    return [key for key, value in rows[0].items() if isinstance(value, dict)]


def table(rows):
    """The rows as a Markdown table."""
    head = ["tokenizer", "ids", *(f"{lang}: bytes, characters a token" for lang in languages(rows)), "encode MB/s",
            "partial characters", "lossless", "embedding", "of the model"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        lines.append([r["name"], f"{r['vocab_size']:,}",
                      *(f"{r[lang]['bytes_per_token']:.2f}, {r[lang]['chars_per_token']:.2f}" for lang in languages(rows)),
                      f"{r['encode_mb_s']:.1f}", f"{r['partial']:.1%}", f"{r['lossless']:.1%}",
                      f"{r['embedding'] / 1e6:.1f} M", f"{r['embedding_share']:.0%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows, path):
    """A picture, one panel a language: bytes a token over the size of the vocabulary; those named "bpe …" (ours at
    several sizes) as a line. UserError without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('the plot needs matplotlib: pip install -e ".[plot]"') from None
    figure, axes = plt.subplots(1, len(languages(rows)), figsize=(6 * len(languages(rows)), 4.5), squeeze=False)
    for axis, lang in zip(axes[0], languages(rows)):
        points = [(r["name"], r["vocab_size"], r[lang]["bytes_per_token"]) for r in rows]
        ours = sorted((x, y) for name, x, y in points if name.startswith("bpe "))
        axis.plot([x for x, _ in ours], [y for _, y in ours], "o-", color="tab:blue", label="our BPE")
        for k, (name, x, y) in enumerate(p for p in points if not p[0].startswith("bpe ")):
            axis.plot(x, y, "s", color="tab:orange")
            axis.annotate(name, (x, y), textcoords="offset points", xytext=(4, -10 if k % 2 else 4), fontsize=8)    # neighbours apart
        axis.set(xscale="log", title=lang, xlabel="ids", ylabel="bytes a token")
        axis.margins(x=0.2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
