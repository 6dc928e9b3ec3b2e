"""What a checkpoint folder says about itself, to us and to older releases. Only the standard library is imported."""

import json
import os

from minionerec.data.files import shorten
from minionerec.errors import InputError
from minionerec.recorded import ADAPTER, FLAGS, RUN, TRAINER_STATE, check_values

RUN_FILE = "minionerec.json"  # the resolved configuration of the run that wrote the checkpoint
ADAPTER_FILE = "adapter_config.json"


def is_adapter(path: str) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return os.path.isfile(os.path.join(path, ADAPTER_FILE))


def read_adapter(path: str) -> dict:
    """The configuration of a PEFT adapter. Raises InputError where it cannot be used, or where a rank is higher than
    those of the saved weights: PEFT would allocate it before it compares the two."""
    file = os.path.join(path, ADAPTER_FILE)
    config = check_values(file, _read_json(file), ADAPTER, "save the adapter again with PEFT, or train it again")
    found = [shape[0] for name, shape in _shapes(path) if ".lora_A" in name and shape]
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    if found and rank > max(found):
        raise InputError(f"{file}: has rank {rank}, and its weights have {max(found)} at most; correct it there")
    return config


def _shapes(path: str) -> list[tuple[str, list[int]]]:
    """Names and shapes of an adapter's tensors, from the head of their file; nothing where that cannot be read."""
    try:
        with open(os.path.join(path, "adapter_model.safetensors"), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(length, 100_000_000)))
        return [(name, tensor["shape"]) for name, tensor in head.items() if name != "__metadata__"]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return []  # loading it says what is wrong


def adapter_type(path: str) -> str:
    """The kind of adapter in a folder, as PEFT calls it: LORA, or TRAINABLE_TOKENS for SID rows alone."""
    return read_adapter(path).get("peft_type", "")


def _read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None


def read_run(path: str) -> dict:
    """The resolved configuration in a checkpoint: command, method, flags, prompts. Empty where there is none.

    Raises InputError where a value that later commands use is of another type or range; `minionerec.prompts` checks
    the prompts.
    """
    file = os.path.join(path, RUN_FILE)
    if not os.path.isfile(file):
        return {}
    remedy = "correct it there, or remove the file and give the flags"
    run = check_values(file, _read_json(file), RUN, remedy)
    check_values(f"{file}, flags", run.get("flags", {}), FLAGS, remedy)
    return run


def check_trainer_state(path: str, names: set[str]) -> None:
    """Raises InputError where a run cannot resume from the trainer state of a checkpoint: a value has another type, or
    its name is not one of `names`."""
    file, remedy = os.path.join(path, "trainer_state.json"), "resume from another checkpoint"
    state = check_values(file, _read_json(file), TRAINER_STATE, remedy)
    unknown = sorted(set(state) - names)
    if unknown:
        raise InputError(f"{file}: {shorten(unknown, 60)} are not values of a trainer state; {remedy}")


def mismatches(path: str, flags: dict, names: tuple[str, ...]) -> list[str]:
    """Where the run behind a checkpoint had other values for the flags of these names; one line each."""
    recorded = read_run(path).get("flags", {})
    return [
        f"warning: --{name} is {flags[name]} here and was {recorded[name]} for {path}, which stays"
        for name in names
        if flags.get(name) not in ("", None) and recorded.get(name, flags[name]) != flags[name]
    ]


def base_of_adapter(path: str, remedy: str = "name it with --base_model") -> str:
    """The base model that an adapter names. Raises InputError where it names none, or a folder that is gone."""
    base = read_adapter(path).get("base_model_name_or_path")
    if not base:
        raise InputError(f"{path}: the adapter names no base; {remedy}")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise InputError(f"{path}: its base {base} is not there; {remedy}")
    return base


def make_portable(path: str) -> None:
    """Rewrites the JSON files of a checkpoint, in place, so that transformers 4 and vLLM read them too.

    transformers 5 renamed what they look for, and some of it fails silently: without `rope_theta` a model is rotated by
    the default of its architecture.
    """
    file = os.path.join(path, "config.json")
    if os.path.isfile(file):
        config = _read_json(file)
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope:  # else there is none, or one for each kind of layer, which has no older form
            config["rope_theta"] = rope["rope_theta"]
            scaled = rope.get("rope_type", "default") != "default"
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None
        if "dtype" in config:
            config["torch_dtype"] = config["dtype"]
        write_json(file, config)
    file = os.path.join(path, "tokenizer_config.json")
    if os.path.isfile(file):
        config = _read_json(file)
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        for name in ("backend", "is_local", "local_files_only"):  # where it was loaded from says nothing about it
            config.pop(name, None)
        write_json(file, config)


def record_dtype(path: str, dtype: str) -> None:
    """Writes the precision of the weights in a folder into its config.json, in place."""
    file = os.path.join(path, "config.json")
    config = _read_json(file)
    for part in (config, *config.values()):  # a composite model has a configuration for each of its parts
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = dtype
    write_json(file, config)


def write_json(path: str, data: object) -> None:
    """Writes JSON whole or not at all."""
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
    os.replace(partial, path)
