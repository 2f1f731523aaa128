"""Every benchmark and experiment runs, on toy shapes: no figure of these runs means anything. (bench/gpu.py has its own tests.)"""
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from bench import ddp, dpo, generate, parallel, precision, road, rollout, sft, step, time_to_loss
from conftest import ROOT, chats, flags, options, pairs, run_ranks, stories, tiny_lm, tiny_tokenizer, write_jsonl
from learn.studies import architectures, curriculum, distillation, leash, long_context
from nanollm import checkpoint, config, dist, evaluation
from nanollm import world as demo_world
from nanollm.corpus.pack import write_tokens

STAMP = {"cpu", "cores", "torch", "python", "date"}


@pytest.fixture(autouse=True)
def a_quick_peak(monkeypatch):
    """The real one takes seconds."""
    for module in (step, ddp, time_to_loss):
        monkeypatch.setattr(module, "matmul_peak", lambda: 50.0)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


SHAPE = dict(dim=16, n_layers=1, n_heads=2, seq_len=8, batch_size=2, threads=1)


@pytest.mark.parametrize("side", ["ours", "ours, activation checkpointing"])
def test_a_row_of_the_step_benchmark(side, capsys):
    step.measure(step.Config(vocab=["40"], updates=["2"], **SHAPE), side)
    record = json.loads(capsys.readouterr().out)
    assert record["tokens_per_s"] > 0 and record["updates"] == 4 and len(record["seconds"]) == 2 and record["peak_rss_mb"] > 50


def test_the_step_benchmark_compares_equals_round_by_round(tmp_path, monkeypatch, capsys):
    """Three rounds on a machine that is slower each time: the median of the rounds' ratios is 2, while the medians alone would say
    otherwise. Another batch size, context, number of updates or version makes another table, never the same one."""
    speeds = iter([200, 100, 100, 50, 10, 10, *[7, 7] * 9])

    def worker(command, **k):
        side = command[command.index("--worker") + 1]
        record = {"side": side, "vocab": 40, "tokens_per_s": next(speeds), "peak_rss_mb": 100 if side == "ours" else 200, "gflops": 1, "matmul_peak": 50}
        return types.SimpleNamespace(returncode=0, stdout=json.dumps(record))
    monkeypatch.setattr(step.subprocess, "run", worker)
    words = dict(vocab=["40"], sides=["ours", "transformers"], out=str(tmp_path / "step.json"), rounds=3, **SHAPE)
    step.main(step.Config(**words))
    assert "| ours | 100 | 2.00 | 100 | 0.50 | 1 | 3 |" in capsys.readouterr().out
    for change in ({"batch_size": 4}, {"seq_len": 16}, {"updates": ["3"]}):
        step.main(step.Config(**words | {"rounds": 1} | change))
        assert "| 1 |\n| transformers | 7 | 1.00 |" in capsys.readouterr().out
    tables = read(tmp_path / "step.json")["tables"]
    assert len(tables) == 4 and tables[0]["sides"]["ours"]["speed_ratio"] == 2 and STAMP <= tables[0]["setting"].keys()
    with pytest.raises(config.UserError, match="one number of updates for each vocabulary"):
        step.main(step.Config(**words | {"updates": ["3", "4"]}))


def test_time_to_loss_gives_each_round_a_seed_of_its_own(tmp_path, monkeypatch, capsys):
    """Ours is really run, nanoGPT's is stood in for."""
    (tmp_path / "input.txt").write_text("\n".join(stories(60)), encoding="utf-8")
    (tmp_path / "train.py").touch()
    seeds, cfg = [], time_to_loss.Config(text=str(tmp_path / "input.txt"), nanogpt=str(tmp_path), dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_steps=3,
                                         batch_size=2, threads=1, warmup_steps=1, out=str(tmp_path / "out.json"))

    def alone(command, cfg, cwd=None):
        seeds.append(int(command[command.index("--seed") + 1]))
        time_to_loss.main(time_to_loss.Config(**vars(cfg) | {"ours": True, "seed": seeds[-1]}))
        return capsys.readouterr().out, 100.0
    monkeypatch.setattr(time_to_loss, "alone", alone)
    monkeypatch.setattr(time_to_loss, "nanogpt", lambda cfg, seed: seeds.append(seed) or dict(seconds=1.0, updates=1, tokens=64, loss=3.0, parameters=9, rss_mb=1.0, gflops=1.0))
    time_to_loss.main(cfg)
    found = read(tmp_path / "out.json")
    assert seeds == [0, 0, 1, 1] and STAMP <= found.keys() and found["matmul_peak"] == 50
    a, b = found["nanollm"]
    assert a["loss"] != b["loss"] and a["seconds"] > 0 and a["gflops"] > 0


def test_the_road_benchmark_accounts_for_every_second(world, tmp_path, monkeypatch, capsys):
    import train_pretrain
    for owner, names in ((train_pretrain, ("pretrain_loss", "update", "validate")), (torch.Tensor, ("backward",)), (evaluation, ("sample_prompts",)),
                         (checkpoint.Saver, ("save",))):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))             # the stopwatches come off again
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(road, "BEGAN", road.time.perf_counter())
    road.main("train_pretrain.py", flags(options("pretrain", world, tmp_path / "run")))
    found = read(tmp_path / "out" / "bench" / "road_pretrain.json")
    assert {"forward", "backward", "optimizer", "validation", "saves", "the rest"} <= found["seconds"].keys() and found["calls"]["optimizer"] == 3
    assert STAMP <= found.keys() and min(found["seconds"].values()) >= 0


@pytest.mark.parametrize("what", ["batch", "memory"])
def test_the_precision_benchmark(what, tmp_path):
    precision.main(precision.Config(what=what, dim=16, vocab_size=40, seq_len=8, rows=2, sizes=["1", "2"], repeats=1, out=str(tmp_path)))
    found = read(tmp_path / f"precision_{what}.json")
    assert STAMP | {"peak_rss_mb"} <= found.keys() and len(found["found"]) == (2 if what == "batch" else 4)


def test_a_benchmark_called_the_wrong_way_says_so_in_one_sentence(monkeypatch, capsys):
    """Exit code 2: without a script, without torchrun."""
    for words in ([], ["--help"], ["chat.py"]):
        done = subprocess.run([sys.executable, str(ROOT / "bench" / "road.py"), *words], capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 2 and done.stderr.startswith("error: bench/road.py wants a training script") and done.stderr.count("\n") == 1
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for module in (ddp, parallel):
        with pytest.raises(SystemExit) as stop:
            config.run(module.main, module.Config, argv=[])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "start it with torchrun" in said and said.count("\n") == 1


def ranks_worker(out):
    """The benchmarks of several processes, one after the other in one group."""
    torch.distributed.init_process_group("gloo")
    dist.finish = lambda ctx: None
    ddp.matmul_peak = lambda: 50.0
    ddp.main(ddp.Config(dim=64, n_layers=1, vocab_size=40, max_seq_len=8, rows=1, updates=2, rounds=1, out=str(out / "ddp.json")))
    parallel.main(parallel.Config(dim=128, n_layers=1, vocab_size=40, max_seq_len=8, updates=2, out=str(out / "parallel.json")))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_benchmarks_of_two_processes(tmp_path):
    run_ranks("test_bench.ranks_worker", tmp_path)
    found = read(tmp_path / "ddp.json")
    assert STAMP <= found.keys() and found["ranks"] == 2 and found["largest_difference_of_weights"] < 1e-6 and len(found["peak_rss_mb"]) == 2
    assert [r["layout"] for r in read(tmp_path / "parallel.json")] == ["ddp", "zero-1", "fsdp", "tp 2"]


def test_the_experiment_on_architectures(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(architectures, "ARMS", {arm: architectures.ARMS[arm] for arm in ("SwiGLU", "MoE 2 of 8")})
    cfg = architectures.Config(data=str(world / "tokens"), steps=2, seeds=2, out=str(tmp_path / "a.json"))
    architectures.main(cfg)
    results, said = read(tmp_path / "a.json"), capsys.readouterr().out
    assert len(results) == 4 and "MoE 2 of 8" in said and "its weights as GeGLU" in said
    architectures.main(cfg)                                  # what is there is not repeated
    assert read(tmp_path / "a.json") == results


@pytest.mark.slow
def test_the_experiment_on_curricula(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curriculum, "ARMS", {arm: curriculum.ARMS[arm] for arm in ("shuffle", "CLIMB")})
    curriculum.main(curriculum.Config(documents=1000, steps=8, seeds=2, out=str(tmp_path / "c.png")))
    assert "CLIMB" in capsys.readouterr().out and (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_experiment_on_long_contexts(tmp_path, monkeypatch):
    stream_loss = long_context.stream_loss                   # of one row, not sixteen
    monkeypatch.setattr(long_context, "stream_loss", lambda model, inputs, targets: stream_loss(model, inputs[:1], targets[:1]))
    tiny_tokenizer().save(tmp_path / "tokenizer")
    for split, texts in (("train", stories(144)), ("val", stories(300)[144:])):
        write_tokens(tmp_path, split, texts, tiny_tokenizer())
    long_context.main(long_context.Config(data=str(tmp_path), steps=2, more=1, out=str(tmp_path / "l.json")))
    found = read(tmp_path / "l.json")
    assert len(found["scaling"]) == 4 and len(found["streaming"]) == 3 and len(found["attention on the first token"]) == 3


@pytest.mark.parametrize("module,library", [(rollout, "transformers"), (generate, "transformers"), (step, "transformers"), (sft, "trl"), (dpo, "trl")])
def test_what_a_benchmark_compares_with_is_missing(module, library, monkeypatch, tmp_path):
    """One sentence before anything is measured or written, not a traceback."""
    monkeypatch.setitem(sys.modules, library, None)
    words = {"data": ["x.json"]} if module in (sft, dpo) else {}
    with pytest.raises(config.UserError, match=rf'with {library}, not installed here: pip install -e "\.\[test\]"'):
        module.main(module.Config(out=str(tmp_path / "out" / "x.json"), **words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["import tokenizer; tokenizer.library('x', type('Tok', (), {'kind': 'bpe'}))", "import data; data.main(data.Config(what='bpe'))"])
def test_a_tokenizer_benchmark_without_the_library(code):
    run = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = ['bench', '.']; sys.modules['tokenizers'] = None; {code}"],
                         capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert "UserError: this compares with tokenizers, not installed here" in run.stderr


def test_the_rollout_benchmark_compares_the_same_model(tmp_path):
    """Greedy answers of both sides are equal, token by token, with prompts of several lengths; one ratio a shape."""
    cfg = rollout.Config(shapes=["32x1"], prompt_tokens=6, new_tokens=4, batch_size=3, rounds=1, threads=1, out=str(tmp_path / "rollout.json"))
    rollout.main(cfg)
    found = read(tmp_path / "rollout.json")
    assert STAMP <= found.keys() and found["results"]["32x1"]["greedy_tokens_equal"] == 1 and found["results"]["32x1"]["ratio"] > 0


def test_the_generation_benchmark_compares_the_same_model(tmp_path, monkeypatch, capsys):
    """A line for each shape and batch; the limit counts a tied matrix and each key and value once."""
    monkeypatch.setattr(generate, "bandwidth", lambda: 1e9)
    cfg = generate.Config(shapes=["64x1:1"], batches=["1", "3"], prompt_tokens=6, new_tokens=4, rounds=1, threads=1, out=str(tmp_path / "generate.json"))
    generate.main(cfg)
    found = read(tmp_path / "generate.json")
    assert STAMP <= found.keys() and [r["tokens_equal"] for r in found["results"]] == [1, 1] and capsys.readouterr().out.count("| 64x1:1 |") == 2
    for r in found["results"]:
        assert r["limit_ms"] == pytest.approx(1e3 * 4 * (r["parameters"] + 2 * r["batch"] * 8 * 32) / 1e9)


def test_the_experiment_without_a_leash(world, tmp_path):
    """Two seeds of each beta: reward, the rule's rating and the KL at each look, 0 at the first."""
    own = options("ppo", world, tmp_path / "none")
    preset = "".join(f"{key} = {json.dumps(own[key])}\n" for key in ("data", "val_data", "init_from", "reward", "max_new_tokens", "batch_size", "warmup_steps"))
    (tmp_path / "ppo.toml").write_text(preset, encoding="utf-8")
    rows = write_jsonl(tmp_path / "rows.jsonl", demo_world.preference_rows(4, "val"))
    leash.main(leash.Config(preset=str(tmp_path / "ppo.toml"), data=rows, seeds=2, max_steps=2, every=1, more=["eval_prompts=3", "device=cpu"],
                            runs=str(tmp_path / "runs"), out=str(tmp_path / "leash.json"), picture=str(tmp_path / "leash.png")))
    found = read(tmp_path / "leash.json")
    assert STAMP <= found.keys() and found["results"].keys() == {"0.05", "0"} and (tmp_path / "leash.png").stat().st_size > 1000
    for steps in found["results"].values():
        assert [len(points) for points in steps.values()] == [2, 2, 2] and steps["0"][0]["kl"] == 0 and {"reward", "rating", "win_rate"} <= steps["0"][0].keys()


@pytest.mark.parametrize("side", ["ours", "ours, precomputed", "ours, prompts in place"])
def test_a_row_of_the_dpo_benchmark(tmp_path, capsys, side):
    tiny_tokenizer().save(tmp_path / "dpo_tokenizer")
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs(12))
    dpo.measure(dpo.Config(data=[data], out=str(tmp_path / "dpo.json"), updates=2, warmup=1, accumulation=1, dim=16, n_layers=1, n_heads=2, seq_len=64, threads=1), side)
    record = json.loads(capsys.readouterr().out)
    assert record["side"] == side and record["pairs_per_s"] > 0


def test_the_sft_benchmark_measures_both_kinds_of_rows_and_prints_the_ratios(tmp_path, monkeypatch, capsys):
    """Our two sides for real, on toy shapes; then a table of made-up workers: each ratio is the median of the rounds' own."""
    words = dict(data=[write_jsonl(tmp_path / "c.jsonl", chats(20))], dim=16, n_layers=1, n_heads=2, seq_len=160, batch_size=2, accumulation=2, updates=2,
                 warmup=1, threads=1, out=str(tmp_path / "sft.json"))
    tiny_tokenizer().save(tmp_path / "sft_tokenizer")
    for side in ("ours, packed", "ours, a chat a row"):
        sft.measure(sft.Config(**words), side)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert all(r["supervised_per_s"] > 0 for r in records) and records[0]["supervised_an_update"] > 1.5 * records[1]["supervised_an_update"]
    speeds = iter([900, 300, 200, 60, 10, 10])

    def worker(command, **k):
        record = {"side": command[command.index("--worker") + 1], "supervised_per_s": next(speeds), "supervised_an_update": 9, "seconds_an_update": 1,
                  "peak_rss_mb": 1}
        return types.SimpleNamespace(returncode=0, stdout=json.dumps(record))
    monkeypatch.setattr(sft.subprocess, "run", worker)
    monkeypatch.setattr(sft.importlib.metadata, "version", lambda name: "0")
    sft.main(sft.Config(**words, sides=["ours, packed", "trl, packed"], vocab_size=300, rounds=3))
    assert "| ours, packed / trl, packed | 3.00 |" in capsys.readouterr().out and STAMP <= read(tmp_path / "sft.json")["setting"].keys()
    with pytest.raises(config.UserError, match="--sides 'x' is unknown"):
        sft.main(sft.Config(**words, sides=["x"]))


def test_the_experiment_on_distillation(world, tmp_path, capsys):
    """Two seeds with and without the teacher: each arm's loss and its difference to the text alone, which differs from itself by 0."""
    teacher = str(checkpoint.save(tmp_path / "teacher", 1, tiny_lm(max_seq_len=256), tiny_tokenizer(), "pretrain", None))
    arms = ["text alone", "forward, T 1"]
    distillation.main(distillation.Config(teacher=teacher, data=str(world / "tokens"), dim=16, steps=4, seeds=2, arms=arms, out=str(tmp_path / "kd.png")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "seed by seed" in line]
    assert [line[:13].strip() for line in lines] == arms and "seed by seed 0.0000 ± 0.0000" in lines[0] and "seed by seed 0.0000 ± 0.0000" not in lines[1]
    assert (tmp_path / "kd.png").stat().st_size > 1000
