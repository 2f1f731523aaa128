"""Make bare token files of other programs (ids and nothing else, as nanoGPT or llama2.c write them) readable here.

    python -m nanollm.tools.describe --data old/ --split train --token_dtype uint16 --tokenizer tokenizer.model

writes SPLIT.idx and SPLIT.json beside SPLIT.bin, and the tokenizer: a file cannot say what its bytes are, so you must.
"""
from dataclasses import dataclass
from pathlib import Path

from nanollm import tokenizer as tokenizers
from nanollm.config import arg, run
from nanollm.corpus import pack


@dataclass
class Config:
    data: str = arg("", "the directory of SPLIT.bin")
    split: str = arg("train", "train or val")
    token_dtype: str = arg("uint16", "what an id is stored in: uint16 or uint32")
    tokenizer: str = arg("", "what made the ids: a directory, .model, tokenizer.json or .tiktoken")


def main(cfg):
    tokenizer = tokenizers.load(cfg.tokenizer)
    meta = pack.describe(cfg.data, cfg.split, tokenizer, cfg.token_dtype)
    tokenizer.save(Path(cfg.data) / "tokenizer")
    print(f"{cfg.split}: {meta['n_docs']:,} documents, {meta['n_tokens']:,} tokens, {meta['n_bytes'] / meta['n_tokens']:.2f} bytes a token")


if __name__ == "__main__":
    run(main, Config, __doc__)
