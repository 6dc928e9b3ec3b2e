#!/usr/bin/env bash
# Runs RL with LoRA from $OUT/sft or MODEL_PATH. Arguments go to rl.py; settings: scripts/stages.sh.
METHOD=lora
source "$(dirname "$0")/stages.sh"
rl "$@"
