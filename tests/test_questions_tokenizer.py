"""Claims of the notes about tokenizers and batches that no other test shows."""
import json

import jinja2
import pytest
import torch
import torch.nn.functional as F

from conftest import stories, tiny_lm, tiny_tokenizer
from nanollm.corpus import compare
from nanollm.corpus.bpe import train_bpe
from nanollm.data import collate
from nanollm.losses import IGNORE_INDEX, cross_entropy
from nanollm.optim import make_optimizer
from nanollm.tokenizer import bpe_tokenizer, pattern_for

ZH = ["今天天气很好，我们一起去公园玩。", "小明有三个苹果，小红有两个苹果。", "孩子们去公园玩，天气很好。"]


def test_a_prompt_padded_on_the_right_is_continued_behind_its_padding():
    """Position -1 of a right-padded row is a pad's; its logits are not the prompt's. With the pads in front and left out of attention they are."""
    model, prompt, pads = tiny_lm(), torch.tensor([[5, 9, 2]]), torch.full((1, 4), 60)
    one, none = torch.ones_like(prompt), torch.zeros_like(pads)
    with torch.no_grad():
        alone = model(prompt)[0, -1]
        left = model(torch.cat((pads, prompt), 1), torch.cat((none, one), 1))[0, -1]
        right = model(torch.cat((prompt, pads), 1))[0, -1]
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)
    assert (right - alone).abs().max() > 0.1


@pytest.fixture(scope="module")
def hf():
    """Our tokenizer as one of Hugging Face's, padding on the left as in the notes."""
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    from nanollm.foreign_tokenizers import to_hf_json
    return PreTrainedTokenizerFast(tokenizer_object=Fast.from_str(json.dumps(to_hf_json(tiny_tokenizer()))), padding_side="left",
                                   pad_token="<|pad|>", eos_token="<|endoftext|>")


def test_the_lm_collator_copies_and_masks_the_padding_and_shifts_nothing(hf):
    """The notes' table, of rows of one, one and three tokens: labels are the inputs with -100 for the pads; the model shifts them later.
    Our loader shifts: target t is the token behind input t. And if PAD is EOS, the collator hides each EOS from the loss."""
    from transformers import DataCollatorForLanguageModeling
    rows, pad = [[11], [12], [11, 13, 14]], hf.pad_token_id
    batch = DataCollatorForLanguageModeling(hf, mlm=False)([{"input_ids": row} for row in rows])
    assert batch["input_ids"].tolist() == [[pad, pad, 11], [pad, pad, 12], [11, 13, 14]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 11], [-100, -100, 12], [11, 13, 14]]
    inputs, targets, _ = collate([[(row[:-1], row[1:])] for row in ([11, 12], [11, 13, 14])], pad)
    assert inputs.tolist() == [[11, pad], [11, 13]] and targets.tolist() == [[12, -100], [13, 14]]
    ended = [{"input_ids": [11, hf.eos_token_id]}]
    assert DataCollatorForLanguageModeling(hf, mlm=False)(ended)["labels"].tolist() == [[11, hf.eos_token_id]]
    hf.pad_token, before = hf.eos_token, hf.pad_token
    try:
        assert DataCollatorForLanguageModeling(hf, mlm=False)(ended)["labels"].tolist() == [[11, -100]]
    finally:
        hf.pad_token = before


def test_the_seq2seq_collator_pads_the_labels_it_is_given(hf):
    """Inputs and labels are two sequences, each padded to its own longest; so for a decoder it keeps labels that hide the question."""
    from transformers import DataCollatorForSeq2Seq
    pairs = [{"input_ids": [11, 12, 13], "labels": [14]}, {"input_ids": [11], "labels": [15, 16]}]
    batch = DataCollatorForSeq2Seq(hf)(pairs)
    assert batch["input_ids"].shape == (2, 3) and batch["labels"].tolist() == [[-100, 14], [15, 16]]
    answer_only = DataCollatorForSeq2Seq(hf)([{"input_ids": [11, 12, 13], "labels": [-100, -100, 13]}])
    assert answer_only["labels"].tolist() == [[-100, -100, 13]]


def test_an_end_of_text_has_no_text_but_changes_what_follows():
    """Decoded it is nothing; as an input it takes a place and is attended to, and where it stands matters."""
    tok, model = tiny_tokenizer(), tiny_lm()
    a, b = tok.encode("Anna has a cat."), tok.encode(" Ben likes it.")
    rows = [a + [tok.eos_id] + b, [tok.eos_id] + a + b]
    assert {tok.decode(row) for row in rows} == {tok.decode(a + b)}
    with torch.no_grad():
        first, second = (model(torch.tensor([row]))[0, -1] for row in rows)
        without = model(torch.tensor([a + b]))[0, -1]
    assert (first - second).abs().max() > 0.05 and (first - without).abs().max() > 0.05


def test_softmax_plus_one_is_a_softmax_with_a_place_to_look_away():
    """exp(x) / (1 + sum exp(x)): the weights of a row add up to less than 1, to nearly nothing where all scores are low. The same as a softmax with
    one more key of score 0 and value 0."""
    scores, v = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    weights = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
    assert (weights.sum(-1) < 1).all() and (weights > 0).all()
    sink = F.pad(scores, (1, 0)).softmax(-1) @ F.pad(v, (0, 0, 1, 0))
    torch.testing.assert_close(weights @ v, sink)
    low = scores - 20
    assert (low.exp() / (1 + low.exp().sum(-1, keepdim=True))).sum(-1).max() < 1e-6 and low.softmax(-1).sum(-1) == pytest.approx(1)


PRINTED = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ 'system\n你是一个由喵阿姨开发的喵喵小助手\n' }}{% endif %}"
           "{{'' + message['role'] + '\n' + message['content'] + '' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}")


def test_the_printed_chat_template_renders_words_only():
    """Its markers got lost: nothing says who speaks or where a turn ends, and a user who types a line "assistant" is one. With the
    markers put back, it is the prompt of our template."""
    rendered = lambda text: jinja2.Template(text, keep_trailing_newline=True).render(messages=[{"role": "user", "content": "你好"}], add_generation_prompt=True)
    assert rendered(PRINTED) == "system\n你是一个由喵阿姨开发的喵喵小助手\nuser\n你好\nassistant\n"
    mended = PRINTED.replace("{{ 'system", "{{ '<|im_start|>system").replace("小助手\n'", "小助手<|im_end|>\n'").replace("{{ 'assistant", "{{ '<|im_start|>assistant")
    mended = mended.replace("{{'' +", "{{'<|im_start|>' +").replace("+ '' +", "+ '<|im_end|>' +")
    assert rendered(mended) == ("<|im_start|>system\n你是一个由喵阿姨开发的喵喵小助手<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
                                "<|im_start|>assistant\n")


def test_a_chinese_character_takes_three_tokens_with_bytes_alone_and_fewer_than_one_with_merges():
    """So "one to three" is a matter of the vocabulary, and not a bound: words become one token."""
    size = lambda tok: len(tok.encode("".join(ZH))) / len("".join(ZH))
    trained = lambda n: bpe_tokenizer(train_bpe(ZH * 40, n, pattern_for(n), say=None), pattern_for(n))
    assert size(bpe_tokenizer([], pattern_for(320))) == 3
    assert 1 < size(trained(272)) < 3 and size(trained(400)) < 1


def test_llama_3s_vocabulary_would_outweigh_a_small_model_more_than_twice():
    """128,256 ids, 512 wide: 65.7 million a matrix beside blocks of 25.3 million; tied 72 % of the model, untied 84 %."""
    shape = dict(dim=512, n_layers=8, hidden_dim=1376)
    for tied, share in ((True, 0.72), (False, 0.84)):
        vocabulary, total = compare.parameters(128_256, tied=tied, **shape)
        assert round(vocabulary / total, 2) == share and round((total - vocabulary) / 1e6, 1) == 25.3
    assert round(128_256 * 512 / 1e6, 1) == 65.7


def test_a_trained_model_read_with_another_vocabulary_knows_less_than_nothing():
    """The same tokens under permuted ids: a loss above ln V, the loss of one who knows nothing; learning goes on from there, as from scratch."""
    tok, model = tiny_tokenizer(), tiny_lm(n_layers=1).train()
    ids = torch.tensor([tok.encode("".join(stories(12)))[:257]])
    optimizer = make_optimizer(model, learning_rate=1e-2)
    for _ in range(40):
        loss, count, _ = cross_entropy(model(ids[:, :-1].view(8, 32)), ids[:, 1:].reshape(8, 32))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    other = torch.randperm(tok.vocab_size, generator=torch.Generator().manual_seed(0))[ids]
    with torch.no_grad():
        own, foreign = (cross_entropy(model(x[:, :-1].view(8, 32)), x[:, 1:].reshape(8, 32))[0] / 256 for x in (ids, other))
    assert own < 2 and foreign > torch.tensor(float(tok.vocab_size)).log() and IGNORE_INDEX == -100
