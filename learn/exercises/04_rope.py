"""04  RoPE: tell a token where it stands by rotating its query and key.

中文：实现旋转位置编码 RoPE：把查询和键的每一对坐标按"位置 × 频率"的角度旋转。

Attention itself does not know the order of the tokens. RoPE cuts a head's D numbers into D/2 pairs and turns each pair, like the
hand of a clock, by an angle that grows with the position: the first pair by 1 radian a token, the last one very slowly. The dot
product of a query at m with a key at n then depends on m - n alone, and no length is learnt. Here, as in Hugging Face's LLaMA, a
pair is (x_i, x_{i + D/2}): one from the first half, one from the second.

    angle = position * theta^(-2i / D)                              i = 0 … D/2 - 1
    x_i       ->  x_i cos(angle) - x_{i+D/2} sin(angle)
    x_{i+D/2} ->  x_{i+D/2} cos(angle) + x_i sin(angle)

Su et al. 2021, eq. 15 and 34 (arXiv:2104.09864). The solution: `rope_table` and `apply_rope` in nanollm/model.py.
Judge:  python -m learn.exercises 04
"""
import torch


def rope(x, positions, theta=10000.0):
    """x (B, H, T, D), D even. positions (T,): where each token stands; not always 0 … T - 1 (a cache goes on in the middle).
    -> (B, H, T, D), rotated, in the type of x."""
    # Hint 1: three steps: frequencies (D/2,), angles (T, D/2), rotation.
    # Hint 2: frequencies theta ** (-torch.arange(0, D, 2) / D); angles torch.outer(positions, frequencies).
    # Hint 3: x1, x2 = x.float().chunk(2, dim=-1); the angles broadcast over B and H by themselves.
    # Hint 4: torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    raise NotImplementedError("write rope")
