"""This machine and its versions as text to paste into a report of a problem or a table of figures.

    python -m nanollm.env

It names no user, no directory and no address.
"""
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

PACKAGES = ("numpy", "tiktoken", "sentencepiece", "datasketch", "pyarrow", "tqdm", "matplotlib", "safetensors", "tensorboard",
            "ray", "transformers", "trl", "peft", "triton")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF",
             "PYTORCH_CUDA_ALLOC_CONF", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_DEBUG", "WORLD_SIZE", "PYTHONUTF8")


def command(*words):
    """The first line that a program prints, "" if it is not there or fails."""
    try:
        text = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10).stdout
        return text.strip().splitlines()[0].strip() if text.strip() else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_model():
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.split(":", 1)[1].strip()
    return (command("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else "") or platform.processor() or platform.machine()


def native_bf16():
    """Whether the processor multiplies bf16 itself, from the flags that Linux shows; "" where the system does not tell."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        if line.startswith(("flags", "Features")):              # as x86 and ARM call them
            found = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in line.split()]
            return f", bf16 natively: {'yes (' + ', '.join(found) + ')' if found else 'no'}"
    return ""


def memory_gib():
    """(physical memory, the limit of a container or 0), both in GiB; 0 where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return 0.0, 0.0
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text(encoding="utf-8")) / 2**30
            return total, limit if limit < total else 0.0
        except (OSError, ValueError):                # no container, or "max"
            continue
    return total, 0.0


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def compiler():
    """What torch.compile would call on the CPU: the first of $CXX, g++, clang++, cl that is there, with its version."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl"):
        if name and shutil.which(name):
            return f"{Path(name).name}: {command(name, '--version') or 'there'}"
    return "none found: --compile will have no effect on the CPU"


def gpus():
    """One line for each GPU. bf16 counts as native from compute capability 8.0 on; older ones only imitate it, slowly."""
    if torch.backends.mps.is_available():
        return ["Apple GPU (MPS)"]
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        lines.append(f"{p.name}, {p.total_memory / 2**30:.1f} GiB, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
                     f"bf16 {'native' if native else 'not native: use fp16'}")
    return lines


def describe():
    """[(what, value)]"""
    total, limit = memory_gib()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    root = Path(__file__).resolve().parents[1]
    git = lambda *words: command("git", "-C", str(root), *words) if (root / ".git").exists() else ""
    commit = git("rev-parse", "--short", "HEAD")
    changed = " with local changes" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    cuda = [f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU build",
            f"cuDNN {torch.backends.cudnn.version()}" if torch.cuda.is_available() and torch.backends.cudnn.is_available() else "",
            f"driver {driver}" if (driver := command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")) else ""]
    lines = [("nanollm", f"{version('nanollm') or 'not installed, run from its directory'}{f', commit {commit}{changed}' if commit else ''}"),
             ("system", ", ".join(filter(None, [f"{platform.system()} {platform.release()}", platform.machine(), " ".join(platform.libc_ver()).strip()]))),
             ("cpu", f"{cpu_model()}, {os.cpu_count()} logical cores, {usable} usable, {torch.backends.cpu.get_cpu_capability()}"
              + native_bf16()),
             ("memory", f"{total:.1f} GiB{f', limited to {limit:.1f} GiB' if limit else ''}" if total else "unknown"),
             ("threads", f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} between operations"),
             *[(f"gpu {i}", line) for i, line in enumerate(gpus())],
             ("python", f"{platform.python_version()}, {platform.python_implementation()}"),
             ("torch", ", ".join(filter(None, [torch.__version__, *cuda, blas]))),
             ("compiler", compiler()),
             ("packages", ", ".join(f"{p} {v}" for p in PACKAGES if (v := version(p))))]
    return lines + [("variables", ", ".join(f"{k}={os.environ[k]}" for k in VARIABLES if k in os.environ) or "none set")]


def stamp():
    """Where and when a figure was measured, for the JSON of a benchmark."""
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def peak_rss_mb():
    """The largest resident memory that this process has had, in MB; None on systems that do not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():                              # getrusage would begin with what the parent had when it started us
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)      # macOS counts bytes


def main():
    for what, value in describe():
        print(f"{what:<10} {value}")


if __name__ == "__main__":
    main()
