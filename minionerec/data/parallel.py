"""Divides work on a large file over the cores of this machine. Only the standard library is imported.

The processes are fresh ones, and not copies of this one, which may have threads and a GPU.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from minionerec import world

BYTES = 16 << 20  # of a file that are worth a process, which takes 0.1 s to start
MOST = 16  # processes
ROOT = str(Path(__file__).resolve().parents[2])

Found = TypeVar("Found")


def num_parts(size: int) -> int:
    """In how many parts a file of `size` bytes is worked on. The processes of a distributed run share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(size // BYTES, cores // world.local_size(), MOST))


def in_parts(function: Callable[..., Found], parts: int, **arguments: object) -> list[Found]:
    """`function(part, parts, **arguments)` for every part, in their order. The first part is worked on in this process,
    each other one in a process of its own, and here again if that fails.

    Args:
        function: of a module; what it takes and returns passes as JSON.

    Raises what `function` raises for the first part; the other processes end then.
    """
    with ExitStack() as stack:
        others = [_start(stack, function) for _ in range(parts - 1)] if sys.executable else []
        for part, other in enumerate(others, 1):
            _tell(other, {"part": part, "parts": parts, **arguments})
        found = [function(0, parts, **arguments)]
        for part in range(1, parts):
            try:
                found.append(json.loads(others[part - 1].communicate()[0]))
            except (IndexError, ValueError):
                found.append(function(part, parts, **arguments))
    return found


def _start(stack: ExitStack, function: Callable) -> subprocess.Popen[bytes]:
    """A process that will call the function. It ends with `stack`."""
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from {__name__} import _work; _work(*sys.argv[1:])"
    command = [sys.executable, "-P", "-c", code, function.__module__, function.__name__]
    pipe = subprocess.PIPE
    process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL))
    stack.callback(process.kill)  # before it is waited for
    return process


def _tell(process: subprocess.Popen[bytes], arguments: dict[str, object]) -> None:
    assert process.stdin
    with suppress(BrokenPipeError):  # it has ended, which its empty answer says
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
        process.stdin.flush()


def _work(module: str, name: str) -> None:
    """What the processes do."""
    found = getattr(import_module(module), name)(**json.loads(sys.stdin.readline()))
    sys.stdout.write(json.dumps(found))
