#!/usr/bin/env bash
# Evaluates the checkpoint of a stage in $OUT: bash scripts/evaluate.sh rl --num_beams 20. Settings: scripts/stages.sh.
source "$(dirname "$0")/stages.sh"
case "${1:-}" in
sft | rl) evaluate "$OUT/$1" "${@:2}" ;;
*) fail "the first argument must be a stage: sft or rl" ;;
esac
