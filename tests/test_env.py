"""What `python -m nanollm.env` prints."""
import contextlib
import getpass
import os
import platform
import socket
import types
from pathlib import Path

import torch

from nanollm import env


def test_the_description_names_the_machine_and_the_versions(capsys):
    env.main()
    text = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert {"nanollm", "system", "cpu", "memory", "threads", "python", "torch", "compiler", "packages", "variables"} <= lines.keys()
    assert lines["python"].startswith(platform.python_version()) and lines["torch"].startswith(torch.__version__)
    assert f"{os.cpu_count()} logical cores" in lines["cpu"] and f"{torch.get_num_threads()} in an operation" in lines["threads"]
    assert all(f"{p} " in lines["packages"] for p in ("numpy", "tiktoken", "sentencepiece", "datasketch", "pyarrow", "tqdm"))


def test_the_description_names_no_user_and_no_directory(monkeypatch, capsys, tmp_path):
    """It is made to be pasted in public."""
    monkeypatch.setenv("CXX", str(tmp_path / "secret" / "g++"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    env.main()
    text = capsys.readouterr().out
    assert str(Path.home()) not in text.replace("\n", " ") or str(Path.home()) == "/"
    assert str(env.__file__) not in text and "secret" not in text and "OMP_NUM_THREADS=1" in text
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_a_missing_program_is_no_error(monkeypatch):
    """No git, no nvidia-smi, no compiler: the lines say so or stay short."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert env.command("no-such-program", "--version") == "" and env.compiler().startswith("none found")
    assert dict(env.describe())["nanollm"]


def test_a_cpu_that_multiplies_bf16_is_told_by_its_flags(monkeypatch):
    """x86's and ARM's names; nothing is claimed where the system does not tell."""
    text = {}
    monkeypatch.setattr(env, "Path", lambda name: types.SimpleNamespace(exists=lambda: bool(text), read_text=lambda **how: text[0]))
    assert env.native_bf16() == ""
    for line, says in (("flags\t\t: fpu avx2 avx512f", "no"), ("flags\t\t: avx512_bf16 amx_bf16 amx_tile", "yes (avx512_bf16, amx_bf16)"),
                       ("Features\t: fp asimd bf16 i8mm", "yes (bf16)")):
        text[0] = f"processor\t: 0\n{line}\n"
        assert env.native_bf16() == f", bf16 natively: {says}"


def test_gpus_are_described_with_what_they_compute_in(monkeypatch):
    """A card of compute capability 7.0 only imitates bf16."""
    card = types.SimpleNamespace(name="Tesla V100", total_memory=32 * 2**30, major=7, minor=0, multi_processor_count=80)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.cuda, "device", lambda i: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert env.gpus() == ["Tesla V100, 32.0 GiB, compute capability 7.0, 80 multiprocessors, bf16 not native: use fp16"]
