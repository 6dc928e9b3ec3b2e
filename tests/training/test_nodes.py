"""Runs on several nodes: what differs between them, one model that all train, and a process that is stopped. A node is
a process that is told that it is alone on its machine."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from helpers import ROOT, flag_words, refused, rl_flags, run_command, sft_flags, succeed
from processes import ONE, assert_same_run, errors_of, launcher_environment, start_nodes, two_processes


@pytest.mark.parametrize(("name", "kind"), [("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"), ("fsdp", "FSDP")])
def test_the_configurations_start_a_run_on_two_machines(name, kind):
    """Otherwise accelerate starts DeepSpeed's own launcher, which trains a model on each machine. It refuses keys that
    it does not know."""
    words = ["--config_file", f"{ROOT}/configs/{name}.yaml", "--num_machines", "2", "--machine_rank", "1"]
    words += ["--main_process_ip", "node-0", "--main_process_port", "29500", "script.py"]
    args = accelerate_launch._validate_launch_command(accelerate_launch.launch_command_parser().parse_args(words))[0]
    assert args.num_machines == 2 and (name == "fsdp" or args.deepspeed_multinode_launcher == "standard")
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert (config["distributed_type"], config["num_machines"], config["num_processes"]) == (kind, 1, 2)
    assert name == "fsdp" or config["deepspeed_config"]["zero_stage"] == int(name[-1])


def test_a_cache_that_cannot_be_written_is_named_before_anything_loads(files, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    flags = sft_flags(files, "no/such/base", tmp_path / "run")
    refused("sft.py", f"HF_DATASETS_CACHE {tmp_path}/file/cache/minionerec: {tmp_path}/file is a file, not", **flags)
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    refused("sft.py", f"HF_DATASETS_CACHE {tmp_path}/file/datasets/minionerec: ", **flags)


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
@pytest.mark.parametrize("engine", ["torchrun", "fsdp"])
def test_a_signal_to_one_process_stops_all_in_the_middle_of_a_step(files, base, tmp_path, engine):
    flags = sft_flags(files, base, tmp_path / "run", **{**ONE, "micro_batch_size": 1, "pack_rows": 0})
    succeed("sft.py", **{**flags, "output_dir": tmp_path / "one"})
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
    succeed("sft.py", **sft_flags(files, base, tmp_path / "one", **ONE))
    argv = ["tests/workers.py", "watched", tmp_path, "sft.py"]
    argv += flag_words(sft_flags(files, base, tmp_path / "run", **ONE))
    port, agents = processes.free_port(), []
    for rank in range(2):
        words = ["accelerate.commands.launch", "--config_file", f"configs/{engine}.yaml", "--num_machines", 2]
        words += ["--num_processes", 2, "--machine_rank", rank, "--main_process_port", port]
        words += ["--main_process_ip", "localhost"]
        command = [sys.executable, "-m", *map(str, [*words, *argv])]
        agents.append(
            subprocess.Popen(command, cwd=ROOT, env=launcher_environment(), stderr=subprocess.PIPE, text=True)
        )
    try:
        errors = [agent.communicate(timeout=200)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # with the processes it started
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    assert_same_run(tmp_path / "one", tmp_path / "run", 1e-5)
