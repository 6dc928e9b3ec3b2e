"""Which checkpoint a run resumes from, and whether it may."""

import os
from collections.abc import Callable
from dataclasses import fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState

from minionerec import world
from minionerec.checkpoint import Checkpoint, digest, is_complete, newest_checkpoint
from minionerec.data.files import read_json
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags, RunFlags, engine
from minionerec.training import nodes

# Flags that may change when a run is resumed, without a word.
IGNORED_ON_RESUME = (
    "output_dir",
    "resume_from_checkpoint",
    "wandb_project",
    "wandb_run_name",
    "report_to",
    "ddp_timeout",
    "gpu",
    "compile",
)
# Flags that decide what a checkpoint holds and which is the best. SID rows with a rate are parameters of their own.
FIXED = ("optim", "best_by", "sync_ref_model", "average_weights", "sid_learning_rate")


def resume_point(flags: RunFlags, run: dict, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` means: that folder, or for True the newest one in the output
    folder; None for a run that starts anew. Says where other flags differ from those of the run that wrote it. Every
    process must call it.

    Args:
        run: what this run will record, see `checkpoint.run_record`.
        say: prints a line in the first process.

    Raises InputError where nodes do not have the same flags, base and output folder, and for a checkpoint that was not
    written to its end, that is not the last one in the output folder, that belongs to a different run (of another
    command, method, adapter or base), or whose optimizer state does not fit the engine of this run.
    """
    nodes.check_same(flags.to_dict(), base=run["base_fingerprint"])
    nodes.check_output_shared(flags.output_dir)
    path = nodes.first_decides(lambda: _path_of(flags, say))
    if path is None:
        return None
    checkpoint = Checkpoint.read(path)
    nodes.check_same({}, **{f"--resume_from_checkpoint {path}": digest(os.path.join(path, "trainer_state.json"))})
    checkpoint.check_trainer_state({field.name for field in fields(TrainerState)})
    step = read_json(os.path.join(path, "trainer_state.json"))["global_step"]
    newest = newest_checkpoint(flags.output_dir)
    if newest and int(newest.rpartition("-")[2]) > step:  # from which True would go on after a stop
        raise InputError(
            f"--resume_from_checkpoint {path}: {flags.output_dir} holds a later checkpoint, {newest}, which this run "
            "would leave behind; remove the later ones, or name another --output_dir"
        )
    # An optimizer that starts anew would silently train other weights. DeepSpeed keeps its own in global_step*.
    if not any(name.startswith(("optimizer", "global_step")) for name in os.listdir(path)):
        raise InputError(
            f"--resume_from_checkpoint: {path} has lost its optimizer state; resume from another checkpoint"
        )
    problems = _other_engine(checkpoint, say)
    if not checkpoint.run:
        if problems:
            raise InputError(problems)
        say(f"warning: {path} records no flags and no wording; whether they are those of this run is not known")
        return checkpoint
    here, there, recorded = run["flags"], checkpoint.flags, checkpoint.run
    shape = (*AdapterFlags.SHAPE, "load_in_8bit") if run["method"] in ("lora", "qlora") else ()
    fixed = [name for name in FIXED if name in here]
    problems += [
        f"--resume_from_checkpoint: {path} belongs to a different run: {what} is {old} there, {new} here"
        for what, old, new in (
            ("the command", recorded.get("command"), run["command"]),
            ("the method", recorded.get("method"), run["method"]),
            ("the base", checkpoint.base_fingerprint, run["base_fingerprint"]),
            ("the list of SID tokens", recorded.get("sid_tokens", run.get("sid_tokens")), run.get("sid_tokens")),
            *((f"--{name}", there.get(name), here[name]) for name in (*fixed, *shape)),
        )
        if old != new
    ]
    # The last commits before 0.2.0 record an engine, and keep SID rows apart already.
    if here.get("sid_learning_rate") and checkpoint.release < (0, 2) and "engine" not in recorded:
        problems.append(
            f"--resume_from_checkpoint: {path} has no optimizer state for SID rows alone, which --sid_learning_rate "
            "needs now; finish that run with the commit that began it, or start a new one in another --output_dir"
        )
    if problems:
        raise InputError(problems)
    for name in sorted(set(here) - {*IGNORED_ON_RESUME, *shape, *fixed}):
        if name not in there:
            say(f"warning: --{name} is {here[name]} here, and {path} does not record it")
        elif here[name] != there[name]:
            say(f"warning: --{name} is {here[name]} here and was {there[name]} up to {path}")
    same = all(here.get(name) == there.get(name) for name in ("category", "prompt_file", "tasks"))  # else said above
    if same and recorded.get("prompts") not in (None, run.get("prompts")):
        say(f"warning: the wording of the prompts is not what it was up to {path}")
    for name, content in run.get("data", {}).items():
        if recorded.get("data", {}).get(name, content) != content:
            say(f"warning: --{name} {here[name]}: its content is not what it was up to {path}")
    return checkpoint


def load_tensors(checkpoint: str, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that a checkpoint to resume from must have. Raises InputError if it cannot be read."""
    try:
        return load_file(os.path.join(checkpoint, name))
    except (OSError, SafetensorError):
        raise InputError(
            f"--resume_from_checkpoint: {checkpoint} has lost its {name}, or it is damaged; resume from another "
            "checkpoint"
        ) from None


def _other_engine(checkpoint: Checkpoint, say: Callable[[str], None]) -> list[str]:
    """What is wrong if another engine wrote the optimizer state of a checkpoint, or the same one over a number of
    processes that it cannot change. Says where that number changes and may."""
    (there, count), here = checkpoint.engine, engine()
    count_is_fixed = there.startswith("ZeRO")
    if there == here and count in (0, world.size()):
        return []
    was, now = _in_words(there, count), _in_words(here, world.size())
    if there == here and not count_is_fixed:
        say(f"{checkpoint.path} was written by {was}; continuing with {now}")
        return []
    if there:
        many = f" --num_processes {count}" if count_is_fixed else ""
        start = f"accelerate launch --config_file configs/{there.replace('-', '').lower()}.yaml{many}"
    else:
        start = "python or torchrun, without accelerate launch"
    return [
        f"--resume_from_checkpoint: {checkpoint.path} was written by {was}, and its optimizer state cannot be loaded "
        f"by {now}; start the command with {start}, or a new run in another --output_dir"
    ]


def _in_words(engine: str, count: int) -> str:
    name = engine if engine else "torchrun" if count > 1 else ""
    over = f"{count} processes" if count > 1 else "one process" if count else ""
    return " over ".join(part for part in (name, over) if part) or "a run without an engine"


def _path_of(flags: RunFlags, say: Callable[[str], None]) -> str | None:
    given = flags.resume_from_checkpoint
    if given not in ("True", "true"):
        if given is not None and not is_complete(given):
            raise InputError(
                f"--resume_from_checkpoint {given}: is not a complete checkpoint of a training run; True takes the "
                "newest one that is"
            )
        return given
    newest = newest_checkpoint(flags.output_dir)
    say(f"resuming from {newest}" if newest else f"nothing to resume in {flags.output_dir}; starting anew")
    return newest
