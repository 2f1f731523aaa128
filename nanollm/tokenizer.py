r"""Text to ids and back, and conversations to ids.

Six kinds stand behind one interface: our own byte-level BPE ("bpe"), a character table ("char", the baseline that
has an unknown character), WordPiece ("wordpiece", BERT's), and three foreign ones (`foreign_tokenizers`): SentencePiece
.model, byte-level BPE in a Hugging Face tokenizer.json, and .tiktoken ranks.

The ids of every kind:  0 .. n-1 what text is made of  |  <|endoftext|> <|im_start|> <|im_end|> <|pad|>  |
<|reserved_k|> up to a multiple of 64 (matrix sizes that hardware likes, and room for later tokens).
`encode` never yields one of the control tokens, whatever the text says: only `render` and the packer insert them, so a
user who types "<|im_end|>" cannot forge a turn. PAD is not EOS: masking the padding must not mask the order to stop.
Role words stay plain text: as control tokens they would vanish from every sentence about an operating system.
"""
import codecs
import hashlib
import json
from pathlib import Path

import regex          # comes with tiktoken; Python's own `re` knows no \p{Han}
import tiktoken

from nanollm.config import UserError
from nanollm.foreign_tokenizers import CHAT_TEMPLATE, chat_template  # noqa: F401 (written there, looked for here)
from nanollm.foreign_tokenizers import build_hf, build_sentencepiece, build_tiktoken, no_surrogates, sentencepiece_spec, tiktoken_spec

FORMAT, VERSION = "nanollm-tokenizer", 1
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
TEMPLATES = ("chatml", "bos", "raw")                                 # how a conversation becomes ids: `frame` below
MULTIPLE = 64
UNKNOWN, CONTINUED = "[UNK]", "##"                                   # WordPiece's, as BERT writes them


def pattern_for(vocab_size, han_run=16):
    """The pre-tokenizer: a regex (str) that cuts text into pieces; BPE never merges across two pieces. GPT-4's, but:

    - Han characters have a branch of their own, at most han_run of them: Chinese writes no blanks, so a whole clause would
      be one piece and punctuation would stick to it. 1 is Chinese by character.
    - Every repetition is bounded, so pieces are short: linear time, and no engine runs out of stack on a million blanks.
    - Digits stand alone up to a vocabulary of 8,192 and by two above, else numbers eat it.
    - No (?i), `$` or possessive braces: the same string works in `regex`, tiktoken's fancy-regex and Oniguruma (Hugging
      Face). Characters younger than the oldest of their Unicode tables may still be cut differently.
    """
    digits = r"\p{N}" if vocab_size <= 8192 else r"\p{N}{1,2}"
    return (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"                 # 's 'll …
            r"|[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})\p{L}){1,32}"              # a word, with the blank before it
            rf"|\p{{Han}}{{1,{han_run}}}|" + digits +
            r"| ?[^\s\p{L}\p{N}]{1,32}[\r\n]{0,8}"                        # punctuation, with the line end after it
            r"|\s{0,31}[\r\n]|\s{1,32}(?!\S)|\s{1,32}")                   # the last blank is left to the next word


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


def build_char(spec, raw):
    """One id a character. A character not seen in training becomes U+FFFD and is lost: the baseline's weakness."""
    ids = {c: i for i, c in enumerate(spec["characters"])}
    unknown = ids["\ufffd"]
    return [c.encode("utf-8") for c in ids], {}, lambda text: [ids.get(c, unknown) for c in text]


def build_wordpiece(spec, raw):
    """WordPiece (Schuster & Nakajima 2012, as in BERT): a word is cut greedily into the longest pieces of the
    vocabulary; a piece that continues a word is written ##piece. A word that cannot be cut is lost as a whole, [UNK].

    Words are the pieces of our own pre-tokenizer, blanks included, so nothing else is lost (BERT drops the blanks).
    """
    ids, words = {piece: i for i, piece in enumerate(spec["pieces"])}, regex.compile(spec["pattern"])
    text_of = {UNKNOWN: "\ufffd"}
    return ([text_of.get(piece, piece.removeprefix(CONTINUED)).encode("utf-8") for piece in ids], {},
            lambda text: [i for word in words.findall(no_surrogates(text)) for i in longest_pieces(word, ids)])


def longest_pieces(word, ids):
    """The word's ids, from left to right always the longest piece that is in `ids`."""
    out, start = [], 0
    while start < len(word):
        mark = CONTINUED if start else ""
        end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in ids), None)
        if end is None:
            return [ids[UNKNOWN]]
        out.append(ids[mark + word[start:end]])
        start = end
    return out


BUILD = {"bpe": build_bpe, "char": build_char, "wordpiece": build_wordpiece, "sentencepiece": build_sentencepiece,
         "hf": build_hf, "tiktoken": build_tiktoken}


class Tokenizer:
    """`spec` is the JSON that is saved, `raw` a foreign file's bytes; training and loading both come through here."""

    def __init__(self, spec, raw=b""):
        self.spec, self.raw, self.kind = spec, raw, spec["kind"]
        self.template = "chatml"                                       # travels with the tokenizer and is no part of its hash
        self.pieces, known, self.encode = BUILD[self.kind](spec, raw)
        self.control = dict(known)                                     # name -> id of all that never comes from text
        size = len(self.pieces)
        for name in [name for name in CONTROL if name not in known]:
            self.control[name], size = size, size + 1
        self.vocab_size = max(-(-size // MULTIPLE) * MULTIPLE, spec.get("vocab_size", 0))         # an imported model may have more rows
        self.control |= {f"<|reserved_{k}|>": size + k for k in range(self.vocab_size - size)}
        self.pieces += [b""] * (self.vocab_size - len(self.pieces))
        self.eos_id, self.im_start_id, self.im_end_id, self.pad_id = (self.control[name] for name in CONTROL)
        self.stop_ids = (self.eos_id, self.im_end_id)                  # a document's end and a turn's end
        self.hash = hashlib.sha256(json.dumps(spec, sort_keys=True).encode("utf-8") + raw).hexdigest()
        self.merge_ids = {tuple(pair): 256 + i for i, pair in enumerate(spec.get("merges", []))}
        # SentencePiece models usually put a blank before the text; decoding takes it off again
        self.added_blank = self.kind == "sentencepiece" and self.token_bytes(self.encode("a")[0]).startswith(b" ")

    def __reduce__(self):                                              # so that worker processes can receive it
        return Tokenizer, (self.spec, self.raw), {"template": self.template}

    @property
    def end_id(self):
        """The token that closes an assistant's turn: the order to stop."""
        return self.im_end_id if self.template == "chatml" else self.eos_id

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
                "template": self.template, "control": {name: self.control[name] for name in CONTROL}}
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


def wordpiece_tokenizer(pieces, pattern):
    """WordPiece from what corpus.wordpiece.train_wordpiece returns."""
    return Tokenizer({"kind": "wordpiece", "pattern": pattern, "pieces": list(pieces)})


def sentencepiece_tokenizer(model):
    """A SentencePiece model of our own from what corpus.train_tokenizer.train_sentencepiece returns, bytes."""
    return Tokenizer({"kind": "sentencepiece", "file": "sentencepiece.model", "spell_underline": True}, model)


def load(path):
    """The tokenizer in a directory (ours, or a Hugging Face one), or in a .model, .tiktoken or tokenizer.json file.
    UserError if there is none or it is damaged."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: no tokenizer here; name a directory with a tokenizer.json, or a .model, .tiktoken "
                        "or .json file")
    raw, hash, template = file.read_bytes(), None, "chatml"
    try:
        if file.suffix == ".model":
            spec = sentencepiece_spec(raw)
        elif file.suffix == ".tiktoken":
            spec = tiktoken_spec(file, raw)
        else:
            data = json.loads(raw)
            if data.get("format") == FORMAT:
                if data["version"] != VERSION:
                    raise UserError(f"tokenizer version {data['version']}; this program reads {VERSION}, so update it")
                spec, hash, template = data["spec"], data["hash"], data.get("template", "chatml")
                if template not in TEMPLATES:
                    raise UserError(f"chat template {template!r} is unknown here; update the program")
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
    tok.template = template
    return tok


# ---- conversations ---------------------------------------------------------------------------------------------------

def frame(tok, role):
    """(ids in front, ids behind) of a message's content in the tokenizer's template; the first one behind an answer is learnt.

    chatml   <|im_start|>role\\ncontent<|im_end|>\\n            the default
    bos      question<|im_start|>answer<|endoftext|>           baby-llama2-chinese's <bos> and <eos>: one mark between, one behind
    raw      question answer<|endoftext|>                      plain completion, nothing between
    """
    if tok.template == "chatml":
        return [tok.im_start_id, *tok.encode(role + "\n")], [tok.im_end_id, *tok.encode("\n")]
    if role == "assistant":
        return [tok.im_start_id] * (tok.template == "bos"), [tok.eos_id]
    return [], tok.encode("\n") if role == "system" else []


def render(tok, messages, add_generation_prompt=False):
    """Messages [{"role", "content"[, "train": 0|1]}] -> (ids, mask), each message in its `frame`; with add_generation_prompt
    also what stands in front of the answer that the model is to give.

    mask[i] is 1 iff ids[i] is content of an assistant message (unless its "train" is 0) or the token closing it:
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
        front, behind = frame(tok, message["role"])
        content = message["content"]                                       # text, or ids that were cut to fit already
        add(front, False)
        add([*(content if isinstance(content, list) else tok.encode(content)), *behind[:1]], train)
        add(behind[1:], False)
    if add_generation_prompt:
        add(frame(tok, "assistant")[0], False)
    return ids, mask


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


# ---- looking at a tokenizer ------------------------------------------------------------------------------------------

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
