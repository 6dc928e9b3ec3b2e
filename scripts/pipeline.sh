#!/usr/bin/env bash
# Runs SFT, RL on the validation rows, the evaluation of both, and of each with SASRec, which trains in minutes:
#   METHOD=qlora PRESET=best NPROC=4 bash scripts/pipeline.sh --wandb_project recommender
# For SFT alone there are sft_lora.sh, sft_qlora.sh and evaluate.sh. Flags go to both trainings; SFT_FLAGS, RL_FLAGS and
# EVAL_FLAGS are for one stage. Settings: scripts/stages.sh.
source "$(dirname "$0")/stages.sh"
unset MODEL_PATH # RL starts from the SFT of this pipeline
said=" $* ${SFT_FLAGS:-} ${RL_FLAGS:-} ${EVAL_FLAGS:-} "
[[ ! "${said//-/_}" =~ " __"(output_dir|result_json_data)[=\ ] ]] ||
    fail "--${BASH_REMATCH[1]} is that of one stage, where the others do not look; name the folder of all: OUT=..."
dry_run='(^| )__dry_run(=[Tt][Rr][Uu][Ee]| [Tt][Rr][Uu][Ee]| __| *$)' of_rl="${RL_FLAGS:-}"
[[ ! "${of_rl//-/_}" =~ $dry_run ]] || fail "RL_FLAGS=$of_rl: trains nothing to evaluate; give the flag to rl.py"
[ ! -e "$OUT/sasrec" ] || [ -f "$OUT/sasrec/result.json" ] ||
    fail "$OUT/sasrec: has no result.json, which the table needs; remove this folder to train SASRec again"
rl_batch "$@" "${RL_WORDS[@]}" # refuses before SFT trains
check_later "$@"
sft "$@" "${SFT_WORDS[@]}"
said="$* ${SFT_FLAGS:-}"
if [[ "${said//-/_}" =~ $dry_run ]]; then
    echo "RL starts from the checkpoint of SFT, and its dry run needs one: rl.py --dry_run True"
    exit 0
fi
rl "$@" "${RL_WORDS[@]}"
# The model of SFT chooses the weight of SASRec, and the penalty of --seen_penalty auto, on the validation rows, which RL
# has learned.
evaluate "$OUT/sft" "${EVAL_WORDS[@]}"
evaluate_as "$OUT/sft/result.metrics.json" "$OUT/rl" "${EVAL_WORDS[@]}"
sasrec
evaluate "$OUT/sft" --result_json_data "$OUT/sft/blended.json" --blend "$OUT/sasrec" --eval_file "$EVAL_FILE" "${EVAL_WORDS[@]}"
evaluate_as "$OUT/sft/blended.metrics.json" "$OUT/rl" --result_json_data "$OUT/rl/blended.json" --blend "$OUT/sasrec" "${EVAL_WORDS[@]}"
"$PYTHON" scripts/table.py --train_file "$TRAIN_FILE" --test_data_path "$TEST_FILE" --info_file "$INFO_FILE" \
    --runs "SASRec=$OUT/sasrec,$METHOD SFT=$OUT/sft,$METHOD SFT + RL=$OUT/rl,$METHOD SFT with SASRec=$OUT/sft/blended.json,$METHOD SFT + RL with SASRec=$OUT/rl/blended.json"
