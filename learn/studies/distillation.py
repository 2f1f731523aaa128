"""Does a teacher help? A student of half the demo model's size, with and without it, at equal steps, three seeds each.

    bash runs/speedrun.sh                                        once: the teacher, out/demo/pretrain, and its token files
    python -m learn.studies.distillation                     12 runs of 400 updates
    python -m learn.studies.distillation --steps 1600 --seeds 5

Each run is train_pretrain.py with the demo's settings and a narrower model; only the flags of the arm differ. It prints the
validation loss (of the text, without the teacher) at the end, mean and standard deviation over the seeds, the difference to the
text alone seed by seed, and the seconds of training, and draws the curves (matplotlib).
"""
import contextlib
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))     # the scripts stand in the repository's root

import train_pretrain
from nanollm import checkpoint
from nanollm.config import UserError, arg, parse, run
from nanollm.model import parameter_count

ARMS = {"text alone": {}, "forward, T 1": {"kd_temperature": 1.0}, "forward, T 2": {"kd_temperature": 2.0},
        "reverse, T 1": {"kd_kind": "reverse", "kd_temperature": 1.0}}


@dataclass
class Config:
    teacher: str = arg("out/demo/pretrain", "the pretrained teacher")
    data: str = arg("out/demo/tokens", "token files, made with the teacher's tokenizer")
    dim: int = arg(80, "the student's width; 80 gives 46 % of the demo model's parameters", least=4)
    steps: int = arg(400, "updates of each run, a multiple of 4", least=4)
    seeds: int = arg(3, "runs of each arm", least=2)
    arms: list = arg(list(ARMS), "which of them")
    out: str = arg("out/distillation.png", "the picture; empty = none")


def train(cfg, arm, seed, folder):
    """One run; returns ([(update, validation loss)], seconds, parameters)."""
    words = ["--config", "configs/demo/pretrain.toml", "--data", cfg.data, "--out_dir", folder, "--dim", str(cfg.dim), "--seed", str(seed),
             "--max_steps", str(cfg.steps), "--eval_every", str(cfg.steps // 4), "--log_every", str(cfg.steps), "--save_every", str(cfg.steps)]
    options = {"teacher": cfg.teacher, **ARMS[arm]} if ARMS[arm] else {}
    with open(f"{folder}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        train_pretrain.main(parse(train_pretrain.Config, words + [f"--{key}={value}" for key, value in options.items()]))
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(r["step"], r["val/loss"]) for r in records if "val/loss" in r]
    print(f"{arm}, seed {seed}: {curve[-1][1]:.4f} after {records[-1]['time']:.0f} s", flush=True)
    return curve, records[-1]["time"], parameter_count(checkpoint.load(folder)[0])["total"]


def draw(curves, path):
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib, or --out= for none") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.figure(figsize=(7, 4))
    for k, (arm, runs) in enumerate(curves.items()):
        steps, loss = np.array(runs[0])[1:, 0], np.array(runs)[:, 1:, 1]
        plt.errorbar(steps + k * steps[-1] / 300, loss.mean(0), loss.std(0, ddof=1), label=arm, capsize=2, linewidth=1)
    plt.xlabel("update")
    plt.ylabel("validation loss (nats)")
    plt.legend()
    plt.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=90)
    print(f"-> {path}")


def main(cfg):
    if cfg.steps % 4 or not set(cfg.arms) <= set(ARMS):
        raise UserError(f"--steps {cfg.steps} must be a multiple of 4, --arms some of: {'; '.join(ARMS)}")
    curves, lines = {}, []
    for arm in cfg.arms:
        with tempfile.TemporaryDirectory() as folder:
            runs = [train(cfg, arm, seed, f"{folder}/{seed}") for seed in range(cfg.seeds)]
        curves[arm] = [curve for curve, _, _ in runs]
        ends = [[c[-1][1] for c in curves[arm]], [a[-1][1] - b[-1][1] for a, b in zip(curves[arm], curves[cfg.arms[0]])], [s for _, s, _ in runs]]
        shown = ["{:.4f} ± {:.4f}".format(statistics.mean(x), statistics.stdev(x)) for x in ends]
        lines.append(f"{arm:<13} end {shown[0]}   minus {cfg.arms[0]}, seed by seed {shown[1]}   seconds {shown[2]}")
    print(f"\nstudent of {runs[0][2]:,} parameters, teacher of {parameter_count(checkpoint.load(cfg.teacher)[0])['total']:,}; "
          f"{cfg.steps} updates, {cfg.seeds} seeds\n" + "\n".join(lines))
    if cfg.out:
        draw(curves, cfg.out)


if __name__ == "__main__":
    run(main, Config, __doc__)
