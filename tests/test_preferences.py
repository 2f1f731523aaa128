"""prepare_data.py rejects: which rows are reserved, that the pairs hang on the seed and the rows alone, what is left out, best of n."""
import json
import os
import shutil
import signal

import pytest
import torch

import prepare_data
import train_dpo
from conftest import SHAPE, flags, options, python, run_ranks, tiny_lm, tiny_tokenizer, write_jsonl
from nanollm import checkpoint, preferences
from nanollm.config import run
from nanollm.corpus import parts
from nanollm.corpus.options import Rejects
from nanollm.data import ChatRows, to_messages, to_preference
from nanollm.losses import linear_cross_entropy
from nanollm.model import ModelArgs, RewardModel, Transformer
from nanollm.tokenizer import bpe_tokenizer, render


def questions(n):
    """n chats with different one-turn questions."""
    return [{"messages": [{"role": "user", "content": f"What is {i} and {i % 7}?"}, {"role": "assistant", "content": f"It is {i + i % 7}."}]} for i in range(n)]


def sft_model():
    """A model after a second of SFT on other questions: it says "It is 7." and stops, with a number that is mostly wrong."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SHAPE, vocab_size=tiny_tokenizer().vocab_size))
    rows = ChatRows([(str(i), row) for i, row in enumerate(questions(300)[200:])], tiny_tokenizer(), 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(60):
        inputs, targets, segments = rows.batch([(4 * step + i) % len(rows) for i in range(4)])
        loss, count, _ = model(inputs, segments, head=lambda h, output: linear_cross_entropy(h, output.weight, targets))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """chats.jsonl, an SFT model and a reward model."""
    root = tmp_path_factory.mktemp("rejects")
    write_jsonl(root / "chats.jsonl", questions(120))
    checkpoint.save(root / "sft", 1, sft_model(), tiny_tokenizer(), "sft", None)
    torch.manual_seed(5)
    checkpoint.save(root / "rm", 1, RewardModel(tiny_lm().args), tiny_tokenizer(), "rm", None)
    return root


def command(files, out, **changes):
    return flags({"data": [str(files / "chats.jsonl")], "init_from": str(files / "sft"), "out": str(out), "max_new_tokens": 24, "device": "cpu", **changes})


def make(files, out, **changes):
    """Run the command in this process; returns (rows, report)."""
    run(prepare_data.rejects, Rejects, "", command(files, out, **changes))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], json.loads(
        out.with_name(out.name + ".report.json").read_text(encoding="utf-8"))


def test_the_share_is_split_by_question_disjoint_and_always_alike(files, tmp_path):
    """25 % as in the notes, give or take; the rows for SFT and the pairs share no question, nor does a copy of a question with another
    answer, another format or another place in the file change sides."""
    rows, report = make(files, tmp_path / "prefs.jsonl", sft_out=str(tmp_path / "sft.jsonl"))
    kept = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    assert report["questions"] + len(kept) == 120 and 15 <= report["questions"] <= 45
    asked = {row["prompt"][-1]["content"] for row in rows}
    assert asked and not asked & {row["messages"][0]["content"] for row in kept}
    many = [preferences.reserved(to_messages(row), 0.25) for row in questions(20000)]
    assert abs(sum(many) / 20000 - 0.25) < 0.01
    for row, mine in zip(questions(50), many):
        other = {"instruction": row["messages"][0]["content"], "output": "Something else."}
        assert preferences.reserved(to_messages(other), 0.25) == mine


def test_the_split_can_be_made_before_there_is_a_model(files, tmp_path):
    """The order of a real run: split, SFT on the larger part, then answers to the smaller; the rows left out by --exclude are in neither."""
    held_out = write_jsonl(tmp_path / "val.jsonl", questions(20))
    run(prepare_data.rejects, Rejects, "", command(files, tmp_path / "p.jsonl", init_from="", sft_out=str(tmp_path / "sft.jsonl"), exclude=[held_out]))
    kept = {line for line in (tmp_path / "sft.jsonl").read_text(encoding="utf-8").splitlines()}
    rows, report = make(files, tmp_path / "p.jsonl", exclude=[held_out])
    assert len(kept) + report["questions"] == 100
    assert not {row["prompt"][0]["content"] for row in rows} & {row["messages"][0]["content"] for row in questions(20)}


def test_pairs_are_readable_preferences_with_the_models_own_answers(files, tmp_path):
    """chosen is the row's answer, rejected what this model says; each fits the context; the counts add up; train_dpo.py takes the file; and
    the model finds its own answers likelier than the data's."""
    rows, report = make(files, tmp_path / "prefs.jsonl", share=1.0)
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in questions(120)}
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        prompt, chosen, rejected = to_preference(row)
        assert chosen == answers[prompt[-1]["content"]] and chosen.strip() != rejected.strip()
        assert len(render(tiny_tokenizer(), prompt, True)[0]) + len(tiny_tokenizer().encode(rejected)) + 1 <= 64
    assert report["pairs"] == len(rows) > 20 and report["pairs"] + sum(report["dropped"].values()) == report["questions"] == 120
    assert report["logp_per_token_rejected"] > report["logp_per_token_chosen"]
    train_dpo.main(train_dpo.Config(**options("dpo", files, tmp_path / "dpo", data=[str(tmp_path / "prefs.jsonl")], val_data=[], val_fraction=0.2,
                                              init_from=str(files / "sft"))))


@pytest.mark.parametrize("rank", [False, True])
def test_neither_batch_size_nor_order_changes_the_pairs(files, tmp_path, rank, monkeypatch):
    """Each row draws from its own stream: the same pairs one by one, 7 or 64 at a time, with parts of 16 rows, and for shuffled rows;
    another seed gives others."""
    more = {"share": 0.3, **({"rank_with": str(files / "rm"), "n": 3} if rank else {})}
    want, _ = make(files, tmp_path / "a.jsonl", **more)
    for size in (1, 7):
        assert make(files, tmp_path / f"{size}.jsonl", batch_size=size, **more)[0] == want
    monkeypatch.setattr(preferences, "PART", 16)
    write_jsonl(tmp_path / "chats.jsonl", questions(120)[::-1])
    assert make(files, tmp_path / "r.jsonl", **more, data=[str(tmp_path / "chats.jsonl")])[0] == want[::-1]
    assert make(files, tmp_path / "s.jsonl", seed=1, **more)[0] != want


def rank_worker(out):
    preferences.PART = 16
    run(prepare_data.rejects, Rejects, "", command(out / "files", out / "two.jsonl", share=0.6, sft_out=str(out / "sft.jsonl")))


def test_two_ranks_share_the_parts_and_write_what_one_writes(files, tmp_path, monkeypatch):
    """Under torchrun every rank answers every second part; the joined file is the same to the byte."""
    shutil.copytree(files, tmp_path / "files")
    run_ranks("test_preferences.rank_worker", tmp_path)
    monkeypatch.setattr(preferences, "PART", 16)
    make(files, tmp_path / "one.jsonl", share=0.6)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert "2 processes" in (tmp_path / "rank0.log").read_text(encoding="utf-8") and not (tmp_path / "two.jsonl.work").exists()


def kill_worker(out):
    """Four runs on the same file, each killed with SIGKILL: while the second part is being written, two parts later, before the report
    and before the joined file get their names."""
    preferences.PART, publish = 16, parts.publish
    for die in (lambda path, n: n == 2, lambda path, n: n == 3, lambda path, n: "report" in str(path), lambda path, n: str(path).endswith("cut.jsonl")):
        pid, calls = os.fork(), []
        if pid == 0:
            def deadly(aside, path):
                calls.append(path)
                if die(path, len(calls)):
                    os.kill(os.getpid(), signal.SIGKILL)
                publish(aside, path)
            parts.publish = deadly
            try:
                run(prepare_data.rejects, Rejects, "", command(out / "files", out / "cut.jsonl", share=0.6))
            finally:
                os._exit(1)                                       # only reached if nothing killed us
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        assert not (out / "cut.jsonl").exists()


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(files, tmp_path, monkeypatch):
    """kill -9 four times: the file is what an undisturbed run writes, and no finished part is made again. A finished run is skipped;
    another seed begins anew."""
    monkeypatch.setattr(preferences, "PART", 16)
    shutil.copytree(files, tmp_path / "files")
    code = "sys.stdout.reconfigure(encoding='utf-8'); import test_preferences, pathlib; test_preferences.kill_worker(pathlib.Path(sys.argv[1]))"
    with open(tmp_path / "log", "w+b") as log:
        assert python(code, tmp_path, log=log).wait(timeout=600) == 0, (tmp_path / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
    made, pairs_of = [], preferences.pairs_of
    monkeypatch.setattr(preferences, "pairs_of", lambda *a: (made.append(1), pairs_of(*a))[1])
    make(tmp_path / "files", tmp_path / "cut.jsonl", share=0.6)
    assert not made                                               # all parts were there, only joining was left
    make(files, tmp_path / "whole.jsonl", share=0.6)
    assert len(made) >= 4 and (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    made.clear()
    make(files, tmp_path / "whole.jsonl", share=0.6)
    assert not made and not (tmp_path / "cut.jsonl.work").exists()
    make(files, tmp_path / "whole.jsonl", share=0.6, seed=3)
    assert made


def test_best_of_n_writes_the_samples_that_the_reward_model_likes_most_and_least(files, tmp_path):
    """Scores computed again here, on prompt + answer + <|im_end|>: chosen above rejected in every pair, and neither is the row's answer."""
    rows, report = make(files, tmp_path / "prefs.jsonl", share=0.5, rank_with=str(files / "rm"), n=4)
    reward, tok, _ = checkpoint.load(files / "rm")
    gaps = []
    for row in rows:
        prompt = render(tok, row["prompt"], True)[0]
        ids = [prompt + tok.encode(row[side]) + [tok.im_end_id] for side in ("chosen", "rejected")]
        gaps.append([reward(torch.tensor([x]))[0, -1].item() for x in ids])
    assert len(rows) > 20 and all(c > r for c, r in gaps)
    assert report["score_chosen"] > report["score_mean"] > report["score_rejected"] and report["settings"]["n"] == 4


def test_reasons_for_leaving_a_row_out():
    """judged and ranked by hand."""
    own = ("Yes.", [1])
    assert preferences.judged(own, [("No.", [2], True)]) == (own, ("No.", [2]))
    assert [preferences.judged(own, [sample]) for sample in (("No", [2], False), ("", [], True), ("Yes.", [1], True))] == ["unfinished", "empty", "equal"]
    samples = [("a", [1], True), ("b", [2], True), ("a", [1], True)]
    assert preferences.ranked(samples, [0.5, -1.0, 0.5]) == (("a", [1]), ("b", [2]))
    assert preferences.ranked(samples[::2], [0.5, 0.5]) == "equal" and preferences.ranked(samples, [1.0, 1.0, 1.0]) in ("tied", "equal")


def test_half_an_emoji_is_a_text_like_any_other(files, tmp_path):
    """\\ud83d alone, as programs that cut texts by UTF-16 units leave it in JSON, is no UTF-8: it passes through as the escape it was."""
    rows = questions(30)
    rows[0]["messages"][0]["content"] += " \ud83d"
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, _ = make(files, tmp_path / "prefs.jsonl", data=[str(tmp_path / "chats.jsonl")], share=1.0)
    assert any(row["prompt"][0]["content"] == rows[0]["messages"][0]["content"] for row in found)
    run(prepare_data.rejects, Rejects, "", command(files, tmp_path / "p.jsonl", init_from="", sft_out=str(tmp_path / "sft.jsonl"), share=0.01,
                                                   data=[str(tmp_path / "chats.jsonl")]))
    assert rows[0] in map(json.loads, (tmp_path / "sft.jsonl").read_text(encoding="utf-8").splitlines())


def test_whitespace_around_a_models_answer_stays_as_around_the_datas():
    """Else a line end behind the data's answers alone would be what their pairs teach. Two that differ in nothing else are equal."""
    own = ("Yes.\n", [1, 2])
    assert preferences.judged(own, [("No.\n", [3, 2], True)]) == (own, ("No.\n", [3, 2]))
    assert preferences.judged(own, [("Yes.", [1], True)]) == "equal" and preferences.judged(own, [("\n", [2], True)]) == "empty"
    assert preferences.ranked([("a", [1], True), ("a\n", [1, 2], True)], [1.0, 0.0]) == "equal"


def test_a_rule_may_judge_in_place_of_a_reward_model(files, tmp_path):
    """The shortest answer is the best: chosen is never longer than rejected, and the rule sees the row."""
    rows, _ = make(files, tmp_path / "prefs.jsonl", share=0.5, rank_with=f"{rule_of(tmp_path, SHORTEST)}:rule")
    assert rows and all(len(row["chosen"]) < len(row["rejected"]) for row in rows)


def other_rm(tmp):
    tok = bpe_tokenizer(tiny_tokenizer().spec["merges"][:-1], tiny_tokenizer().spec["pattern"])
    return str(checkpoint.save(tmp / "other", 1, RewardModel(tiny_lm().args), tok, "rm", None))


NAN, FAILS, SHORTEST = "return float('nan')", "return row['none']", "return -len(text) if row['messages'] else 0"


def rule_of(tmp, body):
    (tmp / "rule.py").write_text(f"def rule(row, text):\n    {body}\n", encoding="utf-8")
    return tmp / "rule.py"


def never_chatted(tmp):
    """No text has ever held the end of a turn, so its row went wherever <|pad|>'s went."""
    model = tiny_lm()
    with torch.no_grad():
        model.output.weight[tiny_tokenizer().end_id] = model.output.weight[tiny_tokenizer().pad_id]
    return str(checkpoint.save(tmp / "base", 1, model, tiny_tokenizer(), "pretrain", None))


REFUSALS = {
    "a reward model of another tokenizer": (lambda t, f: {"rank_with": other_rm(t)}, "has another tokenizer"),
    "a language model as judge": (lambda t, f: {"rank_with": str(f / "sft")}, "needs a reward model"),
    "a reward model as author": (lambda t, f: {"init_from": str(f / "rm")}, "is a reward model"),
    "a pretrained model": (lambda t, f: {"init_from": never_chatted(t)}, "never seen the chat tokens"),
    "one sample": (lambda t, f: {"rank_with": str(f / "rm"), "n": 1}, "give 2 or more"),
    "a short judge": (lambda t, f: {"rank_with": str(checkpoint.save(t / "rm", 1, RewardModel(tiny_lm(max_seq_len=32).args), tiny_tokenizer(), "rm", None))},
                      "reads at most 32 tokens"),
    "no model and nothing to split": (lambda t, f: {"init_from": ""}, "name the SFT model"),
    "a share of nothing": (lambda t, f: {"share": 0.0}, "does not lie between"),
    "pairs": (lambda t, f: {"data": [write_jsonl(t / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)]}, "train_rm.py or train_dpo.py"),
    "a file of somebody else": (lambda t, f: {"out": write_jsonl(t / "mine.jsonl", [{"a": 1}])}, "did not write it"),
    "a rule that returns no number": (lambda t, f: {"rank_with": f"{rule_of(t, NAN)}:rule"}, "rule.py:rule gave nan for '"),
    "a rule that returns nothing": (lambda t, f: {"rank_with": f"{rule_of(t, 'return None')}:rule"}, "it must return a number"),
    "a rule that fails": (lambda t, f: {"rank_with": f"{rule_of(t, FAILS)}:rule"}, "KeyError: 'none'; it must return a number"),
    "its own input as output": (lambda t, f: {"sft_out": str(f / "chats.jsonl")}, "is one of the other files"),
    "answers that never end": (lambda t, f: {"max_new_tokens": 1, "max_rows": 3}, "no pair is left"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_give_pairs_is_refused_in_one_sentence(files, tmp_path, capsys, name):
    change, says = REFUSALS[name]
    with pytest.raises(SystemExit) as stop:
        run(prepare_data.rejects, Rejects, "", command(files, tmp_path / "out.jsonl") + flags(change(tmp_path, files)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and "Traceback" not in err and "--reward" not in err         # the flag here is --rank_with
