"""Evaluation: every number is held against one computed by hand or known in advance."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE, pairs, stories, tiny_lm, tiny_tokenizer, write_jsonl

import evaluate
from nanollm import checkpoint, evaluation, report
from nanollm import world as demo_world
from nanollm.config import UserError
from nanollm.corpus.pack import write_tokens
from nanollm.data import PreferenceRows, TokenFile
from nanollm.model import ModelArgs, RewardModel, Transformer
from nanollm.tokenizer import render

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


def test_multiple_choice_scores_equal_hand_computed_log_likelihoods(tok):
    """Letters: log p(letter after the prompt that the output shows). Text: log p(option) / its bytes. In chat: the option
    right behind the generation prompt. Chinese and English questions have their own words."""
    model = tiny_lm(max_seq_len=256)
    zh = {"question": "天空是什么颜色？", "options": ["红", "蓝色"], "answer": 1, "subject": "colour"}
    en = {"question": "The sky is", "options": ["red", "blue and wide"], "answer": 1, "subject": "colour"}
    for q, prompt, gap in ((zh, "以下是关于colour的单项选择题，请直接给出正确答案的选项。\n\n题目：天空是什么颜色？\nA. 红\nB. 蓝色\n答案是：", ""),
                           (en, "The following are multiple choice questions (with answers) about colour.\n\nQuestion: The sky is\n"
                                "A. red\nB. blue and wide\nAnswer:", " ")):
        result = evaluation.multiple_choice(model, tok, [q])
        assert result["prompt"] == prompt
        want = [-by_hand(model, tok.encode(prompt), tok.encode(gap + c)).sum().item() for c in "AB"]
        assert result["scores"][0] == pytest.approx(want, rel=1e-4)
        assert result["accuracy"] == float(want[1] > want[0])
    result = evaluation.multiple_choice(model, tok, [en], score="text", chat=True)
    context = render(tok, [{"role": "user", "content": "The sky is"}], add_generation_prompt=True)[0]
    want = [-by_hand(model, context, tok.encode(o)).sum().item() / len(o) for o in en["options"]]
    assert result["scores"][0] == pytest.approx(want, rel=1e-4)


def test_shots_are_dropped_until_the_question_fits_into_the_context(tok):
    """Solved examples of the same subject only, as many as fit; a question that is too long alone loses its beginning and
    is counted."""
    question = {"question": "Which one?", "options": ["x", "y", "z", "w"], "answer": 0, "subject": "s"}
    shots = [question | {"question": "Foreign?", "subject": "t"}] + [question | {"question": f"Solved {i}?", "answer": 2} for i in range(7)]
    prompts = [evaluation.multiple_choice(tiny_lm(max_seq_len=n), tok, [question], shots) for n in (2048, 200, 40)]
    counts = [p["prompt"].count("Solved") for p in prompts]
    assert counts[0] == 5 and 0 < counts[1] < 5 and counts[2] == 0 and "Foreign" not in prompts[0]["prompt"]
    assert prompts[0]["prompt"].count("Answer: C\n\n") == 5 and prompts[0]["prompt"].endswith("Answer:")
    assert [p["truncated"] for p in prompts] == [0, 0, 1] and prompts[2]["prompt"].endswith("Answer:")


def test_an_untrained_model_is_near_chance_and_two_runs_agree(tok):
    """400 questions with random answers: within three standard errors of 1/4, and nothing random in the scoring."""
    g = torch.Generator().manual_seed(0)
    questions = [{"question": f"Number {i}?", "options": ["one", "two", "six", "ten"], "subject": "n",
                  "answer": int(torch.randint(4, (), generator=g))} for i in range(400)]
    first, again = (evaluation.multiple_choice(tiny_lm(max_seq_len=128), tok, questions) for _ in range(2))
    assert first == again and first["chance"] == 0.25
    assert first["stderr"] == pytest.approx(math.sqrt(first["accuracy"] * (1 - first["accuracy"]) / 400))
    assert abs(first["accuracy"] - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 400)


def test_cmmlu_and_mmlu_files_are_read_and_broken_ones_named(tmp_path):
    """With CMMLU's header and with MMLU's bare rows; a row without a right letter is one sentence with file and row."""
    (tmp_path / "a_b.csv").write_text(HEAD + '0,"One, or two?",1,2,3,4,B\n', encoding="utf-8")
    (tmp_path / "c.csv").write_text("Two?,1,2,3,4,D\n", encoding="utf-8")
    questions = evaluation.read_choices(tmp_path)
    assert [(q["question"], q["answer"], q["subject"]) for q in questions] == [("One, or two?", 1, "a b"), ("Two?", 3, "c")]
    for text in (HEAD + "0,Q,1,2,3,4,E\n", HEAD + "0,Q,1\n", HEAD, ""):
        (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="bad.csv"):
            evaluation.read_choices(tmp_path / "bad.csv")


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
        evaluate.main(evaluate.Config(task=task, init_from=str(runs / run), data=str(data), out=str(tmp_path / task), max_new_tokens=8, device="cpu"))
        assert shows in capsys.readouterr().out
        assert (tmp_path / task / "eval.json").exists()


def test_evaluate_refuses_in_one_sentence_what_it_cannot_measure(runs):
    """The wrong head, a missing file, an unknown task, scoring or template."""
    for kw in (dict(task="ppl", init_from="rm", data="texts.jsonl"), dict(task="rm", init_from="sft", data="pairs.jsonl"),
               dict(task="mc", init_from="sft", data="gone"), dict(task="nonsense"), dict(task="ppl", data="texts.jsonl"),
               dict(task="mc", init_from="sft", data="mc", score="nonsense"), dict(task="mc", init_from="sft", data="mc", template="x")):
        kw |= {k: str(runs / kw[k]) for k in ("init_from", "data") if k in kw}
        with pytest.raises(UserError):
            evaluate.main(evaluate.Config(**kw, device="cpu"))


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
