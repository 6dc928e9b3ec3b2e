"""The memory of this process in GB (1e9 bytes): resident, as Linux counts it, with the pages of mapped files; or on the
GPU. Commands import it before torch."""

from contextlib import suppress


def rss_gb() -> float:
    """What is held now."""
    return _status_gb("VmRSS:")


def peak_rss_gb() -> float:
    """The most that was held since the process started, or since `reset_peak_rss`. `ru_maxrss` would be its parent's
    too."""
    return _status_gb("VmHWM:")


def reset_peak_rss() -> None:
    """Starts the count of `peak_rss_gb` anew, from what is held now; raises OSError where a machine forbids it."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status_gb(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / 1e9


def forget_peak_of_loading() -> None:
    """Starts the count of `peak_memory_gb` anew, for the peak of training: loading may hold a weight twice, and on a
    CPU Linux counts the pages of the weight files as resident until they are wanted elsewhere."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # where it is forbidden, or no Linux, the peak is that of the whole process
        reset_peak_rss()


def peak_memory_gb() -> float:
    """The most memory this process has held, in GB (1e9 bytes): on the GPU where there is one, else resident, since it
    started or `forget_peak_of_loading`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        return peak_rss_gb()
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
