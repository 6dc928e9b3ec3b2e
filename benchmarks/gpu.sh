#!/usr/bin/env bash
# Measures on a GPU what RESULTS.md only predicts. Each part takes less than nine minutes on a card with 80 GB, needs no
# network, and writes a file OUT/PART.md: the card, the command, its output. A part with such a file is not run again.
#
#   bash benchmarks/gpu.sh out/gpu                       # all parts
#   bash benchmarks/gpu.sh out/gpu memory_7B trees       # some of them
#   TINY=1 bash benchmarks/gpu.sh out/tiny               # small models and few steps: tries the parts, also on a CPU
#
# Parts: memory_0.5B memory_1.5B memory_3B memory_7B memory_14B sft_step rl_step decode trees compare
#   DATA=folder that prepare_data.py wrote, CATEGORY=its category: for trees and compare; default is the demo
#   BASE_MODEL=folder of a pre-trained model, for compare; scripts/get_smollm2.sh writes one
#   LIMIT=520: seconds that a part may take; compare continues where it was stopped when it is started again
source "$(dirname "$0")/../scripts/setup.sh"
PARTS="memory_0.5B memory_1.5B memory_3B memory_7B memory_14B sft_step rl_step decode trees compare"
fail() {
    echo "gpu.sh: error: $1" >&2
    exit 2
}
[ $# -gt 0 ] || fail "give a folder for the results"
OUT="$1" TINY="${TINY:-}" LIMIT="${LIMIT:-520}"
shift
for part in "$@"; do [[ " $PARTS " == *" $part "* ]] || fail "there is no part $part; the parts are $PARTS"; done
[ -z "${DATA:-}" ] || [ -n "${CATEGORY:-}" ] || fail "CATEGORY is missing; name the category of DATA"
mkdir -p "$OUT"

prepared() { # sets DATA and CATEGORY, and FLAT: a folder that holds the training file, the index and the items
    if [ -z "${DATA:-}" ]; then
        DATA="$OUT/demo" CATEGORY=workshop
        [ -d "$DATA" ] || "$PYTHON" scripts/prepare_data.py --interactions examples/demo/purchases.csv \
            --items examples/demo/items.csv --output_dir "$DATA" --category "$CATEGORY" --codes 16
    fi
    FLAT="$OUT/flat"
    mkdir -p "$FLAT"
    cp "$DATA/train/$CATEGORY"*.csv "$FLAT/train.csv"
    cp "$DATA/index/$CATEGORY.index.json" "$DATA/index/$CATEGORY.item.json" "$FLAT"
}
base() { # sets BASE_MODEL, if there is none to a small model that is made here
    if [ -z "${BASE_MODEL:-}" ]; then
        BASE_MODEL="$OUT/base"
        [ -d "$BASE_MODEL" ] || "$PYTHON" scripts/make_base.py --item_meta_path "$FLAT/$CATEGORY.item.json" \
            --output_dir "$BASE_MODEL" --vocab_size 1024 --hidden_size 64 --num_hidden_layers 2 --intermediate_size 256
    fi
}
measure() { # measure command...: runs it, and says what was run
    echo "    ${*/#"$PYTHON"/python}"
    echo
    timeout "$LIMIT" "$@"
}
small=(--hidden_size 64 --num_attention_heads 4)
part() {
    case "$1" in
    memory_*)
        measure "$PYTHON" -m benchmarks.memory --sizes "${1#memory_}" ${TINY:+--methods qlora --rows 1 --tokens 16 --repeats 1} ;;
    sft_step)
        measure "$PYTHON" -m benchmarks.sft_step --rows 8 --tokens 512 --repeats 10 --methods full_response,peft,lora,lora8,qlora \
            ${TINY:+"${small[@]}" --num_hidden_layers 2 --intermediate_size 128 --vocab_size 2048 --rows 2 --tokens 32 --repeats 1} ;;
    rl_step)
        measure "$PYTHON" -m benchmarks.rl_step --hidden_size 896 --num_hidden_layers 24 --num_attention_heads 14 \
            --vocab_size 151936 --repeats 3 ${TINY:+"${small[@]}" --num_hidden_layers 1 --vocab_size 32000 --prompts 4 --prompt_tokens 16 --repeats 1} ;;
    decode)
        measure "$PYTHON" -m benchmarks.decode --repeats 5 ${TINY:+"${small[@]}" --num_hidden_layers 1 --prompts 2 --prompt_tokens 16 --large_catalogue 8000 --repeats 1} ;;
    trees)
        measure "$PYTHON" -m benchmarks.trees --data "$FLAT" --category "$CATEGORY" --num_hidden_layers 24 --rows 512 \
            --micro_batch_size 32 --repeats 3 ${TINY:+"${small[@]}" --num_key_value_heads 4 --num_hidden_layers 1 --intermediate_size 128 --vocab_size 4096 --rows 32 --repeats 1} ;;
    compare)
        export BASE_MODEL DATA CATEGORY OUT="$OUT/compare" SEEDS=1 SFT_RATES_full=3e-4 SFT_RATES_lora=3e-3 SFT_RATES_qlora=3e-3
        export RL_RATES_full=3e-6 RL_RATES_lora=1e-5 RL_RATES_qlora=1e-5
        export SFT_FLAGS="--num_epochs 3 --batch_size 64 --micro_batch_size 64 --tasks sid_history_to_sid" RL_FLAGS="--tasks sid_history_to_sid"
        export EVAL_FLAGS="--num_beams 20 --batch_size 64"
        if [ -n "$TINY" ]; then
            for split in train valid test; do head -n 65 "$DATA/$split/$CATEGORY"*.csv >"$FLAT/tiny_$split.csv"; done
            export TRAIN_FILE="$FLAT/tiny_train.csv" EVAL_FILE="$FLAT/tiny_valid.csv" TEST_FILE="$FLAT/tiny_test.csv"
            export SFT_FLAGS="$SFT_FLAGS --num_epochs 1 --batch_size 16 --micro_batch_size 16"
        fi
        measure bash scripts/compare.sh ;;
    esac
}

CARD="$("$PYTHON" -c "from benchmarks.common import machine; print(machine())")"
failed=()
for name in ${*:-$PARTS}; do
    [ ! -f "$OUT/$name.md" ] || continue
    echo "== $name"
    case "$name" in trees | compare) prepared ;; esac
    [ "$name" != compare ] || base
    { echo "# $name"; echo; echo "$CARD"; echo; } >"$OUT/$name.partial"
    if (part "$name") >>"$OUT/$name.partial" 2>"$OUT/$name.log"; then
        mv "$OUT/$name.partial" "$OUT/$name.md"
        tail -n +5 "$OUT/$name.md"
    else
        failed+=("$name")
        tail -n 5 "$OUT/$name.log"
    fi
done
[ ${#failed[@]} = 0 ] || fail "not finished: ${failed[*]}; logs are in $OUT"
