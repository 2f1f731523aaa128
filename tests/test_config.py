"""One configuration rule: defaults < TOML < command line; nothing is ignored, and a slip is one sentence."""
from dataclasses import dataclass

import pytest

from nanollm.config import UserError, arg, parse, run


@dataclass
class Config:
    learning_rate: float = arg(3e-4, "peak learning rate", unit="per update")
    max_steps: int = arg(100, "length of the run")
    eval_every: int = arg(10, "validation", least=1)
    compile: bool = arg(False, "torch.compile")
    pack: bool = arg(True, "packing")
    out_dir: str = arg("out", "where files go")
    data: list = arg(["a.jsonl"], "files")


def toml(tmp_path, text):
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    return str(tmp_path / "c.toml")


def test_command_line_beats_toml_beats_default(tmp_path):
    """Each source overrides the one before, key by key, wherever --config stands."""
    path = toml(tmp_path, "learning_rate = 0.1\nmax_steps = 7\nout_dir = \"出\"\n")
    cfg = parse(Config, ["--max_steps", "9", "--config", path])
    assert (cfg.learning_rate, cfg.max_steps, cfg.out_dir, cfg.pack) == (0.1, 9, "出", True)
    assert parse(Config, []) == Config()


@pytest.mark.parametrize("words, value", [
    (["--compile"], True), (["--no_compile"], False), (["--compile=false"], False), (["--compile", "false"], False),
    (["--compile=True"], True), (["--compile", "0"], False), (["--compile", "--max_steps", "3"], True), (["--compile=on"], True)])
def test_booleans_in_all_spellings(words, value):
    assert parse(Config, words).compile is value


def test_no_prefix_switches_a_true_default_off():
    assert parse(Config, ["--no_pack"]).pack is False


def test_lists_take_several_values_and_may_be_empty(tmp_path):
    assert parse(Config, ["--data", "x", "y", "--max_steps", "2"]).data == ["x", "y"]
    assert parse(Config, ["--data=x"]).data == ["x"]
    assert parse(Config, ["--data"]).data == []
    assert parse(Config, ["--config", toml(tmp_path, 'data = ["p", "q"]')]).data == ["p", "q"]


def test_a_default_list_is_not_shared():
    parse(Config, []).data.append("z")
    assert parse(Config, []).data == ["a.jsonl"]


def test_numbers_may_be_written_by_hand():
    cfg = parse(Config, ["--max_steps", "1e6", "--learning_rate", "3e-4", "--out_dir", "-odd name"])
    assert cfg.max_steps == 1_000_000 and isinstance(cfg.max_steps, int) and cfg.out_dir == "-odd name"


@pytest.mark.parametrize("words, says", [
    (["--learnin_rate", "1"], "did you mean 'learning_rate'"),
    (["--zzz", "1"], "see --help"),
    (["--max_steps", "1.5"], "--max_steps wants int, got '1.5'"),
    (["--max_steps", "many"], "wants int"),
    (["--learning_rate", "fast"], "wants float"),
    (["--compile=perhaps"], "wants bool"),
    (["--max_steps"], "--max_steps needs a value"),
    (["stray"], "'stray' belongs to no option"),
    (["--no_max_steps"], "unknown option"),
    (["--learning_rate", "nan"], "finite"),
    (["--learning_rate=inf"], "finite"),
    (["--max_steps", "-3"], "at least 0"),
    (["--eval_every", "0"], "at least 1"),
    (["--config", "nowhere.toml"], "nowhere.toml does not exist"),
])
def test_a_slip_on_the_command_line_is_refused_in_words(words, says):
    with pytest.raises(UserError, match=says):
        parse(Config, words)


@pytest.mark.parametrize("text, says", [
    ("max_step = 3", "c.toml: unknown option 'max_step'; did you mean 'max_steps'"),
    ("max_steps = true", "wants int, got True"),
    ("max_steps = \"three\"", "wants int"),
    ("out_dir = 5", "wants str, got 5"),
    ("out_dir = [\"a\"]", "wants str"),
    ("learning_rate = [1]", "wants float"),
    ("max_steps = ", "is not a TOML file"),
])
def test_a_slip_in_the_toml_names_the_file(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        parse(Config, ["--config", toml(tmp_path, text)])


def test_help_prints_default_unit_and_reason(capsys):
    """Every field with its own three words; and --help runs nothing."""
    run(lambda cfg: pytest.fail("main ran"), Config, "What it does.", ["--help"])
    out = capsys.readouterr().out
    assert out.startswith("What it does.")
    line = next(line for line in out.splitlines() if "--learning_rate" in line)
    assert "peak learning rate" in line and "[per update]" in line and "0.0003" in line
    assert all(f"--{name}" in out for name in Config.__dataclass_fields__)


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    def main(cfg):
        raise UserError("the file is empty; give another")
    with pytest.raises(SystemExit) as stop:
        run(main, Config, "", [])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err == "error: the file is empty; give another\n"


def test_an_error_of_ours_keeps_its_traceback():
    """Only the user's mistakes are shortened: a bug must stay visible."""
    with pytest.raises(ZeroDivisionError):
        run(lambda cfg: 1 / 0, Config, "", [])


def test_a_program_may_name_the_option_of_its_first_words(tmp_path, capsys):
    """`python -m nanollm.plot OUT OUT --out X`: the words in front are --runs; and a program that reads another's preset names
    the keys that it has no use for instead of refusing them."""
    @dataclass
    class Tool:
        first = "runs"
        any_preset = True
        runs: list = arg([], "")
        out: str = arg("", "")

    assert parse(Tool, ["a", "b", "--out", "x"]) == Tool(["a", "b"], "x") == parse(Tool, ["--runs", "a", "b", "--out", "x"])
    preset = tmp_path / "p.toml"
    preset.write_text('out = "y"\nseed = 3\n', encoding="utf-8")
    assert parse(Tool, ["a", "--config", str(preset)]) == Tool(["a"], "y") and "seed play no part here" in capsys.readouterr().out
