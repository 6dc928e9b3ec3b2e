#!/usr/bin/env bash
# Runs RL with QLoRA from $OUT/sft or MODEL_PATH. Arguments go to rl.py; settings: scripts/stages.sh.
METHOD=qlora
source "$(dirname "$0")/stages.sh"
rl "$@"
