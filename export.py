"""To and from other programs' formats.

    python export.py --init_from out/demo/dpo --out out/demo/hf           our checkpoint -> transformers, vLLM …
    python export.py --init_from out/demo/dpo --out out/demo/dpo.gguf     our checkpoint -> llama.cpp, ollama
    python export.py --from_hf some/model/dir --out out/imported          a Hugging Face directory -> our checkpoint

Llama 2 and 3, TinyLlama, SmolLM2, Mistral, Mixtral, Qwen2, Qwen3 and GPT-2 are understood both ways. An adapter is merged if it
can be; --adapter writes it alone, as peft's two files. Needs safetensors (for .gguf: gguf): pip install -e ".[export,gguf]".
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import adapter_files, checkpoint, config, foreign_tokenizers, gguf_export, hf, peft
from nanollm import tokenizer as tokenizers
from nanollm.config import UserError, arg
from nanollm.variants import build


@dataclass
class Config:
    init_from: str = arg("", "our run or checkpoint directory to write out")
    from_hf: str = arg("", "Hugging Face directory to read in: config.json, *.safetensors, tokenizer.json or tokenizer.model")
    out: str = arg("", "directory to write, or a file that ends in .gguf")
    dtype: str = arg("float32", "of the written weights: float32, bfloat16 or float16 (half the size, rounded)")
    shard_size: int = arg(5000, "weights that are larger are cut into several files", unit="MB", least=1)
    adapter: bool = arg(False, "write only the adapter of --init_from, in peft's layout (docs/peft.md)")


def write_json(path, table):
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; --from_hf wants a directory with config.json and weights") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None


def to_hf(cfg):
    """Write config.json, generation_config.json, the weights and the tokenizer's files under --out, or one .gguf."""
    out = Path(cfg.out)
    model, tok, meta = checkpoint.load(cfg.init_from, expect="lm", merge=not cfg.adapter)
    if (cfg.adapter and (cfg.dtype, cfg.shard_size) != (Config.dtype, Config.shard_size)) or (out.suffix == ".gguf" and cfg.shard_size != Config.shard_size):
        raise UserError("an adapter is one small file in fp32, and .gguf is one file: leave out --shard_size, and with --adapter --dtype, too")
    if old := sorted(out.glob("adapter_model*" if cfg.adapter else "model*.safetensors*")):
        raise UserError(f"--out {out} already holds weights ({old[0].name}); choose another directory, or delete them first")
    if cfg.adapter:
        if not peft.adapter_config(model):
            raise UserError(f"--adapter: {cfg.init_from} was trained without --peft; leave the option out")
        adapter_files.save_adapter(model, out)
        return ["adapter_config.json", "adapter_model.safetensors"]
    if method := peft.adapter_config(model):
        raise UserError(f"{cfg.init_from} carries an adapter of the kind {method['method']}, which cannot be merged: export its base, and it with --adapter")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(cfg.dtype)
    if dtype is None:
        raise UserError(f"--dtype must be float32, bfloat16 or float16, got {cfg.dtype!r}")
    if out.suffix == ".gguf":
        gguf_export.save(model, tok, out, dtype)
        return [out.name]
    hf.safetensors()                                            # a missing extra is reported before anything is written
    table = hf.to_hf_config(model.args, tok, cfg.dtype) | {"nanollm_stage": meta["stage"], "nanollm_template": tok.template}
    tokenizer_files = foreign_tokenizers.hf_files(tok, tokenizers.chat_template(tok), model.args.max_seq_len)

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", table)
    write_json(out / "generation_config.json", {"do_sample": True, "temperature": 1.0} | {
        key: table[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    hf.write_weights(out, hf.to_hf_state(model.state_dict(), model.args), dtype, cfg.shard_size * 2**20)
    foreign_tokenizers.write_files(out, tokenizer_files)
    return [p.name for p in sorted(out.iterdir())]


def tokenizer_of(source, table, vocab_size):
    """The tokenizer of a Hugging Face directory: the first of its files that can be read, as large as the model's vocabulary,
    with a note where its chats are not written as ours."""
    files = [p for p in (source / "tokenizer.json", source / "tokenizer.model", *sorted(source.glob("*.tiktoken"))) if p.exists()]
    tok, refused = None, []
    for file in files or [source]:
        try:
            tok = tok or tokenizers.load(file)
        except UserError as e:
            refused.append(str(e))
    if tok is None:
        raise UserError("; ".join(refused))
    if vocab_size > tok.vocab_size:                             # rows that no token uses yet
        tok = tokenizers.Tokenizer(tok.spec | {"vocab_size": vocab_size}, tok.raw)
    if "nanollm_template" in table:
        if table["nanollm_template"] not in tokenizers.TEMPLATES:
            raise UserError(f"{source}/config.json: nanollm_template must be one of {', '.join(tokenizers.TEMPLATES)}, not {table['nanollm_template']!r}")
        tok.template = table["nanollm_template"]
    else:
        print(f"note: {foreign_tokenizers.chat_note(source)}", flush=True)
    return tok


def from_hf(cfg):
    """Read a Hugging Face directory into a checkpoint under --out."""
    source = Path(cfg.from_hf)
    if any(Path(cfg.out).glob(checkpoint.PREFIX + "*")):
        raise UserError(f"--out {cfg.out} already holds checkpoints; choose another directory")
    table = read_json(source / "config.json")
    args = hf.from_hf_config(table)
    state = hf.from_hf_state(hf.read_weights(source), args)
    if not isinstance(stage := table.get("nanollm_stage", "pretrain"), str):
        raise UserError(f"{source}/config.json: nanollm_stage must be a stage's name, not {stage!r}")
    tok = tokenizer_of(source, table, args.vocab_size)
    extra = tok.vocab_size - args.vocab_size
    if homeless := sum(bool(tok.token_bytes(i)) for i in range(args.vocab_size, tok.vocab_size)):
        raise UserError(f"{source}: {homeless} tokens of text lie beyond the model's vocabulary of {args.vocab_size}; the tokenizer is another model's")
    if extra > 0:                                               # control tokens for chat that this model never had
        args = dataclasses.replace(args, vocab_size=tok.vocab_size)
        for key in {"tok_embeddings.weight", "output.weight"} & state.keys():    # as the mean row: no token stands out
            state[key] = torch.cat((state[key], state[key].mean(0, keepdim=True).expand(extra, -1)))
        print(f"{extra} control tokens are new to this model; train before you chat")
    with torch.device("meta"):                                  # the shapes alone: the weights are the file's
        model = build(args)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise UserError(f"{source}: weights do not fit its config.json: {str(e).splitlines()[-1].strip()}") from None
    path = checkpoint.save(cfg.out, 0, model, tok, stage, cfg)
    return [p.relative_to(cfg.out).as_posix() for p in sorted(path.iterdir())]


def main(cfg):
    if not cfg.out or bool(cfg.init_from) == bool(cfg.from_hf):
        raise UserError("give --out and one of --init_from (our checkpoint) or --from_hf (a Hugging Face directory)")
    out = Path(cfg.out)
    if file := next((p for p in (out, *out.parents) if p.is_file()), None):
        raise UserError(f"--out {out}: {file} is a file already; choose another name")
    if cfg.init_from and out.suffix == ".gguf" and out.is_dir():
        raise UserError(f"--out {out} is a directory; a .gguf is one file")
    if cfg.from_hf and (cfg.adapter or cfg.dtype != Config.dtype or cfg.shard_size != Config.shard_size):
        raise UserError("--adapter, --dtype and --shard_size are about what --init_from writes; --from_hf reads, always into fp32")
    files = to_hf(cfg) if cfg.init_from else from_hf(cfg)
    print(f"{cfg.init_from or cfg.from_hf} -> {cfg.out}: {', '.join(files)}")


if __name__ == "__main__":
    config.run(main, Config, __doc__)
