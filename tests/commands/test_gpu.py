"""SFT, RL and evaluation on a GPU, every method in new processes that see the card; skipped where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, evaluate_flags, flag_words, rl_flags, sft_flags

pytestmark = pytest.mark.skipif(not list(Path("/dev").glob("nvidia[0-9]*")), reason="needs an NVIDIA GPU")


def on_the_card(script: str, *words: str) -> str:
    """Runs a command that sees the card and returns what it printed. On standard error there are progress bars only."""
    shown = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if os.environ["MINIONEREC_CARDS"] != "all":
        shown["CUDA_VISIBLE_DEVICES"] = os.environ["MINIONEREC_CARDS"]
    command = [sys.executable, *script.split(), *words]
    settings = {"env": {**shown, "TQDM_DISABLE": "1"}, "cwd": ROOT}
    done = subprocess.run(command, **settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MatMul8bitLt" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "method",
    [{}, {"freeze_LLM": True}, {"use_lora": True}, {"use_lora": True, "load_in_8bit": True}, {"use_qlora": True}],
    ids=lambda method: "-".join(method) or "full",
)
def test_the_pipeline_runs_on_the_card(files, base, tmp_path, method):
    trained, tuned = tmp_path / "sft", tmp_path / "rl"
    out = on_the_card("sft.py", *flag_words(sft_flags(files, base, trained, learning_rate=1e-2, **method)))
    assert "token trees: a step" in out
    of_rl = {name: value for name, value in method.items() if name != "freeze_LLM"}
    out = on_the_card("rl.py", *flag_words(rl_flags(files, trained / "final_checkpoint", tuned, **of_rl)))
    assert "share a row with their prompt" in out
    for run in (trained, tuned):
        assert json.loads((run / "metrics.json").read_text())["peak_memory_gb"] > 0
        flags = evaluate_flags(files, tmp_path / "result.json", base_model=run / "final_checkpoint")
        assert "beams share the prompt's cache" in on_the_card("evaluate.py", *flag_words(flags))


def test_token_trees_have_the_losses_of_rows(tmp_path):
    shape = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {**shape, "intermediate_size": 128, "vocab_size": 4096, "rows": 32, "methods": "lora,full"}
    data = tmp_path / "data"
    demo = ROOT / "examples" / "demo"
    source = {"interactions": demo / "purchases.csv", "items": demo / "items.csv", "category": "workshop", "codes": 16}
    on_the_card("scripts/prepare_data.py", *flag_words({**source, "output_dir": data}))
    flat = tmp_path / "flat"
    flat.mkdir()
    (data / "train" / "workshop.csv").rename(flat / "train.csv")
    for kind in ("index", "item"):
        (data / "index" / f"workshop.{kind}.json").rename(flat / f"workshop.{kind}.json")
    out = on_the_card("-m benchmarks.trees", *flag_words({"data": flat, "category": "workshop", **sizes}))
    for row in json.loads(out.splitlines()[-1])["table"]:
        assert float(row["losses differ by"]) < 1e-3
