"""The benchmarks that run the commands on files: what they call is still there."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, run_command


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        pytest.param("startup", {}, marks=pytest.mark.slow),
        ("padding", {"steps": 1, "batch_size": 16, "micro_batch_size": 8}),
    ],
)
def test_a_benchmark_measures(files, base, script, flags):
    paths = {"train_file": files["train"], "sid_index_path": files["index"], "item_meta_path": files["item"]}
    if script == "startup":
        paths["eval_file"] = files["valid"]
    result = run_command(f"benchmarks/{script}.py", base_model=base, category="bolts", **paths, **flags)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["benchmark"] == script and len(record["table"]) == 2
    if script == "startup":
        phases = ("checks", "imports", "tokenizer and base", "adapter", "examples", "trainer", "first step")
        for row, cache in zip(record["table"], ("cold", "warm"), strict=True):
            assert row["cache"] == cache and all(row[phase] > 0 for phase in phases)
            assert row["all"] == pytest.approx(sum(row[phase] for phase in phases))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "results"),
    [
        ("trees", ["--methods", "lora,full"], {"speedup_lora", "speedup_full", "tokens", "nodes"}),
        ("whole_sft", ["--plain_rows", "4"], {"speedup"}),
    ],
)
def test_a_benchmark_trains_the_rows_of_a_folder(files, tmp_path, script, flags, results):
    names = {"train": "train.csv", "valid": "valid.csv", "index": "x.index.json", "item": "x.item.json"}
    for kind, name in names.items():
        shutil.copy(files[kind], tmp_path / name)
    shape = "--num_hidden_layers 1 --hidden_size 32 --num_attention_heads 2 --intermediate_size 64 --vocab_size 2048"
    sizes = "--rows 16 --micro_batch_size 4"
    argv = [f"benchmarks/{script}.py", "--data", str(tmp_path), *shape.split(), *sizes.split(), *flags]
    result = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert results <= set(record) and all(record[name] > 0 for name in results)
    if script == "trees":
        assert record["nodes"] < record["tokens"]
        assert all(float(row["losses differ by"]) < 1e-5 for row in record["table"])
