"""Runs on several nodes: launchers that start less than they say, input and storage that differ between nodes, and a
process that fails, is killed or stopped. A node is a process that is told that it is alone on its machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from helpers import ROOT, flag_words, refused, rl_flags, run_command, sft_flags
from processes import assert_same_run, start_nodes, two_processes

from minionerec.errors import Problems
from minionerec.world import check_world

ONE = {"use_lora": True, "lora_dropout": 0.0, "micro_batch_size": 4, "learning_rate": 1e-3}
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS")


@pytest.fixture
def launcher(monkeypatch):
    """`launcher(**variables)`: what a launcher tells this process."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    def tell(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return tell


SLURM = {"SLURM_NTASKS": 2, "SLURM_PROCID": 1}
TORCHRUN = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (SLURM, "SLURM_NTASKS is 2, but this process knows of no other one; start the command with torchrun"),
        ({**SLURM, "WORLD_SIZE": 1}, "SLURM_NTASKS is 2, but"),
        ({"SLURM_STEP_NUM_TASKS": 4, "SLURM_NTASKS": 4}, "SLURM_STEP_NUM_TASKS is 4, but"),
        ({"OMPI_COMM_WORLD_SIZE": 2}, "OMPI_COMM_WORLD_SIZE is 2, but"),
        ({"PET_NNODES": "2:4"}, "PET_NNODES is 2:4, but"),
        ({"MASTER_ADDR": "node-0", "MASTER_PORT": 29500}, "MASTER_ADDR is node-0, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "a"}, "WORLD_SIZE is 2, but LOCAL_RANK, MASTER_PORT are not set"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', which is not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is not a whole number"),
        ({"LOCAL_RANK": 3}, "LOCAL_RANK is 3, but WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**TORCHRUN, "RANK": 5}, "RANK is 5, but WORLD_SIZE is 2: ranks begin with 0"),
        ({}, None),
        ({"SLURM_NTASKS": 1}, None),
        ({"SLURM_STEP_NUM_TASKS": 1, "SLURM_NTASKS": 4}, None),  # srun --ntasks 1 in a larger job
        ({**SLURM, **TORCHRUN}, None),
        ({**TORCHRUN, "WORLD_SIZE": 1}, None),
    ],
)
def test_a_process_that_knows_less_than_its_launcher_is_refused(launcher, told, message):
    launcher(**told)
    problems = Problems()
    check_world(problems)
    assert len(problems) == bool(message) and (not message or problems[0].startswith(message))


def test_srun_without_a_rendezvous_is_refused_by_every_command_that_several_processes_run(
    files, base, sft_run, launcher, tmp_path
):
    start = sft_run("lora") / "final_checkpoint"
    launcher(**SLURM)
    refused("sft.py", "SLURM_NTASKS is 2, but this process", **sft_flags(files, base, tmp_path / "run"))
    refused("rl.py", "SLURM_NTASKS is 2, but this process", **rl_flags(files, start, tmp_path / "run"))
    flags = {"info_file": files["info"], "test_data_path": files["test"], "result_json_data": tmp_path / "result.json"}
    refused("evaluate.py", "SLURM_NTASKS is 2, but this process", base_model=start, **flags)
    assert run_command("sft.py", **sft_flags(files, base, tmp_path / "run", dry_run=True)).returncode == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_the_configurations_start_a_run_on_two_machines(name):
    """Otherwise accelerate starts DeepSpeed's own launcher, which trains a model on each machine."""
    words = ["--config_file", f"{ROOT}/configs/{name}.yaml", "--num_machines", "2", "--machine_rank", "1"]
    words += ["--main_process_ip", "node-0", "--main_process_port", "29500", "script.py"]
    args = accelerate_launch._validate_launch_command(accelerate_launch.launch_command_parser().parse_args(words))[0]
    assert args.num_machines == 2 and (name == "fsdp" or args.deepspeed_multinode_launcher == "standard")
    assert yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["num_machines"] == 1


# --- The cache of examples --------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_named_before_anything_loads(files, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    flags = sft_flags(files, "no/such/base", tmp_path / "run")
    refused("sft.py", f"HF_DATASETS_CACHE {tmp_path}/file/cache/minionerec: {tmp_path}/file cannot be written", **flags)
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    refused("sft.py", f"HF_DATASETS_CACHE {tmp_path}/file/datasets/minionerec: ", **flags)


# --- Several nodes ----------------------------------------------------------------------------------------------------


def errors_of(started: processes.Started) -> list[str]:
    return [line for line in started.errors.splitlines() if line.startswith(("sft.py: error: ", "process "))]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_bad_input_on_one_node_ends_all_of_them(files, base, tmp_path, bad):
    """The first one holds the store in which they find each other."""
    flags = [sft_flags(files, base, tmp_path / "run", **ONE) for _ in range(2)]
    flags[bad]["train_file"] = tmp_path / "missing.csv"
    begun = time.monotonic()
    nodes = start_nodes("command", *(["sft.py", *flag_words(one)] for one in flags))
    assert nodes.wait(60) == [2, 2] and time.monotonic() - begun < 30, nodes.errors[-3000:]
    missing = f"--train_file {tmp_path}/missing.csv: no such file"
    name = os.uname().nodename
    said = {f"sft.py: error: on {name}, process {bad}: {missing}", f"process {bad} on {name} has failed: {missing}"}
    assert set(errors_of(nodes)) == said and "Traceback" not in nodes.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_node_with_a_damaged_model_ends_those_that_wait_in_a_collective(files, base, tmp_path):
    damaged = shutil.copytree(base, tmp_path / "base")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    flags = [sft_flags(files, start, tmp_path / "run", **ONE) for start in (base, damaged)]
    nodes = start_nodes("command", *(["sft.py", *flag_words(one)] for one in flags))
    assert nodes.wait(60) == [2, 2], nodes.errors[-3000:]
    said = [line for line in errors_of(nodes) if line.startswith("sft.py: error: ")]
    assert len(said) == 1, nodes.errors[-3000:]
    assert f"process 1: {weights}: cannot be read, the file is damaged" in said[0]
    assert "Traceback" not in nodes.errors


@pytest.mark.slow
def test_what_differs_between_nodes_is_said_before_training(files, base, tmp_path):
    other = tmp_path / "train.csv"
    other.write_text("".join(Path(files["train"]).read_text().splitlines(True)[:20]))
    copied = shutil.copy(files["valid"], tmp_path / "valid.csv")  # the same content elsewhere
    one, two = (sft_flags(files, base, tmp_path / "run", **ONE) for _ in range(2))
    two |= {"train_file": other, "learning_rate": 0.1, "eval_file": copied}
    nodes = start_nodes("command", *(["sft.py", *flag_words(flags)] for flags in (one, two)))
    assert nodes.wait() == [2, 2], nodes.errors[-3000:]
    lines = errors_of(nodes)
    assert len(lines) == 2 and all(line.endswith("it must be the same on all nodes") for line in lines)
    assert "--train_file is 'a file of " in lines[0] and "--learning_rate is 0.1 on " in lines[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_storage_that_is_not_shared_is_said_before_training(files, base, tmp_path):
    """One node would resume, and the other start anew."""
    (tmp_path / "node0" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "node0" / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5}')
    runs = [tmp_path / f"node{i}" for i in range(2)]
    more = {**ONE, "resume_from_checkpoint": True}
    nodes = start_nodes("command", *(["sft.py", *flag_words(sft_flags(files, base, run, **more))] for run in runs))
    assert nodes.wait() == [2, 2], nodes.errors[-3000:]
    (line,) = errors_of(nodes)
    assert re.search(r"--output_dir \S+node0: is not the same folder on \S+ \(process 1\) as on", line)
    assert [path.name for path in runs[0].iterdir()] == ["checkpoint-5"] and not runs[1].exists()


@pytest.mark.slow
def test_the_survivors_of_a_killed_process_name_the_last_good_checkpoint(files, base, tmp_path):
    run = tmp_path / "run"
    flags = flag_words(sft_flags(files, base, run, **ONE, num_epochs=20, eval_step=0.05))
    nodes = start_nodes("command", *[["sft.py", *flags]] * 2)
    nodes.wait_for_checkpoint(run, count=2)
    os.kill(nodes.processes[1].pid, signal.SIGKILL)
    assert nodes.wait(60) == [1, -signal.SIGKILL], nodes.errors[-3000:]
    (line,) = errors_of(nodes)
    good = re.search(
        r"another process of the run no longer answers; the last good checkpoint is (\S+); the same command", line
    )[1]
    assert (Path(good) / "trainer_state.json").exists() and "Traceback" not in nodes.errors


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", "fsdp"])
def test_a_signal_to_one_process_stops_all_in_the_middle_of_a_step(files, base, tmp_path, engine):
    flags = sft_flags(files, base, tmp_path / "run", **{**ONE, "micro_batch_size": 1, "pack_rows": 0})
    one = run_command("sft.py", **{**flags, "output_dir": tmp_path / "one"})
    assert one.returncode == 0, one.stderr[-3000:]
    errors = two_processes(engine, tmp_path, "sft.py", flags, "stops_in_a_step", code=130)
    assert f"stopped at step 2 of 15 and saved {tmp_path}/run/checkpoint-2; " in errors
    two_processes(engine, tmp_path, "sft.py", {**flags, "resume_from_checkpoint": True})
    assert_same_run(tmp_path / "one", tmp_path / "run", 1e-5)


@pytest.mark.slow
def test_two_processes_sample_what_one_does(files, sft_run, tmp_path):
    more = {"use_lora": True, "beam_search": False, "dynamic_sampling": True, "reward_type": "rule", "beta": 0.0}
    flags = rl_flags(files, sft_run("lora") / "final_checkpoint", tmp_path / "one", **more)
    one = run_command("rl.py", **flags)
    assert one.returncode == 0 and "an optimizer step: 4 prompts x 4 completions\n" in one.stdout, one.stderr[-3000:]
    flags |= {"output_dir": tmp_path / "two", "train_batch_size": 8}
    two_processes("torchrun", tmp_path, "rl.py", flags)
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.slow
def test_an_engine_trains_one_model_on_two_machines(files, base, tmp_path):
    """By `accelerate launch`, once on each, which starts torchrun's agents."""
    engine = "zero2" if find_spec("deepspeed") else "fsdp"
    one = run_command("sft.py", **sft_flags(files, base, tmp_path / "one", **ONE))
    assert one.returncode == 0, one.stderr[-3000:]
    argv = ["tests/workers.py", "watched", tmp_path, "sft.py"]
    argv += flag_words(sft_flags(files, base, tmp_path / "run", **ONE))
    port, agents = processes.free_port(), []
    for rank in range(2):
        words = ["accelerate.commands.launch", "--config_file", f"configs/{engine}.yaml", "--num_machines", 2]
        words += ["--num_processes", 2, "--machine_rank", rank, "--main_process_port", port]
        words += ["--main_process_ip", "localhost"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", *map(str, [*words, *argv])]
        agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [agent.communicate(timeout=200)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    assert_same_run(tmp_path / "one", tmp_path / "run", 1e-5)
