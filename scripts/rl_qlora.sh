#!/usr/bin/env bash
# RL with QLoRA from $OUT/sft or MODEL_PATH; scripts/stages.sh lists the settings, flags of rl.py follow the command.
METHOD=qlora
source "$(dirname "$0")/stages.sh"
rl "$@"
