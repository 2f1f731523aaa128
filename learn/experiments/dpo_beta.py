"""What does beta do in DPO?

    python -m learn.experiments.dpo_beta                   a minute and a half on one core

The notes: the larger beta, the faster the policy turns to the preferred answer. But beta is the strength of the leash: DPO's loss
-log s(beta Delta), Delta = the gap of the two log-ratios (Rafailov et al. 2023, eq. 7), is content once Delta is a few times 1 / beta.
Here a base that writes English gets pairs of a true continuation and one with a wrong token, a fifth of the labels turned round, so
that there is a best gap, ln 4 / beta. One sees the gap, the accuracy on new pairs, and how far the policy has gone from the
reference: KL(policy || reference) a text, exact at each place of texts that the policy itself has written.

The opposite of the notes' sentence holds: a small beta opens the gap at least as fast (Adam divides by the size of the gradient, which
is all that a larger beta adds at the start), goes on opening it, and ends many times as far from the reference.
"""
import copy

import torch
import torch.nn.functional as F

from learn import lab
from nanollm.losses import IGNORE_INDEX, dpo_loss, sequence_logps

BETAS = (0.02, 0.1, 0.5, 2.0)
BASE_STEPS, STEPS, EVERY, PAIRS = 400, 90, 15, 24
PROMPT, LENGTH = 8, 32                                   # tokens of the prompt, and of the whole row


def pairs_of(ids, vocab_size, seed, n=PAIRS, flipped=0.2):
    """(inputs, targets) (2n, LENGTH): the chosen rows first. The wrong answer has one other token at a random place of the answer."""
    g = torch.Generator().manual_seed(seed)
    right = ids[torch.randint(len(ids) - LENGTH - 1, (n, 1), generator=g) + torch.arange(LENGTH + 1)]         # (n, LENGTH + 1)
    wrong, at = right.clone(), torch.randint(PROMPT + 1, LENGTH + 1, (n,), generator=g)
    wrong[torch.arange(n), at] = torch.randint(vocab_size, (n,), generator=g)
    turned = torch.rand(n, 1, generator=g) < flipped
    rows = torch.cat([torch.where(turned, wrong, right), torch.where(turned, right, wrong)])
    targets = rows[:, 1:].clone()
    targets[:, :PROMPT] = IGNORE_INDEX
    return rows[:, :-1], targets


@torch.no_grad()
def distance(policy, reference, ids, rows=64):
    """KL(policy || reference) in nats an answer: the policy writes LENGTH - PROMPT tokens behind `rows` prompts, drawn at temperature 1,
    and at each place both distributions are compared whole."""
    g, total = torch.Generator().manual_seed(9), 0.0
    text = ids[torch.arange(rows)[:, None] * 101 + torch.arange(PROMPT)]                                      # (rows, PROMPT)
    for _ in range(LENGTH - PROMPT):
        p, q = (F.log_softmax(model(text)[:, -1], -1) for model in (policy, reference))                       # (rows, V)
        total += (p.exp() * (p - q)).sum(-1).mean().item()
        text = torch.cat([text, torch.multinomial(p.exp(), 1, generator=g)], 1)
    return total


def main(cfg):
    ids, val_ids, tok = lab.corpus(language="en")
    base = lab.tiny(tok.vocab_size)
    lab.train(base, lab.windows(ids), cfg.steps(BASE_STEPS))
    base.eval().requires_grad_(False)
    held_out = pairs_of(val_ids, tok.vocab_size, 1, n=200, flipped=0.0)
    with torch.no_grad():
        ref_held_out = sequence_logps(base(held_out[0]), held_out[1])[0]
    figures, curves = {}, {}
    for beta in BETAS:
        for seed in range(cfg.seeds):
            policy, gaps = copy.deepcopy(base).requires_grad_(True), []
            optimizer = torch.optim.AdamW(policy.parameters(), 3e-4, weight_decay=0.0)
            for step in range(cfg.steps(STEPS) + 1):
                if step % EVERY == 0 or step == cfg.steps(STEPS):
                    with torch.no_grad():
                        logps, counts = sequence_logps(policy(held_out[0]), held_out[1])
                        _, count, m = dpo_loss(logps, ref_held_out, counts, beta)
                    gaps.append((step, m["margin"].item() / count.item() / beta, m["accuracy"].item() / count.item()))
                if step == cfg.steps(STEPS):
                    break                                # the last look is at the policy whose KL is measured below
                inputs, targets = pairs_of(ids, tok.vocab_size, 1_000_003 * (seed + 1) + step)
                with torch.no_grad():
                    ref = sequence_logps(base(inputs), targets)[0]
                logps, counts = sequence_logps(policy(inputs), targets)
                loss, count, _ = dpo_loss(logps, ref, counts, beta)
                optimizer.zero_grad()
                (loss / count).backward()
                optimizer.step()
            for what, value in ((f"gap after {EVERY}", gaps[1][1]), ("gap", gaps[-1][1]), ("accuracy", gaps[-1][2]), ("KL", distance(policy, base, val_ids))):
                figures.setdefault(f"beta {beta:g}, {what}", []).append(value)
            curves.setdefault(beta, gaps)                # of the first seed
    of = lambda what: [figures[f"beta {beta:g}, {what}"] for beta in BETAS]
    claims = {"the larger beta, the nearer the policy stays to the reference": all(lab.higher(a, b) for a, b in zip(of("KL"), of("KL")[1:])),
              "the larger beta, the smaller the gap at the end": all(lab.higher(a, b) for a, b in zip(of("gap"), of("gap")[1:])),
              f"after {EVERY} updates a larger beta has opened a wider gap (the notes)": lab.higher(of(f"gap after {EVERY}")[-1], of(f"gap after {EVERY}")[0])}

    def draw(plt):
        left, right = plt.gcf().subplots(1, 2)
        for beta, gaps in curves.items():
            left.plot([step for step, _, _ in gaps], [gap for _, gap, _ in gaps], marker=".", label=f"beta {beta:g}")
        left.set_xlabel("update")
        left.set_ylabel("gap of the log-ratios on new pairs, nats")
        left.legend()
        plt.sca(right)
        lab.bars(plt, {f"{beta:g}": figures[f"beta {beta:g}, KL"] for beta in BETAS}, "KL(policy || reference), nats an answer")
        right.set_xlabel("beta")
        plt.gcf().tight_layout()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
