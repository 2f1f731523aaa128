"""Order the rows of token files from easy to hard, for `train_pretrain.py --curriculum`.

    python -m nanollm.tools.difficulty --data out/mine/tokens --difficulty trigram --max_seq_len 512
    python -m nanollm.tools.difficulty --data out/mine/tokens --difficulty model --init_from out/mine/pretrain

The first is worth it for large files only: training computes what is missing. A model's perplexity must be measured here.
"""
from dataclasses import dataclass

from nanollm import checkpoint, curriculum, dist
from nanollm.config import UserError, arg, run
from nanollm.data import TokenFile, tokenizer_of


@dataclass
class Config:
    data: str = arg("out/demo/tokens", "directory of token files")
    rows: str = arg("stream", "stream or documents, as in training")
    max_seq_len: int = arg(256, "as in training", unit="tokens", least=1)
    difficulty: str = arg("unigram", "length, unigram, bigram, trigram, unigram_perplexity or model")
    init_from: str = arg("", "the model whose perplexity counts, for model")
    batch_size: int = arg(16, "rows at a time, for model", least=1)
    device: str = arg("auto", "auto, cpu, cuda, cuda:N, mps")


def main(cfg):
    tokenizer, model, ctx, autocast = tokenizer_of(cfg.data), None, None, None
    data = TokenFile(cfg.data, "train", cfg.max_seq_len, cfg.rows, tokenizer.hash)
    if cfg.difficulty == "model":
        if not cfg.init_from:
            raise UserError("--difficulty model needs --init_from, the checkpoint whose perplexity counts")
        ctx = dist.Context(0, 0, 1, dist.choose_device(cfg.device), True)
        model, made_by, _ = checkpoint.load(cfg.init_from, ctx.device, expect="lm")
        if made_by.hash != tokenizer.hash or cfg.max_seq_len > model.args.max_seq_len:
            raise UserError(f"--init_from {cfg.init_from} has another tokenizer than {cfg.data}, or a context shorter than --max_seq_len")
        dtype = dist.choose_dtype("auto", ctx.device)
        autocast = lambda: dist.autocast(ctx.device, dtype)
    found = curriculum.score(data, cfg.difficulty, tokenizer, model, ctx, autocast, cfg.batch_size)
    print(f"{found['rows']:,} rows -> {found['file']}\neasiest: {found['easiest']!r}\nhardest: {found['hardest']!r}")


if __name__ == "__main__":
    run(main, Config, __doc__)
