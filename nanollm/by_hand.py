"""What model.py computes otherwise on a CPU: its formulas with derivatives by hand, for fp32; attention that leaves autocast.

Nobody fuses these steps for us there: autograd keeps every intermediate tensor and walks through memory once for each. By
hand a step keeps its inputs and little else. On a GPU, in half precision and under torch.compile, which fuses by itself,
the plain formulas run; a test holds the two against each other. What it brings: docs/speed.md.
"""
import torch
import torch.nn.functional as F

ONEDNN = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, "_linear_pointwise", None)      # a b^T for fp32


def by_hand(x):
    plain = type(x) is torch.Tensor and x.dtype == torch.float32 and x.device.type == "cpu"
    return plain and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class Nothing:
    """In place of autograd's ctx: keeps nothing."""
    save_for_backward = staticmethod(lambda *tensors: None)


def step(function, *args):
    """One of the functions below. Without gradients its forward alone: autograd's bookkeeping takes longer than the arithmetic of one token."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(Nothing, *args)


def worth_onednn(a, b):
    """PyTorch's CPU build brings two matrix libraries and sends fp32 to MKL. oneDNN is faster for a b^T with a large a, and for few
    rows against a large b, which is reading b: a text that is being written (docs/speed.md)."""
    return bool(ONEDNN) and (a.numel() >= 2**18 or b.numel() >= 2**18 and a.numel() <= 64 * a.size(-1))


def product(a, b):
    """a b^T by the faster library. ONEDNN(a, b, bias, activation, its numbers, its name) is act(a b^T + bias); here both are left
    out: None, "none", [], ""."""
    return ONEDNN(a, b, None, "none", [], "") if worth_onednn(a, b) else a @ b.t()


class RMSNormByHand(torch.autograd.Function):
    """y = w * n with n = x r, r = 1 / rms(x):  dx = r (w g - n mean(w g n)),  dw = sum over tokens of g n."""
    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()      # (B, T, 1)
        ctx.save_for_backward(x, w, r)
        return (x * r).mul_(w)
    @staticmethod
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        n, wg = x * r, w * g
        dw = (g * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return wg.sub_(n.mul_((wg * n).mean(-1, keepdim=True))).mul_(r), dw, None


class RotateByHand(torch.autograd.Function):
    """RoPE; the derivative of a rotation is the rotation back."""
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half, y = x.size(-1) // 2, x * cos                   # (B, H, T, D)
        y[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., :half])
        return y
    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return RotateByHand.apply(g, cos, -sin), None, None


class SwiGLUByHand(torch.autograd.Function):
    """Keeps gate and up; silu(gate) is computed again."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)
    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


class SwiGLULinearByHand(torch.autograd.Function):
    """y = h W^T with h = silu(gate) up. Keeps gate and up; h, which a Linear would keep too, is computed again."""
    @staticmethod
    def forward(ctx, gate, up, w):
        ctx.save_for_backward(gate, up, w)
        return product(F.silu(gate).mul_(up), w)
    @staticmethod
    def backward(ctx, g):
        gate, up, w = ctx.saved_tensors
        silu = F.silu(gate)
        dw = g.flatten(0, -2).t() @ (silu * up).flatten(0, -2) if ctx.needs_input_grad[2] else None
        dh = product(g.contiguous(), w.t())
        return torch.ops.aten.silu_backward(dh * up, gate), silu.mul_(dh), dw


class LinearByHand(torch.autograd.Function):
    """y = x W^T, dx = g W, dW = g^T x."""
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return product(x, w)
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx = product(g.contiguous(), w.t()) if ctx.needs_input_grad[0] else None
        return dx, g.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None


def scaled_dot_product_attention(q, k, v, **how):
    """PyTorch's kernel; on the CPU in fp32 under autocast, too, since its backward pass in bf16 is several times slower."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how)
    return F.scaled_dot_product_attention(q, k, v, **how)
