"""Which checkpoints a run resumes from: those of 0.1.0, for which two stored runs stand, and those of this release."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, logged, refused, run_command, tensors_of
from safetensors.torch import load_file

from minionerec import __version__
from minionerec.checkpoint import LACKED_IN_0_1, Checkpoint
from minionerec.errors import InputError

STORED = ROOT / "tests" / "runs_0_1_0"


def decoded(value: object, tensors: dict[str, torch.Tensor]) -> object:
    """What a state file held: tensors, arrays and long tuples are in `tensors`, by name."""
    if isinstance(value, list):
        return [decoded(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {key: decoded(one, tensors) for key, one in inner}
    if kind == "tuple":
        return tuple(decoded(one, tensors) for one in inner)
    if kind == "ints":
        return tuple(tensors[inner].tolist())
    return tensors[inner] if kind == "tensor" else tensors[inner].numpy().astype("uint32")


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """The stored runs as 0.1.0 left them, in the current folder."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    for folder in tmp_path.glob("*/checkpoint-3"):
        tensors = load_file(folder / "states.safetensors")
        for name, state in json.loads((folder / "states.json").read_text()).items():
            torch.save(decoded(state, tensors), folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags_of(run: Path) -> dict[str, object]:
    flags = json.loads((run / "checkpoint-3" / "minionerec.json").read_text())["flags"]
    given = {name: value for name, value in flags.items() if value not in ("", None)}
    if flags["output_dir"] == "rl":  # recorded, but the checkpoint's own
        del given["cutoff_len"]
    return {**given, "resume_from_checkpoint": True}


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_run_of_0_1_0_ends_with_the_weights_that_0_1_0_gave_it(stored, command):
    """SFT: equal to the last digit on the CPU that made them. RL adds up its loss in another order since, which moves
    weights of up to 0.2 by 1.5e-8; so do CPUs with other instructions."""
    run = stored / command
    expected = tensors_of(run / "final_checkpoint")
    shutil.move(run / "final_checkpoint", stored / "start" if command == "rl" else stored / "ended")
    flags = flags_of(run)
    done = run_command(f"{command}.py", **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stdout and "warning" not in done.stdout, done.stdout
    found = tensors_of(run / "final_checkpoint")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert logged(run, "loss") == pytest.approx(logged(STORED / command, "loss"), abs=1e-6)
    record = json.loads((run / "final_checkpoint" / "minionerec.json").read_text())
    assert (record["version"], record["processes"]) == (__version__, 1)


def checkpoint(folder: Path, version: str | None, **record: object) -> Checkpoint:
    folder.mkdir()
    run = {"command": "rl", "flags": {}, **({"version": version} if version else {}), **record}
    (folder / "minionerec.json").write_text(json.dumps(run))
    return Checkpoint.read(str(folder))


def test_what_0_1_0_did_without_a_flag_is_known(tmp_path):
    """A checkpoint says it, whether its release had the flag or not; its own word counts."""
    for number, version in enumerate(("0.1.0", "0.1.7", None)):
        old = checkpoint(tmp_path / str(number), version, flags={"sft_weight": 0.5})
        assert old.flags == {**LACKED_IN_0_1["rl"], "sft_weight": 0.5} and old.release == (0, 1)
    assert checkpoint(tmp_path / "new", "0.2.3").flags == {}
    assert checkpoint(tmp_path / "other", "0.1.0", command="merge").flags == {}


@pytest.mark.parametrize("version", ["0.3.0", "1.0", "0.1000.2"])
def test_a_checkpoint_of_a_later_release_is_refused(tmp_path, version):
    with pytest.raises(InputError) as error:
        checkpoint(tmp_path / "later", version)
    (problem,) = error.value.problems
    assert problem.endswith(f"by release {version} of minionerec-lora, and this is {__version__}; update it")


@pytest.mark.parametrize("version", ["", "new", "0", 2, "0.x", "0.99999999999999999999", "-1.2", None])
def test_a_release_that_is_none_is_named(tmp_path, version):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "minionerec.json").write_text(json.dumps({"version": version}))
    with pytest.raises(InputError, match=r"version is .* and must be a release such as"):
        Checkpoint.read(str(tmp_path / "odd"))


def test_a_run_of_0_1_0_does_not_resume_with_a_rate_for_sid_rows(stored):
    flags = {**flags_of(stored / "sft"), "sid_learning_rate": 3e-3}
    refused("sft.py", "--sid_learning_rate is 0.0 there, 0.003 here", **flags)
    refused("sft.py", "has no optimizer state for SID rows alone", **flags)
