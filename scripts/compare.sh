#!/usr/bin/env bash
# Compares full fine-tuning, LoRA and QLoRA (with SASRec and popularity) on the same data, seed and budget: SFT, RL and
# evaluation of each, one table and one figure in $OUT. Finished runs are kept, so the same command resumes it.
#   METHODS="full lora qlora"   SEEDS=1 (3: seeds 42 to 44)   PRESET, BASE_MODEL, DATA, ...: scripts/stages.sh
#   SFT_RATES_full, _lora, _qlora, RL_RATES_full, ...: learning rates to choose from on the validation file
#   TRY_SFT="--sample 4000 --num_epochs 1": choose the rate of SFT in short runs with these flags, then train with it
#   SFT_FLAGS, RL_FLAGS, EVAL_FLAGS: more flags for a stage
source "$(dirname "$0")/stages.sh"
SEEDS="${SEEDS:-1}" METHODS="${METHODS:-full lora qlora}"
OUT="$COMPARE_OUT"
[ $# = 0 ] || fail "takes no flags; put those of a stage into SFT_FLAGS, RL_FLAGS or EVAL_FLAGS"
[[ "$SEEDS" =~ ^[1-9][0-9]*$ ]] || fail "SEEDS=$SEEDS: must be a number from 1"
rl_batch ${RL_FLAGS:-}
for METHOD in $METHODS; do use_method; done
RUNS=()

best() { # prints the folder whose metrics.json has the best best_eval_...: best min|max folder...
    "$PYTHON" - "$@" <<'PY'
import json, os, sys
choose, *folders = sys.argv[1:]
metrics = {folder: json.load(open(os.path.join(folder, "metrics.json"))) for folder in folders}
values = {folder: next(m[name] for name in m if name.startswith("best_eval_")) for folder, m in metrics.items()}
print({"min": min, "max": max}[choose](values, key=values.get))
PY
}
unless_done() { # unless_done file command...
    [ -f "$1" ] || "${@:2}"
}
trained() { # trained stage folder rate seed flags...: runs a stage, or resumes it, unless it is finished
    unless_done "$2/metrics.json" "$1" --output_dir "$2" --learning_rate "$3" --seed "$4" --resume_from_checkpoint True \
        "${@:5}"
}
chosen() { # chosen stage name min|max rates flags...: trains with every rate; sets CHOSEN (folder) and RATE
    local rate folders=()
    for rate in $4; do
        trained "$1" "$OUT/$METHOD/$2_$rate" "$rate" 42 "${@:5}"
        folders+=("$OUT/$METHOD/$2_$rate")
    done
    CHOSEN="$(best "$3" "${folders[@]}")" RATE="${CHOSEN##*_}"
    echo "$METHOD $2: learning rate $RATE"
}

sasrec
RUNS+=("SASRec=$OUT/sasrec")
for METHOD in $METHODS; do
    use_method
    sft_rates="SFT_RATES_$METHOD" rl_rates="RL_RATES_$METHOD"
    sft_rates="${!sft_rates:-$DEFAULT_SFT_RATES}"
    if [ -n "${TRY_SFT:-}" ]; then
        chosen sft sft_try min "$sft_rates" ${SFT_FLAGS:-} $TRY_SFT
        sft_rates="$RATE"
    fi
    chosen sft sft min "$sft_rates" ${SFT_FLAGS:-}
    sft_rate="$RATE"
    MODEL_PATH="$CHOSEN/final_checkpoint"
    sft_runs=("$CHOSEN")
    chosen rl "rl_from_$sft_rate" max "${!rl_rates:-$DEFAULT_RL_RATES}" ${RL_FLAGS:-}
    rl_runs=("$CHOSEN")
    for seed in $(seq 43 $((41 + SEEDS))); do
        sft_runs+=("$OUT/$METHOD/sft_seed$seed") rl_runs+=("$OUT/$METHOD/rl_seed$seed")
        trained sft "$OUT/$METHOD/sft_seed$seed" "$sft_rate" "$seed" ${SFT_FLAGS:-}
        MODEL_PATH="$OUT/$METHOD/sft_seed$seed/final_checkpoint"
        trained rl "$OUT/$METHOD/rl_seed$seed" "$RATE" "$seed" ${RL_FLAGS:-}
    done
    for folder in "${sft_runs[@]}" "${rl_runs[@]}"; do
        unless_done "$folder/result.json" evaluate "$folder" ${EVAL_FLAGS:-}
    done
    RUNS+=("${sft_runs[@]/#/$METHOD SFT=}" "${rl_runs[@]/#/$METHOD SFT + RL=}")
done
# The methods, among those that ran, that the others are compared with.
AGAINST="$(for METHOD in full lora; do [[ " $METHODS " == *" $METHOD "* ]] && echo "$METHOD"; done | paste -sd, || true)"
"$PYTHON" scripts/table.py --train_file "$TRAIN_FILE" --test_data_path "$TEST_FILE" --info_file "$INFO_FILE" --intervals True \
    --runs "$(IFS=,; echo "${RUNS[*]}")" --against "$AGAINST" --figure "$OUT/compare.png" | tee "$OUT/compare.md"
