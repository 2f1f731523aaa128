"""SFT as the specification numbers it (S1 … S11): what is learnt and what is not, however a chat is cut, packed, split and mixed.
The mask itself stands in test_tokenizer.py, the formats and the cutting in test_data.py; trl in test_sft_parity.py."""
import json
import math
import re

import numpy as np
import pytest
import torch

import train_dpo
import train_pretrain
import train_rm
import train_sft
from conftest import chats, metrics, options, run_ranks, tiny_lm, tiny_tokenizer, weights, write_jsonl, write_world
from nanollm import checkpoint, tokenizer
from nanollm.config import UserError, parse
from nanollm.data import ChatRows, fit_chat, fit_pair, read_weights, to_messages
from nanollm.losses import IGNORE_INDEX, cross_entropy
from nanollm.tokenizer import Tokenizer, chat_template, frame, render


def where(rows, path="f"):
    return [(f"{path}:{i}", row) for i, row in enumerate(rows, 1)]


def chat(*texts):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts)]


def learnt(targets):
    return [t for t in targets if t != IGNORE_INDEX]


def gradients(model, batches):
    """Summed loss, targets, and the gradient of sum / targets, over all batches together."""
    model.zero_grad()
    sums = [train_sft.sft_loss(model, *b) for b in batches]
    loss, count = sum(s[0] for s in sums), sum(s[1] for s in sums)
    (loss / count).backward()
    return loss.item(), int(count), {n: p.grad.clone() for n, p in model.named_parameters()}


def apart(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.fixture(params=tokenizer.TEMPLATES)
def spoken(request):
    """The tiny tokenizer speaking each template."""
    tok = Tokenizer(tiny_tokenizer().spec)
    tok.template = request.param
    return tok


# ---- what carries loss -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [24, 40, 64, 200])
def test_as_many_ends_are_learnt_as_answers_are_whole(spoken, limit):
    """S2, in every template and at every length: an end for each answer that is there to its last token, none for a cut one."""
    for row in chats(24) + [{"messages": chat("why? " * 30, "so " * 60)}, {"messages": chat("q", "a", "q " * 40, "b " * 40)}]:
        fitted = fit_chat(spoken, row["messages"], limit)
        if fitted is None:
            continue
        ids = [i for i, m in zip(*fitted) if m]
        answers = [spoken.encode(m["content"]) for m in row["messages"] if m["role"] == "assistant"]
        whole = 0
        while whole < len(answers) and ids[: len(answers[whole]) + 1] == [*answers[whole], spoken.end_id]:
            ids = ids[len(answers[whole]) + 1 :]
            whole += 1
        assert spoken.end_id not in ids and (not ids or ids == answers[whole][: len(ids)])
        assert [i for i, m in zip(*fitted) if m].count(spoken.end_id) == whole


def test_a_later_turn_changes_no_label_and_no_loss_of_an_earlier_one(spoken):
    """S4: the labels of turn k are those of the chat cut after turn k, and one pass over all turns has the loss of a pass for each:
    the reason why n turns cost one forward pass and not n."""
    texts = ["Hi", "Hello. 你好。", "And?", "Nothing.", "再见", "Bye!"]
    rows = ChatRows(where([{"messages": chat(*texts[: 2 * k])} for k in (1, 2, 3)]), spoken, 160, pack_rows=False)
    (x1, y1), (x2, y2), (x3, y3) = rows.examples
    assert x3[: len(x2)] == x2 and y3[: len(y2)] == y2 and y2[: len(y1)] == y1
    last = [{"messages": [*(m | {"train": 0} for m in chat(*texts[: 2 * k - 1])), {"role": "assistant", "content": texts[2 * k - 1]}]} for k in (1, 2, 3)]
    model, parts = tiny_lm(max_seq_len=160), 0.0
    for row in last:
        ids, mask = render(spoken, row["messages"])
        x, y = torch.tensor([ids[:-1]]), torch.tensor([[t if m else IGNORE_INDEX for t, m in zip(ids[1:], mask[1:])]])
        parts += cross_entropy(model(x), y)[0].item()
    assert cross_entropy(model(torch.tensor([x3])), torch.tensor([y3]))[0].item() == pytest.approx(parts, rel=1e-6)


def test_no_header_no_question_and_no_padding_carries_a_label(spoken):
    """S9: in a packed batch every target is the next input of its own chat, and all of them together are the answers and their ends."""
    rows = ChatRows(where(chats(20)), spoken, 100)
    x, y, segments = rows.batch(range(len(rows)))
    assert segments is not None and (y[segments == 0] == IGNORE_INDEX).all() and (x[segments == 0] == spoken.pad_id).all()
    b, t = torch.nonzero(y[:, :-1] != IGNORE_INDEX, as_tuple=True)
    inside = segments[b, t] == segments[b, t + 1]                             # the last target of a chat is no input any more
    assert (y[b, t][inside] == x[b, t + 1][inside]).all()
    want = sorted([*spoken.encode(m["content"]), spoken.end_id] for row in chats(20) for m in row["messages"] if m["role"] == "assistant")
    got = [y[r][segments[r] == s].tolist() for r in range(len(y)) for s in range(1, int(segments[r].max()) + 1)]
    flat = sorted(learnt([t for row in got for t in row]))
    assert flat == sorted(t for answer in want for t in answer) and spoken.pad_id not in flat


def test_any_split_into_micro_batches_is_the_same_gradient(tok):
    """S7: eight chats at once, one by one, two by two: sum over sum. The mean of the means, the famous bug, is another gradient."""
    rows, model = ChatRows(where(chats(8)), tok, 100, pack_rows=False), tiny_lm(max_seq_len=100)
    once = gradients(model, [rows.batch(range(8))])
    for size in (1, 2, 4):
        split = gradients(model, [rows.batch(range(i, i + size)) for i in range(0, 8, size)])
        assert split[:2] == pytest.approx(once[:2], rel=1e-6) and apart(split[2], once[2]) < 1e-6
    model.zero_grad()
    for i in range(8):
        loss, count, _ = train_sft.sft_loss(model, *rows.batch([i]))
        (loss / count / 8).backward()
    assert apart({n: p.grad for n, p in model.named_parameters()}, once[2]) > 1e-3


@pytest.mark.parametrize("variants", [[], ["gpt2"]])
def test_packed_equals_separate_also_where_positions_are_learnt(tok, variants):
    """S5: loss and gradient to 1e-6. With RoPE only distances count; GPT-2's learnt positions begin anew in every chat."""
    from nanollm.model import ModelArgs
    from nanollm.variants import build
    torch.manual_seed(0)
    model = build(ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=tok.vocab_size, max_seq_len=160, variants=variants), "lm").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    packed, alone = (ChatRows(where(chats(16)), tok, 160, pack_rows=p) for p in (True, False))
    a, b = gradients(model, [packed.batch(range(len(packed)))]), gradients(model, [alone.batch([i]) for i in range(16)])
    assert len(packed) < 9 and a[:2] == pytest.approx(b[:2], rel=1e-6) and apart(a[2], b[2]) < 1e-6


def test_rows_of_like_length_share_a_micro_batch_and_the_update_stays_the_same(tok):
    """Without packing: the rows of every update, sorted, so that each micro-batch is padded less. The gradient of the update is that of
    any other split."""
    from nanollm import dist
    from nanollm.mixture import ByLength
    from nanollm.sampler import Sampler
    texts = [{"prompt": "Q", "answer": "yes " * (1 + i * i % 17)} for i in range(30)]
    rows, ctx = ChatRows(where(texts), tok, 100, pack_rows=False), dist.init("cpu")
    shuffled, sorted_ = (Sampler(len(rows), ctx, 2, 4, 0, epochs=1.5) for _ in range(2))
    sorted_.order = ByLength(sorted_, rows.lengths(), 0, window=1)
    padded = [0, 0]
    for step in range(shuffled.steps(0)):
        found = [s.micro_batches(step) for s in (shuffled, sorted_)]
        assert sorted(np.concatenate(found[0])) == sorted(np.concatenate(found[1]))
        for k in (0, 1):
            padded[k] += sum(rows.batch(r)[0].numel() for r in found[k])
    assert padded[1] < 0.85 * padded[0]
    model = tiny_lm(max_seq_len=100)
    a, b = (gradients(model, [rows.batch(r) for r in s.micro_batches(0)]) for s in (shuffled, sorted_))
    assert a[:2] == pytest.approx(b[:2], rel=1e-6) and apart(a[2], b[2]) < 1e-6


# ---- templates -------------------------------------------------------------------------------------------------------

def test_the_three_templates_by_hand(tok):
    """bos: question <bos> answer <eos>, as in baby-llama2-chinese, our <|im_start|> and <|endoftext|> in their places; raw: nothing between."""
    messages = [{"role": "system", "content": "S"}, *chat("Q", "A", "R", "B")]
    S, Q, A, R, B, line = map(tok.encode, ("S", "Q", "A", "R", "B", "\n"))
    bos, eos = [tok.im_start_id], [tok.eos_id]
    other = Tokenizer(tok.spec)
    for template, mark in (("bos", bos), ("raw", [])):
        other.template = template
        ids, mask = render(other, messages)
        assert ids == [*S, *line, *Q, *mark, *A, *eos, *R, *mark, *B, *eos]
        assert [i for i, m in zip(ids, mask) if m] == [*A, *eos, *B, *eos]
        assert render(other, messages[:2], True)[0] == [*S, *line, *Q, *mark]


def test_a_prompt_is_a_prefix_of_the_prompt_with_its_answer_in_every_template(spoken):
    """What chat.py asks is what was trained, id by id; and the answer ends with a token at which generation stops."""
    for n in (1, 3):
        messages = chat("Hi", "\n Hello", "再见", "Bye")
        prompt, whole = render(spoken, messages[:n], True)[0], render(spoken, messages[: n + 1])[0]
        assert whole[: len(prompt)] == prompt and spoken.end_id in spoken.stop_ids
        assert whole[len(prompt) :][: len(spoken.encode(messages[n]["content"])) + 1] == [*spoken.encode(messages[n]["content"]), spoken.end_id]
    prompt, chosen, rejected = fit_pair(spoken, chat("Hi"), "good", "bad", 50)
    assert prompt == render(spoken, chat("Hi"), True)[0] and chosen[-1] == rejected[-1] == spoken.end_id


def test_a_long_question_loses_its_beginning_in_every_template(spoken):
    ids, mask = fit_chat(spoken, chat("far away " * 30 + "the end", "Yes."), 60)
    assert len(ids) == 60 and [i for i, m in zip(ids, mask) if m] == [*spoken.encode("Yes."), spoken.end_id]
    front = frame(spoken, "user")[0]
    assert ids[: len(front)] == front and "the end" in spoken.decode(ids)


def test_the_template_travels_with_the_tokenizer(spoken, tmp_path):
    """Saved, loaded and sent to another process; its hash is that of the same tokenizer: token files stay readable."""
    import pickle
    spoken.save(tmp_path)
    for other in (tokenizer.load(tmp_path), pickle.loads(pickle.dumps(spoken))):
        assert (other.template, other.hash, render(other, chat("Q", "A"))) == (spoken.template, tiny_tokenizer().hash, render(spoken, chat("Q", "A")))
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace(f'"template": "{spoken.template}"', '"template": "xml"'), encoding="utf-8")
    with pytest.raises(UserError, match="template 'xml' is unknown"):
        tokenizer.load(tmp_path)


def test_hugging_face_renders_the_exported_template_to_the_same_ids(spoken):
    """For contents that do not begin with a line end (theirs are tokenised together with what stands before them)."""
    from tokenizers import Tokenizer as HFTokenizer
    from transformers import PreTrainedTokenizerFast

    from nanollm.foreign_tokenizers import to_hf_json
    theirs = PreTrainedTokenizerFast(tokenizer_object=HFTokenizer.from_str(json.dumps(to_hf_json(spoken))))
    messages = [{"role": "system", "content": "Be kind."}, *chat("Hi", "Hello.", "好", "再见。")]
    kwargs = dict(chat_template=chat_template(spoken), tokenize=True, return_dict=True)
    if spoken.template == "chatml":
        out = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, **kwargs)
        assert (out["input_ids"], out["assistant_masks"]) == render(spoken, messages)
    text = theirs.apply_chat_template(messages, chat_template=chat_template(spoken), tokenize=False)
    ids = render(spoken, messages)[0]
    names = {i: name for name, i in spoken.control.items()}
    assert text == "".join(names.get(i) or spoken.token_bytes(i).decode("latin-1") for i in ids).encode("latin-1", "ignore").decode("utf-8")
    asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **kwargs)["input_ids"]
    assert asked == render(spoken, messages[:-1], True)[0]


def test_the_template_survives_the_way_to_hugging_face_and_back(spoken, tmp_path):
    """Their eos_token is the token that ends our answers."""
    import export
    checkpoint.save(tmp_path / "run", 1, tiny_lm(), spoken, "sft", None)
    export.main(parse(export.Config, ["--init_from", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]))
    export.main(parse(export.Config, ["--from_hf", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]))
    assert checkpoint.load(tmp_path / "back")[1].template == spoken.template
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert spoken.control[settings["eos_token"]] == spoken.end_id and settings["chat_template"] == chat_template(spoken)


# ---- rows ------------------------------------------------------------------------------------------------------------

def test_stanford_alpacas_prompt_as_published():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert to_messages(row, alpaca_prompt=True)[0]["content"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert to_messages({**row, "input": ""}, alpaca_prompt=True)[0]["content"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd."
        "\n\n### Response:")
    assert to_messages(row)[0]["content"] == "Add.\n1 2" and to_messages({"prompt": "Q", "answer": "A"}, alpaca_prompt=True)[0]["content"] == "Q"


@pytest.mark.parametrize("weight, train", [(0, 0), (1, 1), (True, 1), (1.0, 1), (None, None)])
def test_a_weight_is_one_or_zero(weight, train):
    """null is no weight: so Parquet writes what other messages of the column have not."""
    assert to_messages({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": weight}]})[1].get("train") == train


@pytest.mark.parametrize("row, reason", [
    ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0.5}]}, "weight 0.5 is neither 0 nor 1"),
    ({"prompt": "Q", "completion": "A", "label": True}, "unpaired preference row .*train_dpo.py"),
    ({"Question": "Q", "A": "1", "B": "2", "Answer": "A"}, "multiple-choice question: .*evaluate.py"),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "train_rm.py or train_dpo.py"), ({"text": "T"}, "train_pretrain.py")])
def test_a_row_of_another_stage_names_its_script(row, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(row)


def test_a_chat_without_a_learnt_answer_is_set_aside_for_that_reason(tok, capsys):
    """Not for its length; and rows are counted by reason, with an example of each."""
    silent = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]}
    rows = where([*chats(20), silent, {"text": "T"}, silent, {"prompt": "", "answer": "A"}])
    assert len(ChatRows(rows, tok, 100, max_bad=0.5).examples) == 20
    said = capsys.readouterr().out
    assert "set aside 4 of 24" in said and "2 x nothing to learn: every answer has weight 0, such as f:21" in said
    assert "1 x plain text" in said and "1 x empty or non-text user message, such as f:24" in said


def test_a_row_with_half_an_emoji_is_read_or_set_aside_like_any_other(tok, tmp_path):
    """\\ud83d alone is no UTF-8: in a chat it becomes a replacement character, in the quarantine it stays an escape."""
    rows = where([*chats(20), {"prompt": "Q \ud83d", "answer": "A"}, {"text": "T \ud83d"}])
    assert len(ChatRows(rows, tok, 100, out_dir=tmp_path).examples) == 21
    assert "T \ud83d" in json.loads((tmp_path / "quarantine.jsonl").read_text(encoding="utf-8"))["head"]


def test_keep_start_keeps_the_first_tokens(tok):
    """trl's way, for parity: no turn is spared, an answer may lose its end, and a row without a learnt token is dropped."""
    messages = chat("one two three", "four five six", "seven", "eight")
    ids, mask = render(tok, messages)
    for limit in range(4, len(ids) + 3):
        fitted = fit_chat(tok, messages, limit, "keep_start")
        assert fitted == ((ids[:limit], mask[:limit]) if any(mask[:limit]) else None)
    with pytest.raises(UserError, match="--truncate middle is unknown"):
        ChatRows.load(parse(train_sft.Config, ["--truncate", "middle"]), tok, 64)


# ---- looking at rows -------------------------------------------------------------------------------------------------

def test_inspect_prints_token_id_and_mask_in_colour_and_trains_nothing(world, tmp_path, capsys, monkeypatch):
    """A line a token: what is green, and only that, has mask 1 and spells the answers and their ends. A pipe gets no colours, unless FORCE_COLOR asks for them."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    kwargs = options("sft", world, tmp_path / "out", inspect=2, max_seq_len=60)
    train_sft.main(train_sft.Config(**kwargs))
    said = capsys.readouterr().out
    tok, train = tiny_tokenizer(), ChatRows.load(train_sft.Config(**kwargs), tiny_tokenizer(), 60)[0]
    green = re.findall(r"\033\[1;32m +\d+ +\d+ +(\d+) +(\d)  .*\033\[0m", said)
    want = [t for r in (0, 1) for i in train.rows[r] for t in learnt(train.examples[i][1])]
    assert [int(i) for i, _ in green] == want and {mask for _, mask in green} == {"1"}
    assert len(re.findall(r"\033\[90m +\d+ +\d+ +\d+ +0  ", said)) == sum(len(train.examples[i][0]) + 1 - len(learnt(train.examples[i][1]))
                                                                      - (train.examples[i][1][-1] == IGNORE_INDEX) for r in (0, 1) for i in train.rows[r])
    assert "<|im_end|>" in said and said.count("of them learnt") == 2 and not (tmp_path / "out").exists() and tok.im_end_id in want
    monkeypatch.delenv("FORCE_COLOR")
    train_sft.main(train_sft.Config(**kwargs))
    assert "\033" not in capsys.readouterr().out


# ---- mixing ----------------------------------------------------------------------------------------------------------

def test_weights_are_read_off_the_file_names():
    assert read_weights(["a.jsonl", "C:\\b.json"]) == (["a.jsonl", "C:\\b.json"], {})
    assert read_weights(["./a.jsonl:0.8", "b:c.json:2"]) == (["a.jsonl", "b:c.json"], {"a.jsonl": 0.8, "b:c.json": 2.0})
    for words in (["a:1", "b"], ["a:1", "a:2"], ["a:0", "b:1"], ["a:-1", "b:1"], ["a:nan", "b:1"], ["a:1", "b:inf"], ["a:1.2.3", "b:1"]):
        with pytest.raises(UserError, match="give each of them one weight above 0"):
            read_weights(words)


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Files whose answers say where they are from: 60 rows of a, 12 of b."""
    root = write_world(tmp_path_factory.mktemp("mix") / "world")
    for name, n in (("a", 60), ("b", 12)):
        write_jsonl(root / f"{name}.jsonl", [{"prompt": f"Q{i}", "answer": f"{name} " * (1 + i % 5)} for i in range(n)])
    return root


def test_files_are_mixed_by_their_weights(two_files, tmp_path, capsys, monkeypatch):
    """--data a:0.75 b:0.25: of every 256 rows read 192 are a's, although it has five times as many; b begins anew when it is used up,
    and what each contributes is said before the first update."""
    read = []
    batch = ChatRows.batch

    def watched(self, rows):
        if self.weights:
            read.extend("a" if self.rows[r][0] < sum(len(row) for row in self.rows[: self.sizes[0]]) else "b" for r in rows)
        return batch(self, rows)
    monkeypatch.setattr(ChatRows, "batch", watched)
    mix = [f"{two_files / 'a.jsonl'}:0.75", f"{two_files / 'b.jsonl'}:0.25"]
    kwargs = options("sft", two_files, tmp_path, data=mix, val_data=[], val_fraction=0.1, pack=False, max_steps=64, batch_size=4, eval_every=64, log_every=64)
    train_sft.main(train_sft.Config(**kwargs))
    assert len(read) == 512 and read[:256].count("a") == read[256:].count("a") == 192
    said = capsys.readouterr().out
    assert re.search(r"b\.jsonl: \d+ samples of \d+ rows = 1\d\.\d+ epochs; note: more than 4 epochs", said)
    with pytest.raises(UserError, match="leaves no row to train on"):
        empty = write_jsonl(tmp_path / "e.jsonl", [{"text": "no chat"}])
        train_sft.main(train_sft.Config(**{**kwargs, "data": [mix[0], f"{empty}:1"], "out_dir": str(tmp_path / "2"), "val_fraction": 0.1}))


def test_packing_lays_no_two_files_into_one_row(tok):
    """Else a row would have no file, and weights no meaning."""
    rows = where(chats(20), "a") + where(chats(9), "b")
    mixed = ChatRows(rows, tok, 128, weights={"b": 1.0, "a": 1.0})
    assert sum(mixed.sizes) == len(mixed) and sorted(sum(mixed.rows, [])) == list(range(29))
    assert all(min(row) >= 20 for row in mixed.rows[: mixed.sizes[0]]) and all(max(row) < 20 for row in mixed.rows[mixed.sizes[0] :])


# ---- models that do not know the template ----------------------------------------------------------------------------

def test_a_model_that_never_saw_the_chat_tokens_is_refused_until_sft_has_taught_them(tmp_path, world, capsys):
    """Pretrained for 80 updates: the reward model and DPO refuse it in a sentence. LoRA leaves the embeddings alone and says so, and what
    comes of it is refused as well; SFT of all weights makes it fit. A random model has no such parallel rows and passes."""
    base = tmp_path / "base"
    fast = dict(schedule="constant", eval_every=1000, save_every=1000, log_every=1000, warmup_steps=1)
    train_pretrain.main(train_pretrain.Config(**{**options("pretrain", world, base), **fast, "max_steps": 80, "learning_rate": 1e-2}))
    tok = tiny_tokenizer()
    assert not checkpoint.knows_chat(checkpoint.load(base)[0], tok) and checkpoint.knows_chat(tiny_lm(), tok)
    padded = tiny_lm()
    padded.output.weight.data[tok.pad_id] = 0                 # a vocabulary filled up with zeros says nothing about the chat tokens
    assert checkpoint.knows_chat(padded, tok)
    for script, stage in ((train_rm, "rm"), (train_dpo, "dpo")):
        with pytest.raises(UserError, match=r"never seen the chat tokens: .*train_sft.py first"):
            script.main(script.Config(**options(stage, world, tmp_path / stage, init_from=str(base))))
    for name, more in (("lora", {"peft": "lora"}), ("full", {"learning_rate": 1e-2})):
        capsys.readouterr()
        train_sft.main(train_sft.Config(**{**options("sft", world, tmp_path / name, init_from=str(base)), **fast, "max_steps": 30, **more}))
        assert ("never seen the chat tokens, and adapters leave" in capsys.readouterr().out) == (name == "lora")
        if name == "lora":
            with pytest.raises(UserError, match="never seen the chat tokens"):
                checkpoint.load(tmp_path / name, expect="chat")
        else:
            assert checkpoint.load(tmp_path / name, expect="chat")


def test_a_gentle_sft_is_not_taken_for_none(tok):
    """Rows as parallel as after pretraining, but for what a low rate changes: where an answer ends, the end is 2 nats likelier than <|pad|>."""
    model = tiny_lm(max_seq_len=160)
    weight = model.output.weight.data
    weight[tok.end_id] = weight[tok.pad_id] = torch.randn(weight.size(1))
    assert not checkpoint.knows_chat(model, tok)
    ids, mask = render(tok, chat("Hi", "Hello."))
    with torch.no_grad():
        h = model.hidden(torch.tensor([ids[: ids.index(tok.end_id, mask.index(1))]]))[0, -1]
    weight[tok.end_id] += 2 * h / h.square().sum()
    assert torch.cosine_similarity(*weight[[tok.end_id, tok.pad_id]], dim=0) > 0.99 and checkpoint.knows_chat(model, tok)


def test_the_format_of_the_run_is_the_format_of_the_model(world, tmp_path):
    """--format bos is saved with the checkpoint, goes on into DPO without a flag, and another one is refused on --resume."""
    train_sft.main(train_sft.Config(**options("sft", world, tmp_path / "sft", format="bos")))
    assert checkpoint.load(tmp_path / "sft")[1].template == "bos"
    train_dpo.main(train_dpo.Config(**options("dpo", world, tmp_path / "dpo", init_from=str(tmp_path / "sft"), max_steps=1)))
    assert checkpoint.load(tmp_path / "dpo")[1].template == "bos"
    with pytest.raises(UserError, match="--resume: format was 'bos'"):
        train_sft.main(train_sft.Config(**options("sft", world, tmp_path / "sft", format="raw", resume="auto")))
    with pytest.raises(UserError, match="--format xml is unknown"):
        train_sft.main(train_sft.Config(**options("sft", world, tmp_path / "x", format="xml")))


# ---- ranks (parity row 4) --------------------------------------------------------------------------------------------

COUNTS = (3, 50, 7, 20, 40, 1, 0, 9)


def ragged(tok):
    """One chat for each number of supervised tokens; 0 is a row of padding."""
    letters = [{"prompt": "Q", "answer": "x" * 60}]
    (x, y), = ChatRows(where(letters), tok, 200).examples
    begin = next(t for t, v in enumerate(y) if v != IGNORE_INDEX)
    assert len(learnt(y)) > 50
    return [(torch.tensor([x]), torch.tensor([[v if begin <= t < begin + n else IGNORE_INDEX for t, v in enumerate(y)]]), None) for n in COUNTS]


def two_ranks(out):
    """The gradient of the update whose micro-batches hold COUNTS supervised tokens, in two processes, and the bug's."""
    from nanollm import dist
    ctx = dist.init("cpu")
    mine, found = ragged(tiny_tokenizer())[ctx.rank :: 2], {}
    for kind in ("right", "mean of means"):
        raw = tiny_lm(max_seq_len=200)
        model = dist.wrap(raw, ctx, False, torch.float32)
        count = ctx.sum(sum((y != IGNORE_INDEX).sum() for _, y, _ in mine))
        for i, batch in enumerate(mine):
            model.sync = i == len(mine) - 1
            loss, n, _ = train_sft.sft_loss(model, *batch)
            (loss / count * ctx.world_size if kind == "right" else loss / n.clamp(min=1) / len(mine)).backward()
        model.wait()
        found[kind] = {n: p.grad.clone() for n, p in raw.named_parameters()}
    if ctx.main:
        torch.save(found, out / "gradients.pt")
    dist.finish(ctx)


def test_two_ranks_with_ragged_answers_give_the_gradient_of_one(tmp_path, tok):
    """Parity row 4: micro-batches of 3, 50, 7, 20, 40, 1, 0 and 9 supervised tokens on two gloo ranks against sum / N in one process."""
    run_ranks("test_sft.two_ranks", tmp_path)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    _, count, one = gradients(tiny_lm(max_seq_len=200), ragged(tok))
    norm = lambda g: math.sqrt(sum(v.double().square().sum() for v in g.values()))
    off, bug = apart(found["right"], one), norm({n: found["mean of means"][n] - one[n] for n in one}) / norm(one)
    print(f"\n| 4 | DDP normalisation | gradient {off:.0e} | the bug: {bug:.2f} of the gradient's norm |")
    assert count == sum(COUNTS) and off < 1e-6 and bug > 0.1
