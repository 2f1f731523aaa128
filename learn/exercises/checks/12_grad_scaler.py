"""What is asked of exercise 12, and the solution: torch.amp.GradScaler as nanollm.optim.update drives it."""
import torch

from learn.exercises.judge import Hint, equal, parts, randn, same
from nanollm.optim import update

NAME = "scaler_step"
INF, NAN = float("inf"), float("nan")


def reference(grads, scale, streak, interval, growth=2.0, backoff=0.5):
    module = torch.nn.ParameterList(torch.zeros_like(g) for g in grads)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)                              # from 0 with rate 1: the weight is -gradient
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict({"scale": scale, "growth_factor": growth, "backoff_factor": backoff, "growth_interval": interval, "_growth_tracker": streak})
    scaler.scale(torch.zeros(()))
    for p, g in zip(module, grads):
        p.grad = g.clone()
    norm = update(module, optimizer, scaler, 0, torch.zeros(()))
    state = scaler.state_dict()
    return [-p.detach() for p in module] if norm.isfinite() else None, state["scale"], state["_growth_tracker"]


def given(*bad):
    grads = [randn(3), randn(2, 2, seed=1)]
    for i, value in bad:
        grads[i].view(-1)[-1] = value
    return grads


def step(attempt, *args):
    return parts(attempt(*args), ("the gradients or None", "the next scale", "the next streak"))


def true_gradients(got, streak):
    """got: the gradients that came back for given(), a scale of 8 and this streak of 100."""
    if got is None:
        raise Hint("a good update was left out: all gradients are finite")
    want = reference(given(), 8.0, streak, 100)[0]
    for i, (g, w, scaled) in enumerate(zip(parts(got, ("the first gradient", "the second")), want, given())):
        same(g, w, f"gradient {i} of the good update {streak + 1} of 100", mistakes={
            "the gradients were not unscaled: divide by scale": scaled,
            "multiplied by the scale once more; divide": scaled * 8.0,
            "divided by the next scale; these gradients were made with the present one": scaled / 16.0,
            "divided by the scale twice": scaled / 64.0})


def unscaled(attempt):
    """the true gradients"""
    true_gradients(step(attempt, given(), 8.0, 0, 100)[0], 0)


def left_out(attempt):
    """a gradient that is inf or NaN: no update"""
    for bad, words in ((((0, INF),), "inf in the first gradient"), (((1, NAN),), "NaN in the second gradient"), (((0, NAN),), "NaN in the first gradient"),
                       (((1, INF),), "inf in the second gradient"), (((1, -INF),), "-inf in the second gradient"), (((0, INF), (1, -INF)), "inf and -inf")):
        if step(attempt, given(*bad), 8.0, 3, 100)[0] is not None:
            looks = ": isnan alone does not see inf; take isfinite" if "inf" in words else ": isinf alone does not see NaN; take isfinite"
            if "second" in words and step(attempt, given((0, bad[0][1])), 8.0, 3, 100)[0] is None:
                looks = ": look at all gradients, not only at the first"
            raise Hint(f"with {words} the update must be left out, return None for the gradients{looks}")


def smaller(attempt):
    """after an overflow the scale is halved, the streak begins anew"""
    _, scale, streak = step(attempt, given((0, INF)), 8.0, 3, 100)
    equal(float(scale), 4.0, "the next scale after an overflow", {
        "after an overflow the scale must fall: scale * backoff; it stayed": 8.0, "after an overflow the scale must fall; it was doubled": 16.0,
        "the scale was set to backoff; multiply by it": 0.5, "the scale fell twice": 2.0, "the scale was divided by 0.5, which doubles it": 16.0})
    equal(int(streak), 0, "the streak after an overflow", {
        "the streak must begin at 0 again after an overflow: good updates *in a row* are counted": 3,
        "an update that was left out is no good one; the streak is 0": 4,
        "an update that was left out is no good one: the streak is 0, not 1": 1})


def growing(attempt):
    """after `interval` good updates in a row the scale is doubled"""
    _, scale, streak = step(attempt, given(), 8.0, 3, 100)
    equal(float(scale), 8.0, "the next scale after the 4th good update of 100", {
        "the scale grew after a single good update; wait for `interval` of them in a row": 16.0})
    equal(int(streak), 4, "the streak after a good update", {"a good update must make the streak longer: streak + 1": 3,
    "the streak lost its count: a good update makes it longer": 0})
    grads, scale, streak = step(attempt, given(), 8.0, 99, 100)
    equal(float(scale), 16.0, "the next scale after the 100th good update of 100", {
        "the scale did not grow with the 100th good update of 100: count this update first, then compare": 8.0})
    equal(int(streak), 0, "the streak after the scale has grown", {
        "the streak must begin anew after growth, or the scale doubles at every update from now on": 100})
    true_gradients(grads, 99)                                    # the one update where the next scale is another


def arguments(attempt):
    """growth and backoff are arguments"""
    for args in ((given(), 8.0, 1, 2, 4.0, 0.25), (given((0, INF)), 8.0, 1, 2, 4.0, 0.25)):
        equal(float(step(attempt, *args)[1]), reference(*args)[1], "the next scale with growth 4 and backoff 1/4")


CHECKS = [unscaled, left_out, smaller, growing, arguments]
