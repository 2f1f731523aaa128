"""Does DPO make the chosen answers likelier?

    python -m learn.experiments.chosen_falls               a minute and a half on one core

Not necessarily: its loss sees only the difference of the two answers' log-ratios, and both may fall as long as the rejected one falls
faster (Pal et al. 2024). A base that writes English gets pairs whose rejected answer differs from the chosen one in one token, or is
another true text altogether, and the first again with the chosen answers' own cross-entropy added (RPO, Pang et al. 2024, eq. 2). One
sees by how many nats the log-probability of both answers moves on new pairs, while accuracy looks fine throughout.

It is said that alike answers suffer most, since what pushes one down pushes the other (Razin et al. 2024). Here it is not so: both
kinds of pairs lower the chosen answers, and alike ones not more.
"""
import copy

import torch

from learn import lab
from nanollm.losses import IGNORE_INDEX, dpo_loss, sequence_logps

ARMS = {"one token differs": (True, 0.0), "another text": (False, 0.0), "one token, rpo_alpha 1": (True, 1.0)}
BETA, RATE = 0.1, 3e-4
BASE_STEPS, STEPS, EVERY, PAIRS = 400, 90, 10, 24
PROMPT, LENGTH = 8, 32                                   # tokens of the prompt, and of the whole row


def pairs_of(ids, vocab_size, alike, seed, n=PAIRS):
    """(inputs, targets) (2n, LENGTH): chosen rows first, true text; then rejected ones, which go on wrongly from the same prompt."""
    g = torch.Generator().manual_seed(seed)
    text = ids[torch.randint(len(ids) - LENGTH - 1, (2 * n, 1), generator=g) + torch.arange(LENGTH + 1)]      # (2n, LENGTH + 1)
    right, other = text.chunk(2)
    wrong, at = right.clone(), torch.randint(PROMPT + 1, LENGTH + 1, (n,), generator=g)
    if alike:
        wrong[torch.arange(n), at] = torch.randint(vocab_size, (n,), generator=g)
    else:
        wrong[:, PROMPT + 1 :] = other[:, PROMPT + 1 :]
    rows = torch.cat([right, wrong])
    targets = rows[:, 1:].clone()
    targets[:, :PROMPT] = IGNORE_INDEX
    return rows[:, :-1], targets


def main(cfg):
    ids, val_ids, tok = lab.corpus(language="en")
    base = lab.tiny(tok.vocab_size)
    lab.train(base, lab.windows(ids), cfg.steps(BASE_STEPS))
    base.eval().requires_grad_(False)
    figures, curves = {}, {}
    for name, (alike, rpo_alpha) in ARMS.items():
        held_out = pairs_of(val_ids, tok.vocab_size, alike, 1, n=200)
        with torch.no_grad():
            ref_held_out = sequence_logps(base(held_out[0]), held_out[1])[0]
        for seed in range(cfg.seeds):
            policy, moved = copy.deepcopy(base).requires_grad_(True), []
            optimizer = torch.optim.AdamW(policy.parameters(), RATE, weight_decay=0.0)
            for step in range(cfg.steps(STEPS) + 1):
                if step % EVERY == 0 or step == cfg.steps(STEPS):
                    with torch.no_grad():
                        chosen, rejected = (sequence_logps(policy(held_out[0]), held_out[1])[0] - ref_held_out).chunk(2)
                    moved.append((step, chosen.mean().item(), rejected.mean().item(), (chosen > rejected).float().mean().item()))
                if step == cfg.steps(STEPS):
                    break                                # the last look was at the end
                inputs, targets = pairs_of(ids, tok.vocab_size, alike, 1_000_003 * (seed + 1) + step)
                with torch.no_grad():
                    ref = sequence_logps(base(inputs), targets)[0]
                logps, counts = sequence_logps(policy(inputs), targets)
                loss, count, _ = dpo_loss(logps, ref, counts, BETA)
                loss = loss / count - rpo_alpha * logps[:PAIRS].sum() / counts[:PAIRS].sum()       # + the chosen answers' cross-entropy a token
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for what, value in zip(("chosen", "rejected", "accuracy"), moved[-1][1:]):
                figures.setdefault(f"{name}, {what}", []).append(value)
            curves.setdefault(name, moved)               # of the first seed
    alike, apart, held = (figures[f"{name}, chosen"] for name in ARMS)
    claims = {"the chosen answers become less likely where one token differs": lab.higher([0.0] * len(alike), alike),
              "they become less likely where the rejected answer is another text": lab.higher([0.0] * len(apart), apart),
              "they fall further where the two answers are more alike": lab.higher(apart, alike),
              "their own cross-entropy holds them: they fall less with rpo_alpha": lab.higher(held, alike),
              "in all three the accuracy on new pairs rises above 0.7": min(min(figures[f"{name}, accuracy"]) for name in ARMS) > 0.7}

    def draw(plt):
        for (name, moved), colour in zip(curves.items(), ("#c04040", "#4878a8", "#50a050")):
            steps, ups, downs, _ = zip(*moved)
            plt.plot(steps, ups, label=f"chosen: {name}", color=colour)
            plt.plot(steps, downs, label="rejected", color=colour, linestyle=":")
        plt.axhline(0, color="grey", linewidth=0.5)
        plt.xlabel("update")
        plt.ylabel("log policy - log reference, nats an answer")
        plt.legend(fontsize=7)
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
