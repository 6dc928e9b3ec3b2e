#!/usr/bin/env bash
# Runs everything on the bundled demo: install, prepare raw purchases, make a small base, pre-train it on text, LoRA SFT,
# RL, evaluation, recommendations.
# OUT is the folder for the results (default out/quickstart); it must not exist yet.
source "$(dirname "$0")/setup.sh"
started=$SECONDS
if [ $# != 0 ]; then
    echo "quickstart.sh: error: takes no flags; set OUT=folder for another folder of results" >&2
    exit 2
fi
OUT="${OUT:-out/quickstart}"
if [[ "$OUT" == *,* ]]; then
    echo "quickstart.sh: error: OUT=$OUT: must not contain a comma" >&2
    exit 2
fi
if [ -e "$OUT" ]; then
    echo "quickstart.sh: error: $OUT exists already; remove it, or name another folder: OUT=out/again" >&2
    exit 2
fi
DATA="$OUT/data" CATEGORY=workshop
INDEX=$DATA/index/$CATEGORY
FILES=(--train_file "$DATA/train/$CATEGORY.csv" --eval_file "$DATA/valid/$CATEGORY.csv" --category "$CATEGORY"
    --sid_index_path "$INDEX.index.json" --item_meta_path "$INDEX.item.json")
INFO=(--info_file "$DATA/info/$CATEGORY.txt")
TEST=(--test_data_path "$DATA/test/$CATEGORY.csv")
test_on() {
    "$PYTHON" evaluate.py --base_model "$1/final_checkpoint" "${INFO[@]}" "${TEST[@]}" --category "$CATEGORY" \
        --batch_size 32 --num_beams 20 --result_json_data "$1/result.json"
}

"$PYTHON" scripts/prepare_data.py --interactions examples/demo/purchases.csv --items examples/demo/items.csv \
    --output_dir "$DATA" --category "$CATEGORY" --codes 16
"$PYTHON" scripts/make_base.py --item_meta_path "$INDEX.item.json" --output_dir "$OUT/random" \
    --vocab_size 1024 --hidden_size 64 --num_hidden_layers 2 --intermediate_size 256
# Pre-training on titles stands in for a downloaded language model: it knows the language of the titles, and no SIDs.
"$PYTHON" sft.py --base_model "$OUT/random" --output_dir "$OUT/base" "${FILES[@]}" --train_from_scratch True \
    --tasks title_history_to_title --batch_size 32 --micro_batch_size 32 --num_epochs 1 --learning_rate 3e-3 --eval_step 0.5
"$PYTHON" sft.py --base_model "$OUT/base/final_checkpoint" --output_dir "$OUT/lora" "${FILES[@]}" --use_lora True \
    --tasks sid_history_to_sid,title_to_sid,sid_to_title \
    --batch_size 32 --micro_batch_size 32 --num_epochs 6 --learning_rate 5e-3 --eval_step 0.2
"$PYTHON" rl.py --model_path "$OUT/lora/final_checkpoint" --output_dir "$OUT/rl" "${FILES[@]}" --use_lora True \
    "${INFO[@]}" --tasks sid_history_to_sid --reward_type rule,prefix --add_gt True --sft_weight 1 --beta 0 \
    --average_weights True --num_generations 4 --train_batch_size 128 --num_train_epochs 3 --learning_rate 2e-3 \
    --eval_batch_size 640 --eval_step 0.5 --save_steps 0.5
for run in base lora rl; do test_on "$OUT/$run"; done
"$PYTHON" scripts/table.py --train_file "$DATA/train/$CATEGORY.csv" "${TEST[@]}" "${INFO[@]}" \
    --runs "base=$OUT/base,LoRA SFT=$OUT/lora,LoRA SFT + RL=$OUT/rl"
echo "for a customer who bought the items 12, 40 and 7, the model recommends:"
"$PYTHON" recommend.py --model "$OUT/rl/final_checkpoint" "${INFO[@]}" --history "12, 40, 7" --K 5
echo "done in $((SECONDS - started)) s after installation; checkpoints and curves are in $OUT"
