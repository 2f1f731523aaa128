r"""Text to ids and back, and conversations to ids.

Five kinds stand behind one interface: our own byte-level BPE ("bpe"), a character table ("char", the baseline that
has an unknown character), and three foreign ones: SentencePiece .model, byte-level BPE in a Hugging Face
tokenizer.json, and .tiktoken ranks.

The ids of every kind:  0 .. n-1 what text is made of  |  <|endoftext|> <|im_start|> <|im_end|> <|pad|>  |
<|reserved_k|> up to a multiple of 64 (matrix sizes that hardware likes, and room for later tokens).
`encode` never yields one of the control tokens, whatever the text says: only `render` and the packer insert them, so a
user who types "<|im_end|>" cannot forge a turn. PAD is not EOS: masking the padding must not mask the order to stop.
Role words stay plain text: as control tokens they would vanish from every sentence about an operating system.
"""
import base64
import codecs
import hashlib
import json
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import regex          # comes with tiktoken; Python's own `re` knows no \p{Han}
import sentencepiece
import tiktoken

from nanollm.config import UserError

FORMAT, VERSION = "nanollm-tokenizer", 1
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
MULTIPLE = 64

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                r"|\s*[\r\n]|\s+(?!\S)|\s+")


def pattern_for(vocab_size, han_run=16):
    """The pre-tokenizer: a regex that cuts text into pieces; BPE never merges across two pieces.

    GPT-4's, with a branch of its own for Han characters, at most han_run of them (Chinese writes no blanks, so a whole clause would be
    one piece and punctuation would stick to it; 1 is Chinese by character) and every repetition bounded: pieces are short whatever the text, so
    encoding takes linear time and no engine runs out of stack on a million blanks. Digits stand alone in a small
    vocabulary and by two in a large one, else numbers eat it. The same string works in Python's `regex`, tiktoken's
    fancy-regex and Oniguruma (Hugging Face): hence no (?i), no `$` and no possessive braces, which differ. (Each engine
    has its own Unicode tables, so characters younger than the oldest of them may be cut differently.)
    """
    digits = r"\p{N}" if vocab_size <= 8192 else r"\p{N}{1,2}"
    return (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"                 # 's 'll …
            r"|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L}){1,32}"              # a word, with the blank before it
            rf"|\p{{Han}}{{1,{han_run}}}|" + digits +
            r"| ?[^\s\p{L}\p{N}]{1,32}[\r\n]{0,8}"                        # punctuation, with the line end after it
            r"|\s{0,31}[\r\n]|\s{1,32}(?!\S)|\s{1,32}")                   # the last blank is left to the next word


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
    while len(text) > limit:
        cuts = [m.end() for m in regex.finditer(r"\S\n(?=\S)", text, endpos=limit)]
        yield text[:cuts[-1] if cuts else limit]
        text = text[cuts[-1] if cuts else limit:]
    yield text


# ---- the kinds: each builder returns (the bytes of each id, {control token it brings along: id}, encode) -------------

def build_bpe(spec, raw):
    """Ids 0..255 are the bytes, 256 + i is the i-th merge. tiktoken encodes: of the pairs in a piece whose joined bytes
    are a token it joins the smallest id first, which is the order of training."""
    pieces = [bytes([b]) for b in range(256)]
    for left, right in spec["merges"]:
        if not 0 <= min(left, right) <= max(left, right) < len(pieces):
            raise ValueError(f"token {len(pieces)} joins tokens that do not exist yet")
        pieces.append(pieces[left] + pieces[right])
    ranks = {piece: i for i, piece in enumerate(pieces)}
    return pieces, {}, tiktoken.Encoding("bpe", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                         special_tokens={}).encode_ordinary


def build_tiktoken(spec, raw):
    """Lines of `base64 rank`. The file does not name its pattern; `load` knows it by the number of ranks."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())}
    return build_foreign(ranks, spec["pattern"], {}, {})


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
                        f"model {model.get('type')!r} and pre-tokenizer {steps[-1].get('type')!r}")
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


def build_sentencepiece(spec, raw):
    """A SentencePiece model as it was trained: its normalisation may lose something (full-width forms, twin blanks)."""
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(raw)

    def piece(i):
        if sp.IsByte(i):                                               # "<0x0A>"
            return bytes([int(sp.IdToPiece(i)[3:5], 16)])
        text = "\ufffd" if sp.IsUnknown(i) else "" if sp.IsControl(i) else sp.IdToPiece(i).replace("\u2581", " ")
        return text.encode("utf-8")

    # only "control" pieces are safe to take over: user-defined ones are matched in plain text
    known = {sp.IdToPiece(i): i for i in range(sp.GetPieceSize()) if sp.IsControl(i)}
    return [piece(i) for i in range(sp.GetPieceSize())], known, lambda text: sp.EncodeAsIds(no_surrogates(text))


def build_char(spec, raw):
    """One id a character. A character not seen in training becomes U+FFFD and is lost: the baseline's weakness."""
    ids = {c: i for i, c in enumerate(spec["characters"])}
    unknown = ids["\ufffd"]
    return [c.encode("utf-8") for c in ids], {}, lambda text: [ids.get(c, unknown) for c in text]


BUILD = {"bpe": build_bpe, "char": build_char, "sentencepiece": build_sentencepiece, "hf": build_hf,
         "tiktoken": build_tiktoken}


class Tokenizer:
    """`spec` is the JSON that is saved, `raw` a foreign file's bytes; training and loading both come through here."""

    def __init__(self, spec, raw=b""):
        self.spec, self.raw, self.kind = spec, raw, spec["kind"]
        self.pieces, known, self.encode = BUILD[self.kind](spec, raw)
        self.control = dict(known)                                     # name -> id of all that never comes from text
        size = len(self.pieces)
        for name in [name for name in CONTROL if name not in known]:
            self.control[name], size = size, size + 1
        self.vocab_size = -(-size // MULTIPLE) * MULTIPLE
        self.control |= {f"<|reserved_{k}|>": size + k for k in range(self.vocab_size - size)}
        self.pieces += [b""] * (self.vocab_size - len(self.pieces))
        self.eos_id, self.im_start_id, self.im_end_id, self.pad_id = (self.control[name] for name in CONTROL)
        self.stop_ids = (self.eos_id, self.im_end_id)                  # a document's end and a turn's end
        self.hash = hashlib.sha256(json.dumps(spec, sort_keys=True).encode("utf-8") + raw).hexdigest()
        self.merge_ids = {tuple(pair): 256 + i for i, pair in enumerate(spec.get("merges", []))}
        # SentencePiece models usually put a blank before the text; decoding takes it off again
        self.added_blank = self.kind == "sentencepiece" and self.token_bytes(self.encode("a")[0]).startswith(b" ")

    def __reduce__(self):                                              # so that worker processes can receive it
        return Tokenizer, (self.spec, self.raw)

    def encode_batch(self, texts):
        """A list of texts to a list of lists of ids; on several threads, since tiktoken releases Python's lock."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.encode, texts))

    def token_bytes(self, i):
        """The bytes an id stands for, perhaps a part of a character; b"" for control tokens."""
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}")
        return self.pieces[i]

    def decode(self, ids):
        """ids -> str. Control tokens are omitted, bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.added_blank else text

    def encode_plain(self, text):
        """BPE as in the textbook (Sennrich 2016, on bytes): within each piece merge the pair that was learned first,
        until no adjacent pair is a merge. Equal to `encode`, about ten times slower."""
        if self.kind != "bpe":
            raise ValueError(f"encode_plain shows our own BPE, this tokenizer is {self.kind!r}")
        out = []
        for piece in regex.findall(self.spec["pattern"], no_surrogates(text)):
            ids = list(piece.encode("utf-8"))
            while len(ids) > 1:
                pair = min(zip(ids, ids[1:]), key=lambda p: self.merge_ids.get(p, 1 << 30))
                if pair not in self.merge_ids:
                    break
                ids = merge(ids, pair, self.merge_ids[pair])
            out += ids
        return out

    def save(self, directory):
        """Write a self-contained directory: tokenizer.json (ours), vocab.txt for people, the foreign file if any."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        head = {"format": FORMAT, "version": VERSION, "hash": self.hash, "vocab_size": self.vocab_size,
                "control": {name: self.control[name] for name in CONTROL}}
        (directory / "tokenizer.json").write_text(json.dumps(head | {"spec": self.spec}, ensure_ascii=False),
                                                  encoding="utf-8")
        if self.raw:
            (directory / Path(self.spec["file"]).name).write_bytes(self.raw)
        (directory / "vocab.txt").write_text("\n".join(vocabulary(self)) + "\n", encoding="utf-8")


def merge(ids, pair, new):
    """Replace each `pair` in the list `ids` by `new`, from left to right: aaa becomes (aa) a."""
    out, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == pair
        out.append(new if found else ids[i])
        i += 1 + found
    return out


def bpe_tokenizer(merges, pattern):
    """Our own kind from what corpus.bpe.train_bpe returns."""
    return Tokenizer({"kind": "bpe", "pattern": pattern, "merges": [list(pair) for pair in merges]})


def char_tokenizer(characters):
    """The baseline kind from what corpus.bpe.train_char returns."""
    return Tokenizer({"kind": "char", "characters": "".join(sorted(set(characters) | {"\ufffd"}))})


def load(path):
    """The tokenizer in a directory (ours, or a Hugging Face one), or in a .model, .tiktoken or tokenizer.json file.
    UserError if there is none or it is damaged."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no tokenizer here; name a directory with a tokenizer.json, or a .model, .tiktoken "
                        "or .json file")
    raw, hash = file.read_bytes(), None
    try:
        if file.suffix == ".model":
            spec = {"kind": "sentencepiece", "file": "sentencepiece.model"}
        elif file.suffix == ".tiktoken":
            known = {151643: QWEN_PATTERN, 50256: GPT2_PATTERN}        # else GPT-4's, the most common
            spec = {"kind": "tiktoken", "file": "ranks.tiktoken",
                    "pattern": known.get(len(raw.splitlines()), GPT4_PATTERN)}
        else:
            data = json.loads(raw)
            if data.get("format") == FORMAT:
                if data["version"] != VERSION:
                    raise UserError(f"tokenizer version {data['version']}; this program reads {VERSION}, so update it")
                spec, hash = data["spec"], data["hash"]
                raw = (file.parent / Path(spec["file"]).name).read_bytes() if "file" in spec else b""
            else:
                spec = {"kind": "hf", "file": "hf_tokenizer.json"}
        tok = Tokenizer(spec, raw)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OSError) as e:
        raise UserError(f"{file}: not a whole tokenizer ({type(e).__name__}: {str(e)[:120]})") from None
    if hash not in (None, tok.hash):
        raise UserError(f"{file}: its content does not match its hash; it was edited or cut, restore it or train again")
    return tok


# ---- conversations ---------------------------------------------------------------------------------------------------

def render(tok, messages, add_generation_prompt=False):
    """Messages [{"role", "content"[, "train": 0|1]}] -> (ids, mask), in ChatML:
    <|im_start|>role\\ncontent<|im_end|>\\n a message, and <|im_start|>assistant\\n where the model is to go on.

    mask[i] is 1 iff ids[i] is content of an assistant message (unless its "train" is 0) or the <|im_end|> closing it:
    the model learns what to say and when to stop, never the questions or the headers. There is no default system
    prompt: what is not in `messages` is not in the ids. Each segment is encoded alone, as at inference, where the
    answer follows a prompt that is tokenised already.
    """
    ids, mask = [], []

    def add(segment, train):
        ids.extend(segment)
        mask.extend([int(train)] * len(segment))

    for message in messages:
        train = message["role"] == "assistant" and message.get("train", 1)
        add([tok.im_start_id, *tok.encode(message["role"] + "\n")], False)
        content = message["content"]                                       # text, or ids that were cut to fit already
        add([*(content if isinstance(content, list) else tok.encode(content)), tok.im_end_id], train)
        add(tok.encode("\n"), False)
    if add_generation_prompt:
        add([tok.im_start_id, *tok.encode("assistant\n")], False)
    return ids, mask


# The same template for Hugging Face. The line end is an expression, since its Jinja drops one after a block tag.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class StreamDecoder:
    """Ids one at a time to text one whole character at a time: a Chinese character may span three tokens."""

    def __init__(self, tok):
        self.tok, self.utf8 = tok, codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.strip = tok.added_blank

    def feed(self, i):
        text = self.utf8.decode(self.tok.token_bytes(i))
        if text and self.strip:
            text, self.strip = text.removeprefix(" "), False
        return text

    def flush(self):
        return self.utf8.decode(b"", final=True)


# ---- looking at a tokenizer, and handing it on -----------------------------------------------------------------------

def compression(tok, texts):
    """How much text a token carries; never compare a loss per token across tokenizers without it."""
    texts = list(texts)
    tokens = max(1, sum(map(len, tok.encode_batch(texts))))
    return {"bytes_per_token": sum(len(no_surrogates(t).encode("utf-8")) for t in texts) / tokens,
            "chars_per_token": sum(map(len, texts)) / tokens}


def language(text):
    """"zh" if at least a third of its letters are Han characters, else "en": enough to split a report by script."""
    letters = len(regex.findall(r"\p{L}", text))
    return "zh" if letters and len(regex.findall(r"\p{Han}", text)) * 3 >= letters else "en"


def vocabulary(tok):
    """Lines for people: id, what it stands for, and for a merge the two tokens it was made of."""
    def show(i):
        text = tok.pieces[i].decode("utf-8", errors="replace")
        return repr(text if "\ufffd" not in text else tok.pieces[i])

    names = {i: name for name, i in tok.control.items()}
    parents = {new: pair for pair, new in tok.merge_ids.items()}
    for i in range(tok.vocab_size):
        made_of = " = " + " + ".join(show(p) for p in parents[i]) if i in parents else ""
        yield f"{i}\t{names.get(i) or show(i)}{made_of}"


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
