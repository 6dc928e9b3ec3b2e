"""The benchmarks that run the commands on files: what they call is still there."""

import json

import pytest
from helpers import run_command


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
def test_a_server_under_load_answers_as_the_batch_command(files, sft_run):
    pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
    flags = {"model": sft_run("lora") / "final_checkpoint", "info_file": files["info"], "histories": files["test"]}
    result = run_command("benchmarks/serve.py", **flags, requests=12, clients=4, batch_size=4, num_beams=10)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    for row in record["table"]:
        assert row["lost"] == row["wrong"] == 0 and 0 < row["p50 (ms)"] <= row["p99 (ms)"]
