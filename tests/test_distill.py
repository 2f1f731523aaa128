"""Knowledge distillation: the loss by its definition and its gradient, the cache of the teacher, and the training scripts with --teacher.
The comparison with trl stands in test_trl_parity.py."""
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import chats, flags, largest_difference, metrics, options, python, run_ranks, tiny_lm, tiny_tokenizer, weights, write_world
from nanollm import checkpoint, dist, distill
from nanollm.config import UserError
from nanollm.data import ChatRows
from nanollm.distill import Cache, Teacher, distill_loss, divergence, in_buckets, kd_loss_sum, load_teacher
from nanollm.losses import IGNORE_INDEX, cross_entropy, linear_cross_entropy
from nanollm.model import ModelArgs, Transformer
from nanollm.tokenizer import bpe_tokenizer
from test_scripts import SCRIPTS, refused, reward_model, same_run, train_lines

KINDS = ["forward", "reverse", "jsd"]
CTX = dist.Context(0, 0, 1, torch.device("cpu"), True)
PLAIN = lambda: dist.autocast(CTX.device, torch.float32)


def logits_and_targets(B=3, T=5, V=11, seed=0):
    """Student and teacher logits (B, T, V) and targets (B, T), a third of them masked, one row wholly."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (B, T), generator=g).masked_fill(torch.rand(B, T, generator=g) < 0.33, IGNORE_INDEX)
    targets[-1] = IGNORE_INDEX
    return torch.randn(B, T, V, generator=g).requires_grad_(), 2 * torch.randn(B, T, V, generator=g), targets


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_divergences_of_a_coin_by_hand():
    """Student (1/2, 1/2), teacher (3/4, 1/4): each kind written out."""
    s, t = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q))
    P, Q, M = (0.75, 0.25), (0.5, 0.5), (0.625, 0.375)
    want = {"forward": kl(P, Q), "reverse": kl(Q, P), "jsd": (kl(P, M) + kl(Q, M)) / 2}
    for kind in KINDS:
        assert divergence(s, t, kind).item() == pytest.approx(want[kind], abs=1e-7)
    apart = torch.tensor([[1.0, 1e-30]]).log(), torch.tensor([[1e-30, 1.0]]).log()
    assert divergence(*apart, "jsd").item() == pytest.approx(math.log(2), abs=1e-6)           # its upper bound


@pytest.mark.parametrize("kind", KINDS)
def test_k1_a_student_that_equals_its_teacher_has_loss_and_gradient_zero(kind):
    """Also where the logits differ by a constant: only distributions count."""
    student, _, targets = logits_and_targets()
    loss, count = kd_loss_sum(student, student.detach() + 3.0, targets, 2.0, kind)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and student.grad.abs().max() < 1e-6 and count == (targets != IGNORE_INDEX).sum()


def test_k3_the_gradient_is_t_times_the_difference_of_the_distributions():
    """d/dz_s [T^2 KL] = T (p_s - p_t) at supervised positions and nothing at others. So its size stays the same as T grows, while
    without T^2 it falls like 1 / T^2."""
    sizes = {}
    for T in (1.0, 2.0, 4.0, 8.0):
        student, teacher, targets = logits_and_targets()
        kd_loss_sum(student, teacher, targets, T)[0].backward()
        want = T * (F.softmax(student.detach() / T, -1) - F.softmax(teacher / T, -1)) * (targets != IGNORE_INDEX).unsqueeze(-1)
        assert (student.grad - want).abs().max() < 1e-6
        sizes[T] = student.grad.norm().item()
    assert 0.5 < sizes[8] / sizes[2] < 2 and sizes[8] / 64 < sizes[2] / 4 / 8                 # with T^2; without it


def test_a_longer_padded_vocabulary_is_cut_and_normalised_again():
    """What a padded row of the teacher's output says about ids that do not exist plays no part."""
    student, teacher, targets = logits_and_targets()
    padded = torch.cat((teacher, torch.full_like(teacher[..., :5], 7.0)), -1)
    assert torch.equal(kd_loss_sum(student, padded, targets, 2.0)[0], kd_loss_sum(student, teacher, targets, 2.0)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 11])
def test_top_k_and_tail_are_a_lower_bound_that_all_tokens_reach(kind, k):
    """Lumping tokens together can only hide a difference (data processing inequality); with k = V nothing is lumped. The buckets
    are still a distribution."""
    student, teacher, _ = logits_and_targets()
    s, t = (F.log_softmax(x.detach().flatten(0, 1), -1) for x in (student, teacher))
    ids = t.topk(k).indices
    coarse, whole = divergence(in_buckets(s, ids), in_buckets(t, ids), kind), divergence(s, t, kind)
    assert in_buckets(t, ids).shape == (15, k + (k < 11)) and torch.allclose(in_buckets(t, ids).exp().sum(-1), torch.ones(15))
    assert (coarse <= whole + 1e-6).all() and ((coarse - whole).abs().max() < 1e-6) == (k == 11)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_in_chunks_it_is_the_plain_loss_with_the_plain_gradients(chunk):
    """distill_loss, which computes each chunk's logits again in the backward pass, against cross_entropy and kd_loss_sum on all logits."""
    g = torch.Generator().manual_seed(1)
    _, teacher, targets = logits_and_targets()
    hidden, weight = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((3, 5, 6), (11, 6)))
    logits = hidden @ weight.T
    want = 0.3 * cross_entropy(logits, targets)[0] + 0.7 * kd_loss_sum(logits, teacher, targets, 2.0, "jsd")[0]
    want_grads = torch.autograd.grad(want, (hidden, weight))
    told = F.log_softmax(teacher[targets != IGNORE_INDEX] / 2.0, -1)
    loss, count, parts = distill_loss(hidden, weight, targets, lambda i, j: (None, told[i:j]), 11, 0.3, 2.0, "jsd", chunk)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == pytest.approx(want.item(), rel=1e-6) and count == len(told)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(grads, want_grads))
    assert (0.3 * parts["ce"] + 0.7 * parts["kd"]).item() == pytest.approx(loss.item(), rel=1e-6)


def test_k2_alpha_1_is_the_loss_without_a_teacher_and_no_target_is_a_connected_zero():
    hidden, weight = torch.randn(2, 4, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = torch.tensor([[1, 2, 3, IGNORE_INDEX], [4, IGNORE_INDEX, 6, 7]])
    told = F.log_softmax(torch.randn(6, 11), -1)
    given = lambda i, j: (None, told[i:j])
    assert torch.allclose(distill_loss(hidden, weight, targets, given, 11, 1.0, 2.0, "forward")[0], linear_cross_entropy(hidden, weight, targets)[0])
    nothing = torch.full_like(targets, IGNORE_INDEX)
    loss, count, _ = distill_loss(hidden, weight, nothing, given, 11, 0.5, 2.0, "forward")
    loss.backward()
    assert loss == 0 and count == 0 and (weight.grad is None or not weight.grad.any())


# ---- the teacher and its cache -------------------------------------------------------------------------------------


def rows_of(n=40, T=64):
    return ChatRows([(f"row {i}", row) for i, row in enumerate(chats(n))], tiny_tokenizer(), T)


def config(tmp_path, **changes):
    return SimpleNamespace(**{**dict(teacher="", kd_alpha=0.25, kd_temperature=2.0, kd_kind="forward", kd_cache=str(tmp_path / "cache"), kd_top_k=32,
                                     batch_size=4), **changes})


def losses_of(head, rows, student):
    """[(loss, gradient of the output matrix)] of three batches of other sizes than the cache was written in."""
    out = []
    for batch in ([0, 1, 2], [3], [5, 4, 2, 1]):
        inputs, targets, segments = rows.batch(batch)
        student.zero_grad()
        loss, count, _ = student(inputs, segments, head=head(inputs, targets, segments))
        loss.backward()
        out.append((loss.item() / int(count), student.output.weight.grad.clone()))
    return out


def test_k5_a_cache_of_the_whole_vocabulary_is_the_teacher(tmp_path):
    """Loss and gradient, whatever rows share a batch; packed rows and padding included. With fewer tokens kept the loss is smaller."""
    rows, student, model = rows_of(), tiny_lm(seed=1), tiny_lm(seed=2)
    teacher = Teacher(config(tmp_path), model, tiny_tokenizer())
    online = losses_of(teacher.head, rows, student)
    for k in (10**6, 8):
        teacher.cached = Cache(teacher, ["some weights", 2.0], rows, config(tmp_path, kd_top_k=k), CTX, PLAIN)
        for (loss, grad), (want, want_grad) in zip(losses_of(teacher.head, rows, student), online):
            assert (abs(loss - want) < 1e-6 and (grad - want_grad).abs().max() < 1e-5) if k > 8 else loss < want - 1e-4


def test_the_cache_is_written_once_for_one_teacher_temperature_and_data(tmp_path, monkeypatch):
    """A second run asks nothing; other weights, another T, k or row have another directory; a part that is missing is written
    again with the same bytes; one that is cut short is refused by name."""
    asked, write = [], Cache.write
    monkeypatch.setattr(Cache, "write", lambda self, *a: (asked.append(1), write(self, *a)))
    teacher = Teacher(config(tmp_path), tiny_lm(seed=2), tiny_tokenizer())
    make = lambda rows=rows_of(), known="weights", **changes: Cache(teacher, [known], rows, config(tmp_path, **changes), CTX, PLAIN)
    first = make()
    assert make().folder == first.folder and len(asked) == 1
    assert len({first.folder, make(known="others").folder, make(kd_top_k=3).folder, make(rows_of(39)).folder}) == 4 and len(asked) == 4
    before = torch.load(first.path(0), weights_only=True)
    first.path(0).unlink()
    again = torch.load(make().path(0), weights_only=True)
    assert all(torch.equal(before[name], again[name]) for name in ("ids", "logps")) and not list(first.folder.glob("*.tmp"))
    first.path(0).write_bytes(first.path(0).read_bytes()[:-100])
    with pytest.raises(UserError, match="00000.pt cannot be read"):
        make().block(0)


def kill_worker(out):
    """A fork writes the cache, two rows a file, and is killed with SIGKILL when the third file is about to get its name; the next one
    at once after that."""
    distill.BLOCK, replace = 2, os.replace
    for after in (False, True):
        pid, named = os.fork(), []
        if pid == 0:
            def deadly(aside, path):
                named.append(path)
                replace(aside, path) if after or len(named) < 3 else None
                os.kill(os.getpid(), signal.SIGKILL) if after or len(named) == 3 else None
            os.replace = deadly
            try:
                Cache(Teacher(config(out), tiny_lm(seed=2), tiny_tokenizer()), [], rows_of(), config(out), CTX, PLAIN)
            finally:
                os._exit(1)                                      # only reached if nothing killed us
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def test_killed_while_the_cache_is_written_it_goes_on_and_says_the_same(tmp_path, monkeypatch):
    """kill -9 twice: the third run writes only the files that are not there, and reads from them what an undisturbed cache holds."""
    with open(tmp_path / "log", "w+b") as log:
        code = "import test_distill, pathlib; test_distill.kill_worker(pathlib.Path(sys.argv[1]))"
        assert python(code, tmp_path, log=log).wait(timeout=600) == 0, (tmp_path / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
    written, write = [], Cache.write
    monkeypatch.setattr(Cache, "write", lambda self, b, *a: (written.append(b), write(self, b, *a)))
    monkeypatch.setattr(distill, "BLOCK", 2)
    teacher, rows = Teacher(config(tmp_path), tiny_lm(seed=2), tiny_tokenizer()), rows_of()
    killed = Cache(teacher, [], rows, config(tmp_path), CTX, PLAIN)
    n = -(-len(rows) // 2)
    assert len(list(killed.folder.glob("*.pt"))) == n > 4 and written == list(range(3, n))       # two files, then one more, were whole
    whole = Cache(teacher, [], rows, config(tmp_path, kd_cache=str(tmp_path / "whole")), CTX, PLAIN)
    assert all(torch.equal(killed.block(b)[name], whole.block(b)[name]) for b in range(n) for name in ("ids", "logps"))


def test_number_formats_do_not_share_a_cache(tmp_path):
    """What a teacher says in bfloat16 differs in the third digit, so a run in float32 asks again."""
    path = str(checkpoint.save(tmp_path / "teacher", 1, tiny_lm(seed=2), tiny_tokenizer(), "sft", None))
    folders = {load_teacher(config(tmp_path, teacher=path, dtype=dtype), tiny_tokenizer(), rows_of(), 64, CTX, PLAIN).cached.folder
               for dtype in ("float32", "bfloat16", "auto")}
    assert len(folders) == 2                                 # auto is float32 on the CPU


def test_two_ranks_write_the_cache_of_one(tmp_path, monkeypatch):
    """Each rank asks about its share of the blocks; together they are the same files."""
    monkeypatch.setattr("nanollm.distill.BLOCK", 4)
    teacher, rows = Teacher(config(tmp_path), tiny_lm(seed=2), tiny_tokenizer()), rows_of()
    alone = Cache(teacher, [], rows, config(tmp_path, kd_cache=str(tmp_path / "one")), CTX, PLAIN)
    assert len(alone.place) > 4 and alone.path(1).exists()
    rank1 = dist.Context(1, 1, 2, torch.device("cpu"), False)
    with pytest.raises(UserError, match="must see the same --kd_cache"):                      # rank 0 has written nothing here
        Cache(teacher, [], rows, config(tmp_path, kd_cache=str(tmp_path / "two")), rank1, PLAIN)
    both = Cache(teacher, [], rows, config(tmp_path, kd_cache=str(tmp_path / "two")), dist.Context(0, 0, 2, torch.device("cpu"), True), PLAIN)
    for b in range(3):
        a, c = (torch.load(cache.path(b), weights_only=True) for cache in (alone, both))
        assert all(torch.equal(a[name], c[name]) for name in ("ids", "logps"))


# ---- the scripts ---------------------------------------------------------------------------------------------------

RUNS = {"sft": {}, "pretrain": {"kd_kind": "reverse"}, "sft-lora": {"peft": "lora", "lora_rank": 4, "kd_kind": "jsd"}, "sft-cache": {"kd_cache": "cache", "kd_top_k": 8},
        "sft-fsdp": {"parallel": "fsdp"}}


def teacher_of(world):
    """A wider model of the same tokenizer, once."""
    if not (world / "teacher").exists():
        checkpoint.save(world / "teacher", 1, tiny_lm(seed=3, dim=48), tiny_tokenizer(), "sft", None)
    return str(world / "teacher")


def play(variant, world, out, **changes):
    """Run a variant in this process with a teacher; returns its metrics."""
    stage, more = variant.split("-")[0], dict(RUNS[variant])
    if "kd_cache" in more:
        more["kd_cache"] = str(world / more["kd_cache"])
    script = SCRIPTS[stage]
    script.main(script.Config(**{**options(stage, world, out), "teacher": teacher_of(world), **more, **changes}))
    return metrics(out)


def worker(out):
    """All variants in each of two ranks."""
    torch.distributed.init_process_group("gloo")
    dist.finish = lambda ctx: None
    if os.environ["RANK"] == "0":
        teacher_of(write_world(out / "world"))
    torch.distributed.barrier()
    for variant in RUNS:
        play(variant, out / "world", out / variant)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    run_ranks("test_distill.worker", out)
    return out


@pytest.mark.parametrize("variant", RUNS)
def test_two_processes_distil_as_one(two, tmp_path, variant):
    """Same losses, of both parts, and the same weights; the two parts make up the loss."""
    one, both = play(variant, two / "world", tmp_path), metrics(two / variant)
    for a, b in zip(train_lines(one), train_lines(both), strict=True):
        for key in ("train/loss", "train/ce", "train/kd", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), (key, a["step"])
        assert a["train/loss"] == pytest.approx((a["train/ce"] + a["train/kd"]) / 2, rel=1e-5) and a["train/kd"] > 0
    assert largest_difference(weights(tmp_path), weights(two / variant)) < 1e-5


@pytest.mark.parametrize("variant", ["sft", "sft-cache"])
def test_distillation_stopped_and_resumed_equals_undisturbed_bit_for_bit(world, tmp_path, variant):
    """The teacher has no state of its own: asked again or read from the cache, it says the same."""
    world = shutil.copytree(world, tmp_path / "world")
    LONG = dict(max_steps=6, save_every=3)
    play(variant, world, tmp_path / "straight", **LONG)
    shutil.copytree(tmp_path / "straight", tmp_path / "cut", ignore=shutil.ignore_patterns("step_00000006"))
    shutil.rmtree(world / "cache", ignore_errors=True)
    play(variant, world, tmp_path / "cut", **LONG, resume="auto")
    same_run(tmp_path / "cut", tmp_path / "straight")


def test_k6_a_student_of_a_teacher_beats_one_of_the_text_alone_at_equal_steps():
    """Text that a known model has written, read twice by two equal students: on held-out text of the same model, the one who also sees
    the teacher's distribution is better by more than 0.1 nats, for each of two seeds."""
    V, T = 32, 24
    torch.manual_seed(0)
    teacher = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=V, max_seq_len=T, multiple_of=16))
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(6) if p.dim() > 1 else None
        text = torch.zeros(192, 1, dtype=torch.long)
        for _ in range(T):
            text = torch.cat((text, teacher(text)[:, -1].softmax(-1).multinomial(1)), 1)
    train, held_out = text[:64], text[64:]
    says = Teacher(SimpleNamespace(kd_alpha=0.5, kd_temperature=1.0, kd_kind="forward"), teacher, SimpleNamespace(vocab_size=V))

    def student(seed, head):
        torch.manual_seed(seed)
        model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=V, max_seq_len=T, multiple_of=16))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(60):
            batch = train[step % 4 * 16 :][:16]
            loss, count, _ = model(batch[:, :-1], head=head(batch[:, :-1], batch[:, 1:]))
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            loss, count, _ = cross_entropy(model(held_out[:, :-1]), held_out[:, 1:])
        return (loss / count).item()

    plain = lambda inputs, targets: lambda h, output: linear_cross_entropy(h, output.weight, targets)
    for seed in (1, 2):
        assert student(seed, lambda inputs, targets: says.head(inputs, targets, None)) < student(seed, plain) - 0.1


# ---- refusals ------------------------------------------------------------------------------------------------------


def other_tokenizer(tmp):
    tok = bpe_tokenizer(tiny_tokenizer().spec["merges"][:-1], tiny_tokenizer().spec["pattern"])
    return str(checkpoint.save(tmp / "other", 1, tiny_lm(), tok, "sft", None))


REFUSALS = {
    "another tokenizer": (lambda t, w: {"teacher": other_tokenizer(t)}, "has another tokenizer"),
    "a reward model": (lambda t, w: {"teacher": reward_model(t)}, "is a reward model"),
    "a shorter context": (lambda t, w: {"teacher": str(checkpoint.save(t / "short", 1, tiny_lm(max_seq_len=32), tiny_tokenizer(), "sft", None))},
                          "reads at most 32 tokens"),
    "unknown kind": (lambda t, w: {"teacher": str(w / "base"), "kd_kind": "both"}, "--kd_kind both is unknown"),
    "alpha above 1": (lambda t, w: {"teacher": str(w / "base"), "kd_alpha": 1.5}, "--kd_alpha 1.5 lies between"),
    "temperature 0": (lambda t, w: {"teacher": str(w / "base"), "kd_temperature": 0.0}, "--kd_temperature 0.0 above 0"),
    "a cache of nobody": (lambda t, w: {"kd_cache": str(t / "cache")}, "name one with --teacher"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_a_teacher_that_does_not_fit_is_refused_in_one_sentence(world, tmp_path, capsys, stage, name):
    change, says = REFUSALS[name]
    assert says in refused(SCRIPTS[stage], flags({**options(stage, world, tmp_path / "out"), **change(tmp_path, world)}), capsys)
