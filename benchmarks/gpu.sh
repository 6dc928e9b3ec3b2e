#!/usr/bin/env bash
# Measures on one GPU what RESULTS.md only predicts, in ten minutes of an H200. The parts come in the order of their
# worth; each needs no network, prints its table as soon as it has it, and writes OUT/PART.md: the card, the command, its
# output. A part with such a file is not run again.
#
#   bash benchmarks/gpu.sh out/gpu                        # the parts of the ten minutes
#   bash benchmarks/gpu.sh out/gpu trees memory_14B       # these
#   LIMIT=120 bash benchmarks/gpu.sh out/gpu card graphs sft rl decode sft_1.5B    # where a call must end sooner:
#   LIMIT=120 bash benchmarks/gpu.sh out/gpu rl_1.5B sft_7B trees                  # six minutes, and then four
#   PYTHON=python3 bash benchmarks/gpu.sh out/gpu         # where nothing can be installed: with its packages
#   TINY=1 bash benchmarks/gpu.sh out/tiny                # small models and few steps: tries each kind, also on a CPU
#
#   card      what the host needs to start a kernel, how fast the card computes and copies    30 s
#   graphs    passes at 0.5B, kernel by kernel and recorded as CUDA graphs                     90 s
#   sft       an SFT step at 0.5B: full, LoRA by PEFT, LoRA, QLoRA                             70 s
#   rl        an RL step at 0.5B: the original's way and ours                                  60 s
#   decode    a search for one request and for 32, against `generate`                          50 s
#   sft_1.5B  full, LoRA and QLoRA: rows/s, memory measured and predicted                      70 s
#   rl_1.5B   an RL step                                                                       70 s
#   sft_7B    LoRA and QLoRA                                                                   90 s
#   trees     steps on token trees against rows one by one                                     60 s
#   memory_0.5B memory_1.5B memory_3B memory_7B memory_14B   memory of every method; only where named
#   compare   scripts/compare.sh on the data set; only where named, and it continues where it was stopped
#
#   DATA=folder that prepare_data.py wrote, CATEGORY=its category: for trees and compare; default is the demo
#   BASE_MODEL=folder of a pre-trained model, for compare; scripts/get_smollm2.sh writes one
#   LIMIT=540: seconds that a part may take
source "$(dirname "$0")/../scripts/setup.sh"
TEN_MINUTES="card graphs sft rl decode sft_1.5B rl_1.5B sft_7B trees"
PARTS="$TEN_MINUTES memory_0.5B memory_1.5B memory_3B memory_7B memory_14B compare"
fail() {
    echo "gpu.sh: error: $1" >&2
    exit 2
}
[ $# -gt 0 ] || fail "give a folder for the results"
OUT="$1" TINY="${TINY:-}" LIMIT="${LIMIT:-540}"
[ -z "$TINY" ] || TEN_MINUTES="card graphs rl decode sft_7B" # trees and sft by their names
shift
for part in "$@"; do [[ " $PARTS " == *" $part "* ]] || fail "there is no part $part; the parts are $PARTS"; done
[ -z "${DATA:-}" ] || [ -n "${CATEGORY:-}" ] || fail "CATEGORY is missing; name the category of DATA"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 # a part that is stopped has written the rows that it had

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
measure() { # measure module flags...: runs a benchmark, and says what was run; with TINY, on a small model
    local module="$1" tiny=()
    shift
    [ -z "$TINY" ] || tiny=(${tiny_of[$module]:-})
    echo "    python -m benchmarks.$module $*${tiny:+ ${tiny[*]}}"
    echo
    timeout "$LIMIT" "$PYTHON" -m "benchmarks.$module" "$@" ${tiny:+"${tiny[@]}"}
}
small="--hidden_size 64 --num_hidden_layers 1 --num_attention_heads 4"
declare -A tiny_of=(
    [card]="--width 64 --copied 1000 --calls 20"
    [graphs]="$small --vocab_size 2048 --prompt_tokens 16 --repeats 1"
    [sft_step]="$small --num_key_value_heads 2 --intermediate_size 128 --vocab_size 2048 --rows 2 --tokens 32 --methods qlora --repeats 1"
    [rl_step]="$small --vocab_size 32000 --prompts 4 --prompt_tokens 16 --repeats 1"
    [decode]="$small --prompts 2 --prompt_tokens 16 --large_catalogue 8000 --repeats 1"
    [memory]="--sizes 0.5B --methods qlora --predict_only True"
    [trees]="$small --num_key_value_heads 4 --intermediate_size 128 --vocab_size 4096 --methods lora --rows 32 --repeats 1"
)
shape_0_5B="--hidden_size 896 --num_hidden_layers 24 --num_attention_heads 14 --vocab_size 151936"
shape_1_5B="--hidden_size 1536 --num_hidden_layers 28 --num_attention_heads 12 --vocab_size 151936"
part() {
    case "$1" in
    card) measure card ;;
    graphs) measure graphs $shape_0_5B ;;
    sft) measure sft_step --rows 8 --tokens 512 --repeats 10 --methods full_response,peft,lora,qlora ;;
    rl) measure rl_step $shape_0_5B --repeats 3 ;;
    decode)
        # `if` turns off errexit: without && only the last command would count.
        measure decode $shape_0_5B --prompts 1 --large_catalogue 100000 &&
            { [ -n "$TINY" ] || { echo && measure decode $shape_0_5B --prompts 32 --large_catalogue 100000; }; } ;;
    sft_1.5B) measure memory --sizes 1.5B --methods full_response,lora,qlora --rows 8 ;;
    rl_1.5B) measure rl_step $shape_1_5B --repeats 2 ;;
    sft_7B) measure memory --sizes 7B --methods lora,qlora --rows 4 ;;
    memory_*) measure memory --sizes "${1#memory_}" ;;
    trees)
        measure trees --data "$FLAT" --category "$CATEGORY" --num_hidden_layers 24 --rows 512 --micro_batch_size 32 --repeats 3 ;;
    compare)
        export BASE_MODEL DATA CATEGORY OUT="$OUT/compare" SEEDS=1 SFT_RATES_full=3e-4 SFT_RATES_lora=3e-3 SFT_RATES_qlora=3e-3
        export SFT_FLAGS="--num_epochs 3 --batch_size 64 --tasks sid_history_to_sid" RL_FLAGS="--tasks sid_history_to_sid"
        export EVAL_FLAGS="--num_beams 20"
        echo "    bash scripts/compare.sh"
        echo
        timeout "$LIMIT" bash scripts/compare.sh ;;
    esac
}

CARD="$("$PYTHON" -c "from benchmarks.common import machine; print(machine())")"
failed=()
for name in ${*:-$TEN_MINUTES}; do
    [ ! -f "$OUT/$name.md" ] || continue
    echo "== $name"
    case "$name" in trees | compare) prepared ;; esac
    [ "$name" != compare ] || base
    { echo "# $name"; echo; echo "$CARD"; echo; } >"$OUT/$name.partial"
    started=$SECONDS
    if (part "$name") >>"$OUT/$name.partial" 2>"$OUT/$name.log"; then
        mv "$OUT/$name.partial" "$OUT/$name.md"
        tail -n +5 "$OUT/$name.md"
        echo "== $name took $((SECONDS - started)) s"
    else
        failed+=("$name")
        tail -n 5 "$OUT/$name.log"
    fi
done
[ ${#failed[@]} = 0 ] || fail "not finished: ${failed[*]}; logs are in $OUT"
