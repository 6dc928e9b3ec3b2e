#!/usr/bin/env bash
# Evaluates what a stage left under $OUT: bash scripts/evaluate.sh rl --num_beams 20. Settings: scripts/stages.sh.
source "$(dirname "$0")/stages.sh"
case "${1:-}" in
sft | rl) evaluate "$OUT/$1" "${@:2}" ;;
*) fail "name the stage first: sft or rl" ;;
esac
