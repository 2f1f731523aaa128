"""Write a checkpoint again with its weights in 8 or 4 bits: a quarter of the file or less, and no fp32 copy when it is loaded.

    python -m nanollm.tools.quantize --init_from out/demo/dpo --method nf4 --out out/demo/dpo_nf4
    python chat.py --init_from out/demo/dpo_nf4 --quantize nf4

Only to be used, not to be trained or exported: keep the checkpoint that it was made from.
"""
from dataclasses import dataclass

from nanollm import checkpoint
from nanollm.config import UserError, arg, run


@dataclass
class Config:
    init_from: str = arg("", "checkpoint or run directory")
    method: str = arg("nf4", "int8, int4 or nf4 (docs/quantization.md)")
    out: str = arg("", "directory of the new checkpoint")


def main(cfg):
    if not cfg.init_from or not cfg.out:
        raise UserError("give --init_from, a checkpoint, and --out, where the quantised one goes")
    source = checkpoint.find(cfg.init_from)
    model, tok, meta = checkpoint.load(source, plain=True, quantize=cfg.method)
    if meta.get("quantize") or meta["head"] == "classifier":
        raise UserError(f"{source} is {'quantised already' if meta.get('quantize') else 'a classifier'}; give a language or reward model as it was trained")
    path = checkpoint.save(cfg.out, meta["step"], model, tok, meta["stage"], None, quantize=cfg.method)
    before, after = ((p / "model.pt").stat().st_size for p in (source, path))
    print(f"{source}: {before / 2**20:,.1f} MB -> {path}: {after / 2**20:,.1f} MB")


if __name__ == "__main__":
    run(main, Config, __doc__)
