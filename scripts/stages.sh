#!/usr/bin/env bash
# Defines the paths, presets and stage functions of the pipeline scripts, which source it. Settings are environment
# variables; the arguments of a function come after its own flags, so they override them.
#
#   METHOD=lora|qlora|full   PRESET=quick|balanced|best|low_memory (low_memory: QLoRA, unless METHOD is set)
#   NPROC=1, 2, 4, 8, 16 or 32 processes, one per GPU; an optimizer step has as many rows and prompts with any of them
#   CONFIG=configs/zero2.yaml (or zero3, fsdp) to train with that engine instead of plain data parallelism
#   BASE_MODEL, CATEGORY, DATA (folder with train, valid, test, info, index), OUT (folder for results)
#   TRAIN_FILE, EVAL_FILE, TEST_FILE, INFO_FILE, INDEX_FILE, ITEM_FILE instead of the files in DATA
#   RL_FILE=$EVAL_FILE, the rows that RL learns: the newest, which SFT has not learned. With another file, RL is evaluated
#   on EVAL_FILE while it trains, and its best model is kept.
#   SFT_FLAGS, RL_FLAGS, EVAL_FLAGS: more flags of a stage, where a script runs several. A value with spaces is quoted:
#   SFT_FLAGS='--wandb_run_name "first try"'
#   Relative paths start at the root of the repository.
#   PYTHON=python to use your own environment instead of .venv
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
PRESET="${PRESET:-balanced}" NPROC="${NPROC:-1}"
[ "$PRESET" != low_memory ] || METHOD="${METHOD:-qlora}"
METHOD="${METHOD:-lora}"
CATEGORY="${CATEGORY:-Industrial_and_Scientific}" DATA="${DATA:-data/Amazon}"
BASE_MODEL="${BASE_MODEL:-Qwen/Qwen2.5-0.5B}"
COMPARE_OUT="${OUT:-output/${CATEGORY}_compare}" OUT="${OUT:-output/${CATEGORY}_${METHOD}}"

fail() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}
words() { xargs -r printf '%s\0' <<<"${!1:-}" 2>/dev/null; } # words NAME: the words of a variable, quoted as in a shell
for name in SFT_FLAGS RL_FLAGS EVAL_FLAGS; do
    words "$name" >/dev/null || fail "$name=${!name}: a quote in it is not closed"
    mapfile -t -d '' "${name%FLAGS}WORDS" < <(words "$name")
done
first() { # first folder ending setting: the file of the category, or the one that begins with it, or where it should be
    local files=("$DATA/$1/$CATEGORY"*"$2")
    [ ! -f "$DATA/$1/$CATEGORY$2" ] || files=("$DATA/$1/$CATEGORY$2")
    [ "${#files[@]}" = 1 ] || fail "${#files[@]} files begin with $DATA/$1/$CATEGORY: ${files[*]}; name one: $3=..."
    echo "${files[0]}"
}
TRAIN_FILE="${TRAIN_FILE:-$(first train .csv TRAIN_FILE)}"
EVAL_FILE="${EVAL_FILE:-$(first valid .csv EVAL_FILE)}"
TEST_FILE="${TEST_FILE:-$(first test .csv TEST_FILE)}"
INFO_FILE="${INFO_FILE:-$(first info .txt INFO_FILE)}"
INDEX_FILE="${INDEX_FILE:-$DATA/index/$CATEGORY.index.json}"
ITEM_FILE="${ITEM_FILE:-$DATA/index/$CATEGORY.item.json}"

RL_FILE="${RL_FILE:-$EVAL_FILE}"

# The flags of METHOD and PRESET, and the default learning rates; that of RL with full fine-tuning is a guess.
RL_RATE=5e-4
case "$METHOD" in
full) METHOD_FLAGS=() RL_RATE=1e-4 ;;
lora) METHOD_FLAGS=(--use_lora True) ;;
qlora) METHOD_FLAGS=(--use_qlora True) ;;
*) fail "METHOD=$METHOD: must be full, lora or qlora" ;;
esac
case "$PRESET" in
# A larger adapter wants a smaller rate, about as 1 / sqrt(r): benchmarks/RESULTS.md.
quick) SFT_RATE=2e-3 PRESET_FLAGS=(--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules qkv) ;;
balanced) SFT_RATE=1.5e-3 PRESET_FLAGS=(--lora_r 16 --lora_alpha 32 --lora_dropout 0.05 --lora_target_modules all) ;;
best) SFT_RATE=1e-3 PRESET_FLAGS=(--lora_r 32 --lora_alpha 64 --lora_dropout 0.1 --lora_target_modules all) ;;
low_memory) SFT_RATE=2e-3 PRESET_FLAGS=(--lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules qkv) ;;
*) fail "PRESET=$PRESET: must be quick, balanced, best or low_memory" ;;
esac
[ "$METHOD" != full ] || SFT_RATE=3e-4 PRESET_FLAGS=() # full fine-tuning has no adapter to configure
[ "$PRESET" != low_memory ] || PRESET_FLAGS+=(--gradient_checkpointing True)
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC: must be a number from 1"
[ -z "${CONFIG:-}" ] || [ -f "$CONFIG" ] || fail "CONFIG=$CONFIG: no such file; choose one of $(echo configs/*.yaml)"
[[ "$OUT" != *,* ]] || fail "OUT=$OUT: must not contain a comma"
FILES=(--eval_file "$EVAL_FILE" --category "$CATEGORY" --sid_index_path "$INDEX_FILE" --item_meta_path "$ITEM_FILE")

launch() {
    if [ "$NPROC" -gt 1 ]; then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" "$@"
    else
        "$PYTHON" "$@"
    fi
}
launch_training() {
    if [ -n "${CONFIG:-}" ]; then
        "$PYTHON" -m accelerate.commands.launch --config_file "$CONFIG" --num_processes "$NPROC" "$@"
    else
        launch "$@"
    fi
}
sft() {
    [ $((64 % NPROC)) = 0 ] || [[ " ${*//-/_}" =~ " __batch_size"[=\ ] ]] ||
        fail "NPROC=$NPROC: does not divide the 64 rows of an SFT step; take 1, 2, 4, 8, 16, 32 or 64, or --batch_size"
    launch_training sft.py --base_model "$BASE_MODEL" --output_dir "$OUT/sft" --train_file "$TRAIN_FILE" \
        "${FILES[@]}" --tasks sid_history_to_sid,title_to_sid --batch_size 64 --micro_batch_size auto --num_epochs 3 \
        --learning_rate "$SFT_RATE" --sid_learning_rate 3e-3 "${METHOD_FLAGS[@]}" "${PRESET_FLAGS[@]}" "$@"
}
rl_batch() { # rl_batch flags...: sets RL_BATCH; an RL step has 64 prompts with 16 completions, rl.py counts per process
    local share=$((NPROC < 1024 ? 1024 / NPROC : 1)) pass
    [ $((64 % NPROC)) = 0 ] || [[ " ${*//-/_}" =~ " __train_batch_size"[=\ ] ]] ||
        fail "NPROC=$NPROC: does not divide the 64 prompts of an RL step; take 1, 2, 4, 8, 16, 32 or 64, or --train_batch_size"
    pass=$((share < 64 ? share : 64))
    RL_BATCH=(--train_batch_size "$pass" --gradient_accumulation_steps "$((share / pass))")
}
rl() {
    local evaluations=(--eval_batch_size 128)
    [ "$RL_FILE" != "$EVAL_FILE" ] || evaluations=(--test_during_training False) # on rows that it learns they say nothing
    rl_batch "$@"
    launch_training rl.py --model_path "${MODEL_PATH:-$OUT/sft/final_checkpoint}" --output_dir "$OUT/rl" \
        --train_file "$RL_FILE" "${FILES[@]}" --info_file "$INFO_FILE" "${RL_BATCH[@]}" "${evaluations[@]}" \
        --tasks sid_history_to_sid --num_generations 16 --beam_search True --listwise True --reward_type rule \
        --mask_all_zero True --sft_weight 1 --beta 0 --num_train_epochs 3 --learning_rate "$RL_RATE" \
        "${METHOD_FLAGS[@]}" "${PRESET_FLAGS[@]}" "$@"
}
sasrec() { # trains SASRec and evaluates it, in $OUT/sasrec, unless it is there
    [ -f "$OUT/sasrec/result.json" ] || "$PYTHON" scripts/train_sasrec.py --train_file "$TRAIN_FILE" \
        --eval_file "$EVAL_FILE" --test_data_path "$TEST_FILE" --info_file "$INFO_FILE" --output_dir "$OUT/sasrec"
}
evaluate() { # evaluate folder flags...: evaluates the final checkpoint of a run
    launch evaluate.py --base_model "$1/final_checkpoint" --info_file "$INFO_FILE" --category "$CATEGORY" \
        --test_data_path "$TEST_FILE" --train_file "$TRAIN_FILE" --result_json_data "$1/result.json" \
        --batch_size auto "${@:2}"
}
evaluate_as() { # evaluate_as metrics.json folder flags...: with the penalty, and the weight of SASRec, of that evaluation
    local numbers
    numbers="$("$PYTHON" -c 'import json, sys
used = json.load(open(sys.argv[1]))
print("--seen_penalty", used.get("seen_penalty", 0))
if "blend" in used: print("--blend_weight", used["blend"]["weight"])' "$1")"
    evaluate "${@:2}" $numbers --eval_file "" # nothing is chosen on it
}
check_later() { # check_later flags...: refuses before SFT trains what RL and the evaluation would refuse after it
    local start="$OUT/sft/final_checkpoint" wrong # all but this checkpoint, which they find missing before they start
    [ ! -e "$start" ] || return 0
    wrong="$({
        # Of $NPROC processes the first: a step is that of all.
        export WORLD_SIZE="$NPROC" LOCAL_WORLD_SIZE="$NPROC" RANK=0 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=29500
        launch() { "$PYTHON" "$@"; }
        CONFIG="" rl "$@" "${RL_WORDS[@]}" --model_path "$start"
        evaluate "$OUT/sft" "${EVAL_WORDS[@]}" --base_model "$start"
    } 2>&1 >/dev/null | grep ": error: " | grep -v "/final_checkpoint: no such folder" || true)"
    [ -z "$wrong" ] || { echo "$wrong" >&2; exit 2; }
}
