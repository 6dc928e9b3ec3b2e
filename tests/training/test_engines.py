"""A run that resumes under another engine, or over another number of processes: what can be carried over is, what
cannot is one line before anything is loaded. That engines train as one process does: test_devices.py."""

import shutil
from pathlib import Path

import processes
import pytest
from helpers import cut_short, flag_words, sft_flags, strings
from processes import ONE, assert_same_run
from recorded import resumable

import sft
from minionerec.checkpoint import Checkpoint
from minionerec.errors import InputError
from minionerec.flags import engine
from minionerec.training.resume import resume_point

KINDS = [(name, count) for name in ("", "ZeRO-2", "ZeRO-3", "FSDP") for count in (1, 2)]
RUN = {"command": "sft", "method": "full", "base_fingerprint": "f", "flags": {}}
ZERO = "global_step5/zero_pp_rank"
VARIABLES = {
    "": {},
    "FSDP": {"ACCELERATE_USE_FSDP": "true"},
    **{
        f"ZeRO-{stage}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
        for stage in ("2", "3")
    },
}


@pytest.mark.parametrize("here", KINDS, ids=str)
def test_every_engine_resumes_what_it_can(tmp_path, monkeypatch, here):
    for name, value in {**VARIABLES[here[0]], "WORLD_SIZE": str(here[1])}.items():
        monkeypatch.setenv(name, value)
    assert engine() == here[0]
    for there in KINDS:
        run = {**RUN, "engine": there[0], "processes": there[1]}
        flags, said = resumable(tmp_path / str(there) / "checkpoint-5", run, "optimizer.pt"), []
        if there == here or (there[0] == here[0] and not there[0].startswith("ZeRO")):
            assert resume_point(flags, RUN, said.append)
            assert len(said) == 1 + (there != here) and not any("warning" in line for line in said)
            continue
        with pytest.raises(InputError) as error:
            resume_point(flags, RUN, said.append)
        (line,) = error.value.problems
        remedy = f"accelerate launch --config_file configs/{there[0].replace('-', '').lower()}.yaml"
        assert (remedy if there[0] else "python or torchrun, without accelerate launch") in line
        assert (f"--num_processes {there[1]}" in line) == there[0].startswith("ZeRO")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["optimizer.pt"], ("", 0)),
        (["optimizer.bin", "pytorch_model_fsdp.bin"], ("FSDP", 0)),
        (["optimizer_0/__0_0.distcp"], ("FSDP", 0)),
        ([f"{ZERO}_0_mp_rank_00_optim_states.pt", "global_step5/mp_rank_00_model_states.pt"], ("ZeRO-2", 1)),
        ([f"{ZERO}_{i}_mp_rank_00_{what}_states.pt" for i in range(3) for what in ("model", "optim")], ("ZeRO-3", 3)),
    ],
)
def test_the_files_of_an_older_release_tell_its_engine(tmp_path, files, found):
    flags = resumable(tmp_path / "checkpoint-5", RUN, *files)
    assert Checkpoint.read(str(tmp_path / "checkpoint-5")).engine == found
    if found[0]:
        with pytest.raises(InputError, match=f"was written by {found[0]}.* cannot be loaded by one process"):
            resume_point(flags, RUN, print)
    else:
        assert resume_point(flags, RUN, print)


def test_a_rate_from_before_rows_had_parameters_is_refused(tmp_path):
    run = {**RUN, "flags": {"sid_learning_rate": 0.01}}
    flags = resumable(tmp_path / "checkpoint-5", run, "optimizer.pt")
    with pytest.raises(InputError, match="has no optimizer state for SID rows alone"):
        resume_point(flags, run, print)
    flags = resumable(tmp_path / "checkpoint-5", {**run, "engine": "", "processes": 1}, "optimizer.pt")
    assert resume_point(flags, run, print)


def test_the_stage_of_a_deepspeed_file_counts(tmp_path, monkeypatch):
    file = tmp_path / "zero.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert engine() == "ZeRO-2"  # accelerate's default; it says itself that there is no such file
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert engine() == "ZeRO-3"


@pytest.fixture(scope="module")
def one(files, base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    sft.train(**strings(sft_flags(files, base, run, **ONE)))
    return run


def resumed(files, base, run: Path, ranks: int, engine: str = "torchrun") -> processes.Started:
    """A run that continues the first checkpoint of another."""
    cut_short(run)
    flags = {**sft_flags(files, base, run, **ONE), "resume_from_checkpoint": True}
    return processes.start("command", "sft.py", *flag_words(flags), ranks=ranks, engine=engine)


@pytest.mark.slow
def test_the_number_of_processes_may_change(files, base, one, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(one, run)
    for ranks in (2, 1):
        again = resumed(files, base, run, ranks)
        assert again.wait() == [0] * ranks, again.errors[-3000:]
        assert_same_run(one, run, 1e-5)


@pytest.mark.slow
def test_the_number_of_processes_of_fsdp_may_change(files, base, one, tmp_path):
    first = processes.start_command("sft.py", sft_flags(files, base, tmp_path, **ONE), ranks=2, engine="fsdp")
    assert first.wait() == [0, 0], first.errors[-3000:]
    again = resumed(files, base, tmp_path, 1, "fsdp")
    assert again.wait() == [0], again.errors[-3000:]
    assert_same_run(one, tmp_path, 1e-5)


@pytest.mark.slow
def test_an_engine_refuses_the_checkpoint_of_a_plain_run(files, base, one, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(one, run)
    again = resumed(files, base, run, 2, "fsdp")
    assert again.wait() == [2, 2]
    (line,) = [line for line in again.errors.splitlines() if "error" in line.lower()]
    assert line.startswith("sft.py: error: --resume_from_checkpoint: ") and "Traceback" not in again.errors
    assert not (run / "final_checkpoint").exists()
