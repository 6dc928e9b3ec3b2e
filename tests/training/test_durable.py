"""Runs that end badly: stopped, out of room, with a loss that is NaN. Kills: test_sft.py, test_rl.py and
benchmarks/kill_and_resume.py."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers import adapter_bytes, largest_file, refused, run_command, sft_flags, succeed
from processes import start_command

from minionerec.errors import Problems
from minionerec.flags import check_output_dir

FLAGS = {"use_lora": True, "num_epochs": 4, "eval_step": 0.2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def whole(files, base, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    succeed("sft.py", **sft_flags(files, base, output, **FLAGS))
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
    succeed("sft.py", **sft_flags(files, base, output, **FLAGS, resume_from_checkpoint=True))
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
    succeed("sft.py", **flags)
    assert adapter_bytes(output) == adapter_bytes(whole)


def test_a_folder_that_cannot_be_written(files, base, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "run"
    refused(
        "sft.py", f"--output_dir {output}: {tmp_path}/file is a file, not a folder", **sft_flags(files, base, output)
    )
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))  # read-only, which a superuser ignores
    problems = Problems()
    check_output_dir(problems, str(tmp_path / "new" / "run"), resume=None)
    assert problems == [f"--output_dir {tmp_path}/new/run: {tmp_path} cannot be written to"]


def test_an_output_that_is_a_link_to_nowhere_is_refused_or_made(files, base, tmp_path):
    """Where it leads to decides."""
    (tmp_path / "file").touch()
    (tmp_path / "bad").symlink_to(tmp_path / "file" / "run")
    refused("sft.py", f"{tmp_path}/file is a file, not a folder", **sft_flags(files, base, tmp_path / "bad"))
    (tmp_path / "good").symlink_to(tmp_path / "disk" / "run")
    problems = Problems()
    check_output_dir(problems, str(tmp_path / "good"), resume=None)
    assert not problems


def test_resuming_never_overwrites_another_run(tmp_path):
    for name in ("own/checkpoint-4", "own/final_checkpoint", "other/checkpoint-6", "finished/final_checkpoint"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    allowed = {("own", "True"), ("own", "own/checkpoint-4"), ("link", "own/checkpoint-4"), ("own", "link/checkpoint-4")}
    allowed |= {("other", "True"), ("new", "True"), ("new", "own/checkpoint-4")}
    for name in ("own", "link", "other", "finished", "new"):
        for resume in (None, "True", "own/checkpoint-4", "link/checkpoint-4"):
            problems, given = Problems(), resume if resume in (None, "True") else str(tmp_path / resume)
            check_output_dir(problems, str(tmp_path / name), given)
            good = (name, resume) in allowed or name == "new" or {name, (resume or "")[:4]} == {"link"}
            good = good or (name == "link" and resume == "True")
            assert bool(problems) != good, (name, resume, problems)
            assert all("holds another run" in line or "holds a run" in line for line in problems)


def test_a_loss_that_is_no_number_stops_the_run(files, base, tmp_path):
    done = run_command("sft.py", **sft_flags(files, base, tmp_path / "run", learning_rate=1e30, num_epochs=4))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = r"^sft.py: error: (the loss is (nan|inf)|weights are NaN or infinite).* --learning_rate$"
    assert re.search(said, done.stderr, re.M)
    assert not (tmp_path / "run" / "final_checkpoint").exists()


def test_resuming_a_finished_run_says_that_nothing_is_left(files, base, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    done = succeed("sft.py", **sft_flags(files, base, run, **FLAGS, resume_from_checkpoint=True))
    assert re.search(r"nothing is left to train: \S+ is at step (\d+) of \1;", done.stdout)
    assert "do not match" not in done.stderr
    assert adapter_bytes(run) == adapter_bytes(whole)
