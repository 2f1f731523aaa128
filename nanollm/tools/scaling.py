"""A scaling law from five small models, and its prediction of a sixth, larger one, beside what that one then reaches.

    bash runs/scaling.sh                                    makes the demo's token files if need be and calls this
    python -m nanollm.tools.scaling --out_dir out/scaling   trains, fits, predicts, checks; a table, a JSON and a picture

Every model reads the same tokens with the same recipe; only its width changes. N counts the parameters without the
embedding, which give the cleaner law (Kaplan et al. 2020, arXiv:2001.08361, section 3.2). The fits see the five only.
"""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from nanollm import world
from nanollm.checkpoint import find
from nanollm.config import UserError, arg, run
from nanollm.data import TokenFile, tokenizer_of
from nanollm.model import ModelArgs, Transformer, parameter_count


@dataclass
class Config:
    data: str = arg("out/demo/tokens", "directory of token files")
    preset: str = arg("configs/scaling/pretrain.toml", "the recipe of all models: a preset of train_pretrain.py")
    out_dir: str = arg("out/scaling", "where the runs, scaling.json and scaling.png go")
    sizes: list = arg(["2x16", "2x24", "2x40", "2x56", "2x88"], "the models the laws are fitted to, each LAYERSxWIDTH")
    predict: str = arg("2x128", "the larger model whose loss is predicted, and then trained")
    beside: list = arg([], "more shapes to train and show, not fitted: other depths at about the same number of parameters")
    max_steps: int = arg(0, "updates of each run; 0 = as the preset says")
    jobs: int = arg(0, "runs at the same time, one thread each; 0 = as many as there are cores")
    image: str = arg("", "the PNG to write; empty = OUT_DIR/scaling.png")


def train(cfg, shapes, threads=1):
    """Run train_pretrain.py once for each "LAYERSxWIDTH", --jobs at a time, and return {shape: (N, validation loss)}. Finished
    runs are not made again. Heads are 8 wide. Raises UserError when a run fails."""
    waiting, running, results = sorted(shapes, key=lambda s: -size_of(s)), {}, {}
    jobs = (cfg.jobs or os.cpu_count() or 1) if threads == 1 else 1
    while waiting or running:
        while waiting and len(running) < jobs:
            shape = waiting.pop(0)
            layers, dim = (int(n) for n in shape.split("x"))
            out = Path(cfg.out_dir) / shape
            out.mkdir(parents=True, exist_ok=True)
            words = ["train_pretrain.py", "--config", cfg.preset, "--data", cfg.data, "--out_dir", str(out), "--resume", "auto",
                     "--n_layers", str(layers), "--dim", str(dim), "--n_heads", str(dim // 8), *(["--max_steps", str(cfg.max_steps)] if cfg.max_steps else [])]
            env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            with open(out / "log.txt", "w", encoding="utf-8") as log:
                running[shape] = subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=env), time.time()
        time.sleep(0.2)
        for shape, (process, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[shape]
            out = Path(cfg.out_dir) / shape
            if process.returncode:
                for other, _ in running.values():
                    other.terminate()
                raise UserError(f"the run {out} failed: {(out / 'log.txt').read_text(encoding='utf-8').strip().splitlines()[-1]}")
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
            args = ModelArgs(**json.loads((find(out) / "meta.json").read_text(encoding="utf-8"))["model"])
            with torch.device("meta"):
                n = parameter_count(Transformer(args))
            results[shape] = (n["attention"] + n["feed_forward"] + n["norm"], [r["val/loss"] for r in records if "val/loss" in r][-1])
            N, loss = results[shape]
            print(f"{shape:>6}  N {N:>8,} (all {n['total']:>8,})   validation loss {loss:.4f}   {time.time() - began:.0f} s", flush=True)
    return results


def size_of(shape):
    """Layers times width squared of "2x88": what the number of parameters goes by. Raises UserError for another form."""
    layers, x, dim = shape.partition("x")
    if not (x and layers.isdigit() and dim.isdigit() and int(dim) % 8 == 0 and int(layers) * int(dim)):
        raise UserError(f"a size is LAYERSxWIDTH with a width that 8 divides, as 2x64, not {shape!r}")
    return int(layers) * int(dim) ** 2


def power_law(n, loss, floor=None):
    """Fit L = E + A N^-alpha: (E, A, alpha). With the floor given E is that, and the rest is a line in log-log. Otherwise
    alpha is sought on a grid; for each, E and A follow from least squares of the relative errors (E never below 0)."""
    n, loss = np.asarray(n, float), np.asarray(loss, float)
    if floor is not None:
        slope, intercept = np.polyfit(np.log(n), np.log(loss - floor), 1)
        return floor, math.exp(intercept), -slope
    best = None
    for alpha in np.arange(0.02, 2, 0.002):
        x = n ** -alpha
        (e, a), *_ = np.linalg.lstsq(np.stack([1 / loss, x / loss], 1), np.ones_like(loss), rcond=None)
        if e < 0:
            e, a = 0.0, float(np.sum(x / loss) / np.sum((x / loss) ** 2))
        error = float(np.sum(((e + a * x) / loss - 1) ** 2))
        if best is None or error < best[0]:
            best = error, float(e), float(a), float(alpha)
    return best[1:]


def laws(points, floor=None):
    """{name: (N -> L, what was fitted)} of the laws compared, fitted to points [(N, loss)]. `floor`: the known entropy of the text."""
    n, loss = zip(*points)
    E, A, alpha = power_law(n, loss)
    found = {"L = E + A N^-alpha": (lambda N: E + A * N ** -alpha, {"E": E, "A": A, "alpha": alpha})}
    if floor is not None and floor < min(loss):
        _, B, beta = power_law(n, loss, floor)
        found["E = the entropy floor"] = (lambda N: floor + B * N ** -beta, {"E": floor, "A": B, "alpha": beta})
    slope, start = np.polyfit(np.log(n), loss, 1)
    found["L = a - b ln N"] = (lambda N: start + slope * math.log(N), {"a": float(start), "b": float(-slope)})
    return found


def r2(law, points):
    """Share of the losses' variance that the law explains."""
    loss = np.array([y for _, y in points])
    return 1 - float(np.sum((loss - [law(n) for n, _ in points]) ** 2) / np.sum((loss - loss.mean()) ** 2))


def floor_of(data):
    """The exact entropy of the validation documents in nats a token, or None when they are not of the demo world."""
    tok = tokenizer_of(data)
    val = TokenFile(data, "val", 64, "documents", tok.hash)
    nats, n_tokens, ends = 0.0, 0, val.ends[:].tolist()
    for a, b in zip([0, *ends], ends):
        parsed = world.parse(tok.decode(val.tokens[a : b - 1].tolist()))              # without the EOS, which tells nothing new
        if parsed is None:
            return None
        nats, n_tokens = nats + sum(span[3] for span in parsed.spans), n_tokens + b - a
    return nats / n_tokens


def picture(path, points, sixth, beside, found, floor):
    """Losses against N with the fitted laws; left as they are, right above the floor, where a power law is a straight line."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(12, 5), layout="constrained")
    axes = fig.subplots(1, 2 if floor is not None else 1, squeeze=False)[0]
    N = np.geomspace(min(n for n, _ in points) / 1.3, sixth[0] * 1.6, 200)
    for ax, below in zip(axes, (0.0, floor)):
        for i, (name, (law, _)) in enumerate(found.items()):
            y = np.array([law(n) - below for n in N])
            ax.plot(N, np.where(y > 0, y, np.nan), color=f"C{i}", lw=1.2, label=name, ls=("-", "--", ":")[i])
        ax.plot(*zip(*[(n, y - below) for n, y in points]), "ko", label="fitted to")
        for k, (n, y) in enumerate(beside):
            ax.plot(n, y - below, "^", color="grey", label="other depths" if k == 0 else None)
        ax.plot(sixth[0], sixth[1] - below, "*", color="C3", ms=15, label="predicted, then trained")
        ax.set(xscale="log", xlabel="parameters without the embedding")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_title("validation loss, nats a token")
    axes[0].legend()
    if floor is not None:
        axes[0].axhline(floor, color="green", lw=0.8)
        axes[0].text(N[0], floor, "entropy floor", color="green", va="bottom")
        axes[1].set(yscale="log", title="validation loss above the entropy floor")
    fig.savefig(path, dpi=100)


def main(cfg):
    try:
        import matplotlib  # noqa: F401  before minutes of training, not after
    except ImportError:
        raise UserError('the picture needs matplotlib: pip install -e ".[plot]"') from None
    if len(cfg.sizes) < 3 or size_of(cfg.predict) <= max(map(size_of, cfg.sizes)):
        raise UserError("--sizes wants at least three models, and --predict one that is larger than all of them")
    began, floor = time.time(), floor_of(cfg.data)
    trained = train(cfg, cfg.sizes + cfg.beside)
    points = sorted(trained[s] for s in cfg.sizes)
    found = laws(points, floor)
    with torch.device("meta"):                       # the sixth model's N is known before it is trained
        of_first = ModelArgs(**json.loads((find(Path(cfg.out_dir) / cfg.sizes[0]) / "meta.json").read_text(encoding="utf-8"))["model"])
        layers, dim = (int(n) for n in cfg.predict.split("x"))
        shape = {"n_layers": layers, "dim": dim, "n_heads": dim // 8, "n_kv_heads": dim // 8, "head_dim": 8}
        n = parameter_count(Transformer(ModelArgs(**asdict(of_first) | shape)))
        N = n["attention"] + n["feed_forward"] + n["norm"]
    print(f"\npredictions for {cfg.predict}, N {N:,}, before it is trained:")
    for name, (law, parts) in found.items():
        print(f"  {name:<24} {law(N):.4f}   ({', '.join(f'{k} {v:.4g}' for k, v in parts.items())}; R2 {r2(law, points):.4f})", flush=True)
    sixth = train(cfg, [cfg.predict], threads=os.cpu_count() or 1)[cfg.predict]
    print("\nerror of each prediction:")
    result = {"points": {s: {"N": trained[s][0], "loss": trained[s][1]} for s in cfg.sizes}, "floor": floor,
              "sixth": {"shape": cfg.predict, "N": sixth[0], "loss": sixth[1]},
              "beside": {s: {"N": trained[s][0], "loss": trained[s][1]} for s in cfg.beside}, "laws": {}}
    for name, (law, parts) in found.items():
        error = law(N) / sixth[1] - 1
        result["laws"][name] = {**parts, "r2": r2(law, points), "prediction": law(N), "error": error}
        print(f"  {name:<24} {law(N):.4f} against {sixth[1]:.4f}: {100 * error:+.1f} %")
    result["seconds"] = round(time.time() - began, 1)
    image = Path(cfg.image or Path(cfg.out_dir) / "scaling.png")
    picture(image, points, sixth, [trained[s] for s in cfg.beside], found, floor)
    (Path(cfg.out_dir) / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{image} and {cfg.out_dir}/scaling.json, {result['seconds']:.0f} s in all")


if __name__ == "__main__":
    run(main, Config, __doc__)
