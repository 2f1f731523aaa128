"""Questions of the notes about the model and about many processes that no other test answers. Fast: each under a second."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_lm
from nanollm import plan
from nanollm.model import ModelArgs, RMSNorm, Transformer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rmsnorm_is_layernorm_where_the_mean_is_zero():
    """And only there: what it leaves out is the subtraction of the mean."""
    x, norm = draw(5, 64), RMSNorm(64, 1e-5)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(centred), F.layer_norm(centred, (64,)), atol=1e-6, rtol=0)
    assert (norm(x + 1) - F.layer_norm(x + 1, (64,))).abs().max() > 0.1


def test_swiglu_is_down_of_silu_gate_times_up():
    """w1 is the gate, w3 the up and w2 the down projection; at dim 512 and multiple_of 32 the width is 1376."""
    ffn, x = Transformer(ModelArgs(dim=512, n_layers=1, n_heads=8, vocab_size=8)).layers[0].feed_forward, draw(3, 512)
    gate, up = x @ ffn.w1.weight.T, x @ ffn.w3.weight.T
    assert gate.size(1) == 1376
    torch.testing.assert_close(ffn(x), (gate * torch.sigmoid(gate) * up) @ ffn.w2.weight.T, atol=1e-6, rtol=1e-5)


def residual_growth(scaled, layers=32):
    """Standard deviation of the residual stream behind `layers` fresh blocks, as a multiple of the embedding's, when the matrices
    named in `scaled` are drawn smaller by sqrt(2 * layers)."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=64, n_layers=layers, n_heads=4, vocab_size=64, max_seq_len=32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "layers" in name:            # 0.1 in place of 0.02: the sub-layers of so narrow a model write next to nothing
                p.normal_(std=0.1 / math.sqrt(2 * layers) if name.split(".")[-2] in scaled else 0.1)
        x = start = model.tok_embeddings.weight.normal_(std=1.0)[torch.arange(32)][None]
        for block in model.layers:
            x = block(x, model.rope_cos, model.rope_sin, None)
    return (x.std() / start.std()).item()


def test_scaling_w3_instead_of_w2_keeps_the_residual_stream_as_small():
    """w2(silu(w1 x) * w3 x) is linear in w2 and in w3, so scaling the wrong one of the two does the same to what a fresh block writes.
    Scaling none of them is what lets the stream grow."""
    right, wrong, none = residual_growth(("wo", "w2")), residual_growth(("wo", "w3")), residual_growth(())
    assert wrong == pytest.approx(right, rel=0.02) and none > 2 * right


def test_is_causal_with_one_query_and_five_keys_sees_the_first_key_only():
    """PyTorch aligns the triangle at the top left, so a decoding step through a cache must not ask for is_causal."""
    q, k, v = draw(1, 1, 1, 8), draw(1, 1, 5, 8, seed=1), draw(1, 1, 5, 8, seed=2)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, 0], v[0, 0, 0])
    assert (F.scaled_dot_product_attention(q, k, v)[0, 0, 0] - v[0, 0, 0]).abs().max() > 0.1


def test_half_the_rows_keep_half_the_activations_and_none_of_the_states():
    """2 micro-batches of 16 rows on each of 4 GPUs are 128 rows an update, not 64. Two of 16 instead of one of 32 halve what grows with
    the rows; weights, gradients and optimizer states stay."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=500, max_seq_len=64)
    half, whole = (plan.memory(args, rows, device="cpu") for rows in (16, 32))
    assert 2 * 16 * 4 == 128
    assert half["activations"] == pytest.approx(whole["activations"] / 2, rel=0.02)
    assert all(half[part] == whole[part] for part in ("weights", "gradients", "optimizer"))


class LargestResult(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func._schema.is_mutable and "split" not in func.name():
            self.numbers = max(self.numbers, out.numel())
        return out


def test_adamw_tile_by_tile_gives_the_same_weights_with_smaller_temporaries():
    """DeepSpeed's sub_group_size: how many parameters the optimizer's step takes at once. AdamW treats each number alone, so tiles
    change nothing but the size of what lies in between."""
    grads = [draw(1000, seed=step) for step in (1, 2, 3)]

    def after(tile):
        p, m, v = draw(1000), torch.zeros(1000), torch.zeros(1000)
        with LargestResult() as seen:
            for step, grad in enumerate(grads, 1):
                for w, a, b, g in zip(p.split(tile), m.split(tile), v.split(tile), grad.split(tile)):
                    a.lerp_(g, 0.1)
                    b.mul_(0.95).addcmul_(g, g, value=0.05)
                    w.sub_(1e-3 * (a / (1 - 0.9**step)) / ((b / (1 - 0.95**step)).sqrt() + 1e-8))
        return p, seen.numbers
    (whole, large), (tiles, small) = after(1000), after(100)
    assert torch.equal(whole, tiles) and (large, small) == (1000, 100)


def test_a_slice_of_the_logits_cannot_be_viewed_flat_but_reshaped():
    """logits[:, :-1] has gaps in memory: view() refuses, contiguous().view() and reshape() copy and agree; a slice that is cut along
    the first dimension has none."""
    logits = draw(2, 5, 7)
    cut = logits[:, :-1]
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        cut.view(-1, 7)
    assert torch.equal(cut.reshape(-1, 7), cut.contiguous().view(-1, 7))
    assert logits[:1].view(-1, 7).data_ptr() == logits.data_ptr()


def test_an_averaged_loss_is_the_whole_loss_but_carries_no_gradient():
    """Two shards of equal size: the mean of their losses is the loss of the whole, to rounding, and so is the mean of their gradients.
    What is sent between processes is a number without a graph, so sharing losses alone would train nothing."""
    model, ids = tiny_lm(), torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(0))

    def loss_of(rows):
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    whole, parts = loss_of(ids), [loss_of(rows) for rows in ids.chunk(2)]
    assert ((parts[0] + parts[1]) / 2).item() == pytest.approx(whole.item(), rel=1e-6)
    params = list(model.parameters())
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in (whole, *parts)]
    assert all(torch.allclose((a + b) / 2, w, atol=1e-6) for w, a, b in zip(*grads))
    assert not torch.tensor([loss.item() for loss in parts]).mean().requires_grad
