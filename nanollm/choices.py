"""Multiple choice in the forms of MMLU, CMMLU and C-Eval, by log-likelihood, with the definitions of lm-evaluation-harness.

    letter   the options are shown, and log p("A"), log p("B"), … behind the prompt are compared (as the three papers do)
    text     only the question is shown, and log p of each option's text is compared: `acc` as it is, `acc_norm` divided by its
             characters, since a long option is improbable by its length alone (for letters the two are the same)

A model that knows nothing stands at chance, and a small one that has read little stands there, too: so every number comes with the
interval in which 95 % of such tests would fall, and with the share of each letter among its answers, which tells a model that always
says B from one that guesses.
"""
import csv
import json
import math
from collections import Counter
from io import StringIO
from pathlib import Path

import torch

from nanollm import metrics
from nanollm.config import UserError
from nanollm.corpus.io import progress
from nanollm.evaluation import Done, continuation_losses
from nanollm.subjects import SUBJECTS
from nanollm.tokenizer import render

LETTERS = "ABCDEFGH"
PART = 64                                 # questions that are done or not done together when a run is killed
WORDS = {                                 # gap: the space of English belongs to the answer, " A" is one token in most vocabularies
    "mmlu": {"head": "The following are multiple choice questions (with answers) about {subject}.\n\n", "question": "", "answer": "Answer:", "gap": " "},
    "cmmlu": {"head": "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n", "question": "题目：", "answer": "答案是：", "gap": ""},
    "ceval": {"head": "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", "question": "", "answer": "答案：", "gap": ""},
}


# ---- files -----------------------------------------------------------------------------------------------------------

def rows_of(file):
    """(cells of the first row without blanks around them, all rows) of a CSV file."""
    try:
        rows = [row for row in csv.reader(StringIO(file.read_text(encoding="utf-8-sig"), newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{file} is not a UTF-8 CSV file: {e}") from None
    return [c.strip() for c in rows[0]] if rows else [], rows


def read_choices(path):
    """One CSV file or a directory of them -> [{"question", "options", "answer" (index), "subject" (the file's name), "suite"}].

    MMLU has no header (question, options, letter); CMMLU one with Question, A, B, …, Answer; C-Eval one in lower case, with more
    columns. Raises UserError, also for C-Eval's test files, whose answers were never published.
    """
    path = Path(path)
    files = [file for file in (sorted(path.glob("*.csv")) if path.is_dir() else [path]) if file.is_file()]
    questions = []
    if not files:
        raise UserError(f"{path}: no .csv file with multiple-choice questions there")
    for file in files:
        head, rows = rows_of(file)
        suite = "cmmlu" if "Question" in head and "A" in head else "ceval" if "question" in head and "A" in head else "mmlu"
        titles = {"cmmlu": ("Question", "Answer"), "ceval": ("question", "answer")}.get(suite)
        if titles and titles[1] not in head:
            raise UserError(f"{file} has no column {titles[1]}; the answers of C-Eval's test/ were never published, take its val/ instead")
        letters = [c for c in LETTERS if c in head] if titles else list(LETTERS[: max(len(head) - 2, 0)])
        columns = [head.index(c) for c in (titles[0], *letters, titles[1])] if titles else range(len(head))
        subject = file.stem.removesuffix("_dev").removesuffix("_val").removesuffix("_test")
        for line, row in enumerate(rows[bool(titles):], 1 + bool(titles)):
            cells = [row[i].strip() for i in columns] if len(row) > max(columns, default=0) else []
            if len(cells) < 4 or cells[-1] not in letters or not all(cells):       # log p of an empty option would be 0, the best there is
                raise UserError(f"{file} row {line}: wanted a question, two or more options, none of them empty, and the right one's letter")
            questions.append({"question": cells[0], "options": cells[1:-1], "answer": letters.index(cells[-1]), "subject": subject, "suite": suite})
    if not questions:
        raise UserError(f"{path}: the file holds no question")
    return questions


def splits(path):
    """(what to ask, where the solved examples are or None) of a directory as the three suites are laid out, with dev/ and test/ (or
    val/, where the answers of test/ are secret) in it; any other path is what to ask."""
    path = Path(path)
    for name in ("test", "val"):
        files = sorted((path / name).glob("*.csv"))
        head = rows_of(files[0])[0] if files else []
        if "question" in head and "answer" not in head:
            print(f"{path / name} holds no answers (C-Eval has not published them): asking val/ instead", flush=True)
        elif files:
            return path / name, (path / "dev" if (path / "dev").is_dir() else None)
    return path, None


# ---- prompts ---------------------------------------------------------------------------------------------------------

def about(q):
    """(the suite whose words are used, the subject's name in them, its categories). A subject that no suite knows is asked in
    the language of its question."""
    if known := SUBJECTS[q["suite"]].get(q["subject"]):
        return q["suite"], *known
    han = any("\u4e00" <= c <= "\u9fff" for c in q["question"])
    return ("ceval" if q["suite"] == "ceval" else "cmmlu") if han else "mmlu", q["subject"].replace("_", " "), []


def question_text(words, q, letters, answer=False):
    """One question as text, with its lettered options or without, up to its answer or including it."""
    options = "".join(f"{c}. {option}\n" for c, option in zip(LETTERS, q["options"])) if letters else ""
    right = LETTERS[q["answer"]] if letters else q["options"][q["answer"]]
    return words["question"] + q["question"] + "\n" + options + words["answer"] + (words["gap"] + right + "\n\n" if answer else "")


def encode_pair(tok, context, continuation):
    """Ids of both, encoded as one text and parted by the number of the context's own tokens, as lm-evaluation-harness does it
    (HFLM._encode_pair): a tokenizer that sees across the seam may write either side differently."""
    head = tok.encode(context)
    return head, tok.encode(context + continuation)[len(head):] or tok.encode(continuation)


def prompt_of(tok, q, shots, score, chat, n_shots, max_seq_len):
    """One question -> {"text", "gap", "texts" (of the options), "contexts" and "options" (ids, of each), "shots", "cut"}.

    As many of the first n_shots solved examples of its subject go in front as fit beside the longest option. cut says what
    did not fit even so: "" nothing, "context" the beginning of the prompt (each option keeps as much as fits in front of it, as in the
    harness), "option" an option, so that nothing can be asked.
    """
    suite, subject, _ = about(q)
    words, letters, solved = WORDS[suite], score == "letter", []
    texts = list(LETTERS[: len(q["options"])]) if letters else q["options"]
    if chat:
        user = question_text({"question": "", "answer": ""}, q, letters).rstrip("\n")
        text, gap = user, ""
        context, options = render(tok, [{"role": "user", "content": user}], add_generation_prompt=True)[0], [tok.encode(t) for t in texts]
    else:
        gap, solved = words["gap"], [question_text(words, s, letters, answer=True) for s in shots if s["subject"] == q["subject"]][:n_shots]
        for used in range(len(solved), -1, -1):
            text = words["head"].format(subject=subject) + "".join(solved[:used]) + question_text(words, q, letters)
            if used and len(tok.encode(text)) > max_seq_len:
                continue
            pairs = [encode_pair(tok, text, gap + t) for t in texts]
            context, options, solved = pairs[0][0], [ids for _, ids in pairs], solved[:used]
            if len(context) + max(map(len, options)) <= max_seq_len + 1:
                break
    room = max_seq_len + 1 - max(map(len, options))
    return {"text": text, "gap": gap, "texts": texts, "contexts": [context[-(max_seq_len + 1 - len(ids)):] for ids in options],
            "options": options, "shots": len(solved), "cut": "option" if room < 1 else "context" if len(context) > room else ""}


# ---- scores ----------------------------------------------------------------------------------------------------------

def log_likelihoods(model, prompts, log=None):
    """[prompt_of(…)] -> for each [log p of each option]. log: a file in which every part of 64 questions is written down when it
    is done, so that a killed run goes on there; parts and batches do not depend on the kill, so neither does any bit of the result."""
    asked, scores = [list(zip(p["contexts"], p["options"])) for p in prompts], []
    done = Done(log, model, asked)
    if done:
        print(f"{min(len(done) * PART, len(asked))} of {len(asked)} questions are answered in {log}", flush=True)
    for start in progress(range(0, len(asked), PART), desc="questions", unit=f" x {PART}"):
        if start not in done:
            part = asked[start : start + PART]
            losses = iter(continuation_losses(model, [pair for pairs in part for pair in pairs]))
            new = [[-next(losses).sum().item() for _ in pairs] for pairs in part]
            if not all(math.isfinite(x) for row in new for x in row):
                raise UserError("the model gives an option a probability that is no number: its weights are broken, take another checkpoint")
            done[start] = new
        scores += done[start]
    return scores


def multiple_choice(model, tok, questions, shots=(), score="letter", chat=False, n_shots=5, log=None):
    """Ask `questions` (of read_choices) and count the right answers: a table of numbers, in all, by category and by subject.

    score and shots as at the top of this file; chat: the question is the user's message and the option begins the answer (no shots).
    log: see log_likelihoods. The output names prompt, scoring and what did not fit: a number without them means little.
    """
    if score not in ("letter", "text"):
        raise UserError(f"--score {score} is unknown; use letter or text")
    prompts = [prompt_of(tok, q, shots, score, chat, n_shots, model.args.max_seq_len) for q in questions]
    cut = Counter(p["cut"] for p in prompts)
    asked = [(i, q, p) for i, (q, p) in enumerate(zip(questions, prompts)) if p["cut"] != "option"]
    if not asked:
        raise UserError(f"every question has an option that is longer than the model's context of {model.args.max_seq_len} tokens; use --score letter")
    scores, rows = log_likelihoods(model, [p for _, _, p in asked], log), []
    for (i, q, p), logps in zip(asked, scores):
        by_length = [x / max(len(text), 1) for x, text in zip(logps, p["texts"])]          # characters, not bytes: so the harness has it
        pick, pick_norm = logps.index(max(logps)), by_length.index(max(by_length))
        rows.append({"question": i, "subject": q["subject"], "categories": about(q)[2], "acc": pick == q["answer"], "acc_norm": pick_norm == q["answer"],
                     "pick": LETTERS[pick], "answer": LETTERS[q["answer"]], "chance": 1 / len(q["options"])})
    count = lambda key: {c: n / len(rows) for c, n in sorted(Counter(row[key] for row in rows).items())}
    categories = dict.fromkeys(c for row in rows for c in row["categories"])
    subjects = {s: table([row for row in rows if row["subject"] == s], score) for s in dict.fromkeys(row["subject"] for row in rows)}
    return table(rows, score) | {
        "mean_of_subjects": sum(t["acc"] for t in subjects.values()) / len(subjects),
        "by_category": {c: table([row for row in rows if c in row["categories"]], score) for c in categories}, "by_subject": subjects,
        "picks": count("pick"), "answers": count("answer"),
        "scoring": "log p of the option's letter" if score == "letter" else "log p of the option's text; acc_norm: / its characters",
        "template": "chat, 0 shots" if chat else f"plain text, {sum(p['shots'] for *_, p in asked) / len(asked):.2f} shots on average",
        "truncated": cut["context"], "unscored": cut["option"], "prompt": tok.decode(asked[0][2]["contexts"][0]),
        "scores": scores, "rows": rows}


def table(rows, score):
    """The numbers of some of the questions: {"acc", "low", "high", "stderr", "n", "chance"}, and acc_norm where texts were scored."""
    found = metrics.share([row["acc"] for row in rows], "acc")
    if score == "text":
        norm = metrics.share([row["acc_norm"] for row in rows], "acc_norm")
        found |= {"acc_norm": norm["acc_norm"], "norm_low": norm["low"], "norm_high": norm["high"]}
    return found | {"chance": sum(row["chance"] for row in rows) / len(rows)}


# ---- the same questions elsewhere ------------------------------------------------------------------------------------

def write_lm_eval(folder, name, tok, questions, shots=(), score="letter", n_shots=5, max_seq_len=2048):
    """The same prompts as a local task of lm-evaluation-harness: folder/NAME.jsonl and folder/NAME.yaml (JSON is YAML). There, an
    exported model gets the same acc and acc_norm. Questions whose options do not fit are left out, as they are here."""
    folder, prompts = Path(folder).resolve(), [prompt_of(tok, q, shots, score, False, n_shots, max_seq_len) for q in questions]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": p["text"] + p["gap"], "choices": p["texts"], "answer": q["answer"]} for q, p in zip(questions, prompts) if p["cut"] != "option"]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "target_delimiter": "", "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]}
    (folder / f"{name}.yaml").write_text(json.dumps(task, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return len(rows)
