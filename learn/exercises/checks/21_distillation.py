"""What is asked of exercise 21, and the solution: nanollm.distill.kd_loss_sum."""
import torch
import torch.nn.functional as F

from learn.exercises.judge import Hint, gradient, on, parts, randint, randn, same
from nanollm.distill import kd_loss_sum

NAME = "kd_loss"
B, T, V, HOT = 2, 5, 7, 2.0


def reference(student_logits, teacher_logits, targets, temperature):
    return kd_loss_sum(student_logits, teacher_logits, targets, temperature)


def given():
    targets = randint(V, B, T, seed=2)
    targets[0, :2] = targets[1, 4] = -100
    return 2 * randn(B, T, V), 2 * randn(B, T, V, seed=1), targets


def loss(attempt, *args):
    return parts(attempt(*args), ("the sum", "the number of positions"))


def equal_models(attempt):
    """0 when student and teacher are equal"""
    student, _, targets = given()
    got = loss(attempt, student, student, targets, HOT)[0]
    if not torch.as_tensor(got).abs() <= 1e-4:
        p = F.softmax(student[targets != -100] / HOT, -1)
        entropy, hot = -(p * p.log()).sum(), F.cross_entropy(student[targets != -100], targets[targets != -100], reduction="sum")
        cold = F.softmax(student[targets != -100], -1)
        same(got, torch.tensor(0.0), "the loss of a student that equals its teacher", "", {
            "only the teacher was divided by the temperature; both": HOT**2 * (p * (p.log() - cold.log())).sum(),
            "only the student was divided by the temperature; both": HOT**2 * (cold * (cold.log() - p.log())).sum(),
            "this is the cross-entropy with the teacher's probabilities: take the teacher's own entropy off, p_t (log p_t - log p_s)": HOT**2 * entropy,
            "this is the cross-entropy with the teacher's probabilities: take the teacher's own entropy off, p_t (log p_t - log p_s) ": entropy,
            "this is the loss of the text; no teacher is in it": hot,
            "kl_div was given probabilities as its input; it wants log-probabilities (F.log_softmax)": HOT**2 * F.kl_div(p, p, reduction="sum"),
            "kl_div was given log-probabilities as its target; say log_target=True, or give it probabilities":
                HOT**2 * F.kl_div(p.log(), p.log(), reduction="sum")})


def values(attempt):
    """T^2 KL(teacher || student) at temperature T"""
    student, teacher, targets = given()
    at = targets != -100
    s, t = (F.log_softmax(x / HOT, -1) for x in (student, teacher))
    s1, t1 = (F.log_softmax(x, -1) for x in (student, teacher))
    kl = lambda p, q: (p.exp() * (p - q)).sum(-1)
    want = reference(student, teacher, targets, HOT)[0]
    same(loss(attempt, student, teacher, targets, HOT)[0], want, "the sum", "", {
        "T^2 is missing: the gradient would shrink with the temperature": want / HOT**2, "the factor is T; it should be T^2": want / HOT,
        "divided by T^2; multiply": want / HOT**4,
        "the direction is turned round: this is KL(student || teacher); with F.kl_div the student is the input, the teacher the target":
            HOT**2 * kl(s, t)[at].sum(),
        "the padding counts too: only positions whose target is not -100": HOT**2 * kl(t, s).sum(),
        "reduction=\"batchmean\" divides by B: take the sum over the positions": HOT**2 * kl(t, s).sum() / B,
        "reduction=\"batchmean\" divides: take the sum over the positions": want / at.sum(),
        "mean instead of sum: return the sum and the number of positions": want / at.sum() / V,
        "reduction=\"mean\" divides by B T V: take the sum over the positions": HOT**2 * kl(t, s).mean() / V,
        "the logits were not divided by the temperature": HOT**2 * kl(t1, s1)[at].sum(),
        "only the teacher was divided by the temperature; both": HOT**2 * kl(t, s1)[at].sum(),
        "only the student was divided by the temperature; both": HOT**2 * kl(t1, s)[at].sum(),
        "the temperature is not used": kl(t1, s1)[at].sum(),
        "the logits were multiplied by the temperature; divide": HOT**2 * kl(F.log_softmax(teacher * HOT, -1), F.log_softmax(student * HOT, -1))[at].sum(),
        "the probabilities were divided by T; divide the logits, before the softmax": HOT**2 * kl(t1, s1)[at].sum() / HOT, "wrong sign": -want,
        "the softmax goes over the positions; over the vocabulary, dim=-1":
            HOT**2 * kl(F.log_softmax(teacher / HOT, 1), F.log_softmax(student / HOT, 1))[at].sum()})


def count(attempt):
    """the number of positions"""
    args = given()
    same(torch.as_tensor(loss(attempt, *args, HOT)[1]), (args[2] != -100).sum(), "the number of positions",
    "", {"the positions of -100 count too": torch.tensor(B * T)})


def certain(attempt):
    """a teacher that excludes tokens, and a student that is certain"""
    student, teacher, targets = given()
    with on("logits of ± 500"):
        got = loss(attempt, 250 * student.sign(), 500 * teacher.sign(), targets, HOT)[0]
        if not torch.as_tensor(got).isfinite():
            raise Hint("NaN or infinite: log(softmax) is log(0); F.log_softmax computes it in one")
        same(got, reference(250 * student.sign(), 500 * teacher.sign(), targets, HOT)[0], "the sum")


def nothing(attempt):
    """a batch without targets; gradients otherwise"""
    student, teacher, targets = given()
    with on("targets that are all -100"):
        same(loss(attempt, student, teacher, torch.full_like(targets, -100), HOT)[0], torch.tensor(0.0), "the sum")
    gradient(loss(attempt, student.requires_grad_(), teacher, targets, HOT)[0], student, names=("student_logits",))


CHECKS = [equal_models, values, count, certain, nothing]
