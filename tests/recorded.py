"""Folders that pass for checkpoints, with any record of a run."""

import json
from pathlib import Path

import pytest

from minionerec.data.prompts import load_prompts
from minionerec.errors import InputError
from minionerec.flags import RunFlags

GOOD = load_prompts("tools").to_json()


def record(folder: Path, prompts: object = GOOD, **changes) -> Path:
    """A folder that passes for a checkpoint, with this record."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    run = {"command": "sft", "method": "full", "version": "0.1.0", "flags": {}, "prompts": prompts, **changes}
    (folder / "minionerec.json").write_text(json.dumps(run))
    return folder


def resumable(folder: Path, run: dict | None, *files: str, state: str = '{"global_step": 5}') -> RunFlags:
    """Makes a folder that passes for the checkpoint of a step, with these files and the record of a run (None for
    none), and gives the flags that resume the newest one next to it."""
    for name in (*files, "trainer_state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "trainer_state.json").write_text(state)
    if run is not None:
        (folder / "minionerec.json").write_text(json.dumps(run))
    return RunFlags(output_dir=str(folder.parent), resume_from_checkpoint="True")


def problems_of(command, **flags) -> list[str]:
    with pytest.raises(InputError) as error:
        command(**{name: str(value) if isinstance(value, Path) else value for name, value in flags.items()})
    assert not any("\n" in problem or len(problem) > 1000 for problem in error.value.problems)
    return error.value.problems


def evaluation(files, checkpoint: Path) -> dict:
    result = checkpoint / "result.json"
    flags = {"info_file": files["info"], "test_data_path": files["test"], "result_json_data": result}
    return {"base_model": checkpoint, "num_beams": 5, **flags}
