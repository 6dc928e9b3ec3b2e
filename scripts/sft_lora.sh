#!/usr/bin/env bash
# Supervised fine-tuning with LoRA; scripts/stages.sh lists the settings, flags of sft.py follow the command.
METHOD=lora
source "$(dirname "$0")/stages.sh"
sft "$@"
