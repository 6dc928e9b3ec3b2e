"""Runs that are stopped in the middle of a step."""

import os
import re
import signal
from pathlib import Path

import pytest
from helpers import adapter_bytes, run_command, sft_flags, succeed
from models import trainer_of

from minionerec.checkpoint import Checkpoint
from minionerec.errors import RunError
from minionerec.training.sft_trainer import SFTTrainer

IN_PARTS = {"use_lora": True, "num_epochs": 2, "micro_batch_size": 2, "tasks": "sid_history_to_sid", "eval_step": 0.4}


@pytest.fixture(scope="module")
def in_parts(files, base, tmp_path_factory) -> Path:
    """A run whose steps have eight micro-batches, or four at the end of an epoch: three steps in each of two epochs."""
    output = tmp_path_factory.mktemp("parts") / "run"
    done = succeed("sft.py", **sft_flags(files, base, output, **IN_PARTS, pack_rows=0))
    needs = r"^a stop takes up to \d+ s \(micro-batch \d+\.\d s.*--shutdown-timeout \d+, Slurm --signal=TERM@\d+"
    assert re.search(needs, done.stdout, re.M)
    return output


@pytest.mark.parametrize("step", [2, 4])  # 4 is the first one of an epoch
def test_a_run_stops_in_the_middle_of_a_step_and_resumes_exactly(files, base, in_parts, tmp_path, monkeypatch, step):
    """The unfinished step is dropped: the checkpoint is that of the last complete one, dropout and all."""
    flags = sft_flags(files, base, tmp_path / "run", **IN_PARTS, pack_rows=0)
    compute, passes = SFTTrainer.compute_loss, []

    def stopped(run, *args, **kwargs):
        if run.model.training and run.state.global_step == step - 1:
            passes.append(step)
            if len(passes) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute(run, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SFTTrainer, "compute_loss", stopped)
        done = run_command("sft.py", **flags)
    assert done.returncode == 130 and len(passes) == 3, done.stderr[-3000:]
    saved = tmp_path / "run" / f"checkpoint-{step - 1}"
    assert f"stopped at step {step - 1} of 6 and saved {saved}; " in done.stderr
    done = run_command("sft.py", **flags, resume_from_checkpoint=True)
    assert done.returncode == 0 and f"resuming from {saved}" in done.stdout, done.stderr[-3000:]
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(in_parts)


def stopped_at_once(trainer: SFTTrainer) -> SFTTrainer:
    """A trainer that gets a signal in its first micro-batch."""
    compute = trainer.compute_loss

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return compute(*args, **kwargs)

    trainer.compute_loss = stopped
    return trainer


def test_a_run_that_is_stopped_in_its_first_step_has_nothing_to_save(tmp_path):
    trainer = stopped_at_once(trainer_of(tmp_path, 2, max_steps=4))
    with pytest.raises(RunError, match=r"stopped at step 0 of 4, before there was anything to save; .* starts anew"):
        trainer.train()
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_a_run_from_another_folder_that_is_stopped_at_once_goes_on_from_there(tmp_path):
    """With --resume_from_checkpoint True it would start anew, because its own folder has no checkpoint yet."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = trainer_of(tmp_path / "old", 2, **settings)
    first.train()
    saved = os.path.join(first.args.output_dir, "checkpoint-2")
    trainer = stopped_at_once(trainer_of(tmp_path / "new", 2, **settings))
    with pytest.raises(RunError, match=rf"stopped at step 2 of 4 and saved {saved}; the same command continues"):
        trainer.train(Checkpoint.read(saved))
