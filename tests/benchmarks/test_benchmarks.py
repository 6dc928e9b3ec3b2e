"""The benchmarks that run the commands on files: what they call is still there."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, run_command, succeed
from processes import quick_python, start_fork_server

from benchmarks import common
from benchmarks.counting import as_on_gpu
from benchmarks.fixtures import set_up
from minionerec.data.prompts import load_prompts
from minionerec.model import graphs
from minionerec.training.sft_trainer import step_order
from minionerec.training.tree_batches import Prefixes, TreeBatches


@pytest.fixture
def quick(monkeypatch):
    """What a benchmark starts is a fork of a process that has imported the libraries."""
    start_fork_server()  # the benchmarks' own would have imported less than the tests after these need
    monkeypatch.setattr(sys, "executable", quick_python())
    monkeypatch.setattr(common, "in_fresh_process", common.in_fork)


@pytest.mark.slow
def test_the_phases_of_a_start_add_up(files, base, quick):
    paths = {"train_file": files["train"], "sid_index_path": files["index"], "item_meta_path": files["item"]}
    paths["eval_file"] = files["valid"]
    result = succeed("benchmarks/startup.py", base_model=base, category="bolts", **paths)
    record = json.loads(result.stdout.splitlines()[-1])
    phases = ("checks", "imports", "tokenizer and base", "adapter", "examples", "trainer", "first step")
    for row, cache in zip(record["table"], ("cold", "warm"), strict=True):
        assert row["cache"] == cache and all(row[phase] > 0 for phase in phases)
        assert row["all"] == pytest.approx(sum(row[phase] for phase in phases))


def test_what_bounds_a_machine_is_measured():
    result = succeed("benchmarks/card.py", width=64, copied=1000, calls=20)
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["tflops"] > 0 and record["tb_per_second"] > 0
    assert len(record["host"]) == 6 and all(row["host (us)"] > 0 for row in record["host"])


@pytest.mark.slow
def test_a_server_under_load_answers_as_the_batch_command(files, sft_run, quick):
    for package in ("fastapi", "prometheus_client"):
        pytest.importorskip(package, reason="pip install fastapi uvicorn prometheus-client")
    flags = {"model": sft_run("lora") / "final_checkpoint", "info_file": files["info"], "histories": files["test"]}
    result = succeed("benchmarks/serve.py", **flags, requests=12, clients=4, batch_size=4, num_beams=10)
    record = json.loads(result.stdout.splitlines()[-1])
    for row in record["table"]:
        assert row["lost"] == row["wrong"] == 0 and 0 < row["p50 (ms)"] <= row["p99 (ms)"]


def test_what_sasrec_costs_is_measured(files, sft_run, tmp_path):
    paths = {"train_file": files["train"], "eval_file": files["valid"], "info_file": files["info"]}
    succeed("scripts/train_sasrec.py", **paths, output_dir=tmp_path / "sasrec", num_epochs=1)
    flags = {"model": sft_run("lora") / "final_checkpoint", "blend": tmp_path / "sasrec", "histories": files["test"]}
    result = succeed("benchmarks/blend.py", **flags, info_file=files["info"], requests=2, repeats=1, num_beams=10)
    record = json.loads(result.stdout.splitlines()[-1])
    assert [row["requests at once"] for row in record["results"]] == [1, 8]
    assert all(row["ratio"] > 0 for row in record["results"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "results"),
    [
        (
            "trees",
            ["--methods", "lora,full", "--ways", "random,rows,trees"],
            {"speedup_lora", "speedup_full", "tokens", "computed"},
        ),
        ("whole_sft", ["--plain_rows", "4"], {"speedup"}),
    ],
)
def test_a_benchmark_trains_the_rows_of_a_folder(files, tmp_path, quick, script, flags, results):
    folder_of(files, tmp_path, valid="valid.csv")
    shape = "--num_hidden_layers 1 --hidden_size 32 --num_attention_heads 2 --intermediate_size 64 --vocab_size 2048"
    sizes = "--rows 16 --micro_batch_size 4"
    words = [*shape.split(), *sizes.split(), *flags]
    result = succeed(f"benchmarks/{script}.py", "--data", str(tmp_path), *words)
    record = json.loads(result.stdout.splitlines()[-1])
    assert results <= set(record) and all(record[name] > 0 for name in results)
    if script == "trees":
        computed = [row["computed"] for row in record["table"][:3]]
        assert computed[2] < record["tokens"] <= computed[1] <= computed[0]
        assert all(float(row["losses differ by"]) < 1e-5 for row in record["table"])


def test_token_trees_are_timed_as_they_are_trained(files, base):
    """On a GPU, by recordings: of micro-batches that are padded to few shapes."""
    with as_on_gpu():
        trained = set_up(base, [files["index"], files["item"]], "lora", 512)
        rows = trained.dataset(files["train"], load_prompts("bolts", None, "sid_history_to_sid"))
        prefixes = Prefixes(rows)
        plan = TreeBatches(prefixes, step_order(prefixes, 1, 16, 42), 1, 4, 16)
        losses_of, part = trained.tree_losses_of(plan), next(plan.steps())[0].tolist()
        for _ in range(3):
            losses, count = losses_of(rows.__getitems__(part))
            losses.sum().backward()
            assert count == prefixes.responses[part].sum() == losses.count_nonzero()
            del losses
        assert any(graphs.of(trained.model).passes.values())


def folder_of(files, folder, **names):
    """A folder with the files under the names that the benchmarks look for."""
    for kind, name in {"train": "train.csv", "index": "x.index.json", "item": "x.item.json", **names}.items():
        shutil.copy(files[kind], folder / name)
    return folder


@pytest.mark.slow
def test_peers_train_the_same_from_the_same_start(files, base, tmp_path, quick):
    data = folder_of(files, tmp_path, test="test.csv", info="info.txt")
    # All rows are in one step, so that the first loss does not depend on their order.
    sizes = {"rows": -1, "batch_size": 40, "micro_batch_size": 8, "epochs": 2, "num_beams": 10}
    ways = ["ours", "trl_padding_free"]
    result = succeed("benchmarks/peers.py", data=data, base_model=base, category="bolts", ways=",".join(ways), **sizes)
    record = json.loads(result.stdout.splitlines()[-1])
    ours, *others = record["table"]
    assert [row["way"] for row in record["table"]] == ways and ours["ours times as fast"] == 1
    for row in record["table"]:
        assert row["steps"] == 2 and row["last loss"] < row["first loss"]
        assert row["rows/s"] > 0 and row["peak GB"] > 0 and 0 < row["NDCG@10"] <= row["HR@10"] <= 1
    for row in others:
        assert row["trained parameters"] == ours["trained parameters"]
        assert row["first loss"] == pytest.approx(ours["first loss"], rel=1e-5)


def test_peers_refuses_what_it_cannot_run(files, base, tmp_path):
    data = folder_of(files, tmp_path, test="test.csv")
    flags = {"data": data, "base_model": base, "ways": "ours,llama,llamafactory", "rows": 0, "batch_size": 9}
    result = run_command("benchmarks/peers.py", **flags)
    assert result.returncode == 2
    for problem in (
        "--ways 'llama': there are ours",
        "--llamafactory '': give the Python",
        "--rows 0: must be 1 or more",
        "--batch_size 9 is not a multiple",
        "must hold train.csv, test.csv, info.txt",
    ):
        assert problem in result.stderr


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
        ((tmp_path / "out", "tree"), {}, "there is no part tree; the parts are card"),
        ((tmp_path / "out", "trees"), {"DATA": "x"}, "CATEGORY is missing"),
    ):
        result = gpu(*words, **settings)
        assert result.returncode == 2 and f"gpu.sh: error: {message}" in result.stderr
    assert not (tmp_path / "out").exists()


def recorder(folder, fails="") -> str:
    """A Python that only prints what it is asked to run, and fails where that holds a word."""
    script = folder / "python"
    script.write_text(f'#!/bin/bash\n[ -z "{fails}" ] || [[ "$*" != *"{fails}"* ]] || exit 1\necho "runs $*"\n')
    script.chmod(0o755)
    return str(script)


def test_the_script_for_a_card_keeps_what_is_finished(tmp_path):
    broken = gpu(tmp_path / "out", PYTHON=recorder(tmp_path, fails="benchmarks.decode"))
    assert broken.returncode == 2 and "not finished: decode; logs are in" in broken.stderr
    assert not (tmp_path / "out" / "decode.md").exists()
    again = gpu(tmp_path / "out", PYTHON=recorder(tmp_path))
    assert again.returncode == 0, again.stderr
    assert next(line for line in again.stdout.splitlines() if line.startswith("== ")) == "== decode"
    assert "graphs" not in again.stdout
    for part in ("card", "graphs", "rl", "decode", "sft_7B"):
        written = (tmp_path / "out" / f"{part}.md").read_text()
        machine, command, run = (line for line in written.splitlines()[1:] if line)
        assert "import machine" in machine and command.split() == ["python", *run.split()[1:]]
    assert gpu(tmp_path / "out", PYTHON=recorder(tmp_path)).stdout == ""


def test_the_script_for_a_card_keeps_the_rows_of_a_part_that_is_stopped(tmp_path):
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/bash\n[[ "$*" == -m* ]] || exit 0\n'
        f"exec {sys.executable} -c 'import time; print(\"| a row |\"); time.sleep(60)'\n"
    )
    script.chmod(0o755)
    assert gpu(tmp_path / "out", "card", PYTHON=str(script), LIMIT="2", PYTHONUNBUFFERED="").returncode == 2
    assert "| a row |" in (tmp_path / "out" / "card.partial").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("graphs", "| search, merged |"),
        ("sft", "| QLoRA |"),
        ("rl", "| ReReTrainer |"),
        ("decode", "large_catalogue"),
        ("sft_7B", "predicted GB"),
    ],
)
def test_what_the_script_runs_on_a_card_runs_small_on_a_cpu(tmp_path, quick, part, found):
    asked = gpu(tmp_path / "out", part, PYTHON=recorder(tmp_path)).stdout
    (command,) = (line for line in asked.splitlines() if line.startswith("runs -m benchmarks."))
    module, *words = command.removeprefix("runs -m benchmarks.").split()
    result = succeed(f"benchmarks/{module}.py", *words)
    assert found in result.stdout
