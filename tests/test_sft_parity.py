"""SFT against trl: rows 1 to 3 of the specification's table (row 4, two ranks, needs no trl and stands in test_sft.py). With -s each test
prints its line of the table: the largest differences that were found."""
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset

import numpy as np
import train_sft
from conftest import chats, tiny_tokenizer
from nanollm.data import ChatRows, collate, pack
from nanollm.losses import IGNORE_INDEX
from test_trl_parity import COMMON, hf_tokenizer, in_order, largest, llama, train, where

CHATS = [{"messages": [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": "Anna likes it. " * (i % 5) + "是的。"},
                       {"role": "user", "content": "again"}, {"role": "assistant", "content": f"yes{i}"}]} for i in range(8)]


def trainer_of(tmp_path, rows, **more):
    theirs, ours = llama()
    args = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, loss_type="nll",
                     **{**COMMON, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "max_length": 160, **more})
    return in_order(SFTTrainer)(model=theirs, args=args, train_dataset=Dataset.from_list(rows), processing_class=hf_tokenizer()), ours


def test_sft_labels_losses_and_weights_equal_trls(tmp_path):
    """Rows 1 and 2. Labels token by token (trl keeps them unshifted); then two updates of four micro-batches whose numbers of supervised
    tokens differ by a factor of eight: loss and weights."""
    trainer, ours = trainer_of(tmp_path, CHATS)
    rows = ChatRows(where(CHATS), tiny_tokenizer(), 160, pack_rows=False)
    for (x, y), theirs in zip(rows.examples, trainer.train_dataset, strict=True):
        assert x == theirs["input_ids"][:-1] and y == theirs["labels"][1:]
    logs, off = train(trainer), 0.0
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    for step in range(2):
        batches = [rows.batch([4 * step + i]) for i in range(4)]
        count, loss = sum((y != IGNORE_INDEX).sum() for _, y, _ in batches), 0.0
        for batch in batches:
            loss_sum, _, _ = train_sft.sft_loss(ours, *batch)
            (loss_sum / count).backward()
            loss += loss_sum.item() / count.item()
        optimizer.step()
        optimizer.zero_grad()
        off = max(off, abs(loss - logs[step]["loss"]))
    moved = largest(ours, trainer.model.state_dict())
    print(f"\n| 1 | SFT, two updates of G = 4 ragged | loss {off:.0e} | weights {moved:.0e} |\n| 2 | labels of {len(CHATS)} chats | equal | |")
    assert off < 1e-6 and moved < 1e-6


def test_keep_start_cuts_and_drops_what_trl_does(tmp_path, capsys):
    """Row 2 with a limit: the same chats are left, with the same labels. Our own way keeps more answers whole."""
    rows = CHATS + [{"messages": [{"role": "user", "content": "long " * 40}, {"role": "assistant", "content": "never seen"}]}]
    trainer, _ = trainer_of(tmp_path, rows, max_length=48)
    ours = ChatRows(where(rows), tiny_tokenizer(), 47, pack_rows=False, truncate="keep_start", max_bad=0.5)
    for (x, y), theirs in zip(ours.examples, trainer.train_dataset, strict=True):
        assert x == theirs["input_ids"][:-1] and y == theirs["labels"][1:]
    turn = ChatRows(where(rows), tiny_tokenizer(), 47, pack_rows=False)
    assert (len(ours.examples), len(turn.examples)) == (8, 9) and "1 x no answer token fits" in capsys.readouterr().out


def test_packing_bins_are_trls():
    """Row 3: bin by bin and in trl's order, item lengths within each, for the specification's example and 700 random lengths."""
    rng = np.random.default_rng(0)
    for lengths, size in (((5, 2, 3, 1, 4, 4, 2), 6), (rng.integers(1, 65, 700).tolist(), 64), (rng.integers(1, 20, 300).tolist(), 64)):
        theirs = pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), size, "bfd")["seq_lengths"]
        assert [[lengths[i] for i in row] for row in pack(lengths, size)] == [list(row) for row in theirs]


def test_packed_logits_equal_separate_ones_and_transformers():
    """Row 3: three chats in one row under our segments; each alone; and in transformers, told by position_ids without a cache. Without
    segments they would read each other."""
    theirs, ours = llama()
    rows = ChatRows(where(chats(3)), tiny_tokenizer(), 160, pack_rows=False)
    x, _, segments = collate([rows.examples], tiny_tokenizer().pad_id)
    positions = torch.cat([torch.arange(len(example[0])) for example in rows.examples])[None]
    with torch.no_grad():
        packed = ours(x, segments)[0]
        alone = torch.cat([ours(torch.tensor([example[0]]))[0] for example in rows.examples])
        hf = theirs(input_ids=x, position_ids=positions, use_cache=False).logits[0]
        mixed = ours(x)[0]
    off, off_hf, wrong = ((packed - other).abs().max().item() for other in (alone, hf, mixed))
    print(f"\n| 3 | packing | bins equal | packed - separate {off:.0e} | packed - transformers {off_hf:.0e} | without the mask {wrong:.2f} |")
    assert isinstance(theirs, LlamaForCausalLM) and off < 2e-6 and off_hf < 2e-6 and wrong > 0.1          # logits of size 2, rounded in another order
