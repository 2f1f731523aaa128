"""One picture of several runs: loss against tokens and against time, learning rate, gradient norm, tokens a second.

    python -m nanollm.plot out/demo/pretrain                             writes out/demo/pretrain/plot.png
    python -m nanollm.plot out/a out/b out/c --out compare.png           three runs in one picture
    python -m nanollm.plot out/dpo --keys margin val/chosen_fall         a panel a metric: pale train/…, dots val/…, both if it is a bare name

Everything is read from OUT/metrics.jsonl; the picture is a view of it and can be made again at any time, also of a run that
is still going.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanollm.config import UserError, arg, run
from nanollm.log import clock


@dataclass
class Config:
    first = "runs"                                   # words before the first option
    runs: list = arg([], "run directories (or metrics.jsonl files); any number of them in one picture")
    out: str = arg("", "the PNG to write; empty = plot.png in the first run's directory")
    names: list = arg([], "what to call the runs, in their order; none = their directories' names")
    keys: list = arg([], "metrics to draw against updates instead, a panel each; a name without train/ or val/ is both")
    smooth: int = arg(1, "mean over so many records of the training loss and the gradient norm", unit="records", least=1)


def read(path):
    """The records of OUT/metrics.jsonl as columns: {"train": {key: array}, "val": {key: array}}, each with "step", "tokens" and
    "time" (seconds); "events": {"step", "tokens", "left out", "rollback"}, the last two 0 or 1; and "clock": whether the file tells
    the time. A half line of a killed process is left out.

    Evaluations carry no token count, and old files no time: tokens are interpolated by step, time is added up from
    tokens / tokens_per_s. Raises UserError without a usable file.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the --out_dir of a run that has logged something")
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            records += [record] if isinstance(record, dict) and isinstance(record.get("step"), int) else []
        except ValueError:
            continue
    split = {"train": [r for r in records if "train/loss" in r], "val": [r for r in records if "val/loss" in r]}
    if not any(split.values()):
        raise UserError(f"{path} holds no training record; a run writes one every --log_every updates")

    def column(rows, key):                           # a non-finite number was logged as null: a gap in the line
        return np.array([np.nan if not isinstance(r.get(key), (int, float)) else r[key] for r in rows], float)

    columns = {name: {key: column(rows, key) for key in ("step", f"{name}/loss", "lr", "grad_norm", "tokens", "tokens_per_s", "time")}
               for name, rows in split.items()}
    train, val = columns["train"], columns["val"]
    clocked = not np.isnan(np.concatenate([train["time"], val["time"]])).any()
    if not clocked:
        took = np.diff(train["tokens"], prepend=0) / train["tokens_per_s"]
        train["time"] = np.nancumsum(np.where(took > 0, took, np.nan))
    for key in ("tokens", "time"):
        if np.isnan(val[key]).any():
            known = ~np.isnan(train[key])
            steps, values = np.r_[0, train["step"][known]], np.r_[0, train[key][known]]
            val[key] = np.interp(val["step"], steps, values)
    happened = [r for r in records if isinstance(r.get("event"), str)]
    events = {word: np.array([word in r["event"] for r in happened], int) for word in ("left out", "rollback")}
    events["step"] = np.array([r["step"] for r in happened], float)
    known = ~np.isnan(train["tokens"])
    events["tokens"] = np.interp(events["step"], np.r_[0, train["step"][known]], np.r_[0, train["tokens"][known]])
    return {**columns, "events": events, "clock": clocked}


def smoothed(values, n):
    """The mean of each value and the n - 1 before it, gaps left out; the first ones of fewer."""
    return np.array([np.nanmean(part) if (part := values[max(0, i + 1 - n) : i + 1]).size and not np.isnan(part).all() else np.nan
                     for i in range(len(values))])


def picture(runs, smooth=1):
    """A matplotlib Figure of {name: what read() returns}. UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure         # without pyplot: no window system is asked for
        from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator
    except ImportError:
        raise UserError('the picture needs matplotlib: pip install -e ".[plot]"') from None
    fig = Figure(figsize=(15, 8), layout="constrained")
    (by_tokens, by_time, legend), (lr, norm, speed) = fig.subplots(2, 3)
    clocked = all(r["clock"] for r in runs.values())
    hours = max((float(t) for r in runs.values() for part in ("train", "val") for t in r[part]["time"][-1:]), default=0) > 2 * 3600
    unit, seconds = ("hours", 3600) if hours else ("minutes", 60)
    losses = []
    for i, (name, r) in enumerate(runs.items()):
        colour, train, val = f"C{i % 10}", r["train"], r["val"]
        loss = smoothed(train["train/loss"], smooth)
        losses += [*loss, *val["val/loss"]]
        for ax, key, scale in ((by_tokens, "tokens", 1), (by_time, "time", seconds)):
            ax.plot(train[key] / scale, loss, color=colour, alpha=0.35, lw=1)
            ax.plot(val[key] / scale, val["val/loss"], color=colour, marker="o", ms=3.5, lw=1.6)
        lr.plot(train["tokens"], train["lr"], color=colour)
        norm.plot(train["tokens"], smoothed(train["grad_norm"], smooth), color=colour, lw=1)
        speed.plot(train["tokens"], train["tokens_per_s"], color=colour, lw=1)
        events, ticks = r["events"], r["events"]["left out"] | r["events"]["rollback"] > 0
        for ax in (by_tokens, lr, norm) if ticks.any() else ():           # at the foot, one above the other for several runs
            ax.plot(events["tokens"][ticks], np.full(ticks.sum(), 0.015 + 0.02 * i), color=colour, ls="none", marker="|", ms=7, mew=1.4,
                    transform=ax.get_xaxis_transform())
        done = [f"{name}"]
        if len(val["val/loss"]) and not np.isnan(val["val/loss"]).all():
            best = int(np.nanargmin(val["val/loss"]))
            done += [f"    last validation loss {val['val/loss'][-1]:.4f}, lowest {val['val/loss'][best]:.4f} at step {val['step'][best]:,.0f}"]
        last = train if len(train["step"]) else val
        done += [f"    {last['step'][-1]:,.0f} updates, {last['tokens'][-1]:,.0f} tokens, {clock(last['time'][-1])}"]
        if ticks.any():
            done[-1] += f"; ticks: {events['left out'].sum()} left out, {events['rollback'].sum()} rollback(s)"
        legend.text(0, 1 - i / max(6, len(runs)), "\n".join(done), color=colour, va="top", fontsize=10 if len(runs) <= 6 else 7, transform=legend.transAxes)
    legend.axis("off")
    finite = [x for x in losses if math.isfinite(x) and x > 0]
    steep = [by_tokens, by_time] if finite and len(finite) == sum(map(math.isfinite, losses)) and max(finite) > 3 * min(finite) else []
    for ax in (*steep, lr, norm):                    # on a plain axis the last tenth of a fall, of the loss or the rate, would be a flat line
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    by_tokens.set(title="loss against tokens", xlabel="tokens", ylabel="nats; dots: validation, pale: training")
    by_time.set(title="loss against time", xlabel=unit + ("" if clocked else ", added up from tokens/s"))
    for ax, title in ((lr, "learning rate"), (norm, "gradient norm, before clipping"), (speed, "tokens a second")):
        ax.set(title=title, xlabel="tokens")
    for ax in (by_tokens, lr, norm, speed):
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    speed.set_ylim(0, 1.05 * speed.get_ylim()[1])
    for ax in (by_tokens, by_time, lr, norm, speed):
        ax.grid(alpha=0.3)
    return fig


def panels(runs, keys):
    """A matplotlib Figure with a panel for each of `keys`, lines against updates. runs: {name: path}. UserError for a metric that no run
    has logged, and without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('the picture needs matplotlib: pip install -e ".[plot]"') from None
    records = {name: [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.endswith("}")] for name, path in runs.items()}
    columns = min(3, len(keys))
    fig = Figure(figsize=(4.2 * columns, 3 * -(-len(keys) // columns)), layout="constrained")
    for k, key in enumerate(keys):
        ax, drawn = fig.add_subplot(-(-len(keys) // columns), columns, k + 1), False
        for i, (name, rows) in enumerate(records.items()):
            for full in (key, f"train/{key}", f"val/{key}"):
                points = [(r["step"], r[full]) for r in rows if isinstance(r.get(full), (int, float))]
                held_out = full.startswith("val/")
                if points:
                    ax.plot(*zip(*points), color=f"C{i % 10}", marker="o" if held_out else None, ms=3.5, lw=1.6, alpha=1 if held_out or key == full else 0.35,
                            label=name if held_out or key == full else None)
                    drawn = True
        if not drawn:
            raise UserError(f"--keys {key}: no such metric in {', '.join(map(str, runs.values()))}")
        ax.set(title=key, xlabel="updates")
        ax.grid(alpha=0.3)
        if k == 0 and len(runs) > 1:
            ax.legend(fontsize=8)
    return fig


def main(cfg):
    if not cfg.runs:
        raise UserError("name one or more run directories: python -m nanollm.plot out/demo/pretrain")
    paths = [p.parent if (p := Path(run)).name == "metrics.jsonl" else p for run in cfg.runs]
    names = cfg.names or [p.name for p in paths]
    if not cfg.names and len(set(names)) < len(names):                  # out/a/pretrain, out/b/pretrain
        names = [str(p) for p in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"--names gives {len(names)} names for {len(paths)} runs; one different name for each, please")
    runs = {name: read(path) for name, path in zip(names, cfg.runs)}
    fig = panels({name: path / "metrics.jsonl" for name, path in zip(names, paths)}, cfg.keys) if cfg.keys else picture(runs, cfg.smooth)
    out = Path(cfg.out or paths[0] / "plot.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(out, dpi=100)
    except (OSError, ValueError) as e:                                  # ValueError: an ending that matplotlib does not know
        raise UserError(f"--out {out} cannot be written: {e}") from None
    print(f"{out}: {len(runs)} run(s), {', '.join(names)}")


if __name__ == "__main__":
    run(main, Config, __doc__)
