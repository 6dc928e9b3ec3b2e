"""The arguments that both trainers share."""

import os

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig

from minionerec.training.arguments import shared_arguments
from rl import RLFlags
from sft import SFTFlags


@pytest.mark.parametrize(("flags_of", "arguments_of"), [(SFTFlags, TrainingArguments), (RLFlags, GRPOConfig)])
def test_the_arguments_say_what_the_flags_do(tmp_path, monkeypatch, flags_of, arguments_of):
    for name in ("WANDB_PROJECT", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    output = str(tmp_path / "run")
    flags = flags_of(output_dir=output, wandb_project="bolts", seed=7, optim="sgd", gradient_checkpointing=True)
    arguments = arguments_of(**shared_arguments(flags))
    assert (arguments.output_dir, arguments.seed, arguments.optim) == (output, 7, "sgd")
    assert arguments.activation_checkpointing and arguments.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert not arguments.bf16 and not arguments.fp16 and arguments.save_total_limit == 2
    assert os.environ["WANDB_PROJECT"] == "bolts"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == os.path.join(output, "tensorboard")
    shared_arguments(flags_of(output_dir=f"{output}2"))  # a second run of the process has a folder of its own
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == os.path.join(f"{output}2", "tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "mine")
    shared_arguments(flags)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "mine"
