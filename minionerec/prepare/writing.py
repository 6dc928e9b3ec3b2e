"""Writes a data set in the layout of the release; the folder gets its name only when it is complete.

| file | content |
|---|---|
| train, valid, test/CATEGORY.csv | next-item rows |
| new/CATEGORY_1.csv, _2 and so on | rows of later purchases, a file for each time that they were added |
| info/CATEGORY.txt | SID, title, item id |
| index/CATEGORY.index.json | item id -> SID tokens |
| index/CATEGORY.item.json | item id -> title, description, brand, categories, original id |
| index/CATEGORY.embeddings.npy | row i belongs to item id i |
| index/CATEGORY.codebooks.safetensors, .tfidf.safetensors | the models that give codes to new items |
| dataset.json | how the data set was made |
"""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, TypedDict

import numpy as np

from minionerec.data.files import sha256_of
from minionerec.errors import InputError
from minionerec.output import writing
from minionerec.prepare.cleaning import SPLITS
from minionerec.prepare.item_embeddings import TextModel
from minionerec.prepare.semantic_ids import save_codebooks, tokens
from minionerec.prepare.settings import COLLISIONS, TEXTS, check_category
from minionerec.prepare.sources import RawItem
from minionerec.saving import write_json

RECORD = "dataset.json"


class Arguments(TypedDict):
    """Of the arguments in dataset.json, those that a later run needs."""

    collisions: str
    text_columns: str


class Record(TypedDict, total=False):
    """Of dataset.json, what a later run needs; `build` says what else is in it."""

    category: str
    arguments: Arguments
    embeddings: dict[str, str]
    semantic_ids: dict[str, object]
    files: dict[str, str]
    inputs: dict[str, Any]
    latest: int  # time of the last purchase, in microseconds since 1970
    added: list[object]


def files_of(category: str) -> dict[str, str]:
    """The files of a data set, relative to its folder."""
    return {
        **{split: f"{split}/{category}.csv" for split in SPLITS},
        "info": f"info/{category}.txt",
        "index": f"index/{category}.index.json",
        "item": f"index/{category}.item.json",
        "embeddings": f"index/{category}.embeddings.npy",
        "codebooks": f"index/{category}.codebooks.safetensors",
        "tfidf": f"index/{category}.tfidf.safetensors",
    }


def row_files_of(record: Record) -> list[str]:
    """The files of rows of a data set, relative to its folder: those of the splits, then those of later purchases."""
    later = [name for name in record["files"] if name.startswith("new/")]
    return [*(files_of(record["category"])[split] for split in SPLITS), *later]


@contextmanager
def scratch_folder(output_dir: str) -> Iterator[str]:
    """A temporary folder, on the disk of `output_dir` if that can be written to. It is removed at the end, also where
    the process is asked to end.

    Raises RunError where the files of the data set cannot be written."""
    above = os.path.dirname(os.path.abspath(output_dir))
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    where = above if os.access(above, os.W_OK | os.X_OK) else None
    with (
        _ends_by_exception(),
        writing(output_dir),
        tempfile.TemporaryDirectory(prefix=".prepare-", dir=where) as folder,
    ):
        yield folder


@contextmanager
def _ends_by_exception() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, so that what should be removed is, unless they are ignored, as under nohup.
    Handlers are those of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        for one in before:  # another one must not interrupt the removal
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def publish(folder: str, output_dir: str) -> None:
    """Renames a finished folder to its final name, in one step. Raises InputError if that has come into being."""
    os.makedirs(os.path.dirname(os.path.abspath(output_dir)), exist_ok=True)
    try:
        os.rename(folder, output_dir)
    except OSError as error:
        if not os.path.lexists(output_dir):
            raise
        raise InputError(
            f"--output_dir {output_dir}: was created in the meantime ({error.strerror}); name another folder"
        ) from None


class _Writer:
    """What `np.save` writes to piece by piece, because it is not a file."""

    def __init__(self, file: BinaryIO):
        self.write = file.write


def save_array(path: str, array: np.ndarray) -> None:
    """As `np.save`, which writes to files by C's stdio and so loses without an error what no longer fits on a disk."""
    with open(path, "wb") as file:
        np.save(_Writer(file), array)


def write_catalogue(
    folder: str,
    category: str,
    index: dict[str, list[str]],
    metadata: dict[str, dict[str, str]],
    embeddings: np.ndarray,
    codebooks: np.ndarray,
    text_model: TextModel | None,
) -> None:
    """Writes the files of the items: index and metadata by item id, embeddings [items, d], codebooks [L, K, d]."""
    paths = {name: os.path.join(folder, path) for name, path in files_of(category).items()}
    for name in ("info", "index"):
        os.makedirs(os.path.dirname(paths[name]))
    with open(paths["index"], "w", encoding="utf-8") as file:
        json.dump(index, file)
    with open(paths["item"], "w", encoding="utf-8") as file:
        json.dump(metadata, file, indent=2, ensure_ascii=False)
    with open(paths["info"], "w", encoding="utf-8", newline="\n") as file:
        for item, sid in index.items():
            file.write(f"{''.join(sid)}\t{metadata[item]['title']}\t{item}\n")
    save_array(paths["embeddings"], embeddings)
    save_codebooks(paths["codebooks"], codebooks)
    if text_model is not None:
        text_model.save(paths["tfidf"])


def metadata_of(item: RawItem) -> dict[str, str]:
    """An item's entry in the metadata file."""
    return {
        "title": item.title,
        "description": item.description,
        "brand": item.brand,
        "categories": item.categories,
        "original_id": item.original_id,
        **({"price": item.price} if item.price else {}),
    }


def index_of(codes: Iterable[Sequence[int]], first: int = 0) -> dict[str, list[str]]:
    """SID tokens by item id, for items numbered from `first`."""
    return {str(item): tokens(row) for item, row in enumerate(codes, first)}


def write_record(folder: str, record: Mapping[str, object]) -> None:
    """Writes `record` to dataset.json, with the digest of every file in the folder."""
    files = sorted(
        os.path.relpath(os.path.join(above, name), folder) for above, _, names in os.walk(folder) for name in names
    )
    digests = {name: sha256_of(os.path.join(folder, name)) for name in files}
    write_json(os.path.join(folder, RECORD), {**record, "files": digests})


def read_record(folder: str) -> Record:
    """The record of a data set that `write_record` wrote. Raises InputError if there is none, or if files have changed
    since then."""
    if os.path.isfile(folder):
        raise InputError(f"--dataset {folder}: is a file, not a folder")
    path = os.path.join(folder, RECORD)
    if not folder or not os.path.isfile(path):
        raise InputError(f"--dataset {folder}: has no {RECORD}; give a folder that prepare_data.py wrote")
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        check_category(record["category"])
        expected = {name: files_of(record["category"])[name] for name in ("index", "item", "codebooks", *SPLITS)}
        digests = {name: record["files"][name] for name in (*expected.values(), *record["files"])}
        kind, collisions = record["embeddings"]["kind"], record["arguments"]["collisions"]
        if kind not in ("tfidf", "encoder", "embeddings") or collisions not in COLLISIONS:
            raise ValueError(f"embeddings by {kind!r} and collisions {collisions!r}")
        if not {*record["arguments"].get("text_columns", "title").split(",")} <= {*TEXTS}:
            raise ValueError("its text_columns are unknown")
        if not isinstance(record.get("added", []), list):
            raise ValueError("added is not a list")
        changed = [
            name
            for name, expected_digest in sorted(digests.items())
            if os.path.isabs(name)
            or ".." in name.split("/")
            or sha256_of(os.path.join(folder, name)) != expected_digest
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError) as error:
        raise InputError(f"--dataset {folder}: {RECORD} is not what prepare_data.py wrote: {error!r}"[:400]) from None
    if changed:
        raise InputError(f"--dataset {folder}: changed since prepare_data.py wrote it: {', '.join(changed)}")
    return record
