"""The memory of this process: measured in GB (1e9 bytes), on the GPU or resident; pauses of garbage collection.

Resident is as Linux counts it, with the pages of mapped files. Commands import this file before torch.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def rss_gb() -> float:
    """The resident memory now."""
    return _status_gb("VmRSS:")


def peak_rss_gb() -> float:
    """The peak of resident memory since the process started, or since `reset_peak_rss`. `ru_maxrss` would also include
    the peak of the parent process."""
    return _status_gb("VmHWM:")


def reset_peak_rss() -> None:
    """Resets the peak of `peak_rss_gb` to the resident memory now. Raises OSError if the system does not allow it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status_gb(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / 1e9


def return_freed_memory() -> None:
    """Returns freed memory to the system, if the C library is glibc. It otherwise keeps what quantizing a model used, 1
    GB for 0.5 billion weights."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak_of_loading() -> None:
    """Resets the peak of `peak_memory_gb`, so that it is the peak of training. Loading may hold a weight twice, and on
    a CPU, Linux counts the pages of weight files as resident until other processes need the memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # not allowed, or not Linux: then the peak is that of the whole process
        reset_peak_rss()


def peak_memory_gb() -> float:
    """The peak memory of this process: on the GPU if there is one, else resident, since it started or since
    `forget_peak_of_loading`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        return peak_rss_gb()
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


@contextmanager
def without_collector() -> Iterator[None]:
    """Pauses the garbage collector, around what makes many objects and no cycles: it would scan them all again and
    again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports of torch, transformers and PEFT. Garbage collection would take a quarter of their time,
    so it pauses. What they made stays, and is never scanned."""
    first = "torch" not in sys.modules
    with without_collector():
        yield
    if first:
        gc.freeze()
