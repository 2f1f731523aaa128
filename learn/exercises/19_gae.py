"""19  GAE: which token deserves the credit?

中文：实现广义优势估计 GAE：从后往前递推每个词元的优势，用 lambda 在偏差与方差之间取舍。

A written answer gets one reward, at its end. The critic has guessed a value at every token. If the guess rises after a token, that token was
better than expected: delta is the surprise of one step. Later surprises count too, each step less by gamma * lam: with lam = 0 only the own step (little noise,
but as wrong as the critic), with lam = 1 everything up to the end (no bias, much noise). Computed backwards this is one line.

    delta_t = r_t + gamma * v_{t+1} - v_t                  v behind the last token is 0: the answer has ended
    A_t = delta_t + gamma * lam * A_{t+1}                   the critic's target, the return, is A_t + v_t

Schulman et al. 2016, eq. 16 (arXiv:1506.02438). The solution: `gae` in nanollm/rl.py. Judge:  python -m learn.exercises 19
"""
import torch


def gae(rewards, values, mask, gamma, lam):
    """rewards, values, mask (B, T): mask is 1 on the tokens of the answer, one stretch in each row, 0 on the prompt and behind the end, where
    rewards and values mean nothing. -> advantages (B, T), returns (B, T), both 0 where the mask is 0."""
    # Hint 1: for t in reversed(range(T)), with the advantage and the value of t + 1 carried along, both 0 at first.
    # Hint 2: multiply both by mask[:, t] before you carry them on: so the value behind the end of a short answer is 0.
    # Hint 3: fill a torch.zeros_like(values) column by column, or collect the columns and torch.stack them.
    raise NotImplementedError("write gae")
