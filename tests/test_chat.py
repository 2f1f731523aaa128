"""The chat in the terminal: history, commands, interruption, one-shot prompts."""
import copy
import json

import pytest
import torch
from conftest import SHAPE, tiny_lm, tiny_tokenizer

import chat
from nanollm import checkpoint, peft
from nanollm.beam import beam_search
from nanollm.config import UserError
from nanollm.data import to_messages
from nanollm.generate import Step, generate
from nanollm.model import ModelArgs, RewardModel
from nanollm.tokenizer import render


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root, tok = tmp_path_factory.mktemp("chat"), tiny_tokenizer()
    for stage in ("pretrain", "sft"):
        checkpoint.save(root / stage, 1, tiny_lm(max_seq_len=128), tok, stage, None)
    checkpoint.save(root / "rm", 1, RewardModel(ModelArgs(**{**SHAPE, "vocab_size": tok.vocab_size})), tok, "rm", None)
    return root


def config(runs, stage="sft", **kw):
    return chat.Config(init_from=[str(runs / stage)], device="cpu", **{"max_new_tokens": 8, **kw})


def typed(monkeypatch, *lines):
    """What the user types; Ctrl-D after the last line. An exception among the lines is raised at its turn."""
    queue = list(lines)

    def answer(prompt=""):
        if not queue:
            raise EOFError
        line = queue.pop(0)
        if isinstance(line, type):
            raise line
        return line
    monkeypatch.setattr("builtins.input", answer)


def conversation(n):
    return [{"role": role, "content": f"{role} {i} " + "x" * 20} for i in range(n) for role in ("user", "assistant")] + [
        {"role": "user", "content": "now?"}]


def test_history_drops_whole_oldest_exchanges_and_keeps_the_system_prompt(tok):
    """What is kept fits, begins with the system prompt and a user's turn, ends with the newest message, and no more is
    dropped than needed."""
    system = [{"role": "system", "content": "Be brief."}]
    messages = system + conversation(6)
    for room in range(30, 700, 40):
        kept, dropped = chat.fit_history(tok, messages, room)
        assert kept[0] == system[0] and kept[1]["role"] == "user" and kept[-1] == messages[-1]
        assert kept[1:] == messages[1 + dropped:] and dropped % 2 == 0
        fits = len(render(tok, kept, True)[0]) <= room
        assert fits or len(kept) == 2
        if dropped and fits:
            assert len(render(tok, system + messages[dropped - 1:], True)[0]) > room
    assert chat.fit_history(tok, messages, 10_000) == (messages, 0)


def test_outgrowing_the_context_is_said_once(runs, capsys, monkeypatch, tmp_path):
    """A long conversation goes on; the note appears a single time. What is no longer read is still saved."""
    typed(monkeypatch, *["tell me more about the red ball"] * 8, f"/save {tmp_path / 'all.jsonl'}")
    chat.main(config(runs, temperature=0.0))
    assert capsys.readouterr().out.count("outgrew the context") == 1
    assert len(json.loads((tmp_path / "all.jsonl").read_text(encoding="utf-8"))["messages"]) == 16


def test_one_shot_prompts_are_answered_in_fresh_conversations(runs, capsys, monkeypatch):
    """Two prompts, greedy: each answer equals the one it gets alone, from a conversation of its own, and nothing is read
    from the keyboard."""
    seen = []
    monkeypatch.setattr(chat, "render", lambda tok, messages, *rest, **kw: (seen.append(messages[0]["content"]), render(tok, messages, *rest, **kw))[1])

    def shown(*prompts):
        chat.main(config(runs, prompt=list(prompts), temperature=0.0))
        return capsys.readouterr().out
    assert shown("Hi", "小明?") == shown("Hi") + shown("小明?") and seen == ["Hi", "小明?"] * 2


def test_the_streamed_answer_equals_the_decoded_ids(runs, capsys):
    """Piece by piece on screen or decoded at once, the text is the same, also where characters span tokens."""
    model, tok, _ = checkpoint.load(runs / "sft")
    talk = chat.Chat(model, tok, config(runs, temperature=0.0), completion=False)
    reply = talk.answer("你好")
    ids = list(generate(model, render(tok, [{"role": "user", "content": "你好"}], True)[0], 8, stop_ids=tok.stop_ids,
                             temperature=0.0, repetition_penalty=talk.cfg.repetition_penalty))
    assert reply == tok.decode(ids) and capsys.readouterr().out == reply + "\n"


def test_a_pretrained_checkpoint_completes_and_says_so(runs, capsys):
    """No chat template for a model that has never seen one: the text goes on after <|endoftext|>."""
    chat.main(config(runs, "pretrain", prompt=["Anna has"], temperature=0.0))
    out = capsys.readouterr().out
    model, tok, _ = checkpoint.load(runs / "pretrain")
    ids = list(generate(model, [tok.eos_id] + tok.encode("Anna has"), 8, stop_ids=tok.stop_ids, temperature=0.0,
                             repetition_penalty=chat.Config().repetition_penalty))
    assert "only pretrained" in out and out.endswith(tok.decode(ids) + "\n")


def test_commands_and_keys(runs, capsys, monkeypatch):
    """/reset forgets, /exit leaves before what follows, Ctrl-C at the prompt gives a fresh line, Ctrl-D ends."""
    asked = []
    monkeypatch.setattr(chat.Chat, "answer", lambda self, text: (asked.append((text, len(self.messages))),
                                                                 self.messages.append({"role": "user", "content": text})))
    typed(monkeypatch, "one", "two", "/reset", KeyboardInterrupt, "", "three", "/exit", "never")
    chat.main(config(runs))
    assert asked == [("one", 0), ("two", 1), ("three", 0)]
    typed(monkeypatch)
    chat.main(config(runs, system="Be brief."))                            # Ctrl-D at once
    assert "[forgotten]" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(runs, capsys, monkeypatch):
    """The conversation goes on with the part that was shown."""
    model, tok, _ = checkpoint.load(runs / "sft")

    def interrupted(*args, **kwargs):
        yield from (Step(token, 0.0, []) for token in tok.encode("So far"))
        raise KeyboardInterrupt
    monkeypatch.setattr(chat, "steps", interrupted)
    talk = chat.Chat(model, tok, config(runs), completion=False)
    assert talk.answer("Hi") == "So far" and "[interrupted]" in capsys.readouterr().out
    assert [m["content"] for m in talk.messages] == ["Hi", "So far"]


def test_ctrl_c_ends_a_long_list_and_not_the_chat(runs, capsys, monkeypatch, tmp_path):
    """While probabilities are shown, by a command or after an answer: the answer is in the conversation, and the next line is read."""
    asked = []

    def interrupted(self):
        asked.append([m["role"] for m in self.messages])
        raise KeyboardInterrupt
    monkeypatch.setattr(chat.Chat, "show_probs", interrupted)
    typed(monkeypatch, "Hi", "/probs", f"/save {tmp_path / 'talk.jsonl'}")
    chat.main(config(runs, show_probs=True))
    assert asked == [["user", "assistant"]] * 2 and "2 messages appended" in capsys.readouterr().out


def test_a_seed_fixes_the_sampled_answers(runs, capsys):
    """Temperature 1 twice with one seed and once with another."""
    def shown(seed):
        torch.manual_seed(seed + 100)                                      # the global generator must not matter
        chat.main(config(runs, prompt=["Hi"], temperature=1.0, seed=seed))
        return capsys.readouterr().out
    assert shown(1) == shown(1) != shown(2)


def test_a_reward_model_and_senseless_settings_are_refused(runs):
    """One sentence each, before anything is loaded or said."""
    with pytest.raises(UserError, match="reward model"):
        chat.main(config(runs, "rm"))
    for kw in (dict(temperature=-1.0), dict(top_p=0.0), dict(top_k=-1), dict(repetition_penalty=0.0), dict(length_penalty=2.0)):
        with pytest.raises(UserError, match=next(iter(kw))):
            chat.main(config(runs, **kw))
    with pytest.raises(UserError, match="--serve takes no --prompt, --system, --seed"):
        chat.main(config(runs, serve=True, prompt=["Hi"], system="Be brief.", seed=1))
    with pytest.raises(UserError, match="several are compared with --serve"):
        chat.main(chat.Config(init_from=[str(runs / "sft"), str(runs / "pretrain")]))


def test_regenerate_answers_the_last_question_again(runs, capsys, monkeypatch):
    """The same question, a new draw, no trace of the old answer; with nothing asked yet, a word and no crash."""
    model, tok, _ = checkpoint.load(runs / "sft")
    talk = chat.Chat(model, tok, config(runs, temperature=1.0, max_new_tokens=20), completion=False)
    talk.regenerate()
    assert "no answer yet" in capsys.readouterr().out
    first = talk.answer("Hi")
    talk.regenerate()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[0]["content"] == "Hi" and talk.messages[1]["content"] != first


def test_a_saved_conversation_is_a_training_row_and_can_be_loaded(runs, capsys, monkeypatch, tmp_path):
    """/save appends a row that the trainers read; /load goes on with it; a file that is none is told of, not crashed on."""
    file = str(tmp_path / "talk.jsonl")
    monkeypatch.setattr(chat.Chat, "answer", lambda self, text: self.messages.extend([{"role": "user", "content": text}, {"role": "assistant", "content": "A " + text}]))
    typed(monkeypatch, f"/save {file}", "/system Be brief.", f"/save {file}", "/system", "one", f"/save {file}", "two", f"/save {file}")
    chat.main(config(runs))
    assert capsys.readouterr().out.count("nothing to save") == 2
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    assert [len(to_messages(row)) for row in rows] == [2, 4]
    (tmp_path / "no.jsonl").write_text("[1]", encoding="utf-8")
    (tmp_path / "open.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}', encoding="utf-8")
    typed(monkeypatch, f"/load {file}", f"/save {file}", f"/load {tmp_path / 'no.jsonl'}", f"/load {tmp_path / 'open.jsonl'}", f"/load {tmp_path / 'absent'}", f"/save {tmp_path}", "/save", "/nonsense")
    capsys.readouterr()
    chat.main(config(runs))
    out = capsys.readouterr().out
    assert "assistant: A two" in out and json.loads(open(file, encoding="utf-8").readlines()[-1]) == rows[-1]
    assert all(f"[/{what}" in out for what in ("load", "save")) and out.count("/regenerate answers again") == 2 and "ends without an answer" in out


def test_probs_shows_for_each_token_what_else_was_likely(runs, capsys, monkeypatch):
    """One block a token, the taken one marked; the same after every answer with --show_probs."""
    typed(monkeypatch, "/probs", "Hi", "/probs")
    chat.main(config(runs, temperature=0.0))
    once = capsys.readouterr().out
    chat.main(config(runs, temperature=0.0, prompt=["Hi"], show_probs=True))
    shown = capsys.readouterr().out
    assert "no token has been sampled yet" in once and 1 <= shown.count("->") <= 8 and once.count("->") == shown.count("->")


def test_a_file_may_hold_line_separators_and_has_no_probabilities(runs, capsys, monkeypatch, tmp_path):
    """U+2028 and U+0085 in an answer come back from /save and /load; /probs then has nothing to show of the conversation before."""
    talk = chat.Chat(*checkpoint.load(runs / "sft")[:2], config(runs, temperature=0.0), completion=False)
    talk.answer("Hi")
    talk.messages[-1]["content"], file = "one\u2028two\u0085three", str(tmp_path / "talk.jsonl")
    for command in (f"/save {file}", "/reset", f"/load {file}"):
        talk.command(command)
    assert talk.messages[-1]["content"] == "one\u2028two\u0085three"
    talk.answer("Hi")
    talk.command(f"/load {file}")
    capsys.readouterr()
    talk.show_probs()
    assert "no token has been sampled yet" in capsys.readouterr().out


def test_beams_show_the_likeliest_answer_that_is_found(runs, capsys):
    """--beams 3 prints what beam_search returns first, cut at a stop string."""
    model, tok, _ = checkpoint.load(runs / "sft")
    best = tok.decode(beam_search(model, render(tok, [{"role": "user", "content": "Hi"}], True)[0], 8, 3, 2.0, tok.stop_ids, 1.05)[0][0])
    assert best and chat.Chat(model, tok, config(runs, beams=3, length_penalty=2.0), completion=False).answer("Hi") == best
    assert chat.Chat(model, tok, config(runs, beams=3, length_penalty=2.0, stop=[best[2:4]]), completion=False).answer("Hi") == best[: best.index(best[2:4])]


def test_stop_strings_end_an_answer_and_are_not_shown(runs, capsys):
    """The answer is cut in front of the first one; without it the answer is longer."""
    talk = chat.Chat(*checkpoint.load(runs / "sft")[:2], config(runs, temperature=0.0), completion=False)
    whole = talk.answer("Hi")
    talk = chat.Chat(*checkpoint.load(runs / "sft")[:2], config(runs, temperature=0.0, stop=[whole[2:4]]), completion=False)
    assert talk.answer("Hi") == whole[: whole.index(whole[2:4])]


def test_a_new_system_prompt_begins_a_new_conversation(runs, monkeypatch, tmp_path):
    """/system TEXT stands first from then on; without a text there is none. A conversation that is loaded brings its own."""
    seen = []
    monkeypatch.setattr(chat.Chat, "answer", lambda self, text: seen.append([m["content"] for m in self.messages] + [text]))
    typed(monkeypatch, "a", "/system Be brief.", "b", "/reset", "c", "/system", "d")
    chat.main(config(runs, system="Old."))
    assert seen == [["Old.", "a"], ["Be brief.", "b"], ["Be brief.", "c"], ["d"]]
    file = tmp_path / "brief.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "system", "content": "New."}, *conversation(1)[:2]]}), encoding="utf-8")
    typed(monkeypatch, f"/load {file}", "/reset", "a")
    chat.main(config(runs, system="Old."))
    assert seen[-1] == ["New.", "a"]


def test_adapters_of_one_base_are_switched_in_the_terminal(runs, tmp_path, monkeypatch, capsys):
    """/adapter NAME answers as that adapter alone, of whatever kind, `base` as the model without one, each in a new conversation; the first
    is on at the start; without a name or with a wrong one they are listed."""
    base, tok, answers = tiny_lm(max_seq_len=128), copy.copy(tiny_tokenizer()), {}
    for name, template in (("lora", "chatml"), ("prompt", "raw")):
        torch.manual_seed(1)
        model = tiny_lm(max_seq_len=128)
        peft.add_adapter(model, name)
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) if p.requires_grad else 0)
        model.adapter.base, tok.template = {"path": "x", "hash": peft.fingerprint(base)}, template
        checkpoint.save(tmp_path / name, 1, model, tok, "sft", None)
        chat.main(chat.Config(init_from=[str(tmp_path / name)], device="cpu", max_new_tokens=8, prompt=["Hi"], temperature=0.0))
        answers[name] = capsys.readouterr().out.removeprefix("> Hi\n")
    chat.main(config(runs, prompt=["Hi"], temperature=0.0))
    answers["base"] = capsys.readouterr().out.removeprefix("> Hi\n")
    typed(monkeypatch, "Hi", "/adapter prompt", "Hi", "/adapter", "/adapter base", "Hi", "/adapter nobody", "/adapter lora", "Hi")
    chat.main(config(runs, temperature=0.0, adapters=[str(tmp_path / "lora"), str(tmp_path / "prompt")]))
    begun, rest = capsys.readouterr().out.split("/help\n")
    assert begun.startswith("[base *lora prompt]")
    assert rest.strip() == (answers["lora"] + "[base lora *prompt]\n" + answers["prompt"] + "[base lora *prompt]\n[*base lora prompt]\n" + answers["base"]
                            + "[nobody is not among them: *base lora prompt]\n[base *lora prompt]\n" + answers["lora"]).strip()
    assert len(set(answers.values())) == 3
    chat.main(config(runs, prompt=["Hi"], temperature=0.0, adapters=[str(tmp_path / "prompt")]))
    assert capsys.readouterr().out.endswith("> Hi\n" + answers["prompt"])
    with pytest.raises(UserError, match="carries an adapter of its own"):
        chat.main(chat.Config(init_from=[str(tmp_path / "prompt")], device="cpu", adapters=[str(tmp_path / "lora")]))
    (tmp_path / "lora").rename(tmp_path / "base")
    for word in ("base", "../base"):                         # a run of that name is called by its whole path
        monkeypatch.chdir(tmp_path / "prompt" if ".." in word else tmp_path)
        chat.main(config(runs, prompt=["Hi"], temperature=0.0, adapters=[word]))
        assert capsys.readouterr().out == f"[base *{tmp_path / 'base'}]\n> Hi\n" + answers["lora"]


def test_an_adapter_of_another_base_is_refused_in_the_terminal(runs, tmp_path, monkeypatch, capsys):
    """By the hash of the weights; so are weights in few bits, a run without an adapter, and --adapters with --serve. No --adapters: /adapter says so."""
    model, tok = tiny_lm(max_seq_len=128), tiny_tokenizer()
    peft.add_adapter(model, "lora").base = {"path": "out/elsewhere", "hash": "0" * 64}
    checkpoint.save(tmp_path / "lora", 1, model, tok, "sft", None)
    for more, match in (({}, "an adapter for another base: it was trained on out/elsewhere"), ({"quantize": "int8"}, "leave --quantize out"),
                        ({"serve": True}, "--serve takes no --adapters")):
        with pytest.raises(UserError, match=match):
            chat.main(config(runs, adapters=[str(tmp_path / "lora")], **more))
    with pytest.raises(UserError, match="holds no adapter"):
        chat.main(config(runs, adapters=[str(runs / "sft")]))
    typed(monkeypatch, "/adapter", "/adapter x")
    chat.main(config(runs))
    assert "[none: start with --adapters DIR …]\n[x is not among them: none: start" in capsys.readouterr().out
