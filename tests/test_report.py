"""The report: the issue's keys, a page that needs nothing else, charts whose lines lie where the numbers are."""
import json
import math
import re

import pyarrow as pa
import pytest
from conftest import write_jsonl

from nanollm import report
from nanollm.config import UserError
from nanollm.corpus import parts

KEYS = """clean.dropped clean.planted dedup.removed dedup.planted tokenizer.bytes_per_token pretrain.val_loss pretrain.entropy_floor
pretrain.bits_per_byte sft.exact_match sft.stop_rate rm.accuracy dpo.win_rate dpo.win_rate_before mc.accuracy mc.chance
seconds.pretrain seconds.sft peak_rss_mb.pretrain peak_rss_mb.sft""".split()


@pytest.fixture
def road(tmp_path):
    """What a whole road leaves behind, in small."""
    def put(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    put("clean/report.json", {"dropped": {"too_short": 4, "markup": 3}})
    put("dedup/report.json", {"dropped": {"exact": 1, "near": 4}})
    put("raw/truth.json", {"clean_planted": {"too_short": 4, "markup": 2}, "dedup_planted": 5, "dedup_planted_lines": [3, 4, 5, 6, 7]})
    gone = parts.Writer(tmp_path / "dedup" / "part-00000.dropped.parquet", parts.DROPPED)
    gone.write(pa.table({"id": [f"raw.jsonl:{line}" for line in (3, 4, 5, 6, 9)], "text": [""] * 5, "dup_of": ["raw.jsonl:1"] * 5}))
    gone.close()
    put("tokens/train.json", {"n_bytes": 3000, "n_tokens": 1010, "n_docs": 10})
    put("eval.json", {"pretrain": {"val_loss": 0.549, "entropy_floor": 0.5, "bits_per_byte": 0.3, "by_kind": {
                          "copy": {"loss": 0.25, "floor": 0.0, "tokens": 1234}}},
                      "sft": {"exact_match": 0.5, "stop_rate": 1.0, "by_task": {"sum": {"exact_match": 0.5, "n": 8}}},
                      "rm": {"accuracy": 0.96}, "dpo": {"win_rate": 0.9, "win_rate_before": 0.5}, "mc": {"accuracy": 0.4, "chance": 0.25},
                      "models": {name: {"exact_match": 0.5, "win_rate": 0.5, "kl": kl, "chats": [{"prompt": "<i>Q</i>", "text": f"said by {name}"}]}
                                 for name, kl in (("sft", 0.0), ("dpo", 7.25))}})
    for stage in report.STAGES:
        (tmp_path / stage).mkdir()
        write_jsonl(tmp_path / stage / "metrics.jsonl", [
            {"step": 0, "val/loss": 4.0, "samples": [{"prompt": "<b>Hi</b>", "text": f"before {stage}"}]},
            {"step": 5, "train/loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "train/accuracy": 0.7, "train/margin": 0.2},
            {"step": 10, "val/loss": 1.0, "samples": [{"prompt": "<b>Hi</b>", "text": f"after {stage}"}]}])
    write_jsonl(tmp_path / "stages.jsonl", [
        {"stage": "pretrain", "seconds": 9.0, "peak_rss_mb": 99.0, "command": "python train_pretrain.py --broken"},
        {"stage": "pretrain", "seconds": 60.0, "peak_rss_mb": 300.0, "command": "python train_pretrain.py"},
        {"stage": "sft", "seconds": 30.0, "peak_rss_mb": 200.0, "command": "python train_sft.py"}])
    return tmp_path


def test_report_json_has_the_keys_and_the_numbers_of_the_stages(road):
    """Every key is there; counts by reason are added up; of a stage that ran twice the last run counts."""
    report.write(road)
    written = json.loads((road / "report.json").read_text(encoding="utf-8"))
    assert [key for key in KEYS if report.get(written, key) is None] == []
    assert report.get(written, "clean.dropped") == 7 and report.get(written, "clean.planted") == 6
    assert report.get(written, "tokenizer.bytes_per_token") == 3.0                    # the 10 EOS are no text
    assert report.get(written, "seconds.pretrain") == 60.0 and report.get(written, "peak_rss_mb.sft") == 200.0


def test_the_table_says_what_was_reached_and_what_was_not(road):
    """The limits of the issue: 9.8 % above the floor is reached and 10.2 % is not; nor is an exact match of 0.5."""
    numbers = report.write(road)
    rows = {what: (bound, verdict) for what, _, bound, verdict in report.goal_rows(numbers)}
    bound, verdict = rows["validation loss, nats a token"]
    assert "floor 0.5" in bound and "+9.8 %" in bound and verdict == "reached"
    numbers["pretrain"]["val_loss"] = 0.551
    assert [v for what, _, _, v in report.goal_rows(numbers) if what.startswith("validation loss")] == ["not reached"]
    assert rows["SFT exact match, held-out questions"][1] == "not reached"
    assert rows["DPO wins against the SFT model"] == ("itself 0.5, ≥ 0.80", "reached")
    assert rows["planted near-duplicates removed"] == ("all that were planted: 5", "not reached")            # 7 was missed; 9 is no planted one
    assert rows["multiple choice"] == ("chance 0.25", "")
    assert rows["junk documents dropped by cleaning"] == ("all that were planted: 6", "not reached")         # 7: one too many


def test_the_page_is_one_file_that_needs_nothing_else(road):
    """No script, link, image or address of any kind; what models wrote is escaped; every stage shows before and after."""
    report.write(road)
    page = (road / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?:", page)
    assert "<b>Hi</b>" not in page and "&lt;b&gt;Hi&lt;/b&gt;" in page
    markdown = (road / "report.md").read_text(encoding="utf-8")
    for stage in report.STAGES:
        assert f"before {stage}" in page and f"after {stage}" in page and f"after {stage}" in markdown
    for word in ("Learning rate", "Gradient norm", "Reward margin", "entropy floor", "python train_sft.py"):
        assert word in page
    assert "python train_sft.py" in markdown and "1,234" in markdown
    assert "said by sft" in page and "said by dpo" in markdown and "7.25" in markdown and "<i>Q</i>" not in page           # side by side


def test_the_floor_and_the_curve_are_drawn_where_their_numbers_are():
    """Axis labels give the scale; on it the dashed line lies at the floor and the curve ends at its last value."""
    svg = report.chart("Loss", [("train", [(0, 4.0), (100, 1.0)])], "nats", floor=0.5)
    labels = [(float(y), float(text)) for y, text in re.findall(r'<text x="62" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', svg)]
    (y0, v0), (y1, v1) = labels[0], labels[-1]

    def value(y):
        return v0 + (float(y) + 4 - y0) * (v1 - v0) / (y1 - y0)           # labels stand 4 below their line

    floor = re.search(r'<line class="line floor" x1="70" x2="544" y1="([\d.]+)" y2="([\d.]+)"/>', svg)
    points = re.search(r'points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', svg)
    assert value(floor[1]) == value(floor[2]) == pytest.approx(0.5, abs=0.02)
    assert [value(points[i]) for i in (1, 2)] == pytest.approx([4.0, 1.0], abs=0.02)
    assert "entropy floor" in svg and "step (optimizer update)" in svg and ">nats<" in svg


def test_charts_leave_out_what_is_not_finite_and_stay_small():
    """null and inf in metrics.jsonl do not break a picture; 10,000 points become some hundred means; nothing gives nothing."""
    svg = report.chart("x", [("a", [(0, None), (1, math.inf), (2, 1.0), (3, 2.0)])], "y")
    assert "nan" not in svg and "inf" not in svg and svg.count("<circle") == 2
    assert len(report.chart("x", [("a", [(i, math.sin(i)) for i in range(10_000)])], "y")) < 10_000
    assert report.chart("x", [("a", [(0, None)])], "y") == ""
    assert "<polyline" in report.chart("constant", [("a", [(0, 1.0), (1, 1.0)])], "y")


def test_a_half_finished_road_is_reported_as_far_as_it_went(tmp_path, capsys):
    """Missing stages are null and named; a missing directory is one sentence."""
    report.main(report.Config(run_dir=str(tmp_path)))
    assert "not measured" in capsys.readouterr().out
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["rm"]["accuracy"] is None and (tmp_path / "report.html").exists()
    with pytest.raises(UserError, match="not a directory"):
        report.write(tmp_path / "gone")
