"""From rows to token ids: prompts and responses are tokenized in batches, written to an Arrow file once and read back
memory-mapped, so memory does not grow with the number of rows."""

import functools
import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice, product, takewhile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import torch

from minionerec.cli import InputError
from minionerec.data import Catalogue, Interaction, Item
from minionerec.prompts import SEPARATOR, Prompts, Task

IGNORE = -100  # the label of a token that carries no loss

BATCH_ROWS = 1000

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("prompt_length", pa.int32()), ("length", pa.int32())])


def _fields(row: Interaction | Item) -> dict[str, str]:
    if isinstance(row, Item):
        return {"sid": row.sid, "title": row.title, "description": row.description}
    return {
        "sid_history": SEPARATOR.join(row.sid_history),
        "title_history": SEPARATOR.join(filter(str.strip, row.title_history)),  # missing ones are left out
        "sid": row.sid,
        "title": row.title,
    }


class Pieces:
    """Tokenizes texts piece by piece and remembers the pieces: histories are made of the same titles and SIDs again
    and again. A text is cut before the space behind a comma or colon, and behind the end of a line. Where a tokenizer's
    words may reach across such places, texts are tokenized whole. The ids are the same either way.
    """

    MOST = 200_000  # pieces to remember
    cut = staticmethod(re.compile(r"(?<=[,:])(?= \S)|(?<=\n)(?=\w)").split)

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer
        self.cuts = self._are_words()
        self.known: dict[str, list[int]] = {}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text, special tokens left out."""
        if not self.cuts:
            return self._whole(texts)
        if len(self.known) > self.MOST:
            self.known.clear()
        cut = [self.cut(text) for text in texts]
        new = list({piece for pieces in cut for piece in pieces if piece not in self.known})
        self.known.update(zip(new, self._whole(new), strict=True))
        return [list(chain.from_iterable(map(self.known.__getitem__, pieces))) for pieces in cut]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _are_words(self) -> bool:
        """Whether pieces begin and end with a word of the tokenizer, whatever stands around the cut."""
        if self.tokenizer.pre_tokenizer is None:
            return False
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()][-2:]  # SID tokens
        around = [*added, *["word", "7", "3/4", "(x)", "'s", '"', ",", "é", "漢字", "®", "<", "-", "A1", "..", "́", "_"]]
        texts = [f"{before}{mark}{after}" for before, mark, after in product(around, (", ", ": ", "\n"), around)]
        cut = [self.cut(text) for text in texts]
        apart = iter(self._whole([piece for pieces in cut for piece in pieces]))
        for text, pieces, whole in zip(texts, cut, self._whole(texts), strict=True):
            ends = {end for _, (_, end) in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)}
            together = list(chain.from_iterable(islice(apart, len(pieces))))
            if len(pieces[0]) not in ends or together != whole:
                return False
        return True


class Encoder:
    """Turns rows into token ids: a prompt, and the response with its end-of-sequence token.

    No sequence is longer than `cutoff_len`. The oldest items of a history go first, as many as needed; what cannot be
    shortened that way loses the end of its longest part. The instruction always stays: a `cutoff_len` that leaves too
    little beside it raises InputError.
    """

    def __init__(self, tokenizer, prompts: Prompts, cutoff_len: int):
        self.tokenizer, self.prompts, self.cutoff_len = tokenizer, prompts, cutoff_len
        # Llama and Gemma begin every text with a token, GLM with two, Qwen and GPT-2 with none.
        text = tokenizer("x", return_special_tokens_mask=True)
        pairs = zip(text.input_ids, text.special_tokens_mask, strict=True)
        self.start = [token for token, _ in takewhile(lambda pair: pair[1], pairs)]

        self.pieces = Pieces(tokenizer.backend_tokenizer)
        for task in prompts.tasks.values():
            empty = dict.fromkeys(("sid_history", "title_history", "sid", "title", "description"), "")
            instruction = len(self.start) + len(self._ids([prompts.render(task, empty)])[0])
            if instruction > cutoff_len * 3 // 4:
                raise InputError(
                    f"--cutoff_len {cutoff_len}: the instruction of task {task.name} alone has {instruction} tokens "
                    f"and needs room for what it asks about; give {-(-instruction * 4 // 3)} or more"
                )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.pieces.encode(texts)

    def responses(self, task: Task, rows: list[Interaction | Item]) -> list[list[int]]:
        """Token ids of the responses, at most half of `cutoff_len` each; equal texts are tokenized once."""
        texts = [task.response.format(**_fields(row)) for row in rows]
        distinct = list(dict.fromkeys(texts))
        most = self.cutoff_len // 2 - 1
        ids = {
            text: [*ids[:most], self.tokenizer.eos_token_id]
            for text, ids in zip(distinct, self._ids(distinct), strict=True)
        }
        return [ids[text] for text in texts]

    def encode_prompts(self, task: Task, rows: list[Interaction | Item], budgets: list[int]) -> list[list[int]]:
        """Token ids of the prompts, row i at most `budgets[i]` of them."""
        texts = [self.prompts.render(task, _fields(row)) for row in rows]
        encoded = [self.start + ids for ids in self._ids(texts)]
        for i, budget in enumerate(budgets):
            if len(encoded[i]) > budget:
                encoded[i] = self._shortened(task, rows[i], budget)
        return encoded

    def _shortened(self, task: Task, row: Interaction | Item, budget: int) -> list[int]:
        def ids_of(fields: dict[str, str]) -> list[int]:
            return self.start + self._ids([self.prompts.render(task, fields)])[0]

        if isinstance(row, Interaction):
            while len(row.sid_history) > 1:
                row = row.without_oldest()
                ids = ids_of(_fields(row))
                if len(ids) <= budget:
                    return ids
        fields = _fields(row)
        ids = ids_of(fields)
        while len(ids) > budget:
            names = [name for name in fields if "{" + name + "}" in task.input]
            longest = max(names, key=lambda name: len(fields[name]), default=None)
            if longest is None or not fields[longest]:
                return ids[:budget]  # the instruction alone is too long
            # A token is at least one character long, so this never cuts more than one step too far.
            fields[longest] = fields[longest][: -(len(ids) - budget)]
            ids = ids_of(fields)
        return ids

    def encode(self, task: Task, rows: list[Interaction | Item]) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) token ids of every row."""
        responses = self.responses(task, rows)
        prompts = self.encode_prompts(task, rows, [self.cutoff_len - len(response) for response in responses])
        return list(zip(prompts, responses, strict=True))


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


def batches(rows: Iterable, size: int) -> Iterator[list]:
    """The rows in lists of `size`, the last one shorter."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


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
def code_digest(folder: str = os.path.dirname(os.path.abspath(__file__))) -> str:
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


def item_rows(catalogue: Catalogue) -> list[Item]:
    """The items that have a title or a description, for the tasks between them and SIDs."""
    return [item for item in catalogue.items.values() if item.title or item.description]


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


def left_padded(sequences: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [rows, tokens] of prompts (lists or arrays), padded on the left."""
    width = max(len(ids) for ids in sequences)
    input_ids = np.full((len(sequences), width), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, ids in enumerate(sequences):
        input_ids[i, width - len(ids) :] = ids
        attention_mask[i, width - len(ids) :] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(attention_mask)
