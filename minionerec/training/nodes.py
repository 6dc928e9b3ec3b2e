"""What the nodes of a run must have in common: the flags, the content of the files, the output folder; and what one
process decides for all. Every function is collective: all processes must call it."""

import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from minionerec import locks, world
from minionerec.checkpoint import RUN_FILE, digest
from minionerec.errors import InputError
from minionerec.sasrec_files import WEIGHTS_FILE

T = TypeVar("T")
OF_A_NODE = ("output_dir", "output", "result_json_data", "resume_from_checkpoint")  # paths that only the first one uses
SEEN_WITHIN = 5  # seconds after which a file that the first process makes is seen on all nodes of a shared folder


def first_decides(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in all of them."""
    answer = [decide() if world.rank() == 0 else None]
    if world.size() > 1:
        broadcast_object_list(answer)
    return answer[0]  # type: ignore[return-value]


def check_same(flags: Mapping[str, object], **more: object) -> None:
    """Flags, and the files they name, must be the same on all nodes: where the files are may differ, their content not.
    `more`: other values that must not differ, by what they are. Raises InputError in every process."""
    if not world.on_several_nodes():
        return
    values = {}
    if world.first_of_node():
        values = {f"--{name}": _content(name, value) for name, value in flags.items() if name not in OF_A_NODE}
    found = gather_object([(world.node(), world.rank(), {**values, **more})])
    (first, _, expected), *others = found
    others = [(node, rank, values) for node, rank, values in others if values.keys() == expected.keys()]
    problems = []
    for name in expected:
        differing = [(node, rank, values[name]) for node, rank, values in others if values[name] != expected[name]]
        for node, rank, value in differing[:1]:
            what = f"is {value!r} on {node} (process {rank}) and {expected[name]!r} on {first} (process 0)"
            problems.append(f"{name} {what}; it must be the same on all nodes")
    if problems:
        raise InputError(problems, everywhere=True)


def _content(name: str, value: object) -> object:
    """What a flag stands for: a digest of the file that it names, or its value. A checkpoint is told by its record, a
    SASRec model by its weights."""
    if not isinstance(value, str) or not name.endswith(
        ("_file", "_path", "model", "adapter", "histories", "allow", "deny", "blend")
    ):
        return value
    if os.path.isdir(value):
        known = (os.path.join(value, file) for file in (RUN_FILE, WEIGHTS_FILE))
        value = next(filter(os.path.isfile, known), "")
        if not value:
            return "a folder"
    return digest(value) if os.path.isfile(value) else value


def check_output_shared(output_dir: str) -> None:
    """All nodes must see the same output folder: every process writes its part of a checkpoint there, and reads the
    best one at the end. Raises InputError in every process."""
    if not world.on_several_nodes():
        return
    name = first_decides(lambda: f".{uuid.uuid4().hex}")
    made = locks.missing_folders(os.path.abspath(output_dir))
    with suppress(OSError):  # then the mark is not seen here either
        os.makedirs(output_dir, exist_ok=True)
    mark = os.path.join(output_dir, name)
    if world.rank() == 0:
        with open(mark, "w"):
            pass
    gather_object([None])  # the first process has made it
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := os.path.exists(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = gather_object([(world.node(), world.rank(), seen)])
    blind = [f"{node} (process {rank})" for node, rank, seen in found if not seen]
    if world.rank() == 0:
        os.remove(mark)
    if blind:
        for folder in made:
            with suppress(OSError):
                os.rmdir(folder)
        raise InputError(
            f"--output_dir {output_dir}: is not the same folder on {', '.join(blind)} as on {found[0][0]} (process 0); "
            "give a folder on storage that all nodes share",
            everywhere=True,
        )
