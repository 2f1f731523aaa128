"""Write the results table of a finished road into the README, between two markers, in both languages.

    python -m nanollm.tools.results --run_dir out/demo --readme README.md README_zh.md

Every number comes from the run's own report.json, stages.jsonl and metrics.jsonl; a file ending in _zh.md gets Chinese.
"""
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

from nanollm.config import UserError, arg, run
from nanollm.log import clock
from nanollm.report import get, read_json, read_lines, show

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROWS = [  # key, English, Chinese, the known truth beside it in both ({key} is looked up)
    ("clean.dropped", "cleaning: documents dropped", "清洗：丢弃的文档", "{clean.planted} planted", "埋入 {clean.planted} 篇"),
    ("dedup.removed", "deduplication: documents removed", "去重：删除的文档", "{dedup.planted_found} of {dedup.planted} planted",
     "埋入的 {dedup.planted} 篇中的 {dedup.planted_found} 篇"),
    ("tokenizer.bytes_per_token", "tokenizer: bytes per token", "分词器：每词元字节数", "", ""),
    ("pretrain.val_loss", "pretraining: validation loss, nats a token", "预训练：验证损失，nat/词元",
     "entropy floor {pretrain.entropy_floor}", "熵下界 {pretrain.entropy_floor}"),
    ("pretrain.bits_per_byte", "pretraining: bits per byte", "预训练：每字节比特数", "", ""),
    ("sft.exact_match", "SFT: exact match, held-out questions", "SFT：未见问题的完全匹配率", "1", "1"),
    ("sft.stop_rate", "SFT: answers that end by themselves", "SFT：自行结束的回答比例", "1", "1"),
    ("rm.accuracy", "reward model: accuracy, held-out pairs", "奖励模型：未见偏好对的准确率", "chance 0.5", "随机 0.5"),
    ("dpo.win_rate", "DPO: win rate against the SFT model", "DPO：对 SFT 模型的胜率",
     "itself {dpo.win_rate_before}", "它自己 {dpo.win_rate_before}"),
    ("ppo.win_rate", "PPO: win rate against the SFT model", "PPO：对 SFT 模型的胜率",
     "itself {ppo.win_rate_before}", "它自己 {ppo.win_rate_before}"),
    ("mc.accuracy", "multiple choice, options scored as text: accuracy", "选择题（按选项的文字打分）：准确率", "chance {mc.chance}", "随机 {mc.chance}"),
]


@dataclass
class Config:
    run_dir: str = arg("out/demo", "a finished road, with report.json in it")
    readme: list = arg(["README.md", "README_zh.md"], "files with the two markers")


def cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(run_dir, chinese):
    """The lines between the markers."""
    run_dir = Path(run_dir)
    if not (report := read_json(run_dir / "report.json")):
        raise UserError(f"--run_dir: {run_dir / 'report.json'} is not there; `bash runs/speedrun.sh` makes it")
    stages = {s["stage"]: s for s in read_lines(run_dir / "stages.jsonl")}           # the last try of a stage counts
    metrics = [row for row in read_lines(run_dir / "pretrain" / "metrics.jsonl") if "tokens" in row]
    last = metrics[-1] if metrics else {"step": 0, "tokens": 0}
    peak = max((s.get("peak_rss_mb") or 0 for s in stages.values()), default=0)
    number = lambda key: show(get(report, key))
    lines = ["| 项目 | 结果 | 真值 |" if chinese else "| what | result | known truth |", "|---|---|---|"]
    for key, en, zh, truth_en, truth_zh in ROWS:
        truth = re.sub(r"{([\w.]+)}", lambda m: number(m[1]), truth_zh if chinese else truth_en)
        if key == "pretrain.val_loss" and (floor := get(report, "pretrain.entropy_floor")):
            truth += f" ({100 * (get(report, key) / floor - 1):+.1f} %)"
        lines.append(f"| {zh if chinese else en} | {number(key)} | {truth} |")
    names, words = (("合计", "内存峰值", "预训练", "机器", "日期"), "{:,} 次更新、{:,} 个词元") if chinese else (
        ("total", "peak memory", "pretraining", "machine", "date"), "{:,} updates, {:,} tokens")
    day = time.strftime("%Y-%m-%d", time.localtime((run_dir / "report.json").stat().st_mtime))
    facts = (clock(sum(s["seconds"] for s in stages.values())), f"{peak:,.0f} MB",
             words.format(last["step"], last["tokens"]), f"{cpu_model()}; {report['machine']}", day)
    return [*lines, "", " · ".join(f"{name} {fact}" for name, fact in zip(names, facts)), "",
            " · ".join(f"{name} {clock(s['seconds'])}" for name, s in stages.items())]


def main(cfg):
    for path in map(Path, cfg.readme):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as e:
            raise UserError(f"--readme: cannot read {path}: {e.strerror}") from None
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
            raise UserError(f"--readme: {path} needs the line {BEGIN} and after it {END}, once each")
        body = "\n".join(table(cfg.run_dir, path.stem.endswith("_zh")))
        head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        path.write_text(f"{head}\n{body}\n{tail}", encoding="utf-8")
        print(f"{path}: results of {cfg.run_dir} written")


if __name__ == "__main__":
    run(main, Config, __doc__)
