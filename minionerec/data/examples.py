"""Builds the data sets of a run: SFT examples cached in a memory-mapped Arrow file, and the prompts of RL.

Memory does not grow with the number of SFT examples: they are written in batches and read back memory-mapped.
"""

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import torch

from minionerec.data.encoding import Encoder, batches
from minionerec.data.files import Interaction, Item, sha256_of
from minionerec.flags import examples_cache
from minionerec.output import whole_file, writing
from minionerec.process_memory import without_collector

IGNORE = -100  # the label of a token without loss
BATCH_ROWS = 1000  # rows that are tokenized together
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("prompt_length", pa.int32()), ("length", pa.int32())])


def _record_batch(pairs: list[tuple[list[int], list[int]]]) -> pa.RecordBatch:
    lengths = np.array([len(prompt) + len(response) for prompt, response in pairs], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.fromiter(chain.from_iterable(chain.from_iterable(pairs)), np.int32, offsets[-1])
    prompt_lengths = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int32)
    columns = [
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
        pa.array(prompt_lengths),
        pa.array(lengths),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def write_examples(path: str, encoder: Encoder, rows_of: Callable[[str], Iterable[Interaction | Item]]) -> int:
    """Writes the examples of all tasks of the encoder's prompts to an Arrow stream file and returns their number.

    A row that lacks a text of a task gives no example for it. `rows_of("interaction")` and `rows_of("item")` each start
    a pass over the rows. The file is renamed into place when it is complete.
    """
    count = 0
    with (
        whole_file(path) as partial,
        without_collector(),
        pa.OSFile(partial, "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        for kind in ("interaction", "item"):
            tasks = [task for task in encoder.prompts.tasks.values() if task.rows == kind]
            for rows in batches(rows_of(kind) if tasks else [], BATCH_ROWS):
                for task in tasks:
                    batch = _record_batch(encoder.encode(task, list(filter(task.suits, rows))))
                    for _ in range(task.weight):
                        writer.write_batch(batch)
                        count += batch.num_rows
    return count


@functools.cache
def code_digest(folder: str = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) -> str:
    """A digest of all source files of the package: examples of another version of the code are not reused."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _is_whole(path: str) -> bool:
    """Whether a cached file has the digest that was recorded when it was written."""
    try:
        return Path(f"{path}.sha256").read_text() == sha256_of(path)
    except (OSError, UnicodeDecodeError):
        return False


def tokenized_dataset(
    encoder: Encoder, rows_of: Callable[[str], Iterable[Interaction | Item]], sources: list[str], **settings: object
) -> datasets.Dataset:
    """The examples of all tasks as a memory-mapped dataset, from the cache if the same ones were made before.

    Args:
        rows_of: as in `write_examples`.
        sources: the files the rows come from. Their content, the tokenizer, the prompts, the code and `settings` are
            the key of the cache entry, which is in the cache folder of Hugging Face datasets (HF_DATASETS_CACHE). A
            damaged entry is built again. Runs may share the folder.

    Sets the encoder's `control_note`, also where the examples come from the cache.

    Returns:
        columns input_ids (int32 list: prompt, then response), prompt_length, length.
    """
    digest = hashlib.sha256()
    tasks = [asdict(task) for task in encoder.prompts.tasks.values()]
    recipe = [encoder.prompts.template, encoder.prompts.category, tasks, encoder.cutoff_len, encoder.start, settings]
    recipe += [code_digest(), tokenizers.__version__]
    digest.update(json.dumps(recipe, sort_keys=True).encode())
    digest.update(encoder.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(encoder.tokenizer.eos_token_id).encode())
    for source in sources:
        digest.update(sha256_of(source).encode())
    path = os.path.join(examples_cache(), f"{digest.hexdigest()[:32]}.arrow")
    if not _is_whole(path):
        with writing(f"{os.path.dirname(path)} (tokenized examples; HF_DATASETS_CACHE names another folder)"):
            _fill(path, encoder, rows_of)
    note = Path(f"{path}.note")
    encoder.control_note = note.read_text(encoding="utf-8") or None if note.exists() else None
    return datasets.Dataset.from_file(path)


def _fill(path: str, encoder: Encoder, rows_of: Callable[[str], Iterable[Interaction | Item]]) -> None:
    """Writes a cache entry: the examples, the note about their texts, and their digest, which makes the entry whole."""
    fresh = f"{path}.{uuid.uuid4().hex}"
    digest = Path(f"{fresh}.sha256")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_examples(fresh, encoder, rows_of)
        # Another run may have made the entry meanwhile. One that has it open over a network would lose it.
        if not _is_whole(path):
            with whole_file(f"{path}.note") as note:
                Path(note).write_text(encoder.control_note or "", encoding="utf-8")
            digest.write_text(sha256_of(fresh))
            os.replace(fresh, path)
            os.replace(digest, f"{path}.sha256")
    finally:
        for left in (fresh, digest):
            with suppress(OSError):
                os.remove(left)


def prompt_dataset(
    encoder: Encoder, rows_of: Callable[[str], Iterable[Interaction | Item]], budget: int
) -> datasets.Dataset:
    """The prompts of all tasks of the encoder's prompts, in memory, for RL and its evaluations.

    Args:
        rows_of: as in `write_examples`.
        budget: the most tokens a prompt may have.

    Returns:
        columns prompt (int32 list), target (SID), history (SIDs, empty for tasks on items).
    """
    columns: dict[str, list] = {"prompt": [], "target": [], "history": []}
    for kind in ("interaction", "item"):
        tasks = [task for task in encoder.prompts.tasks.values() if task.rows == kind]
        for rows in batches(rows_of(kind) if tasks else [], BATCH_ROWS):
            for task in tasks:
                suited = list(filter(task.suits, rows))
                prompts = encoder.encode_prompts(task, suited, [budget] * len(suited))
                columns["prompt"] += [np.array(ids, dtype=np.int32) for ids in prompts] * task.weight
                columns["target"] += [row.sid for row in suited] * task.weight
                columns["history"] += [getattr(row, "sid_history", []) for row in suited] * task.weight
    text = datasets.Value("string")
    features = {"prompt": datasets.List(datasets.Value("int32")), "target": text, "history": datasets.List(text)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


class Collator:
    """Pads the examples of a batch on the right, to the length of the longest.

    Returns input_ids and labels [B, L]; labels are IGNORE on the prompt and the padding. A batch without examples
    becomes two tokens without labels: with a single one, recurrent layers do not use all of their weights.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        shape = (max(len(examples), 1), max((len(example["input_ids"]) for example in examples), default=2))
        # Filled in NumPy, which converts a list several times as fast as torch.
        input_ids: np.ndarray = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE)
        for i, example in enumerate(examples):
            ids, prompt_length = example["input_ids"], example["prompt_length"]
            input_ids[i, : len(ids)] = ids
            labels[i, prompt_length : len(ids)] = input_ids[i, prompt_length : len(ids)]
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
