"""To and from the Hugging Face layout.

    python export.py --init_from out/demo/dpo --out out/demo/hf     our checkpoint -> transformers, vLLM, llama.cpp …
    python export.py --from_hf some/llama/dir --out out/imported    a LlamaForCausalLM directory -> our checkpoint

A LoRA checkpoint is written merged; --adapter writes its adapter alone, as peft's two files. Needs safetensors:
pip install -e ".[export]".
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nanollm import checkpoint, config, foreign_tokenizers, hf, peft
from nanollm import tokenizer as tokenizers
from nanollm.config import UserError, arg
from nanollm.variants import build


@dataclass
class Config:
    init_from: str = arg("", "our run or checkpoint directory to write out")
    from_hf: str = arg("", "Hugging Face directory to read in: config.json, *.safetensors, tokenizer.json")
    out: str = arg("", "directory to write")
    dtype: str = arg("float32", "of the written weights: float32, bfloat16 or float16 (half the size, rounded)")
    adapter: bool = arg(False, "write only the LoRA adapter of --init_from, in peft's layout")


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
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files under --out."""
    safetensors, out = hf.safetensors(), Path(cfg.out)          # a missing extra is reported before anything is done
    model, tok, meta = checkpoint.load(cfg.init_from, expect="lm")
    if model.args.variants:
        raise UserError(f"{cfg.init_from} has {' '.join(model.args.variants)} (--variants), which the LLaMA layout cannot hold; chat.py runs it")
    if cfg.adapter:                                             # load() has merged it: take the file as it was trained
        if not meta["lora"]:
            raise UserError(f"--adapter: {cfg.init_from} was trained without LoRA; leave the option out")
        model = build(model.args)
        peft.inject_lora(model, **meta["lora"])
        model.load_state_dict(checkpoint.read(checkpoint.find(cfg.init_from), "model.pt"))
        hf.save_adapter(model, out)
        return ["adapter_config.json", "adapter_model.safetensors"]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(cfg.dtype)
    if dtype is None:
        raise UserError(f"--dtype must be float32, bfloat16 or float16, got {cfg.dtype!r}")
    table = hf.to_hf_config(model.args, tok, cfg.dtype) | {"nanollm_stage": meta["stage"], "nanollm_template": tok.template}
    state = hf.to_hf_state(model.state_dict(), model.args)
    tokenizer_files = foreign_tokenizers.hf_files(tok, tokenizers.chat_template(tok), model.args.max_seq_len)

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", table)
    write_json(out / "generation_config.json", {"do_sample": True, "temperature": 1.0} | {
        key: table[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    safetensors.save_file({k: v.to(dtype).contiguous() for k, v in state.items()}, out / "model.safetensors",
                          metadata={"format": "pt"})
    foreign_tokenizers.write_files(out, tokenizer_files)
    return [p.name for p in sorted(out.iterdir())]


def from_hf(cfg):
    """Read a LlamaForCausalLM directory (one or several safetensors files) into a checkpoint under --out."""
    safetensors, source = hf.safetensors(), Path(cfg.from_hf)
    if any(Path(cfg.out).glob(checkpoint.PREFIX + "*")):
        raise UserError(f"--out {cfg.out} already holds checkpoints; choose another directory")
    table = read_json(source / "config.json")
    args = hf.from_hf_config(table)
    files = sorted(source.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{source} holds no model*.safetensors; other weight files cannot be read")
    state = {}
    for file in files:
        try:
            state |= safetensors.load_file(file)
        except Exception as e:                                  # safetensors has an exception class of its own
            raise UserError(f"cannot read {file}: {e}; the file is damaged, download it again") from None
    known = [source / "tokenizer.json", source / "tokenizer.model"]
    tok = tokenizers.load(next((p for p in known if p.exists()), source))
    tok.template = table.get("nanollm_template", tok.template)
    state = hf.from_hf_state(state, args)
    extra = tok.vocab_size - args.vocab_size
    if extra > 0:                                               # control tokens for chat that this model never had
        args = dataclasses.replace(args, vocab_size=tok.vocab_size)
        for key in {"tok_embeddings.weight", "output.weight"} & state.keys():    # as the mean row: no token stands out
            state[key] = torch.cat((state[key], state[key].mean(0, keepdim=True).expand(extra, -1)))
        print(f"{extra} control tokens are new to this model; train before you chat")
    model = build(args)
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{source}: weights do not fit its config.json: {str(e).splitlines()[-1].strip()}") from None
    path = checkpoint.save(cfg.out, 0, model, tok, table.get("nanollm_stage", "pretrain"), cfg)
    return [p.relative_to(cfg.out).as_posix() for p in sorted(path.iterdir())]


def main(cfg):
    if not cfg.out or bool(cfg.init_from) == bool(cfg.from_hf):
        raise UserError("give --out and one of --init_from (our checkpoint) or --from_hf (a Hugging Face directory)")
    files = to_hf(cfg) if cfg.init_from else from_hf(cfg)
    print(f"{cfg.init_from or cfg.from_hf} -> {cfg.out}: {', '.join(files)}")


if __name__ == "__main__":
    config.run(main, Config, __doc__)
