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

from nanollm.checkpoint import find
from nanollm.config import UserError, arg, run
from nanollm.data import TokenFile, tokenizer_of
from nanollm.model import ModelArgs, flops_per_token, parameter_count
from nanollm.variants import build

# Peak of dense matrix products (tensor cores, fp32 sums, no sparsity) in TFLOP/s, memory in GB, and the 16-bit type that the
# hardware computes in: from the makers' data sheets, not measured. V100 and T4 have no bf16.
HARDWARE = {"v100": (125, 32, "float16"), "t4": (65, 16, "float16"), "a100": (312, 80, "bfloat16"), "a100_40gb": (312, 40, "bfloat16"),
            "h100": (989, 80, "bfloat16"), "h200": (989, 141, "bfloat16"), "l4": (121, 24, "bfloat16"),
            "3090": (71, 24, "bfloat16"), "4090": (165, 24, "bfloat16")}
CHINCHILLA = 20                   # training tokens a parameter at the best loss for the compute (Hoffmann et al. 2022, table 3)
HEAP = 1.25                       # on the CPU a process holds more than its tensors: malloc keeps pieces that were given back
RESERVE = 0.9                     # the share of a GPU's memory to plan with: CUDA's context, libraries and fragmentation take the rest


@dataclass
class Config:
    first = "config"              # words before the first option: the preset
    any_preset = True             # of which keys that cost nothing (rates, paths, seeds) play no part
    # as in train_pretrain.py
    data: list = arg(["out/demo/tokens"], "directory of token files: its tokenizer's vocabulary and its rows count, if it is there")
    rows: str = arg("stream", "stream or documents: whether rows may hold less than max_seq_len tokens")
    init_from: str = arg("", "a checkpoint: the shape comes from it")
    dim: int = arg(128, "width of the residual stream", least=1)
    n_layers: int = arg(4, "number of blocks", least=1)
    n_heads: int = arg(4, "query heads", least=1)
    n_kv_heads: int = arg(0, "key/value heads; 0 = n_heads, fewer = GQA")
    head_dim: int = arg(0, "width of a head; 0 = dim / n_heads")
    vocab_size: int = arg(0, "0 = that of the tokenizer in --data")
    multiple_of: int = arg(32, "the FFN width is rounded up to a multiple of this", least=1)
    hidden_dim: int = arg(0, "FFN width; 0 = 2/3 * 4 * dim, rounded up")
    norm_eps: float = arg(1e-5, "epsilon inside RMSNorm")
    max_seq_len: int = arg(256, "context length", unit="tokens", least=1)
    rope_theta: float = arg(10000.0, "RoPE base")
    dropout: float = arg(0.0, "dropout keeps its masks: more activations")
    tie_embeddings: bool = arg(True, "one matrix for input and output")
    attention: str = arg("sdpa", "sdpa, or naive: keeps the (T, T) scores of every head")
    variants: list = arg([], "architecture options by name: qk_norm moe:n_experts=8,top_k=2")
    max_steps: int = arg(0, "length of the run; 0 = --epochs over the data say it", unit="updates")
    epochs: float = arg(1.0, "passes over the data, unless --max_steps is given")
    batch_size: int = arg(8, "rows per micro-batch and rank", least=1)
    gradient_accumulation_steps: int = arg(1, "micro-batches per update over all ranks together", least=1)
    optimizer: str = arg("adamw", "adamw: two moments; muon: one for the blocks' matrices, two for the rest")
    dtype: str = arg("auto", "compute type: float32, bfloat16, float16; auto: the hardware's 16-bit type, float32 on the cpu")
    parallel: str = arg("ddp", "ddp or fsdp (= ZeRO-3), as in the scripts; zero1, zero2 for comparison: what --gpus share out")
    activation_checkpointing: bool = arg(False, "keep only each block's input and compute the rest again")
    # the plan's own
    gpus: int = arg(1, "number of GPUs", least=1)
    hardware: str = arg("", f"{', '.join(HARDWARE)}, or cpu (this machine, measured); empty = a line for each")
    mfu: float = arg(0.4, "model FLOPs utilisation: the share of the peak that training reaches; bench/gpu.py measures it", unit="0 to 1")
    dataset_rows: int = arg(0, "rows of max_seq_len tokens in the data; 0 = what --data holds, if it is there")
    accumulation_per_rank: int = arg(0, "micro-batches per update and rank, as the notes count; overrides gradient_accumulation_steps")


# ---------------------------------------------------------------------------------------------------- what a shape costs


def remembered(function):
    """Each result once: keyed by what the arguments look like, because ModelArgs hold a list."""
    results = {}

    def wrapped(*arguments):
        key = repr(arguments)
        if key not in results:
            results[key] = function(*arguments)
        return results[key]
    return wrapped


@remembered
def on_meta(args):
    """The model of these ModelArgs without its numbers: on this device a shape costs nothing."""
    with torch.device("meta"):
        return build(args)


def block_activations(args, dtype, device="cuda", mask=False):
    """Bytes per token that one block keeps for its backward pass, by what keeps them: {name: bytes}.

    Norms work in fp32 and keep their input and the normalised copy. A matrix product keeps its input; under autocast (a
    2-byte dtype) each of them casts a copy of its own. On the CPU in fp32 the derivatives by hand keep less, and under
    autocast attention stays in fp32 there. mask: rows of several documents, whose mask the fused kernel turns into numbers; on the
    CPU there is none, but the documents' outputs are joined into a tensor of its own.
    Plain attention keeps the scores besides. Variants and odd widths of heads have no formula: one row is run and counted."""
    if args.variants or args.n_heads * args.head_dim != args.dim:
        return {"counted": counted(args, dtype)}
    s, C, F, H, T = dtype.itemsize, args.dim, args.ffn_dim, args.n_heads, args.max_seq_len
    half, cpu, plain = s < 4, device == "cpu", args.attention == "naive"
    a = 4 if cpu and not plain else s                                      # what attention computes in
    norm = 4 * (C + 1) if cpu and not half else 4 * (2 * C + 1)
    kept = {"attention_norm": norm, "input of wq wk wv": (3 if half else 1) * s * C, "q k v": 3 * a * C, "input of wo": a * C + (s * C if a > s else 0),
            "ffn_norm": norm, "input of w1 w3": (2 if half else 1) * s * C, "inside of the FFN": (2 if cpu and not half else 4) * s * F}
    if plain:
        return kept | {"scores": T * (H * (4 + (s if half else 0)) + 1)}
    return kept | {"logsumexp": 4 * H} | ({} if not mask else {"documents joined": 0 if half else a * C} if cpu else {"mask": a * T})


def kept_by_autograd(model, forward):
    """(what forward() returns, bytes it leaves behind for the backward pass): each storage once, the model's own tensors aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    return out, sum(sizes.values())


@remembered
def counted(args, dtype):
    """Bytes per token of one block, counted: what a second block and a second row add to a tiny run of this shape."""
    T, kept = min(args.max_seq_len, 128), {}
    for layers in (1, 2):
        model = build(dataclasses.replace(args, n_layers=layers, vocab_size=8, dropout=0.0, variants=list(args.variants))).train()
        for rows in (1, 2):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                kept[layers, rows] = kept_by_autograd(model, lambda: model.hidden(torch.zeros(rows, T, dtype=torch.long)))[1]
    return (kept[2, 2] - kept[2, 1] - kept[1, 2] + kept[1, 1]) // T


SPLIT_BY_TP = ("q k v", "input of wo", "inside of the FFN", "logsumexp", "scores")       # a process has its own heads and width only


def activations(args, rows, dtype, checkpointing=False, mask=False, device="cuda"):
    """Bytes that the forward pass of `rows` rows keeps until the backward pass: blocks, last norm, the gradient at the chunked
    loss, and under autocast the 16-bit copies of the blocks' matrices. With checkpointing each block keeps its input, and
    the insides of one at a time exist again."""
    n, block = rows * args.max_seq_len, sum(block_activations(args, dtype, device, mask).values())
    by_hand = device == "cpu" and dtype.itemsize == 4
    ends = 8 + 4 * ((1 if by_hand else 2) * args.dim + 1) + 4 * args.dim    # token ids; the last norm; d loss / d hidden
    if mask and device == "cpu":
        ends += 16 + 8 * args.head_dim                                       # where each token stood; its own angles
    matrices = parameter_count(on_meta(args))
    copies = 0 if dtype.itemsize == 4 else dtype.itemsize * (matrices["attention"] + matrices["feed_forward"])
    per_token = args.n_layers * 4 * args.dim + block if checkpointing else args.n_layers * block
    return n * (per_token + ends) + copies


def optimizer_bytes(args, kind):
    """AdamW keeps two fp32 numbers for each parameter, Muon one for each in the blocks' matrices."""
    n = parameter_count(on_meta(args))
    return 8 * n["total"] - (4 * (n["attention"] + n["feed_forward"]) if kind == "muon" else 0)


def working(args, rows, dtype, gpus, parallel, accumulating, device="cuda"):
    """Bytes that come and go around the largest moment, the loss: a chunk's logits and log-probabilities, under accumulation the new
    gradient of the output matrix beside the sum of those before, under FSDP the weights gathered for the blocks at work and for
    what no block holds."""
    s, V, C = dtype.itemsize, args.vocab_size, args.dim
    n = parameter_count(on_meta(args))
    chunk = min(rows * args.max_seq_len, 2**24 // V + 1 if device == "cpu" else 4096)       # as losses.linear_cross_entropy cuts them
    bytes = chunk * V * (4 if s == 4 else 4 + 2 * s) + (2 * s * V * C if s < 4 else 0)            # and the 16-bit weight and its gradient
    if accumulating:
        bytes += 4 * V * C
    if parallel == "fsdp" and gpus > 1:
        bytes += 2 * s * (n["attention"] + n["feed_forward"]) // args.n_layers + 4 * (n["embedding"] + n["output"])
    return bytes


def memory(args, rows, dtype=torch.float32, optimizer="adamw", parallel="ddp", gpus=1, checkpointing=False, accumulating=False, mask=False,
           device="cuda"):
    """Bytes on one GPU: {"weights", "gradients", "optimizer", "activations", "working", "total"}. rows: of max_seq_len tokens in a
    micro-batch. Masters, gradients and moments are fp32 (4 + 4 + 8 bytes a parameter).

    ddp: all of it on every GPU. zero1, zero2, fsdp (= ZeRO-3): optimizer, gradients, weights in `gpus` slices, each with those
    before it (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1). tp: the blocks' matrices in slices. pipeline: the blocks
    themselves, as many micro-batches under way as GPUs."""
    n = parameter_count(on_meta(args))
    blocks, P = n["attention"] + n["feed_forward"], n["total"]
    kept = activations(args, rows, dtype, checkpointing, mask, device)
    w, g, o = 4 * P, 4 * P, optimizer_bytes(args, optimizer)
    if parallel in ("zero1", "zero2", "fsdp"):
        o /= gpus
    if parallel in ("zero2", "fsdp") and not accumulating:                 # gradients are only sliced when they are sent: once an update
        g /= gpus
    if parallel == "fsdp":
        w /= gpus
    if parallel in ("tp", "pipeline"):
        sliced = blocks * (1 - 1 / gpus)
        w, g, o = w - 4 * sliced, g - 4 * sliced, o - (4 if optimizer == "muon" else 8) * sliced
    if parallel == "tp":
        parts = block_activations(args, dtype, device, mask)
        inner = sum(parts.get(name, 0) for name in SPLIT_BY_TP) * (1 if checkpointing else args.n_layers)
        kept -= rows * args.max_seq_len * inner * (1 - 1 / gpus)
    parts = {"weights": w, "gradients": g, "optimizer": o, "activations": kept, "working": working(args, rows, dtype, gpus, parallel, accumulating, device)}
    return {name: int(b) for name, b in parts.items()} | {"total": int(sum(parts.values()))}


def kv_cache(args, dtype):
    """Bytes per token of context and row: a key and a value of every layer and key/value head."""
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * dtype.itemsize


def steps(n_rows, batch_size, gradient_accumulation_steps, epochs=1.0):
    """Updates for so many epochs over n_rows rows, rounded up. gradient_accumulation_steps counts the micro-batches of all ranks
    together, as everywhere in nanollm; the notes count those of one rank: 16 rows x 4 x 4 GPUs is 16 x 16 here."""
    return math.ceil(max(1, round(epochs * n_rows)) / (batch_size * gradient_accumulation_steps))


def measured_peak(seconds=0.5):
    """GFLOP/s of an fp32 matrix product of 1024 x 1024 on this machine's CPU: the best of what fits into `seconds`."""
    a, best, end = torch.randn(1024, 1024), 0.0, time.perf_counter() + seconds
    a @ a
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began) / 1e9)
    return best


# ---------------------------------------------------------------------------------------------------- the printed plan


def model_args(cfg):
    """The ModelArgs of --init_from or of the flags, the vocabulary taken from --data if need be. Raises UserError."""
    if cfg.init_from:
        try:
            return ModelArgs(**json.loads((find(cfg.init_from) / "meta.json").read_text(encoding="utf-8"))["model"])
        except UserError:
            print(f"note: --init_from {cfg.init_from} is not there yet; the shape comes from the options", flush=True)
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ModelArgs)}
    if not cfg.vocab_size:
        if not cfg.data or not (Path(cfg.data[0]) / "tokenizer").is_dir():
            raise UserError(f"the vocabulary is unknown: {' '.join(cfg.data)} holds no tokenizer; give --vocab_size (64793 for the notes' ChatGLM2 "
                            f"tokenizer, 32006 for Zero-Chatgpt's, 6400 for a small one of your own) or --data with token files")
        fields["vocab_size"] = tokenizer_of(cfg.data[0]).vocab_size
    try:
        return ModelArgs(**fields)
    except ValueError as e:
        raise UserError(str(e)) from None


def rows_in(cfg, args):
    """Rows of the data: --dataset_rows, or what the token files in --data make, or 0."""
    if not cfg.dataset_rows and cfg.data and (Path(cfg.data[0]) / "train.json").exists():
        return len(TokenFile(cfg.data[0], "train", args.max_seq_len, cfg.rows))
    return cfg.dataset_rows


def show(n):
    """91650000 -> '91.65 M', 63.4e9 -> '63.40 B'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.2f} {letter}"
    return f"{n:.0f}"


def duration(seconds):
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def machine(cfg):
    """(peak FLOP/s, memory in bytes, compute type) of --hardware; the CPU is measured. Raises UserError."""
    if cfg.hardware not in HARDWARE and cfg.hardware not in ("", "cpu"):
        raise UserError(f"--hardware {cfg.hardware} is unknown; use one of {', '.join(HARDWARE)}, cpu")
    if cfg.hardware == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        return measured_peak() * 1e9, pages, "float32"
    tflops, gb, kind = HARDWARE[cfg.hardware or "h100"]
    return tflops * 1e12, gb * 1e9, kind


def main(cfg):
    peak, room, kind = machine(cfg)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if cfg.dtype != "auto" and cfg.dtype not in kinds:
        raise UserError(f"--dtype {cfg.dtype} is unknown; use auto, {', '.join(kinds)}")
    if cfg.parallel not in ("none", "ddp", "zero1", "zero2", "fsdp"):
        raise UserError(f"--parallel {cfg.parallel} is unknown; use ddp, zero1, zero2 or fsdp")
    if cfg.optimizer not in ("adamw", "muon"):
        raise UserError(f"--optimizer {cfg.optimizer} is unknown; use adamw or muon")
    dtype = kinds[kind if cfg.dtype == "auto" else cfg.dtype]
    args, gpus = model_args(cfg), cfg.gpus
    T, model = args.max_seq_len, on_meta(args)
    G = cfg.accumulation_per_rank * gpus or cfg.gradient_accumulation_steps
    if G % gpus:
        raise UserError(f"--gradient_accumulation_steps {G} counts the micro-batches of all ranks and must be divisible by the {gpus} GPUs")
    n, flops, rows = parameter_count(model), flops_per_token(model, T), cfg.batch_size * G
    mask = cfg.rows == "documents"

    print(f"vocabulary    {args.vocab_size:,}" + ("" if cfg.vocab_size or cfg.init_from else f", of the tokenizer in {cfg.data[0]}"))
    print(f"parameters    {show(n['total'])}: " + ", ".join(f"{k} {show(v)} ({100 * v / n['total']:.1f} %)" for k, v in n.items() if v and k != "total"))
    print(f"compute       {show(flops)}FLOP a token in training: 6 for each of the weights that multiply, 12 x layers x dim x T for attention")
    print(f"an update     {cfg.batch_size} rows x {T} tokens x {G} micro-batches ({G // gpus} on each of {gpus} GPU(s)) = {rows * T:,} tokens")
    cache = kv_cache(args, dtype)
    print(f"KV cache      {cache:,} bytes a token, {cache * T / 1e6:.1f} MB for a row at the full context of {T}, in {str(dtype)[6:]}")

    best = CHINCHILLA * n["total"]
    print(f"Chinchilla    {CHINCHILLA} tokens a parameter: {show(best)} tokens, {math.ceil(best / (rows * T)):,} updates; the best loss for "
          f"the compute, not a limit: a model to be used much is trained longer")
    data = rows_in(cfg, args)
    updates = cfg.max_steps or (steps(data, cfg.batch_size, G, cfg.epochs) if data else 0)
    if data:
        one = steps(data, cfg.batch_size, G)
        print(f"the data      {data:,} rows of {T} = {show(data * T)} tokens: {data:,} / ({cfg.batch_size} x {G // gpus} x {gpus}) = {one:,} updates an epoch")
    if updates:
        print(f"the run       {updates:,} updates = {show(updates * rows * T)} tokens, {updates * rows * T / n['total']:.1f} a parameter"
              + (f", {updates * rows / data:.2f} epochs" if data else ""))
    tokens = updates * rows * T or best

    what = "the run" if updates else "Chinchilla's tokens"
    cost = dict(dtype=dtype, optimizer=cfg.optimizer, gpus=gpus, accumulating=G > gpus, mask=mask, device="cpu" if cfg.hardware == "cpu" else "cuda")
    mine = memory(args, cfg.batch_size, parallel=cfg.parallel, checkpointing=cfg.activation_checkpointing, **cost)
    unit, size = ("GB", 1e9) if mine["total"] >= 1e9 else ("MB", 1e6)
    print(f"\n{unit} on each of {gpus} GPU(s), {str(dtype)[6:]} compute over fp32 weights, {cfg.optimizer}, {cfg.batch_size} rows at a time")
    print(f"{'':<28}" + "".join(f"{part:>13}" for part in mine))
    for how in ("ddp", "zero1", "zero2", "fsdp", "tp", "pipeline") if gpus > 1 else ("ddp",):
        for checkpointing in (False, True):
            m = memory(args, cfg.batch_size, parallel=how, checkpointing=checkpointing, **cost)
            chosen = (how == cfg.parallel or gpus == 1) and checkpointing == cfg.activation_checkpointing
            print(f"{(how if gpus > 1 else 'one process') + (' + checkpointing' if checkpointing else ''):<28}"
                  + "".join(f"{b / size:>13.2f}" for b in m.values()) + ("   <- this plan" if chosen else "")
                  + ("" if how in ("ddp", "fsdp", "tp") else "   (not in the scripts, for comparison)"))
    if cfg.hardware == "cpu":
        print(f"the process will hold about {mine['total'] * HEAP / size:.0f} {unit} above what PyTorch itself takes: malloc keeps pieces")
    if args.dropout:
        print("(dropout keeps its masks besides)")

    print(f"\n{what} at a model FLOPs utilisation of {cfg.mfu:g} (given, not measured), {gpus} GPU(s)"
          + (", a third more for computing the blocks twice" if cfg.activation_checkpointing else ""))
    again = 4 / 3 if cfg.activation_checkpointing else 1
    mine["total"] *= HEAP if cfg.hardware == "cpu" else 1
    for name in [cfg.hardware] if cfg.hardware else HARDWARE:
        speed, space = (peak, room) if name == "cpu" else (HARDWARE[name][0] * 1e12, HARDWARE[name][1] * 1e9)
        seconds = tokens * flops * again / (gpus * speed * cfg.mfu) if cfg.mfu else math.inf
        verdict = "fits" if mine["total"] <= RESERVE * space else "DOES NOT FIT"
        label = "measured here" if name == "cpu" else "data sheet"
        print(f"  {name:<10} {speed / 1e12:>6.3g} TFLOP/s ({label})   {duration(seconds):>10}   {show(gpus * speed * cfg.mfu / flops / again)} tokens/s   "
              f"{mine['total'] / 1e9:.1f} of {space / 1e9:.0f} GB: {verdict}")
    if cfg.hardware and mine["total"] > RESERVE * room:
        print(advice(cfg, args, G, cost, mine, room))


def advice(cfg, args, G, cost, mine, room):
    """What would make it fit: smaller pieces, checkpointing, slices; each way with what it needs."""
    def needs(rows, how, checkpointing):
        return memory(args, rows, parallel=how, checkpointing=checkpointing, **cost)["total"]

    ways, limit, rows = [], RESERVE * room, cfg.batch_size
    while rows > 1 and needs(rows, cfg.parallel, cfg.activation_checkpointing) > limit:
        rows //= 2
    if needs(rows, cfg.parallel, cfg.activation_checkpointing) <= limit:
        ways.append(f"--batch_size {rows} --gradient_accumulation_steps {G * cfg.batch_size // rows} (the same update in smaller pieces)")
    for how in dict.fromkeys([cfg.parallel, *(["fsdp"] if cfg.gpus > 1 else [])]):
        for checkpointing in (False, True):
            if (b := needs(cfg.batch_size, how, checkpointing)) <= limit:
                words = [f"--parallel {how}"] * (how != cfg.parallel) + ["--activation_checkpointing"] * checkpointing
                ways.append(f"{' '.join(words)} ({b / 1e9:.1f} GB)")
    return (f"warning: {mine['total'] / 1e9:.1f} GB do not fit into {room / 1e9:.0f} GB, of which {100 * RESERVE:.0f} % are planned with. "
            + (f"What would: {'; '.join(ways)}" if ways else "Nor would checkpointing or smaller batches: take a smaller model, or more GPUs and "
               "--parallel fsdp"))


if __name__ == "__main__":
    run(main, Config, __doc__)
