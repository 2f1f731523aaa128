"""Where the seconds of a training stage go: runs a training script with a stopwatch around its verbs.

    python bench/road.py train_pretrain.py --config configs/demo/pretrain.toml --out_dir out/profile/pretrain

Everything after the script's name is the script's own. What is not named below is "the rest": the loop itself, logging, setting up.
The stopwatch costs microseconds; a verb inside another (a forward pass inside an evaluation) counts for the outer one.
"""
import sys
import time

BEGAN = time.perf_counter()

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Stopwatch:
    def __init__(self):
        self.seconds, self.calls, self.running = {}, {}, False

    def around(self, owner, name, verb):
        """Put a stopwatch around owner.name, which may be a function of a module or a method of a class."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            if self.running:
                return function(*args, **kwargs)
            self.running, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.running = False
                self.seconds[verb] = self.seconds.get(verb, 0.0) + time.perf_counter() - start
                self.calls[verb] = self.calls.get(verb, 0) + 1
        setattr(owner, name, timed)


def main(script, argv):
    watch = Stopwatch()
    module = importlib.import_module(Path(script).stem)
    import torch

    from nanollm import checkpoint, config, env, evaluation
    watch.seconds["imports"] = time.perf_counter() - BEGAN
    stage = module.STAGE
    loss = {"pretrain": "pretrain_loss", "sft": "sft_loss", "rm": "pair_loss", "dpo": "preference_loss"}[stage]
    watch.around(module, loss, "forward")
    watch.around(torch.Tensor, "backward", "backward")
    watch.around(module, "update", "optimizer")
    watch.around(module, "validate", "validation")
    watch.around(evaluation, "sample_prompts", "samples")
    watch.around(checkpoint.Saver, "save", "saves")
    cfg = config.parse(module.Config, argv)
    module.main(cfg)
    total = time.perf_counter() - BEGAN
    watch.seconds["the rest"] = total - sum(watch.seconds.values())
    print("\n| verb | calls | seconds | share |\n|---|---|---|---|")
    for verb, seconds in sorted(watch.seconds.items(), key=lambda pair: -pair[1]):
        print(f"| {verb} | {watch.calls.get(verb, '')} | {seconds:.1f} | {seconds / total:.1%} |")
    print(f"| all | | {total:.1f} | |")
    Path("out/bench").mkdir(parents=True, exist_ok=True)
    Path(f"out/bench/road_{stage}.json").write_text(json.dumps({**env.stamp(), "seconds": watch.seconds, "calls": watch.calls}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    from nanollm.config import UserError
    try:
        if len(sys.argv) < 2 or Path(sys.argv[1]).stem not in ("train_pretrain", "train_sft", "train_rm", "train_dpo"):
            raise UserError("bench/road.py wants a training script and its options: python bench/road.py train_pretrain.py --config configs/demo/pretrain.toml")
        main(sys.argv[1], sys.argv[2:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
