"""Judges an attempt at an exercise: runs its checks in order; the first that fails speaks one sentence.

The checks of exercise NN stand in checks/NN_topic.py, in the order in which one learns: first the shape, then the idea, then the edge
cases. Each is a function check(attempt) whose docstring is its title; it raises Hint. `mistakes` of `same` and `equal` are what
makes the hints helpful: {sentence: what an attempt with this typical mistake would return}.
"""
import contextlib
import copy
import inspect
import traceback
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in HERE.glob("[0-9][0-9]_*.py"))


class Hint(Exception):
    """One sentence for the learner."""


class Blank(Hint):
    """Nothing is written yet."""


# ---- running an attempt --------------------------------------------------------------------------------------------------


def load(path):
    """A Python file as a module: a name that begins with a digit cannot be imported. Always read afresh, never from __pycache__, which
    does not notice a second edit of the same length within a second."""
    module = types.ModuleType(f"attempt_{Path(path).stem}")
    module.__file__ = str(path)
    exec(compile(Path(path).read_bytes(), str(path), "exec"), vars(module))
    return module


def checks_of(name):
    return load(HERE / "checks" / f"{name}.py")


def judge(name, file=None):
    """(titles of the checks that passed, the Hint of the first that did not or None) for exercise `name`, in `file` or in place."""
    file, checks, title, passed = Path(file or HERE / f"{name}.py"), checks_of(name), "reading your file", []
    try:
        module = load(file)
        if not hasattr(module, checks.NAME):
            raise Hint(f"{file.name} defines no {checks.NAME}; keep the name and the arguments of {name}.py")
        attempt = getattr(module, checks.NAME)
        attempt = attempt if inspect.isclass(attempt) else untouched(attempt)
        for check in checks.CHECKS:
            title = check.__doc__.strip()
            with torch.random.fork_rng(devices=[]):              # what an attempt draws is the same each time, and disturbs nobody
                torch.manual_seed(0)
                check(attempt)
            passed.append(title)
    except Hint as hint:
        return passed, type(hint)(f"{title}: {hint}")
    except (Exception, SystemExit) as error:                     # the learner's own; no traceback of ours
        return passed, in_words(error, title, file, checks.NAME)
    return passed, None


def in_words(error, title, file, what):
    """An exception of the attempt as a Hint: file:line of the learner's code, the error, and the line itself."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == file:
        return Hint(f"{title}: {file.name}:{error.lineno}: {type(error).__name__}: {error.msg}")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    if isinstance(error, NotImplementedError) and frames and frames[-1].line.startswith("raise"):      # torch raises it, too
        return Blank(f"still blank: {file.name}:{frames[-1].lineno} raises NotImplementedError; write {what} there")
    message = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    if isinstance(error, SystemExit):
        message = "this ends the program, and the judge with it, before a verdict; leave exit() and sys.exit() out"
    if frames:
        return Hint(f"{title}: {file.name}:{frames[-1].lineno}: {message}   (`{frames[-1].line}`)")
    return Hint(f"{title}: calling {what} failed ({message}); keep the name and the arguments as they were")


def untouched(function):
    """The function, with a Hint if it changes what it was given."""
    def guarded(*args, **named):
        before = copies(args)
        result = function(*args, **named)
        names = list(inspect.signature(function).parameters)
        for i, (new, old) in enumerate(zip(args, before)):
            if old is not None and not alike(new, old):
                raise Hint(f"your function changes its input `{names[i]}` in place; the caller still needs it, so work on a new one")
        return result
    return guarded


def copies(args):
    """Copies of tensors, arrays, lists and dicts; None for what is not looked at (models, tokenizers)."""
    return [x.detach().clone() if isinstance(x, torch.Tensor) else x.copy() if isinstance(x, np.ndarray)
            else copies(x) if isinstance(x, (list, tuple)) else copy.deepcopy(x) if isinstance(x, (dict, int, float, str)) else None for x in args]


def alike(new, old):
    if isinstance(old, torch.Tensor):
        return new.shape == old.shape and torch.equal(new.detach().nan_to_num(), old.nan_to_num())
    if isinstance(old, np.ndarray):
        return np.array_equal(new, old)
    if isinstance(old, list):
        return len(new) == len(old) and all(b is None or alike(a, b) for a, b in zip(new, old))
    return new == old


# ---- looking at what came back -------------------------------------------------------------------------------------------


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-4):
    """Equal up to rounding: within `tolerance` of each number, or a tenth of it of the largest."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=1e-9 + tolerance / 10 * largest, equal_nan=True)


def kind(x):
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else "None" if x is None else f"of type {type(x).__name__}"


def parts(result, names):
    """The result as a tuple of these parts."""
    if result is None:
        raise Hint("the function returns None: is the `return` missing?")
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        raise Hint(f"it must return {len(names)} things, {', '.join(names)}; it is {kind(result)}"
                   + (f" with {len(result)} of them" if isinstance(result, (tuple, list)) else ""))
    return result


def equal(got, want, what="the result", mistakes=None):
    """Exactly equal: numbers, lists, tuples."""
    if got is None and want is not None:
        raise Hint(f"{what} is None: is the `return` missing?")
    if got != want:
        for sentence, value in (mistakes or {}).items():
            if got == value:
                raise Hint(sentence)
        raise Hint(f"{what}: got {got!r}, expected {want!r}")


def same(got, want, what="the result", axes="", mistakes=None, tolerance=1e-4):
    """The tensor `got` equals `want` up to rounding; otherwise a Hint that says how it differs. axes: their names, "B H T D".
    mistakes: {sentence: the result of that mistake}."""
    if got is None:
        raise Hint(f"{what} is None: is the `return` missing?")
    number = not isinstance(want, torch.Tensor) or want.dim() == 0
    if not isinstance(got, torch.Tensor) and not (number and isinstance(got, (int, float))):
        raise Hint(f"{what} must be a {'number' if number else 'torch.Tensor'}; it is {kind(got)}")
    got, want = torch.as_tensor(got).detach(), torch.as_tensor(want).detach()
    if close(got, want, tolerance):
        return
    for sentence, value in (mistakes or {}).items():
        if close(got, value, tolerance):
            raise Hint(sentence)
    shape(got, want.shape, what, axes)
    if not got.isfinite().all() and want.isfinite().all():
        raise Hint(f"{what}: {got[~got.isfinite()][0].item()} in {int((~got.isfinite()).sum())} of {got.numel()} places; is something "
                   "divided by 0, or a logarithm or a softmax taken of nothing?")
    raise Hint(f"{what}: {difference(got.double(), want.double(), axes)}")


def shape(got, want, what="the result", axes=""):
    """The sizes, with the meaning of the axes."""
    if tuple(got.shape) == tuple(want):
        return
    named = f" ({', '.join(f'{n}={s}' for n, s in zip(axes.split(), want))})" if axes else ""
    why = "; the axes are in another order" if sorted(got.shape) == sorted(want) else "; one axis is missing" if len(got.shape) < len(want) else ""
    raise Hint(f"wrong shape of {what}: expected {tuple(want)}{named}, got {tuple(got.shape)}{why}")


def difference(got, want, axes=""):
    """How two tensors of one shape differ: by a factor, a sign, a constant, or somewhere."""
    if want.numel() == 1:
        return "wrong sign" if got.item() == -want.item() else f"got {got.item():.5g}, expected {want.item():.5g}"
    large = want.abs() > 1e-3 * want.abs().max()
    ratio = got[large] / want[large]
    if large.any() and (ratio - ratio.mean()).abs().max() < 1e-3 * ratio.mean().abs():
        factor = ratio.mean().item()
        if abs(factor + 1) < 1e-3:
            return "wrong sign"
        return f"{factor:.4g} times too large, everywhere" if abs(factor) > 1 else f"{1 / factor:.4g} times too small, everywhere"
    if (got - want - (got - want).mean()).abs().max() < 1e-3 * (got - want).mean().abs():
        return f"{(got - want).mean().item():+.4g} away from what it should be, everywhere: a constant is missing"
    wrong = ~torch.isclose(got, want, rtol=1e-4, atol=1e-5 * want[want.isfinite()].abs().max().item())
    at = wrong.nonzero()[0].tolist()
    names = axes.split() or [f"axis {i}" for i in range(want.dim())]
    place = ", ".join(f"{n}={i}" for n, i in zip(names, at))
    return f"wrong in {int(wrong.sum())} of {wrong.numel()} places, first at {place}: got {got[tuple(at)].item():.5g}, expected {want[tuple(at)].item():.5g}"


def gradient(result, *inputs, names=("the input",)):
    """The gradients of result.sum() by the inputs; a Hint if one does not arrive."""
    cut = "`.item()`, `float()`, `.detach()`, `.data`, `torch.tensor(…)` and `torch.no_grad()` cut it"
    if not isinstance(result, torch.Tensor) or not result.requires_grad:
        raise Hint(f"not differentiable: no gradient flows back through the result; {cut}")
    grads = torch.autograd.grad(result.sum(), inputs, allow_unused=True)
    for name, grad in zip(names, grads):
        if grad is None:
            raise Hint(f"not differentiable: no gradient reaches {name}; {cut}")
        if not grad.isfinite().all():
            raise Hint(f"the gradient of {name} is NaN or infinite although the result is not")
    return grads


@contextlib.contextmanager
def on(edge):
    """An exception inside says on what it happened; a Hint, too."""
    try:
        yield
    except Hint as hint:
        raise Hint(f"on {edge}, {hint}") from None
