"""The README and the pages under docs/: commands, links and test names are real, and both languages agree."""
import functools
import importlib
import inspect
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import train_ppo
from nanollm import config, evaluation, losses, optim, rl, rollout
from nanollm.corpus import minhash
from nanollm.model import ModelArgs
from nanollm.tools import results

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ([ROOT / readme, *sorted((ROOT / docs).glob("*.md")), *sorted((ROOT / docs / "course").glob("*.md"))]
                    for readme, docs in (("README.md", "docs"), ("README_zh.md", "docs/zh")))
PAGES = ENGLISH + CHINESE
SHELL = ("", "sh", "bash", "console")
HOSTS = {"pytorch.org", "python.org", "arxiv.org"}     # homepages and papers; everything else is named in words
TOP_LEVEL = r"(?:org|com|net|io|cn|dev|co|ai|edu)"


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page):
    """[(language, text)] of the fenced code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.S | re.M)


def commands(page):
    """The command lines of the shell blocks, comments off, continued lines joined, as lists of words."""
    for language, body in blocks(page):
        if language in SHELL:
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):          # an environment variable in front
                    words = words[1:]
                if words and words[0] in ("python", "torchrun"):
                    yield words


def check(words):
    """Raises whatever is wrong (ImportError, AttributeError, UserError) with a command of ours."""
    if words[:2] == ["python", "-m"]:
        if words[2].startswith(("nanollm.", "learn.")):
            module = importlib.import_module(words[2])
            if hasattr(module, "Config"):
                config.parse(module.Config, words[3:])
        return
    at = next(i for i, word in enumerate(words) if i and word.endswith(".py"))
    module, rest = importlib.import_module(words[at].removesuffix(".py").replace("/", ".")), words[at + 1 :]
    if words[at] == "prepare_data.py":
        config.parse(getattr(module, rest[0].capitalize()), rest[1:])
    elif hasattr(module, "Config") or "/" not in words[at]:              # a benchmark may have options of another kind
        config.parse(module.Config, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_names_a_script_and_options_that_exist(page):
    """Parsed by the scripts' own rule, so a renamed flag or preset turns this red."""
    for words in commands(page):
        try:
            check(words)
        except Exception as e:
            pytest.fail(f"{page.name}: `{shlex.join(words)}`: {e!r}")


@functools.cache
def options():
    """Every option that exists anywhere: the scripts', their subcommands', the report's and the shell scripts'."""
    known = {"--smoke", "--force", "--help", "--config", "--standalone", "--nproc_per_node", "--nnodes", "--node_rank",
             "--master_addr", "--master_port", "--max_restarts", "--rdzv_backend", "--readme", "--run_dir", "--key"}
    tools = ["nanollm.plan", "nanollm.plot", "nanollm.ask", "learn.lab", "learn.site", *(f"nanollm.tools.{path.stem}" for path in (ROOT / "nanollm" / "tools").glob("[a-z]*.py"))]
    for name in [*(path.stem for path in ROOT.glob("*.py")), *tools]:
        for cls in vars(importlib.import_module(name)).values():
            if inspect.isclass(cls) and hasattr(cls, "__dataclass_fields__"):
                known |= {f"--{name}" for name in cls.__dataclass_fields__}
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_option_named_in_the_prose_exists(page):
    """`--beta` in a sentence must be an option of some script."""
    named = {m for code in re.findall(r"`([^`\n]+)`", text_of(page)) for m in re.findall(r"(?<!\S)--\w+", code)}
    unknown = {n for n in named if n.replace("--no_", "--") not in options()}
    assert not unknown, f"{page.name}: no script knows {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_test_names_resolve(page):
    """Relative links point at files; a test named as evidence exists."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: dead link {target}"
    sources = [text_of(file) for file in (ROOT / "tests").glob("test_*.py")]
    tests = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    for name in re.findall(r"`(test_\w+)`", text_of(page)):
        assert name in tests, f"{page.name}: no test is called {name}"


def test_english_and_chinese_pages_stay_in_step():
    """The same pages, headings of the same levels, code blocks (comments aside), rows of tables, links and tests."""
    assert [p.name for p in ENGLISH[1:]] == [p.name for p in CHINESE[1:]]

    def skeleton(page):
        text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)
        code = [(lang, [line.split("# ")[0].rstrip() for line in body.splitlines()]) for lang, body in blocks(page)]
        return {"headings": [len(h) for h in re.findall(r"^(#+) ", text, re.M)], "code": code,
                "rows of tables": len(re.findall(r"^\|", text, re.M)),
                "marks": re.findall(r"<!-- [\w:]+ -->", text),
                "tests": sorted(re.findall(r"`(test_\w+)`", text)),
                "links": sorted(re.sub(r".*/|_zh(?=\.md)", "", t) for t in re.findall(r"\]\(([^)\s#]+)", text))}

    for en, zh in zip(ENGLISH, CHINESE):
        for part, value in skeleton(en).items():
            assert value == skeleton(zh)[part], f"{en.name} and its Chinese page differ in their {part}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_host_but_the_allowed_and_no_machine_path_is_named(page):
    """A reader's mirror, home directory or index is his own business; of ours nothing may leak in."""
    hosts = set(re.findall(rf"\b(?:[\w-]+\.)+{TOP_LEVEL}\b", text_of(page)))
    assert hosts <= HOSTS, f"{page.name} names {sorted(hosts - HOSTS)}"
    leak = re.search(r"(?<![\w.])/(?:work|home|root|tmp|mnt|Users|usr)/\S*|[A-Z]:\\\S*", text_of(page))
    assert not leak, f"{page.name}: the machine path {leak[0]}"


def test_every_logged_metric_is_explained_on_its_page():
    """What the losses report, and the keys that every training script writes, stand in backticks in both languages."""
    pairs = torch.zeros(4), torch.zeros(4), torch.ones(4), 0.1
    _, _, of_dpo = losses.dpo_loss(*pairs)
    _, _, of_kto = losses.kto_loss(*torch.zeros(2, 2), torch.zeros(4), torch.ones(2), torch.tensor([True, False]), 0.1)
    _, _, of_rm = losses.reward_loss(torch.zeros(4, 3), torch.full((4,), 3))
    zeros, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    of_actor, of_critic = rl.ppo_policy_loss(zeros, zeros, zeros, mask)[2], rl.ppo_value_loss(zeros, zeros, zeros, mask)[2]
    batch = {"targets": mask.long(), "scores": zeros[0], "old": zeros, "ref": zeros, "ended": mask[0]}
    of_rollout = rollout.shape(batch, train_ppo.Config(), rollout.State(beta=0.1, mean=0.0, std=1.0, limit=5.0))[2]
    of_val = evaluation.reward_report(torch.zeros(2, 4, dtype=torch.float64)).keys() - of_rm.keys()
    want = {"pretrain": ["train/loss", "val/loss", "val/bits_per_byte", "lr", "grad_norm", "tokens", "tokens_per_s",
                         "samples"],
            "sft": ["train/loss", "val/loss", "val/perplexity"], "dpo": [f"train/{k}" for k in ("loss", *of_dpo, *of_kto)] + ["val/chosen_fall"],
            "reward_model": [f"train/{k}" for k in ("loss", *of_rm)] + [f"val/{k}" for k in of_val],
            "ppo": [f"train/{k}" for k in ("loss", "entropy", "updates", "beta", "explained_variance", "frac_zero_std", "value_loss", *of_actor, *of_critic, *of_rollout)],
            "distillation": ["train/ce", "train/kd"]}
    for name, keys in want.items():
        for page in (ROOT / "docs" / f"{name}.md", ROOT / "docs" / "zh" / f"{name}.md"):
            missing = [k for k in keys if f"`{k}`" not in text_of(page)]
            assert not missing, f"{page}: not explained: {missing}"


def test_numbers_quoted_in_the_pages_are_what_the_code_computes():
    """The learning-rate table, FFN widths, first losses and LSH chances, in both languages."""
    shapes = ((512, 32), (512, 256), (1024, 32), (4096, 256))
    lsh = [minhash.bands_and_rows(t, p) for t, p in ((0.4, 128), (0.6, 128), (0.85, 256), (0.7, 256))]
    quoted = {"model": [ModelArgs(dim=d, multiple_of=m, n_heads=8).ffn_dim for d, m in shapes],
              "pretrain": [f"{optim.get_lr(i, 3e-4, 1e-5, 500, 9000):.3g}" for i in (0, 250, 500, 4750, 9000, 9999)]
              + [f"{math.log(v):.2f}" for v in (512, 6400, 32006, 64793)],
              "deduplication": [f"{b} x {r}" for b, r in lsh] + [f"{minhash.candidate_probability(t + d, b, r):.3f}"
                                for t, (b, r) in zip((0.4, 0.6, 0.85, 0.7), lsh) for d in (-0.2, -0.1, 0, 0.1)]}
    for name, numbers in quoted.items():
        for page in (ROOT / "docs" / f"{name}.md", ROOT / "docs" / "zh" / f"{name}.md"):
            missing = [n for n in map(str, numbers) if n not in text_of(page)]
            assert not missing, f"{page} does not quote {missing}"


def test_the_results_table_is_the_runs_own_numbers(tmp_path):
    """Both languages, between the markers only, and writing it twice changes nothing."""
    report = {"pretrain": {"val_loss": 0.55, "entropy_floor": 0.5}, "dpo": {"win_rate": 0.8125, "win_rate_before": 0.5},
              "machine": "Plan 9, 2 CPU cores"}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    stages = [{"stage": "sft", "seconds": 9}, {"stage": "sft", "seconds": 61, "peak_rss_mb": 700.4}]
    (tmp_path / "stages.jsonl").write_text("\n".join(map(json.dumps, stages)), encoding="utf-8")
    pages = [tmp_path / "README.md", tmp_path / "README_zh.md"]
    for page in pages:
        page.write_text(f"head\n{results.BEGIN}\nold\n{results.END}\ntail\n", encoding="utf-8")
    for _ in range(2):
        results.main(results.Config(str(tmp_path), [str(p) for p in pages]))
        for page, before in zip(pages, ("itself 0.5", "它自己 0.5")):
            text = text_of(page)
            assert text.startswith("head\n") and text.endswith(f"{results.END}\ntail\n") and "old" not in text
            for part in ("0.55 ", "(+10.0 %)", f"0.8125 | {before}", "700 MB", "1:01", "Plan 9"):
                assert text.count(part) >= 1, part
    pages[0].write_text("no markers", encoding="utf-8")
    with pytest.raises(config.UserError, match="results:begin"):
        results.main(results.Config(str(tmp_path), [str(pages[0])]))
