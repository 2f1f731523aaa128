"""The experiments run, their results are judged, and the site holds together."""
import functools
import importlib
import json
import re
import shutil
import types

import pytest
import torch

from conftest import ROOT
from learn import lab, site
from nanollm.config import UserError

EXPERIMENTS = sorted(p.stem for p in (ROOT / "learn" / "experiments").glob("[a-z]*.py"))


def config(tmp_path, **changes):
    cfg = lab.Config(**{"scale": 0.004, "seeds": 2, "out": str(tmp_path), **changes})
    cfg.name = "toy"
    return cfg


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_and_gives_the_figures_and_claims_of_its_stored_run(name, tmp_path, monkeypatch):
    """In a smoke form: a few updates instead of all. (All of them in full: python -m learn.experiments all.)"""
    monkeypatch.setattr(lab, "picture", lambda draw, path: path)
    monkeypatch.setattr(lab, "texts", functools.cache(lambda n=3000, seed=0, language="", all_of_them=lab.texts: all_of_them(min(n, 600), seed, language)))
    cfg = config(tmp_path)
    cfg.name = name
    importlib.import_module(f"learn.experiments.{name}").main(cfg)
    new, stored = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for folder in (tmp_path, lab.RESULTS))
    assert new["figures"].keys() == stored["figures"].keys() and new["claims"].keys() == stored["claims"].keys()


def test_without_a_name_the_experiments_are_listed_and_none_runs(monkeypatch, capsys):
    """A line each, with the question it asks; names run themselves, `all` runs all, with the options behind."""
    from learn.experiments import __main__ as program
    ran = []
    monkeypatch.setattr(program.subprocess, "run", lambda command: ran.append(command[2:]) or types.SimpleNamespace(returncode=0))
    monkeypatch.setattr("sys.argv", ["x"])
    program.main()
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[: len(EXPERIMENTS)]] == EXPERIMENTS and not ran
    assert "What happens without warmup?" in out and "python -m learn.experiments all" in out.splitlines()[-1]
    for words, names in ((["no_warmup", "--seeds", "1"], ["no_warmup"]), (["all", "--seeds", "1"], EXPERIMENTS)):
        monkeypatch.setattr("sys.argv", ["x", *words])
        with pytest.raises(SystemExit) as stopped:
            program.main()
        assert stopped.value.code == 0 and ran == [[f"learn.experiments.{name}", "--seeds", "1"] for name in names]
        ran.clear()
    monkeypatch.setattr("sys.argv", ["x", "--seeds", "1"])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2 and not ran and "name an experiment, or all" in capsys.readouterr().err


def test_a_run_that_differs_from_the_stored_one_is_told_and_fails(tmp_path, monkeypatch, capsys):
    """A figure further away than its error bar, a claim that turned, a figure that is new."""
    monkeypatch.setattr(lab, "RESULTS", tmp_path / "stored")
    monkeypatch.setattr(lab, "PICTURES", tmp_path / "pictures")
    finish = lambda figures, claims, **how: lab.finish(config(tmp_path, scale=1.0, **how), figures, claims)
    finish({"loss": [1.0, 1.1], "hit": 0.5}, {"it falls": True}, record=True)
    finish({"loss": [1.1, 1.2], "hit": 0.505}, {"it falls": True})
    assert "as in the stored run" in capsys.readouterr().out
    for figures, claims, said in (({"loss": [1.5, 1.6], "hit": 0.5}, {"it falls": True}, "loss is 1.55, stored 1.05"),
                                  ({"loss": [1.0, 1.1], "hit": 0.5}, {"it falls": False}, "claim: it falls"),
                                  ({"loss": [1.0, 1.1], "hat": 0.5}, {"it falls": True}, "not there: h")):
        with pytest.raises(SystemExit) as stopped:
            finish(figures, claims)
        assert stopped.value.code == 1 and said in capsys.readouterr().out


def test_only_a_whole_run_is_stored(tmp_path, monkeypatch, capsys):
    """A shortened one, or one with a figure that is no number, leaves what is stored as it was."""
    monkeypatch.setattr(lab, "RESULTS", tmp_path / "stored")
    for words in (["--scale", "0.1"], ["--seeds", "1"]):
        monkeypatch.setattr("sys.argv", ["x", "--record", "true", *words])
        with pytest.raises(SystemExit) as stopped:
            lab.start(lambda cfg: lab.finish(cfg, {"a": 1.0}, {}), "toy.py", "")
        assert stopped.value.code == 2 and "leave out --scale and --seeds" in capsys.readouterr().err
    with pytest.raises(UserError, match="not finite"):
        lab.finish(config(tmp_path, scale=1.0, record=True), {"a": [1.0, float("nan")]}, {})
    assert not (tmp_path / "stored").exists()


def test_a_folder_that_is_no_site_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="holds something else than a site"):
        site.main(site.Config(out=str(tmp_path)))
    assert (tmp_path / "mine.txt").exists()


def test_higher_means_beyond_the_noise():
    assert lab.higher([1.0, 1.1, 0.9], [0.5, 0.6, 0.4]) and not lab.higher([1.0, 2.0, 0.0], [0.9, 0.1, 1.5])


def test_the_labs_loop_learns_and_its_batches_are_those_of_the_seed():
    """Windows are shifted by one; the same seed and step give the same; a small model learns the world."""
    train_ids, val_ids, tok = lab.corpus(300, "en", 200)
    batch = lab.windows(train_ids, rows=8, length=32, seed=1)
    inputs, targets = batch(3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and torch.equal(batch(3)[0], inputs) and not torch.equal(batch(4)[0], inputs)
    model = lab.tiny(tok.vocab_size, dim=32, n_layers=1)
    before = lab.val_loss(model, val_ids)
    lab.train(model, batch, 40, warmup=5)
    assert lab.val_loss(model, val_ids) < before - 1


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "site"
    site.main(site.Config(out=str(out)))
    return out


def test_the_site_builds_without_a_loose_end_in_both_languages(built):
    """Strict, so a page left out, a dead link or a missing place is an error; and every question has its place in both."""
    for lang in ("", "zh/"):
        text = "".join((built / lang / f"questions/{p.stem}.html").read_text(encoding="utf-8") for p in sorted((ROOT / "docs" / "questions").glob("*.toml")))
        assert all(f'id="q{i}"' in text for i in range(1, 273))
        assert 'id="e94"' in (built / lang / "errata.html").read_text(encoding="utf-8")
        assert all(f'id="{name}"' in (built / lang / "experiments.html").read_text(encoding="utf-8") for name in EXPERIMENTS)


def test_nothing_on_the_site_is_fetched_from_elsewhere_and_mathematics_is_drawn_by_the_browser(built):
    for page in built.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img)\b[^>]*\bsrc="https?:', text) and not re.search(r'<link\b[^>]*rel="stylesheet"[^>]*href="https?:', text), page
        assert "arithmatex" not in text, page
    assert (built / "formulas.html").read_text(encoding="utf-8").count("<math") >= 20


def test_both_languages_can_be_searched(built):
    for lang, words in (("", ("warmup", "reward")), ("zh", ("预热", "奖励"))):
        pages = json.loads((built / lang / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
        text = "".join(page["text"] for page in pages).replace("\u200b", "")                 # with which jieba cuts words
        assert all(word in text for word in words)


def test_a_loose_end_is_found(built, tmp_path):
    copy = tmp_path / "site"
    shutil.copytree(built, copy)
    page = copy / "formulas.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", '<a href="gone.html">x</a><a href="model.html#nowhere">y</a><img src="https://a.org/x.png"></body>'), encoding="utf-8")
    said = " ".join(site.loose_ends(copy))
    assert "gone.html leads nowhere" in said and "model.html#nowhere: no such place" in said and "would fetch https://a.org/x.png" in said


def test_text_of_an_entry_shows_as_it_stands():
    """No star or underscore of a formula turns into emphasis, code in backticks stays code."""
    assert site.plain("a * b_c < d `x_y*z` [1] #2") == r"a \* b\_c &lt; d `x_y*z` \[1\] \#2"
