"""The chat in the terminal: history, commands, interruption, one-shot prompts."""
import pytest
import torch
from conftest import SHAPE, tiny_lm, tiny_tokenizer

import chat
from nanollm import checkpoint
from nanollm.config import UserError
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
    return chat.Config(init_from=str(runs / stage), device="cpu", max_new_tokens=8, **kw)


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


def test_outgrowing_the_context_is_said_once(runs, capsys, monkeypatch):
    """A long conversation goes on; the note appears a single time."""
    typed(monkeypatch, *["tell me more about the red ball"] * 8)
    chat.main(config(runs, temperature=0.0))
    assert capsys.readouterr().out.count("outgrew the context") == 1


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
    ids = list(chat.generate(model, render(tok, [{"role": "user", "content": "你好"}], True)[0], 8, stop_ids=tok.stop_ids,
                             temperature=0.0, repetition_penalty=talk.cfg.repetition_penalty))
    assert reply == tok.decode(ids) and capsys.readouterr().out == reply + "\n"


def test_a_pretrained_checkpoint_completes_and_says_so(runs, capsys):
    """No chat template for a model that has never seen one: the text goes on after <|endoftext|>."""
    chat.main(config(runs, "pretrain", prompt=["Anna has"], temperature=0.0))
    out = capsys.readouterr().out
    model, tok, _ = checkpoint.load(runs / "pretrain")
    ids = list(chat.generate(model, [tok.eos_id] + tok.encode("Anna has"), 8, stop_ids=tok.stop_ids, temperature=0.0,
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
        yield from tok.encode("So far")
        raise KeyboardInterrupt
    monkeypatch.setattr(chat, "generate", interrupted)
    talk = chat.Chat(model, tok, config(runs), completion=False)
    assert talk.answer("Hi") == "So far" and "[interrupted]" in capsys.readouterr().out
    assert [m["content"] for m in talk.messages] == ["Hi", "So far"]


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
    for kw in (dict(temperature=-1.0), dict(top_p=0.0), dict(top_k=-1), dict(repetition_penalty=0.0)):
        with pytest.raises(UserError, match=next(iter(kw))):
            chat.main(config(runs, **kw))
