"""Tables for reading: one result in the terminal, and several runs' eval.json side by side, with a picture (evaluate.py --compare)."""
import hashlib
import json
import os
from pathlib import Path

from nanollm.config import UserError

# a number -> the names of its interval; all but bits per byte are better when higher
HEADLINES = {"bits_per_byte": ("low", "high"), "acc": ("low", "high"), "acc_norm": ("norm_low", "norm_high"), "accuracy": ("low", "high"),
             "exact_match": ("low", "high"), "win_rate": ("low", "high"), "value": ("low", "high")}
PARTS = ("by_category", "by_domain", "generation")                    # tables within a task whose lines count, too
LOWER = ("bits_per_byte", "repetition")
BOUNDS = {bound for bounds in HEADLINES.values() for bound in bounds}


def number(key, table):
    """table[key] as text, with its interval and, where that holds what knowing nothing would give, "= chance"."""
    value, (low, high) = table[key], (table.get(bound) for bound in HEADLINES.get(key, ("", "")))
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return text if low is None else f"{text} [{low:.4f}, {high:.4f}]" + "  = chance" * (low <= table.get("chance", -1) <= high)


def show(result):
    """Print the result of one task: numbers first, then one line for each entry of a nested table."""
    for key, value in result.items():
        if isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()):
            print(f"{key}:")
            for name, numbers in value.items():
                print(f"    {name:<32} " + "  ".join(f"{k} {number(k, numbers)}" for k in numbers if k not in BOUNDS))
        elif isinstance(value, dict):
            print(f"{key:<36} " + "  ".join(f"{k} {v:.3f}" for k, v in value.items()))
        elif key == "prompt":
            print(f"prompt of the first question:\n{'-' * 60}\n{value}\n{'-' * 60}")
        elif not isinstance(value, list) and key not in BOUNDS:
            print(f"{key:<36} {number(key, result) if key in HEADLINES else f'{value:.6g}' if isinstance(value, float) else value}")


def read(paths):
    """{name of the run: what its eval.json holds}. paths: files or directories. UserError for one without an eval.json."""
    runs = {}
    for path in map(Path, paths):
        file = path / "eval.json" if path.is_dir() else path
        if (name := str(path.parent if path.name == "eval.json" else path)) in runs:
            raise UserError(f"--compare {path} is named twice; a run needs another one beside it")
        try:
            runs[name] = dict(json.loads(file.read_text(encoding="utf-8")))
        except OSError:
            raise UserError(f"--compare {path}: there is no {file}; evaluate.py --out {path} writes it") from None
        except (ValueError, TypeError) as e:
            raise UserError(f"--compare {file} is not one of evaluate.py's JSON files: {e}") from None
    for depth in range(1, 10):                                        # the last words of the paths that tell them apart
        names = ["/".join(Path(name).parts[-depth:]) for name in runs]
        if len(set(names)) == len(runs):
            return dict(zip(names, runs.values()))
    return runs


def open_place(out, flag="--out"):
    """What the eval.json of a directory holds so far, {} if there is none or no directory is named; UserError, before anything is measured,
    if the result could not be written there."""
    if not out:
        return {}
    there = next(p for p in (Path(out), *Path(out).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{flag} {out}: {there} " + ("must not be written to; name another directory" if there.is_dir() else "is a file; name a directory"))
    file = Path(out) / "eval.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{file} is not one of evaluate.py's JSON files; delete it, or choose another --out")
    return before


def store(out, result):
    """Put a task's result into the eval.json of a directory, where each task and data set has a place of its own."""
    file, before = Path(out) / "eval.json", open_place(out)
    for key in before.keys() & result.keys():
        if isinstance(before[key], dict) and before[key].get("data_hash") not in (None, result[key].get("data_hash")):
            print(f"note: {file} had {key} of other data ({before[key].get('data')}); it is replaced")
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name("eval.json.tmp")
    aside.write_text(json.dumps(before | result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="backslashreplace")      # \ud800
    os.replace(aside, file)
    print(f"wrote {file}")


def headlines(tree, name=""):
    """{"mc/cmmlu STEM acc": {"value", "low", "high", "chance"}, …} of what eval.json holds; low, high and chance may be None."""
    found = {}
    for key, (low, high) in HEADLINES.items():
        if isinstance(tree.get(key), (int, float)):
            label = name if key == "value" else f"{name} {key}".strip()
            ends = [tree.get(low), tree.get(high)]
            ends = ends if all(isinstance(x, (int, float)) for x in ends) else [None, None]
            found[label] = {"value": tree[key], "low": ends[0], "high": ends[1], "chance": tree.get("chance")}
    for key, part in tree.items():
        if isinstance(part, dict) and key in PARTS:
            for line, numbers in part.items():
                found |= headlines(numbers, f"{name} {line}") if isinstance(numbers, dict) else {}
        elif isinstance(part, dict) and not name and key != "models":             # a task of eval.json
            found |= headlines(part, key)
    return found


def compare(runs):
    """read's runs -> {label: {run: number}}, the labels that any run has. A run is marked "best" where its interval lies wholly
    on the better side of all others': less than that may be luck. An interval without width (one row, equal rows) is none."""
    tables, rows = {name: headlines(tree) for name, tree in runs.items()}, {}
    for label in dict.fromkeys(label for table in tables.values() for label in table):
        rows[label] = row = {name: dict(table[label]) for name, table in tables.items() if label in table}
        lower = label.endswith(LOWER)
        for name, number in row.items():
            others = [x for other, x in row.items() if other != name]
            known = others and all(x["low"] is not None and x["low"] < x["high"] for x in row.values())
            number["best"] = bool(known) and all(number["high"] < x["low"] if lower else number["low"] > x["high"] for x in others)
    if not rows:
        raise UserError("--compare: none of these eval.json holds a number that can be compared")
    return rows


def lines(rows, names):
    """The comparison as aligned lines of text."""
    def cell(x):
        if x is None:
            return "-"
        spread = "" if x["low"] is None else f" [{x['low']:.3f}, {x['high']:.3f}]"
        return f"{x['value']:.3f}{spread}" + " *" * x["best"]
    width, columns = max(map(len, rows)), [max(len(name), 24) for name in names]
    yield " " * width + "  " + "  ".join(f"{name:<{w}}" for name, w in zip(names, columns))
    for label, row in rows.items():
        yield (f"{label:<{width}}  " + "  ".join(f"{cell(row.get(name)):<{w}}" for name, w in zip(names, columns))).rstrip()


def fingerprint(rows):
    """A hash of what is measured on, by which --compare tells other texts and questions from the same ones."""
    total = hashlib.blake2b(digest_size=8)
    for row in rows:
        total.update(json.dumps(row, default=str).encode())
    return total.hexdigest()


def different_texts(runs):
    """Names of the tasks whose runs were measured on different texts, so that their numbers say nothing about each other."""
    hashes = {}
    for tree in runs.values():
        for task, numbers in tree.items():
            if isinstance(numbers, dict) and "data_hash" in numbers:
                hashes.setdefault(task, set()).add(numbers["data_hash"])
    return [task for task, values in hashes.items() if len(values) > 1]


def picture(rows, names):
    """A matplotlib Figure: bars with their intervals, a group a number; a dotted tick where knowing nothing stands. Shares from 0 to 1
    left, bits per byte right. UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure             # without pyplot: no window system is asked for
    except ImportError:
        raise UserError('the picture needs matplotlib: pip install -e ".[plot]"') from None
    bits = {label: row for label, row in rows.items() if label.endswith("bits_per_byte")}
    panels = [part for part in ({label: row for label, row in rows.items() if label not in bits}, bits) if part]
    tall = max(map(len, panels))
    fig = Figure(figsize=(8 * len(panels), 1.2 + tall * (0.16 + 0.14 * len(names))), layout="constrained")
    for part, ax in zip(panels, fig.subplots(1, len(panels), squeeze=False)[0]):
        thick = 0.8 / len(names)
        for k, name in enumerate(names):
            at = [(i + k * thick, row[name]) for i, row in enumerate(part.values()) if name in row]
            ax.barh([y for y, _ in at], [x["value"] for _, x in at], thick * 0.9, color=f"C{k % 10}", label=name)
            for y, x in at:
                if x["low"] is not None:
                    ax.plot([x["low"], x["high"]], [y, y], color="black", lw=1)
        for i, row in enumerate(part.values()):
            if chance := next((x["chance"] for x in row.values() if x["chance"]), None):
                ax.plot([chance, chance], [i - thick / 2, i + 0.8 - thick / 2], color="black", ls=":", lw=1.2)
        ax.set_yticks([i + 0.4 - thick / 2 for i in range(len(part))], part)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
        if ax.get_subplotspec().colspan.start == 0:
            ax.legend(fontsize=8)
        ax.set_xlabel("bits a byte (lower is better)" if part is bits else "share; line: 95 % interval, dots: chance")
    return fig
