"""The rules of the house, read off the source: layers, encodings, shared blocks, sizes, presets."""
import ast
import importlib
import re
import sys
import tomllib

import pytest

from conftest import ROOT

PACKAGE = sorted((ROOT / "nanollm").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
TRAINING = sorted(ROOT.glob("train_*.py"))
ALL = [p for folder in ("", "nanollm", "tests", "bench", "learn", "runs", "examples") for p in sorted((ROOT / folder).glob("*.py" if not folder else "**/*.py"))]

# A file imports only from lower layers. config holds UserError and is below everything; peft knows the model and nothing else,
# and checkpoint needs it, so it stands between. parallel knows torch only; dist hands over to it under its flags.
LAYERS = {"config": -2, "by_hand": -2, "parallel": -1, "zero": -1, "dist": 0, "losses": 0, "foreign_tokenizers": 0, "quant": 0, "heads": 1, "model": 1, "tokenizer": 1, "optim": 1, "log": 1, "peft": 1.5, "adapter_files": 3, "rl": 1, "rollout": 3, "sampler": 0, "mixture": 1,
          "data": 2, "pairs": 2, "decode": 1.5, "generate": 2, "beam": 3, "checkpoint": 2, "hf": 2, "gguf_export": 3, "evaluation": 3, "classify": 3, "report": 3, "world": 3, "curriculum": 3, "distill": 3, "preferences": 4, "env": 1, "plot": 2, "plan": 3,
          "metrics": 0, "subjects": 0, "scoreboard": 0, "contamination": 3, "choices": 4, "demo": 5,
          "ask": 3}
CORE = {"torch", "numpy", "tiktoken", "sentencepiece", "datasketch", "pyarrow", "tqdm", "regex"}      # regex comes with tiktoken
OPTIONAL = {"matplotlib", "safetensors", "gguf", "jinja2", "trafilatura", "jieba", "ray", "tensorboard", "fastapi", "starlette", "uvicorn"}


def name(path):
    return str(path.relative_to(ROOT)).replace("\\", "/")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), name(path))


def imports(path, top_only=False):
    """Dotted names that a file imports: 'torch', 'nanollm.config', 'nanollm.corpus.bpe'."""
    module = tree(path)
    found = set()
    for node in module.body if top_only else ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}:{node.lineno} relative import; write `from nanollm.x import y`"
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module in ("nanollm", "nanollm.corpus", "nanollm.tools") else {node.module}
    return found


def rank(dotted):
    """The layer of a module of the package: corpus and tools stand beside."""
    parts = dotted.split(".")[1:]
    return parts[0] if parts[0] in ("corpus", "tools", "variants", "serve") else LAYERS.get(parts[0])


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_a_file_imports_only_from_layers_below_its_own(path):
    """The table of the design. corpus/ imports layers 0 and 1 and its siblings; tools/ and serve/ anything but scripts; so the part
    people train with can be read from the bottom up."""
    parts = path.relative_to(ROOT / "nanollm").with_suffix("").parts
    if parts == ("__init__",):
        assert not imports(path)
        return
    own = parts[0] if len(parts) > 1 and parts[0] not in LAYERS else LAYERS.get(parts[0])
    assert own is not None, f"{name(path)} has no layer: give it one in LAYERS and in the design table"
    for dotted in sorted(d for d in imports(path) if d.split(".")[0] == "nanollm"):
        layer = rank(dotted)
        if own in ("tools", "serve") or dotted.split(".")[1] == parts[0]:           # or a sibling: peft/ is one layer, its files build on lora.py
            assert layer is not None
        elif own in ("corpus", "variants"):
            assert layer == own or (isinstance(layer, int) and layer <= 1), f"{name(path)} (beside) imports {dotted}"
        elif layer == "variants":
            assert own >= 2, f"{name(path)} (layer {own}) imports {dotted}: the model knows nothing of its variants"
        elif layer == "corpus":
            assert own >= 3, f"{name(path)} (layer {own}) imports {dotted}: only layer 3 and scripts use corpus/"
        else:
            assert isinstance(layer, (int, float)) and layer < own, f"{name(path)} (layer {own}) imports {dotted} (layer {layer})"


def test_the_model_imports_torch_only():
    """So that model.py and the derivatives in by_hand.py can be carried into a notebook."""
    for stem, beside in (("model", {"nanollm.by_hand"}), ("by_hand", set())):
        assert {d if d == "nanollm.by_hand" else d.split(".")[0] for d in imports(ROOT / "nanollm" / f"{stem}.py")} - set(sys.stdlib_module_names) == {"torch"} | beside


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=name)
def test_no_file_imports_a_script(path):
    """Scripts share mechanisms through the package and their few common lines through marked blocks."""
    scripts = {p.stem for p in SCRIPTS}
    assert not {d.split(".")[0] for d in imports(path)} & scripts


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=name)
def test_core_dependencies_suffice_and_extras_are_imported_where_needed(path):
    """Top-level imports: the standard library and the seven core packages. matplotlib and safetensors inside functions,
    so that the smoke road runs without them."""
    own = {"nanollm"} | set(sys.stdlib_module_names)
    assert {d.split(".")[0] for d in imports(path, top_only=True)} - own <= CORE
    assert {d.split(".")[0] for d in imports(path)} - own <= CORE | OPTIONAL


MODULES_WITH_OPEN = {"os", "webbrowser", "tarfile", "zipfile", "Image", "urllib", "codecs"}


def encodings_missing(source):
    """Lines that open a file as text without saying how: open, gzip.open, Path.open, read_text, write_text."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        f = node.func
        called = f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ""
        owner = f.value.id if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) else ""
        if called == "open" and owner not in MODULES_WITH_OPEN:
            place = 0 if isinstance(f, ast.Attribute) and owner not in ("gzip", "bz2", "lzma", "io") else 1        # path.open(mode), open(path, mode)
            modes = [k.value for k in node.keywords if k.arg == "mode"] + node.args[place : place + 1]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None if modes else "r"
            text = mode is not None and "t" in mode if owner in ("gzip", "bz2", "lzma") else mode is None or "b" not in mode
            bad += [node.lineno] if text else []
        elif called in ("read_text", "write_text") and len(node.args) <= (called == "write_text"):
            bad.append(node.lineno)
    return bad


def test_the_encoding_lint_finds_what_it_should():
    for line in ("open(p)", "open(p, 'w')", "open(p, mode='a')", "p.open()", "p.read_text()", "p.write_text('x')", "gzip.open(p, 'rt')", "open(p, mode)"):
        assert encodings_missing(line) == [1], line
    for line in ("open(p, 'rb')", "open(p, encoding='utf-8')", "p.open('wb')", "p.read_text(encoding='utf-8')", "p.read_text('utf-8')", "gzip.open(p)",
                 "gzip.open(p, 'rb')", "os.open(p, 0)", "p.read_bytes()", "p.write_text('x', 'utf-8')", "open(p, mode='wb')"):
        assert encodings_missing(line) == [], line


@pytest.mark.parametrize("path", ALL, ids=name)
def test_every_text_file_is_opened_with_its_encoding(path):
    """Else the same script reads Chinese on Linux and garbage on Windows."""
    lines = encodings_missing(path.read_text(encoding="utf-8"))
    assert not lines, f"{name(path)}: lines {lines}: say encoding=\"utf-8\" or open in binary"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=name)
def test_no_shell_no_salted_hash(path):
    """Commands are lists (a shell is not the same everywhere); hash() of a str differs from process to process."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            assert not any(k.arg == "shell" for k in node.keywords), f"{name(path)}:{node.lineno} uses a shell"
            assert not (isinstance(node.func, ast.Name) and node.func.id == "hash"), f"{name(path)}:{node.lineno} uses hash()"
            assert not (isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "os.system"), f"{name(path)}:{node.lineno}"


BLOCK = re.compile(r"^( *)# \[shared:(\w+)\]\n(.*?)^\1# \[/shared\]$", re.DOTALL | re.MULTILINE)


def blocks(path):
    source = path.read_text(encoding="utf-8")
    found = {m[2]: m[3] for m in BLOCK.finditer(source)}
    assert source.count("# [shared:") == source.count("# [/shared]") == len(found), f"{name(path)}: a shared block is not closed or named twice"
    return found


def test_shared_blocks_are_identical_in_all_training_scripts():
    """A fix in one script cannot be forgotten in another."""
    all_blocks = {p: blocks(p) for p in TRAINING}
    for block in {b for found in all_blocks.values() for b in found}:
        have = {p: found[block] for p, found in all_blocks.items() if block in found}
        first = next(iter(have))
        for path, source in have.items():
            assert source == have[first], (
                f"the block [shared:{block}] differs between {first.name} and {path.name}. Make the same change in every script that "
                f"has it. (In a fork that goes its own way, delete the two marker comments and the block is yours.)")


def test_all_training_scripts_have_the_blocks_of_the_loop():
    for path in TRAINING:
        assert {"setup", "engine", "evaluate_and_save", "learning_rate", "update"} <= blocks(path).keys(), path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_is_short_and_importable(path):
    """At most 270 lines (prepare_data.py has a dozen commands: 320); importing it runs nothing; main(cfg), Config and a docstring
    are there."""
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= (320 if path.stem == "prepare_data" else 270)
    assert source.rstrip().splitlines()[-2].startswith('if __name__ == "__main__":') or "if __name__ ==" in source
    module = importlib.import_module(path.stem)
    assert callable(module.main) and module.__doc__
    if path in TRAINING:
        assert "run(main, Config, __doc__)" in source and module.STAGE == path.stem.removeprefix("train_")


def test_the_loop_of_a_training_script_fits_on_a_screen():
    """From `while True:` to its end in 45 lines, empty ones and comments aside."""
    for path in TRAINING:
        main = next(n for n in tree(path).body if isinstance(n, ast.FunctionDef) and n.name == "main")
        loop = next(n for n in main.body if isinstance(n, ast.While))
        lines = path.read_text(encoding="utf-8").splitlines()[loop.lineno - 1 : loop.end_lineno]
        assert sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines) <= 45, path.name


CORPUS_CORE = {"clean.py", "bpe.py", "stage.py"}       # the rest of corpus/ is what a large corpus needs: a wing


def test_the_road_stays_readable():
    """model.py at most 400 lines; what one must read to follow a text from prepare_data.py to chat.py about 3,950 lines of
    package and 2,220 of scripts; no line too wide. Aside stand the demo world, pictures, evaluation, interchange, planner, slices and
    variants; the corpus tools at scale; corpus/edits.py, the rules of cleaning, which one looks up and does not read; and
    mixture.py, distill.py and preferences.py, which only runs with their options come to; reinforcement learning; and what makes
    decoding fast or searches with beams."""
    def length(paths):
        return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths)
    assert length([ROOT / "nanollm" / "model.py"]) <= 400
    assert length(p for p in SCRIPTS if p.stem != "train_classify") <= 2220          # a wing: it trains no chat model
    aside = {"tools", "variants", "serve", "world.py", "report.py", "evaluation.py", "hf.py", "beam.py", "decode.py", "gguf_export.py", "peft", "adapter_files.py", "foreign_tokenizers.py", "curriculum.py", "distill.py", "preferences.py", "mixture.py", "parallel.py", "zero.py", "by_hand.py",
             "plan.py", "plot.py", "env.py", "rl.py", "rollout.py", "quant.py", "heads.py", "classify.py",
             "choices.py", "subjects.py", "metrics.py", "contamination.py", "scoreboard.py", "demo.py",
             "ask.py"}
    assert length(p for p in PACKAGE if not aside & set(p.relative_to(ROOT).parts) and (p.parent.name != "corpus" or p.name in CORPUS_CORE)) <= 3950
    assert all(len(line) <= 160 for p in [*PACKAGE, *SCRIPTS] for line in p.read_text(encoding="utf-8").splitlines())


def test_no_drawer_for_leftovers():
    assert not {"utils", "common", "helpers", "misc"} & {p.stem for p in PACKAGE}


PRESETS = sorted((ROOT / "configs").rglob("*.toml"))


def config_of(path):
    """The Config of the script that a preset is for: train_STEM.py, STEM.py, a subcommand of prepare_data.py, or the
    script that the preset's first comment names; a preset under configs/notes is a shape, for pretraining."""
    if path.parent.name == "notes":
        return importlib.import_module("train_pretrain").Config
    comment = re.search(r"(\w+)\.py(?: (\w+))?", path.read_text(encoding="utf-8").split("\n\n")[0])
    for stem in (f"train_{path.stem}", path.stem, comment[1] if comment else ""):
        if (ROOT / f"{stem}.py").exists():
            module = importlib.import_module(stem)
            if hasattr(module, "Config"):
                return module.Config
    module = importlib.import_module("prepare_data")
    classes = {n.lower(): c for n, c in vars(module).items() if isinstance(c, type) and hasattr(c, "__dataclass_fields__")}
    assert path.stem in classes, f"{name(path)}: which script is it for? name it in the first line's comment"
    return classes[path.stem]


@pytest.mark.parametrize("path", PRESETS, ids=name)
def test_every_key_of_a_preset_is_an_option_of_its_script(path):
    """And of the right type: parsed as the script would."""
    from nanollm.config import parse
    assert tomllib.loads(path.read_text(encoding="utf-8"))
    parse(config_of(path), ["--config", str(path)])
