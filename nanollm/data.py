"""From files to batches: token files, chat rows, preference rows, packing, and the sampler.

A dataset is a list-like of rows with .batch(indices) -> tensors; the sampler says which rows make up update number
`step`. Both are pure functions, so the state of the data is the step number and resuming is a seek.
Loaders yield already shifted (inputs, targets): target t is the token that follows input t.
"""
import gzip
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from nanollm import tokenizer as tokenizers
from nanollm.config import UserError
from nanollm.losses import IGNORE_INDEX
from nanollm.tokenizer import render

# ----------------------------------------------------------------------------------------------------------------
# Which rows, in which order


def permute(index, n, key):
    """The place of each `index` (array of int64 in 0..n-1) in a keyed pseudo-random permutation of n items.

    A Feistel network on just enough bits, walked until it lands below n (Black & Rogaway 2002): a permutation that
    is computed where it is needed instead of being stored, so a corpus of any size costs no memory to shuffle.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    half, x = np.uint64(half), np.asarray(index).astype(np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for round in range(4):
            h = (right + np.uint64((key * 4 + round) % 2**31)) * np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((h ^ (h >> np.uint64(32))) & mask)
        x[todo] = (left << half) | right
        todo = x >= n
    return x.astype(np.int64)


class Sampler:
    """Update `step` reads the samples step * B … step * B + B - 1 of an endless stream that runs through all rows
    in a new order each epoch. B = batch_size * gradient_accumulation_steps, whatever the number of ranks: rank r
    takes every world_size-th micro-batch, so 1, 2 or 4 GPUs make the same updates from the same rows."""

    def __init__(self, n_rows, ctx, batch_size, gradient_accumulation_steps, seed, epochs=0.0):
        G, W = gradient_accumulation_steps, ctx.world_size
        if G < 1 or batch_size < 1:
            raise UserError(f"--batch_size {batch_size} and --gradient_accumulation_steps {G} must be at least 1")
        if G % W:
            raise UserError(f"--gradient_accumulation_steps {G} counts the micro-batches of all ranks and must be divisible by "
                            f"the {W} ranks; {f'the nearest values are {G // W * W} and {(G // W + 1) * W}' if G > W else f'the smallest value is {W}'}")
        self.n, self.seed, self.batch_size, self.G = n_rows, seed, batch_size, G
        self.rank, self.world_size = ctx.rank, W
        self.total = max(1, round(epochs * n_rows)) if epochs else None   # None = endless
        self.rows_per_step = batch_size * G

    def steps(self, max_steps):
        """Number of updates: max_steps, or what --epochs comes to, the last update possibly smaller."""
        if not self.total and not max_steps:
            raise UserError("how long shall the run be? give --max_steps or --epochs")
        return -(-self.total // self.rows_per_step) if self.total else max_steps

    def micro_batches(self, step):
        """This rank's share of update `step`: a list of index arrays, some possibly empty in the last update."""
        i = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        micro = []
        for m in range(self.rank, self.G, self.world_size):
            part = i[m * self.batch_size : (m + 1) * self.batch_size]
            part = part[part < self.total] if self.total else part
            rows = np.empty(len(part), np.int64)
            for epoch in np.unique(part // self.n):
                here = part // self.n == epoch
                rows[here] = permute(part[here] % self.n, self.n, self.seed * 1_000_003 + int(epoch))
            micro.append(rows)
        return micro


def pack(lengths, size, window=65536):
    """Best-fit decreasing: put items of the given lengths into rows of at most `size` tokens -> list of lists of
    item numbers. Within each window of items (bounded work for any corpus), longest first, each into the fullest
    row that still has room: open rows are kept by free space, the free spaces that exist as bits of one integer."""
    rows = []
    for begin in range(0, len(lengths), window):
        part = np.asarray(lengths[begin : begin + window])
        open_rows, spaces = [[] for _ in range(size + 1)], 0              # by free space; bit s = some row has s free
        for i in np.argsort(-part, kind="stable").tolist():
            n = int(part[i])
            fits = spaces >> n << n
            if fits:
                space = (fits & -fits).bit_length() - 1                   # the smallest space >= n
                row = open_rows[space].pop()
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


class TokenFile:
    """DIR/{split}.bin, .idx, .json as rows of max_seq_len tokens.

    rows="stream": the file as one long stream cut every max_seq_len tokens; every token is a target once.
    rows="documents": each row begins at a document's start; whole documents are packed into rows and kept apart by
    segments, longer ones are cut. The row's first input is the <|endoftext|> that ends the document before.
    """

    def __init__(self, directory, split, max_seq_len, rows="stream", tokenizer_hash=None):
        directory, self.T, self.rows = Path(directory), max_seq_len, rows
        path = directory / f"{split}.bin"
        if rows not in ("stream", "documents"):
            raise UserError(f"--rows {rows} is unknown; use stream or documents")
        try:
            self.meta = json.loads((directory / f"{split}.json").read_text(encoding="utf-8"))
            dtype = {"uint16": "<u2", "uint32": "<u4"}[self.meta["dtype"]]
            size, want = path.stat().st_size, self.meta["n_tokens"] * np.dtype(dtype).itemsize
            self.eos_id, made_by = self.meta["eos_id"], self.meta["tokenizer_hash"]
            self.ends = np.fromfile(directory / f"{split}.idx", dtype="<u8").astype(np.int64)
        except FileNotFoundError:
            raise UserError(f"--data {directory} has no {split} token file; make it with `python prepare_data.py build "
                            f"--input YOUR_TEXT --out {directory}`, or `bash runs/speedrun.sh` for the demo") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{directory / (split + '.json')} does not describe a token file; make it again with prepare_data.py") from None
        if size != want:
            raise UserError(f"{path} has {size:,} bytes where {split}.json promises {want:,}: a truncated copy; copy or build it again")
        if len(self.ends) != self.meta["n_docs"] or self.ends[-1:].sum() != self.meta["n_tokens"]:
            raise UserError(f"{directory / (split + '.idx')} does not belong to {split}.bin; copy or build both again")
        if tokenizer_hash and tokenizer_hash != made_by:
            raise UserError(f"{directory} was tokenized with another tokenizer (hash {made_by[:8]}) than the "
                            f"model's ({tokenizer_hash[:8]}); tokenize the text again with the model's tokenizer")
        self.tokens = np.memmap(path, dtype=dtype, mode="r") if want else np.empty(0, dtype)
        if rows == "stream":
            if len(self.tokens) < max_seq_len + 1:
                raise UserError(f"{path} has {len(self.tokens):,} tokens, less than one row of --max_seq_len {max_seq_len} (and its "
                                f"shift); use more text, a shorter --max_seq_len, or --rows documents")
            return
        starts = np.concatenate(([0], self.ends))[:-1]
        pieces = -(-(self.ends - starts) // max_seq_len)                     # pieces of each document
        offset = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.begin = np.repeat(starts, pieces) + offset * max_seq_len
        self.end = np.minimum(self.begin + max_seq_len, np.repeat(self.ends, pieces))
        self.bins = pack(self.end - self.begin, max_seq_len)
        if not self.bins:
            raise UserError(f"{path} holds no document; use more text or a larger --val_fraction in prepare_data.py")

    def openings(self, tokenizer, n=3, length=8):
        """The first few tokens of the first documents as text: prompts for the log when none are given."""
        starts = np.concatenate(([0], self.ends[:-1]))[:n]
        texts = [tokenizer.decode(self.tokens[i : min(i + length, end - 1)].tolist()) for i, end in zip(starts, self.ends)]
        return [t.rstrip("\ufffd") for t in texts]                         # a cut may split a character's bytes

    def __len__(self):
        return (len(self.tokens) - 1) // self.T if self.rows == "stream" else len(self.bins)

    def piece(self, i):
        begin, end = int(self.begin[i]), int(self.end[i])
        targets = self.tokens[begin:end].astype(np.int64)
        before = self.tokens[begin - 1] if begin else self.eos_id
        return np.concatenate(([before], targets[:-1])).astype(np.int64), targets

    def batch(self, rows):
        """inputs, targets (B, T) and segments (B, T) or None for the given row numbers."""
        if self.rows == "stream":
            windows = [self.tokens[i * self.T : i * self.T + self.T + 1].astype(np.int64) for i in rows]
            return collate([[(w[:-1], w[1:])] for w in windows], self.eos_id)
        return collate([[self.piece(i) for i in self.bins[r]] for r in rows], self.eos_id, self.T if len(rows) else 0)


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
                        bad.append((f"{path}:{i}", str(e), line[:200].decode("utf-8", "replace")))
        else:
            raise UserError(f"--data {path}: unknown kind of file; use .jsonl, .json or .parquet (.gz of the first two)")
        if len(rows) == before and not bad:
            raise UserError(f"--data {path} holds no row: the file is empty")
    report_bad(bad, len(rows) + len(bad), out_dir, max_bad)
    return rows


def report_bad(bad, total, out_dir, max_bad):
    """Say how many rows are set aside, show three, write all to quarantine.jsonl, stop above the allowed share."""
    if not bad:
        return
    print(f"set aside {len(bad)} of {total} rows:", flush=True)
    for where, reason, head in bad[:3]:
        print(f"    {where}: {reason}: {head[:80]!r}", flush=True)
    if out_dir is not None and int(os.environ.get("RANK", 0)) == 0:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        path = Path(out_dir) / "quarantine.jsonl"
        lines = [json.dumps({"where": where, "reason": reason, "head": head}, ensure_ascii=False) for where, reason, head in bad]
        known = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
        with open(path, "a", encoding="utf-8") as f:                         # a resumed run sets the same rows aside again
            f.writelines(line + "\n" for line in lines if line not in known)
    if len(bad) > max_bad * total:
        raise UserError(f"{len(bad)} of {total} rows cannot be used, more than --max_bad {max_bad:.0%}; the first: "
                        f"{bad[0][0]}: {bad[0][1]}")


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
        if "weight" in item:
            message["train"] = int(bool(item["weight"]))
        messages.append(message)
    turns = [m["role"] for m in messages]
    if "system" in turns[1:]:
        raise ValueError("a system message is not the first")
    turns = turns[1:] if turns[:1] == ["system"] else turns
    turns = turns[:1] + ["user" if r == "tool" else r for r in turns[1:]]     # a tool's result stands where a user would
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise ValueError("user and assistant do not alternate, beginning with the user")
    return messages


def question_of(row):
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
            text = row[key].strip() + ("\n" + extra.strip() if extra.strip() else "") if key == "instruction" else row[key]
            return messages_from(system + history + [{"role": "user", "content": text}])
    if "text" in row:
        raise ValueError("plain text: tokenize it with prepare_data.py and give it to train_pretrain.py")
    raise ValueError(f"no known chat format; the keys are {sorted(row)[:8]}")


def to_messages(row):
    """A chat row in any known format as messages that end with the assistant. Raises ValueError(reason).

    OpenAI messages, ShareGPT conversations, Firefly conversation, alpaca instruction/input/output, and
    prompt/completion, prompt/answer, prompt/response, question/answer. Detected by keys.
    """
    if "chosen" in row and "rejected" in row:
        raise ValueError("a preference row: give the file to train_rm.py or train_dpo.py")
    if isinstance(row.get("conversation"), list):                            # Firefly
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = messages_from(system + [{"role": r, "content": turn.get(k)} for turn in row["conversation"] if isinstance(turn, dict)
                                           for r, k in (("user", "human"), ("assistant", "assistant"))])
    else:
        messages = question_of(row)
        for key in ("output", "completion", "answer", "response"):
            if messages[-1]["role"] == "user" and key in row:
                messages = messages_from(messages + [{"role": "assistant", "content": row[key]}])
    if messages[-1]["role"] != "assistant":
        raise ValueError("no answer: the row does not end with the assistant")
    return messages


def to_preference(row):
    """A preference row as (prompt messages, chosen text, rejected text). Raises ValueError(reason).

    Each side may be a string, one message, or a list of messages; the turns that both lists share belong to the prompt.
    """
    if "chosen" not in row or "rejected" not in row:
        raise ValueError("no chosen and rejected: not a preference row")
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
    begin = len(render(tok, messages[:i])[0]) + 1 + len(tok.encode(messages[i]["role"] + "\n"))
    return begin, len(tok.encode(messages[i]["content"]))


def fit_chat(tok, messages, max_len):
    """messages as (ids, mask) of at most max_len tokens, or None if no supervised token is left.

    Whole exchanges from the start while they fit. If even the first is too long: the user's text loses its beginning
    (down to max_len // 4 tokens), then the answer its end; a cut answer gets no <|im_end|>, since it does not stop there.
    """
    ids, mask = render(tok, messages)
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


def fit_pair(tok, prompt, chosen, rejected, max_len):
    """(prompt ids, chosen ids, rejected ids), answers closed by <|im_end|> and nothing after it; or None if it cannot fit.
    The oldest exchanges go first, then the beginning of the last user message; an answer is never cut."""
    answers = [tok.encode(a) + [tok.im_end_id] for a in (chosen, rejected)]
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
        if cut >= size:
            return None
        ids = ids[:begin] + ids[begin + cut :]
    return ids, answers[0], answers[1]


def split_rows(cfg):
    """(train rows, val rows) of --data and --val_data, or of --data alone with --val_fraction of it held out by content."""
    if not cfg.data:
        raise UserError("--data names no file; give one or more .jsonl, .json or .parquet files")
    rows = read_rows(cfg.data, cfg.out_dir, cfg.max_bad)
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
        """(train, val) as a script's config names them."""
        return [cls(rows, tok, max_seq_len, cfg.pack, cfg.out_dir, cfg.max_bad) for rows in split_rows(cfg)]

    def __init__(self, rows, tok, max_seq_len, pack_rows=True, out_dir=None, max_bad=0.1):
        """rows: [(where, row)] as read_rows returns them."""
        self.pad_id, self.examples, self.questions, bad = tok.pad_id, [], [], []
        shortened = 0
        for where, row in rows:
            try:
                messages = to_messages(row)
                fitted = fit_chat(tok, messages, max_seq_len + 1)
                if fitted is None:
                    raise ValueError(f"no answer token fits into --max_seq_len {max_seq_len}")
                ids, mask = fitted
                shortened += ids != render(tok, messages)[0]
                targets = [t if m else IGNORE_INDEX for t, m in zip(ids[1:], mask[1:])]
                self.examples.append((ids[:-1], targets))
                self.questions.append(next(m["content"] for m in messages if m["role"] == "user"))
            except ValueError as e:
                bad.append((where, str(e), json.dumps(row, ensure_ascii=False, default=str)[:200]))
        if shortened:
            print(f"shortened {shortened} of {len(rows)} chats to --max_seq_len {max_seq_len}: late turns, the start of a question or "
                  f"the end of an answer are left out", flush=True)
        report_bad(bad, len(rows), out_dir, max_bad)
        if not self.examples:
            raise UserError(f"no chat fits into --max_seq_len {max_seq_len}; raise it")
        lengths = [len(x) for x, _ in self.examples]
        self.rows = pack(lengths, max_seq_len) if pack_rows else [[i] for i in range(len(lengths))]
        self.n_supervised = sum(t != IGNORE_INDEX for _, y in self.examples for t in y)

    def __len__(self):
        return len(self.rows)

    def batch(self, rows):
        return collate([[self.examples[i] for i in self.rows[r]] for r in rows], self.pad_id)


class PreferenceRows:
    """Pairs for the reward model and DPO. A batch of B pairs is 2B rows, chosen first, rejected second, so that one
    forward pass sees both under the same conditions."""

    @classmethod
    def load(cls, cfg, tok, max_seq_len):
        """(train, val) as a script's config names them."""
        return [cls(rows, tok, max_seq_len, cfg.out_dir, cfg.max_bad) for rows in split_rows(cfg)]

    def __init__(self, rows, tok, max_seq_len, out_dir=None, max_bad=0.1):
        """rows: [(where, row)] as read_rows returns them."""
        self.pad_id, self.pairs, self.questions, bad = tok.pad_id, [], [], []
        too_long = shortened = 0
        for where, row in rows:
            try:
                prompt, chosen, rejected = to_preference(row)
                pair = fit_pair(tok, prompt, chosen, rejected, max_seq_len)
                if pair is None:
                    too_long += 1
                else:
                    shortened += pair[0] != render(tok, prompt, True)[0]
                    self.pairs.append(pair)
                    self.questions.append(prompt[-1]["content"])
            except ValueError as e:
                bad.append((where, str(e), json.dumps(row, ensure_ascii=False, default=str)[:200]))
        if shortened:
            print(f"shortened {shortened} of {len(rows)} prompts to --max_seq_len {max_seq_len}: early turns or the start of a question are "
                  f"left out", flush=True)
        if too_long:
            print(f"left out {too_long} of {len(rows)} pairs: an answer is longer than --max_seq_len {max_seq_len}", flush=True)
        report_bad(bad, len(rows), out_dir, max_bad)
        if not self.pairs:
            raise UserError(f"no pair fits into --max_seq_len {max_seq_len}; raise it")

    def __len__(self):
        return len(self.pairs)

    def batch(self, rows):
        """inputs and targets (2B, T), targets only on the answers: what DPO compares."""
        sides = [(self.pairs[r][0], self.pairs[r][side]) for side in (1, 2) for r in rows]
        examples = [[((p + a)[:-1], [IGNORE_INDEX] * (len(p) - 1) + a)] for p, a in sides]
        return collate(examples or [[([self.pad_id], [IGNORE_INDEX])]] * 2, self.pad_id)[:2]

    def scored_batch(self, rows):
        """ids (2B, T) with the closing <|im_end|>, and lengths (2B,): the reward model reads the score at length - 1."""
        ids = [self.pairs[r][0] + self.pairs[r][side] for side in (1, 2) for r in rows]
        lengths = torch.tensor([len(x) for x in ids] or [0, 0])
        return collate([[(x, x)] for x in ids] or [[([self.pad_id], [self.pad_id])]] * 2, self.pad_id)[0], lengths
