"""What a launcher tells a process of the others, and what ends all of them when one fails, is killed or is refused."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers import flag_words, refused, rl_flags, run_command, sft_flags
from processes import ONE, errors_of, start_nodes

from minionerec.errors import Problems
from minionerec.world import check_world

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
        (SLURM, "SLURM_NTASKS is 2, but this process does not know the others; start the command with torchrun"),
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


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_bad_input_on_one_node_ends_all_of_them(files, base, tmp_path, bad):
    """The first one holds the store in which they find each other."""
    flags = [sft_flags(files, base, tmp_path / "run", **ONE) for _ in range(2)]
    flags[bad]["train_file"] = tmp_path / "missing.csv"
    nodes = start_nodes("command", *(["sft.py", *flag_words(one)] for one in flags))
    assert nodes.wait(60) == [2, 2], nodes.errors[-3000:]
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
