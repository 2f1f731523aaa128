"""QK-norm: RMSNorm on each query and key head before the rotation (Henry et al. 2020, arXiv:2010.04245; with a learned gain
per dimension as in Qwen3). Scores cannot outgrow the gains, so training bears larger learning rates and no softmax saturates
(Dehghani et al. 2023, arXiv:2302.05442, section 2)."""
from nanollm.model import Attention, RMSNorm


class QKNormAttention(Attention):
    def __init__(self, args):
        super().__init__(args)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, args.norm_eps), RMSNorm(self.head_dim, args.norm_eps)

    def qkv(self, x):
        q, k, v = super().qkv(x)                             # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        return self.q_norm(q), self.k_norm(k), v


def qk_norm(model):
    for block in model.layers:
        block.attention = QKNormAttention(model.args)
