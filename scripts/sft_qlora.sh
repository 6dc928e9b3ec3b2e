#!/usr/bin/env bash
# Runs supervised fine-tuning with QLoRA. Arguments go to sft.py; settings: scripts/stages.sh.
METHOD=qlora
source "$(dirname "$0")/stages.sh"
sft "$@"
