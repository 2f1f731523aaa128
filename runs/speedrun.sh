#!/usr/bin/env bash
# The whole road, from nothing to a chat model, on a laptop CPU.
#
#   bash runs/speedrun.sh            the demo: about 6 minutes on 2 cores after installation, with PPO
#   bash runs/speedrun.sh --smoke    the same road in under a minute, to see that everything works (it learns little)
#   bash runs/speedrun.sh --force    redo every step; without it, finished steps are skipped and broken ones go on
#
# Each step prints the command it runs: copy one, change a flag, run it alone.
set -euo pipefail
cd "$(dirname "$0")/.."

PRESET=demo
FORCE=0
for word in "$@"; do
    case "$word" in
        --smoke) PRESET=smoke ;;
        --force) FORCE=1 ;;
        *) echo "error: unknown option $word; use --smoke, --force or nothing" >&2; exit 2 ;;
    esac
done
RUN="out/$PRESET"

# 1. Python, and the packages: into .venv unless an environment is active already.
source runs/install.sh ""

export PYTHONUTF8=1
if [ "$FORCE" = 1 ]; then rm -rf "$RUN"; fi
step() { stage="$1"; shift; python -m nanollm.tools.step "$stage" "$RUN" "$@"; }

# 2. Data: write the embedded world, clean it, remove near-duplicates, train a tokenizer, write token files.
step demo       prepare_data.py demo --out "$RUN/raw" --size "$PRESET"
step clean      prepare_data.py clean --config "configs/$PRESET/clean.toml"
step dedup      prepare_data.py dedup --config "configs/$PRESET/dedup.toml"
step tokenizer  prepare_data.py tokenizer --config "configs/$PRESET/tokenizer.toml"
step tokenize   prepare_data.py tokenize --config "configs/$PRESET/tokenize.toml"

# 3. Training: pretraining, supervised fine-tuning, reward model; then two ways from the SFT model on, DPO and PPO.
step pretrain   train_pretrain.py --config "configs/$PRESET/pretrain.toml" --resume auto
step sft        train_sft.py --config "configs/$PRESET/sft.toml" --resume auto
step rm         train_rm.py --config "configs/$PRESET/rm.toml" --resume auto
step dpo        train_dpo.py --config "configs/$PRESET/dpo.toml" --resume auto
step ppo        train_ppo.py --config "configs/$PRESET/ppo.toml" --resume auto

# 4. Measure every stage against the truth of the demo world, and write report.json, report.md, report.html.
step evaluate   evaluate.py --task demo --run_dir "$RUN"
step report     -m nanollm.report --run_dir "$RUN"

# 5. A few words with the result.
echo
echo "--- a chat with the result"
python chat.py --init_from "$RUN/dpo" --temperature 0 --repetition_penalty 1 --prompt \
    "What is the sum of three and four?" "请告诉我天空的颜色。" "What is the Chinese for garden?" "你会从3数到7吗？" \
    "Write a story about Anna and a dog called Max."
echo
if [ "$PRESET" = smoke ]; then echo "(the smoke road shows that every step runs; its model has hardly learnt, and the goals above are the demo's)"; fi
echo "report: $RUN/report.html"
if [ -n "${MADE_VENV:-}" ]; then echo "enter the environment:  source .venv/bin/activate"; fi
echo "talk to it yourself:    python chat.py --init_from $RUN/dpo"
