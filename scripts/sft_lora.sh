#!/usr/bin/env bash
# Runs supervised fine-tuning with LoRA. Arguments go to sft.py; settings: scripts/stages.sh.
METHOD=lora
source "$(dirname "$0")/stages.sh"
sft "$@"
