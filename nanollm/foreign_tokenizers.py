r"""Tokenizers in other people's formats: reading them for `tokenizer.load`, and writing ours in them.

    format                         read                     write
    Hugging Face tokenizer.json    build_hf                 to_hf_json, hf_files
    vocab.json + merges.txt        (tokenizer.json has it)  vocab_and_merges
    tiktoken ranks                 build_tiktoken           tiktoken_files
    SentencePiece .model           build_sentencepiece      is its own file already

A builder returns (the bytes of each id, {control token it brings along: id}, encode), as `tokenizer.Tokenizer` wants.
"""
import base64
import json
import unicodedata

import regex
import sentencepiece
import tiktoken

from nanollm.config import UserError

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                r"|\s*[\r\n]|\s+(?!\S)|\s+")
# ChatGLM2's five, which its tokenizer code puts behind the 64,789 pieces of its .model: 64,794 ids in all
CHATGLM_PIECES, CHATGLM_ADDED = 64_789, ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]


def byte_to_unicode():
    """GPT-2's table: byte -> a printable character (Radford 2019, encoder.py). Printable bytes stand for themselves,
    the 68 others move to U+0100 and up. Needed for Hugging Face files; its order also breaks ties in training."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {b: chr(b) for b in plain}
    for b in range(256):
        table.setdefault(b, chr(256 + len(table) - len(plain)))
    return table


BYTE_CHAR = byte_to_unicode()
CHAR_BYTE = {c: b for b, c in BYTE_CHAR.items()}


def no_surrogates(text):
    """Half characters (a lone \\ud83d from a JSON escape) have no UTF-8 form; they become U+FFFD, pairs are joined."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def passages(text, limit=200_000):
    """Cut a huge text where a line end has a visible character on both sides: every known pattern cuts there too, so
    the ids stay the same. Only a text without such a place is cut at `limit`, through a token if need be."""
    start = 0
    while len(text) - start > limit:
        cuts = [m.end() for m in regex.finditer(r"\S\n(?=\S)", text, pos=start, endpos=start + limit)]
        end = cuts[-1] if cuts else start + limit
        yield text[start:end]
        start = end
    yield text[start:]


# ---- reading ---------------------------------------------------------------------------------------------------------

def tiktoken_spec(path, raw):
    """What `build_tiktoken` needs beside the ranks in the file at `path`. Only a .json of the same name says (as
    `tiktoken_files` writes it); without one the pattern is guessed from the number of ranks, GPT-4's if unknown."""
    spec, settings = {"kind": "tiktoken", "file": "ranks.tiktoken"}, path.with_suffix(".json")
    if settings.is_file():
        known = json.loads(settings.read_bytes())
        return spec | {"pattern": known["pat_str"], "special_tokens": known["special_tokens"]}
    return spec | {"pattern": {151643: QWEN_PATTERN, 50256: GPT2_PATTERN}.get(len(raw.splitlines()), GPT4_PATTERN)}


def build_tiktoken(spec, raw):
    """Lines of `base64 rank`."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())}
    return build_foreign(ranks, spec["pattern"], {}, spec.get("special_tokens", {}))


def build_foreign(ranks, pattern, unreachable, known, prepare=str):
    """Foreign byte-level BPE. Its pattern contains an unbounded `\\s+(?!\\S)`, on which tiktoken 0.14 panics (with a
    BaseException) after about a million blanks; hence `passages`. `unreachable`: {bytes: id} only for decoding."""
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("some of the 256 bytes are missing")
    pieces = [b""] * (max([*ranks.values(), *unreachable.values(), *known.values()]) + 1)
    for piece, i in [*unreachable.items(), *ranks.items()]:
        pieces[i] = piece
    fast = tiktoken.Encoding("foreign", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return pieces, known, lambda text: [i for part in passages(prepare(text)) for i in fast.encode_ordinary(part)]


def build_hf(spec, raw):
    """Byte-level BPE from a Hugging Face tokenizer.json, with GPT-2's pattern or one of its own. Its added tokens count
    as control tokens: they do not come from text here."""
    data = json.loads(raw)
    model, steps = data["model"], data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if model.get("type") != "BPE" or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise UserError("only byte-level BPE without a prefix blank can be read from a tokenizer.json, this one has "
                        f"{model.get('type')!r} and pre-tokenizer {steps[-1].get('type')!r}")
    split, own_regex = steps[0], steps[-1].get("use_regex", True)
    if len(steps) == 1 and own_regex:
        pattern = GPT2_PATTERN
    elif (len(steps) == 2 and not own_regex and split["type"] == "Split" and "Regex" in split["pattern"]
            and split["behavior"] == "Isolated" and not split.get("invert")):
        pattern = split["pattern"]["Regex"]
    else:
        raise UserError(f"its pre-tokenizer {[s.get('type') for s in steps]} is not one that tiktoken can follow")
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UserError(f"its normalizer {normalizer!r} is not supported (none or NFC)")

    known = {t["content"]: t["id"] for t in data.get("added_tokens", [])}
    vocab = {token: i for token, i in model["vocab"].items() if token not in known}
    bytes_of = {i: bytes(CHAR_BYTE[c] for c in token) for token, i in vocab.items()}
    merged = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in model["merges"]]
    if merged != sorted(set(merged)):
        raise UserError("its merges are not in the order of its ids, which tiktoken needs")
    ranks = {bytes_of[i]: i for i in [*(vocab[c] for c in CHAR_BYTE), *merged]}
    return build_foreign(ranks, pattern, {piece: i for i, piece in bytes_of.items()}, known,
                         prepare=(lambda text: unicodedata.normalize("NFC", text)) if normalizer else str)


def processor(raw):
    """The SentencePieceProcessor of a .model's bytes."""
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(raw)
    return sp


def sentencepiece_spec(raw):
    """The spec of a foreign .model: ChatGLM2's, known by its number of pieces, gets the five ids its file lacks."""
    spec = {"kind": "sentencepiece", "file": "sentencepiece.model"}
    return spec | {"added": CHATGLM_ADDED} if processor(raw).GetPieceSize() == CHATGLM_PIECES else spec


def build_sentencepiece(spec, raw):
    """A SentencePiece model as it was trained: its normalisation may lose something (full-width forms, twin blanks).

    It writes a blank as U+2581, so a U+2581 that stands in the text comes back as a blank. The models we train
    (`spell_underline`) spell that character by its three bytes instead, and lose nothing.
    """
    sp = processor(raw)
    n = sp.GetPieceSize()

    def piece(i):
        if sp.IsByte(i):                                               # "<0x0A>"
            return bytes([int(sp.IdToPiece(i)[3:5], 16)])
        text = "\ufffd" if sp.IsUnknown(i) else "" if sp.IsControl(i) else sp.IdToPiece(i).replace("\u2581", " ")
        return text.encode("utf-8")

    def encode(text):
        first, *rest = no_surrogates(text).split("\u2581") if underline else [no_surrogates(text)]
        ids = sp.EncodeAsIds(first)
        for part in rest:
            ids += underline + sp.EncodeAsIds(part)
        return ids

    underline = [sp.PieceToId(f"<0x{b:02X}>") for b in "\u2581".encode("utf-8")] if spec.get("spell_underline") else []
    # only "control" pieces are safe to take over: user-defined ones are matched in plain text
    known = {sp.IdToPiece(i): i for i in range(n) if sp.IsControl(i)}
    known |= {name: n + k for k, name in enumerate(spec.get("added", []))}
    return [piece(i) for i in range(n)] + [b""] * len(spec.get("added", [])), known, encode


# ---- writing ---------------------------------------------------------------------------------------------------------

def to_hf_json(tok):
    """The dict of a Hugging Face tokenizer.json that gives our ids on any text without literal control tokens (there
    Hugging Face turns the text into the token, we do not). UserError for kinds that have no such form."""
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for name, i in sorted(tok.control.items(), key=lambda item: item[1])]
    if tok.kind == "hf":
        return json.loads(tok.raw) | {"added_tokens": added}
    if tok.kind != "bpe":
        raise UserError(f"a {tok.kind!r} tokenizer has no tokenizer.json form; export a bpe or hf one")
    names = ["".join(BYTE_CHAR[b] for b in piece) for piece in tok.pieces[:256 + len(tok.merge_ids)]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tok.spec["pattern"]}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {name: i for i, name in enumerate(names)},
                  "merges": [[names[a], names[b]] for a, b in tok.merge_ids]}}


def hf_files(tok, chat_template, max_length=None):
    """{file name: content} that `AutoTokenizer.from_pretrained` reads as our tokenizer with our chat template."""
    # a foreign file may glue on a BOS or cut and pad; we never did
    table = to_hf_json(tok) | {"post_processor": None, "truncation": None, "padding": None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>" if tok.template == "chatml" else "<|endoftext|>", "pad_token": "<|pad|>",
        "bos_token": None, "unk_token": None, "additional_special_tokens": ["<|endoftext|>", "<|im_start|>"],
        "clean_up_tokenization_spaces": False, "chat_template": chat_template}
    settings |= {"model_max_length": max_length} if max_length else {}
    return {"tokenizer.json": json.dumps(table, indent=2, ensure_ascii=False) + "\n",
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
            "chat_template.jinja": chat_template}


def vocab_and_merges(tok):
    """GPT-2's two files, which are all that byte-level BPE consists of, beside its pattern: vocab.json {token: id} and
    merges.txt, the pairs in the order in which they were learned, bytes in GPT-2's spelling (`byte_to_unicode`)."""
    model = to_hf_json(tok)["model"]
    lines = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {"vocab.json": json.dumps(model["vocab"], ensure_ascii=False) + "\n",
            "merges.txt": "\n".join(["#version: 0.2", *lines]) + "\n"}


def tiktoken_files(tok):
    """ranks.tiktoken, and ranks.json with what else tiktoken wants to know:
    `tiktoken.Encoding(**json.load(open("ranks.json", encoding="utf-8")), mergeable_ranks=load_tiktoken_bpe("ranks.tiktoken"))`."""
    if tok.kind != "bpe":
        raise UserError(f"a {tok.kind!r} tokenizer cannot be written as tiktoken ranks; export a bpe one")
    ranks = tok.pieces[:256 + len(tok.merge_ids)]
    settings = {"name": "nanollm", "pat_str": tok.spec["pattern"], "special_tokens": tok.control}
    return {"ranks.tiktoken": "".join(f"{base64.b64encode(piece).decode('ascii')} {i}\n" for i, piece in enumerate(ranks)),
            "ranks.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}


def export(tok, chat_template, directory):
    """Write a BPE of ours for other libraries: Hugging Face's files, vocab.json and merges.txt, tiktoken's ranks. (The other kinds
    are theirs already, or nobody else reads them.)"""
    if tok.kind == "bpe":
        write_files(directory, hf_files(tok, chat_template) | vocab_and_merges(tok) | tiktoken_files(tok))


def write_files(directory, files):
    """Write {name: text} into `directory`, line ends as they are on every system; the names, sorted."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    return sorted(files)
