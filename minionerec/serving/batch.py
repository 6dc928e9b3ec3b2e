"""Writes the recommendations for a file of requests, so that a run that was killed can be continued.

While it runs, rows go to OUTPUT.partial, and what they depend on stands in OUTPUT.partial.json. A run with the same
settings keeps the rows that are there. Scores depend on the rows that share a forward pass, in their last digits, so a
continued run forms the same batches: the output is that of an uninterrupted run, byte for byte. With --batch_size auto
on a GPU, another amount of free memory may give other batches.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from minionerec.checkpoint import PENALTY_FILE
from minionerec.data.files import read_json, sha256_of
from minionerec.errors import InputError, RunError
from minionerec.saving import write_json
from minionerec.serving.requests import Request

BATCHES = 16  # that are sorted by length together


def settings_of(flags: dict[str, object], files: Iterable[str], model: str) -> dict[str, object]:
    """What the rows of a run depend on: its flags, digests of the files it reads, and the files of the model's folder
    with their sizes and times. A penalty that is recorded there is among the flags of a run that uses it."""
    folder = sorted(os.scandir(model), key=lambda entry: entry.name) if os.path.isdir(model) else []
    parts = [entry for entry in folder if entry.is_file() and not entry.name.startswith(PENALTY_FILE)]
    stats = [[entry.name, entry.stat().st_size, entry.stat().st_mtime_ns] for entry in parts]
    return {"flags": flags, "files": {path: sha256_of(path) for path in files}, "model": stats}


def check_output(output: str, settings: dict[str, object]) -> int:
    """How many whole rows a run with the same settings has left. Raises InputError for rows of another run."""
    partial = f"{output}.partial"
    if not os.path.exists(partial):
        return 0
    try:
        same = read_json(f"{partial}.json") == json.loads(json.dumps(settings))
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"--output {output}: {partial} holds rows of a run with other flags, files or model; remove it, or name "
            "another output"
        )
    with open(partial, "rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def write_recommendations(
    output: str,
    settings: dict[str, object],
    done: int,
    requests: Iterator[Request],
    recommend: Callable[[Sequence[Request]], list[list[dict[str, object]]]],
    chunk: int,
    writes: bool,
) -> int:
    """Writes one line of JSON for each request, in order: its history and its items. Returns their number.

    Args:
        done: rows of an earlier run, as `check_output` counted them.
        chunk: requests that are ranked and written together. It does not change the rows if it is a multiple of the
            size of the chunks in which `recommend` forms batches.
        writes: whether this process of a distributed run writes.
    """
    partial = f"{output}.partial"
    count = 0
    try:
        if writes:
            os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
            write_json(f"{partial}.json", settings)
        with open(partial if writes else os.devnull, "ab") as file:
            if writes:
                file.truncate(_end_of_line(partial, done))
            while taken := list(islice(requests, chunk)):
                count += len(taken)
                if count <= done:
                    continue
                rows = zip(taken, recommend(taken), strict=True)
                lines = [_line({"history": request.given, "items": items}) for request, items in rows]
                file.write(b"".join(lines[max(0, done - count + len(taken)) :]))
                file.flush()
        if writes:
            os.replace(partial, output)
            os.remove(f"{partial}.json")
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error}; the same command continues after {partial}") from None
    return count


def count_empty(output: str) -> int:
    """The rows of a written file that have no items."""
    with open(output, "rb") as file:
        return sum(line.endswith(b'"items": []}\n') for line in file)


def _line(row: dict[str, object]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _end_of_line(path: str, count: int) -> int:
    """Bytes of the first `count` lines of a file."""
    with open(path, "rb") as file:
        return sum(len(line) for line, _ in zip(file, range(count), strict=False))
