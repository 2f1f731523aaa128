"""metrics.jsonl and the console line: one dict a step, two views of it."""
import json
import math
import time
from pathlib import Path

from nanollm.config import UserError


def clock(seconds):
    """90 -> '1:30', 3700 -> '1:01:40'."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


class Logger:
    """Appends each record to OUT/metrics.jsonl and prints a line with an ETA; silent on ranks other than 0.

    On resume the lines written after the resumed step are dropped first: those steps will be made again.
    Non-finite numbers are written as null, so that every line stays valid JSON.
    """

    def __init__(self, out_dir, main, start_step, max_steps, tokens=0):
        self.main, self.start, self.max_steps, self.began = main, start_step, max_steps, time.time()
        self.path = Path(out_dir) / "metrics.jsonl"
        self.mark_time, self.mark_tokens = self.began, tokens
        if not main:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out_dir {out_dir} cannot be made or written: {e.strerror}; choose another directory") from None
        kept = []
        if start_step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= start_step and not (json.loads(line)["step"] == start_step and "val/loss" in line):
                        kept.append(line)
                except (ValueError, KeyError):
                    continue                             # the half line of a killed process
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def tokens_per_s(self, tokens):
        """Tokens a second since the last call; `tokens` is the running total of this process group."""
        now = time.time()
        rate = (tokens - self.mark_tokens) / max(now - self.mark_time, 1e-9)
        self.mark_time, self.mark_tokens = now, tokens
        return rate

    def __call__(self, step, metrics):
        if not self.main:
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in metrics.items()}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **clean}, ensure_ascii=False) + "\n")
        parts = [f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"]
        for k, v in metrics.items():
            if k != "samples":
                k = k.removeprefix("train/")
                parts.append(f"{k} {v:,.0f}" if k == "tokens_per_s" else f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}")
        if step > self.start:
            left = (time.time() - self.began) / (step - self.start) * (self.max_steps - step)
            parts.append(f"eta {clock(left)}")
        print(" | ".join(parts), flush=True)
        for sample in metrics.get("samples", []):
            print(f"    {sample['prompt']!r} -> {sample['text']!r}", flush=True)
