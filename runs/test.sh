#!/usr/bin/env bash
# The whole test suite. `bash runs/test.sh -m slow` runs the long proofs; further words go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/install.sh test
export PYTHONUTF8=1 HF_HUB_OFFLINE=1
python -m pytest "$@"
