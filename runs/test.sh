#!/usr/bin/env bash
# The whole test suite, a file at a time in each of two processes. Further words go to pytest, then in one process:
# `bash runs/test.sh -m slow` runs the long proofs.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/install.sh test
export PYTHONUTF8=1 HF_HUB_OFFLINE=1
if [ $# = 0 ]; then
    export OMP_NUM_THREADS=1                 # two processes with two threads each would wait for each other
    set -- -n 2 --dist loadfile
fi
python -m pytest "$@"
