"""Checks of the values in a checkpoint's JSON files, which are input like any other.

Each table has the values that later commands read, by name: a check, and what the value must be, for messages.
"""

import re
import sys
from typing import TypeGuard

from minionerec.data.files import shorten
from minionerec.errors import InputError


def _is_whole(least: int):
    return lambda value: type(value) is int and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and no whole number that is too large for a float."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max


def _is(*kinds: type):
    return lambda value: isinstance(value, kinds)


def _is_release(value: object) -> bool:
    return isinstance(value, str) and re.match(r"\d{1,9}\.\d{1,9}(\.|$)", value) is not None


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is(str), value)))


def _is_log(value: object) -> bool:
    lists = value.get("metrics", {}) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(lists, dict) or not all(map(_is(list), lists.values())):
        return False
    values = [entry for each in lists.values() for entry in each if entry is not None]
    return all(map(is_number, (value.get("total"), value.get("loss"), *values))) and _is_whole(0)(value.get("step"))


TEXT = (_is(str), "text")
TEXT_OR_NULL = (_is(str, type(None)), "text or null")
OBJECT = (_is(dict), "an object")
TRUE_OR_FALSE = (_is(bool), "true or false")
STEPS = (_is_whole(0), "a whole number from 0")

RUN = {
    "command": TEXT,
    "method": TEXT,
    "version": (_is_release, "a release such as 0.2.0"),
    "engine": TEXT,
    "processes": (_is_whole(1), "a whole number from 1"),
    "base_fingerprint": TEXT_OR_NULL,
    "sid_tokens": TEXT,
    "items": OBJECT,
    "data": OBJECT,
    **dict.fromkeys(("seconds", "peak_memory_gb"), (lambda value: is_number(value) and value >= 0, "a number from 0")),
    "unlogged": (_is_log, "an object with the numbers total, loss and step, and lists of numbers as metrics"),
    "flags": OBJECT,
    "prompts": OBJECT,
}
FLAGS = {
    "cutoff_len": (_is_whole(32), "a whole number from 32"),
    **dict.fromkeys(("use_lora", "use_qlora", "load_in_8bit", "use_rslora", "use_dora"), TRUE_OR_FALSE),
    **dict.fromkeys(("lora_r", "test_beam"), (_is_whole(1), "a whole number from 1")),
    "lora_alpha": (is_number, "a number"),  # an adapter of PEFT may have a fraction
    **dict.fromkeys(("category", "sid_index_path", "train_file", "eval_file", "lora_target_modules"), TEXT),
}
ADAPTER = {
    "base_model_name_or_path": TEXT_OR_NULL,
    "peft_type": (lambda value: value in ("LORA", "TRAINABLE_TOKENS"), "LORA or TRAINABLE_TOKENS"),
    "task_type": (lambda value: value in ("CAUSAL_LM", None), "CAUSAL_LM or null"),
    "r": (_is_whole(1), "a whole number from 1"),
    "rank_pattern": (
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_whole(1), value.values()))),
        "an object of ranks",
    ),
    "lora_alpha": (is_number, "a number"),
    "init_lora_weights": (
        lambda value: not str(value).startswith("pissa_niter_"),
        "another start: this one changes the base at random, each time in another way",
    ),
    **dict.fromkeys(("use_rslora", "use_dora"), TRUE_OR_FALSE),
    "target_modules": (lambda value: isinstance(value, str) or _is_names(value), "a list of names"),
    **dict.fromkeys(("target_parameters", "modules_to_save"), (_is_names, "a list of names")),
    # These would import a module that the file names, and repeat layers as often as it says.
    **dict.fromkeys(("megatron_config", "layer_replication"), (lambda value: not value, "null")),
}
TRAINER_STATE = {
    **dict.fromkeys(("global_step", "max_steps", "num_train_epochs"), STEPS),
    **dict.fromkeys(("epoch", "total_flos"), (is_number, "a number")),
    "best_metric": (_is(float, int, type(None)), "a number or null"),  # infinite before the first good one
    "best_model_checkpoint": TEXT_OR_NULL,
    "log_history": (lambda value: isinstance(value, list) and all(map(_is(dict), value)), "a list of objects"),
    "stateful_callbacks": OBJECT,
}


def check_values(file: str, data: object, table: dict, remedy: str) -> dict:
    """`data`, an object whose values of these names are as they must be. Raises InputError naming the others."""
    if not isinstance(data, dict):
        raise InputError(f"{file}: must be an object; {remedy}")
    problems = [
        f"{file}: {name} is {shorten(data[name], 60)} and must be {what}; {remedy}"
        for name, (good, what) in table.items()
        if name in data and not good(data[name])
    ]
    if problems:
        raise InputError(problems)
    return data
