"""What a checkpoint folder says about itself. Only the standard library is imported."""

import json
import os

from minionerec.cli import InputError

RUN_FILE = "minionerec.json"  # the resolved configuration of the run that wrote the checkpoint


def is_adapter(path: str) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def _read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None


def read_run(path: str) -> dict:
    """The resolved configuration in a checkpoint: command, method, flags, prompts. Empty where there is none."""
    file = os.path.join(path, RUN_FILE)
    return _read_json(file) if os.path.isfile(file) else {}


def base_of_adapter(path: str) -> str:
    """The base model that an adapter names. Raises InputError where it names none, or a folder that is gone."""
    base = _read_json(os.path.join(path, "adapter_config.json")).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{path}: the adapter names no base; give --base_model BASE --adapter {path}")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise InputError(f"{path}: its base {base} is not there; give --base_model BASE --adapter {path}")
    return base
