"""What does a reward model learn from pairs in which the better answer is usually the longer one?

    python -m learn.experiments.length_bias                a minute on one core

Every label here is right: the worse text of a pair always has broken places (a share of its tokens is drawn at random). All that varies
is chance: in 50, 80 or 100 % of the training pairs the better text is also the longer one. Length is easy to read, quality is not, so
the reward model takes what it is given (Singhal et al. 2023, "A Long Way to Go", arXiv:2310.03716). It is judged on new pairs whose
longer text is better, and on as many whose shorter text is; and on texts against their own first half: nothing was added but tokens.

One should see: trained on balanced pairs the two accuracies are alike; the more the better text tends to be the longer one, the less is
the model right where the shorter one is better, down to below chance, while its accuracy on pairs like its own rises. A held-out
set from the same source cannot show it: look at `val/longer_wins` and `val/length_correlation` of train_rm.py.
"""
import torch

from learn import lab
from nanollm.evaluation import reward_report, score_table
from nanollm.losses import reward_loss
from nanollm.model import ModelArgs, RewardModel
from nanollm.optim import get_lr, make_optimizer

SHARES = (0.5, 0.8, 1.0)                                     # of the training pairs: the better text is the longer one
STEPS, PAIRS, RATE = 120, 16, 1e-3
SHORT, LONG = (12, 24), (28, 48)                             # tokens of the shorter and the longer text of a pair
BROKEN = 0.15                                                # share of the worse text's tokens that are drawn at random


def pairs(ids, n, share, vocab_size, seed):
    """n pairs from a token stream: ids (2n, T) right-padded with 0, better texts first, and lengths (2n,)."""
    g = torch.Generator().manual_seed(seed)
    begin = torch.randint(len(ids) - LONG[1], (2 * n, 1), generator=g)
    rows = ids[begin + torch.arange(LONG[1])]                                              # (2n, T)
    broken = torch.rand(n, LONG[1], generator=g) < BROKEN
    broken[:, 4] = True                                      # at least one, within every text
    rows[n:] = torch.where(broken, torch.randint(300, vocab_size, (n, LONG[1]), generator=g), rows[n:])
    longer = (torch.rand(n, generator=g) < share).repeat(2) ^ (torch.arange(2 * n) >= n)
    lengths = torch.where(longer, torch.randint(*LONG, (2 * n,), generator=g), torch.randint(*SHORT, (2 * n,), generator=g))
    return rows * (torch.arange(LONG[1]) < lengths[:, None]), lengths


def main(cfg):
    train_ids, val_ids, tok = lab.corpus(512, "en")
    body = lab.tiny(tok.vocab_size)
    lab.train(body, lab.windows(train_ids, seed=0), cfg.steps(500))                        # a reward model begins as a model that can read
    figures, curves = {}, {}
    for share in SHARES:
        name = f"{share:.0%} longer"
        for seed in range(cfg.seeds):
            torch.manual_seed(seed)
            model = RewardModel(ModelArgs(**vars(body.args)))
            model.backbone.load_state_dict({k: v for k, v in body.state_dict().items() if k != "output.weight"})
            optimizer, steps = make_optimizer(model, "adamw", RATE), cfg.steps(STEPS)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = get_lr(step + 1, RATE, RATE / 10, 10, steps)
                ids, lengths = pairs(train_ids, PAIRS, share, tok.vocab_size, 1_000_003 * seed + step)
                loss, count, _ = reward_loss(model(ids), lengths)
                (loss / count).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.eval()

            def judge(share):
                ids, lengths = pairs(val_ids, 300, share, tok.vocab_size, 7)
                return reward_report(score_table(model(ids), lengths))
            with torch.no_grad():
                own, longer, shorter = judge(share), judge(1.0), judge(0.0)
                whole, lengths = pairs(val_ids, 300, 1.0, tok.vocab_size, 8)
                scores = model(whole[:300])                                                 # (n, T): a score after each token
                n = lengths[:300, None]
                half = scores.gather(1, n // 2 - 1) < scores.gather(1, n - 1)
            for what, value in (("pairs like its own", own["accuracy"]), ("longer is better", longer["accuracy"]),
                                ("shorter is better", shorter["accuracy"]), ("a text beats its own first half", half.float().mean().item())):
                figures.setdefault(f"{name}: {what}", []).append(value)
    mean = {key: lab.mean(runs) for key, runs in figures.items()}
    names = [f"{share:.0%} longer" for share in SHARES]
    claims = {"the more the better text is the longer one, the worse where the shorter is better":
                  all(lab.higher(figures[f"{a}: shorter is better"], figures[f"{b}: shorter is better"]) for a, b in zip(names, names[1:])),
              "accuracy on pairs like its own rises meanwhile": lab.higher(figures[f"{names[-1]}: pairs like its own"], figures[f"{names[0]}: pairs like its own"]),
              "trained on 100 % it is wrong more often than not where the shorter is better": mean[f"{names[-1]}: shorter is better"] < 0.5,
              "balanced pairs leave both accuracies above chance": min(mean[f"{names[0]}: shorter is better"], mean[f"{names[0]}: longer is better"]) > 0.5}

    def draw(plt):
        for what, style in (("pairs like its own", "--"), ("longer is better", "-"), ("shorter is better", "-"), ("a text beats its own first half", ":")):
            runs = [figures[f"{name}: {what}"] for name in names]
            plt.errorbar([100 * s for s in SHARES], [lab.mean(r) for r in runs], [lab.spread(r) for r in runs], fmt="o" + style, capsize=3, markersize=3, label=what)
        plt.axhline(0.5, color="grey", linewidth=0.5)
        plt.xticks([100 * s for s in SHARES])
        plt.xlabel("training pairs whose better text is the longer one, %")
        plt.ylabel("accuracy (or share) on new texts")
        plt.legend(fontsize=7)
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
