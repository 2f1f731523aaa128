"""Classifiers: where labels stand, what is measured, training as every stage trains, and a corpus judged by one."""
import importlib.util
import math
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

import prepare_data
import train_classify
from conftest import COLOURS, COMMON, NAMES, THINGS, largest_difference, metrics, run_ranks, tiny_lm, tiny_tokenizer, weights, write_jsonl
from nanollm import checkpoint, classify, dist, heads, peft
from nanollm.config import UserError, parse
from nanollm.heads import BEGINS, ENDS, Classifier
from nanollm.losses import IGNORE_INDEX
from nanollm.optim import make_optimizer

WARM = {"red", "yellow"}


def sequence_rows(n):
    """Up to 144 different ones, in an order without rhythm."""
    order = [i * 35 % 144 for i in range(n)]
    return [{"text": f"{NAMES[i % 6]} has a {COLOURS[i // 6 % 4]} {THINGS[i // 24]}.", "label": "warm" if COLOURS[i // 6 % 4] in WARM else "cold"} for i in order]


def token_rows(n):
    return [{"tokens": ["Mr", NAMES[i % 6], "has", "a", COLOURS[i // 6 % 4], THINGS[i // 24 % 6], "."],
             "labels": ["B-PER", "I-PER", "O", "O", "O", "B-OBJ", "O"]} for i in range(n)]


def answer_rows(n):
    """What one can answer looking back: the thing stands behind its owner."""
    rows = []
    for i in range(n):
        who, other, what = NAMES[i % 6], NAMES[(i + 1 + i // 6 % 5) % 6], THINGS[i // 5 % 6]
        context = [f"{who} has a {what}. ", f"{other} has a {THINGS[(i // 5 + 1) % 6]}. "]
        rows.append({"context": "".join(context if i % 2 else context[::-1]), "question": f"What has {who}?", "answer": what})
    return rows


ROWS = {"sequence": sequence_rows, "token": token_rows, "answer": answer_rows}


def write_files(root, n=48, n_val=11):
    checkpoint.save(root / "base", 7, tiny_lm(), tiny_tokenizer(), "pretrain", None)
    for task, rows in ROWS.items():
        write_jsonl(root / f"{task}.jsonl", rows(n + n_val)[n_val:])
        write_jsonl(root / f"{task}_val.jsonl", rows(n_val))
    return root


def train(task, root, out, **changes):
    own = dict(data=[str(root / f"{task}.jsonl")], val_data=[str(root / f"{task}_val.jsonl")], init_from=str(root / "base"), out_dir=str(out), epochs=0.0)
    train_classify.main(train_classify.Config(**{**COMMON, **own, **changes}))
    return metrics(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def rows_of(rows, T=64, **more):
    return classify.LabelledRows([(f"x:{i}", row) for i, row in enumerate(rows, 1)], tiny_tokenizer(), T, **more)


# ---- rows

def test_a_text_is_judged_at_its_end_and_a_word_at_its_last_piece():
    """The only tokens that have seen all of it. Latin words get the blank that they have in running text, Chinese and punctuation none."""
    tok, rows = tiny_tokenizer(), rows_of(sequence_rows(30))
    ids, targets = rows.examples[0]
    assert ids[0] == ids[-1] == tok.eos_id and [t != IGNORE_INDEX for t in targets] == [False] * (len(ids) - 1) + [True]
    assert rows.labels == ["cold", "warm"] and rows.labels[targets[-1]] == "warm"
    row = {"tokens": ["Clara", "likes", "小明", "的", "苹果", "."], "labels": ["P", "O", "P", "O", "T", "O"]}
    rows = rows_of([row])
    ids, targets = rows.examples[0]
    assert tok.decode(ids) == "Clara likes小明的苹果."
    ends = [tok.decode(ids[: i + 1]) for i, t in enumerate(targets) if t != IGNORE_INDEX]
    assert ends == ["Clara", "Clara likes", "Clara likes小明", "Clara likes小明的", "Clara likes小明的苹果", "Clara likes小明的苹果."]
    assert [rows.labels[t] for t in targets if t != IGNORE_INDEX] == row["labels"]


@pytest.mark.parametrize("context, answer, start", [("Anna has a red ball.", "red ball", None), ("小红有一只黄色的小狗。", "黄色的小狗", 5), ("ball, ball", "ball", 6), ("x", "x", 0)])
def test_the_tokens_of_an_answer_hold_its_bytes_and_no_token_more(context, answer, start):
    """Counted in bytes, so a character of several tokens and a token of several characters do no harm; the first of several places
    unless answer_start says which."""
    tok = tiny_tokenizer()
    ids, targets, cut = classify.read_answer({"context": context, "question": "?", "answer": answer, "answer_start": start}, tok, 64)
    first, last = (next(i for i, t in enumerate(targets) if t in of) for of in ((BEGINS, BEGINS + ENDS), (ENDS, BEGINS + ENDS)))
    assert answer in tok.decode(ids[first : last + 1]) and not cut
    assert answer not in tok.decode(ids[first + 1 : last + 1]) and answer not in tok.decode(ids[first:last])
    before = len(tok.decode([i for i, t in zip(ids, targets) if t is not None][: first - targets.index(0 if 0 in targets else targets[first])]).encode())
    assert before <= len(context[: context.find(answer) if start is None else start].encode())
    squad = {"context": context, "question": "?", "answers": {"text": [answer], "answer_start": [context.find(answer) if start is None else start]}}
    assert classify.read_answer(squad, tok, 64)[:2] == (ids, targets)


def test_rows_that_cannot_be_used_are_counted_by_reason(capsys):
    good = sequence_rows(30)
    bad = [{"text": " ", "label": "a"}, {"text": "x", "label": 1.5}, {"text": "x"}, {"context": "a", "question": "b", "answer": "c"}]
    rows = rows_of(good + bad, max_bad=0.2)
    out = capsys.readouterr().out
    assert len(rows) == 30 and "set aside 4 of 34 rows" in out and "empty or no text" in out and "not 1.5" in out and "2 x not a row of the task sequence" in out
    with pytest.raises(UserError, match="a label that no training row has: 7"):
        rows_of([{"text": "x", "label": 7}], task="sequence", labels=["0", "1"])
    answers = [{"context": "abc", "question": "q", "answer": "x"}, {"context": "abc", "question": "q", "answer": "c", "answer_start": 1},
               {"context": "long " * 100 + "end", "question": "q", "answer": "end"}, {"context": "a", "question": "q", "answers": {"text": []}},
               {"context": "a", "question": "q", "answers": 3}]
    rows_of(answer_rows(10) + answers, max_bad=0.5)
    out = capsys.readouterr().out
    for reason in ("does not stand in its context, such", "where answer_start says", "beyond --max_seq_len", "context, question or answer is empty", "not of the form"):
        assert reason in out, reason
    rows_of(token_rows(9) + [{"tokens": ["a"], "labels": []}], max_bad=0.5)
    assert "two lists of one length" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing to tell apart"):
        rows_of([{"text": "x", "label": "a"}] * 3)
    with pytest.raises(UserError, match="wanted are text and label"):
        rows_of([{"prompt": "x"}])


# ---- losses and metrics

def test_the_answer_loss_is_two_softmaxes_over_places():
    """Against F.cross_entropy over the context's places alone, start and end; a row of padding adds nothing and harms nothing."""
    torch.manual_seed(0)
    logits = torch.randn(3, 9, 2, requires_grad=True)
    targets = torch.full((3, 9), IGNORE_INDEX)
    targets[0, 2:] = 0
    targets[0, 4], targets[0, 6] = BEGINS, ENDS
    targets[1, 3:8] = 0
    targets[1, 5] = BEGINS + ENDS
    loss, count, _ = heads.span_loss(logits, targets)
    of = lambda row, inside, place, side: F.cross_entropy(logits[row, inside, side], torch.tensor(place))
    want = [(of(0, slice(2, 9), 2, 0) + of(0, slice(2, 9), 4, 1)) / 2, (of(1, slice(3, 8), 2, 0) + of(1, slice(3, 8), 2, 1)) / 2]
    assert loss.item() == pytest.approx(sum(want).item(), rel=1e-5) and count == 2
    loss.backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[2] == 0).all() and (logits.grad[0, :2] == 0).all()


def test_the_best_span_is_the_best_of_all_that_are_allowed():
    torch.manual_seed(1)
    logits, targets = torch.randn(6, 12, 2), torch.zeros(6, 12, dtype=torch.long)
    targets[:, :3] = IGNORE_INDEX
    for row, (first, last) in zip(logits, heads.decide("answer", logits, targets, longest=4).tolist()):
        score = lambda a, b: row[a, 0] + row[b, 1]
        assert 3 <= first <= last < first + 4
        assert score(first, last) == max(score(a, b) for a in range(3, 12) for b in range(a, min(a + 4, 12)))


def test_f1_counts_rare_labels_entities_and_shared_words():
    """By hand. Always saying the frequent label: accuracy 0.9, macro F1 below 0.5."""
    pairs = [("a", "a")] * 9 + [("a", "b")]
    assert classify.macro_f1(pairs) == pytest.approx((18 / 19 + 0) / 2)
    assert classify.entities(["B-P", "I-P", "O", "B-P", "B-P", "I-Q", "I-Q"]) == {("P", 0, 1), ("P", 3, 3), ("P", 4, 4), ("Q", 5, 6)}
    assert classify.entities(["I-P", "O"]) == {("P", 0, 0)} and classify.entities(["O"]) == set()
    assert classify.f1_of({1, 2, 3}, {2, 3, 4, 5}) == {"precision": 2 / 3, "recall": 0.5, "f1": pytest.approx(4 / 7)}
    assert classify.normal("The Red, ball!") == ["red", "ball"] and classify.normal("一只红球。") == ["一", "只", "红", "球"]
    assert classify.overlap("the red ball", "red kite") == pytest.approx(0.5) and classify.overlap("黄狗", "黄色的狗") == pytest.approx(2 * 2 / 6)


def test_an_answer_is_the_same_where_squads_own_script_says_so():
    """Its functions as lm-evaluation-harness carries them, on printable ASCII, articles and points within words among it; of Chinese the
    punctuation goes, too, and each character is a word."""
    path = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "qasper" / "metrics.py"
    theirs = importlib.util.module_from_spec(about := importlib.util.spec_from_file_location("squad", path))
    about.loader.exec_module(theirs)
    rng, pieces = random.Random(0), ["the ", "An", "a", " a.m.", "U.S.", "$5", "-", "don't ", "(Theatre)", " ", "x", *map(chr, range(32, 127))]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(2000)]
    assert [" ".join(classify.normal(text)) for text in texts] == [theirs.normalize_answer(text) for text in texts]
    for said, true in zip(texts, texts[1:]):
        if classify.normal(said) and classify.normal(true):  # theirs: nothing is unlike nothing
            assert classify.overlap(said, true) == pytest.approx(theirs.f1_abstractive([said], [true]))
    assert classify.normal("“他说：好！”") == ["他", "说", "好"]


def test_a_token_report_names_labels_and_entities():
    rows = rows_of(token_rows(3))
    true = torch.tensor([t for _, targets in rows.examples for t in targets if t != IGNORE_INDEX])
    assert rows.report(true) == {"accuracy": 1, "macro_f1": 1, "entity_precision": 1, "entity_recall": 1, "entity_f1": 1}
    wrong = true.clone()
    wrong[rows.where([1])[1]] = rows.labels.index("O")       # one of three names ends a word early: the word is wrong, and the entity
    found = rows.report(wrong)
    assert found["accuracy"] == pytest.approx(20 / 21) and found["entity_recall"] == pytest.approx(5 / 6)


# ---- the model

def test_what_follows_a_word_cannot_change_its_label_unless_rows_are_read_in_both_directions():
    """What it costs to label words with a decoder, and what --variants prefix_lm buys; padding is seen by nobody either way."""
    tok, torch_ids = tiny_tokenizer(), lambda *words: torch.tensor([tiny_tokenizer().encode("Anna has a" + w) for w in words])
    for variants, apart in (([], False), (["prefix_lm"], True)):
        model = Classifier(checkpoint.build(tiny_lm(variants=variants).args), "token", ["a", "b"]).eval()
        one, two = (classify.logits_of(model, torch_ids(w), tok.pad_id)[0, 0] for w in (" red", " blu"))
        assert (one != two).any() == apart
        ids = torch_ids(" red")
        padded = torch.cat([ids, torch.full((1, 5), tok.pad_id)], 1)
        torch.testing.assert_close(classify.logits_of(model, padded, tok.pad_id)[:, : ids.size(1)], classify.logits_of(model, ids, tok.pad_id))


def test_probabilities_do_not_depend_on_the_neighbours():
    model, tok = Classifier(tiny_lm(), "sequence", ["a", "b", "c"]).eval(), tiny_tokenizer()
    texts = [r["text"] for r in sequence_rows(9)] + ["", "long " * 60]
    together = classify.probabilities(model, tok, texts, max_tokens=150)
    assert torch.allclose(together, torch.cat([classify.probabilities(model, tok, [t]) for t in texts]), atol=1e-6)
    assert torch.allclose(together.sum(1), torch.ones(len(texts)))


@pytest.mark.parametrize("task, steps, metric", [("sequence", 80, "accuracy"), ("token", 40, "entity_f1"), ("answer", 150, "exact_match")])
def test_each_task_is_learnt(tmp_path, task, steps, metric):
    """From chance (a fresh head knows nothing: the loss is the logarithm of the number of labels) to nearly all held-out rows."""
    root = write_files(tmp_path, 104 if task == "sequence" else 240, 40)
    records = train(task, root, tmp_path / "out", max_steps=steps, batch_size=16, gradient_accumulation_steps=1, learning_rate=4e-3, eval_every=1000, log_every=20)
    first, last = (r for r in records if "val/loss" in r)
    model, _, meta = checkpoint.load(tmp_path / "out", expect="classifier")
    if task != "answer":
        assert first["val/loss"] == pytest.approx(math.log(len(model.labels)), rel=0.15)
    assert last[f"val/{metric}"] >= 0.9 and last[f"val/{metric}"] > first[f"val/{metric}"], last
    assert meta["classifier"] == {"task": task, "labels": model.labels} and meta["head"] == "classifier"


# ---- training as every stage trains

RUNS = {"sequence": {}, "token": {"variants": ["prefix_lm"]}, "answer": {"optimizer": "muon"}, "frozen": {"freeze": True}, "lora": {"peft": "lora"}, "fsdp": {"parallel": "fsdp"}}


def run_all(root, out):
    return {name: train(name if name in ROWS else "sequence", root, out / name, eval_every=2, **more) for name, more in RUNS.items()}


def worker(out):
    torch.distributed.init_process_group("gloo")
    dist.finish = lambda ctx: None                             # one group for all runs
    if os.environ["RANK"] == "0":
        write_files(out / "files")
    torch.distributed.barrier()
    run_all(out / "files", out)
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_run_of_one(tmp_path):
    """Same losses, same metrics (each held-out row is judged by one rank), same weights, for all tasks; a frozen body stays bit for bit."""
    run_ranks("test_classify.worker", tmp_path / "two")
    alone = run_all(tmp_path / "two" / "files", tmp_path / "one")
    for name, records in alone.items():
        both = metrics(tmp_path / "two" / name)
        assert len(both) == len(records) and [r["step"] for r in records if "val/loss" in r] == [0, 2, 3]
        for a, b in zip(both, records):
            for key in b.keys() - {"tokens_per_s", "time"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (name, key, a["step"])
        assert largest_difference(weights(tmp_path / "two" / name), weights(tmp_path / "one" / name)) < 1e-5
    base, frozen = weights(tmp_path / "two" / "files" / "base"), weights(tmp_path / "one" / "frozen")
    assert all(torch.equal(base[k.removeprefix("backbone.")], v) for k, v in frozen.items() if not k.startswith("head."))
    assert frozen["head.weight"].abs().max() > 0
    tuned = weights(tmp_path / "one" / "lora")
    assert all(torch.equal(base[k], tuned[f"backbone.{k}"]) for k in base if k != "output.weight") and any("lora_B" in k for k in tuned)
    assert checkpoint.load(tmp_path / "one" / "lora", expect="classifier")[0].labels == ["cold", "warm"]


@pytest.mark.parametrize("method", peft.ANYWHERE)
def test_every_adapter_of_the_other_stages_trains_a_classifier(files, tmp_path, method):
    """The head beside it trains; the checkpoint of the adapter and the head alone finds its base again."""
    train("sequence", files, tmp_path / method, peft=method, adapter_only=True)
    model, tok, meta = checkpoint.load(tmp_path / method, expect="classifier")
    assert all(k.startswith("head.") or peft.OWN.search(k) for k in weights(tmp_path / method)) and meta["adapter"]["method"] == method
    assert classify.probabilities(model, tok, ["Anna has a red cat."]).shape == (1, 2)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(files, tmp_path):
    for task in heads.TASKS:
        long = dict(max_steps=6, save_every=3, keep=0)
        straight = train(task, files, tmp_path / f"{task}a", **long)
        train(task, files, tmp_path / f"{task}b", **long)
        os.rename(tmp_path / f"{task}b" / "step_00000006", tmp_path / f"{task}gone")
        resumed = train(task, files, tmp_path / f"{task}b", resume="auto", **long)
        values = lambda records: {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
        assert values(resumed) == values(straight)
        assert largest_difference(weights(tmp_path / f"{task}a"), weights(tmp_path / f"{task}b")) == 0


def test_a_checkpoint_of_another_kind_is_refused_in_words(files, tmp_path):
    train("token", files, tmp_path / "c", max_steps=1)
    with pytest.raises(UserError, match="is a classifier .classify., but this needs a language model"):
        checkpoint.load(tmp_path / "c", expect="lm")
    with pytest.raises(UserError, match="is a language model .pretrain., but this needs a classifier"):
        checkpoint.load(files / "base", expect="classifier")
    for T in (999, 2):                                       # 2: two <|endoftext|> and no text between them
        with pytest.raises(UserError, match=f"--max_seq_len {T}: at least 3"):
            train("sequence", files, tmp_path / "d", max_seq_len=T)
    with pytest.raises(UserError, match="--freeze trains the head alone, --peft lora"):
        train("sequence", files, tmp_path / "d", freeze=True, peft="lora")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_does_not_pull_the_gains_of_ia3_to_zero(kind):
    """They begin at 1, where they do nothing; the head is a matrix like another."""
    model = Classifier(tiny_lm(), "sequence", ["a", "b"])
    peft.add_adapter(model, "ia3")
    groups = make_optimizer(model, kind, weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"] or group["muon"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {"head.weight"}


# ---- a corpus judged

def score(*words):
    prepare_data.score(parse(prepare_data.Score, [*map(str, words), "--workers", "1"]))


def documents(directory, dropped=False):
    return [row for p in sorted(directory.glob("part-*.parquet")) if (".dropped." in p.name) == dropped for row in pq.read_table(p).to_pylist()]


def test_a_classifier_scores_a_corpus_and_drops_what_lies_below_the_threshold(tmp_path, capsys):
    """`quality` is the probability of the named label; with --as_source the likeliest label is the source; a finished stage is skipped
    until the classifier is another one."""
    root = write_files(tmp_path, 132, 12)
    train("sequence", root, tmp_path / "c", max_steps=100, batch_size=16, gradient_accumulation_steps=1, learning_rate=4e-3)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": r["text"]} for r in sequence_rows(60)])
    words = ["--input", corpus, "--out", tmp_path / "out", "--classifier", f"{tmp_path / 'c'}:warm", "--as_source", "--select", "threshold", "--threshold", "0.5"]
    score(*words)
    out = capsys.readouterr().out
    kept, dropped = documents(tmp_path / "out" / "score"), documents(tmp_path / "out" / "score", True)
    assert len(kept) + len(dropped) == 60 and all(r["quality"] >= 0.5 and r["source"] == "warm" for r in kept)
    assert all(r["quality"] < 0.5 and r["drop_reason"] == "quality" for r in dropped) and f"sources of the kept: warm {len(kept)}\n" in out
    warm = lambda rows: sum(any(w in r["text"] for w in WARM) for r in rows)
    assert warm(kept) >= 0.9 * len(kept) and warm(dropped) <= 0.1 * len(dropped)
    model, tok, _ = classify.load(str(tmp_path / "c"))
    assert kept[0]["quality"] == pytest.approx(classify.probabilities(model, tok, [kept[0]["text"]])[0, model.labels.index("warm")].item(), abs=1e-5)
    score(*words)
    assert "score is complete, skipped" in capsys.readouterr().out
    train("sequence", root, tmp_path / "d", max_steps=1)
    words[words.index("--classifier") + 1] = f"{tmp_path / 'd'}:warm"
    score(*words)
    assert "score is complete, skipped" not in capsys.readouterr().out


def test_a_judge_that_cannot_judge_is_refused_before_anything_is_read(files, tmp_path):
    for task in ("sequence", "token"):
        train(task, files, tmp_path / task, max_steps=1)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "x"}])
    out = ["--input", corpus, "--out", tmp_path / "out"]
    for words, what in ((["--classifier", tmp_path / "sequence"], "write .*sequence:LABEL with one of cold, warm"),
                        (["--classifier", f"{tmp_path / 'sequence'}:hot"], "one of cold, warm"),
                        (["--classifier", f"{tmp_path / 'token'}:O"], "labels words, not texts"),
                        (["--classifier", f"{files / 'base'}:O"], "needs a classifier"), (["--as_source"], "--as_source needs --classifier"),
                        (["--classifier", f"{tmp_path / 'sequence'}:warm", "--scorer", f"{__file__}:score"], "give one of them")):
        with pytest.raises(UserError, match=what):
            score(*out, *words)
    model, tok, _ = classify.load(str(tmp_path / "sequence"))
    torch.nn.init.constant_(model.head.weight, float("nan"))
    checkpoint.save(tmp_path / "broken", 1, model, tok, "classify", None)
    with pytest.raises(UserError, match="broken gives probabilities that are no numbers"):
        score(*out, "--classifier", f"{tmp_path / 'broken'}:warm", "--select", "threshold")


def test_the_experiment_on_judges_runs_and_keeps_documents_apart(files, tmp_path, capsys):
    """On toy text: no figure of this run means anything."""
    from learn.studies import judge
    for label, word in (("a", "cat"), ("b", "sun")):
        (tmp_path / f"{label}.txt").write_text("\n\n".join(f"Document {i} of a {word} {'and more ' * 20}" for i in range(12)), encoding="utf-8")
    words = dict(input=[f"{label}={tmp_path / label}.txt" for label in "ab"], init_from=str(files / "base"), chars=60, out_dir=str(tmp_path / "out"))
    judge.main(judge.Config(sizes=["2", "4"], test_rows=4, steps=11, **words))
    out = capsys.readouterr().out
    assert "| rows a label | all weights | head alone | random weights |" in out and "AUC, a above b: classifier" in out
    rows = {name: (tmp_path / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train_2", "train_4", "test")}
    assert [len(r) for r in rows.values()] == [4, 8, 8] and not set(rows["test"]) & set(rows["train_4"])
    assert judge.auc([3, 2, 1], [True, True, False]) == 1 and judge.auc([1, 1], [True, False]) == 0.5
    with pytest.raises(UserError, match="passages to train on, 500 are wanted"):
        judge.main(judge.Config(sizes=["500"], **words))
