"""Checks of flags that both trainers share, made before anything heavy is imported.

Each adds what it finds to a `Problems` list; paths and cells are checked by `minionerec.data`.
"""

import os

from minionerec.checkpoint import is_adapter
from minionerec.errors import Problems

INIT_LORA_WEIGHTS = ("True", "gaussian", "orthogonal")


def check_model(problems: Problems, flag: str, path: str) -> None:
    """A folder that exists, or something that can be the name of a hub model."""
    if not path:
        problems.add(f"--{flag} is missing; give a folder with a model, or the name of a hub model")
    elif os.path.isdir(path):
        if not any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json")):
            final = os.path.join(path, "final_checkpoint")
            meant = f"did you mean {final}?" if os.path.isdir(final) else "is it a model?"
            problems.add(f"--{flag} {path}: the folder has no config.json; {meant}")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or os.path.exists(path):
        problems.add(f"--{flag} {path}: no such folder")


def check_base(problems: Problems, base_model: str) -> None:
    """A model that an adapter can stand on."""
    check_model(problems, "base_model", base_model)
    if is_adapter(base_model):
        problems.add(f"--base_model {base_model}: is an adapter, not a model; name the base it was trained on")


def check_adapter_flags(
    problems: Problems,
    use_lora: bool,
    use_qlora: bool,
    load_in_8bit: bool,
    lora_r: int,
    lora_alpha: int,
    lora_dropout: float,
    lora_target_modules: str,
    init_lora_weights: str,
) -> None:
    """The flags of the adapter: one method, sensible numbers."""
    if use_lora and use_qlora:
        problems.add("--use_lora and --use_qlora exclude each other; keep one (QLoRA is LoRA on a 4-bit base)")
    if load_in_8bit and not use_lora:
        problems.add("--load_in_8bit stores the base of --use_lora True in 8 bits; QLoRA's base has 4 bits already")
    if lora_r < 1:
        problems.add(f"--lora_r {lora_r}: the rank must be 1 or more")
    if lora_alpha < 1:
        problems.add(f"--lora_alpha {lora_alpha}: must be 1 or more")
    if not 0 <= lora_dropout < 1:
        problems.add(f"--lora_dropout {lora_dropout}: must be at least 0 and below 1")
    if not lora_target_modules.strip():
        problems.add("--lora_target_modules is empty; give all, qkv, or layer names separated by commas")
    if init_lora_weights not in INIT_LORA_WEIGHTS:
        problems.add(
            f"--init_lora_weights {init_lora_weights!r}: must be one of {', '.join(INIT_LORA_WEIGHTS)}; the others of "
            "PEFT change the base weights, and the adapter would not fit the published base any more"
        )


def check_positive(problems: Problems, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            problems.add(f"--{name} {value}: must be above 0")


def check_batch(problems: Problems, batch_size: int, micro_batch_size: int) -> None:
    """The global batch must be a whole number of micro-batches on every process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size > 0 and micro_batch_size > 0 and batch_size % (micro_batch_size * processes):
        of_processes = f" x {processes} processes" if processes > 1 else ""
        problems.add(
            f"--batch_size {batch_size} is no multiple of --micro_batch_size {micro_batch_size}{of_processes}; "
            f"try --batch_size {-(-batch_size // (micro_batch_size * processes)) * micro_batch_size * processes}"
        )


def check_output_dir(problems: Problems, output_dir: str, resume: bool) -> None:
    """A run never overwrites another one."""
    if not output_dir:
        problems.add("--output_dir is missing; give a folder for the checkpoints")
    elif os.path.isdir(output_dir) and not resume:
        held = [name for name in os.listdir(output_dir) if name.startswith(("checkpoint-", "final_checkpoint"))]
        if held:
            problems.add(
                f"--output_dir {output_dir}: holds another run ({sorted(held)[0]}); name another folder, remove this "
                "one, or continue it with --resume_from_checkpoint True"
            )
    if output_dir:
        check_writable(problems, "output_dir", output_dir)


def check_new_folder(problems: Problems, output_dir: str) -> None:
    """A folder that a command makes as a whole: it must not be there yet."""
    if not output_dir:
        problems.add("--output_dir is missing; give a folder for the checkpoint")
    elif os.path.exists(output_dir):
        problems.add(f"--output_dir {output_dir}: exists already; name another folder, or remove it")
    else:
        check_writable(problems, "output_dir", output_dir)


def check_writable(problems: Problems, flag: str, path: str) -> None:
    """A path that can be made, or written where it is there."""
    above = os.path.abspath(path)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        problems.add(f"--{flag} {path}: {above} cannot be written to")


def check_resume(problems: Problems, resume_from_checkpoint: str | None) -> None:
    """Nothing, True for the newest checkpoint, or a folder."""
    if resume_from_checkpoint not in (None, "True", "true") and not os.path.isdir(resume_from_checkpoint):
        problems.add(f"--resume_from_checkpoint {resume_from_checkpoint}: no such folder; True takes the newest one")


def check_report_to(problems: Problems, report_to: str) -> None:
    """The tracker must be known and installed."""
    from importlib.util import find_spec

    if report_to not in ("none", "tensorboard", "wandb"):
        problems.add(f"--report_to {report_to!r}: must be none, tensorboard or wandb")
    elif report_to != "none" and find_spec(report_to) is None:
        problems.add(f"--report_to {report_to}: {report_to} is not installed; pip install {report_to}")


def memory_gb(text: str) -> float:
    """A size such as 12GB (1e9 bytes) or 12GiB (2^30 bytes), in GB. Raises ValueError for anything else."""
    text = text.upper()
    return float(text.removesuffix("GIB")) * 2**30 / 1e9 if text.endswith("GIB") else float(text.removesuffix("GB"))


def check_gpu_memory(problems: Problems, gpu_memory: str) -> None:
    """Nothing, or a size such as 12GB."""
    try:
        good = not gpu_memory or memory_gb(gpu_memory) > 0
    except ValueError:
        good = False
    if not good:
        problems.add(f"--gpu_memory {gpu_memory!r}: must be a size such as 12GB or 12GiB")
