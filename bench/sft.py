"""Supervised tokens a second of train_sft.py's update beside trl's SFTTrainer: same chats, tokens, shape, maximum length, effective batch.

    python bench/sft.py --data DIR/alpaca_zh.json DIR/sharegpt_zh.jsonl

Both sides read the same token ids and labels (our template, exported; what is too long loses its end, trl's way), start from the same
shape, use fused AdamW and clip. With packing a row is --seq_len tokens of several chats, else one chat padded to the longest
beside it; --batch_size rows are a micro-batch, times --accumulation an update. trl lays the rows of a packed micro-batch end to end, and
without FlashAttention its mask has the square of them all, so it also runs with one row a micro-batch: the same update, kinder to it.

Every row of the table is a process of its own, in turns (A B C A B C …); ratios are medians of the rounds' own. Counted are the tokens that
carry loss, from the first to the last timed update, with all that either side does in between but for evaluation and saving.
"""
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.peers import need
from nanollm import dist, env, tokenizer
from nanollm.config import UserError, arg, run
from nanollm.corpus.bpe import train_bpe
from nanollm.data import ChatRows, fit_chat, read_rows, to_messages
from nanollm.model import ModelArgs, Transformer
from nanollm.losses import IGNORE_INDEX
from nanollm.mixture import ByLength
from nanollm.optim import make_optimizer, update
from nanollm.sampler import Sampler

SIDES = ["ours, packed", "trl, packed", "trl, packed, a row at a time", "ours, a chat a row", "trl, a chat a row"]
RATIOS = [("ours, packed", "trl, packed"), ("ours, packed", "trl, packed, a row at a time"), ("ours, a chat a row", "trl, a chat a row"),
          ("ours, packed", "trl, a chat a row")]


@dataclass
class Config:
    data: list = arg([], "chat files")
    sides: list = arg([], f"rows: {' | '.join(SIDES)}; none = all")
    vocab_size: int = arg(6400, "the BPE that is trained on the chats")
    dim: int = arg(256, "width")
    n_layers: int = arg(6, "blocks")
    n_heads: int = arg(8, "heads")
    seq_len: int = arg(512, "maximum length", unit="tokens")
    batch_size: int = arg(4, "rows a micro-batch", least=1)
    accumulation: int = arg(4, "micro-batches an update", least=1)
    updates: int = arg(3, "timed updates in each process", least=1)
    warmup: int = arg(1, "updates before the clock starts", least=1)
    rounds: int = arg(3, "processes for each row", least=1)
    threads: int = arg(2, "CPU threads", least=1)
    out: str = arg("out/bench/sft.json", "records and table")
    worker: str = arg("", "used by the script itself: measure this one row and print JSON")


def chats(cfg):
    """(where, row) of all files, without those that cannot be used."""
    rows = []
    for where, row in read_rows(cfg.data):
        try:
            to_messages(row)
            rows.append((where, row))
        except ValueError:
            pass
    return rows


def ours(cfg, tok, packed):
    """[(seconds, supervised tokens)] of every update: the loop of train_sft.py without log, evaluation and checkpoints."""
    import train_sft
    rows = ChatRows(chats(cfg), tok, cfg.seq_len - 1, packed, truncate="keep_start", max_bad=1.0)        # T - 1 inputs and the shift: T tokens
    model = Transformer(ModelArgs(dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads, vocab_size=tok.vocab_size, max_seq_len=cfg.seq_len))
    ctx = dist.init("cpu")
    sampler = Sampler(len(rows), ctx, cfg.batch_size, cfg.accumulation, 0)
    sampler.order = sampler.order if packed else ByLength(sampler, rows.lengths(), 0, window=1)
    optimizer = make_optimizer(model, "adamw", 2e-4, 0.0)
    scaler, measured = torch.amp.GradScaler("cpu", enabled=False), []
    model.train()
    for step in range(cfg.warmup + cfg.updates):
        began = time.perf_counter()
        batches = [rows.batch(r) for r in sampler.micro_batches(step)]
        count = sum((targets != IGNORE_INDEX).sum() for _, targets, _ in batches)
        loss = torch.zeros(())
        for batch in batches:
            loss_sum, _, _ = train_sft.sft_loss(model, *batch)
            (loss_sum / count).backward()
            loss += loss_sum.detach()
        update(model, optimizer, scaler, 1.0, loss)
        optimizer.zero_grad()
        measured.append((time.perf_counter() - began, int(count)))
    return measured


def trls(cfg, tok, packed, row_at_a_time):
    """The same of trl's trainer, from the rows as token ids and labels, in its own random order."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer as HFTokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from nanollm.foreign_tokenizers import to_hf_json
    theirs = PreTrainedTokenizerFast(tokenizer_object=HFTokenizer.from_str(json.dumps(to_hf_json(tok))), eos_token="<|im_end|>", pad_token="<|pad|>")
    theirs.chat_template = tokenizer.CHAT_TEMPLATE
    fitted = [f for _, row in chats(cfg) if (f := fit_chat(tok, to_messages(row), cfg.seq_len, "keep_start"))]
    data = Dataset.from_list([{"input_ids": ids, "labels": [i if m else IGNORE_INDEX for i, m in zip(ids, mask)]} for ids, mask in fitted])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tok.vocab_size, hidden_size=cfg.dim, intermediate_size=32 * -(-int(8 * cfg.dim / 3) // 32), num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, max_position_embeddings=cfg.seq_len, tie_word_embeddings=True))
    micro = (1, cfg.batch_size * cfg.accumulation) if row_at_a_time else (cfg.batch_size, cfg.accumulation)
    counted, ends = [], []

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            counted.append((len(ends), int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as scratch:
        Counting(model=model, processing_class=theirs, train_dataset=data, callbacks=[Clock()], args=SFTConfig(
            output_dir=scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, optim="adamw_torch_fused", learning_rate=2e-4, lr_scheduler_type="constant", max_grad_norm=1.0, max_length=cfg.seq_len,
            packing=packed, per_device_train_batch_size=micro[0], gradient_accumulation_steps=micro[1], max_steps=cfg.warmup + cfg.updates)).train()
    return [(end - begin, sum(n for k, n in counted if k == i)) for i, (begin, end) in enumerate(zip(ends, ends[1:]), 1)]


def measure(cfg, side):
    """One row in this process -> a record as JSON on stdout."""
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    stdout, sys.stdout = sys.stdout, sys.stderr              # what a library prints is no result
    tok = tokenizer.load(Path(cfg.out).parent / "sft_tokenizer")
    packed = "packed" in side
    timed = (ours(cfg, tok, packed) if side.startswith("ours") else trls(cfg, tok, packed, "row at a time" in side))[cfg.warmup:]
    sys.stdout = stdout
    seconds, tokens = map(sum, zip(*timed))
    print(json.dumps({"side": side, "supervised_per_s": tokens / seconds, "seconds_an_update": seconds / len(timed),
                      "supervised_an_update": tokens / len(timed), "peak_rss_mb": env.peak_rss_mb()}))


def main(cfg):
    if not cfg.data:
        raise UserError("--data names no chat file")
    if cfg.worker:
        return measure(cfg, cfg.worker)
    need("transformers", "trl")
    sides = cfg.sides or SIDES
    if unknown := [s for s in sides if s not in SIDES]:
        raise UserError(f"--sides {unknown[0]!r} is unknown; use {', '.join(map(repr, SIDES))}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pattern = tokenizer.pattern_for(cfg.vocab_size)
    texts = [m["content"] for _, row in chats(cfg) for m in to_messages(row)]
    tokenizer.bpe_tokenizer(train_bpe(texts, cfg.vocab_size, pattern), pattern).save(out.parent / "sft_tokenizer")
    words = [w for f in dataclasses.fields(cfg) if f.name not in ("data", "sides", "rounds", "worker") for w in (f"--{f.name}", str(getattr(cfg, f.name)))]
    records = []
    for i in range(cfg.rounds):
        for side in sides:
            child = subprocess.run([sys.executable, __file__, "--worker", side, "--data", *cfg.data, *words], stdout=subprocess.PIPE, encoding="utf-8",
                                   env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads)})
            if child.returncode:
                raise UserError(f"{side}: failed with code {child.returncode}; what it said stands above")
            records.append(json.loads(child.stdout.splitlines()[-1]) | {"round": i})
            print(f"round {i + 1}, {side}: {records[-1]['supervised_per_s']:.0f} supervised tokens/s", flush=True)
    rate = {(r["side"], r["round"]): r["supervised_per_s"] for r in records}
    mid = lambda side, key: median(r[key] for r in records if r["side"] == side)
    ratios = {f"{a} / {b}": median(rate[a, i] / rate[b, i] for i in range(cfg.rounds)) for a, b in RATIOS if a in sides and b in sides}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    how = {**{k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("data", "out", "worker", "sides")}, **env.stamp(), **versions,
           "data": [Path(p).name for p in cfg.data]}
    print("\n| | supervised tokens/s | supervised tokens an update | s an update | peak RSS, MB |\n|---|---|---|---|---|")
    for side in sides:
        print(f"| {side} | {mid(side, 'supervised_per_s'):.0f} | {mid(side, 'supervised_an_update'):.0f} | {mid(side, 'seconds_an_update'):.2f} | "
              f"{mid(side, 'peak_rss_mb'):.0f} |")
    print("\n| ratio | median of the rounds |\n|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.2f} |")
    out.write_text(json.dumps({"setting": how, "records": records, "ratios": ratios}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
