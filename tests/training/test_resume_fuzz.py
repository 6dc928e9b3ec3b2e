"""Runs with random settings that are killed or stopped, once or twice, end as the run that was left alone.

    FUZZ_SEEDS=2:40 pytest tests/training/test_resume_fuzz.py

tries other seeds than the few of every day.
"""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import newest, rl_flags, run_command, sft_flags, succeed, tensors_of
from plain import fuzz_seeds

from minionerec.training import arguments
from minionerec.training.durable import DurableRun

METHODS = [{}, {"use_lora": True}, {"use_qlora": True}]
# What differs between two runs of one command, and what the Trainer counts from the last start only.
OF_ONE_START = {"seconds", "peak_memory_gb", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
OF_ONE_START |= {"step_time", "checkpoint_mb"}  # the flags and seconds in minionerec.json have more or fewer digits


def sft_settings(rng: random.Random) -> dict:
    method = rng.choice([*METHODS, {"freeze_LLM": True}, {"train_from_scratch": True}])
    flags = {"num_epochs": rng.choice([1, 2]), "sample": rng.choice([9, 13, 20]), "batch_size": rng.choice([8, 16])}
    flags |= {"micro_batch_size": rng.choice([2, 8]), "eval_step": rng.choice([0.15, 0.2, 0.34])}
    flags |= {"pack_rows": rng.choice([-1, 0, 1]), "sid_learning_rate": rng.choice([0.0, 3e-3]), "learning_rate": 1e-3}
    flags["optim"] = rng.choice(["adamw_torch_fused", "adamw_torch", "lion_32bit", "sgd", "adagrad", "rmsprop"])
    if method and "use" in next(iter(method)):
        flags["lora_dropout"] = rng.choice([0.0, 0.3])
    return {**flags, **method, "seed": rng.randrange(100)}


def rl_settings(rng: random.Random) -> dict:
    eval_step = rng.choice([0.1, 0.2, 0.34])
    flags = {"eval_step": eval_step, "save_steps": rng.choice([0.0, eval_step, 2 * eval_step])}
    flags |= {"average_weights": rng.random() < 0.5, "test_during_training": rng.random() < 0.6}
    flags |= {"beam_search": rng.random() < 0.4, "dynamic_sampling": rng.random() < 0.3, "add_gt": rng.random() < 0.5}
    flags |= {"mask_all_zero": rng.random() < 0.5, "sync_ref_model": rng.random() < 0.5, "beta": 0.04}
    flags |= {"sft_weight": rng.choice([0.0, 0.5]), "reward_type": rng.choice(["rule", "ranking", "ranking,prefix"])}
    flags |= rng.choice([{}, {"dapo": True}, {"gspo": True}]) | {"sample_train": rng.random() < 0.5}
    flags |= rng.choice([{}, {"train_batch_size": 8, "gradient_accumulation_steps": 2}])
    flags["optim"] = rng.choice(["adamw_torch_fused", "adamw_torch", "lion_32bit", "sgd", "adagrad"])
    if rng.random() < 0.25:
        flags |= {
            "listwise": True,
            "beam_search": True,
            "add_gt": False,
            "reward_type": rng.choice(["rule", "rule,prefix"]),
        }
        flags |= {"dapo": False, "gspo": False}
    return {**flags, "num_train_epochs": rng.choice([1, 2]), "seed": rng.randrange(100)}


def without_seconds(value: object) -> object:
    """A JSON value without what differs between two runs of one command."""
    if isinstance(value, dict):
        return {name: without_seconds(entry) for name, entry in value.items() if name not in OF_ONE_START}
    return [without_seconds(entry) for entry in value] if isinstance(value, list) else value


def assert_same_end(whole: Path, resumed: Path) -> None:
    for name in ("final_checkpoint", newest(whole).name):
        one, two = tensors_of(whole / name), tensors_of(resumed / name)
        assert one.keys() == two.keys()
        differ = [key for key in one if not torch.equal(one[key], two[key])]
        assert not differ, (name, differ[:3])
    one, two = (without_seconds(json.loads((run / "metrics.json").read_text())) for run in (whole, resumed))
    for entry, other in zip(one.pop("history"), two.pop("history"), strict=True):
        assert entry == other
    assert one == two
    # Of the checkpoints, the newest and the best are kept; a stop saves another one, which may push out a third.
    names = [{path.name for path in run.iterdir() if "checkpoint-" not in path.name} for run in (whole, resumed)]
    assert names[0] == names[1] == {"curves.png", "final_checkpoint", "metrics.json"}


@pytest.fixture
def logs_every(monkeypatch):
    """`logs_every(steps)`: as runs of more than 100 steps, which do not log each. Checkpoints come between two logs."""
    shared_arguments = arguments.shared_arguments

    def use(steps: int) -> None:
        monkeypatch.setattr(
            arguments, "shared_arguments", lambda flags: {**shared_arguments(flags), "logging_steps": steps}
        )

    return use


@pytest.fixture
def ends_at(monkeypatch):
    """`ends_at(step, how)`: the next runs are killed, or stopped by a signal, in the step after `step`."""
    train = DurableRun.training_step

    def use(step: int | None, how: str = "") -> None:
        def training_step(trainer, *args, **kwargs):
            if trainer.state.global_step == step:
                if how == "killed":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGTERM)
            return train(trainer, *args, **kwargs)

        monkeypatch.setattr(DurableRun, "training_step", training_step)

    return use


def interrupted(script: str, flags: dict, output: Path, steps: int, rng: random.Random, ends_at) -> list[tuple]:
    """Runs a command with interruptions to its end; returns these."""
    chosen = sorted(rng.sample(range(1, steps - 1), min(rng.choice([1, 2]), steps - 2)))
    ends = [(step, rng.choice(["killed", "stopped"])) for step in chosen]
    for step, how in ends:
        ends_at(step, how)
        result = run_command(script, **flags, output_dir=output, resume_from_checkpoint=True)
        assert result.returncode == 130, (ends, result.stderr[-2000:])
    ends_at(None)
    result = run_command(script, **flags, output_dir=output, resume_from_checkpoint=True)
    assert result.returncode == 0, (ends, result.stderr[-3000:])
    return ends


def check(script: str, flags: dict, rng: random.Random, folder: Path, ends_at) -> None:
    flags.pop("output_dir", None)
    ends_at(None)
    result = succeed(script, **flags, output_dir=folder / "whole")
    steps = json.loads((folder / "whole" / "metrics.json").read_text())["steps"]
    ends = interrupted(script, flags, folder / "parts", steps, rng, ends_at)
    print(ends)  # what pytest shows of a failure
    assert_same_end(folder / "whole", folder / "parts")
    # A finished run that is resumed stays what it is.
    shutil.rmtree(folder / "parts" / "final_checkpoint")
    result = run_command(script, **flags, output_dir=folder / "parts", resume_from_checkpoint=True)
    assert result.returncode == 0 and "nothing is left to train" in result.stdout
    assert_same_end(folder / "whole", folder / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("seed", fuzz_seeds(2))
def test_sft_resumes_exactly(files, base, tmp_path, ends_at, logs_every, seed):
    rng = random.Random(seed)
    logs_every(rng.choice([1, 3, 4]))
    check("sft.py", sft_flags(files, base, "", **sft_settings(rng)), rng, tmp_path, ends_at)


@pytest.mark.slow
@pytest.mark.parametrize("seed", fuzz_seeds(2))
def test_rl_resumes_exactly(files, sft_run, tmp_path, ends_at, logs_every, seed):
    rng = random.Random(1000 + seed)
    logs_every(rng.choice([1, 3, 4]))
    start, method = rng.choice([("full", 0), ("full", 1), ("lora", 0), ("lora", 1), ("qlora", 2)])
    flags = rl_flags(files, sft_run(start) / "final_checkpoint", "", **METHODS[method], **rl_settings(rng))
    check("rl.py", flags, rng, tmp_path, ends_at)
