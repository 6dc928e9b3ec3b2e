#!/usr/bin/env bash
# Supervised fine-tuning with QLoRA; scripts/stages.sh lists the settings, flags of sft.py follow the command.
METHOD=qlora
source "$(dirname "$0")/stages.sh"
sft "$@"
