"""What does a reward model learn from pairs in which the better text is always the longer one, too?

    python -m learn.experiments.length_bias                a minute and a half on one core

Every label here is right: the worse text of a pair always has wrong tokens in it (drawn at random), every sixth ("many flaws", easy to see)
or one in thirty ("few flaws"). What varies is the company: in 50 or in 100 % of the training pairs the better text is also the longer one.
How much of that a reward model takes depends on how hard the quality is to see (for large models: Singhal et al. 2023, "A Long Way
to Go", arXiv:2310.03716). It is judged on new pairs whose longer text is better, and on as many whose shorter one is; and on whole
texts against their own first half, where nothing was added but tokens.

One should see: trained on balanced pairs both accuracies are nearly alike. With 100 % it loses some of the pairs whose shorter text is better
if flaws are many; if they are few it is wrong about most of them, while its accuracy on pairs like its own *rises*: a held-out set from
the same source praises the bias. `val/longer_wins` and `val/length_correlation` of train_rm.py are there to catch it.
"""
import itertools
import textwrap

import torch

from learn import lab
from nanollm.evaluation import reward_report, score_table
from nanollm.losses import reward_loss
from nanollm.model import ModelArgs, RewardModel
from nanollm.optim import get_lr, make_optimizer

SHARES = (0.5, 1.0)                                          # of the training pairs: the better text is the longer one
FLAWS = {"many flaws": 1 / 6, "few flaws": 1 / 30}           # share of the worse text's tokens that are wrong
STEPS, PAIRS, RATE = 120, 16, 2e-3
WHAT = ("pairs like its own", "longer is better", "shorter is better", "a text beats its own first half")
SHORT, LONG = (12, 24), (28, 48)                             # tokens of the shorter and the longer text of a pair


def pairs(ids, n, share, flaws, vocab_size, seed):
    """n pairs from a token stream: ids (2n, T) right-padded with 0, better texts first, and lengths (2n,)."""
    g = torch.Generator().manual_seed(seed)
    begin = torch.randint(len(ids) - LONG[1], (2 * n, 1), generator=g)
    rows = ids[begin + torch.arange(LONG[1])]                                              # (2n, T)
    wrong = torch.rand(n, LONG[1], generator=g) < flaws
    wrong[torch.arange(n), torch.randint(2, SHORT[0], (n,), generator=g)] = True           # at least one, within every text
    rows[n:] = torch.where(wrong, torch.randint(300, vocab_size, (n, LONG[1]), generator=g), rows[n:])
    longer = (torch.rand(n, generator=g) < share).repeat(2) ^ (torch.arange(2 * n) >= n)
    lengths = torch.where(longer, torch.randint(*LONG, (2 * n,), generator=g), torch.randint(*SHORT, (2 * n,), generator=g))
    return rows * (torch.arange(LONG[1]) < lengths[:, None]), lengths


def main(cfg):
    train_ids, val_ids, tok = lab.corpus(512, "en")
    body = lab.tiny(tok.vocab_size)
    lab.train(body, lab.windows(train_ids, seed=0), cfg.steps(500))                        # a reward model begins as a model that can read
    figures = {}
    for share, (kind, flaws) in itertools.product(SHARES, FLAWS.items()):
        for seed in range(cfg.seeds):
            torch.manual_seed(seed)
            model = RewardModel(ModelArgs(**vars(body.args)))
            model.backbone.load_state_dict({k: v for k, v in body.state_dict().items() if k != "output.weight"})
            optimizer, steps = make_optimizer(model, "adamw", RATE), cfg.steps(STEPS)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = get_lr(step + 1, RATE, RATE / 10, 10, steps)
                ids, lengths = pairs(train_ids, PAIRS, share, flaws, tok.vocab_size, 1_000_003 * seed + step)
                loss, count, _ = reward_loss(model(ids), lengths)
                (loss / count).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.eval()
            with torch.no_grad():
                for what, share_of_longer in (("pairs like its own", share), ("longer is better", 1.0), ("shorter is better", 0.0)):
                    ids, lengths = pairs(val_ids, 300, share_of_longer, flaws, tok.vocab_size, 7)
                    report = reward_report(score_table(model(ids), lengths))
                    figures.setdefault(f"{what}, {share:.0%} longer, {kind}", []).append(report["accuracy"])
                whole, lengths = pairs(val_ids, 300, 1.0, flaws, tok.vocab_size, 8)
                scores, n = model(whole[:300]), lengths[:300, None]                         # (300, T): a score after each token
                longer_wins = scores.gather(1, n - 1) > scores.gather(1, n // 2 - 1)
                figures.setdefault(f"a text beats its own first half, {share:.0%} longer, {kind}", []).append(longer_wins.float().mean().item())
    even, uneven = (f"{share:.0%} longer" for share in SHARES)
    at = {key: lab.mean(runs) for key, runs in figures.items()}
    lost = {kind: at[f"shorter is better, {even}, {kind}"] - at[f"shorter is better, {uneven}, {kind}"] for kind in FLAWS}
    claims = {"many flaws: 100 % longer costs accuracy where the shorter text is better":
                  lab.higher(figures[f"shorter is better, {even}, many flaws"], figures[f"shorter is better, {uneven}, many flaws"]),
              "few flaws: it costs more": lost["few flaws"] > lost["many flaws"],
              "few flaws: it ends below chance there": at[f"shorter is better, {uneven}, few flaws"] < 0.5,
              "few flaws: accuracy on pairs like its own rises meanwhile":
                  lab.higher(figures[f"pairs like its own, {uneven}, few flaws"], figures[f"pairs like its own, {even}, few flaws"]),
              "few flaws: a text beats its own first half more often": lab.higher(figures[f"a text beats its own first half, {uneven}, few flaws"],
                                                                                  figures[f"a text beats its own first half, {even}, few flaws"])}

    def draw(plt):
        for i, kind in enumerate(FLAWS):
            plt.subplot(1, 2, i + 1)
            for j, (name, colour) in enumerate(((even, "#4878a8"), (uneven, "#c86848"))):
                runs = [figures[f"{what}, {name}, {kind}"] for what in WHAT]
                plt.bar([x + 0.4 * j for x in range(len(WHAT))], [lab.mean(r) for r in runs], 0.38, yerr=[lab.spread(r) for r in runs], capsize=2, color=colour,
                        label=f"better text longer in {name.split()[0]}")
            plt.axhline(0.5, color="grey", linewidth=0.5)
            plt.xticks([x + 0.2 for x in range(len(WHAT))], [textwrap.fill(what, 12) for what in WHAT], fontsize=7)
            plt.ylim(0, 1.4)
            plt.title(kind)
            if not i:
                plt.ylabel("accuracy (share) on new texts")
                plt.legend(fontsize=7, loc="upper left")
        plt.gcf().set_size_inches(8, 3.2)
        plt.tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
