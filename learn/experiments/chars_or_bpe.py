"""Characters or BPE?

    python -m learn.experiments.chars_or_bpe               a minute and a quarter on one core

A character table gives each character it has seen an id: for Chinese that looks natural. Byte-level BPE (Sennrich et al. 2016, on
bytes) starts from the 256 bytes and joins what stands together often. Same blocks, same text, both languages, three ways: BPE;
characters with as many tokens a row and update, so the same work in the blocks and less text; characters with rows as long in
bytes, so the same text and more work. (BPE's 1,024 ids make its model a third larger, all of it in the embedding.) Bits per byte
compare all three, losses per token do not.

One sees that characters are behind at equal work, and how much of that longer rows win back, for how much time. And what a table
has not seen is lost: "comes back" is the share of the characters of a sentence about other things that survives.
"""
import math
import time

from learn import lab

BPE_IDS = 1024
LENGTH = 64                                                   # tokens of BPE in a row
STEPS = 200
OTHER = "A naïve crocodile 🐊 ate 7 crêpes. 鳄鱼吃了七张可丽饼，还想喝咖啡。"


def main(cfg):
    texts = lab.texts(300, 1)
    size, figures = sum(len(text.encode("utf-8")) for text in texts), {}
    per_token = {ids: size / len(lab.corpus(ids)[1]) for ids in (BPE_IDS, 0)}                       # bytes
    for name, ids, length in [("BPE", BPE_IDS, LENGTH), ("characters, same work", 0, LENGTH),
                              ("characters, same text", 0, round(LENGTH * per_token[BPE_IDS] / per_token[0]))]:
        train_ids, val_ids, tok = lab.corpus(ids)
        for seed in range(cfg.seeds):
            model, began = lab.tiny(tok.vocab_size, seed, max_seq_len=length), time.process_time()
            lab.train(model, lab.windows(train_ids, length=length, seed=seed), cfg.steps(STEPS))
            seconds = (time.process_time() - began) / cfg.steps(STEPS)
            loss = lab.val_loss(model, val_ids, length, most=10**9)
            for what, x in {"bits a byte": loss * len(val_ids) / size / math.log(2), "nats a token": loss, "ms an update": 1000 * seconds}.items():
                figures.setdefault(f"{name}, {what}", []).append(x)
        figures[f"{name}, ids"], figures[f"{name}, bytes a token"] = tok.vocab_size, size / len(val_ids)
        back = tok.decode(tok.encode(OTHER))
        figures[f"{name}, comes back"] = 1 - back.count("\ufffd") / len(OTHER)
    bits = {name.removesuffix(", bits a byte"): runs for name, runs in figures.items() if name.endswith("bits a byte")}
    claims = {"at equal work characters are worse than BPE": lab.higher(bits["characters, same work"], bits["BPE"]),
              "the same text brings characters nearer to BPE": lab.higher(bits["characters, same work"], bits["characters, same text"]),
              "BPE spells what it has never seen, the table loses it": figures["BPE, comes back"] == 1 > figures["characters, same text, comes back"]}
    lab.finish(cfg, figures, claims, lambda plt: lab.bars(plt, bits, "bits a byte"), within={name: 9 for name in figures if "ms an update" in name})


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
