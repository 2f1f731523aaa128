"""Evaluation: every number is held against one computed by hand or known in advance."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE, pairs, stories, tiny_lm, tiny_tokenizer, write_jsonl

import evaluate
from nanollm import checkpoint, evaluation, report, scoreboard
from nanollm import world as demo_world
from nanollm.config import UserError
from nanollm.corpus.pack import write_tokens
from nanollm.data import PreferenceRows, TokenFile
from nanollm.model import ModelArgs, RewardModel, Transformer
from nanollm.tokenizer import char_tokenizer, render

HEAD = ",Question,A,B,C,D,Answer\n"


def by_hand(model, context, continuation):
    """-log p of each continuation token from one plain forward pass over the two together."""
    ids = torch.tensor([context + continuation])
    logps = model(ids)[0].log_softmax(-1)
    return -torch.stack([logps[len(context) - 1 + i, t] for i, t in enumerate(continuation)])


def uniform_model(vocab_size):
    model = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=2, vocab_size=vocab_size, max_seq_len=32, tie_embeddings=False))
    torch.nn.init.zeros_(model.output.weight)
    return model


def test_continuation_losses_equal_a_plain_forward_pass_of_each_pair(tok):
    """Batching rows of unlike length, and sharing a forward pass between options, changes no number."""
    model = tiny_lm()
    ids = [tok.encode(s)[:50] for s in stories(9)]
    jobs = [(row[:k], row[k:]) for row in ids for k in (1, 7)] + [(ids[0][:5], [t]) for t in (1, 2, 3, 4)]
    for (context, continuation), losses in zip(jobs, evaluation.continuation_losses(model, jobs)):
        torch.testing.assert_close(losses, by_hand(model, context, continuation), atol=1e-4, rtol=1e-4)


def test_bits_per_byte_of_a_uniform_model_are_equal_for_two_tokenizers():
    """One token a byte (257 of them with the EOS) or one a pair of bytes (257 squared): the perplexities are 257 and 66,049,
    the bits per byte log2 257 both times, since the same ignorance about the same bytes is the same number."""
    text = "the same text for both, 你好"
    raw = text.encode("utf-8")
    singles = SimpleNamespace(vocab_size=257, eos_id=256, encode=lambda t: list(t.encode("utf-8")), token_bytes=lambda i: b"x" * (i < 256))
    couples = SimpleNamespace(vocab_size=257**2, eos_id=65536, encode=lambda t: [raw[i] * 256 + raw[i + 1] for i in range(0, len(raw), 2)],
                              token_bytes=lambda i: b"xx" * (i < 65536))
    assert len(raw) % 2 == 0
    one, two = (evaluation.lm_loss(uniform_model(t.vocab_size), t, [text] * 3) for t in (singles, couples))
    assert one["ppl"] == pytest.approx(257, rel=1e-4) and two["ppl"] == pytest.approx(257**2, rel=1e-4)
    assert one["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-5) == two["bits_per_byte"]
    assert one["bytes"] == two["bytes"] == 3 * len(raw)


def test_domains_are_told_apart_on_the_same_documents_whatever_the_tokenizer(tmp_path, monkeypatch, capsys):
    """Two tokenizers, other numbers of tokens, the same bytes, documents and hash of the texts; the whole is weighted by bytes;
    NAME=PATH names a domain, a file is one by its name. A tokenizer that cannot write a text back is told; so are unreadable rows."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in stories(6)])
    write_jsonl(tmp_path / "zh.jsonl", [{"text": "今天天气很好。" * k} for k in (1, 2, 9)])
    found = []
    for tok in (tiny_tokenizer(257 + 63), char_tokenizer(sorted(set("".join(stories(6)))))):
        cfg = evaluate.Config(data=[f"{tmp_path}/a.jsonl", f"chinese={tmp_path}/zh.jsonl"], max_rows=5, device="cpu")
        found.append(evaluate.ppl(cfg, uniform_model(tok.vocab_size), tok))
        numbers = found[-1]
        parts = numbers["by_domain"]
        assert {name: part["documents"] for name, part in parts.items()} == {"a": 5, "chinese": 3} and numbers["documents"] == 8
        assert numbers["bits_per_byte"] == pytest.approx(sum(p["bits_per_byte"] * p["bytes"] for p in parts.values()) / numbers["bytes"])
        assert parts["chinese"]["bytes"] == 21 * 12 and all(p["low"] <= p["bits_per_byte"] <= p["high"] for p in [numbers, *parts.values()])
    one, two = found
    assert one["data_hash"] == two["data_hash"] and one["bytes"] == two["bytes"] and one["tokens"] != two["tokens"]
    assert one["lossy"] == two["lossy"] == 0
    monkeypatch.setattr(tok, "decode", lambda ids: "?")
    assert evaluate.ppl(cfg, uniform_model(tok.vocab_size), tok)["lossy"] == 8 and "cannot write back" in capsys.readouterr().out
    write_jsonl(tmp_path / "some.jsonl", [{"text": text} for text in stories(60)] + [{"nothing": 1}] * 3)
    assert evaluate.ppl(evaluate.Config(data=[str(tmp_path / "some.jsonl")], max_rows=2), uniform_model(tok.vocab_size), tok)["documents"] == 2
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"text": "read"}])
    (tmp_path / "corpus" / "b.pdf").write_text("not read", encoding="utf-8")
    assert list(evaluate.documents("--corpus", [str(tmp_path / "corpus")], {})) == [("a", "read")]
    assert "b.pdf is not read: unknown extension" in capsys.readouterr().out
    (tmp_path / "corpus" / "a.jsonl").unlink()
    with pytest.raises(UserError, match="^--corpus: nothing to read in .*b.pdf"):
        list(evaluate.documents("--corpus", [str(tmp_path / "corpus")], {}))
    with pytest.raises(UserError, match="cannot be read"):
        write_jsonl(tmp_path / "bad.jsonl", [{"nothing": 1}] * 3)
        evaluate.ppl(evaluate.Config(data=[str(tmp_path / "bad.jsonl")]), uniform_model(tok.vocab_size), tok)


def test_every_token_of_the_validation_file_is_predicted_once(world, tok):
    """A token file and its texts give the same loss, weighted by tokens, and the byte count of the file's JSON; documents
    longer than the context are cut, not left out."""
    model = tiny_lm(max_seq_len=16)
    data = TokenFile(world / "tokens", "val", 16, "documents", tok.hash)
    ends = data.ends[:].tolist()
    rows = [data.tokens[a:b].tolist() for a, b in zip([0, *ends], ends)]
    from_file = evaluation.lm_loss(model, tok, data)
    from_text = evaluation.lm_loss(model, tok, [tok.decode(row[:-1]) for row in rows])
    assert max(map(len, rows)) > 16 and from_file["tokens"] == data.meta["n_tokens"] and from_file["bytes"] == data.meta["n_bytes"]
    assert from_text["loss"] == pytest.approx(from_file["loss"], rel=1e-5)
    whole = tiny_lm(max_seq_len=512)
    nats = sum(by_hand(whole, [tok.eos_id], row).sum().item() for row in rows)
    assert evaluation.lm_loss(whole, tok, TokenFile(world / "tokens", "val", 512, "documents"))["loss"] == pytest.approx(
        nats / data.meta["n_tokens"], rel=1e-4)


def test_loss_by_kind_adds_up_to_the_whole(tok):
    """Tokens, nats and floor of the kinds sum to those of all tokens; a token that writes part of a copied word is a copy,
    also behind Chinese, where characters and bytes differ; the floor of a kind is what its spans hold."""
    texts = ["小明 has a red ball. The ball is red.", "Anna has a blue kite."]

    def parse(text):
        colour = "red" if "red" in text else "blue"
        at = text.index(colour)
        spans = [(at, at + len(colour), "choice", math.log(4))]
        if text.count(colour) > 1:
            spans.append((text.rindex(colour), text.rindex(colour) + 3, "copy", 0.0))
        return SimpleNamespace(spans=spans)

    model = tiny_lm()
    kinds, total = evaluation.loss_by_kind(model, tok, texts, parse), evaluation.lm_loss(model, tok, texts)
    parts = {k: v for k, v in kinds.items() if k != "all"}
    assert set(parts) == {"choice", "copy", "grammar"}
    assert sum(v["tokens"] for v in parts.values()) == kinds["all"]["tokens"] == total["tokens"]
    assert sum(v["loss"] * v["tokens"] for v in parts.values()) == pytest.approx(total["loss"] * total["tokens"], rel=1e-5)
    assert kinds["choice"]["floor"] * kinds["choice"]["tokens"] == pytest.approx(2 * math.log(4))
    ids, losses = evaluation.token_losses(model, tok, texts[:1])[0]
    ends = [len(b"".join(tok.token_bytes(t) for t in ids[: i + 1])) for i in range(len(ids))]
    begin = texts[0].encode("utf-8").rindex(b"red")
    copied = [loss.item() for start, end, loss in zip([0, *ends], ends, losses) if start < begin + 3 and end > begin]
    assert len(copied) == kinds["copy"]["tokens"] > 0 and kinds["copy"]["loss"] == pytest.approx(sum(copied) / len(copied), rel=1e-5)


def test_a_foreign_corpus_has_no_floor(tok):
    """Texts that the world cannot parse are refused, not scored against a floor of zero."""
    with pytest.raises(UserError, match="parsed"):
        evaluation.loss_by_kind(tiny_lm(), tok, ["some text"], lambda text: None)


def test_win_rate_counts_a_tie_as_half():
    """A model stands at 0.5 against itself, and two models' rates add up to one."""
    assert evaluation.win_rate([1, 0, 2, 2], [0, 1, 2, 1]) == (1 + 0 + 0.5 + 1) / 4
    a, b = [0, 3, 1, 1, 5], [2, 2, 1, 0, 5]
    assert evaluation.win_rate(a, a) == 0.5 and evaluation.win_rate(a, b) + evaluation.win_rate(b, a) == 1


def test_exact_match_is_told_by_task_and_with_the_stop_rate():
    """Right answers in all and by task; an answer that ran into its limit counts against the stop rate."""
    rows = [{"task": "sum", "answer": "5"}, {"task": "sum", "answer": "7"}, {"task": "colour", "answer": "red"}]
    got = evaluation.exact_match(rows, [("5", True), ("8", True), ("red", False)], lambda row, text: row["answer"] == text)
    assert got["exact_match"] == pytest.approx(2 / 3) and got["stop_rate"] == pytest.approx(2 / 3) and got["n"] == 3
    assert {task: (t["exact_match"], t["n"]) for task, t in got["by_task"].items()} == {"sum": (0.5, 2), "colour": (1.0, 1)}


def test_batched_answers_equal_single_ones_and_a_seed_fixes_the_sampled_ones(tok):
    """Greedy answers come back in the order of the prompts whatever the batch; temperature 1 repeats with its seed only."""
    model = tiny_lm()
    prompts = [[{"role": "user", "content": "ab" * i}] for i in (5, 1, 9, 3)] + ["Anna has", "小明"]
    together, alone = (evaluation.answers(model, tok, prompts, 12, batch_size=n) for n in (6, 1))
    assert together == alone
    one, two, other = (evaluation.answers(model, tok, prompts, 12, 1.0, seed) for seed in (1, 1, 2))
    assert one == two != other


def test_sample_prompts_follow_the_stage(tok):
    """A pretrained model goes on with the text after <|endoftext|>; a tuned one answers it as a user's message."""
    model = tiny_lm().train()
    plain, chat = (evaluation.sample_prompts(model, tok, ["Anna"], stage, 8) for stage in ("pretrain", "sft"))
    assert model.training
    for got, ids in ((plain, [tok.eos_id] + tok.encode("Anna")), (chat, render(tok, [{"role": "user", "content": "Anna"}], True)[0])):
        want = list(evaluation.generate_batch(model.eval(), [ids], 8, tok.pad_id, stop_ids=tok.stop_ids, temperature=0)[0][0])
        assert got == [{"prompt": "Anna", "text": tok.decode(want)}]
    assert evaluation.sample_prompts(model, tok, []) == []


def test_reward_accuracy_equals_scoring_each_answer_alone(tok):
    """Padding, batch-mates and batch size do not matter; the score is read at the closing <|im_end|>."""
    torch.manual_seed(1)
    model = RewardModel(ModelArgs(**{**SHAPE, "vocab_size": tok.vocab_size})).eval()
    rows = PreferenceRows([("x", row) for row in pairs(21)], tok, 64)
    scores = [[model(torch.tensor([p + a]))[0, -1].item() for a in (c, r)] for p, c, r in rows.pairs]
    want = sum(c > r for c, r in scores) / len(scores)
    for batch_size in (1, 4, 64):
        got = evaluation.rm_accuracy(model, rows, batch_size)
        assert got["accuracy"] == pytest.approx(want) and got["n"] == len(scores)
        assert got["margin"] == pytest.approx(sum(c - r for c, r in scores) / len(scores), abs=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretrained, a tuned and a reward checkpoint, and something to measure each on."""
    root, tok = tmp_path_factory.mktemp("runs"), tiny_tokenizer()
    model = RewardModel(ModelArgs(**{**SHAPE, "vocab_size": tok.vocab_size}))
    checkpoint.save(root / "pretrain", 1, tiny_lm(max_seq_len=512), tok, "pretrain", None)
    checkpoint.save(root / "sft", 1, tiny_lm(max_seq_len=128), tok, "sft", None)
    checkpoint.save(root / "rm", 1, model, tok, "rm", None)
    write_jsonl(root / "pairs.jsonl", pairs(6))
    write_jsonl(root / "chats.jsonl", [{"prompt": "Hi", "answer": "Yes."}, {"prompt": "You", "answer": "No."}])
    write_jsonl(root / "texts.jsonl", [{"text": t} for t in stories(5)])
    for split in ("dev", "test"):
        (root / "mc" / split).mkdir(parents=True)
        (root / "mc" / split / "s.csv").write_text(HEAD + "".join(f"{i},{split} {i}?,a,b,c,d,A\n" for i in range(3)), encoding="utf-8")
    return root


def test_evaluate_prints_a_table_for_each_task_and_writes_eval_json(runs, world, tmp_path, capsys):
    """ppl on token files and on raw text, mc with the dev/ beside test/ as shots, chat rows, preference pairs."""
    for task, run, data, shows in (("ppl", "pretrain", world / "tokens", "bits_per_byte"), ("ppl", "sft", runs / "texts.jsonl", "ppl"),
                                   ("mc", "pretrain", runs / "mc", "dev 0?"), ("chat", "sft", runs / "chats.jsonl", "stop_rate"),
                                   ("rm", "rm", runs / "pairs.jsonl", "margin")):
        evaluate.main(evaluate.Config(task=task, init_from=str(runs / run), data=[str(data)], out=str(tmp_path / task), max_new_tokens=8, device="cpu"))
        assert shows in capsys.readouterr().out
        assert (tmp_path / task / "eval.json").exists()


def test_two_checkpoints_are_judged_by_a_rule_and_by_a_reward_model(runs, tok, tmp_path, monkeypatch):
    """The rule sees row and answer: the win rate is that of the answers, a tie half a win, prompts that do not fit both contexts left
    out; against itself a greedy model stands at 0.5; a reward model is the other judge; a missing judge is refused."""
    (tmp_path / "rule.py").write_text("def richer(row, text):\n    return len(set(text)) + row.get('bonus', 0)\n", encoding="utf-8")
    checkpoint.save(tmp_path / "other", 1, tiny_lm(9, max_seq_len=96), tok, "sft", None)
    monkeypatch.setattr(checkpoint, "knows_chat", lambda model, tokenizer: True)                       # tiny models have learnt nothing
    rows = [{"prompt": f"Say {'more ' * (i % 7)}{i}", "answer": "yes"} for i in range(20)] + [{"prompt": "long " * 60, "answer": "no"}]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    def measure(**kw):
        cfg = evaluate.Config(task="win", init_from=str(runs / "sft"), data=[str(tmp_path / "prompts.jsonl")], max_new_tokens=16, device="cpu",
                              max_bad=1, out=str(tmp_path / "out"), **kw)
        evaluate.main(cfg)
        return json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))[f"win/prompts.jsonl against {Path(kw['against']).name}"]
    found = measure(against=str(tmp_path / "other"), judge=f"{tmp_path}/rule.py:richer")
    model, other = (checkpoint.load(path)[0] for path in (runs / "sft", tmp_path / "other"))
    texts = [[text for text, _ in evaluation.answers(m, tok, [[{"role": "user", "content": r["prompt"]}] for r in rows[:20]], 16)] for m in (model, other)]
    assert found["n"] == 20 and found["win_rate"] == evaluation.win_rate(*[[len(set(t)) for t in side] for side in texts]) != 0.5
    assert found["low"] <= found["win_rate"] <= found["high"] and found["mean_score"] == pytest.approx(sum(len(set(t)) for t in texts[0]) / 20)
    itself = measure(against=str(runs / "sft"), judge=f"{tmp_path}/rule.py:richer")
    assert itself["win_rate"] == 0.5 and itself["ties"] == 1
    judge = RewardModel(ModelArgs(**{**SHAPE, "vocab_size": tok.vocab_size, "max_seq_len": 128}))
    checkpoint.save(tmp_path / "judge", 1, judge, tok, "rm", None)
    assert measure(against=str(tmp_path / "other"), judge=str(tmp_path / "judge"))["mean_score"] != found["mean_score"]
    with pytest.raises(UserError, match="--judge"):
        measure(against=str(tmp_path / "other"), judge="")


@pytest.mark.parametrize("task, temperature", [("chat", 0.0), ("chat", 1.0), ("win", 1.0)])
def test_killed_while_it_answers_a_run_goes_on_where_it_was(runs, tmp_path, monkeypatch, capsys, task, temperature):
    """Stopped in its third batch, the last line torn: the finished batches are not written again, what is drawn behind them is what would
    have been drawn, and eval.json is, to the last byte, that of a run that nobody disturbed. Other options or weights begin again."""
    (tmp_path / "rule.py").write_text("def richer(row, text):\n    return len(set(text))\n", encoding="utf-8")
    monkeypatch.setattr(checkpoint, "knows_chat", lambda model, tokenizer: True)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {'more ' * (i % 4)}{i}", "answer": "yes"} for i in range(10)])
    real, calls, deadly = evaluation.generate_batch, [], 3
    def batch(*args, **kw):
        calls.append(1)
        if len(calls) == deadly:
            raise KeyboardInterrupt
        return real(*args, **kw)
    monkeypatch.setattr(evaluation, "generate_batch", batch)
    def measure(out, run="sft", **kw):
        calls.clear()
        evaluate.main(evaluate.Config(task=task, init_from=str(runs / run), data=[str(tmp_path / "rows.jsonl")], max_new_tokens=6, batch_size=4,
                                      out=str(tmp_path / out), against=str(runs / "sft"), judge=f"{tmp_path}/rule.py:richer", device="cpu",
                                      **{"temperature": temperature} | kw))
        return (tmp_path / out / "eval.json").read_bytes(), len(calls)
    with pytest.raises(KeyboardInterrupt):
        measure("killed")
    log, batches, deadly = tmp_path / "killed" / f"{task}-rows-{'answers' if task == 'chat' else 'side0'}.jsonl", 3 if task == "chat" else 6, 0
    assert len(log.read_text(encoding="utf-8").splitlines()) == 3                # the key and two batches
    log.write_text(log.read_text(encoding="utf-8") + "[8, [[1, 2", encoding="utf-8")
    (table, asked), whole = measure("killed"), measure("whole")
    assert "8 of 10 answers stand in" in capsys.readouterr().out
    assert (table, asked) == (whole[0], batches - 2) and whole[1] == batches and measure("killed") == (table, 0)
    for kw, again in ((dict(temperature=0.5), batches), (dict(run="pretrain"), 3 if task == "chat" else 6)):
        assert measure("killed", **kw)[1] == again and "asking from the beginning" in capsys.readouterr().out
    log.write_text("{torn\n", encoding="utf-8")
    with pytest.raises(UserError, match="is damaged; delete it"):
        measure("killed")


def test_runs_stand_side_by_side_as_a_table_and_a_picture(runs, tmp_path, capsys):
    """Each task and data set keeps its place in eval.json; --compare shows the numbers with their intervals, stars what is better beyond
    them, says when the texts were different, and draws; a directory without eval.json is one sentence."""
    write_jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in stories(9)])
    for name, run, texts in (("a", "pretrain", runs / "texts.jsonl"), ("b", "sft", tmp_path / "texts.jsonl")):
        for task, data in (("ppl", texts), ("mc", runs / "mc")):
            evaluate.main(evaluate.Config(task=task, init_from=str(runs / run), data=[str(data)], out=str(tmp_path / name), device="cpu"))
        assert set(json.loads((tmp_path / name / "eval.json").read_text(encoding="utf-8"))) == {"ppl/texts.jsonl", "mc/mc"}
    capsys.readouterr()
    evaluate.main(evaluate.Config(compare=[str(tmp_path / "a"), str(tmp_path / "b")], out=str(tmp_path / "out")))
    shown = capsys.readouterr().out
    assert "ppl/texts.jsonl was measured on different texts" in shown and "mc/mc acc" in shown
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    def row(*intervals):
        return {str(i): {"ppl": {"bits_per_byte": (a + b) / 2, "low": a, "high": b}, "mc": {"acc": (a + b) / 2, "low": a, "high": b, "chance": 0.25}}
                for i, (a, b) in enumerate(intervals)}
    for runs_, best in ((row((0.1, 0.2), (0.3, 0.4)), {"ppl bits_per_byte": "0", "mc acc": "1"}), (row((0.1, 0.35), (0.3, 0.4)), {})):
        rows = scoreboard.compare(runs_)
        assert {label: name for label, line in rows.items() for name, x in line.items() if x["best"]} == best
        assert len(list(scoreboard.lines(rows, runs_))) == 3
    equal = {"a": {"ppl": {"bits_per_byte": 1.0, "low": 1.0, "high": 1.0}}, "b": {"ppl": {"bits_per_byte": 2.0, "low": 2.0, "high": 2.0}}}
    assert not any(x["best"] for x in scoreboard.compare(equal)["ppl bits_per_byte"].values())             # one document each
    assert [*scoreboard.headlines({"ppl/x": {"ppl": 2.0, "bits_per_byte": 1.0, "by_domain": {"w": 3}}})] == ["ppl/x bits_per_byte"]
    for names, says in ((["nowhere"], "there is no"), (["a", "b", "a"], "named twice")):
        with pytest.raises(UserError, match=says):
            evaluate.main(evaluate.Config(compare=[str(tmp_path / name) for name in names]))


def test_each_number_stands_beside_its_own_interval_and_is_marked_where_that_holds_chance(capsys):
    """acc is beyond chance, acc_norm is not, in all and in each subject; a whole table and a single line say so alike."""
    numbers = {"acc": 0.35, "low": 0.31, "high": 0.39, "n": 400, "acc_norm": 0.26, "norm_low": 0.22, "norm_high": 0.3, "chance": 0.25}
    scoreboard.show(numbers | {"by_subject": {"law": numbers}})
    shown = capsys.readouterr().out
    assert shown.count("0.3500 [0.3100, 0.3900]") == shown.count("0.2600 [0.2200, 0.3000]  = chance") == shown.count("= chance") == 2


def test_a_place_in_eval_json_is_not_given_to_other_data_silently(runs, world, tmp_path, capsys):
    """Texts and the token files made of them have one hash, other rows another; the same name with another hash is told, the same data
    again is not; every task has a hash."""
    def measure(task, run, data, **kw):
        evaluate.main(evaluate.Config(task=task, init_from=str(runs / run), data=[str(data)], out=str(tmp_path), max_new_tokens=4, device="cpu", **kw))
        return json.loads((tmp_path / "eval.json").read_text(encoding="utf-8")), "is replaced" in capsys.readouterr().out
    for task, run, data in (("ppl", "sft", "texts.jsonl"), ("mc", "pretrain", "mc"), ("chat", "sft", "chats.jsonl"), ("rm", "rm", "pairs.jsonl")):
        found = [measure(task, run, runs / data), measure(task, run, runs / data), measure(task, run, runs / data, max_rows=1)]
        hashes = [table[f"{task}/{data}"]["data_hash"] for table, _ in found]
        assert hashes[0] == hashes[1] != hashes[2] and [told for _, told in found] == [False, False, True]
    table, _ = measure("ppl", "pretrain", world / "tokens")
    data = TokenFile(world / "tokens", "val", 512, "documents")
    ends = data.ends[:].tolist()
    texts = [tiny_tokenizer().decode(data.tokens[a:b].tolist()) for a, b in zip([0, *ends], ends)]
    assert table["ppl/tokens"]["data_hash"] == scoreboard.fingerprint(texts)


def test_half_a_character_in_a_row_is_measured_and_stored(runs, tmp_path):
    """JSON may hold the half of a pair of code units; no file in UTF-8 can. Here it is in a question that stands in the corpus, and so in eval.json."""
    text = " ".join(f"word{i}" for i in range(20))
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": text}])
    (tmp_path / "half.jsonl").write_text(json.dumps({"prompt": "\ud800 " + text, "answer": "\udfff"}) + "\n", encoding="utf-8")
    evaluate.main(evaluate.Config(task="chat", init_from=str(runs / "sft"), data=[str(tmp_path / "half.jsonl")], corpus=[str(tmp_path / "corpus.jsonl")],
                                  out=str(tmp_path), max_new_tokens=4, device="cpu"))
    found = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["chat/half.jsonl"]
    assert found["contamination"]["found"]["n"] == 1 and found["most_found"][0]["question"] == "\ud800 " + text


def test_a_chat_row_that_is_longer_than_the_context_is_counted(runs, tmp_path, capsys):
    """One prompt loses its beginning, and two rows a part of their loss: the context of the model has 128 tokens."""
    rows = [{"prompt": "Hi", "answer": "Yes."}, {"prompt": "Hi", "answer": "yes " * 200}, {"prompt": "why " * 200, "answer": "No."}]
    write_jsonl(tmp_path / "long.jsonl", rows)
    evaluate.main(evaluate.Config(task="chat", init_from=str(runs / "sft"), data=[str(tmp_path / "long.jsonl")], out=str(tmp_path), max_new_tokens=4,
                                  device="cpu"))
    found = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["chat/long.jsonl"]
    assert (found["n"], found["cut"], found["cut_in_loss"]) == (3, 1, 2) and "1 of 3 prompts lost their beginning" in capsys.readouterr().out


def test_token_files_are_measured_alone_and_solved_examples_shown_in_the_plain_template(runs, world):
    """What would be left out of the measurement is refused: other data beside token files, a name for them, a number of their rows,
    token files as the text to look in, solved examples in a chat."""
    tokens, texts = str(world / "tokens"), str(runs / "texts.jsonl")
    for says, kw in [*[("holds token files", dict(data=data)) for data in ([tokens, texts], [texts, tokens], [tokens, tokens], [f"wiki={tokens}"])],
                     ("--corpus .* holds token files", dict(task="mc", data=[str(runs / "mc")], corpus=[tokens])),
                     ("take --max_tokens", dict(data=[tokens], max_rows=3)),
                     ("shows no solved examples", dict(task="mc", data=[str(runs / "mc")], shots=str(runs / "mc" / "dev"), template="chat"))]:
        with pytest.raises(UserError, match=says):
            evaluate.main(evaluate.Config(**{"task": "ppl", "init_from": str(runs / "pretrain"), "device": "cpu"} | kw))


def test_evaluate_refuses_in_one_sentence_what_it_cannot_measure(runs):
    """The wrong head, a missing file, an unknown task, scoring or template."""
    for kw in (dict(task="ppl", init_from="rm", data="texts.jsonl"), dict(task="rm", init_from="sft", data="pairs.jsonl"),
               dict(task="mc", init_from="sft", data="gone"), dict(task="ppl", init_from="sft", data="gone"), dict(task="win", init_from="sft", data="pairs.jsonl"), dict(task="nonsense"), dict(task="ppl", data="texts.jsonl"),
               dict(task="mc", init_from="sft", data="mc", score="nonsense"), dict(task="mc", init_from="sft", data="mc", template="x")):
        kw |= {"init_from": str(runs / kw["init_from"])} if "init_from" in kw else {}
        kw |= {"data": [str(runs / kw["data"])]} if "data" in kw else {}
        with pytest.raises(UserError):
            evaluate.main(evaluate.Config(**kw, device="cpu"))


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_measured(runs, tmp_path, monkeypatch):
    """A file in place of a directory, in its path, or a directory without permission, for all that is written there."""
    monkeypatch.setattr(checkpoint, "load", None)
    (tmp_path / "file").touch()
    for kw in (dict(out=str(tmp_path / "file")), dict(out=str(tmp_path / "file" / "x")), dict(lm_eval=str(tmp_path / "file")),
               dict(compare=[str(runs)], out=str(tmp_path / "file"))):
        with pytest.raises(UserError, match="file is a file; name a directory"):
            evaluate.main(evaluate.Config(**{"task": "chat", "init_from": str(runs / "sft"), "data": [str(runs / "chats.jsonl")]} | kw))
    monkeypatch.setattr(scoreboard.os, "access", lambda path, how: False)
    with pytest.raises(UserError, match="--out .*new: .* must not be written to"):
        evaluate.main(evaluate.Config(task="demo", out=str(tmp_path / "new")))
    assert scoreboard.open_place("") == {}                   # what writes nothing needs no permission


def test_nothing_left_to_measure_and_a_score_that_is_no_number_are_one_sentence(runs, tmp_path, monkeypatch):
    """--max_bad 1 allows any share of bad rows, but not that none is left; files of blanks; a judge whose nan would make the model lose everywhere."""
    monkeypatch.setattr(checkpoint, "knows_chat", lambda model, tokenizer: True)
    write_jsonl(tmp_path / "none.jsonl", [{"a": 1}])
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "rule.py").write_text("def broken(row, text):\n    return float('nan')\n", encoding="utf-8")
    for says, kw in (("none is left", dict(task="chat", data=["none.jsonl"], max_bad=1.0)),
                     ("none is left", dict(task="win", data=["none.jsonl"], max_bad=1.0)),
                     ("no text but blanks", dict(task="ppl", data=["blank.txt"])), ("no finite number", dict(task="win", data=[str(runs / "chats.jsonl")]))):
        kw["data"] = [str(tmp_path / kw["data"][0])]
        with pytest.raises(UserError, match=says):
            evaluate.main(evaluate.Config(init_from=str(runs / "sft"), max_new_tokens=4, device="cpu", against=str(runs / "sft"),
                                          judge=f"{tmp_path}/rule.py:broken", **kw))


@pytest.mark.parametrize("words", ["--max_new_tokens 0", "--max_new_tokens -3", "--batch_size 0", "--max_rows -1", "--max_tokens -1", "--n_shots -1",
                                   "--n_shots 1.5", "--temperature nan", "--temperature inf", "--temperature -0.1", "--max_bad nan", "--seed -1", f"--seed {2**64}", "--seed 1e400"])
def test_a_number_without_meaning_is_one_sentence(runs, capsys, words):
    """Code 2, the option by its name, and nothing is measured."""
    with pytest.raises(SystemExit) as stop:
        argv = ["--init_from", str(runs / "sft"), "--task", "chat", "--data", str(runs / "chats.jsonl"), *words.split()]
        evaluate.run(evaluate.main, evaluate.Config, argv=argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and words.split()[0] in err and err.count("\n") == 1 and not out


def test_the_demo_task_measures_the_whole_road_against_the_worlds_truth(tmp_path, tok, monkeypatch):
    """Untrained checkpoints: every key of the report is filled, the floor is the mean -log p of the very validation
    documents, the sampled answers are independent (three seeds), and two runs write the same numbers."""
    answers, seeds = evaluation.answer_ids, []
    monkeypatch.setattr(evaluation, "answer_ids", lambda model, tok, prompts, n, temperature=0.0, seed=0, *rest, **kw: (
        seeds.append(seed) if temperature == 1 else None, answers(model, tok, prompts, n, temperature, seed, *rest, **kw))[1])
    demo_world.write(tmp_path / "raw", "smoke", 0)
    documents = list(demo_world.documents(40, seed=3))
    (tmp_path / "tokens").mkdir()
    meta = write_tokens(tmp_path / "tokens", "val", [d.text for d in documents], tok)
    write_tokens(tmp_path / "tokens", "train", [d.text for d in documents], tok)
    for seed, stage in enumerate(("pretrain", "sft", "dpo")):
        checkpoint.save(tmp_path / stage, 1, tiny_lm(seed, max_seq_len=512), tok, stage, None)
    checkpoint.save(tmp_path / "rm", 1, RewardModel(ModelArgs(**{**SHAPE, "vocab_size": tok.vocab_size, "max_seq_len": 512})), tok, "rm", None)
    cfg = evaluate.Config(task="demo", run_dir=str(tmp_path), max_rows=8, max_new_tokens=6, device="cpu")
    evaluate.main(cfg)
    assert len(seeds) == len(set(seeds)) == 3
    first = (tmp_path / "eval.json").read_text(encoding="utf-8")
    evaluate.main(cfg)
    assert first == (tmp_path / "eval.json").read_text(encoding="utf-8")
    numbers = report.write(tmp_path)
    assert numbers["pretrain"]["entropy_floor"] == pytest.approx(sum(d.nll for d in documents) / meta["n_tokens"], rel=1e-6)
    kinds = numbers["pretrain"]["by_kind"]
    assert kinds["all"]["tokens"] == meta["n_tokens"] and kinds["all"]["loss"] == pytest.approx(numbers["pretrain"]["val_loss"], rel=1e-4)
    assert set(kinds) == {"choice", "copy", "grammar", "all"} and kinds["grammar"]["floor"] == 0
    for key in ("sft.exact_match", "sft.stop_rate", "rm.accuracy", "dpo.win_rate", "dpo.win_rate_before", "mc.accuracy"):
        assert 0 <= report.get(numbers, key) <= 1
    assert numbers["mc"]["chance"] == 0.25 and abs(numbers["dpo"]["win_rate_before"] - 0.5) < 0.3
    assert set(numbers["models"]) == {"sft", "dpo"} and numbers["ppo"]["win_rate"] is None
    checkpoint.save(tmp_path / "ppo", 1, tiny_lm(1, max_seq_len=512), tok, "ppo", None)
    evaluate.main(cfg)
    models = report.write(tmp_path)["models"]
    assert set(models) == {"sft", "dpo", "ppo"} and all(len(m["chats"]) == 5 for m in models.values())
    assert models["sft"]["kl"] == 0 < models["dpo"]["kl"] and models["ppo"]["kl"] == 0             # "ppo" holds the SFT model's weights
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Side by side" in page and "<th>PPO</th>" in page


def test_how_far_a_model_went_is_the_mean_log_ratio_of_its_own_answers(tok):
    """KL, reward and length against plain forward passes, of answers that ended and of one that did not; zero from itself."""
    model, base, reward = tiny_lm(1), tiny_lm(2), RewardModel(ModelArgs(**{**SHAPE, "vocab_size": tok.vocab_size})).eval()
    prompts, answers = [[5, 6, 7], [8, 9], [10]], [([11, 12], True), ([13], True), ([14, 15, 16], False)]
    full = [ids + [tok.im_end_id] * ended for ids, ended in answers]
    ratios = [(by_hand(base, p, a).sum() - by_hand(model, p, a).sum()).item() for p, a in zip(prompts, full)]
    far = evaluation.away_from(base, model, reward, tok, prompts, answers)
    assert far["kl"] == pytest.approx(sum(ratios) / 3, abs=1e-4) and far["tokens"] == (3 + 2 + 3) / 3
    assert far["reward"] == pytest.approx(sum(reward(torch.tensor([p + a]))[0, -1].item() for p, a in zip(prompts, full)) / 3, abs=1e-5)
    assert evaluation.away_from(model, model, reward, tok, prompts, answers)["kl"] == 0
