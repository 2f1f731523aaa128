"""Mixture of experts: several feed-forwards in each block, of which a learned gate picks top_k for every token
(Shazeer et al. 2017, arXiv:1701.06538; gate weights as in Mixtral, Jiang et al. 2024, section 2.1).

The experts are parts of one model, not models of their own, and the gate is trained with them. Parameters grow with
n_experts, the work per token only with top_k: at the default hidden_dim, ffn_dim / top_k, it stays that of the dense model.
No token is dropped, whatever the load, so that a token's result does not depend on its neighbours.
"""
import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanollm.config import UserError
from nanollm.model import FeedForward


class MoE(nn.Module):
    """x (B, T, C) -> (B, T, C). After a forward pass `use` (E,) holds each expert's share of the choices and `unbalance`
    Switch's measure of unevenness, with gradient. N = B * T tokens, E experts, k = top_k."""

    def __init__(self, args, n_experts, top_k, balance, hidden_dim):
        super().__init__()
        self.top_k, self.balance = top_k, balance
        self.gate = nn.Linear(args.dim, n_experts, bias=False)
        expert = dataclasses.replace(args, hidden_dim=hidden_dim or args.ffn_dim // top_k)
        self.experts = nn.ModuleList(FeedForward(expert) for _ in range(n_experts))
        for m in self.experts.modules():
            m.share = top_k / n_experts                      # of the tokens, for flops_per_token

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))                                                        # (N, C)
        with torch.autocast(x.device.type, enabled=False):   # a choice should not hang on half precision's rounding
            probs = F.linear(flat.float(), self.gate.weight.float()).softmax(-1)                # (N, E)
        weight, chosen = probs.topk(self.top_k, -1)                                             # (N, k)
        if self.top_k > 1:                                   # for k = 1 it would always be 1, and teach the gate nothing
            weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):            # an unused one gets an empty batch: all ranks have all gradients
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, (expert(flat[token]) * weight[token, slot, None]).type_as(out))
        self.use = F.one_hot(chosen, len(self.experts)).float().mean((0, 1))                    # (E,), f_i of eq. 5
        self.unbalance = len(self.experts) * (self.use * probs.mean(0)).sum()                   # 1 when all are used alike
        return out.view_as(x)


def add_balance(model, loss, count, metrics):
    """(loss, count, metrics) of a batch with balance * E * sum_i f_i P_i of each MoE layer added (Fedus et al. 2021, eq. 4),
    and the experts' use logged. f_i is the share of the choices that went to expert i, P_i the mean of its probability; only
    P_i has a gradient. Times count, since losses are sums. Nothing is added to a dense model or to a validation loss."""
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers or not model.training:
        return loss, count, metrics
    use = torch.stack([m.use for m in layers]).mean(0)
    unbalance = torch.stack([m.unbalance for m in layers])
    logged = {"unbalance": unbalance.detach().mean(), **{f"expert_{e}": share for e, share in enumerate(use)}}
    return loss + count * layers[0].balance * unbalance.sum(), count, metrics | {k: v * count for k, v in logged.items()}


def train_only_experts(model):
    """Fine-tune gates and experts, the shared rest stays as it is (what the notes advise for a trained MoE)."""
    for name, p in model.named_parameters():
        p.requires_grad = ".feed_forward." in name


def moe(model, n_experts=8, top_k=2, balance=0.01, hidden_dim=0):
    if not 1 <= top_k <= n_experts:
        raise UserError(f"--variants moe: top_k {top_k} must lie between 1 and n_experts {n_experts}")
    model.by_runs = False                                    # the balance counts padding, on every device alike
    for block in model.layers:
        block.feed_forward = MoE(model.args, n_experts, top_k, balance, hidden_dim)
