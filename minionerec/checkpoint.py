"""What a checkpoint folder says about itself, to us and to older releases. Only the standard library is imported."""

import json
import os

from minionerec.cli import InputError

RUN_FILE = "minionerec.json"  # the resolved configuration of the run that wrote the checkpoint


def is_adapter(path: str) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def adapter_type(path: str) -> str:
    """The kind of adapter in a folder, as PEFT calls it: LORA, or TRAINABLE_TOKENS for SID rows alone."""
    return _read_json(os.path.join(path, "adapter_config.json")).get("peft_type", "")


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
    base = _read_json(os.path.join(path, "adapter_config.json")).get("base_model_name_or_path")
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
