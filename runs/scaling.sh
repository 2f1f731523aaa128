#!/usr/bin/env bash
# A scaling law: five tiny models on the demo corpus, a fit, its prediction of a sixth model, and the truth. About five
# minutes on 2 cores. Words go on to the tool: bash runs/scaling.sh --beside 1x80 4x40 --out_dir out/depth
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/install.sh plot
export PYTHONUTF8=1
step() { stage="$1"; shift; python -m nanollm.tools.step "$stage" out/demo "$@"; }

# 1. The demo's token files, unless runs/speedrun.sh has made them.
step demo       prepare_data.py demo --out out/demo/raw --size demo
step clean      prepare_data.py clean --config configs/demo/clean.toml
step dedup      prepare_data.py dedup --config configs/demo/dedup.toml
step tokenizer  prepare_data.py tokenizer --config configs/demo/tokenizer.toml
step tokenize   prepare_data.py tokenize --config configs/demo/tokenize.toml

# 2. Train, fit, predict, check. Finished runs are not made again.
python -m nanollm.tools.scaling "$@"
