"""From files to batches: token files, chat rows, preference rows, packing.

A dataset is a list-like of rows with .batch(indices) -> tensors; the sampler (sampler.py) says which rows make up
update number `step`. Both are pure functions, so the state of the data is the step number and resuming is a seek.
Loaders yield already shifted (inputs, targets): target t is the token that follows input t.
"""
import gzip
import json
import math
import os
import re
import sys
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.losses import IGNORE_INDEX
from nanollm.tokenizer import frame, render

# ----------------------------------------------------------------------------------------------------------------
# Rows and batches


def pack(lengths, size, window=65536):
    """Best-fit decreasing: put items of the given lengths into rows of at most `size` tokens -> list of lists of
    item numbers. Within each window of items (bounded work for any corpus), longest first, each into the fullest
    row that still has room: open rows are kept by free space, the free spaces that exist as bits of one integer."""
    rows = []
    for begin in range(0, len(lengths), window):
        part = np.asarray(lengths[begin : begin + window])
        open_rows, spaces = [deque() for _ in range(size + 1)], 0         # by free space, the oldest first; bit s = some row has s free
        for i in np.argsort(-part, kind="stable").tolist():
            n = int(part[i])
            fits = spaces >> n << n
            if fits:
                space = (fits & -fits).bit_length() - 1                   # the smallest space >= n
                row = open_rows[space].popleft()
                if not open_rows[space]:
                    spaces ^= 1 << space
            else:
                space, row = size, []
                rows.append(row)
            row.append(begin + i)
            open_rows[space - n].append(row)
            spaces |= 1 << (space - n)
    return rows


def collate(examples, pad_id, width=0):
    """[[(inputs, targets), …] for each row] -> inputs, targets, segments, each (B, T).

    The examples of a row are laid end to end, numbered 1, 2, … in `segments` (0 = padding), so that attention stays
    inside each. segments is None when no row holds two: plain causal attention and right padding need no mask.
    An empty list of rows gives one row of padding: zero loss, so that a rank without data still takes part.
    """
    rows = examples or [[([pad_id], [IGNORE_INDEX])]]
    T = max(width, max(sum(len(x) for x, _ in row) for row in rows))
    inputs = torch.full((len(rows), T), pad_id)
    targets = torch.full((len(rows), T), IGNORE_INDEX)
    segments = torch.zeros(len(rows), T, dtype=torch.long)
    for b, row in enumerate(rows):
        t = 0
        for s, (x, y) in enumerate(row, 1):
            inputs[b, t : t + len(x)] = torch.as_tensor(x, dtype=torch.long)
            targets[b, t : t + len(x)] = torch.as_tensor(y, dtype=torch.long)
            segments[b, t : t + len(x)] = s
            t += len(x)
    return inputs, targets, segments if max(map(len, rows)) > 1 else None


class Ahead:
    """read(step) -> the batches of an update, where a GPU does the arithmetic one update ahead in a thread and in pinned
    memory, from which a copy to the GPU waits for nobody. On the CPU, where a thread would only take a core from the
    arithmetic, it is read(step) itself."""

    def __init__(self, read, ctx):
        self.read, self.futures = read, {}
        self.pool = ThreadPoolExecutor(1) if ctx.device.type == "cuda" else None

    def pinned(self, step):
        return [tuple(t if t is None else t.pin_memory() for t in batch) for batch in self.read(step)]

    def __call__(self, step):
        if not self.pool:
            return self.read(step)
        batches = (self.futures.pop(step, None) or self.pool.submit(self.pinned, step)).result()
        self.futures = {step + 1: self.pool.submit(self.pinned, step + 1)}
        return batches


# ----------------------------------------------------------------------------------------------------------------
# Pretraining: token files


def tokenizer_of(directory):
    """The tokenizer that made the token files in `directory`. Raises UserError with the command that makes them."""
    directory = Path(directory)
    if directory.is_file():
        raise UserError(f"--data {directory} is a file; pretraining wants the directory of token files that `python prepare_data.py "
                        f"build --input {directory} --out DIR` writes (chat rows go to train_sft.py, pairs to train_dpo.py)")
    if not (directory / "tokenizer").is_dir():
        raise UserError(f"--data {directory} holds no token files; make them with `python prepare_data.py build --input YOUR_TEXT "
                        f"--out DIR --vocab_size 6400` (then --data DIR/tokens), or run `bash runs/speedrun.sh` for the demo")
    return tokenizers.load(directory / "tokenizer")


class Shards:
    """Arrays laid end to end: shards[begin:end] is a copy as int64 and may run over their borders. What stands in an array is
    moved up by its number in `add`: document ends are counted from the beginning of their shard."""

    def __init__(self, arrays, add=None):
        self.arrays, self.first, self.add = arrays, np.cumsum([0, *map(len, arrays)]), add or [0] * len(arrays)

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, where):
        begin, end, _ = where.indices(len(self))
        k, parts = int(np.searchsorted(self.first, begin, side="right")) - 1, []
        while begin < end:
            stop = min(end, int(self.first[k + 1]))
            parts.append(self.arrays[k][begin - int(self.first[k]) : stop - int(self.first[k])].astype(np.int64) + self.add[k])
            begin, k = stop, k + 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def mapped(path, dtype, n):
    """The file's n numbers, mapped into memory and not read."""
    return np.memmap(path, dtype=dtype, mode="r") if n else np.empty(0, dtype)                    # nothing cannot be mapped


def open_tokens(directory, split):
    """(the JSON as a dict, the tokens, the document ends as offsets into them; both Shards) of DIR/{split}.json and its shards,
    mapped into memory; also of version 1, whose only shard is {split}.bin. Raises UserError for whatever does not fit together."""
    directory, rebuild = Path(directory), "copy it again, or build it again with prepare_data.py"
    sidecar = directory / f"{split}.json"
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
        dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]            # an unknown name must not become a guess
        size, vocab_size, *_ = np.dtype(dtype).itemsize, meta["vocab_size"], meta["eos_id"], meta["tokenizer_hash"]
        shards = meta["shards"] if meta["version"] == 2 else [{"file": f"{split}.bin", **meta}] if meta["version"] == 1 else None
        if shards is None:
            raise UserError(f"{sidecar} has version {meta['version']}; this program reads 1 and 2, a newer one wrote it")
        shards = [(directory / s["file"], s["n_tokens"], s["n_docs"]) for s in shards]
        found = [(path.stat().st_size, path.with_suffix(".idx").stat().st_size) for path, _, _ in shards]
    except FileNotFoundError as e:
        bare = f". {split}.bin alone does not say what its bytes are: tell it with `python -m nanollm.tools.describe --data {directory}`"
        raise UserError(f"--data {directory} has no {split} token file ({Path(e.filename).name} is missing); make it with `python prepare_data.py "
                        f"build --input YOUR_TEXT --out {directory}`, or `bash runs/speedrun.sh` for the demo"
                        + (bare if (directory / f"{split}.bin").is_file() and not sidecar.exists() else "")) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{sidecar} does not describe a token file; make it again with prepare_data.py") from None
    arrays, ends = [], []
    for (path, n_tokens, n_docs), (n_bytes, idx_bytes) in zip(shards, found):
        if n_bytes != n_tokens * size:
            raise UserError(f"{path} has {n_bytes:,} bytes where {sidecar.name} promises {n_tokens * size:,}: a truncated copy; {rebuild}")
        local = mapped(path.with_suffix(".idx"), "<i8", n_docs) if idx_bytes == 8 * n_docs else None
        if local is None or local[-1:].sum() != n_tokens:
            raise UserError(f"{path.with_suffix('.idx')} does not belong to {path.name}; {rebuild}")
        tokens = mapped(path, dtype, n_tokens)
        for at in np.linspace(0, n_tokens, 8, endpoint=False, dtype=np.int64):                    # spot checks, not a pass over it
            if tokens[at : at + 1024].max(initial=0) >= vocab_size:
                raise UserError(f"{path} holds ids beyond the vocabulary of {vocab_size:,} near token {at:,}: written with another "
                                f"tokenizer or dtype than {sidecar.name} says; {rebuild}")
        arrays.append(tokens)
        ends.append(local)
    tokens = Shards(arrays)
    ends = Shards(ends, tokens.first.tolist())
    if (len(tokens), len(ends)) != (meta["n_tokens"], meta["n_docs"]):
        raise UserError(f"{sidecar}: its shards do not add up to {meta['n_tokens']:,} tokens; {rebuild}")
    return meta, tokens, ends


class TokenFile:
    """A split of a directory of token files as rows of max_seq_len tokens.

    rows="stream": the split as one long stream cut every max_seq_len tokens, over the borders of shards, so that their size
    changes nothing; every token is a target once, but for the first and a tail shorter than a row.
    rows="documents": each row begins at a document's start; whole documents are packed into rows and kept apart by
    segments, longer ones are cut. The row's first input is the <|endoftext|> that ends the document before.
    """

    def __init__(self, directory, split, max_seq_len, rows="stream", tokenizer_hash=None):
        self.directory, self.split, self.T, self.rows = Path(directory), split, max_seq_len, rows
        if rows not in ("stream", "documents"):
            raise UserError(f"--rows {rows} is unknown; use stream or documents")
        self.meta, self.tokens, self.ends = open_tokens(directory, split)
        self.eos_id, made_by = self.meta["eos_id"], self.meta["tokenizer_hash"]
        if tokenizer_hash and tokenizer_hash != made_by:
            raise UserError(f"{directory} was tokenized with another tokenizer (hash {made_by[:8]}) than the "
                            f"model's ({tokenizer_hash[:8]}); tokenize the text again with the model's tokenizer")
        name = f"the {split} split in {directory}"
        if rows == "stream":
            if len(self.tokens) < max_seq_len + 1:
                raise UserError(f"{name} has {len(self.tokens):,} tokens, less than one row of --max_seq_len {max_seq_len} (and its "
                                f"shift); use more text, a shorter --max_seq_len, or --rows documents")
            return
        ends = self.ends[:]
        starts = np.concatenate(([0], ends))[:-1]
        pieces = -(-(ends - starts) // max_seq_len)                          # pieces of each document
        offset = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.begin = np.repeat(starts, pieces) + offset * max_seq_len
        self.end = np.minimum(self.begin + max_seq_len, np.repeat(ends, pieces))
        self.bins = pack(self.end - self.begin, max_seq_len)
        if not self.bins:
            raise UserError(f"{name} holds no document; use more text or a larger --val_fraction in prepare_data.py")

    def openings(self, tokenizer, n=3, length=8):
        """The first few tokens of the first documents as text: prompts for the log when none are given."""
        ends = self.ends[:n].tolist()
        texts = [tokenizer.decode(self.tokens[i : min(i + length, end - 1)].tolist()) for i, end in zip([0, *ends], ends)]
        return [t.rstrip("\ufffd") for t in texts]                         # a cut may split a character's bytes

    def __len__(self):
        return (len(self.tokens) - 1) // self.T if self.rows == "stream" else len(self.bins)

    def piece(self, i):
        begin, end = int(self.begin[i]), int(self.end[i])
        targets = self.tokens[begin:end]
        before = self.tokens[begin - 1 : begin] if begin else [self.eos_id]
        return np.concatenate((before, targets[:-1])), targets

    def spans(self):
        """The targets of all rows as stretches of the file, in its order: arrays (begin, end, row); a row may have several."""
        if self.rows == "stream":
            row = np.arange(len(self))
            return row * self.T + 1, (row + 1) * self.T + 1, row
        row = np.empty(len(self.begin), np.int64)
        for r, items in enumerate(self.bins):
            row[items] = r
        return self.begin, self.end, row

    def examples(self, r):
        """[(inputs, targets), …] of row r."""
        if self.rows == "documents":
            return [self.piece(i) for i in self.bins[r]]
        window = self.tokens[r * self.T : r * self.T + self.T + 1]
        return [(window[:-1], window[1:])]

    def batch(self, rows):
        """inputs, targets (B, T) and segments (B, T) or None for the given row numbers. A row of documents is padded to T,
        so that all batches have one shape: a new shape would have torch.compile begin anew."""
        return collate([self.examples(r) for r in rows], self.eos_id, self.T if len(rows) else 0)


class Joined:
    """Several token files as one list of rows: row numbers run through the first, then the second, …"""

    def __init__(self, parts):
        self.parts, self.first = parts, np.cumsum([0, *map(len, parts)])
        self.meta = {key: sum(part.meta[key] for part in parts) for key in ("n_tokens", "n_docs", "n_bytes")}
        self.openings = parts[0].openings

    def __len__(self):
        return int(self.first[-1])

    def batch(self, rows):
        part = np.searchsorted(self.first, rows, side="right") - 1
        examples = [self.parts[p].examples(r - self.first[p]) for p, r in zip(part, rows)]
        return collate(examples, self.parts[0].eos_id, self.parts[0].T if examples else 0)


# ----------------------------------------------------------------------------------------------------------------
# Chat and preference rows: many formats, one internal form


def read_rows(paths, out_dir=None, max_bad=0.1):
    """All rows of .jsonl, .json, .parquet files (or .gz of the first two) as [(where, dict)]; where = "file:line".

    Lines that are no JSON object or no UTF-8 are counted, shown and, with out_dir, written to out_dir/quarantine.jsonl;
    more than max_bad of all lines, or no row at all, is a UserError: a wrong file must not look like success.
    """
    rows, bad = [], []
    for path in map(Path, paths):
        name = path.name.removesuffix(".gz")
        before = len(rows)
        if path.is_dir():
            raise UserError(f"--data {path} is a directory; name the files in it")
        try:
            if name.endswith(".parquet"):
                import pyarrow.parquet as pq
                rows += [(f"{path}:{i}", r) for i, r in enumerate(pq.read_table(path).to_pylist(), 1)]
                continue
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
                raw = f.read().removeprefix(b"\xef\xbb\xbf")
        except FileNotFoundError:
            raise UserError(f"--data {path} does not exist") from None
        except (OSError, EOFError, zlib.error, ValueError) as e:             # pyarrow's errors are ValueErrors
            raise UserError(f"--data {path} cannot be read: {e}") from None
        if name.endswith(".json"):
            try:
                table = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path} is not a JSON file: {e}; one object a line goes into a .jsonl file") from None
            table = table if isinstance(table, list) else [table]
            rows += [(f"{path}:{i}", r) for i, r in enumerate(table, 1) if isinstance(r, dict)]
            bad += [(f"{path}:{i}", "not an object", str(r)[:200]) for i, r in enumerate(table, 1) if not isinstance(r, dict)]
        elif name.endswith(".jsonl"):
            for i, line in enumerate(raw.split(b"\n"), 1):
                if line.strip():
                    try:
                        row = json.loads(line.decode("utf-8"))
                        if not isinstance(row, dict):
                            raise ValueError("not an object")
                        rows.append((f"{path}:{i}", row))
                    except (ValueError, RecursionError) as e:
                        reason = "not UTF-8" if isinstance(e, UnicodeDecodeError) else f"no JSON object: {getattr(e, 'msg', e)}"
                        bad.append((f"{path}:{i}", reason, line[:200].decode("utf-8", "replace")))
        else:
            raise UserError(f"--data {path}: unknown kind of file; use .jsonl, .json or .parquet (.gz of the first two); plain text and "
                            f"token files belong to prepare_data.py and train_pretrain.py")
        if len(rows) == before and not bad:
            raise UserError(f"--data {path} holds no row: the file is empty")
    report_bad(bad, len(rows) + len(bad), out_dir, max_bad)
    return rows


def report_bad(bad, total, out_dir, max_bad):
    """Say how many rows are set aside for which reason, with an example of each, write all to quarantine.jsonl, stop above the
    allowed share and where none is left."""
    if not bad:
        return
    print(f"set aside {len(bad)} of {total} rows:", flush=True)
    reasons = Counter(reason for _, reason, _ in bad).most_common()
    for reason, n in reasons[:8]:
        where, _, head = next(row for row in bad if row[1] == reason)
        print(f"    {n} x {reason}, such as {where}: {head[:80]!r}", flush=True)
    if len(reasons) > 8:
        print(f"    {sum(n for _, n in reasons[8:])} for {len(reasons) - 8} other reasons", flush=True)
    if out_dir is not None and int(os.environ.get("RANK", 0)) == 0:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        path = Path(out_dir) / "quarantine.jsonl"
        lines = [json.dumps({"where": where, "reason": reason, "head": head}, ensure_ascii=False) for where, reason, head in bad]
        known = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as f:     # a resumed run sets the same rows aside again
            f.writelines(line + "\n" for line in lines if line not in known)
    if len(bad) > max_bad * total or len(bad) == total:
        raise UserError(f"{len(bad)} of {total} rows cannot be used, " + (f"more than --max_bad {max_bad:.0%}" if max_bad < 1 else "none is left")
                        + f"; the first: {bad[0][0]}: {bad[0][1]}")


ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
         "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function": "tool"}


def messages_from(items):
    """[{role, content} or {from, value}, …] -> [{"role", "content"[, "train"]}], checked. Raises ValueError(reason)."""
    messages = []
    if not isinstance(items, list):
        raise ValueError("the messages are not a list")
    for item in items:
        if not isinstance(item, dict):
            raise ValueError("a message is not an object")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"unknown role {role!r}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"empty or non-text {ROLES[role]} message")
        message = {"role": ROLES[role], "content": content}
        if item.get("weight") is not None:                                    # Parquet has null where others have nothing
            if item["weight"] not in (0, 1):
                raise ValueError(f"weight {item['weight']!r} is neither 0 nor 1")
            message["train"] = int(item["weight"])
        messages.append(message)
    turns = [m["role"] for m in messages]
    if "system" in turns[1:]:
        raise ValueError("a system message is not the first")
    turns = turns[1:] if turns[:1] == ["system"] else turns
    turns = turns[:1] + ["user" if r == "tool" else r for r in turns[1:]]     # a tool's result stands where a user would
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise ValueError("user and assistant do not alternate, beginning with the user")
    return messages


# the prompts of Stanford Alpaca (train.py), made of instruction and input; an answer follows
ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n### Instruction:\n"
ALPACA_INPUT = ", paired with an input that provides further context"


def alpaca_text(instruction, extra, alpaca_prompt):
    """The user's text of an alpaca row: the instruction and, on a line of its own, the input; or Stanford's prompt, as published."""
    if alpaca_prompt:
        middle = f"\n\n### Input:\n{extra}" if extra else ""
        return ALPACA.format(ALPACA_INPUT if extra else "") + instruction + middle + "\n\n### Response:"
    return instruction.strip() + ("\n" + extra.strip() if extra.strip() else "")


def question_of(row, alpaca_prompt=False):
    """The messages before the answer, from any of the formats that share these keys. Raises ValueError(reason)."""
    for key in ("messages", "conversations", "prompt"):
        if isinstance(row.get(key), list):
            return messages_from(row[key])
    for key in ("prompt", "question", "instruction"):
        if isinstance(row.get(key), str):
            extra, history = row.get("input") or "", row.get("history") or []
            if not isinstance(extra, str) or not isinstance(history, list) or any(not isinstance(h, list) or len(h) != 2 for h in history):
                raise ValueError("input is not a text or history is no list of [question, answer]")
            history = [m for q, a in history for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            text = alpaca_text(row[key], extra, alpaca_prompt) if key == "instruction" else row[key]
            return messages_from(system + history + [{"role": "user", "content": text}])
    if "text" in row:
        raise ValueError("plain text: tokenize it with prepare_data.py and give it to train_pretrain.py")
    raise ValueError(f"no known chat format; the keys are {sorted(row)[:8]}")


def to_messages(row, alpaca_prompt=False):
    """A chat row in any known format as messages that end with the assistant. Raises ValueError(reason).

    OpenAI messages, ShareGPT conversations, Firefly conversation, alpaca instruction/input/output (alpaca_prompt: in
    Stanford's words), and prompt/completion, prompt/answer, prompt/response, question/answer. Detected by keys.
    """
    if "chosen" in row and "rejected" in row:
        raise ValueError("a preference row: give the file to train_rm.py or train_dpo.py")
    if isinstance(row.get("label"), bool) and "prompt" in row:
        raise ValueError("an unpaired preference row (label true or false): give the file to train_dpo.py --loss kto")
    if {"A", "B"} <= row.keys() and {"Question", "question", "Answer"} & row.keys():
        raise ValueError("a multiple-choice question: give the file to evaluate.py as .csv")
    if isinstance(row.get("conversation"), list):                            # Firefly
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = messages_from(system + [{"role": r, "content": turn.get(k)} for turn in row["conversation"] if isinstance(turn, dict)
                                           for r, k in (("user", "human"), ("assistant", "assistant"))])
    else:
        messages = question_of(row, alpaca_prompt)
        for key in ("output", "completion", "answer", "response"):
            if messages[-1]["role"] == "user" and key in row:
                messages = messages_from(messages + [{"role": "assistant", "content": row[key]}])
    if messages[-1]["role"] != "assistant":
        raise ValueError("no answer: the row does not end with the assistant")
    return messages


def looks_like(row):
    """What a row is that is no preference row, and where it belongs, as the end of a sentence."""
    if "label" in row:
        return " but one labelled answer: train_dpo.py --loss kto reads it"
    try:
        to_messages(row)
        return " but a chat: give the file to train_sft.py"
    except ValueError:
        return " but plain text: tokenize it with prepare_data.py for train_pretrain.py" if isinstance(row.get("text"), str) else ""


def to_preference(row):
    """A preference row as (prompt messages, chosen text, rejected text). Raises ValueError(reason).

    Each side may be a string, one message, or a list of messages; the turns that both lists share belong to the prompt.
    """
    if "chosen" not in row or "rejected" not in row:
        raise ValueError("no chosen and rejected: not a preference row" + looks_like(row))
    sides = []
    for side in (row["chosen"], row["rejected"]):
        side = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        sides.append([{"role": m.get("role", m.get("from")), "content": m.get("content", m.get("value"))}
                      for m in (side if isinstance(side, list) else [side]) if isinstance(m, dict)])
    chosen, rejected = sides
    if any(k in row for k in ("prompt", "conversations", "messages", "instruction", "question")):
        prompt = question_of(row)
    else:
        prompt = []
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and not (prompt and prompt == messages_from(chosen[:shared])):
        prompt = messages_from([*prompt, *chosen[:shared]])
    chosen, rejected = chosen[shared:], rejected[shared:]
    if len(chosen) != 1 or len(rejected) != 1:
        raise ValueError("chosen and rejected must be one answer each after the turns they share")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt does not end with the user")
    for side in (chosen[0], rejected[0]):
        if not isinstance(side["content"], str) or not side["content"].strip() or ROLES.get(str(side["role"])) != "assistant":
            raise ValueError("an answer is empty or not the assistant's")
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        raise ValueError("chosen and rejected are the same")
    return prompt, chosen[0]["content"], rejected[0]["content"]


def content_at(tok, messages, i):
    """(first position, length) of the content of message i in the rendered ids, where text can be cut out."""
    begin = len(render(tok, messages[:i])[0]) + len(frame(tok, messages[i]["role"])[0])
    return begin, len(tok.encode(messages[i]["content"]))


def fit_chat(tok, messages, max_len, truncate="turn"):
    """messages as (ids, mask) of at most max_len tokens, or None if no supervised token is left.

    truncate="turn": whole exchanges from the start while they fit. If even the first is too long: the user's text loses its
    beginning (down to max_len // 4 tokens), then the answer its end; a cut answer gets no <|im_end|>, since it does not stop
    there. "keep_start": the first max_len tokens, whatever is cut, as trl does by default.
    """
    ids, mask = render(tok, messages)
    if truncate == "keep_start":
        return (ids[:max_len], mask[:max_len]) if any(mask[:max_len]) else None
    turns = [i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"]
    while len(ids) > max_len and len(turns) > 1:
        turns.pop()
        ids, mask = render(tok, messages[: turns[-1]])
    if len(ids) > max_len:
        first = messages[: turns[0]]
        user = max(i for i, m in enumerate(first) if m["role"] == "user")
        begin, size = content_at(tok, first, user)
        cut = max(0, min(len(ids) - max_len, size - max_len // 4))
        ids, mask = (x[:begin] + x[begin + cut :] for x in (ids, mask))
        ids, mask = ids[:max_len], mask[:max_len]
    return (ids, mask) if any(mask) else None


def to_labelled(row):
    """What KTO reads, single answers, each good or bad: [(prompt messages, answer, is it good?)]. A row with a completion (or answer,
    response, output; or chat messages that end with one) and a label true/false is one; a preference row is two. Raises ValueError."""
    if "chosen" in row and "rejected" in row:
        prompt, chosen, rejected = to_preference(row)
        return [(prompt, chosen, True), (prompt, rejected, False)]
    if not isinstance(row.get("label"), bool) and row.get("label") not in (0, 1):
        raise ValueError("no label that is true or false (nor chosen and rejected): not a row for --loss kto" + looks_like(row))
    messages = to_messages({k: v for k, v in row.items() if k != "label"})
    return [(messages[:-1], messages[-1]["content"], bool(row["label"]))]


def margin_of(row):
    """A preference row's own margin, how much better the chosen answer is; None without one. Raises ValueError(reason)."""
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, (int, float)) or not np.isfinite(margin)):
        raise ValueError(f"its margin {margin!r} is not a number")
    return margin


def fit_pair(tok, prompt, chosen, rejected, max_len, cut_answers=False):
    """(prompt ids, chosen ids, rejected ids), answers closed by <|im_end|> and nothing after it; or None if it cannot fit.
    The oldest exchanges go first, then the beginning of the last user message. An answer is never cut, or, with cut_answers, last: the
    user keeps a quarter of max_len, and a cut answer gets no <|im_end|>, since it does not stop there."""
    answers = [tok.encode(a) + [tok.end_id] for a in (chosen, rejected)]
    room = max_len - max(map(len, answers))
    system, turns = [m for m in prompt if m["role"] == "system"], [m for m in prompt if m["role"] != "system"]
    while len(turns) > 1 and len(render(tok, system + turns, True)[0]) > room:
        turns = turns[1:]
        while len(turns) > 1 and turns[0]["role"] != "user":
            turns = turns[1:]
    ids = render(tok, system + turns, True)[0]
    if len(ids) > room:
        begin, size = content_at(tok, system + turns, len(system + turns) - 1)
        cut = len(ids) - room
        if cut >= size - cut_answers * max_len // 4:
            if not cut_answers:
                return None
            cut = max(0, size - max_len // 4)
        ids = ids[:begin] + ids[begin + cut :]
    if len(ids) >= max_len:
        return None
    return ids, answers[0][: max_len - len(ids)], answers[1][: max_len - len(ids)]


def read_weights(words):
    """--data a.jsonl:0.8 b.jsonl:0.2 -> (["a.jsonl", "b.jsonl"], {"a.jsonl": 0.8, "b.jsonl": 0.2}); without weights (words, {})."""
    cut = [word.rpartition(":") for word in words]
    numbers = [w for path, _, w in cut if path and re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?|nan|inf", w)]
    if not numbers:
        return words, {}
    paths = [str(Path(path)) for path, _, _ in cut]                          # as read_rows names them
    try:
        weights = dict(zip(paths, map(float, numbers), strict=True))
        if len(weights) < len(paths) or not all(0 < w < math.inf for w in weights.values()):
            raise ValueError
    except ValueError:
        raise UserError(f"--data {' '.join(words)}: to mix files, give each of them one weight above 0, as in a.jsonl:0.8 b.jsonl:0.2") from None
    return paths, weights


def split_rows(cfg, paths=None):
    """(train rows, val rows) of --data and --val_data, or of --data alone with --val_fraction of it held out by content."""
    if not cfg.data:
        raise UserError("--data names no file; give one or more .jsonl, .json or .parquet files")
    rows = read_rows(paths or cfg.data, cfg.out_dir, cfg.max_bad)
    if cfg.val_data:
        return rows, read_rows(cfg.val_data, cfg.out_dir, cfg.max_bad)
    held_out = lambda row: zlib.crc32(json.dumps(row, sort_keys=True, default=str).encode()) < cfg.val_fraction * 2**32
    train, val = [r for r in rows if not held_out(r[1])], [r for r in rows if held_out(r[1])]
    if not train or not val:
        raise UserError(f"{len(rows)} rows with --val_fraction {cfg.val_fraction} leave {len(train)} to train on and {len(val)} to "
                        f"validate on; give more rows, another fraction, or --val_data")
    return train, val


class ChatRows:
    """Supervised rows: (inputs, targets) with targets only on what the assistant says. pack=True lays several short
    chats into one row of max_seq_len, kept apart by segments: the same loss and gradient with fewer padding tokens."""

    @classmethod
    def load(cls, cfg, tok, max_seq_len):
        """(train, val) as a script's config names them. Files with weights are packed apart, in the order of train.weights."""
        if cfg.truncate not in ("turn", "keep_start"):
            raise UserError(f"--truncate {cfg.truncate} is unknown; use turn or keep_start")
        paths, weights = read_weights(cfg.data)
        return [cls(rows, tok, max_seq_len, cfg.pack, cfg.out_dir, cfg.max_bad, cfg.truncate, cfg.alpaca_prompt, mix)
                for rows, mix in zip(split_rows(cfg, paths), (weights, {}))]

    def __init__(self, rows, tok, max_seq_len, pack_rows=True, out_dir=None, max_bad=0.1, truncate="turn", alpaca_prompt=False, weights=None):
        """rows: [(where, row)] as read_rows returns them. weights: {path: weight} of the files to be mixed; self.sizes then
        says how many rows each has, one file's rows after the other's."""
        self.pad_id, self.examples, self.questions, self.weights, bad = tok.pad_id, [], [], weights or {}, []
        shortened, sources = 0, []
        for where, row in rows:
            try:
                messages = to_messages(row, alpaca_prompt)
                ids, mask = whole = render(tok, messages)
                if not any(mask):
                    raise ValueError("nothing to learn: every answer has weight 0")
                if len(ids) > max_seq_len + 1:
                    fitted = fit_chat(tok, messages, max_seq_len + 1, truncate)
                    if fitted is None:
                        raise ValueError(f"no answer token fits into --max_seq_len {max_seq_len}")
                    ids, mask = fitted
                    shortened += 1
                targets = [t if m else IGNORE_INDEX for t, m in zip(ids[1:], mask[1:])]
                self.examples.append((ids[:-1], targets))
                self.questions.append(next(m["content"] for m in messages if m["role"] == "user"))
                sources.append(where.rpartition(":")[0] if weights else "")
            except ValueError as e:
                bad.append((where, str(e), json.dumps(row, ensure_ascii=False, default=str)[:200]))
        if shortened:
            what = "late turns, the start of a question or the end of an answer are left out" if truncate == "turn" else "their ends are left out"
            print(f"shortened {shortened} of {len(rows)} chats to --max_seq_len {max_seq_len}: {what}", flush=True)
        report_bad(bad, len(rows), out_dir, max_bad)
        if not self.examples:
            raise UserError(f"no chat fits into --max_seq_len {max_seq_len}; raise it")
        self.rows, self.sizes = [], []
        for path in weights or [""]:
            chats = [i for i, source in enumerate(sources) if source == path]
            if not chats:
                raise UserError(f"--data {path} leaves no row to train on; take it out or give more rows")
            bins = pack([len(self.examples[i][0]) for i in chats], max_seq_len) if pack_rows else [[i] for i in range(len(chats))]
            self.rows += [[chats[i] for i in row] for row in bins]
            self.sizes.append(len(bins))
        self.n_supervised = sum(t != IGNORE_INDEX for _, y in self.examples for t in y)

    def __len__(self):
        return len(self.rows)

    def lengths(self):
        """Tokens of each row."""
        return [sum(len(self.examples[i][0]) for i in row) for row in self.rows]

    def batch(self, rows):
        return collate([[self.examples[i] for i in self.rows[r]] for r in rows], self.pad_id)

    def inspect(self, tok, n):
        """Print the first n rows as the model sees them, a token a line: place, chat within the row, id, 1 if it is learnt, text;
        the learnt ones in green. What is wrong with a mask is seen here within a minute."""
        names = {i: name for name, i in tok.control.items()}
        colours = "FORCE_COLOR" in os.environ or sys.stdout.isatty() and "NO_COLOR" not in os.environ
        green, grey, off = ("", "", "") if not colours else ("\033[1;32m", "\033[90m", "\033[0m")
        for r, row in enumerate(self.rows[:n], 1):
            tokens = []
            for chat, i in enumerate(row, 1):
                inputs, targets = self.examples[i]
                mask = [False, *(y != IGNORE_INDEX for y in targets)]          # the last target is no input: shown if it is learnt
                tokens += [(chat, t, m) for t, m in zip([*inputs, targets[-1]], mask) if t != IGNORE_INDEX]
            learnt = sum(mask for _, _, mask in tokens)
            print(f"row {r} of {len(self.rows)}: {len(row)} chat(s), {len(tokens)} tokens, {learnt} of them learnt ({learnt / len(tokens):.0%})\n"
                  f"{'place':>6} {'chat':>4} {'id':>7} mask  token")
            for place, (chat, t, mask) in enumerate(tokens):
                piece = tok.token_bytes(t).decode("utf-8", errors="replace")
                text = names.get(t) or repr(piece if "\ufffd" not in piece else tok.token_bytes(t))       # a part of a character: its bytes
                print(f"{green if mask else grey}{place:>6} {chat:>4} {t:>7} {int(mask):>4}  {text}{off}")


class PreferenceRows:
    """Pairs for the reward model and DPO. A batch of B pairs is 2B rows, chosen first, rejected second, so that one
    forward pass sees both under the same conditions. Where it saves arithmetic (`shares`), their prompts stand apart and
    are read once for both (pairs.py).

    For KTO (labelled=True) a "pair" is an answer and, in the rejected one's place, the answer of the next row, which does not
    belong to this prompt: KTO measures with it how far the policy has moved. desirable: whether the answer is a good one."""

    @classmethod
    def load(cls, cfg, tok, max_seq_len, **options):
        """(train, val) as a script's config names them."""
        return [cls(rows, tok, max_seq_len, cfg.out_dir, cfg.max_bad, **options) for rows in split_rows(cfg)]

    def __init__(self, rows, tok, max_seq_len, out_dir=None, max_bad=0.1, labelled=False, cut_answers=False, share=False, tight=False):
        """rows: [(where, row)] as read_rows returns them. share: may prompts be read apart from their answers? tight: whole rows cost
        nothing for their padding (pairs.without_padding)."""
        self.pad_id, self.max_seq_len, self.share, self.tight = tok.pad_id, max_seq_len, share, tight
        self.pairs, self.questions, self.margins, self.desirable, self.ref_logps = [], [], [], None, None
        bad, found = [], []
        for where, row in rows:
            try:
                found += to_labelled(row) if labelled else [(*to_preference(row), margin_of(row))]
            except ValueError as e:
                bad.append((where, str(e), json.dumps(row, ensure_ascii=False, default=str)[:200]))
        report_bad(bad, len(rows), out_dir, max_bad)
        if labelled:                                         # all good ones, then all bad ones: neighbours have different prompts
            found.sort(key=lambda r: not r[2])
            labels = [good for _, _, good in found]
            if len(set(labels)) < 2:
                raise UserError("--loss kto needs answers of both labels, and all of these have the same; add rows of the other")
            found = [(prompt, answer, after[1], None) for (prompt, answer, _), after in zip(found, found[1:] + found[:1])]
        too_long = shortened = cut = same = 0
        kept = []
        for i, (prompt, chosen, rejected, margin) in enumerate(found):
            pair = fit_pair(tok, prompt, chosen, rejected, max_seq_len, cut_answers)
            if pair is None:
                too_long += 1
            elif pair[1] == pair[2] and not labelled:
                same += 1
            else:
                shortened += pair[0] != render(tok, prompt, True)[0]
                cut += any(answer[-1] != tok.end_id for answer in pair[1:])
                kept.append(i)
                self.pairs.append(pair)
                self.questions.append(prompt[-1]["content"])
                self.margins.append(margin)
        if labelled:
            self.desirable = torch.tensor([labels[i] for i in kept])
        for n, what in ((shortened, "shortened {} prompts: early turns or the start of a question are left out"),
                        (cut, "cut an answer's end in {} pairs"), (too_long, "left out {} pairs: an answer is longer"),
                        (same, "left out {} pairs: the two answers are the same tokens")):
            if n:
                print(what.format(f"{n} of {len(found)}") + f" (--max_seq_len {max_seq_len})", flush=True)
        if not self.pairs:
            raise UserError(f"no pair fits into --max_seq_len {max_seq_len}; raise it")

    def __len__(self):
        return len(self.pairs)

    def lengths(self):
        """Tokens of each pair's longer side."""
        return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in self.pairs]

    def shares(self, rows):
        """Is reading the prompts of this batch once, in a pass of their own, less work? Padded to the longest, B prompts and 2B
        answers beside 2B whole rows, these padded unless `tight`. It costs a second pass and a mask, so a gain below SHARE_FROM is
        none (bench/dpo.py)."""
        if not (self.share and len(rows)):
            return False
        prompts, answers = (max(len(p) for p, _, _ in rows), max(max(len(a), len(b)) for _, a, b in rows))
        padded = 2 * len(rows) * max(len(p) + max(len(a), len(b)) for p, a, b in rows)
        whole = sum(2 * len(p) + len(a) + len(b) for p, a, b in rows) if self.tight else padded
        return whole > SHARE_FROM * len(rows) * (prompts + 2 * answers) and prompts + answers < self.max_seq_len

    def sides(self, rows):
        """(rows to be read (2B) as lists of ids, the prompts before them (B, P) padded with -1 on the left, or None). A row of answers
        begins with its prompt's last token, which predicts the answer's first."""
        rows = [self.pairs[r] for r in rows]
        shared = self.shares(rows)
        sides = [(row[0][-1:] if shared else row[0], row[side]) for side in (1, 2) for row in rows]
        if not shared:
            return sides, None
        P = max(len(p) for p, _, _ in rows) - 1
        return sides, torch.tensor([[-1] * (P - len(p) + 1) + p[:-1] for p, _, _ in rows])

    def batch(self, rows):
        """What DPO compares: inputs, targets (2B, T), targets only on the answers; prompts (B, P) or None; the reference's
        log-probabilities (2B,), or None if they are not known beforehand; for KTO, desirable (B,)."""
        sides, prompts = self.sides(rows)
        examples = [[((p + a)[:-1], [IGNORE_INDEX] * (len(p) - 1) + a)] for p, a in sides]
        inputs, targets, _ = collate(examples or [[([self.pad_id], [IGNORE_INDEX])]] * 2, self.pad_id)
        ref_logps = None if self.ref_logps is None else self.ref_logps[list(rows)].T.flatten() if len(rows) else torch.zeros(2)
        if self.desirable is None:
            return inputs, targets, prompts, ref_logps
        return inputs, targets, prompts, ref_logps, self.desirable[list(rows)] if len(rows) else torch.tensor([False])

    def scored_batch(self, rows, margin=0.0):
        """What the reward model reads: ids (2B, T) with the closing <|im_end|>; lengths (2B,), the score is read at length - 1; prompts
        (B, P) or None; margins (B,), a row's own or else the given one."""
        sides, prompts = self.sides(rows)
        ids = [p + a for p, a in sides]
        lengths = torch.tensor([len(x) for x in ids] or [0, 0])
        margins = torch.tensor([margin if self.margins[r] is None else self.margins[r] for r in rows] or [0.0], dtype=torch.float32)
        return collate([[(x, x)] for x in ids] or [[([self.pad_id], [self.pad_id])]] * 2, self.pad_id)[0], lengths, prompts, margins


SHARE_FROM = 1.05
