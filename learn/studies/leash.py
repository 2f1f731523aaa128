"""What the KL leash is for: PPO against the demo's reward model with the preset's beta and with beta 0, judged by the rule behind the
preferences, which no model has seen.

    bash runs/speedrun.sh                                  the demo's checkpoints and pairs, once
    python -m learn.studies.leash                      three seeds each, six runs of about a minute

At some points of each run the actor answers the held-out prompts (sampled, temperature 1). Side by side: what the reward model
says (it rises, since it is what is optimised), what the rule says, the KL to the SFT model, and the win rate against its answers.
A reward model is right about answers like those it was trained on; how far a policy that only pleases it gets from those,
and whether that is better or worse by the rule, is what this measures.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

import train_ppo
from nanollm import checkpoint, env, evaluation, world
from nanollm.config import arg, parse, run
from nanollm.data import read_rows, to_preference


@dataclass
class Config:
    preset: str = arg("configs/demo/ppo.toml", "the run")
    data: str = arg("out/demo/raw/prefs_val.jsonl", "held-out prompts")
    betas: list = arg(["0.05", "0"], "one run of each seed for each")
    seeds: int = arg(3, "runs of each", least=2)
    max_steps: int = arg(30, "rollouts", least=2)
    every: int = arg(10, "rollouts between two looks", least=1)
    max_rows: int = arg(240, "held-out prompts", least=1)
    more: list = arg([], "more options for train_ppo.py: key=value")
    runs: str = arg("out/leash", "the runs' checkpoints")
    out: str = arg("out/leash.json", "the results")
    picture: str = arg("", "also draw them into this file (needs matplotlib)")


def words(cfg, beta, seed, out_dir):
    looks = [str(s) for s in range(0, cfg.max_steps + 1, cfg.every)]
    given = {"beta": beta, "seed": seed, "max_steps": cfg.max_steps, "eval_every": cfg.every, "save_every": cfg.max_steps, "log_every": cfg.every,
             "out_dir": out_dir}
    return ["--config", cfg.preset, "--milestones", *looks, *[f"--{k}={v}" for k, v in given.items()], *[f"--{word}" for word in cfg.more]]


@torch.no_grad()
def look(path, rows, rival):
    """What the rule says of one checkpoint's answers: (mean rating, win rate against the SFT model's answers)."""
    model, tok, _ = checkpoint.load(path)
    answers = evaluation.answers(model, tok, [to_preference(row)[0] for row in rows], temperature=1.0, seed=3)
    ratings = [world.rate(row, text) for row, (text, _) in zip(rows, answers)]
    return mean(ratings), evaluation.win_rate(ratings, rival)


def main(cfg):
    rows = [row for _, row in read_rows([cfg.data])][: cfg.max_rows]
    results = {}
    for beta in cfg.betas:
        for seed in range(cfg.seeds):
            out_dir = Path(cfg.runs) / f"beta_{beta}_{seed}"
            shutil.rmtree(out_dir, ignore_errors=True)
            options = parse(train_ppo.Config, words(cfg, beta, seed, out_dir))
            sft, tok, _ = checkpoint.load(options.init_from)
            rival = [world.rate(row, text) for row, (text, _) in
                     zip(rows, evaluation.answers(sft, tok, [to_preference(row)[0] for row in rows], temperature=1.0, seed=1))]
            train_ppo.main(options)
            lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for line in (line for line in lines if "val/scores" in line):
                rating, wins = look(out_dir / f"step_{line['step']:08d}", rows, rival)
                point = {"reward": line["val/scores"], "kl": line["val/kl"], "length": line["val/length"], "rating": rating, "win_rate": wins}
                results.setdefault(beta, {}).setdefault(line["step"], []).append(point)
    table = {beta: {step: {key: (mean(p[key] for p in points), stdev(p[key] for p in points)) for key in points[0]} for step, points in steps.items()
                    if len(points) > 1} for beta, steps in results.items()}
    best = max(world.rate(row, row["chosen"]) for row in rows)
    print(f"mean ± standard deviation over {cfg.seeds} seeds, {len(rows)} held-out prompts; a rating is at most {best:.0f}")
    for beta, steps in table.items():
        for step, point in steps.items():
            print(f"beta {beta:>5}  rollout {step:4}  " + "  ".join(f"{k} {m:6.2f} ± {s:.2f}" for k, (m, s) in point.items()))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(json.dumps({"config": vars(cfg), **env.stamp(), "results": results}, indent=1) + "\n", encoding="utf-8")
    if cfg.picture:
        draw(table, cfg.picture)


def draw(table, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(10, 3))
    for ax, key, title in zip(axes, ("reward", "rating", "kl"), ("reward model", "the rule", "KL to the SFT model, nats")):
        for beta, steps in table.items():
            middle, spread = zip(*(point[key] for point in steps.values()))
            ax.plot(list(steps), middle, label=f"beta {beta}")
            ax.fill_between(list(steps), [m - s for m, s in zip(middle, spread)], [m + s for m, s in zip(middle, spread)], alpha=0.2)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("rollouts", fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    run(main, Config, __doc__)
