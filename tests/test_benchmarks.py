"""The benchmarks that run the commands on files: what they call is still there."""

import json
import os
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


def gpu(*words, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "TINY": "1", **settings},
        capture_output=True,
        text=True,
    )


def test_the_script_for_a_card_refuses_what_it_does_not_know(tmp_path):
    for words, settings, message in (
        ((), {}, "give a folder for the results"),
        ((tmp_path / "out", "tree"), {}, "there is no part tree; the parts are memory_0.5B"),
        ((tmp_path / "out", "trees"), {"DATA": "x"}, "CATEGORY is missing"),
    ):
        result = gpu(*words, **settings)
        assert result.returncode == 2 and f"gpu.sh: error: {message}" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_script_for_a_card_keeps_finished_parts(tmp_path):
    first = gpu(tmp_path, "rl_step")
    assert first.returncode == 0, first.stdout + first.stderr
    written = (tmp_path / "rl_step.md").read_text()
    assert "'threads'" in written and "python benchmarks/rl_step.py" in written and "| ReReTrainer |" in written
    again = gpu(tmp_path, "rl_step")
    assert again.returncode == 0 and again.stdout == ""
