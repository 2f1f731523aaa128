"""Difficulty of rows, the files that hold it, and runs that go through phases, curricula and CLIMB's switch and can be
resumed anywhere."""
import json
import math
import re
import shutil
import types

import numpy as np
import pytest
import torch

import train_pretrain
from conftest import ROOT, metrics, options, stories, tiny_lm, tiny_tokenizer, weights
from nanollm import curriculum, dist
from nanollm.config import UserError, parse
from nanollm.corpus.bpe import train_bpe
from nanollm.corpus.pack import write_tokens
from nanollm.curriculum import difficulty, easiest_first, load_order, model_difficulty, ngram_counts, ngrams, order_of, save_order, score
from nanollm.data import TokenFile
from nanollm.losses import cross_entropy
from nanollm.mixture import Mixture, read_phases, sources_of
from nanollm.optim import get_lr
from nanollm.tokenizer import bpe_tokenizer, pattern_for
from nanollm.tools import describe, difficulty as difficulty_tool
from nanollm.world import documents


class Words:
    """A tokenizer of whole words, so that one can count by hand: id = place of the first occurrence; the last id ends documents."""
    def __init__(self, texts):
        self.words = list(dict.fromkeys(w for t in texts for w in t.split()))
        self.eos_id, self.vocab_size, self.hash = len(self.words), len(self.words) + 1, "words"

    def encode(self, text):
        return [self.words.index(w) for w in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids if i < self.eos_id)


def token_file(tmp_path, texts, T=8, rows="documents", tok=None):
    tok = tok or Words(texts)
    write_tokens(tmp_path, "train", texts, tok)
    return TokenFile(tmp_path, "train", T, rows), tok


TWO = ["The cat sat on the mat .", "The dog sat on the rug ."]


def test_an_ngram_counts_as_a_whole(tmp_path):
    """The notes' two sentences: P(The cat sat) = its count / the number of all trigrams, 1/12 here, with the end-of-text token as
    last word; P(sat on the) = 2/12. The conditional probability P(the | sat on) would be 1. None reaches over the end of a text."""
    data, tok = token_file(tmp_path, TWO)
    counts, total = ngram_counts(data, 3)
    def p(words):
        ids = [tok.words.index(w) for w in words.split()]
        key, inside = ngrams(np.array(ids), 3, tok.vocab_size, tok.eos_id)
        return counts[key[0]] / total if inside[0] else 0
    assert total == 12 and p("The cat sat") == 1 / 12 and p("sat on the") == 2 / 12 and p("cat on mat") == 0
    over_the_end = np.array([tok.words.index("."), tok.eos_id, tok.words.index("The")])
    assert not ngrams(over_the_end, 3, tok.vocab_size, tok.eos_id)[1][0]


def by_hand(data, texts, tok, measure):
    """The definitions, word by word, with dictionaries."""
    n = {"bigram": 2, "trigram": 3}.get(measure, 1)
    docs = [tok.encode(text) + [tok.eos_id] for text in texts]
    grams = [tuple(d[i : i + n]) for d in docs for i in range(len(d) - n + 1)]
    scores = []                                                              # of each token: the n-gram that ends there
    for d in docs:
        for i in range(len(d)):
            gram = tuple(d[i - n + 1 : i + 1]) if i >= n - 1 else None
            scores.append(len(d) if measure == "length" else -math.log(grams.count(gram) / len(grams)) if gram else 0.0)
    rows, size = [0.0] * len(data), [0] * len(data)
    for begin, end, row in zip(*data.spans()):
        rows[row] += sum(scores[begin:end])
        size[row] += end - begin
    return [math.exp(r / s) if measure == "unigram_perplexity" else r / s if measure == "length" else r for r, s in zip(rows, size)]


@pytest.mark.parametrize("rows", ["stream", "documents"])
@pytest.mark.parametrize("measure", ["length", "unigram", "bigram", "trigram", "unigram_perplexity"])
def test_difficulties_are_their_definitions(tmp_path, monkeypatch, measure, rows):
    """Against a word-by-word count with dictionaries, however the file is cut into chunks and shards."""
    texts = [*TWO, "a rug", "The mat sat on the cat on the dog on the rug . The end .", "on on on", "mat"]
    data, tok = token_file(tmp_path, texts, rows=rows)
    want = by_hand(data, texts, tok, measure)
    assert difficulty(data, measure).tolist() == pytest.approx(want)
    write_tokens(tmp_path, "train", texts, tok, shard_tokens=9)
    for chunk in (3, 7):
        monkeypatch.setattr(curriculum, "CHUNK", chunk)
        assert difficulty(TokenFile(tmp_path, "train", 8, rows), measure).tolist() == pytest.approx(want)


def test_hashed_counters_are_exact_enough(tmp_path, monkeypatch):
    """Where vocab_size^n exceeds the table, trigrams share counters: on 300 stories the order stays nearly the same."""
    data, _ = token_file(tmp_path, stories(300), T=32, rows="stream", tok=tiny_tokenizer())
    assert tiny_tokenizer().vocab_size ** 3 > curriculum.TABLE
    hashed = difficulty(data, "trigram")
    monkeypatch.setattr(curriculum, "TABLE", 2**26)
    exact = difficulty(data, "trigram")
    ranks = [np.argsort(np.argsort(x)) for x in (hashed, exact)]
    assert (hashed <= exact + 1e-9).all() and np.corrcoef(*ranks)[0, 1] > 0.999


def test_rows_of_one_length_stand_in_the_same_order_by_rarity_and_by_perplexity(tmp_path):
    """exp(1/n sum) grows with the sum: for windows of T tokens the two measures are one."""
    data, _ = token_file(tmp_path, stories(200), T=32, rows="stream", tok=tiny_tokenizer())
    a, b = difficulty(data, "unigram"), difficulty(data, "unigram_perplexity")
    assert np.allclose(np.exp(a / 32), b) and np.array_equal(easiest_first(a), easiest_first(b))


def test_epsilon_is_the_empirical_distribution_function():
    """The row at place k is harder than or as hard as (k + 1) / n of all; hard to easy is the same backwards."""
    values = np.array([3.0, 1.0, 2.0, 1.0])
    assert easiest_first(values).tolist() == [1, 3, 2, 0] and easiest_first(values, hardest=True).tolist() == [0, 2, 3, 1]


def test_a_low_id_is_not_a_common_word(tmp_path):
    """The notes' vocabulary curriculum takes it for one. In byte-level BPE the 256 lowest ids are bytes, most of which no text
    uses alone, and a merge made early may vanish into longer ones: ranks of id and frequency agree only faintly."""
    texts = [d.text for d in documents(600)]
    tok = bpe_tokenizer(train_bpe(texts, 600, pattern_for(600), say=None), pattern_for(600))
    data, _ = token_file(tmp_path, texts, T=32, tok=tok)
    counts = ngram_counts(data, 1)[0]
    merges = counts[256 : tok.eos_id]
    agreement = np.corrcoef(np.arange(len(merges)), np.argsort(np.argsort(-merges, kind="stable")))[0, 1]
    assert (counts[:256] == 0).mean() > 0.5 and (merges == 0).mean() > 0.1 and 0 < agreement < 0.5


# ---- a model's own perplexity, and order files ---------------------------------------------------------------------

CTX = dist.Context(0, 0, 1, torch.device("cpu"), True)
PLAIN = lambda: dist.autocast(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("rows", ["stream", "documents"])
def test_model_difficulty_is_the_mean_loss_of_each_row(tmp_path, rows):
    data, _ = token_file(tmp_path, stories(40), T=32, rows=rows, tok=tiny_tokenizer())
    model = tiny_lm()
    got = model_difficulty(model, data, CTX, PLAIN, batch_size=3)
    for r in (0, 1, len(data) - 1):
        x, y, s = data.batch([r])
        with torch.no_grad():
            loss, count, _ = cross_entropy(model(x, s), y)
        assert got[r] == pytest.approx((loss / count).item(), rel=1e-5)
    halves = [types.SimpleNamespace(device=CTX.device, sum=lambda x: x, share=dist.Context(r, r, 2, CTX.device, r == 0).share) for r in range(2)]
    assert np.array_equal(sum(model_difficulty(model, data, half, PLAIN, batch_size=3) for half in halves), got)       # what all_reduce adds up


def test_an_order_file_is_read_back_and_belongs_to_its_rows(tmp_path):
    """Computed at the start or scored before: the same order. For other rows it is refused, not misread."""
    data, tok = token_file(tmp_path, stories(60), T=32, rows="stream", tok=tiny_tokenizer())
    computed = order_of(data, "bigram")
    report = score(data, "bigram", tok)
    assert report["rows"] == len(data) and report["easiest"] != report["hardest"] and (tmp_path / report["file"]).stat().st_size == 4 * len(data)
    assert np.array_equal(order_of(data, "bigram"), computed) and np.array_equal(order_of(data, "-bigram"), computed[::-1])
    save_order(curriculum.order_path(data, "length"), easiest_first(np.zeros(len(data))), data)
    assert np.array_equal(order_of(data, "length"), np.arange(len(data)))    # the file is used, whatever it says
    write_tokens(tmp_path, "train", stories(61), tok)
    with pytest.raises(UserError, match="orders other rows"):
        order_of(TokenFile(tmp_path, "train", 32), "bigram")
    with pytest.raises(UserError, match="not there or cannot be read"):
        load_order(tmp_path / "none.u32", data)
    with pytest.raises(UserError, match="--curriculum lenght is unknown; use length, unigram"):
        order_of(data, "lenght")
    with pytest.raises(UserError, match="nanollm.tools.difficulty .* --difficulty model"):
        order_of(data, "model")


def test_the_tools_write_what_training_reads(world, tmp_path, capsys):
    """The order by the demo's base model, then a run that follows it; and a bare file of another program, described."""
    shutil.copytree(world / "tokens", tmp_path / "tokens")
    main = lambda **own: difficulty_tool.main(difficulty_tool.Config(**{"data": str(tmp_path / "tokens"), "max_seq_len": 32, "device": "cpu", **own}))
    main(difficulty="model", init_from=str(world / "base"))
    assert "rows -> order-model-stream-32.u32" in capsys.readouterr().out
    run(world, tmp_path / "out", data=str(tmp_path / "tokens"), curriculum="model", max_steps=2)
    with pytest.raises(UserError, match="needs --init_from"):
        main(difficulty="model")
    data, tok = TokenFile(world / "tokens", "train", 32), tiny_tokenizer()
    (tmp_path / "bare").mkdir()
    data.tokens[0 : len(data.tokens)].astype("<u2").tofile(tmp_path / "bare" / "train.bin")
    describe.main(describe.Config(str(tmp_path / "bare"), "train", "uint16", str(world / "tokens" / "tokenizer")))
    bare = TokenFile(tmp_path / "bare", "train", 32, tokenizer_hash=tok.hash)
    assert np.array_equal(bare.ends[:], data.ends[:]) and bare.meta["n_bytes"] == data.meta["n_bytes"]


# ---- whole runs ----------------------------------------------------------------------------------------------------

def run(world, out, **changes):
    own = {"max_steps": 8, "save_every": 1, "keep": 0, "rows": "stream", "max_seq_len": 32, "eval_batches": 1, **changes}
    train_pretrain.main(train_pretrain.Config(**{**options("pretrain", world, out), **own}))
    return metrics(out)


def resumed_at(world, straight, out, step, **changes):
    """A run that has the checkpoints up to `step` of another, and goes on to its end."""
    shutil.copytree(straight, out)
    for path in out.glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    run(world, out, resume="auto", **changes)
    return weights(out)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two sources below one directory, as tokenize leaves them, and a file of phases."""
    root, tok = tmp_path_factory.mktemp("mixed"), tiny_tokenizer()
    tok.save(root / "tokens" / "tokenizer")
    for name, texts in (("web", stories(80)), ("code", [f"for i in range({i}): print(i * {i})" for i in range(30)])):
        (root / "tokens" / name).mkdir()
        write_tokens(root / "tokens" / name, "train", texts[:-4], tok)
        write_tokens(root / "tokens" / name, "val", texts[-4:], tok)
    (root / "phases.toml").write_text("[[phase]]\nuntil = 0.6\nmix = { web = 1.0 }\n[[phase]]\nuntil = 1.0\nmix = { web = 0.25, code = 0.75 }\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("kind, steps", [("mix", (3,)), ("phases", (2, 5)), ("curriculum", (3,)), ("switch", (2, 4, 6))])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(world, mixed, tmp_path, capsys, kind, steps):
    """From before, at and behind the border of phases (sample 19 of 32, inside update 4) and the switch (update 4), although the
    order after the switch comes from the weights of that moment."""
    changes = {"mix": {"data": str(mixed / "tokens"), "mix": ["web:0.8", "code:0.2"]},
               "phases": {"data": str(mixed / "tokens"), "phases": str(mixed / "phases.toml")},
               "curriculum": {"curriculum": "unigram", "competence": "linear"},
               "switch": {"curriculum": "-unigram_perplexity", "curriculum_switch": 4}}[kind]
    run(world, tmp_path / "straight", **changes)
    printed = capsys.readouterr().out
    assert {"phases": "phase 2: samples 19 to 32 (from update 4 on)", "mix": "code: ", "switch": "step 4: the curriculum goes on"}.get(kind, "") in printed
    want = weights(tmp_path / "straight")
    for step in steps:
        got = resumed_at(world, tmp_path / "straight", tmp_path / str(step), step, **changes)
        assert all(torch.equal(got[k], want[k]) for k in want), step
    plain = {k: v for k, v in changes.items() if k == "data"} or {}
    run(world, tmp_path / "plain", **plain | ({"mix": ["web:1", "code:1"]} if plain else {}))
    assert any(not torch.equal(v, want[k]) for k, v in weights(tmp_path / "plain").items())        # the order does matter


def test_continued_pretraining_reads_old_and_new_data_in_their_shares(world, mixed, tmp_path, monkeypatch):
    """--init_from and --mix in one run: it starts from the old weights, three rows in four are new, and it resumes to the bit."""
    read, examples = {"web": 0, "code": 0}, TokenFile.examples

    def noting(self, row):
        read[self.directory.name] += self.split == "train"
        return examples(self, row)
    monkeypatch.setattr(TokenFile, "examples", noting)
    changes = {"data": str(mixed / "tokens"), "mix": ["web:1", "code:3"], "init_from": str(world / "base"), "max_seq_len": 64}
    run(world, tmp_path / "straight", **changes)
    assert read["code"] == 3 * read["web"] > 0
    want, base = weights(tmp_path / "straight"), weights(world / "base")
    assert 0 < max((want[k] - base[k]).abs().max().item() for k in want) < 0.1              # a fresh start would be as far as the weights are large
    got = resumed_at(world, tmp_path / "straight", tmp_path / "again", 4, **changes)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_the_annealing_phase_of_the_page_begins_at_the_update_where_the_rate_begins_to_fall(tmp_path):
    """The file and the command that docs/packing.md gives: the first update below the peak is the first that reads the last mix."""
    text = (ROOT / "docs" / "packing.md").read_text(encoding="utf-8").split("## Phases and annealing")[1]
    (tmp_path / "phases.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.S)[1], encoding="utf-8")
    cfg = parse(train_pretrain.Config, re.search(r"python train_pretrain.py (.*)", text)[1].split())
    phases, B = read_phases([], tmp_path / "phases.toml"), cfg.batch_size * cfg.gradient_accumulation_steps
    rates = [get_lr(step + 1, cfg.learning_rate, cfg.min_lr, cfg.warmup_steps, cfg.max_steps, cfg.schedule) for step in range(cfg.max_steps)]
    falls = next(step for step in range(cfg.warmup_steps, cfg.max_steps) if rates[step] < cfg.learning_rate)
    begins = Mixture([100] * len(sources_of(phases)), phases, cfg.max_steps * B, 0).begins[-1]
    assert falls == 7_300 and begins == falls * B
    assert phases[-2][0] == pytest.approx(0.7 + 0.3 * cfg.warmup_steps / cfg.max_steps)


def test_a_checkpoint_remembers_what_the_phases_were(mixed, tmp_path, world):
    """Not the name of the file: with other phases inside, resuming is refused."""
    changes = {"data": str(mixed / "tokens"), "phases": str(tmp_path / "phases.toml"), "max_steps": 3}
    text = (mixed / "phases.toml").read_text(encoding="utf-8")
    (tmp_path / "phases.toml").write_text(text, encoding="utf-8")
    run(world, tmp_path / "out", **changes)
    meta = json.loads((tmp_path / "out" / "step_00000002" / "meta.json").read_text(encoding="utf-8"))
    assert json.loads(meta["config"]["phases"]) == [[0.6, {"web": 1.0}], [1.0, {"web": 0.25, "code": 0.75}]]
    (tmp_path / "phases.toml").write_text(text.replace("0.75", "0.7"), encoding="utf-8")
    with pytest.raises(UserError, match="--resume: phases was"):
        run(world, tmp_path / "out", resume="auto", **changes)


def test_a_run_with_phases_cannot_be_lengthened(mixed, tmp_path, world):
    """Not even with --override_schedule: the borders are shares of the run and would move, and rows be read again."""
    changes = {"data": str(mixed / "tokens"), "phases": str(mixed / "phases.toml")}
    run(world, tmp_path / "out", **changes, max_steps=2)
    for longer in ({"max_steps": 4}, {"max_steps": 0, "epochs": 2.0}):
        with pytest.raises(UserError, match="max_steps was 2 .*with --phases use the old value"):
            run(world, tmp_path / "out", resume="auto", override_schedule=True, **changes, **longer)


@pytest.mark.parametrize("changes, says", [
    ({"curriculum": "unigram", "mix": [".:1"]}, "one data set, without --mix"), ({"curriculum_switch": 5}, "needs --curriculum"),
    ({"curriculum": "rarity"}, "is unknown"), ({"curriculum": "length", "competence": "cubic"}, "sqrt or linear"),
    ({"curriculum": "length", "competence_start": 0.0}, r"in \(0, 1\]"), ({"curriculum": "length", "competence_end": 1.5}, r"in \(0, 1\]"),
    ({"mix": ["nowhere:1"]}, "nowhere has no train token file"), ({"mix": ["web"]}, "NAME:WEIGHT")])
def test_a_plan_that_makes_no_sense_is_one_sentence(world, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        run(world, tmp_path / "out", **changes)
