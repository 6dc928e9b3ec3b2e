"""The processes of a distributed run, next to torch.distributed: whether all of them were started, and how one that
fails ends the others, wherever they wait.

Without it, a process whose input is bad on its node only exits, and the others wait for it: half an hour in the
rendezvous, ten minutes in a collective. torchrun ends the processes of its own node only.

Only the standard library is imported; torch where several processes meet.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from minionerec import locks
from minionerec.errors import Problems

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PAUSE = 0.5  # seconds between two looks at whether another process failed
PATIENCE = 20  # seconds that a process which failed waits for the others to hear of it
ADDRESS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What launchers say about how many processes, or nodes, they have started the command on.
PROCESSES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
NODES = ("SLURM_STEP_NUM_NODES", "PET_NNODES")


def size() -> int:
    """The number of processes of the run, as its launcher has set it."""
    return max(_number("WORLD_SIZE"), 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK")


def local_size() -> int:
    """The number of processes of the run on this node."""
    return max(_number("LOCAL_WORLD_SIZE"), 1)


def node() -> str:
    """The name of the machine or container of this process."""
    return socket.gethostname()


def first_of_node() -> bool:
    """Whether this process is the first one of its node."""
    return _number("LOCAL_RANK") == 0


def on_several_nodes() -> bool:
    """Whether the run may have processes on other nodes: a launcher that starts only local ones says how many."""
    return 1 < size() != _number("LOCAL_WORLD_SIZE")


def _number(name: str) -> int:
    text = os.environ.get(name, "").split(":")[0]  # PET_NNODES may be a range, such as 2:4
    return int(text) if text.isdecimal() else 0


def check_world(problems: Problems) -> None:
    """A process that its launcher started as one of several must know of the others. It would train alone, and write
    into the same folder as they do."""
    remedy = "start the command with torchrun on every node (docs/clusters.md)"
    odd = [
        name for name in ("WORLD_SIZE", *ADDRESS) if name != "MASTER_ADDR" and not os.environ.get(name, "0").isdecimal()
    ]
    for name in odd:
        problems.add(f"{name} is {os.environ[name]!r}, which is not a whole number; {remedy}, or unset it")
    if odd:
        return
    if size() > 1 or "LOCAL_RANK" in os.environ:
        said = f"WORLD_SIZE is {size()}" if size() > 1 else f"LOCAL_RANK is {os.environ['LOCAL_RANK']}"
        if missing := [name for name in ("WORLD_SIZE", *ADDRESS) if name not in os.environ]:
            problems.add(f"{said}, but {', '.join(missing)} are not set; {remedy}")
        elif rank() >= size():
            problems.add(f"RANK is {rank()}, but WORLD_SIZE is {size()}: ranks begin with 0; {remedy}")
        if missing or size() > 1:
            return
    told = "SLURM_STEP_NUM_TASKS" in os.environ  # of this step; SLURM_NTASKS may be that of the whole job
    names = [name for name in (*PROCESSES, *NODES) if _number(name) > 1 and not (told and name == "SLURM_NTASKS")]
    for name in names[:1]:
        alone = f"for one process, or for runs that are independent, unset {name}"
        problems.add(f"{name} is {os.environ[name]}, but this process does not know the others; {remedy}; {alone}")
    if not names and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        problems.add(
            f"MASTER_ADDR is {os.environ['MASTER_ADDR']}, but WORLD_SIZE is not set: accelerate launch on several "
            f"machines needs an engine (configs/) or --multi_gpu; {remedy}; for one process, unset MASTER_ADDR"
        )


# --- How a process that fails ends the others -------------------------------------------------------------------------


class _Line:
    """What the processes of a run tell each other: in the store in which torch.distributed finds their addresses."""

    def __init__(self) -> None:
        self.store: TCPStore | None = None
        self.lock = threading.Lock()

    def open(self, seconds: float) -> "TCPStore":
        """The store. Raises RuntimeError if it cannot be reached within `seconds`."""
        from torch.distributed import TCPStore

        with self.lock:
            if self.store is None:
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                holds = rank() == 0 and not _agent_has_store()
                if not holds:
                    _wait_for(address, seconds)
                self.store = TCPStore(
                    *address,
                    is_master=holds,
                    timeout=timedelta(seconds=PATIENCE),
                    wait_for_workers=False,
                    multi_tenant=True,  # torch.distributed opens the same one
                )
            return self.store


def _wait_for(address: tuple[str, int], seconds: float) -> None:
    """Returns when somebody listens there. Raises RuntimeError after `seconds`. TCPStore prints every failed try with a
    trace."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, seconds).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(str(error)) from None
        time.sleep(PAUSE / 5)


def _key(name: str) -> str:
    return f"minionerec/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _agent_has_store() -> bool:
    """Whether torchrun's agent on the first node holds the store; otherwise the first process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class _Watch:
    """Ends this process as soon as another one of the run has failed."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.line, self.done = _Line(), threading.Event()
        self.last_words: Callable[[], str] | None = None

    def run(self) -> None:
        import torch.distributed as dist

        deadline = time.monotonic() + PATIENCE
        while not self.done.wait(PAUSE):
            try:
                store = self.line.open(PAUSE)
                if store.check([_key("failed")]):
                    self.exit(**json.loads(store.get(_key("failed"))))
            except RuntimeError:
                if dist.is_initialized():  # its collectives find out what is wrong
                    return
                late = _agent_has_store() and time.monotonic() > deadline
                if self.line.store is not None or late:
                    self.exit(0, os.environ["MASTER_ADDR"], 1, ["it can no longer be reached"])

    def exit(self, rank: int, node: str, code: int, lines: list[str]) -> None:
        """Ends this process, because another one has failed."""
        if self.done.is_set():
            return
        self.wait_for_others()
        if first_of_node():
            words = [self.last_words()] if self.last_words else lines
            print(f"\nprocess {rank} on {node} has failed: {'; '.join(words)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        locks.release_all()
        os._exit(code)

    def wait_for_others(self) -> None:
        """Returns when all processes know that one has failed. The store, and torchrun's agents, may end with the first
        process that does."""
        import torch.distributed as dist

        # Once they have met, all of them watch; one that has not heard by then is gone.
        deadline = time.monotonic() + (6 * PAUSE if dist.is_initialized() else PATIENCE)
        try:
            store = self.line.open(PATIENCE)
            know = store.add(_key("heard"), 1)
            while know < size() and time.monotonic() < deadline:
                time.sleep(PAUSE / 5)
                know = store.add(_key("heard"), 0)
            time.sleep(PAUSE if rank() == 0 else 0)  # the others ask it once more
        except RuntimeError:  # the store is gone, and with it the first node
            return

    def start(self) -> None:
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def join(self, seconds: float) -> None:
        if self.thread is not None:
            self.thread.join(seconds)

    def stop(self) -> None:
        self.done.set()
        self.join(2 * PATIENCE)


_watch = _Watch()


def watch() -> None:
    """From now on this process ends, with the same exit code, when another one of its run calls `end_others`."""
    if size() > 1 and _watch.thread is None:
        import torch.distributed  # noqa: F401, not by the thread: two threads cannot import it at a time

        _watch.start()
        atexit.register(_watch.stop)


def stop_watching() -> None:
    """The run is over: processes may end in any order."""
    _watch.stop()


def say_at_the_end(words: Callable[[], str] | None) -> None:
    """What the first process of every node says when `watch` ends it."""
    _watch.last_words = words


def lost_a_process(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run has ended. If that one has said why, this one ends
    here."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
    of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    of_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in lost)
    if size() == 1 or not (of_torch or of_gloo):
        return False
    _watch.join(4 * PAUSE)
    return True


def said_by_first(lines: list[str]) -> bool:
    """Whether the first process of this node fails for the same reason, and so prints these lines itself."""
    if size() == 1 or first_of_node():
        return False
    if "torch" not in sys.modules:  # before that, processes of a node read the same files and flags
        return True
    deadline = time.monotonic() + PATIENCE / 10
    try:
        store = _watch.line.open(PAUSE)
        while not store.check([_key("failed")]) and time.monotonic() < deadline:
            time.sleep(PAUSE / 5)
        return store.check([_key("failed")]) and json.loads(store.get(_key("failed")))["lines"] == lines
    except RuntimeError:
        return False


def end_others(code: int, lines: list[str]) -> None:
    """Ends the other processes of the run with an exit code, because this one failed for a reason that it has printed
    as `lines`. Returns when they know, or after a while."""
    alone = size() == 1 or _watch.done.is_set() or any(name not in os.environ for name in ADDRESS)
    # torchrun ends the processes of its node itself, and they have found the same before they imported torch.
    if alone or not (on_several_nodes() or "torch" in sys.modules):
        return
    _watch.stop()
    failed = {"rank": rank(), "node": node(), "code": code, "lines": lines}
    try:
        _watch.line.open(PATIENCE).set(_key("failed"), json.dumps(failed))
    except RuntimeError:  # the store is gone, and with it the first node
        return
    _watch.wait_for_others()
