"""Pairs a second of train_dpo.py's update beside trl's DPOTrainer: same pairs, token ids, shape, maximum length, effective batch.

    python bench/dpo.py --data DIR/dpo_en.json

Both sides read the same token ids (PreferenceRows cuts what is too long), start from the same shape, use fused AdamW and clip. The passes
through the reference are counted on both sides: it is a frozen copy that every update asks. "precomputed": on both sides it has been asked
for all pairs before the clock starts. trl draws its rows at random; ours lie beside rows of like length (--by_length false: at random, too).
"prompts in place": our update without reading prompts once for both answers.

Every row of the table is a process of its own, in turns (A B C A B C …); ratios are medians of the rounds' own. Timed are whole updates
after the warmup, with all that either side does in between but for evaluation and saving.
"""
import copy
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
from nanollm import dist, env, pairs, tokenizer
from nanollm.config import UserError, arg, run
from nanollm.corpus.bpe import train_bpe
from nanollm.data import PreferenceRows, read_rows, to_preference
from nanollm.losses import IGNORE_INDEX
from nanollm.mixture import ByLength
from nanollm.model import ModelArgs, Transformer
from nanollm.optim import make_optimizer, update
from nanollm.sampler import Sampler

SIDES = ["ours", "ours, prompts in place", "trl", "ours, precomputed", "trl, precomputed"]
RATIOS = [("ours", "trl"), ("ours, precomputed", "trl, precomputed"), ("ours", "ours, prompts in place")]


@dataclass
class Config:
    data: list = arg([], "preference files")
    sides: list = arg([], f"rows: {' | '.join(SIDES)}; none = all")
    vocab_size: int = arg(6400, "the BPE that is trained on the pairs")
    dim: int = arg(256, "width")
    n_layers: int = arg(6, "blocks")
    n_heads: int = arg(8, "heads")
    seq_len: int = arg(512, "maximum length of prompt and answer", unit="tokens")
    batch_size: int = arg(4, "pairs a micro-batch", least=1)
    accumulation: int = arg(4, "micro-batches an update", least=1)
    updates: int = arg(8, "timed updates in each process; a multiple of 8 is whole windows of rows of like length", least=1)
    warmup: int = arg(2, "updates before the clock starts", least=1)
    by_length: bool = arg(True, "ours lays rows of like length together, as train_dpo.py does")
    rounds: int = arg(3, "processes for each row", least=1)
    threads: int = arg(2, "CPU threads", least=1)
    out: str = arg("out/bench/dpo.json", "records and table")
    worker: str = arg("", "used by the script itself: measure this one row and print JSON")


def ours(cfg, tok, rows, precomputed):
    """Seconds of every update: the loop of train_dpo.py without log, evaluation and checkpoints."""
    import train_dpo
    model = Transformer(ModelArgs(dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads, vocab_size=tok.vocab_size, max_seq_len=cfg.seq_len)).eval()
    ctx, options, reference = dist.init("cpu"), train_dpo.Config(), None
    if precomputed:
        pairs.precompute(model, rows, ctx, torch.no_grad, torch.float32, cfg.batch_size, Path(cfg.out).parent / "reference")
    else:
        reference = copy.deepcopy(model).requires_grad_(False)
    sampler = Sampler(len(rows), ctx, cfg.batch_size, cfg.accumulation, 0)
    if cfg.by_length:
        sampler.order = ByLength(sampler, rows.lengths(), 0)
    optimizer = make_optimizer(model, "adamw", 1e-5, 0.0)
    scaler, seconds, said = torch.amp.GradScaler("cpu", enabled=False), [], 0.0
    for step in range(cfg.warmup + cfg.updates):
        began = time.perf_counter()
        batches = [rows.batch(r) for r in sampler.micro_batches(step)]
        count = sum((targets != IGNORE_INDEX).any(1).sum() for _, targets, *_ in batches) // 2
        loss = torch.zeros(())
        for batch in batches:
            loss_sum, _, metrics = train_dpo.preference_loss(model, reference, options, *batch)
            (loss_sum / count).backward()
            loss += loss_sum.detach()
            said += float(metrics["margin"])                 # trl reads its metrics at every micro-batch, too
        update(model, optimizer, scaler, 1.0, loss)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


def trls(cfg, tok, rows, precomputed):
    """The same of trl's trainer, in its own random order."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer as HFTokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from nanollm.foreign_tokenizers import to_hf_json
    theirs = PreTrainedTokenizerFast(tokenizer_object=HFTokenizer.from_str(json.dumps(to_hf_json(tok))), eos_token="<|im_end|>", pad_token="<|pad|>")
    theirs.chat_template = tokenizer.CHAT_TEMPLATE
    data = Dataset.from_list([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows.pairs])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tok.vocab_size, hidden_size=cfg.dim, intermediate_size=32 * -(-int(8 * cfg.dim / 3) // 32), num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, max_position_embeddings=cfg.seq_len, tie_word_embeddings=True))
    ends = []

    class Tokenized(DPOTrainer):                             # the rows are ids already
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as scratch:
        Tokenized(model=model, ref_model=copy.deepcopy(model), processing_class=theirs, train_dataset=data, callbacks=[Clock()], args=DPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, optim="adamw_torch_fused", learning_rate=1e-5, lr_scheduler_type="constant", max_grad_norm=1.0, max_length=cfg.seq_len,
            beta=0.1, precompute_ref_log_probs=precomputed, per_device_train_batch_size=cfg.batch_size, gradient_accumulation_steps=cfg.accumulation,
            max_steps=cfg.warmup + cfg.updates)).train()
    return [end - begin for begin, end in zip(ends, ends[1:])]


def usable(cfg):
    """(where, row) of all files, without those that cannot be used."""
    rows = []
    for where, row in read_rows(cfg.data):
        try:
            to_preference(row)
            rows.append((where, row))
        except ValueError:
            pass
    return rows


def measure(cfg, side):
    """One row in this process -> a record as JSON on stdout."""
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    stdout, sys.stdout = sys.stdout, sys.stderr              # what a library prints is no result
    tok = tokenizer.load(Path(cfg.out).parent / "dpo_tokenizer")
    rows = PreferenceRows(usable(cfg), tok, cfg.seq_len, cut_answers=True, share="in place" not in side, tight=True)
    seconds = (ours if side.startswith("ours") else trls)(cfg, tok, rows, "precomputed" in side)[cfg.warmup:]
    mean = sum(seconds) / len(seconds)
    print(json.dumps({"side": side, "pairs_per_s": cfg.batch_size * cfg.accumulation / mean, "seconds_an_update": mean, "peak_rss_mb": env.peak_rss_mb()}),
          file=stdout)


def main(cfg):
    if not cfg.data:
        raise UserError("--data names no preference file")
    if cfg.worker:
        return measure(cfg, cfg.worker)
    need("transformers", "trl")
    sides = cfg.sides or SIDES
    if unknown := [s for s in sides if s not in SIDES]:
        raise UserError(f"--sides {unknown[0]!r} is unknown; use {', '.join(map(repr, SIDES))}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pattern = tokenizer.pattern_for(cfg.vocab_size)
    texts = [text for _, row in usable(cfg) for text in (to_preference(row)[1], to_preference(row)[2])]
    tok = tokenizer.bpe_tokenizer(train_bpe(texts, cfg.vocab_size, pattern), pattern)
    tok.save(out.parent / "dpo_tokenizer")
    words = [w for f in dataclasses.fields(cfg) if f.name not in ("data", "sides", "rounds", "worker") for w in (f"--{f.name}", str(getattr(cfg, f.name)))]
    records = []
    for i in range(cfg.rounds):
        for side in sides:
            child = subprocess.run([sys.executable, __file__, "--worker", side, "--data", *cfg.data, *words], stdout=subprocess.PIPE, encoding="utf-8",
                                   env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads)})
            if child.returncode:
                raise UserError(f"{side}: failed with code {child.returncode}; what it said stands above")
            records.append(json.loads(child.stdout.splitlines()[-1]) | {"round": i})
            print(f"round {i + 1}, {side}: {records[-1]['pairs_per_s']:.2f} pairs/s", flush=True)
    rate = {(r["side"], r["round"]): r["pairs_per_s"] for r in records}
    mid = lambda side, key: median(r[key] for r in records if r["side"] == side)
    ratios = {f"{a} / {b}": median(rate[a, i] / rate[b, i] for i in range(cfg.rounds)) for a, b in RATIOS if a in sides and b in sides}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    how = {**{k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("data", "out", "worker", "sides")}, **env.stamp(), **versions,
           "data": [Path(p).name for p in cfg.data]}
    print("\n| | pairs/s | s an update | peak RSS, MB |\n|---|---|---|---|")
    for side in sides:
        print(f"| {side} | {mid(side, 'pairs_per_s'):.2f} | {mid(side, 'seconds_an_update'):.2f} | {mid(side, 'peak_rss_mb'):.0f} |")
    print("\n| ratio | median of the rounds |\n|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.2f} |")
    out.write_text(json.dumps({"setting": how, "records": records, "ratios": ratios}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
