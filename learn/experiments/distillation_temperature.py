"""Which temperature in distillation, and what is its T^2 for?

    python -m learn.experiments.distillation_temperature       two minutes on one core

A student learns from few texts, and from a teacher that has read many: loss = a CE + (1 - a) T^2 KL(teacher || student), both softmaxes
taken of logits / T (Hinton et al. 2015, section 2). A high T shows more of what the teacher finds unlikely. The gradient of the KL
shrinks like 1 / T^2, which the factor T^2 makes up for. One sees the loss on new text, with the factor and without, beside a
student of the text alone.

The teacher helps, and T 1 is enough: above it the students get no better and differ more from seed to seed. (Hinton et al., too, found
high temperatures worse where the student is much too small.) So T^2 is no gain in itself: it keeps the weight of the term.
"""
import torch

from learn import lab
from nanollm.distill import kd_loss_sum
from nanollm.losses import cross_entropy
from nanollm.optim import get_lr, make_optimizer

TEMPERATURES, ALPHA, RATE = (1.0, 2.0, 4.0), 0.5, 8e-3
TEACHER_STEPS, STEPS, ROWS, TEXTS = 600, 400, 8, 60     # the student's rows an update and texts; the teacher has 3,000 texts


def student_of(teacher, batch, vocab_size, seed, steps, temperature=0.0, squared=True):
    """A student after `steps` updates; temperature 0: of the text alone."""
    model = lab.tiny(vocab_size, seed, dim=32)
    optimizer = make_optimizer(model, "adamw", RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step + 1, RATE, RATE / 10, 10, steps)
        inputs, targets = batch(step)
        logits = model(inputs)
        loss, count, _ = cross_entropy(logits, targets)
        if temperature:
            with torch.no_grad():
                says = teacher(inputs)
            kd, _ = kd_loss_sum(logits, says, targets, temperature)                                # with T^2 in it
            loss = ALPHA * loss + (1 - ALPHA) * kd / (1 if squared else temperature**2)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def main(cfg):
    ids, val_ids, tok = lab.corpus(language="en")
    teacher = lab.tiny(tok.vocab_size)
    lab.train(teacher, lab.windows(ids), cfg.steps(TEACHER_STEPS))
    teacher.eval()
    few = lab.stream(lab.texts(TEXTS, 5, "en"), tok)
    arms = {"text alone": {}, **{f"T {t:g}": {"temperature": t} for t in TEMPERATURES},
            f"T {TEMPERATURES[-1]:g} without T^2": {"temperature": TEMPERATURES[-1], "squared": False}}
    figures = {"teacher": lab.val_loss(teacher, val_ids)}
    for name, options in arms.items():
        for seed in range(cfg.seeds):
            model = student_of(teacher, lab.windows(few, ROWS, seed=seed), tok.vocab_size, seed, cfg.steps(STEPS), **options)
            figures.setdefault(name, []).append(lab.val_loss(model, val_ids))
    alone, hottest = figures["text alone"], f"T {TEMPERATURES[-1]:g}"
    best = min((f"T {t:g}" for t in TEMPERATURES), key=lambda name: lab.mean(figures[name]))
    claims = {"with a teacher at T 1 the student is better on new text": lab.higher(alone, figures["T 1"]),
              "some temperature above 1 is better than 1": best != "T 1" and lab.higher(figures["T 1"], figures[best]),
              f"every student at {hottest} is behind every one at T 1": min(figures[hottest]) > max(figures["T 1"]),
              f"at {hottest} the factor T^2 makes a difference beyond the noise": lab.higher(*sorted((figures[hottest], figures[f"{hottest} without T^2"]),
                                                                                              key=lab.mean, reverse=True)),
              "the student stays behind its teacher": lab.higher(figures[best], [figures["teacher"]] * cfg.seeds)}

    def draw(plt):
        lab.bars(plt, {name: figures[name] for name in arms}, "loss on new text, nats")
        plt.axhline(figures["teacher"], color="grey", linestyle=":", label="teacher")
        plt.ylim(0.9 * figures["teacher"], 1.05 * max(map(lab.mean, (figures[name] for name in arms))))
        plt.legend()
    lab.finish(cfg, figures, claims, draw)


if __name__ == "__main__":
    lab.start(main, __file__, __doc__)
