"""Resident memory of this process, in GB (1e9 bytes), as Linux counts it: with the pages of files that are mapped."""


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
