"""Writing the files of a checkpoint: atomically, and readable by other users and older releases."""

import json
import os

from minionerec.data.files import read_json
from minionerec.output import whole_file


def write_json(path: str, data: object) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Writes text atomically."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)


def make_readable(folder: str) -> None:
    """Lets those read the weights in a folder who may read the files next to them: safetensors writes files that only
    their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for entry in os.scandir(folder):
        if entry.name.endswith(".safetensors"):
            os.chmod(entry.path, 0o666 & ~mask)


def make_portable(path: str) -> None:
    """Rewrites the JSON files of a checkpoint, in place, so that transformers 4 and vLLM read them too.

    transformers 5 renamed what they look for, and some of it fails silently: without `rope_theta` a model is rotated by
    the default of its architecture.
    """
    file = os.path.join(path, "config.json")
    if os.path.isfile(file):
        config = read_json(file)
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            _add_older_names(part)  # a composite model has a configuration for its text
        write_json(file, config)
    file = os.path.join(path, "tokenizer_config.json")
    if os.path.isfile(file):
        config = read_json(file)
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        for name in ("backend", "is_local", "local_files_only"):  # where it was loaded from says nothing about it
            config.pop(name, None)
        write_json(file, config)


def _add_older_names(config: dict) -> None:
    """Adds to a configuration what transformers 4 reads instead of `rope_parameters` and other names of 5, in place."""
    rope, kind = config.get("rope_parameters") or {}, config.get("model_type", "")
    sliding = rope.get("sliding_attention") or {}
    rope = rope.get("full_attention") or rope  # one for each kind of layer
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        own = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        config["rope_scaling"] = own if rope.get("rope_type", "default") != "default" else None
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if kind == "gpt_neox":
            config["rotary_emb_base"] = rope["rope_theta"]
            config["rotary_pct"] = rope.get("partial_rotary_factor", 0.25)
        if "rope_theta" in sliding and kind.startswith("modernbert"):
            config |= {"global_rope_theta": rope["rope_theta"], "local_rope_theta": sliding["rope_theta"]}
        elif "rope_theta" in sliding:
            config["rope_local_base_freq"] = sliding["rope_theta"]  # of Gemma 3
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]


def record_dtype(path: str, dtype: str) -> None:
    """Writes the precision of the weights in a folder into its config.json, in place."""
    file = os.path.join(path, "config.json")
    config = read_json(file)
    for part in (config, *config.values()):  # a composite model has a configuration for each of its parts
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = dtype
    write_json(file, config)
