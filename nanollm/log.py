"""metrics.jsonl, and its views: the console line and TensorBoard."""
import json
import math
import sys
import time
from pathlib import Path

from nanollm.config import UserError


def clock(seconds):
    """90 -> '1:30', 3700 -> '1:01:40'."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def kept(line, step):
    """Is this line of metrics.jsonl still true for a run that goes on from `step`? Later steps will be made again."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False                                         # the half line of a killed process


class Logger:
    """Appends each record to OUT/metrics.jsonl and prints a line with an ETA; silent on ranks other than 0.

    Every record has "step" and "time", the seconds that the run has worked, over all its resumes. What was written after
    the step of a resume is dropped, because those steps are made again. Non-finite numbers are written as null, so that
    every line stays valid JSON.
    """

    def __init__(self, out_dir, main, at, max_steps, tensorboard=False):
        self.main, self.max_steps, self.tensorboard, self.board = main, max_steps, tensorboard, None
        self.path = Path(out_dir) / "metrics.jsonl"
        if main:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"--out_dir {out_dir} cannot be made or written: {e.strerror}; choose another directory") from None
            if at.step >= max_steps:
                print(f"nothing left to do: all {max_steps} updates are made; a larger --max_steps with --override_schedule goes on", flush=True)
        self.rewind(at)

    def rewind(self, at):
        """Begin, or begin again, at the step where the run stands."""
        now = time.time()
        self.start, self.resumed, self.began = at.step, now, now - at.seconds
        self.mark_time, self.mark_tokens, self.drawn = now, at.tokens, 0.0
        if self.main and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")      # the last may be cut inside a character
            fresh = at.step == 0 and at.evaluated < 0
            whole = "".join(line + "\n" for line in lines if not fresh and kept(line, at.step))
            aside = self.path.with_suffix(".tmp")
            aside.write_text(whole, encoding="utf-8")
            aside.replace(self.path)
        if self.main and self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs TensorBoard: pip install -e '.[tensorboard]'") from None
            if self.board:
                self.board.close()
            self.board = SummaryWriter(self.path.parent / "tensorboard", purge_step=at.step + 1 if at.step else None)

    def seconds(self):
        return time.time() - self.began

    def tokens_per_s(self, tokens):
        """Tokens a second since the last call; `tokens` is the running total of this process group."""
        now = time.time()
        rate = (tokens - self.mark_tokens) / max(now - self.mark_time, 1e-9)
        self.mark_time, self.mark_tokens = now, tokens
        return rate

    def eta(self, step):
        return clock((time.time() - self.resumed) / max(step - self.start, 1) * (self.max_steps - step))

    def write(self, step, record):
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "time": round(self.seconds(), 2), **record}, ensure_ascii=False) + "\n")

    def event(self, step, text, **more):
        """Something that happened once: a line of its own on the screen and, with all of `more`, in the file."""
        if self.main:
            self.write(step, {"event": text, **more})
            self.line(f"step {step}: {text}" + "".join(f"; {k} {str(v)[:60]}{'…' * (len(str(v)) > 60)}" for k, v in more.items()))

    def line(self, text):
        """Print, in the place of the live line if there is one."""
        print(("\r\033[K" if self.drawn else "") + text, flush=True)

    def live(self, at):
        """On a terminal: where the run is between two lines of the log."""
        if self.main and sys.stdout.isatty() and time.time() - self.drawn > 0.5:
            self.drawn = time.time()
            print(f"\rstep {at.step}/{self.max_steps} | eta {self.eta(at.step)} ", end="", flush=True)

    def __call__(self, step, metrics):
        if not self.main:
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in metrics.items()}
        self.write(step, clean)
        parts = [f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}"]
        for k, v in metrics.items():
            if k != "samples":
                k = k.removeprefix("train/")
                parts.append(f"{k} {v:,.0f}" if k == "tokens_per_s" else f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}")
                if self.board:
                    self.board.add_scalar(k if "/" in k else f"train/{k}", v, step)
        if step > self.start:
            parts.append(f"eta {self.eta(step)}")
        self.line(" | ".join(parts))
        self.samples(step, metrics.get("samples", []))

    def samples(self, step, samples):
        """Texts that the model has written: [{"prompt", "text"}]."""
        for sample in samples if self.main else []:
            print(f"    {sample['prompt']!r} -> {sample['text']!r}", flush=True)
            if self.board:
                self.board.add_text(sample["prompt"], sample["text"], step)
