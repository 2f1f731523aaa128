"""The same questions, the exported model, the field's own program: lm-evaluation-harness gives the same scores."""
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import datasets
import lm_eval
import pytest
from conftest import tiny_lm
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_choices import CMMLU, exam, write

import evaluate
import export
from nanollm import checkpoint

ZH = [("天空一般是什么颜色的？", "蓝色", "红色的天空", "绿", "黑色", "A"), ("《小明的猫》里，猫在哪里？", "在花园里", "在家", "在学校的屋顶上", "在车站", "C"),
      ("3加4等于几？", "7", "8", "9", "10", "A"), ("x < y & y < z, 那么", "x < z", "x > z", "x = z", "无法比较", "A")]


@pytest.fixture(scope="module")
def root(tok, tmp_path_factory):
    """A checkpoint, its export, and English and Chinese questions, the latter with solved ones in dev/."""
    root = tmp_path_factory.mktemp("harness")
    checkpoint.save(root / "run", 1, tiny_lm(3, max_seq_len=226), tok, "pretrain", None)
    export.main(export.Config(init_from=str(root / "run"), out=str(root / "hf")))
    lines = [",".join([str(i), *('"' + cell + '"' for cell in row[:5]), row[5]]) + "\n" for i, row in enumerate(ZH * 5)]
    write(root / "quiz" / "test" / "arts.csv", CMMLU + "".join(lines))
    write(root / "quiz" / "dev" / "arts.csv", CMMLU + "0,1+1=?,1,2,3,4,B\n" * 2)
    write(root / "quiz" / "test" / "own.csv", CMMLU + "".join(f"{i},{q['question'] * (1 + 4 * (i % 5 == 4))},{','.join(q['options'])},{'ABCD'[q['answer']]}\n"
                                                             for i, q in enumerate(exam(20))))
    return root


def test_lm_evaluation_harness_gives_the_same_log_likelihoods_acc_and_acc_norm(root, monkeypatch):
    """Through evaluate.py --lm_eval, export.py and the harness' own loaders: letters and texts, few-shot and prompts that lose their
    beginning. Each option's log p to 1e-3, so acc and acc_norm to the question (no two options are as near as that)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    theirs = HFLM(pretrained=str(root / "hf"), device="cpu", batch_size=8, dtype="float32")
    for score in ("letter", "text"):
        evaluate.main(evaluate.Config(task="mc", init_from=str(root / "run"), data=[str(root / "quiz")], score=score, template="plain",
                                      lm_eval=str(root / score), out=str(root / "out"), device="cpu"))
        ours = json.loads((root / "out" / "eval.json").read_text(encoding="utf-8"))["mc/quiz" + " text" * (score == "text")]
        manager = TaskManager(include_path=str(root / score), include_defaults=False)
        found = lm_eval.simple_evaluate(theirs, tasks=["quiz"], task_manager=manager, bootstrap_iters=0)
        assert found["results"]["quiz"]["acc,none"] == pytest.approx(ours["acc"]) and ours["n"] == 40
        if score == "text":
            assert found["results"]["quiz"]["acc_norm,none"] == pytest.approx(ours["acc_norm"])
        assert ours["truncated"] > 0 and ours["template"] != "plain text, 0.00 shots on average"
        scores = [x for part in (root / "out" / f"mc-quiz-{score}.jsonl").read_text(encoding="utf-8").splitlines()[1:] for x in json.loads(part)[1]]
        samples = sorted(found["samples"]["quiz"], key=lambda sample: sample["doc_id"])
        for mine, sample in zip(scores, samples, strict=True):
            assert mine == pytest.approx([float(p) for (p, _), in sample["resps"]], abs=1e-3)
