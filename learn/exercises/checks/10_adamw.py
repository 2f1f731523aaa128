"""What is asked of exercise 10, and the solution: nanollm.optim.make_optimizer (torch.optim.AdamW)."""
import torch

from learn.exercises.judge import on, parts, randn, same
from nanollm.optim import make_optimizer

NAME = "adamw_step"


def reference(p, grad, m, v, t, lr, beta1, beta2, eps, weight_decay):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(p.clone())
    optimizer = make_optimizer(module, "adamw", lr, weight_decay, (beta1, beta2))
    optimizer.param_groups[0]["eps"] = eps
    optimizer.state[module.weight] = {"step": torch.tensor(t - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    module.weight.grad = grad.clone()
    optimizer.step()
    state = optimizer.state[module.weight]
    return module.weight.detach(), state["exp_avg"], state["exp_avg_sq"]


NAMES = ("p", "m", "v")
USUAL = dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)


def given(size=1.0):
    return randn(3, 4), size * randn(3, 4, seed=1), size * randn(3, 4, seed=2), (size * randn(3, 4, seed=3)) ** 2


def by_hand(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, correct=(1, 1), inside=False, root=True):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    m_, v_ = m / (1 - beta1**t if correct[0] else 1), v / (1 - beta2**t if correct[1] else 1)
    return p - lr * weight_decay * p - lr * m_ / ((v_ + eps).sqrt() if inside else v_.sqrt() + eps if root else v_ + eps)


def moments(attempt):
    """the running means of the gradient and its square"""
    p, g, m, v = given()
    got, want = parts(attempt(p, g, m, v, t=5, **USUAL), NAMES), reference(p, g, m, v, t=5, **USUAL)
    same(got[1], want[1], "the new m", "", {
        "m: beta1 weighs the old mean and 1 - beta1 the new gradient; here it is the other way round": 0.1 * m + 0.9 * g,
        "m is the running mean of the gradient: 1 - beta1 is missing in front of g": 0.9 * m + g,
        "m was decayed with beta2; its own is beta1": 0.95 * m + 0.05 * g,
        "the m that is returned is bias-corrected: the correction is for this step only, the mean goes on without": want[1] / (1 - 0.9**5),
        "m came back as it was": m})
    same(got[2], want[2], "the new v", "", {
        "v is the running mean of the gradient's square; the square is missing": 0.95 * v + 0.05 * g,
        "v was decayed with beta1; its own is beta2": 0.9 * v + 0.1 * g**2,
        "v: beta2 weighs the old mean and 1 - beta2 the new square; here it is the other way round": 0.05 * v + 0.95 * g**2,
        "v is a running mean: 1 - beta2 is missing in front of g^2": 0.95 * v + g**2,
        "the v that is returned is bias-corrected: the correction is for this step only, the mean goes on without": want[2] / (1 - 0.95**5),
        "v came back as it was": v})


def first_step(attempt):
    """the first step: lr for every weight, whatever its gradient"""
    p, g, _, _ = given()
    zero = torch.zeros_like(p)
    with on("t = 1, m = v = 0"):
        args = (p, g, zero, zero, 1)
        same(parts(attempt(*args, **USUAL), NAMES)[0], reference(*args, **USUAL)[0], "the new p", "", wrong_p(*args, **USUAL))


def wrong_p(*args, **options):
    p, g, m, v, t = args
    right, later = by_hand(*args, **options), {**options, "weight_decay": 0.0}
    decay, lr = options["weight_decay"], options["lr"]
    return {"the bias correction is forgotten: divide m by 1 - beta1^t and v by 1 - beta2^t": by_hand(*args, **options, correct=(0, 0)),
            "the bias correction of v is forgotten: divide it by 1 - beta2^t": by_hand(*args, **options, correct=(1, 0)),
            "the bias correction of m is forgotten: divide it by 1 - beta1^t": by_hand(*args, **options, correct=(0, 1)),
            "the bias correction lags by one: t is 1 at the first update": by_hand(p, g, m, v, t + 1, **options),
            "the root is missing: divide by sqrt(v), not by v": by_hand(*args, **options, root=False),
            "eps belongs outside the root: sqrt(v) + eps, not sqrt(v + eps)": by_hand(*args, **options, inside=True),
            "eps is forgotten": by_hand(*args, **{**options, "eps": 0.0}), "eps is not used: it is an argument": by_hand(*args, **{**options, "eps": 1e-8}),
            "wrong sign: p went uphill": 2 * p - right,
            "weight decay was added to the gradient: that is Adam with L2, where sqrt(v) divides it away; AdamW takes lr * weight_decay * p off apart":
                by_hand(p, g + decay * p, m, v, t, **later),
            "weight decay is forgotten": by_hand(*args, **later),
            "weight decay must be multiplied by lr, too": by_hand(*args, **later) - decay * p,
            "wrong sign of the weight decay: it pulls towards 0": by_hand(*args, **later) + lr * decay * p,
            "weight decay pulled at the weight after its step; pull first, at the old one": by_hand(*args, **later) * (1 - lr * decay)}


def later_step(attempt):
    """a later step"""
    args = (*given(), 5)
    same(parts(attempt(*args, **USUAL), NAMES)[0], reference(*args, **USUAL)[0], "the new p at t = 5", "", wrong_p(*args, **USUAL))


def decay(attempt):
    """weight decay apart from the gradient"""
    args, options = (*given(), 5), {**USUAL, "weight_decay": 0.5}
    same(parts(attempt(*args, **options), NAMES)[0], reference(*args, **options)[0], "the new p with weight decay 0.5", "", wrong_p(*args, **options))


def place_of_eps(attempt):
    """eps outside the root"""
    args, options = (*given(0.01), 5), {**USUAL, "eps": 1e-3}
    same(parts(attempt(*args, **options), NAMES)[0], reference(*args, **options)[0], "the new p with eps 0.001", "", wrong_p(*args, **options))


def still(attempt):
    """a gradient that was always 0 moves nothing"""
    p, zero = randn(3, 4), torch.zeros(3, 4)
    with on("g = m = v = 0"):
        same(parts(attempt(p, zero, zero, zero, 1, **USUAL), NAMES)[0], p, "the new p")


CHECKS = [moments, first_step, later_step, decay, place_of_eps, still]
