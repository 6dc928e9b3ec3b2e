"""Which checkpoint a run resumes from, and whether it may."""

import json
import os
from collections.abc import Callable
from dataclasses import fields

from transformers import TrainerState

from minionerec.checkpoint import (
    check_trainer_state,
    read_run,
)
from minionerec.errors import InputError


def is_complete(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end: it has a whole trainer state, which comes last."""
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False


def newest_checkpoint(output_dir: str) -> str | None:
    """The complete checkpoint of the latest step under `output_dir`, or None."""
    found = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        step = name.removeprefix("checkpoint-")
        if name != step and step.isdigit() and is_complete(os.path.join(output_dir, name)):
            found.append((int(step), os.path.join(output_dir, name)))
    return max(found)[1] if found else None


# Flags that may differ between a run and its continuation without a word, and those that may not differ at all.
NOT_OF_THE_TRAINING = ("output_dir", "resume_from_checkpoint", "wandb_project", "wandb_run_name", "report_to")


OF_THE_ADAPTER = ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora", "load_in_8bit")


def resume_point(
    output_dir: str, resume_from_checkpoint: str | None, run: dict, say: Callable[[str], None]
) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: itself, or for True the newest one, None where there is
    none yet. Where other flags differ from those of the run that wrote it, that is said.

    Raises InputError for one that was not written to its end, or that `run` cannot go on from: of another command,
    method, adapter or base.
    """
    checkpoint = _checkpoint_meant(output_dir, resume_from_checkpoint, say)
    if checkpoint:
        check_trainer_state(checkpoint, {field.name for field in fields(TrainerState)})
    recorded = read_run(checkpoint) if checkpoint else {}
    if not recorded:
        return checkpoint
    flags, before = run["flags"], recorded.get("flags", {})
    adapted = OF_THE_ADAPTER if run["method"] in ("lora", "qlora") else ()
    problems = [
        f"--resume_from_checkpoint: {checkpoint} is of another run: {what} was {old} there and is {new} here"
        for what, old, new in (
            ("the command", recorded.get("command"), run["command"]),
            ("the method", recorded.get("method"), run["method"]),
            ("the base", recorded.get("base_fingerprint"), run["base_fingerprint"]),
            *((f"--{name}", before.get(name), flags[name]) for name in adapted),
        )
        if old != new
    ]
    if problems:
        raise InputError(problems)
    for name in sorted(set(flags) & set(before) - {*NOT_OF_THE_TRAINING, *adapted}):
        if flags[name] != before[name]:
            say(f"warning: --{name} is {flags[name]} here and was {before[name]} up to {checkpoint}")
    return checkpoint


def _checkpoint_meant(output_dir: str, resume_from_checkpoint: str | None, say: Callable[[str], None]) -> str | None:
    if resume_from_checkpoint not in ("True", "true"):
        if resume_from_checkpoint is not None and not is_complete(resume_from_checkpoint):
            raise InputError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: is no complete checkpoint of a training run; True "
                "takes the newest one that is"
            )
        return resume_from_checkpoint
    newest = newest_checkpoint(output_dir)
    say(f"resuming from {newest}" if newest else f"nothing to resume in {output_dir}; starting anew")
    return newest
