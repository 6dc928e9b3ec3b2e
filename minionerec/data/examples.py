"""The examples of a run, written to an Arrow file once and read back memory-mapped, so that memory does not grow with
their number; padded into batches; and the prompts of RL and evaluation.
"""

import functools
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import torch

from minionerec.data.encoding import Encoder, batches
from minionerec.data.files import Interaction, Item

IGNORE = -100  # the label of a token that carries no loss


BATCH_ROWS = 1000


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


@contextmanager
def _without_collector() -> Iterator[None]:
    """Holds the cycle collector off: tokenizing makes no cycles, only so many lists that it would walk again and again
    through all that is imported."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def write_examples(
    path: str, encoder: Encoder, rows_of: Callable[[str], Iterable[Interaction | Item]], batch_rows: int = BATCH_ROWS
) -> int:
    """Writes the examples of all tasks of the encoder's prompts to an Arrow stream file and counts them. Rows that lack
    a text of a task are no examples of it.

    `rows_of("interaction")` and `rows_of("item")` start a pass over the rows. The file appears whole or not at all.
    """
    partial = f"{path}.{os.getpid()}.partial"
    count = 0
    try:
        with _without_collector(), pa.OSFile(partial, "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for kind in ("interaction", "item"):
                tasks = [task for task in encoder.prompts.tasks.values() if task.rows == kind]
                for rows in batches(rows_of(kind) if tasks else [], batch_rows):
                    for task in tasks:
                        batch = _record_batch(encoder.encode(task, list(filter(task.suits, rows))))
                        for _ in range(task.weight):
                            writer.write_batch(batch)
                            count += batch.num_rows
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return count


@functools.cache
def code_digest(folder: str = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) -> str:
    """Tells apart versions of the code that makes examples: a digest of all source files of the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{_file_digest(path)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: str) -> bool:
    """Whether a file of the cache is as it was written."""
    try:
        return Path(f"{path}.sha256").read_text() == _file_digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def tokenized_dataset(
    encoder: Encoder, rows_of: Callable[[str], Iterable[Interaction | Item]], sources: list[str], **settings
) -> datasets.Dataset:
    """The examples of all tasks as a memory-mapped dataset, from the cache where the same ones were made before.

    Args:
        sources: the files the rows come from; their content, the tokenizer, the prompts, the code and `settings` name
            the cache entry in the folder of Hugging Face datasets (HF_DATASETS_CACHE). A damaged one is made anew.

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
        digest.update(_file_digest(source).encode())
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "minionerec")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{digest.hexdigest()[:32]}.arrow")
    if not _is_whole(path):
        write_examples(path, encoder, rows_of)
        Path(f"{path}.sha256").write_text(_file_digest(path))
    return datasets.Dataset.from_file(path)


def prompt_dataset(
    encoder: Encoder, rows_of: Callable[[str], Iterable[Interaction | Item]], budget: int
) -> datasets.Dataset:
    """The prompts of all tasks of the encoder's prompts for RL and its evaluations, in memory.

    Args:
        rows_of: as in `write_examples`.
        budget: tokens of a prompt at most.

    Returns:
        columns prompt (int32 list), target (SID), history (SIDs, empty for tasks on items).
    """
    columns: dict[str, list] = {"prompt": [], "target": [], "history": []}
    for kind in ("interaction", "item"):
        tasks = [task for task in encoder.prompts.tasks.values() if task.rows == kind]
        for rows in batches(rows_of(kind) if tasks else [], BATCH_ROWS):
            for task in tasks:
                asked = list(filter(task.suits, rows))
                prompts = encoder.encode_prompts(task, asked, [budget] * len(asked))
                columns["prompt"] += [np.array(ids, dtype=np.int32) for ids in prompts] * task.weight
                columns["target"] += [row.sid for row in asked] * task.weight
                columns["history"] += [getattr(row, "sid_history", []) for row in asked] * task.weight
    text = datasets.Value("string")
    features = {"prompt": datasets.List(datasets.Value("int32")), "target": text, "history": datasets.List(text)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


class Collator:
    """Pads a batch of examples on the right to its longest.

    Returns input_ids and labels [rows, tokens]; labels are IGNORE on the prompt and the padding.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        # Rows are filled in NumPy: it takes in a list several times as fast as torch does.
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE)
        for i, example in enumerate(examples):
            ids, prompt_length = example["input_ids"], example["prompt_length"]
            input_ids[i, : len(ids)] = ids
            labels[i, prompt_length : len(ids)] = input_ids[i, prompt_length : len(ids)]
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
