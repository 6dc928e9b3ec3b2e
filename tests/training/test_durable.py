"""Runs that end badly: stopped, out of room, with a loss that is NaN. Kills: test_sft.py, test_rl.py and
benchmarks/kill_and_resume.py."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import largest_file, refused, run_command, sft_flags
from models import trainer_of
from processes import start_command

from minionerec.errors import InputError, Problems, RunError
from minionerec.flags import RunFlags, check_output_dir
from minionerec.training.resume import resume_point
from minionerec.training.sft_trainer import SFTTrainer

FLAGS = {"use_lora": True, "num_epochs": 4, "eval_step": 0.2, "learning_rate": 1e-3}


def adapter_bytes(output: Path) -> bytes:
    return (output / "final_checkpoint" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(files, base, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run_command("sft.py", **sft_flags(files, base, output, **FLAGS))
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_says_how_to_go_on(files, base, whole, tmp_path, number):
    output = tmp_path / "run"
    stopped = start_command("sft.py", sft_flags(files, base, output, **FLAGS))
    stopped.wait_for_checkpoint(output)
    stopped.kill(number)
    codes, errors = stopped.wait(200), stopped.errors
    assert codes == [130], errors[-2000:]
    assert "Traceback" not in errors
    said = re.search(r"^sft.py: error: stopped at step (\d+) of \d+ and saved (\S+); .* continues", errors, re.M)
    step, saved = said.groups()
    assert saved == str(output / f"checkpoint-{step}") and os.path.isfile(f"{saved}/trainer_state.json")
    assert not (output / "final_checkpoint").exists()
    done = run_command("sft.py", **sft_flags(files, base, output, **FLAGS, resume_from_checkpoint=True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert adapter_bytes(output) == adapter_bytes(whole)


@pytest.mark.slow
def test_no_room_to_write_keeps_the_last_good_checkpoint(files, base, whole, tmp_path):
    output = tmp_path / "run"
    killed = start_command("sft.py", sft_flags(files, base, output, **FLAGS))
    killed.wait_for_checkpoint(output)
    killed.kill(signal.SIGKILL)
    killed.wait()
    good = sorted(output.glob("checkpoint-*/trainer_state.json"))[-1].parent
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    limit = len(before["adapter_model.safetensors"])  # the optimizer's state is larger
    flags = sft_flags(files, base, output, **FLAGS, resume_from_checkpoint=True)
    with largest_file(limit):
        full = run_command("sft.py", **flags)
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr[-2000:]
    assert re.search(rf"^sft.py: error: the checkpoint of step .* last good checkpoint is {good}\.", full.stderr, re.M)
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    assert [path.name for path in output.glob("checkpoint-*")] == [good.name]
    done = run_command("sft.py", **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert adapter_bytes(output) == adapter_bytes(whole)


def test_a_folder_that_cannot_be_written(files, base, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "run"
    refused("sft.py", f"--output_dir {output}: {tmp_path}/file cannot be written to", **sft_flags(files, base, output))
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))  # read-only, which a superuser ignores
    problems = Problems()
    check_output_dir(problems, str(tmp_path / "new" / "run"), resume=False)
    assert problems == [f"--output_dir {tmp_path}/new/run: {tmp_path} cannot be written to"]


def test_an_output_that_is_a_link_to_nowhere_is_refused_or_made(files, base, tmp_path):
    """Where it leads to decides."""
    (tmp_path / "file").touch()
    (tmp_path / "bad").symlink_to(tmp_path / "file" / "run")
    refused("sft.py", f"{tmp_path}/file cannot be written to", **sft_flags(files, base, tmp_path / "bad"))
    (tmp_path / "good").symlink_to(tmp_path / "disk" / "run")
    problems = Problems()
    check_output_dir(problems, str(tmp_path / "good"), resume=False)
    assert not problems


def test_a_loss_that_is_no_number_stops_the_run(files, base, tmp_path):
    done = run_command("sft.py", **sft_flags(files, base, tmp_path / "run", learning_rate=1e30, num_epochs=4))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = r"^sft.py: error: (the loss is (nan|inf)|weights are NaN or infinite).* --learning_rate$"
    assert re.search(said, done.stderr, re.M)
    assert not (tmp_path / "run" / "final_checkpoint").exists()


def test_the_last_good_checkpoint_is_named(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, 8, **settings)
    compute = trainer.compute_loss

    def bad_at_step_3(*args, **kwargs):
        loss = compute(*args, **kwargs)
        return loss * float("nan") if trainer.state.global_step == 2 else loss

    trainer.compute_loss = bad_at_step_3
    with pytest.raises(RunError, match=r"the loss is nan at step 3; the last good checkpoint is \S+checkpoint-2\b"):
        trainer.train()

    # A NaN gradient after a finite loss spoils the weights; they are not saved.
    trainer = trainer_of(tmp_path / "again", 8, **settings)

    def spoil(gradient):
        return gradient * float("nan") if trainer.state.global_step == 1 else gradient

    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(spoil)
    with pytest.raises(RunError, match=r"weights are NaN or infinite at step 2; .*checkpoint-1\b"):
        trainer.train()
    assert [path.name for path in (tmp_path / "again").glob("*/checkpoint-*")] == ["checkpoint-1"]


RUN = {
    "command": "rl",
    "method": "lora",
    "base_fingerprint": "f",
    "flags": {"lora_r": 8, "seed": 1, "use_dora": False},
}
RUN["flags"] |= {"lora_alpha": 16, "lora_target_modules": "all", "use_rslora": False, "load_in_8bit": False}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"command": "sft"}, "the command is rl there, sft here"),
        ({"method": "full"}, "the method is lora there, full here"),
        ({"base_fingerprint": "g"}, "the base is f there, g here"),
        ({"flags": {**RUN["flags"], "lora_r": 4}}, "--lora_r is 8 there, 4 here"),
        ({"flags": {**RUN["flags"], "best_by": "hr"}}, "--best_by is ndcg there, hr here"),  # of an older release
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed, message):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    (folder / "minionerec.json").write_text(json.dumps(RUN))
    (folder / "optimizer.pt").touch()
    said, flags = [], RunFlags(output_dir=str(tmp_path), resume_from_checkpoint="True")
    assert resume_point(flags, {**RUN, "flags": {**RUN["flags"], "seed": 2}}, said.append)
    assert said[-1].startswith("warning: --seed is 2 here and was 1 up to ")
    assert resume_point(flags, {**RUN, "flags": {**RUN["flags"], "pack_rows": 16}}, said.append)
    assert said[-1].endswith("does not record it") and "--pack_rows is 16 here" in said[-1]
    with pytest.raises(InputError, match=message):
        resume_point(flags, {**RUN, **changed}, said.append)


def test_a_truncated_checkpoint_is_never_resumed(tmp_path):
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10, "log_his')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").touch()
    said, flags = [], RunFlags(output_dir=str(tmp_path), resume_from_checkpoint="True")
    assert resume_point(flags, RUN, said.append).path == str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="is not a complete checkpoint"):
        resume_point(replace(flags, resume_from_checkpoint=str(tmp_path / "checkpoint-10")), RUN, said.append)
    assert json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["global_step"] == 5


def test_resuming_a_finished_run_says_that_nothing_is_left(files, base, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    done = run_command("sft.py", **sft_flags(files, base, run, **FLAGS, resume_from_checkpoint=True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"nothing is left to train: \S+ is at step (\d+) of \1;", done.stdout)
    assert "do not match" not in done.stderr
    assert adapter_bytes(run) == adapter_bytes(whole)


IN_PARTS = {"use_lora": True, "num_epochs": 2, "micro_batch_size": 2, "tasks": "sid_history_to_sid", "eval_step": 0.4}


@pytest.fixture(scope="module")
def in_parts(files, base, tmp_path_factory) -> Path:
    """A run whose steps have eight micro-batches, or four at the end of an epoch: three steps in each of two epochs."""
    output = tmp_path_factory.mktemp("parts") / "run"
    done = run_command("sft.py", **sft_flags(files, base, output, **IN_PARTS, pack_rows=0))
    assert done.returncode == 0, done.stderr[-3000:]
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


def test_a_run_that_is_stopped_in_its_first_step_has_nothing_to_save(tmp_path):
    trainer = trainer_of(tmp_path, 2, max_steps=4)
    compute = trainer.compute_loss

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return compute(*args, **kwargs)

    trainer.compute_loss = stopped
    with pytest.raises(RunError, match=r"stopped at step 0 of 4, before there was anything to save; .* starts anew"):
        trainer.train()
    assert not list(tmp_path.glob("*/checkpoint-*"))
