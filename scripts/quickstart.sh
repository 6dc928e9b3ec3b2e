#!/usr/bin/env bash
# Runs everything on the bundled demo: install, make a small base, pre-train it on text, LoRA SFT, RL, evaluation.
# OUT is the folder for the results (default out/quickstart); it must not exist yet.
source "$(dirname "$0")/setup.sh"
started=$SECONDS
DATA=examples/demo
if [ $# != 0 ]; then
    echo "quickstart.sh: error: takes no flags; set OUT=folder for another folder of results" >&2
    exit 2
fi
OUT="${OUT:-out/quickstart}"
if [ -e "$OUT" ]; then
    echo "quickstart.sh: error: $OUT exists already; remove it, or name another folder: OUT=out/again" >&2
    exit 2
fi
FILES=(--train_file $DATA/train.csv --eval_file $DATA/valid.csv --category "workshop supplies"
    --sid_index_path $DATA/demo.index.json --item_meta_path $DATA/demo.item.json)
test_on() {
    "$PYTHON" evaluate.py --base_model "$1" --info_file $DATA/info.txt --test_data_path $DATA/test.csv \
        --category "workshop supplies" --batch_size 32 --num_beams 20 --result_json_data "$2"
}

"$PYTHON" scripts/make_base.py --item_meta_path $DATA/demo.item.json --output_dir "$OUT/random" \
    --vocab_size 1024 --hidden_size 64 --num_hidden_layers 2 --intermediate_size 256
# Pre-training on titles stands in for a downloaded language model: it knows the language of the titles, and no SIDs.
"$PYTHON" sft.py --base_model "$OUT/random" --output_dir "$OUT/base" "${FILES[@]}" --train_from_scratch True \
    --tasks title_history_to_title --batch_size 32 --micro_batch_size 32 --num_epochs 1 --learning_rate 3e-3 --eval_step 0.5
"$PYTHON" sft.py --base_model "$OUT/base/final_checkpoint" --output_dir "$OUT/lora" "${FILES[@]}" --use_lora True \
    --tasks sid_history_to_sid,title_to_sid,sid_to_title \
    --batch_size 32 --micro_batch_size 32 --num_epochs 6 --learning_rate 5e-3 --eval_step 0.2
"$PYTHON" rl.py --model_path "$OUT/lora/final_checkpoint" --output_dir "$OUT/rl" "${FILES[@]}" --use_lora True \
    --info_file $DATA/info.txt --tasks sid_history_to_sid --beam_search True --reward_type ranking --beta 0.01 \
    --train_batch_size 512 --learning_rate 1e-3 --mask_all_zero True --eval_batch_size 640 --eval_step 0.5 --save_steps 0.5
test_on "$OUT/base/final_checkpoint" "$OUT/base/result.json"
test_on "$OUT/lora/final_checkpoint" "$OUT/lora/result.json"
test_on "$OUT/rl/final_checkpoint" "$OUT/rl/result.json"
"$PYTHON" scripts/table.py --train_file $DATA/train.csv --test_data_path $DATA/test.csv \
    --runs "base=$OUT/base,LoRA SFT=$OUT/lora,LoRA SFT + RL=$OUT/rl"
echo "done in $((SECONDS - started)) s after installation; checkpoints and curves are in $OUT"
