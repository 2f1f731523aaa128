"""Grokking: does a model that knows its training examples by heart understand them later?

    python -m learn.experiments.grokking                   a minute and a half on one core

a + b mod P, asked as three tokens; half of the P * P sums are for training. Power et al. 2022 (arXiv:2201.02177, figure 1): the
*training* accuracy is 100 % early, the *validation* accuracy stays near chance and rises long after. What drives it is weight decay: among
the weights that fit the training sums, those that compute the sum are smaller than those that list it. Without decay the model keeps the list.
"""
import torch

from learn import lab
from nanollm.losses import cross_entropy
from nanollm.optim import make_optimizer

P, SHARE, STEPS = 23, 0.6, 1500
DECAYS = (1.0, 0.0)
EVERY = 25


def accuracy(model, pairs, sums):
    with torch.no_grad():
        return (model(pairs)[:, -1].argmax(-1) == sums).float().mean().item()


def go(seed, decay, steps, dim=64, rate=2e-3):
    """One run -> [(update, training accuracy, validation accuracy)]."""
    a, b = torch.meshgrid(torch.arange(P), torch.arange(P), indexing="ij")
    pairs = torch.stack([a.flatten(), b.flatten(), torch.full((P * P,), P)], 1)               # a b =   (P * P, 3)
    sums = (pairs[:, 0] + pairs[:, 1]) % P
    order = torch.randperm(P * P, generator=torch.Generator().manual_seed(seed))
    train, val = order.split([round(SHARE * P * P), P * P - round(SHARE * P * P)])
    model = lab.tiny(P + 1, seed, dim=dim, n_layers=1, max_seq_len=3)
    optimizer = make_optimizer(model, "adamw", rate, weight_decay=decay, betas=(0.9, 0.98))
    targets = torch.full_like(pairs, -100)
    targets[:, -1] = sums                                                                     # only the answer counts
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10)
        loss, count, _ = cross_entropy(model(pairs[train]), targets[train])                   # all training sums in every update
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % EVERY == 0:
            curve.append((step + 1, accuracy(model, pairs[train], sums[train]), accuracy(model, pairs[val], sums[val])))
    return curve


if __name__ == "__main__":
    import sys, time
    P, SHARE, dim, rate, decay, steps = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
    t = time.time()
    for s, a, v in go(0, decay, steps, dim, rate):
        if s % 100 == 0: print(s, f"{a:.2f} {v:.2f}", flush=True)
    print(time.time() - t)
