"""Multiple choice: three file formats, prompts, scores by hand, what does not fit, a kill, a model that knows nothing."""
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_lm, write_jsonl
from test_evaluation import by_hand

import evaluate
from nanollm import checkpoint, choices, contamination
from nanollm.config import UserError
from nanollm.subjects import SUBJECTS
from nanollm.tokenizer import render

CMMLU, CEVAL = ",Question,A,B,C,D,Answer\n", "id,question,A,B,C,D,answer"


def quiz(n, seed=0, options=("one", "two", "six", "ten")):
    g = torch.Generator().manual_seed(seed)
    return [{"question": f"Number {i}?", "options": list(options), "subject": f"part {i % 3}", "suite": "mmlu", "answer": int(torch.randint(len(options), (), generator=g))}
            for i in range(n)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ---- files and prompts -----------------------------------------------------------------------------------------------

def test_the_three_formats_are_read_and_broken_files_named(tmp_path):
    """MMLU without a header, CMMLU and C-Eval with theirs; the subject is the file's name without its split; a row without a
    right letter or with an empty option is one sentence with file and row, a file without answers one that says which to take. Five
    options, a mark of the byte order, quotes, line ends of all kinds within them and without are read as they are meant."""
    write(tmp_path / "a_b.csv", CMMLU + '0,"One, or two?",1,2,3,4,B\n')
    write(tmp_path / "anatomy_test.csv", "Two?,1,2,3,4,D\n")
    write(tmp_path / "law_val.csv", CEVAL + ",explanation\n0,哪一个？,甲,乙,丙,丁,C,因为\n")
    questions = choices.read_choices(tmp_path)
    assert [(q["question"], q["answer"], q["subject"], q["suite"]) for q in questions] == [
        ("One, or two?", 1, "a_b", "cmmlu"), ("Two?", 3, "anatomy", "mmlu"), ("哪一个？", 2, "law", "ceval")]
    write(tmp_path / "odd.csv", '\ufeffid,question,A,B,C,D,E,answer\r\n0,"a ""b""\n c,\u2028d",1,2,3,4,5,E\r\n1,x\u2028y,1,2,3,4,5,A\r\n')
    odd, other = choices.read_choices(tmp_path / "odd.csv")
    assert odd["question"] == 'a "b"\n c,\u2028d' and (len(odd["options"]), odd["answer"]) == (5, 4) and other["question"] == "x\u2028y"
    for text in (CMMLU + "0,Q,1,2,3,4,E\n", CMMLU + "0,Q,1\n", CMMLU + "0,Q,1,,3,4,A\n", CMMLU, "", "id,question,A,B,C,D\n0,Q,1,2,3,4\n"):
        write(tmp_path / "bad.csv", text)
        with pytest.raises(UserError, match="bad.csv"):
            choices.read_choices(tmp_path / "bad.csv")


def test_the_prompts_are_those_of_the_three_suites(tok):
    """Word for word, with a solved example of the same subject in front and the subject as each suite calls it."""
    q = {"question": "哪一个？", "options": ["甲", "乙", "丙", "丁"], "answer": 2, "subject": "law", "suite": "ceval"}
    en = {"question": "Which?", "options": ["x", "y"], "answer": 1, "subject": "high_school_physics", "suite": "mmlu"}
    def text(q, shots=()):
        return choices.prompt_of(tok, q, shots, "letter", False, 5, 4096)["text"]
    assert text(q, [q]) == ("以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n哪一个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：C\n\n"
                            "哪一个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：")
    assert text(q | {"suite": "cmmlu", "subject": "arts"}) == ("以下是关于艺术学的单项选择题，请直接给出正确答案的选项。\n\n题目：哪一个？\nA. 甲\n"
                                                               "B. 乙\nC. 丙\nD. 丁\n答案是：")
    assert text(en, [en]) == ("The following are multiple choice questions (with answers) about high school physics.\n\nWhich?\nA. x\nB. y\n"
                              "Answer: B\n\nWhich?\nA. x\nB. y\nAnswer:")
    assert text(en | {"suite": "cmmlu", "subject": "my_own"}).startswith("The following are multiple choice questions (with answers) about my own.")


def test_the_subjects_are_all_there_each_in_its_categories():
    """57, 67 and 52 of them; CMMLU's 15 subjects about China and C-Eval's 8 hard ones count twice."""
    assert {suite: len(subjects) for suite, subjects in SUBJECTS.items()} == {"mmlu": 57, "cmmlu": 67, "ceval": 52}
    double = {suite: sum(len(categories) == 2 for _, categories in subjects.values()) for suite, subjects in SUBJECTS.items()}
    assert double == {"mmlu": 0, "cmmlu": 15, "ceval": 8}
    assert {c for subjects in SUBJECTS.values() for _, categories in subjects.values() for c in categories} == {
        "STEM", "Humanities", "Social Science", "Social Sciences", "Other", "China specific", "Hard"}


def test_a_directory_is_asked_by_its_test_files_or_where_their_answers_are_secret_by_val(tmp_path):
    """With dev/ as the solved examples; C-Eval's test/ has no answers; a plain directory is itself."""
    write(tmp_path / "dev" / "law_dev.csv", CEVAL + ",explanation\n0,Q,1,2,3,4,A,why\n")
    write(tmp_path / "val" / "law_val.csv", CEVAL + "\n0,Q,1,2,3,4,A\n")
    assert choices.splits(tmp_path) == (tmp_path / "val", tmp_path / "dev")
    for head in ("id,question,A,B,C,D", '"id","question" ,"A","B","C","D"'):
        write(tmp_path / "test" / "law_test.csv", head + "\n0,Q,1,2,3,4\n")
        assert choices.splits(tmp_path) == (tmp_path / "val", tmp_path / "dev")
    (tmp_path / "test" / "law_test.csv").write_bytes("问题,甲,乙,丙,丁,A\n".encode("gbk"))
    with pytest.raises(UserError, match="law_test.csv is not a UTF-8 CSV file"):
        choices.splits(tmp_path)
    write(tmp_path / "test" / "law_test.csv", CMMLU + "0,Q,1,2,3,4,A\n")
    assert choices.splits(tmp_path) == (tmp_path / "test", tmp_path / "dev")
    assert choices.splits(tmp_path / "dev") == (tmp_path / "dev", None)


def test_shots_are_dropped_until_the_question_fits_into_the_context(tok):
    """Solved examples of the same subject only, as many as fit; a question that is too long alone loses its beginning and
    is counted."""
    question = {"question": "Which one?", "options": ["x", "y", "z", "w"], "answer": 0, "subject": "s", "suite": "mmlu"}
    shots = [question | {"question": "Foreign?", "subject": "t"}] + [question | {"question": f"Solved {i}?", "answer": 2} for i in range(7)]
    prompts = [choices.multiple_choice(tiny_lm(max_seq_len=n), tok, [question], shots) for n in (2048, 200, 40)]
    counts = [p["prompt"].count("Solved") for p in prompts]
    assert counts[0] == 5 and 0 < counts[1] < 5 and counts[2] == 0 and "Foreign" not in prompts[0]["prompt"]
    assert prompts[0]["prompt"].count("Answer: C\n\n") == 5 and prompts[0]["prompt"].endswith("Answer:")
    assert [p["truncated"] for p in prompts] == [0, 0, 1] and prompts[2]["prompt"].endswith("Answer:")


def test_an_option_that_does_not_fit_is_counted_and_never_cut(tok):
    """The question with it is left out, whatever it would have scored; nothing changes for the others; only such ones: refused."""
    model, short = tiny_lm(max_seq_len=64), quiz(6)
    long = [short[0] | {"options": ["one", "two", "six", "a very long option " * 20]}]
    alone, both = (choices.multiple_choice(model, tok, questions, score="text") for questions in (short, short[:3] + long + short[3:]))
    assert both["unscored"] == 1 and both["n"] == 6 and alone["unscored"] == 0
    torch.testing.assert_close(torch.tensor(both["scores"]), torch.tensor(alone["scores"]))
    with pytest.raises(UserError, match="longer than the model's context of 64"):
        choices.multiple_choice(model, tok, long, score="text")
    assert choices.multiple_choice(tiny_lm(max_seq_len=512), tok, long, score="letter")["n"] == 1


# ---- scores ----------------------------------------------------------------------------------------------------------

def test_multiple_choice_scores_equal_hand_computed_log_likelihoods(tok):
    """Letters: log p(letter after the prompt that the output shows). Text: log p(option); acc_norm divides by its characters. In
    chat: the option right behind the generation prompt."""
    model = tiny_lm(max_seq_len=256)
    zh = {"question": "天空是什么颜色？", "options": ["红", "蓝色"], "answer": 1, "subject": "colour", "suite": "cmmlu"}
    en = {"question": "The sky is", "options": ["red", "blue and wide"], "answer": 1, "subject": "colour", "suite": "mmlu"}
    for q, gap in ((zh, ""), (en, " ")):
        for score, texts in (("letter", "AB"), ("text", q["options"])):
            result = choices.multiple_choice(model, tok, [q], score=score)
            context = tok.encode(result["prompt"])
            want = [-by_hand(model, context, tok.encode(result["prompt"] + gap + t)[len(context):]).sum().item() for t in texts]
            assert result["scores"][0] == pytest.approx(want, rel=1e-4)
            assert result["acc"] == float(want[1] > want[0])
            if score == "text":
                assert result["acc_norm"] == float(want[1] / len(texts[1]) > want[0] / len(texts[0]))
    result = choices.multiple_choice(model, tok, [en], score="text", chat=True)
    context = render(tok, [{"role": "user", "content": "The sky is"}], add_generation_prompt=True)[0]
    assert result["scores"][0] == pytest.approx([-by_hand(model, context, tok.encode(o)).sum().item() for o in en["options"]], rel=1e-4)


def test_an_untrained_model_is_within_its_error_bar_of_chance(tok):
    """400 questions with random answers, letters and texts, four and two options, two models: chance lies in the interval, or (one
    in twenty does not) within three standard errors; always the same letter is what such a model says; two runs agree."""
    inside = []
    for seed in range(2):
        for score, options in (("text", ("one", "two", "six", "ten")), ("letter", ("yes", "no")), ("letter", ("one", "two", "six", "ten"))):
            model, questions, chance = tiny_lm(seed, max_seq_len=96), quiz(400, seed, options), 1 / len(options)
            found = choices.multiple_choice(model, tok, questions, score=score)
            assert found["chance"] == chance and abs(found["acc"] - chance) < 3 * math.sqrt(chance * (1 - chance) / 400)
            inside.append(found["low"] <= chance <= found["high"])
    assert sum(inside) >= 5
    assert found == choices.multiple_choice(model, tok, questions, score=score)
    assert max(found["picks"].values()) > 0.5 and sum(found["picks"].values()) == pytest.approx(1)


def test_categories_and_subjects_add_up(tok):
    """Each question counts in its subject and in all categories of it; the mean of subjects weighs them equally."""
    rows = [("law", 1), ("law", 1), ("college_physics", 4)]
    questions = [q | {"suite": "ceval", "subject": subject} for subject, n in rows for q in quiz(n, n)]
    found = choices.multiple_choice(tiny_lm(max_seq_len=256), tok, questions)
    assert {name: t["n"] for name, t in found["by_category"].items()} == {"Humanities": 2, "STEM": 4, "Hard": 4}
    subjects = found["by_subject"]
    assert {name: t["n"] for name, t in subjects.items()} == {"law": 2, "college_physics": 4}
    assert found["acc"] == pytest.approx(sum(t["acc"] * t["n"] for t in subjects.values()) / 6)
    assert found["mean_of_subjects"] == pytest.approx((subjects["law"]["acc"] + subjects["college_physics"]["acc"]) / 2)


# ---- a kill ----------------------------------------------------------------------------------------------------------

def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_bits(tok, tmp_path, monkeypatch, capsys):
    """Killed (by SIGKILL, from within) after its second part of 64: the finished parts are not asked again, a torn line is dropped,
    and the table, to the last bit, is that of a run that nobody disturbed. Other weights begin again."""
    checkpoint.save(tmp_path / "run", 1, tiny_lm(max_seq_len=128), tok, "pretrain", None)
    write(tmp_path / "quiz.csv", CMMLU + "".join(f"{i},{q['question']} {'why ' * (i % 5)},{','.join(q['options'])},{'ABCD'[q['answer']]}\n"
                                                 for i, q in enumerate(quiz(300))))
    def words(out):
        return ["--init_from", str(tmp_path / "run"), "--task", "mc", "--data", str(tmp_path / "quiz.csv"), "--out", str(tmp_path / out), "--device", "cpu"]
    source = ("import os, signal, sys; from nanollm import choices, config; import evaluate; real, calls = choices.continuation_losses, []\n"
              "def counted(model, pairs):\n    calls.append(1)\n    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n    return real(model, pairs)\n"
              "choices.continuation_losses = counted\nconfig.run(evaluate.main, evaluate.Config, argv=sys.argv[1:])")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", source, *words("a")], env=env, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    log = tmp_path / "a" / "mc-quiz-letter.jsonl"
    assert len(log.read_text(encoding="utf-8").splitlines()) == 3                # the key and two parts
    with open(log, "a", encoding="utf-8") as f:
        f.write("[[-1.0, -2.0")
    real, calls = choices.continuation_losses, []
    monkeypatch.setattr(choices, "continuation_losses", lambda model, pairs: (calls.append(1), real(model, pairs))[1])
    for out, asked in (("a", 3), ("b", 5), ("b", 0)):
        calls.clear()
        evaluate.run(evaluate.main, evaluate.Config, argv=words(out))
        assert len(calls) == asked
    assert (tmp_path / "a" / "eval.json").read_bytes() == (tmp_path / "b" / "eval.json").read_bytes()
    checkpoint.save(tmp_path / "run", 2, tiny_lm(5, max_seq_len=128), tok, "pretrain", None)
    capsys.readouterr()
    evaluate.run(evaluate.main, evaluate.Config, argv=words("b"))
    assert len(calls) == 5 and "asking from the beginning" in capsys.readouterr().out


# ---- contamination ---------------------------------------------------------------------------------------------------

def exam(n):
    adjectives, nouns = ["small", "green", "quiet", "early", "heavy"], ["river", "clock", "garden", "letter", "island", "window", "teacher"]
    return [{"question": f"Which of these {adjectives[i % 5]} things did the {nouns[i % 7]} number {i} find behind its old {nouns[(i + 3) % 7]} in spring?",
             "options": [f"a {nouns[(i + k) % 7]} of {adjectives[(i + k) % 5]} glass" for k in range(4)], "answer": i % 4, "subject": "s", "suite": "mmlu"}
            for i in range(n)]


def test_questions_that_stand_in_the_training_text_are_found_and_others_not():
    """A copy with options covers all of it, the question alone a part; case and punctuation do not hide it; a text about other
    things covers nothing; of two equal questions both are found; one too short to tell is None."""
    questions = exam(40) + exam(1) + [{"question": "Why?", "options": []}]
    whole = "Intro. " + questions[0]["question"] + "\n" + "\n".join(f"{c}. {o}" for c, o in zip("ABCD", questions[0]["options"])) + " The end."
    texts = ["An unrelated text about the weather of the north. " * 9, whole, "so: " + questions[7]["question"].upper().replace("?", "!!") + " he asked"]
    covered = contamination.coverage(questions, iter(texts))
    assert covered[0] == covered[40] == 1 and 0 < covered[7] < 1 and covered[41] is None
    assert [i for i, c in enumerate(covered) if c] == [0, 7, 40]
    half = {"question": "\ud800 " + questions[7]["question"]}                        # of a character, as JSON may hold it
    assert contamination.coverage([half], texts)[0] > 0.9


def test_evaluate_tells_the_score_on_found_and_on_other_questions(tok, tmp_path, capsys):
    """--corpus with mc and with chat: both shares add up to the whole, and the worst questions are named."""
    checkpoint.save(tmp_path / "run", 1, tiny_lm(max_seq_len=256), tok, "sft", None)
    questions = exam(12)
    write(tmp_path / "q.csv", CMMLU + "".join(f"{i},{q['question']},{','.join(q['options'])},{'ABCD'[q['answer']]}\n" for i, q in enumerate(questions)))
    write_jsonl(tmp_path / "chats.jsonl", [{"prompt": q["question"], "answer": q["options"][0]} for q in questions])
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": "Seen: " + q["question"]} for q in questions[:3]] + [{"text": "Something else altogether."}])
    for task, data, name in (("mc", "q.csv", "acc"), ("chat", "chats.jsonl", "exact_match")):
        evaluate.main(evaluate.Config(task=task, init_from=str(tmp_path / "run"), data=[str(tmp_path / data)], corpus=[str(tmp_path / "corpus.jsonl")],
                                      out=str(tmp_path / "out"), max_new_tokens=4, device="cpu"))
        found = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))[f"{task}/{data}"]
        parts = found["contamination"]
        assert parts["found"]["n"] == 3 and parts["not found"]["n"] == 9 and len(found["most_found"]) == 3
        assert found[name] == pytest.approx(sum(p[name] * p["n"] for p in parts.values()) / 12)
    assert "not found" in capsys.readouterr().out
