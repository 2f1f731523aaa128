"""The report of a road: every stage's own files -> report.json, report.md and report.html.

    python -m nanollm.report --run_dir out/demo

Reads what the stages wrote and computes nothing anew. What a stage did not leave behind stands as null and is named
on the console. The page is one file without a script or a link: its charts are SVG, drawn below by hand.
"""
import contextlib
import html
import json
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm.config import UserError, arg, run
from nanollm.corpus import parts
from nanollm.log import clock

STAGES = {"pretrain": "Pretraining 预训练", "sft": "Supervised fine-tuning 指令微调",
          "rm": "Reward model 奖励模型", "dpo": "Direct preference optimisation 偏好优化", "ppo": "PPO 近端策略优化"}

# one column each in the table of the aligned models
COMPARED = {"exact_match": "exact match", "win_rate": "win rate by the rule", "rule": "the rule's rating", "reward": "reward", "kl": "KL to SFT, nats",
            "tokens": "tokens an answer", "stop_rate": "ended by itself"}

# key, what it says, its bound in words, and what it is to reach: a number, or the key of the number beside it
GOALS = [
    ("clean.dropped", "junk documents dropped by cleaning", "all that were planted:", "clean.planted"),
    ("dedup.planted_found", "planted near-duplicates removed", "all that were planted:", "dedup.planted"),
    ("tokenizer.bytes_per_token", "bytes per token", "", None),
    ("pretrain.val_loss", "validation loss, nats a token", "at most 10 % above it", 0.10),
    ("pretrain.bits_per_byte", "validation bits per byte", "", None),
    ("sft.exact_match", "SFT exact match, held-out questions", "≥ 0.85", 0.85),
    ("sft.stop_rate", "SFT answers that end by themselves", "≥ 0.99", 0.99),
    ("rm.accuracy", "reward model prefers the better answer", "chance 0.5, ≥ 0.95", 0.95),
    ("dpo.win_rate", "DPO wins against the SFT model", "≥ 0.80", 0.80),
    ("ppo.win_rate", "PPO wins against the SFT model", "≥ 0.70", 0.70),
    ("mc.accuracy", "multiple choice", "", None),
]


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
    except ValueError:
        raise UserError(f"{path} is not valid JSON; delete it and run its stage again") from None


def read_lines(path):
    """A .jsonl file as a list of dicts; [] if it is not there. The late line of a killed process is passed over."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def get(tree, key):
    """get(r, "clean.dropped") -> r["clean"]["dropped"], None if absent."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def total(count):
    """Counts by reason added up; a plain number or None as it is."""
    return sum(count.values()) if isinstance(count, dict) else count


def collect(run_dir):
    """Everything a report shows: (report dict, curves {stage: metrics lines}, stage lines)."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"--run_dir: {run_dir} is not a directory; `bash runs/speedrun.sh` makes out/demo")
    dropped, removed, tokens, truth, numbers = (read_json(run_dir / name) for name in (
        "clean/report.json", "dedup/report.json", "tokens/train.json", "raw/truth.json", "eval.json"))
    planted, gone = truth.get("dedup_planted_lines"), parts.dropped(run_dir / "dedup", ["id"])     # others may go too, if near
    found = sum(int(row["id"].rsplit(":", 1)[1]) in planted for row in gone) if planted else None
    stages = {row["stage"]: row for row in read_lines(run_dir / "stages.jsonl") if "stage" in row}   # the last try counts
    curves = {stage: read_lines(run_dir / stage / "metrics.jsonl") for stage in STAGES}
    report = {
        "clean": {"dropped": total(dropped.get("dropped")), "planted": total(truth.get("clean_planted")),
                  "by_reason": {"dropped": dropped.get("dropped"), "planted": truth.get("clean_planted")}},
        "dedup": {"removed": total(removed.get("dropped")), "planted": truth.get("dedup_planted"), "planted_found": found},
        "tokenizer": {"bytes_per_token": tokens["n_bytes"] / (tokens["n_tokens"] - tokens["n_docs"]) if tokens else None},
        "pretrain": {k: get(numbers, f"pretrain.{k}") for k in ("val_loss", "entropy_floor", "bits_per_byte", "by_kind")},
        "sft": {k: get(numbers, f"sft.{k}") for k in ("exact_match", "stop_rate", "by_task")},
        "rm": {k: get(numbers, f"rm.{k}") for k in ("accuracy", "by_why")},
        "dpo": {k: get(numbers, f"dpo.{k}") for k in ("win_rate", "win_rate_before")},
        "ppo": {k: get(numbers, f"ppo.{k}") for k in ("win_rate", "win_rate_before")},
        "models": get(numbers, "models") or {},
        "mc": {k: get(numbers, f"mc.{k}") for k in ("accuracy", "chance")},
        "seconds": {name: row.get("seconds") for name, row in stages.items()},
        "peak_rss_mb": {name: row.get("peak_rss_mb") for name, row in stages.items()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, "
                   f"{torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'no GPU'}, "
                   f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }
    return report, curves, list(stages.values())


# ---------------------------------------------------------------------------------------------------- charts

def ticks(low, high, n=5):
    """Round numbers (1, 2 or 5 times a power of ten) that span low..high."""
    raw = (high - low) / n or abs(high) / n or 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.floor(low / step + 1e-9)
    return [(first + i) * step for i in range(max(math.ceil(high / step - 1e-9) - first, 1) + 1)]


def thin(points, most=300):
    """Means of equal buckets, so that a long run's noisy curve stays readable (and the page small)."""
    size = math.ceil(len(points) / most) or 1
    return [tuple(sum(p[i] for p in points[k : k + size]) / len(points[k : k + size]) for i in (0, 1))
            for k in range(0, len(points), size)]


def chart(title, series, y_label, floor=None, floor_label="entropy floor 熵下界"):
    """One line chart as an <svg> string. series: [(label, [(step, value)])]; floor: a horizontal dashed line.
    Values that are not finite are left out; "" if nothing is left."""
    series = [(label, thin([(x, y) for x, y in points if y is not None and math.isfinite(y)])) for label, points in series]
    series = [(label, points) for label, points in series if points]
    if not series:
        return ""
    W, H, left, right, top, bottom = 560, 300, 70, 16, 58, 42
    xs, ys = ([p[i] for _, points in series for p in points] for i in (0, 1))
    ys, x_max = ys + ([] if floor is None else [floor]), max(*xs, 1)
    xt, yt = ticks(min(xs), x_max), ticks(min(ys), max(ys))

    def place(x, y):
        return (left + (W - left - right) * (x - xt[0]) / (x_max - xt[0] or 1),
                H - bottom - (H - top - bottom) * (y - yt[0]) / (yt[-1] - yt[0]))

    out = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(title)}">',
           f'<text class="title" x="{left}" y="20">{html.escape(title)}</text>']
    for y in yt:
        py = place(0, y)[1]
        out.append(f'<line class="grid" x1="{left}" x2="{W - right}" y1="{py:.1f}" y2="{py:.1f}"/>'
                   f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in (x for x in xt if x <= x_max):
        out.append(f'<text x="{place(x, 0)[0]:.1f}" y="{H - bottom + 18}" text-anchor="middle">{x:.6g}</text>')
    out.append(f'<text x="{(left + W - right) / 2}" y="{H - 6}" text-anchor="middle">step (optimizer update)</text>'
               f'<text x="14" y="{(top + H - bottom) / 2}" text-anchor="middle" '
               f'transform="rotate(-90 14 {(top + H - bottom) / 2})">{html.escape(y_label)}</text>')
    legend_x = left
    for i, (label, points) in enumerate(series + ([(floor_label, [])] if floor is not None else [])):
        color = f"c{i}" if points else "floor"
        if points:
            path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
            out.append(f'<polyline class="line {color}" points="{path}"/>')
            if len(points) <= 30:                            # few enough to be single evaluations: show each
                out += ['<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>step {:g}: {:.4g}</title></circle>'
                        .format(color, *place(x, y), x, y) for x, y in points]
        else:
            py = place(0, floor)[1]
            out.append(f'<line class="line floor" x1="{left}" x2="{W - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
            label = f"{label} {floor:.4g}"
        if len(series) > 1 or floor is not None:             # a lone line is named by the title
            out.append(f'<line class="line {color}" x1="{legend_x}" x2="{legend_x + 18}" y1="38" y2="38"/>'
                       f'<text x="{legend_x + 23}" y="42">{html.escape(label)}</text>')
        legend_x += 44 + sum(12 if ord(c) > 0x2E80 else 6.6 for c in label)
    return "".join(out) + "</svg>"


def charts(stage, lines, report):
    """The pictures of one stage, in the order in which one reads them."""
    def curve(key):
        return [(row["step"], row.get(key)) for row in lines]

    def both(key):
        return [("train 训练", curve(f"train/{key}")), ("validation 验证", curve(f"val/{key}"))]
    floor = report["pretrain"]["entropy_floor"] if stage == "pretrain" else math.log(2) if stage == "rm" else None
    label = "entropy floor 熵下界" if stage == "pretrain" else "ln 2: knows nothing"
    pictures = [chart("Loss 损失", both("loss"), "nats a token" if stage in ("pretrain", "sft") else "nats a pair", floor, label)]
    if stage == "pretrain":                                  # where ln V no longer presses the rest flat
        late = [(name, [p for p in points if p[0] >= 0.2 * points[-1][0]]) for name, points in both("loss") if points]
        pictures.append(chart("Loss, the last four fifths: how far above the floor 后五分之四", late, "nats a token", floor, label))
    if stage in ("rm", "dpo"):
        pictures += [chart("Accuracy: chosen above rejected 准确率", both("accuracy"), "share of pairs", 0.5, "chance"),
                     chart("Reward margin: chosen − rejected 奖励差", both("margin"), "reward")]
    if stage == "dpo":
        pictures.append(chart("Implicit rewards 隐式奖励", [("chosen", curve("train/chosen_reward")),
                                                       ("rejected", curve("train/rejected_reward"))], "β · log π/π_ref"))
    pictures += [chart("Learning rate 学习率", [("lr", curve("lr"))], "per update"),
                 chart("Gradient norm before clipping 梯度范数", [("norm", curve("grad_norm"))], "L2 norm")]
    return [p for p in pictures if p]


# ---------------------------------------------------------------------------------------------------- tables

def show(value):
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def goal_rows(report):
    """[(what, number, bound and goal, "reached" | "not reached" | "")] for the table at the top."""
    rows = []
    for key, what, bound, test in GOALS:
        value, limit = get(report, key), get(report, test) if isinstance(test, str) else test
        if isinstance(test, str):
            bound += f" {show(limit)}"
        if key == "mc.accuracy":                             # chance is where knowing nothing stands, not a goal
            bound = f"chance {show(report['mc']['chance'])}"
        if key in ("dpo.win_rate", "ppo.win_rate"):
            bound = f"itself {show(get(report, key + '_before'))}, {bound}"
        if key == "pretrain.val_loss":                       # here less is better, and 10 % above the floor is the limit
            floor = report["pretrain"]["entropy_floor"]
            above = value / floor - 1 if value is not None and floor else None
            bound = f"floor {show(floor)}, {bound}" + ("" if above is None else f": {100 * above:+.1f} %")
            limit, ok = test, above is not None and above <= test
        elif isinstance(test, str):                          # what was planted, no less and no more
            ok = value == limit
        else:
            ok = None not in (value, limit) and value >= limit
        verdict = "" if None in (value, limit) else "reached" if ok else "not reached"
        rows.append((what, show(value), bound, verdict))
    return rows


def tables(report, stages):
    """[(caption, header, rows)]: the same tables in Markdown and in HTML."""
    out = [("Against the known truth 与真值对照", ("what", "number", "bound and goal of the demo preset", ""), goal_rows(report))]
    if kinds := report["pretrain"]["by_kind"]:
        out.append(("Validation loss by kind of token 按词元种类", ("kind", "loss", "floor", "above the floor", "tokens"), [
            (kind, show(k["loss"]), show(k["floor"]), show(k["loss"] - k["floor"]), show(k["tokens"])) for kind, k in kinds.items()]))
    if tasks := report["sft"]["by_task"]:
        out.append(("SFT by task 按任务", ("task", "exact match", "questions"), [
            (task, show(t["exact_match"]), show(t["n"])) for task, t in tasks.items()]))
    if kinds := report["rm"]["by_why"]:
        out.append(("Reward model by what is wrong with the rejected answer 按错处", ("rejected is", "accuracy", "pairs"), [
            (why, show(k["accuracy"]), show(k["n"])) for why, k in kinds.items()]))
    if models := report["models"]:
        out.append(("Side by side: the aligned models 各模型并列", ("model", *COMPARED.values()), [
            (name.upper(), *(show(m.get(key)) for key in COMPARED)) for name, m in models.items()]))
        chats = [[m["chats"][i]["text"] for m in models.values()] for i in range(len(models["sft"]["chats"]))]
        out.append(("Sampled chats, temperature 1 采样对话", ("prompt", *(name.upper() for name in models)), [
            (asked["prompt"], *texts) for asked, texts in zip(models["sft"]["chats"], chats)]))
    rows = [(s["stage"], clock(s.get("seconds") or 0), show(s.get("peak_rss_mb")), s.get("command", "")) for s in stages]
    rows.append(("total", clock(sum(s.get("seconds") or 0 for s in stages)),
                 show(max((s.get("peak_rss_mb") or 0 for s in stages), default=None)), ""))
    return [*out, ("What it cost 用时与内存", ("stage", "time", "peak MB", "command"), rows)]


def samples(lines):
    """[(prompt, text at the first evaluation, text at the last)] from the sample lines of a stage."""
    logged = [{s["prompt"]: s["text"] for s in row["samples"]} for row in lines if row.get("samples")]
    return [(prompt, logged[0].get(prompt, ""), text) for prompt, text in logged[-1].items()] if logged else []


def markdown(name, report, curves, stages):
    def table(caption, header, rows):
        cells = [[str(c).replace("|", "\\|").replace("\n", " ⏎ ") for c in row] for row in (header, ["---"] * len(header), *rows)]
        return [f"## {caption}", "", *("| " + " | ".join(row) + " |" for row in cells), ""]

    out = [f"# nanollm: the road of `{name}`", "", report["machine"], ""]
    for caption, header, rows in tables(report, stages):
        out += table(caption, header, [[f"`{c}`" if h == "command" and c else c for h, c in zip(header, row)] for row in rows])
    for stage, title in STAGES.items():
        if rows := samples(curves[stage]):
            out += table(f"{title}: greedy samples", ("prompt", "before", "after"), rows)
    return "\n".join(out)


STYLE = """
:root { color-scheme: light dark; --bg: #fcfcfb; --card: #fff; --ink: #1c1c1a; --soft: #63625d; --rule: #e3e2dd;
        --c0: #2a78d6; --c1: #d9601f; --floor: #14875c; --bad: #b3372f }
@media (prefers-color-scheme: dark) { :root {
        --bg: #161615; --card: #1f1f1d; --ink: #eeede8; --soft: #a5a49d; --rule: #383734;
        --c0: #5b9bea; --c1: #ee8450; --floor: #3bb98a; --bad: #ec7b72 } }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; background: var(--bg); color: var(--ink);
       font: 15px/1.5 system-ui, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 19px; margin: 40px 0 12px } p { color: var(--soft); margin: 4px 0 12px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 14px }
.card, .charts svg { background: var(--card); border: 1px solid var(--rule); border-radius: 8px }
.card { overflow-x: auto; margin-top: 12px }
table { border-collapse: collapse; width: 100% } caption { text-align: left; font-weight: 600; padding: 10px 12px 4px }
th, td { text-align: left; padding: 6px 12px; border-top: 1px solid var(--rule); vertical-align: top; font-variant-numeric: tabular-nums }
th { color: var(--soft); font-weight: 500; border-top: 0 } td.text { white-space: pre-wrap; min-width: 200px }
code { font-size: 12.5px } .reached { color: var(--floor) } .not { color: var(--bad) }
svg { width: 100%; height: auto } svg text { font-size: 12px; fill: var(--soft) } svg .title { font-size: 14px; font-weight: 600; fill: var(--ink) }
.grid { stroke: var(--rule) } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.line.c0 { stroke: var(--c0) } .line.c1 { stroke: var(--c1) } .dot.c0 { fill: var(--c0) } .dot.c1 { fill: var(--c1) }
.line.floor { stroke: var(--floor); stroke-dasharray: 6 4 }
"""


def page(name, report, curves, stages):
    def cell(header, text):
        body = html.escape(str(text))
        kind = text.split()[0] if text in ("reached", "not reached") else "text" if header in ("prompt", "before", "after", "SFT", "DPO", "PPO") else ""
        return f'<td class="{kind}">{f"<code>{body}</code>" if header == "command" else body}</td>'

    def table(caption, header, rows):
        return (f'<div class="card"><table><caption>{html.escape(caption)}</caption><tr>'
                + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>"
                + "".join("<tr>" + "".join(cell(h, c) for h, c in zip(header, row)) + "</tr>" for row in rows) + "</table></div>")

    *first, cost = tables(report, stages)
    title = f"nanollm: the road of {html.escape(name)}"
    out = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
           f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
           "<p>From generated text to a chat model; every stage beside what is known to be true. 从语料到对话模型，每一步都与真值对照。"
           f"<br>{html.escape(report['machine'])}</p>", *(table(*t) for t in first)]
    for stage, title in STAGES.items():
        if curves[stage]:
            out.append(f'<h2>{title}</h2><div class="charts">{"".join(charts(stage, curves[stage], report))}</div>')
        if rows := samples(curves[stage]):
            out.append(table("The same prompts, greedy, before and after 训练前后", ("prompt", "before", "after"), rows))
    return "\n".join([*out, table(*cost), "</body></html>\n"])


def write(run_dir):
    """Write RUN_DIR/report.json, report.md and report.html; returns the report dict."""
    run_dir = Path(run_dir)
    (report, curves, stages), name = collect(run_dir), run_dir.resolve().name
    for file, text in (("report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n"),
                       ("report.md", markdown(name, report, curves, stages)), ("report.html", page(name, report, curves, stages))):
        (run_dir / file).write_text(text, encoding="utf-8")
    return report


@dataclass
class Config:
    run_dir: str = arg("out/demo", "the road's directory, where each stage has left its own directory, and evaluate.py eval.json")


def main(cfg):
    report = write(cfg.run_dir)
    for what, value, bound, ok in goal_rows(report):
        print(f"{what:<40} {value:>8}   {bound}{'   ' + ok if ok else ''}")
    if missing := [key for key, *_ in GOALS if get(report, key) is None]:
        print(f"not measured (their stage left nothing behind): {', '.join(missing)}")
    print(f"wrote {Path(cfg.run_dir) / 'report.html'}, report.md and report.json")


if __name__ == "__main__":
    run(main, Config, __doc__)
