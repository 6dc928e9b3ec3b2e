#!/usr/bin/env bash
# Compares full fine-tuning, LoRA and QLoRA (with SASRec and popularity) on the same data, seed and budget: SFT, RL and
# evaluation of each, one table and one figure in $OUT. Finished runs are kept, so the same command resumes it.
#   METHODS="full lora qlora"   SEEDS=1 (3: seeds 42 to 44)   PRESET, BASE_MODEL, DATA, ...: scripts/stages.sh
#   SFT_RATES_full, _lora, _qlora: learning rates to choose from on the validation file
#   RL_RATES_full, _lora, _qlora: the rate of RL; several need an RL_FILE other than the validation file
#   TRY_SFT="--sample 4000 --num_epochs 1": choose the rate of SFT in short runs with these flags, then train with it
#   SFT_FLAGS, RL_FLAGS, EVAL_FLAGS: more flags for a stage
source "$(dirname "$0")/stages.sh"
[ $# = 0 ] || fail "takes no flags; put those of a stage into SFT_FLAGS, RL_FLAGS or EVAL_FLAGS"
rl_batch "${RL_WORDS[@]}" # refuses before anything trains
export PYTHON BASE_MODEL PRESET CATEGORY TRAIN_FILE RL_FILE EVAL_FILE TEST_FILE INFO_FILE INDEX_FILE ITEM_FILE OUT="$COMPARE_OUT"
exec "$PYTHON" scripts/compare.py
