#!/usr/bin/env bash
# RL with LoRA from $OUT/sft or MODEL_PATH; scripts/stages.sh lists the settings, flags of rl.py follow the command.
METHOD=lora
source "$(dirname "$0")/stages.sh"
rl "$@"
