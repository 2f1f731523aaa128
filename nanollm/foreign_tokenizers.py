r"""Tokenizers in other people's formats: reading them for `tokenizer.load`, and writing ours in them.

    format                         read                     write
    Hugging Face tokenizer.json    build_hf                 to_hf_json, hf_files
    vocab.json + merges.txt        (tokenizer.json has it)  vocab_and_merges
    tiktoken ranks                 build_tiktoken           tiktoken_files, to_hf_json
    SentencePiece .model           build_sentencepiece      is its own file already; the BPE ones: to_hf_json

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
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# digits cut off one by one, then GPT-2's pattern on what lies between; \s+ may end before a digit, too
SMOLLM_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
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


def hf_pattern(data):
    """The regex by which a Hugging Face tokenizer.json (a dict) cuts text; UserError if it is not byte-level BPE, or cuts otherwise."""
    model, steps = data["model"], data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if model.get("type") != "BPE" or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise UserError("only byte-level BPE without a prefix blank can be read from a tokenizer.json, this one has "
                        f"{model.get('type')!r} and pre-tokenizer {steps[-1].get('type')!r}")
    split, own_regex = steps[0], steps[-1].get("use_regex", True)
    if len(steps) == 1 and own_regex:
        return GPT2_PATTERN
    if len(steps) == 2 and own_regex and split["type"] == "Digits" and split.get("individual_digits"):
        return SMOLLM_PATTERN
    if (len(steps) == 2 and not own_regex and split["type"] == "Split" and "Regex" in split["pattern"]
            and split["behavior"] == "Isolated" and not split.get("invert")):
        return split["pattern"]["Regex"]
    raise UserError(f"its pre-tokenizer {[s.get('type') for s in steps]} is not one that tiktoken can follow")


def build_hf(spec, raw):
    """Byte-level BPE from a Hugging Face tokenizer.json, with GPT-2's pattern or one of its own. Its added tokens count
    as control tokens: they do not come from text here."""
    data = json.loads(raw)
    model, pattern = data["model"], hf_pattern(data)
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UserError(f"its normalizer {normalizer!r} is not supported (none or NFC)")

    known = {t["content"]: t["id"] for t in data.get("added_tokens", [])}
    vocab = {token: i for token, i in model["vocab"].items() if token not in known}
    bytes_of = {i: bytes(CHAR_BYTE[c] for c in token) for token, i in vocab.items()}
    merged = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in model["merges"]]
    if merged != sorted(merged):                            # a token may be listed once for each way to make it (Llama 3)
        raise UserError("its merges are not in the order of its ids, which tiktoken needs")
    ranks = {bytes_of[i]: i for i in [*(vocab[c] for c in CHAR_BYTE), *merged]}
    if model.get("ignore_merges") and len(ranks) < len(bytes_of):
        raise UserError("it finds words in text as a whole that its merges do not make, which tiktoken cannot")
    return build_foreign(ranks, pattern, {piece: i for i, piece in bytes_of.items()}, known,
                         prepare=(lambda text: unicodedata.normalize("NFC", text)) if normalizer else str)


def chat_note(directory):
    """One sentence on how the chat template of a Hugging Face directory relates to ChatML, which is what we write. It is tried, in
    jinja's sandbox, on a chat of every role with a prompt for the next answer."""
    file, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    ours = "chats are written as ChatML here, so train it (train_sft.py) before you chat"
    try:
        template = file.read_text(encoding="utf-8") if file.exists() else json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        template = None
    if not isinstance(template, str):                        # none, or several for several uses
        return f"its tokenizer has no chat template; {ours}"
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return "its chat template was not looked at, for want of jinja2; chats are written as ChatML here"
    chat = [{"role": role, "content": f"{role} says this"} for role in ("system", "user", "assistant", "user")]

    def render(messages):
        text = regex.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)                     # a tag that only transformers has
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        return sandbox.from_string(text).render(messages=messages, add_generation_prompt=True, bos_token="<bos>", eos_token="<eos>", tools=None)

    def chatml(messages):
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    try:
        same, alone = render(chat) == chatml(chat), render(chat[1:2])
    except Exception as e:                                   # whatever the template does
        return f"its chat template could not be tried ({type(e).__name__}); {ours}"
    if not same:
        return f"its chat template is not ChatML; {ours}"
    if alone == chatml(chat[1:2]):
        return "its chat template is ChatML, as ours"
    return ("its chat template is ChatML, as ours, but begins a chat without a system message with one of its own, which we do not; pass it as such: "
            + repr(alone.removesuffix(chatml(chat[1:2]))))


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
    Hugging Face turns the text into the token, we do not; and U+2581 is a blank in SentencePiece's). UserError for kinds that have
    no such form."""
    added = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for name, i in sorted(tok.control.items(), key=lambda item: item[1])]
    if tok.kind == "hf":
        return json.loads(tok.raw) | {"added_tokens": added}
    if tok.kind == "sentencepiece":
        return sentencepiece_json(tok) | {"added_tokens": added}
    if tok.kind not in ("bpe", "tiktoken"):
        raise UserError(f"a {tok.kind!r} tokenizer has no tokenizer.json form; export a bpe, hf, tiktoken or SentencePiece one")
    names = {i: "".join(BYTE_CHAR[b] for b in piece) for i, piece in enumerate(tok.pieces) if piece}
    merges = tok.merge_ids if tok.kind == "bpe" else tiktoken_merges(tok.pieces)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tok.spec["pattern"]}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {name: i for i, name in names.items()}, "merges": [[names[a], names[b]] for a, b in merges]}}


def tiktoken_merges(pieces):
    """[(left id, right id)] in the order of the ids: the last two parts of each token when BPE goes through its own bytes."""
    ranks, merges = {piece: i for i, piece in enumerate(pieces) if piece}, []
    for i, piece in enumerate(pieces):
        parts = [bytes([b]) for b in piece]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda k: ranks.get(parts[k] + parts[k + 1], i))
            if ranks.get(parts[best] + parts[best + 1], i) >= i:
                raise UserError(f"token {i} of these ranks is made of no two others, so no tokenizer.json can hold it")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        merges += [tuple(ranks[part] for part in parts)] if len(parts) == 2 else []
    return merges


def sentencepiece_json(tok):
    """A SentencePiece BPE model as a tokenizer.json without its control tokens. Such a model joins the two neighbours whose joint
    piece has the highest score; so each way to cut a piece in two is a merge, the pieces in the order of their scores."""
    sp, probe = processor(tok.raw), "Ａ  ﬁ\u3000x "
    n = sp.GetPieceSize()
    scores = {sp.IdToPiece(i): sp.GetScore(i) for i in range(n) if not (sp.IsControl(i) or sp.IsByte(i) or sp.IsUnknown(i) or sp.IsUnused(i))}
    if any(score % 1 for score in scores.values()) or not sp.IsByte(sp.PieceToId("<0x0A>")) or tok.decode(tok.encode(probe)) != probe:
        raise UserError("this SentencePiece model has no tokenizer.json form: it must be a BPE one that changes no character and spells unknown "
                        "ones by their bytes")
    cuts = [(-score, sp.PieceToId(piece[:k]), sp.PieceToId(piece[k:]), piece[:k], piece[k:])
            for piece, score in scores.items() for k in range(1, len(piece)) if piece[:k] in scores and piece[k:] in scores]
    made = {left + right for *_, left, right in cuts}
    if strange := next((piece for piece in scores if len(piece) > 1 and piece not in made), None):
        raise UserError(f"this SentencePiece model has no tokenizer.json form: no two pieces make its {strange!r}, which it finds in text as a whole")
    steps = [{"type": "Prepend", "prepend": "\u2581"}] * tok.added_blank + [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * tok.added_blank
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": back},
        "model": {"type": "BPE", "dropout": None, "unk_token": sp.IdToPiece(sp.unk_id()), "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": {sp.IdToPiece(i): i for i in range(n)},
                  "merges": [[left, right] for *_, left, right in sorted(cuts)]}}


# The templates of `tokenizer.frame` for Hugging Face. The line end is an expression, since its Jinja drops one after a block tag.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
BOS_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>' }}"
    "{% generation %}{{ message['content'] + '<|endoftext|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% if message['role'] == 'system' %}{{ '\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}")


def chat_template(tok):
    """The tokenizer's template in Jinja, for export. SentencePiece puts a blank before each text that it is given. Hugging Face gives it
    all that stands between two control tokens at once, so there the blanks of the contents inside are written out."""
    text = {"chatml": CHAT_TEMPLATE, "bos": BOS_TEMPLATE, "raw": BOS_TEMPLATE.replace("{{ '<|im_start|>' }}", "")}[tok.template]
    if not tok.added_blank:
        return text
    inside = "" if tok.template == "chatml" else " and loop.previtem is defined and loop.previtem['role'] != 'assistant'"
    for behind in ("{% generation %}", "{% else %}")[tok.template == "bos":]:             # bos has a control token before the answer
        text = text.replace(behind + "{{ message['content']", behind + "{{ (' ' if message['content']%s else '') + message['content']" % inside)
    return text if tok.template == "chatml" else text.replace("{{ '\n' }}", "{{ (' ' if message['content'] else '') + '\n' }}")


def hf_files(tok, chat_template, max_length=None):
    """{file name: content} that `AutoTokenizer.from_pretrained` reads as our tokenizer with our chat template."""
    # a foreign file may glue on a BOS or cut and pad; we never did
    table = to_hf_json(tok) | {"post_processor": None, "truncation": None, "padding": None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>" if tok.template == "chatml" else "<|endoftext|>", "pad_token": "<|pad|>",
        "bos_token": None, "unk_token": None, "additional_special_tokens": ["<|endoftext|>", "<|im_start|>"],
        "clean_up_tokenization_spaces": False, "chat_template": chat_template}
    settings |= {"model_max_length": max_length} if max_length else {}
    files = {"tokenizer.json": json.dumps(table, indent=2, ensure_ascii=False) + "\n",
             "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "chat_template.jinja": chat_template}
    return files | ({"tokenizer.model": tok.raw} if tok.kind == "sentencepiece" else {})


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
    """Write {name: text or bytes} into `directory`, line ends as they are on every system; the names, sorted."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return sorted(files)
