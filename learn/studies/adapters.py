"""Every adapter on the same task, and full fine-tuning beside them: trained numbers, memory, seconds, right answers.

    bash runs/speedrun.sh                                        once: the base, out/demo/pretrain, and the demo's chats
    python -m learn.studies.adapters                         14 methods, each at three learning rates, 300 updates a run
    python -m learn.studies.adapters --arms full lora prompt --steps 200 --factors 1

Each run is train_sft.py in a process of its own, with the same chats in the same order; only --peft and the rate differ. Chats
are not packed, since virtual tokens want a row for each. --format raw: the base has never seen the chat tokens, and a frozen
embedding never will. Of each method's runs the one with the lowest validation loss counts. Memory is the process's peak above
its imports, seconds are of processor time. It prints the table of docs/peft.md and writes it to --out as JSON.
"""
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))     # the scripts stand in the repository's root

import train_sft
from nanollm import checkpoint, env, evaluation, peft, world
from nanollm.config import UserError, arg, parse, run
from nanollm.data import read_rows, to_messages

ARMS = {                                                 # --peft, the middle one of the rates: a small model wants larger ones than docs/peft.md's
    "full": ("", 2e-3), "lora": ("lora", 3e-3), "rslora": ("rslora", 1e-3), "dora": ("dora", 3e-3), "qlora": ("qlora", 3e-3),
    "adalora": ("adalora", 1e-2), "adapter": ("adapter", 3e-3), "ia3": ("ia3", 3e-2), "bitfit": ("bitfit", 1e-2), "prefix": ("prefix", 3e-3),
    "ptuning_v2": ("ptuning_v2", 3e-2), "prompt": ("prompt", 3e-2), "ptuning mlp": ("ptuning", 1e-3), "ptuning lstm": ("ptuning:network=lstm", 3e-3),
}


@dataclass
class Config:
    init_from: str = arg("out/demo/pretrain", "the pretrained base")
    data: str = arg("out/demo/raw", "directory of chat_train.jsonl and chat_val.jsonl of the demo world")
    steps: int = arg(300, "updates of each run, of 16 chats", least=1)
    questions: int = arg(420, "held-out questions to answer", least=1)
    factors: list = arg(["0.33", "1", "3"], "each method is tried at its rate times these")
    seed: int = arg(0, "order of the chats and start of the adapters")
    arms: list = arg(list(ARMS), "which methods")
    out: str = arg("out/adapters.json", "the table; empty = none")
    one: str = arg("", "used by itself: ARM FACTOR FILE, one run in this process")


def one(cfg, arm, factor, path):
    """One run, and what is to be known of it, into the file `path`."""
    method, rate = ARMS[arm]
    rate, before, began = rate * float(factor), env.peak_rss_mb(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--init_from", cfg.init_from, "--data", f"{cfg.data}/chat_train.jsonl", "--val_data", f"{cfg.data}/chat_val.jsonl", "--out_dir", folder,
                 "--max_steps", str(cfg.steps), "--eval_every", str(cfg.steps), "--save_every", str(cfg.steps), "--log_every", str(cfg.steps),
                 "--batch_size", "16", "--no_pack", "--format", "raw", "--learning_rate", str(rate), "--min_lr", str(rate / 10), "--seed", str(cfg.seed),
                 "--device", "cpu", *(["--peft", method] if method else [])]
        train_sft.main(parse(train_sft.Config, words))
        memory, seconds = env.peak_rss_mb() - before if before else 0.0, time.process_time() - began
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        model, tok, meta = checkpoint.load(folder, merge=False)
    rows = [row for _, row in read_rows([f"{cfg.data}/chat_val.jsonl"])][: cfg.questions]
    score = evaluation.exact_match(rows, evaluation.answers(model, tok, [to_messages(row)[:-1] for row in rows]), world.correct)
    fresh = checkpoint.load(cfg.init_from)[0]
    if method:                                           # as it was while it trained: of a prefix's network only the output is left
        peft.add_adapter(fresh, **peft.of_meta(meta)[0])
    trained = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
    kept = sum(v.numel() for k, v in peft.adapter_state_dict(model).items() if not any(w in k for w in peft.AVERAGES)) if method else trained
    Path(path).write_text(json.dumps({"arm": arm, "rate": rate, "trained": trained, "memory_mb": memory, "seconds": seconds,
                                      "val_loss": records[-1]["val/loss"], "exact_match": score["exact_match"], "stderr": score["stderr"],
                                      "kept": kept}), encoding="utf-8")


def main(cfg):
    if cfg.one:
        return one(cfg, *cfg.one.split("|"))
    if unknown := [a for a in cfg.arms if a not in ARMS]:
        raise UserError(f"--arms {unknown[0]!r} is unknown; choose from: {'; '.join(ARMS)}")
    rows = []
    for arm in cfg.arms:
        runs = []
        for factor in cfg.factors:
            with tempfile.TemporaryDirectory() as folder:
                path, log = f"{folder}/run.json", Path(folder) / "log"
                words = [f"--{k}={getattr(cfg, k)}" for k in ("init_from", "data", "steps", "questions", "seed")]
                with contextlib.closing(open(log, "w", encoding="utf-8")) as f:
                    code = subprocess.run([sys.executable, "-m", "learn.studies.adapters", f"--one={arm}|{factor}|{path}", *words], stdout=f, stderr=f).returncode
                if code:
                    raise UserError(f"{arm} failed: {log.read_text(encoding='utf-8').strip()[-300:]}")
                runs.append(json.loads(Path(path).read_text(encoding="utf-8")))
            print("{arm:<13} rate {rate:.1e}  val/loss {val_loss:.4f}  exact match {exact_match:.3f}  {seconds:.0f} s".format(**runs[-1]), flush=True)
        rows.append(min(runs, key=lambda r: r["val_loss"]))
    print("\n| method | trained | of all | kept | rate | peak memory, MB | seconds | val/loss | exact match |\n|---|---|---|---|---|---|---|---|---|")
    whole = sum(p.numel() for p in checkpoint.load(cfg.init_from)[0].parameters())
    for r in rows:
        print(f"| {r['arm']} | {r['trained']:,} | {r['trained'] / whole:.2%} | {r['kept']:,} | {r['rate']:.1e} | {r['memory_mb']:.0f} | {r['seconds']:.0f} | {r['val_loss']:.3f} "
              f"| {r['exact_match']:.3f} ± {r['stderr']:.3f} |")
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out).write_text(json.dumps({"runs": rows, **env.stamp()}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, Config, __doc__)
