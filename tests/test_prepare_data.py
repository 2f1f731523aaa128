"""prepare_data.py as a user meets it: whole, skipped and interrupted runs, and input that is not what it should be."""
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from nanollm import tokenizer as tokenizers
from nanollm.corpus import pack, parts

ROOT = Path(__file__).parents[1]
SENTENCES = [f"Sentence number {i} says that {i * 7919 % 10007} apples are on the table. 桌上有{i * 104729 % 9973}个苹果。"
             for i in range(300)]


def run(*argv):
    """main() with the exit code a shell would see."""
    try:
        prepare_data.main([str(a) for a in argv])
        return 0
    except SystemExit as e:
        return e.code


def corpus(path, texts=SENTENCES):
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    return path


def files(directory):
    """Content of every file but the reports, which hold times, and the sidecars, which hold when an input was written."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*"))
            if p.is_file() and not p.name.startswith("report.") and not (p.name.startswith("part-") and p.suffix == ".json")}


def tokens_of(directory, split):
    """(ids, document ends) of a split of one shard."""
    return np.fromfile(directory / f"{split}-00000.bin", "<u2").tolist(), np.fromfile(directory / f"{split}-00000.idx", "<u8").tolist()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The smoke world, prepared as the speedrun does it."""
    tmp = tmp_path_factory.mktemp("demo")
    assert run("demo", "--out", tmp / "raw", "--size", "smoke") == 0
    assert run("build", "--input", tmp / "raw" / "documents.jsonl", "--out", tmp / "data", "--vocab_size", 512,
               "--threshold", 0.85, "--bands", 32, "--rows", 8) == 0
    return tmp


def test_the_demo_loses_exactly_what_was_planted(demo):
    """Junk by reason, near copies by number, and nothing else; no clean document of the world is edited."""
    truth = json.loads((demo / "raw" / "truth.json").read_text(encoding="utf-8"))
    report = json.loads((demo / "data" / "report.json").read_text(encoding="utf-8"))
    assert report["clean"]["dropped"] == truth["clean_planted"] and report["clean"]["changed"] == 0
    assert sum(report["dedup"]["dropped"].values()) == truth["dedup_planted"] and report["dedup"]["kept"] == truth["documents"]
    assert report["tokens"]["train"]["n_docs"] + report["tokens"]["val"]["n_docs"] == truth["documents"]
    assert report["tokenizer"]["bytes_per_token"] > 1.5 and {"en", "zh"} <= set(report["tokenizer"])


def test_token_files_decode_to_the_deduplicated_documents(demo):
    """The whole way: every kept document stands in exactly one split, unharmed, and the tokenizer lies beside it."""
    tokens = demo / "data" / "tokens"
    tok, back = tokenizers.load(tokens / "tokenizer"), []
    for split in ("train", "val"):
        meta = json.loads((tokens / f"{split}.json").read_text(encoding="utf-8"))
        ids, ends = tokens_of(tokens, split)
        assert meta["tokenizer_hash"] == tok.hash
        assert meta["n_tokens"] == len(ids) and meta["n_docs"] == ids.count(tok.eos_id)
        back += [tok.decode(ids[a:b - 1]) for a, b in zip([0, *ends], ends)]
    assert sorted(back) == sorted(parts.Parts(demo / "data" / "dedup").texts())


def test_the_tokenizer_is_exported_for_other_libraries(demo):
    """OUT/tokenizer/export holds Hugging Face's file and tiktoken's ranks; both give our ids."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tokenizers import Tokenizer
    out, text = demo / "data" / "tokenizer", "Anna has 3 cats. 小明住在公园里！\n\n  两只 dogs…"
    ours = tokenizers.load(out).encode(text)
    assert Tokenizer.from_file(str(out / "export" / "tokenizer.json")).encode(text).ids == ours
    ranks = load_tiktoken_bpe(str(out / "export" / "ranks.tiktoken"))
    settings = json.loads((out / "export" / "ranks.json").read_text(encoding="utf-8"))
    assert tiktoken.Encoding(**settings, mergeable_ranks=ranks).encode_ordinary(text) == ours


def test_every_removal_is_as_similar_as_it_says(demo):
    """Checked on the texts themselves, with sets of strings; blanks, case and punctuation do not count."""
    texts = {row["id"]: row["text"] for t in parts.Parts(demo / "data" / "clean").tables(["id", "text"]) for row in t.to_pylist()}
    kept = {i for t in parts.Parts(demo / "data" / "dedup").tables(["id"]) for i in t["id"].to_pylist()}
    removed = list(parts.dropped(demo / "data" / "dedup"))
    for row in removed:
        a, b = ("".join(c for c in texts[row[key]].lower() if c.isalnum()) for key in ("id", "dup_of"))
        a, b = ({t[i:i + 5] for i in range(len(t) - 4)} for t in (a, b))
        assert row["dup_of"] in kept and row["id"] not in kept
        assert len(a & b) / len(a | b) >= 0.85 and abs(len(a & b) / len(a | b) - row["jaccard"]) < 1e-3
    assert removed and len(kept) + len(removed) == len(texts)


def test_a_finished_stage_is_skipped_until_something_changes(tmp_path, capsys):
    """Same input and settings: skipped; --force, another setting or new input: done again. Its followers go by the hash of
    what it wrote: a setting that changes no document costs them nothing."""
    raw, out = corpus(tmp_path / "raw.jsonl"), tmp_path / "out"
    build = ["build", "--input", raw, "--out", out, "--vocab_size", 400]
    assert run(*build) == 0
    before = files(out)
    capsys.readouterr()
    assert run(*build) == 0 and capsys.readouterr().out.count("skipped") == 4
    assert run(*build, "--force") == 0 and "skipped" not in capsys.readouterr().out
    assert files(out) == before                                       # and twice the same is the same, byte for byte
    assert run(*build, "--val_fraction", 0.3) == 0 and capsys.readouterr().out.count("skipped") == 3
    assert run(*build, "--val_fraction", 0.3, "--min_chars", 16) == 0 and capsys.readouterr().out.count("skipped") == 3
    corpus(raw, SENTENCES[:200])
    assert run(*build) == 0 and "skipped" not in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["tokens"]["train"]["n_docs"] <= 200


def test_build_is_its_four_stages(tmp_path):
    """One by one they give the same files."""
    raw = corpus(tmp_path / "raw.jsonl")
    assert run("build", "--input", raw, "--out", tmp_path / "a", "--vocab_size", 400) == 0
    for argv in (["clean", "--input", raw], ["dedup"], ["tokenizer", "--vocab_size", 400], ["tokenize"]):
        assert run(*argv, "--out", tmp_path / "b") == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_interrupted_stage_leaves_no_half_output(tmp_path, monkeypatch):
    """Killed between train and val: no tokens/ at all, or the old one untouched; the next run goes on to the same bytes."""
    raw, out = corpus(tmp_path / "raw.jsonl"), tmp_path / "out"
    build = ["build", "--input", raw, "--out", out, "--vocab_size", 400]
    whole = pack.save_meta

    def killed(directory, split, *rest):
        if split == "val":
            raise RuntimeError("killed")
        return whole(directory, split, *rest)

    monkeypatch.setattr(pack, "save_meta", killed)
    with pytest.raises(RuntimeError):
        run(*build)
    assert not (out / "tokens").exists()
    monkeypatch.undo()
    assert run(*build) == 0
    good = files(out)
    assert not any(".tmp" in name for name in good)
    monkeypatch.setattr(pack, "save_meta", killed)
    with pytest.raises(RuntimeError):
        run("tokenize", "--out", out, "--val_fraction", 0.5)
    assert {k: v for k, v in files(out).items() if ".tmp" not in k} == good
    monkeypatch.undo()
    assert run("build", "--input", raw, "--out", tmp_path / "straight", "--vocab_size", 400) == 0
    assert files(tmp_path / "straight") == good


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path, capsys):
    """Neither a stage nor --force may remove what a person has put there."""
    raw = corpus(tmp_path / "raw.jsonl")
    (tmp_path / "out" / "clean").mkdir(parents=True)
    (tmp_path / "out" / "clean" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "out" / "report.json").write_text('{"mine": 1}', encoding="utf-8")
    for argv in (["clean", "--input", raw], ["demo", "--size", "smoke"]):
        assert run(*argv, "--out", tmp_path / "out", "--force") == 2 and "another directory" in capsys.readouterr().err
    assert (tmp_path / "out" / "clean" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


def test_chinese_goes_by_character_where_han_run_is_one(tmp_path):
    """--han_run reaches the tokenizer that is saved: 1 keeps two Han characters out of one token, 16 does not."""
    raw = corpus(tmp_path / "raw.jsonl", ["公园里有一只猫。" + "公园很大。" * 9 + str(i) for i in range(30)])
    longest = {}
    for han_run in (1, 16):
        assert run("tokenizer", "--input", raw, "--out", tmp_path / str(han_run), "--vocab_size", 400, "--han_run", han_run) == 0
        tok = tokenizers.load(tmp_path / str(han_run) / "tokenizer")
        longest[han_run] = max(len(tok.decode([i])) for i in tok.encode("公园很大。"))
    assert longest[1] == 1 and longest[16] > 1


def test_a_foreign_tokenizer_is_used_instead_of_training(tmp_path):
    """The ids are the ones that tokenizer gives, and it is copied beside them."""
    raw, mine = corpus(tmp_path / "raw.jsonl"), tokenizers.char_tokenizer("".join(SENTENCES))
    mine.save(tmp_path / "mine")
    assert run("build", "--input", raw, "--out", tmp_path / "out", "--tokenizer", tmp_path / "mine") == 0
    assert tokenizers.load(tmp_path / "out" / "tokens" / "tokenizer").hash == mine.hash
    ids, _ = tokens_of(tmp_path / "out" / "tokens", "val")
    assert mine.decode(ids[:ids.index(mine.eos_id)]) in SENTENCES


def test_broken_rows_below_the_limit_are_reported_and_above_it_stop(tmp_path, capsys):
    """3 of 303 is within 1 %; --max_bad 0.001 is not, and the message says how many, where and why."""
    raw = corpus(tmp_path / "raw.jsonl")
    with open(raw, "a", encoding="utf-8") as f:
        f.write('{"text": "cut off\n{"txt": 1}\n[]\n')
    assert run("clean", "--input", raw, "--out", tmp_path / "out", "--max_bad", 0.001) == 2
    error = capsys.readouterr().err
    assert "3 of 303" in error and f"{raw.as_posix()}:301" in error and "broken_json" in error
    assert (tmp_path / "out" / "clean.tmp" / "quarantine.jsonl").read_text(encoding="utf-8").count("\n") == 3
    assert not (tmp_path / "out" / "clean" / "report.json").exists()
    assert run("dedup", "--out", tmp_path / "out") == 2 and "prepare_data.py clean" in capsys.readouterr().err
    assert run("clean", "--input", raw, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "quarantined 3" in out and "missing_text" in out and f"{raw.as_posix()}:301" in out
    assert run("clean", "--input", raw, "--out", tmp_path / "out", "--strict") == 3 and "--strict" in capsys.readouterr().err
    assert run("clean", "--input", raw, "--out", tmp_path / "other", "--fail_fast") == 2
    assert f"{raw.as_posix()}:301: broken_json" in capsys.readouterr().err


def bad_inputs(tmp):
    """name -> (arguments, a word the sentence must contain)."""
    def write(name, data):
        (tmp / name).write_bytes(data)
        return tmp / name

    pq.write_table(pa.table({"body": ["x"]}), tmp / "column.parquet")
    pq.write_table(pa.table({"text": SENTENCES}), tmp / "good.parquet")
    good, whole = corpus(tmp / "good.jsonl"), (tmp / "good.parquet").read_bytes()
    clean, out = ["clean", "--out", tmp / "out", "--input"], ["--out", tmp / "out"]
    assert run(*clean, good) == 0
    return {
        "no input": (clean[:-1], "--input"),
        "a path that is not there": ([*clean, tmp / "nowhere"], "does not exist"),
        "an empty file": ([*clean, write("empty.txt", b"")], "empty"),
        "blank lines only": ([*clean, write("blank.txt", b"\n\n \n")], "none of 0 documents"),
        "an unknown extension": ([*clean, write("a.docx", b"x")], "unknown extension"),
        "an empty directory": ([*clean, (tmp / "dir").mkdir() or tmp / "dir"], "nothing to read"),
        "broken JSON lines": ([*clean, write("b.jsonl", b"{\n" * 9)], "broken_json"),
        "a cut JSON list": ([*clean, write("c.json", b'[{"text": "long enough to be kept"}, {')], "unreadable_file"),
        "rows without text": ([*clean, write("d.jsonl", b'{"body": "x"}\n' * 9)], "missing_text"),
        "text that is a number": ([*clean, write("e.jsonl", b'{"text": 1}\n' * 9)], "bad_type"),
        "GBK instead of UTF-8": ([*clean, write("f.txt", "这不是UTF-8编码的文本".encode("gbk"))], "not_utf8"),
        "UTF-16": ([*clean, write("g.txt", "plain text but two bytes each".encode("utf-16"))], "not_utf8"),
        "a cut gz": ([*clean, write("h.jsonl.gz", gzip.compress(good.read_bytes())[:1500])], "unreadable_file"),
        "a gz that is none": ([*clean, write("i.txt.gz", b"hello there")], "unreadable_file"),
        "a cut parquet": ([*clean, write("j.parquet", whole[:len(whole) // 2])], "unreadable_file"),
        "a parquet without text": ([*clean, tmp / "column.parquet"], "known keys"),
        "only junk": ([*clean, write("m.txt", b"short\n!!\n")], "none of 2 documents"),
        "--doc_sep nonsense": ([*clean, good, "--doc_sep", "page"], "--doc_sep"),
        "an unknown option": ([*clean, good, "--min_char", "3"], "min_chars"),
        "an unknown command": (["cleanse"], "cleanse"),
        "--out is a file": (["clean", "--input", good, "--out", good], "good.jsonl"),
        "dedup before clean": (["dedup", "--out", tmp / "other"], "prepare_data.py clean"),
        "a shard of none": (["clean", "--out", tmp / "s", "--input", good, "--shard", "4/4"], "--shard"),
        "a runner that is none": (["dedup", *out, "--runner", "spark"], "--runner"),
        "a recipe that is none": ([*clean, good, "--recipe", "soup"], "soup"),
        "a sketch that is none": (["dedup", *out, "--sketch", "pencil"], "--sketch"),
        "decontamination of nothing": (["decontaminate", *out], "--eval_data"),
        "a scorer that is none": (["score", *out, "--scorer", "x.py:f"], "x.py"),
        "tokenizers of nothing": (["compare", "--input", good], "--tokenizer"),
        "a directory that is no stage": (["dedup", *out, "--input", tmp / "dir"], "nothing to read"),
        "a threshold of 7": (["dedup", *out, "--threshold", "7"], "--threshold"),
        "a vocabulary of 10": (["tokenizer", *out, "--vocab_size", "10"], "--vocab_size"),
        "a tokenizer that is none": (["tokenizer", *out, "--tokenizer", good], "tokenizer"),
        "tokenize without tokenizer": (["tokenize", *out], "tokenizer"),
        "--val_fraction 2": (["tokenize", *out, "--tokenizer", tmp / "tok", "--val_fraction", "2"], "--val_fraction"),
        "a demo size": (["demo", "--out", tmp / "d", "--size", "huge"], "--size"),
    }


def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, capsys):
    """And what was there before stays as it was."""
    tokenizers.char_tokenizer("abc").save(tmp_path / "tok")
    cases = bad_inputs(tmp_path)
    before = files(tmp_path / "out" / "clean")
    for name, (argv, word) in cases.items():
        capsys.readouterr()
        assert run(*argv) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and word in error, f"{name}: {error}"
        assert "Traceback" not in error and len(error) < 600, name
    assert files(tmp_path / "out" / "clean") == before and len(cases) >= 20


def test_one_long_file_says_how_to_split_it(tmp_path, capsys):
    """A single document cannot be split into training and validation."""
    rng, words = random.Random(0), "the of and to in is it cat dog house river green old new runs sleeps under over".split()
    book = [" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(300)]
    (tmp_path / "book.txt").write_text("\n".join(book), encoding="utf-8")
    build = ["build", "--input", tmp_path / "book.txt", "--out", tmp_path / "out", "--vocab_size", 400]
    assert run(*build, "--doc_sep", "file") == 2 and "--doc_sep" in capsys.readouterr().err
    assert run(*build) == 0 and "--doc_sep line" in capsys.readouterr().out


def test_the_command_line_works_in_a_c_locale(tmp_path):
    """Chinese names and texts do not need a UTF-8 terminal; --help names the commands, of each command its options."""
    (tmp_path / "中文.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}

    def shell(*argv):
        command = [sys.executable, str(ROOT / "prepare_data.py"), *argv]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)

    result = shell("clean", "--input", ".", "--out", "out")
    assert result.returncode == 0 and "kept 300" in result.stdout.decode("utf-8"), result.stderr
    assert "tokenize" in shell("--help").stdout.decode("utf-8")
    assert "--vocab_size" in shell("build", "--help").stdout.decode("utf-8")


# ---- the stages that need the whole corpus ----------------------------------------------------------------------------

WORDS = "the of and to in is it cat dog house river green old new runs sleeps under over bread water morning teacher window road".split()
HAN = "的一是在了不和有大这主中人上为们地个用工时要动国产以我到他会作来分生对于学下级就年小公园苹果老师车站"


def prose(rng, n=40):
    """A paragraph that no rule objects to, English or Chinese, unlike any other."""
    if rng.random() < 0.5:
        return " ".join((" ".join(rng.choices(WORDS, k=9)) + ".").capitalize() for _ in range(n // 4))
    return "".join("".join(rng.choices(HAN, k=12)) + "。" for _ in range(n // 2))


def test_repeated_lines_stay_in_the_first_document_only(tmp_path):
    """`sentences`: a notice that stands in 12 documents is cut from 11, and nothing else is."""
    rng, notice = random.Random(1), "版权所有，未经许可不得转载，本站保留全部权利，联系编辑部请写信到本站信箱。"
    texts = [prose(rng) + (f"\n{notice}" if i % 5 == 0 else "") for i in range(60)]
    assert run("sentences", "--input", corpus(tmp_path / "raw.jsonl", texts), "--out", tmp_path / "out") == 0
    left = list(parts.Parts(tmp_path / "out" / "sentences").texts())
    assert left == [texts[0], *[t.removesuffix(f"\n{notice}") for t in texts[1:]]]


@pytest.mark.parametrize("by", ["tfidf", "commonness"])
def test_what_is_like_others_weighs_less_and_is_thinned(tmp_path, by):
    """`weigh`: of 40 copies of one text with a change each most go, of 60 texts of their own hardly any; without --thin all stay."""
    rng = random.Random(2)
    base = [prose(rng, 60) for _ in range(60)]
    texts = base + [base[0][:-20] + prose(rng, 8)[:20] for _ in range(40)]
    raw = corpus(tmp_path / "raw.jsonl", texts)
    assert run("weigh", "--input", raw, "--out", tmp_path / "out", "--by", by) == 0
    left = set(parts.Parts(tmp_path / "out" / "weigh").texts())
    assert len(left & set(texts[60:])) < 25 and (by == "commonness" or len(left & set(base)) > 55)
    assert run("weigh", "--input", raw, "--out", tmp_path / "all", "--by", by, "--no_thin") == 0
    rows = [row for t in parts.Parts(tmp_path / "all" / "weigh").tables(["weight"]) for row in t["weight"].to_pylist()]
    assert len(rows) == 100 and np.mean(rows[60:]) < np.mean(rows[:60])


def test_noise_is_an_outlier_by_its_perplexity(tmp_path):
    """`outliers`: of 300 documents 3 are random characters; just these have a perplexity above the 99th percentile."""
    rng = random.Random(3)
    texts = [prose(rng) for _ in range(300)]
    for i in (50, 150, 250):
        texts[i] = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(240))
    assert run("outliers", "--input", corpus(tmp_path / "raw.jsonl", texts), "--out", tmp_path / "out", "--sigmas", 0, "--ppl_low", 0) == 0
    gone = list(parts.dropped(tmp_path / "out" / "outliers"))
    assert {int(row["id"].rsplit(":", 1)[1]) - 1 for row in gone} == {50, 150, 250} and {r["drop_reason"] for r in gone} == {"perplexity_high"}


def test_an_exam_question_is_found_in_the_corpus_and_cut_out(tmp_path, capsys):
    """`decontaminate`: with other case, blanks and punctuation; the report names the test, and what is left lacks the question."""
    rng = random.Random(4)
    (tmp_path / "exam.csv").write_text(",Question,A,B,C,D,Answer\n0,在标准大气压下把两千克的水从二十度加热到沸腾需要多少热量,一,二,三,四,B\n"
                                       "1,Which of the seven rivers of the old country runs north through the green valley,Ada,Bel,Cor,Dun,A\n", encoding="utf-8")
    texts = [prose(rng, 120) for _ in range(30)]
    texts[7] = texts[7] + "在 标准大气压下，把两千克的水从二十度加热到沸腾，需要多少热量？" + texts[8]
    texts[9] = texts[9] + " WHICH of the seven rivers of the old country runs north, through the green valley? " + texts[10]
    assert run("decontaminate", "--input", corpus(tmp_path / "raw.jsonl", texts), "--out", tmp_path / "out", "--eval_data", tmp_path / "exam.csv") == 0
    left = list(parts.Parts(tmp_path / "out" / "decontaminate").texts())
    assert "exam: 2 of 2 items found" in capsys.readouterr().out
    assert not any("沸腾" in t or "seven rivers" in t for t in left) and sum(a == b for a, b in zip(left, texts)) == 28


def test_a_score_of_your_own_decides(tmp_path):
    """`score`: a function of a file of yours fills the column quality, and documents below --threshold go."""
    (tmp_path / "mine.py").write_text("def english(text):\n    return float(text.isascii())\n", encoding="utf-8")
    rng = random.Random(5)
    texts = [prose(rng) for _ in range(40)]
    assert run("score", "--input", corpus(tmp_path / "raw.jsonl", texts), "--out", tmp_path / "out", "--scorer", f"{tmp_path / 'mine.py'}:english",
               "--select", "threshold") == 0
    assert list(parts.Parts(tmp_path / "out" / "score").texts()) == [t for t in texts if t.isascii()]


def test_chats_and_pairs_come_out_as_they_went_in(tmp_path):
    """clean and dedup look at their text, `export` gives them back in the form that train_sft.py and train_dpo.py read."""
    rng = random.Random(6)
    chats = [{"conversations": [{"from": "human", "value": f"问题{i}：" + prose(rng, 8)}, {"from": "gpt", "value": prose(rng)}]} for i in range(20)]
    pairs = [{"prompt": f"Question {i}? " + prose(rng, 8), "chosen": prose(rng), "rejected": prose(rng)} for i in range(10)]
    raw = tmp_path / "mixed.jsonl"
    raw.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*chats, *pairs, chats[3]]), encoding="utf-8")
    assert run("clean", "--input", raw, "--out", tmp_path / "out", "--recipe", "chat") == 0 and run("dedup", "--out", tmp_path / "out") == 0
    assert run("export", "--out", tmp_path / "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "dedup" / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["messages"][1]["content"] for row in rows[:20]] == [chat["conversations"][1]["value"] for chat in chats]
    assert [(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in rows[20:]] == [tuple(pair.values()) for pair in pairs]


def test_a_stage_made_from_what_has_changed_since_is_not_read(tmp_path, capsys):
    """clean anew with other input, then tokenizer: dedup is of yesterday's documents, and that is said."""
    assert run("clean", "--input", corpus(tmp_path / "a.jsonl"), "--out", tmp_path / "out") == 0 and run("dedup", "--out", tmp_path / "out") == 0
    assert run("clean", "--input", corpus(tmp_path / "b.jsonl", SENTENCES[:100]), "--out", tmp_path / "out") == 0
    assert run("tokenizer", "--out", tmp_path / "out", "--vocab_size", 400) == 2 and "prepare_data.py dedup" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_build_killed_at_twenty_random_moments_leaves_the_same_bytes(tmp_path):
    """The real road, kill -9 of all its processes: clean, dedup, tokenizer and tokens end as in a run without a kill. The kills
    fall into the work: of twenty at least ten find a stage begun and not ended."""
    rng = random.Random(7)
    raw = corpus(tmp_path / "raw.jsonl", [prose(rng, 60) for _ in range(6000)])
    command = [sys.executable, str(ROOT / "prepare_data.py"), "build", "--input", str(raw), "--vocab_size", "600", "--workers", "2", "--out"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env}
    began = time.time()
    subprocess.run([*command, str(tmp_path / "straight")], check=True, **quiet)
    whole, inside = time.time() - began, 0
    for _ in range(20):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], start_new_session=True, **quiet)
        time.sleep(rng.uniform(0.1, 0.9) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        inside += bool(list((tmp_path / "killed").glob("*.tmp")) + list((tmp_path / "killed").glob("*.work")))
        if (tmp_path / "killed" / "tokens").exists():     # it came to its end: begin anew
            shutil.rmtree(tmp_path / "killed")
    subprocess.run([*command, str(tmp_path / "killed")], check=True, **quiet)
    assert inside >= 10 and files(tmp_path / "killed") == files(tmp_path / "straight")
