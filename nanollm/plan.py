"""What a run will cost, before it is started: parameters, FLOPs, memory, tokens, steps, hours.

    python -m nanollm.plan configs/notes/baby_llama2_92m.toml --gpus 4 --hardware 3090
    python -m nanollm.plan configs/demo/pretrain.toml --hardware cpu
    python -m nanollm.plan --dim 768 --n_layers 12 --n_heads 12 --vocab_size 50304 --max_seq_len 1024 --dtype bfloat16

The first word is a preset of train_pretrain.py; options after it override the preset, as they do for the script. Nothing is
allocated: the model is built on PyTorch's meta device, and the activations follow from formulas that a test holds against
what autograd really keeps. GB is 10^9 bytes.
"""
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm.config import UserError, arg, run
from nanollm.data import tokenizer_of
from nanollm.model import ModelArgs, Transformer, flops_per_token, parameter_count

# Peak of dense matrix products (tensor cores, fp32 sums, no sparsity) in TFLOP/s, memory in GB, and the 16-bit type that the
# hardware computes in: from the makers' data sheets, not measured. V100 and T4 have no bf16.
HARDWARE = {"v100": (125, 32, "float16"), "t4": (65, 16, "float16"), "a100": (312, 80, "bfloat16"), "a100_40gb": (312, 40, "bfloat16"),
            "h100": (989, 80, "bfloat16"), "h200": (989, 141, "bfloat16"), "l4": (121, 24, "bfloat16"),
            "3090": (71, 24, "bfloat16"), "4090": (165, 24, "bfloat16")}
CHINCHILLA = 20                   # training tokens a parameter at the best loss for the compute (Hoffmann et al. 2022, table 3)
RESERVE = 0.9                     # the share of a GPU's memory to plan with: CUDA's context, libraries and fragmentation take the rest


@dataclass
class Config:
    first = "config"              # words before the first option: the preset
    any_preset = True             # of which keys that cost nothing (rates, paths, seeds) play no part
    # as in train_pretrain.py
    data: str = arg("out/demo/tokens", "directory of token files: its tokenizer's vocabulary and number of tokens count, if it is there")
    rows: str = arg("stream", "stream or documents: whether rows may hold less than max_seq_len tokens")
    init_from: str = arg("", "a checkpoint: the shape comes from it")
    dim: int = arg(128, "width of the residual stream", least=1)
    n_layers: int = arg(4, "number of blocks", least=1)
    n_heads: int = arg(4, "query heads", least=1)
    n_kv_heads: int = arg(0, "key/value heads; 0 = n_heads, fewer = GQA")
    vocab_size: int = arg(0, "0 = that of the tokenizer in --data")
    multiple_of: int = arg(32, "the FFN width is rounded up to a multiple of this", least=1)
    hidden_dim: int = arg(0, "FFN width; 0 = 2/3 * 4 * dim, rounded up")
    norm_eps: float = arg(1e-5, "epsilon inside RMSNorm")
    max_seq_len: int = arg(256, "context length", unit="tokens", least=1)
    rope_theta: float = arg(10000.0, "RoPE base")
    dropout: float = arg(0.0, "dropout keeps its masks: more activations")
    tie_embeddings: bool = arg(True, "one matrix for input and output")
    attention: str = arg("sdpa", "sdpa, or naive: keeps the (T, T) scores of every head")
    max_steps: int = arg(0, "length of the run; 0 = --epochs over the data say it", unit="updates")
    epochs: float = arg(1.0, "passes over the data, unless --max_steps is given")
    batch_size: int = arg(8, "rows per micro-batch and rank", least=1)
    gradient_accumulation_steps: int = arg(1, "micro-batches per update over all ranks together", least=1)
    optimizer: str = arg("adamw", "adamw: two moments; muon: one for the blocks' matrices, two for the rest")
    dtype: str = arg("auto", "compute type: float32, bfloat16, float16; auto: the hardware's 16-bit type, float32 on the cpu")
    parallel: str = arg("ddp", "ddp, zero1, zero2 or fsdp (= ZeRO-3): what --gpus share out")
    activation_checkpointing: bool = arg(False, "keep only each block's input and compute the rest again")
    # the plan's own
    gpus: int = arg(1, "number of GPUs", least=1)
    hardware: str = arg("", f"{', '.join(HARDWARE)}, or cpu (this machine, measured); empty = a line for each")
    mfu: float = arg(0.4, "model FLOPs utilisation: the share of the peak that training reaches; bench/gpu.py measures it", unit="0 to 1")
    dataset_rows: int = arg(0, "rows of max_seq_len tokens in the data; 0 = what --data holds, if it is there")
    accumulation_per_rank: int = arg(0, "micro-batches per update and rank, as the notes count; overrides gradient_accumulation_steps")


# ---------------------------------------------------------------------------------------------------- what a shape costs


def on_meta(args):
    """The Transformer of these ModelArgs without its numbers: shapes cost nothing."""
    with torch.device("meta"):
        return Transformer(args)


def block_activations(args, dtype):
    """Bytes per token that one block keeps for its backward pass, by what keeps them. Norms work in fp32 and keep their input and
    the normalised copy; a matrix product keeps its input; under autocast each product casts its own copy.

    dtype: what matrix products run in. Plain attention ("naive") also keeps the scores: see activations()."""
    s, C, F = dtype.itemsize, args.dim, args.ffn_dim
    copies = lambda n: n if s < 4 else 1
    return {"attention_norm": 4 * (2 * C + 1), "input of wq wk wv": copies(3) * s * C, "q k v": 3 * s * C,
            "logsumexp": 4 * args.n_heads, "input of wo": s * C,
            "ffn_norm": 4 * (2 * C + 1), "input of w1 w3": copies(2) * s * C, "gate, up": 2 * s * F, "silu, product": 2 * s * F}
