"""Folders that pass for checkpoints, with any record of a run."""

import json
from pathlib import Path

import pytest

from minionerec.data.prompts import load_prompts
from minionerec.errors import InputError

GOOD = load_prompts("tools").to_json()


def record(folder: Path, prompts: object = GOOD, **changes) -> Path:
    """A folder that passes for a checkpoint, with this record."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    run = {"command": "sft", "method": "full", "version": "0.1.0", "flags": {}, "prompts": prompts, **changes}
    (folder / "minionerec.json").write_text(json.dumps(run))
    return folder


def problems_of(command, **flags) -> list[str]:
    with pytest.raises(InputError) as error:
        command(**{name: str(value) if isinstance(value, Path) else value for name, value in flags.items()})
    assert not any("\n" in problem or len(problem) > 1000 for problem in error.value.problems)
    return error.value.problems


def evaluation(files, checkpoint: Path) -> dict:
    result = checkpoint / "result.json"
    flags = {"info_file": files["info"], "test_data_path": files["test"], "result_json_data": result}
    return {"base_model": checkpoint, "num_beams": 5, **flags}
