"""One command at a time writes to a folder or a file: a lock that ends with its process, however it ends.

A lock is a file that its process holds with `fcntl.lockf`. The system frees it when the process is gone, so a file that
a killed run left behind locks nothing. The file holds the process id, for the message of the second command. In a
distributed run the first process holds the lock; the others see by the address of the run that it is theirs.

    hold("output_dir", "out/lora", lock_of_folder)

Only the standard library is imported.
"""

import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

from minionerec.errors import InputError, Problems
from minionerec.output import CANNOT_WRITE

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

PATIENCE = 0.5  # seconds until a lock counts as taken: the other processes of a run take it for a moment to look


def lock_of_folder(folder: str) -> str:
    """The lock of a folder that a command writes into, step by step: in it."""
    return os.path.join(os.path.realpath(folder), ".lock")


def lock_of_new(path: str) -> str:
    """The lock of a file or a folder that appears when it is complete: next to it, where `ls *` does not see it."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.lock")


@dataclass
class _Lock:
    path: str
    file: int
    made: list[str]  # folders that were made for it, the deepest first
    process: int


_held: dict[str, _Lock] = {}  # of this process, by path
_of_command: ContextVar[list[_Lock] | None] = ContextVar("_of_command", default=None)


@contextmanager
def releasing() -> Iterator[None]:
    """What is locked while open is free afterwards, and its files are gone. Also a decorator of a command."""
    locks: list[_Lock] = []
    token = _of_command.set(locks)
    try:
        yield
    finally:
        _of_command.reset(token)
        for lock in locks:
            _release(lock)


def release_all() -> None:
    """Frees what this process holds, before it ends without unwinding."""
    for lock in list(_held.values()):
        _release(lock)


def check_free(problems: Problems, name: str, target: str, place: Callable[[str], str]) -> bool:
    """Adds a problem if another command writes to `target`, the value of the flag `name`. Writes nothing."""
    owner = _owner(place(target))
    if owner:
        problems.add(_taken(name, target, owner))
    return not owner


def hold(name: str, target: str, place: Callable[[str], str]) -> None:
    """Keeps other commands from writing to `target`, the value of the flag `name`, until this one ends.

    Args:
        place: where its lock is: `lock_of_folder` or `lock_of_new`.

    Raises InputError if another command writes there, or if nothing can be written. Where the file system has no locks,
    or does not let this user take them, a line on standard error says so, and the command goes on.
    """
    path = place(target)
    if os.environ.get("RANK", "0") != "0" or path in _held:
        if owner := _owner(path):
            raise InputError(_taken(name, target, owner))
        return
    made = missing_folders(os.path.dirname(path))
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = _acquire(path)
        if file is None:
            raise InputError(_taken(name, target, _owner(path) or "another process"))
        lock = _held[path] = _Lock(path, file, made, os.getpid())
        mine = _of_command.get()
        if mine is not None:
            mine.append(lock)
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n{socket.gethostname()}\n{_run_address()}\n".encode())
    except OSError as error:
        # The superuser passes every check of permissions, and yet /proc takes no folder and no file.
        no_folder = fcntl is not None and not os.path.isdir(os.path.dirname(path))
        if no_folder or error.errno in {errno.ENOENT, *CANNOT_WRITE} - {errno.EACCES, errno.EPERM}:
            raise InputError(f"--{name} {target}: cannot be written: {error.strerror}") from None
        print(
            f"warning: {os.path.dirname(path)}: locks do not work there ({error.strerror}); nothing stops a second "
            f"command from writing to {target}",
            file=sys.stderr,
        )


def _acquire(path: str) -> int | None:
    """The open file of a lock that this process now holds; None while another one holds it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(file)
            if free and _is_at(file, path):  # else its holder has just removed it
                return file
        except OSError:
            os.close(file)
            raise
        os.close(file)
        if not free and time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def _lock(file: int) -> bool:
    """Whether this process holds the lock of an open file now."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(path: str) -> str | None:
    """Who holds a lock, in words; None if it is free, or held for this distributed run."""
    if path in _held:  # to open and close its file once more would free it
        return f"process {os.getpid()}"
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            return None  # none, or none that can be taken
        try:
            free = fcntl is None or _lock(file)
            words = os.pread(file, 4096, 0).decode(errors="replace").split("\n")
        except OSError:
            return None
        finally:
            os.close(file)
        process, host, run = words[:3] if len(words) > 3 else ("", "", "")
        if free or (run and run == _run_address()):
            return None
        if time.monotonic() > deadline:
            elsewhere = f" on {host}" if host != socket.gethostname() else ""
            return f"process {process}{elsewhere}" if process else "another process"
        time.sleep(0.02)


def _run_address() -> str:
    """What the processes of a distributed run have in common; empty for a run of one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ""
    return "/".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))


def _taken(name: str, target: str, owner: str) -> str:
    return f"--{name} {target}: {owner} writes there; wait until it ends, or name another one"


def missing_folders(folder: str) -> list[str]:
    """Those of an absolute path that do not exist, the deepest first."""
    missing = []
    while not os.path.exists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _release(lock: _Lock) -> None:
    _held.pop(lock.path, None)
    if lock.process != os.getpid():  # a fork of the process that holds it
        return
    with suppress(OSError):
        if _is_at(lock.file, lock.path):
            os.remove(lock.path)  # before it is free: afterwards it may be another one's
    os.close(lock.file)
    for folder in lock.made:
        with suppress(OSError):  # what the command wrote stays
            os.rmdir(folder)
