"""Pictures of runs from their metrics.jsonl."""
import builtins
import json

import numpy as np
import pytest

from nanollm import config, plot


def write_run(path, steps=10, rate=100.0, clock=True, val_every=5):
    """metrics.jsonl of a run that reads 50 tokens an update at `rate` tokens a second, evaluations taking no time."""
    path.mkdir(parents=True)
    records = []
    for step in range(steps + 1):
        time = {"time": step * 50 / rate} if clock else {}
        if step:
            records.append({"step": step, **time, "train/loss": 7 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 50 * step, "tokens_per_s": rate})
        if step % val_every == 0:
            records.append({"step": step, **time, "val/loss": 8 / (step + 1), "samples": []})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_columns_have_tokens_and_time_at_every_point(tmp_path):
    """Evaluations carry no token count: it comes from the training records around them."""
    run = plot.read(write_run(tmp_path / "a"))
    assert run["clock"] and run["val"]["step"].tolist() == [0, 5, 10] and run["val"]["tokens"].tolist() == [0, 250, 500]
    assert run["val"]["time"].tolist() == [0, 2.5, 5.0] and run["train"]["tokens"][-1] == 500


def test_a_file_without_time_gets_one_from_tokens_a_second(tmp_path):
    old, new = plot.read(write_run(tmp_path / "a", clock=False)), plot.read(write_run(tmp_path / "b"))
    assert not old["clock"] and new["clock"]
    for part in ("train", "val"):
        np.testing.assert_allclose(old[part]["time"], new[part]["time"])


def test_a_half_line_and_a_null_are_no_obstacle(tmp_path):
    """A killed process leaves half a line; a NaN was logged as null and becomes a gap."""
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace(f'"train/loss": {json.loads(lines[3])["train/loss"]}', '"train/loss": null')
    path.write_text("\n".join(lines) + '\n{"step": 11, "train/lo', encoding="utf-8")
    run = plot.read(path)
    assert np.isnan(run["train"]["train/loss"]).sum() == 1 and run["train"]["step"][-1] == 10
    assert plot.smoothed(np.array([1.0, np.nan, 3.0]), 2).tolist() == [1.0, 1.0, 3.0]


def test_one_picture_of_several_runs(tmp_path, capsys):
    """Six panels, each run a line in each, named; same names are told apart by their paths; a PNG comes out."""
    a, b = write_run(tmp_path / "a" / "pretrain"), write_run(tmp_path / "b" / "pretrain", steps=20, rate=200.0, clock=False)
    plot.main(config.parse(plot.Config, [str(a), str(b), "--out", str(tmp_path / "x" / "both.png")]))
    assert (tmp_path / "x" / "both.png").read_bytes().startswith(b"\x89PNG") and f"{a}, {b}" in capsys.readouterr().out
    fig = plot.picture({"one": plot.read(a), "two": plot.read(b)})
    by_tokens, by_time, legend, lr, norm, speed = fig.axes
    assert [len(ax.lines) for ax in fig.axes] == [4, 4, 0, 2, 2, 2] and "added up" in by_time.get_xlabel()
    assert by_tokens.get_yscale() == "log" and by_tokens.lines[3].get_xdata()[-1] == 1000
    assert any("two" in t.get_text() and f"{8 / 21:.4f}" in t.get_text() for t in legend.texts)
    plot.main(config.parse(plot.Config, [str(a)]))
    assert (a / "plot.png").exists()


def test_updates_left_out_and_rollbacks_are_ticks(tmp_path):
    """At their tokens, between the records of the log; other events and quiet runs have none."""
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with open(a / "metrics.jsonl", "a", encoding="utf-8") as f:
        for step, text in ((3, "loss or gradient is not finite: update left out (1 in a row)"), (4, "rollback from step 9"), (9, "early stop")):
            f.write(json.dumps({"step": step, "event": text}) + "\n")
    fig = plot.picture({"a": plot.read(a), "b": plot.read(b)})
    by_tokens, _, legend, lr, norm, _ = fig.axes
    assert [len(ax.lines) for ax in fig.axes] == [5, 4, 0, 3, 3, 2] and lr.get_yscale() == "log"
    for ax in (by_tokens, lr, norm):
        assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "|"] == [[150, 200]]
    assert sum("1 left out, 1 rollback(s)" in t.get_text() for t in legend.texts) == 1


def test_what_cannot_be_drawn_is_said_in_one_sentence(tmp_path, monkeypatch):
    run = str(write_run(tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("", encoding="utf-8")
    for words, message in (([], "name one or more"), ([str(tmp_path / "none")], "does not exist"), ([str(tmp_path / "empty")], "no training record"),
                           ([run, "--names", "x", "y"], "2 names for 1"), ([run, "--out", str(tmp_path / "x.doc")], "cannot be written")):
        with pytest.raises(config.UserError, match=message):
            plot.main(config.parse(plot.Config, words))
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest, **kw: (_ for _ in ()).throw(ImportError(name)) if name.startswith("matplotlib")
                        else real(name, *rest, **kw))
    with pytest.raises(config.UserError, match=r"\[plot\]"):
        plot.main(config.parse(plot.Config, [run]))


def test_a_panel_for_each_metric(tmp_path):
    """Two runs, a bare name (train pale, val with dots) and a full one: so many lines; a metric that nobody logged is a sentence."""
    runs = {name: write_run(tmp_path / name) / "metrics.jsonl" for name in "ab"}
    left, right = plot.panels(runs, ["loss", "val/loss"]).axes
    assert (len(left.lines), len(right.lines)) == (4, 2) and right.lines[0].get_xydata().tolist() == [[0, 8], [5, 8 / 6], [10, 8 / 11]]
    plot.main(plot.Config([str(tmp_path / "a")], out=str(tmp_path / "x.png"), keys=["grad_norm"]))
    assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(config.UserError, match="no such metric"):
        plot.panels(runs, ["val/margin"])
