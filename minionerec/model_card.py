"""The README.md of a checkpoint: its data, method and metrics. Only the standard library is imported."""

import json
import os

from minionerec.checkpoint import is_adapter
from minionerec.saving import write_text

# Flags that say how a checkpoint came about; the others are in minionerec.json.
FILES = ("train_file", "eval_file", "sid_index_path", "item_meta_path", "info_file")
METHOD = (
    *("tasks", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_8bit", "freeze_LLM"),
    *("sid_init", "optim", "learning_rate", "sid_learning_rate", "batch_size", "train_batch_size", "num_epochs"),
    *("num_train_epochs", "num_generations", "reward_type", "beta", "cutoff_len", "seed"),
)
OF_ADAPTERS = ("lora_", "load_in_8bit")
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}


def write_card(folder: str, run: dict, metrics: dict | None = None) -> None:
    """Writes the model card of a checkpoint.

    Args:
        run: as `Checkpoint.run`.
        metrics: what the whole run gave; only numbers and texts are listed.
    """
    flags, method = run.get("flags", {}), str(run.get("method", ""))
    base = str(flags.get("base_model") or flags.get("model_path") or "")
    category = run.get("prompts", {}).get("category", "")
    adapter = is_adapter(folder)
    head = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    head |= {"tags": json.dumps(["generative-recommendation", "semantic-ids", *([method] if adapter else [])])}
    if base.count("/") == 1 and not os.path.exists(base) and not base.startswith((".", "/", "~")):  # of the hub
        head["base_model"] = json.dumps(base)
    shown = {name: flags[name] for name in METHOD if flags.get(name) not in (None, "")}
    if method not in ("lora", "qlora"):
        shown = {name: value for name, value in shown.items() if not name.startswith(OF_ADAPTERS)}
    parts = [
        "---\n" + "".join(f"{name}: {value}\n" for name, value in head.items()) + "---",
        f"# Next-item recommendations: {category}" if category else "# Next-item recommendations",
        "Reads the semantic IDs of what a customer bought and writes that of the next item. "
        f"Made by `{run.get('command')}.py` of MiniOneRec-LoRA {run.get('version', '')} with "
        f"{NAMES.get(method, method)}{f' on `{base}`' if base else ''}.",
        '```bash\npython recommend.py --model THIS_FOLDER --info_file INFO_FILE --history "12, 40, 7"\n```',
        "## Data",
        _table({name: os.path.basename(str(flags[name])) for name in FILES if flags.get(name)}),
        "## Method",
        _table(shown),
    ]
    known = {name: value for name, value in (metrics or {}).items() if isinstance(value, bool | int | float | str)}
    if known:
        parts += ["## Metrics", _table(known)]
    parts.append("The whole configuration and the wording of the prompts are in `minionerec.json`.")
    write_text(os.path.join(folder, "README.md"), "\n\n".join(parts) + "\n")


def _table(values: dict) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: object) -> str:
    """A value in a cell, numbers with five digits."""
    text = f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return " ".join(text.replace("|", "\\|").split())
