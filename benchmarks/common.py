"""The parts that benchmarks share: fresh processes, timing, peak memory, the description of the machine, the report."""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from statistics import median
from typing import Any

from minionerec.process_memory import peak_rss_gb, reset_peak_rss


def quiet() -> None:
    """Turns off progress bars, warnings and the notes of bitsandbytes."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a new process, so that earlier measurements do not count towards its memory."""
    with multiprocessing.get_context("spawn").Pool(1, quiet) as pool:
        return pool.apply(function, args)


def in_fork(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process that `forks` starts: sooner than in a fresh one, where memory does not count."""
    with forks().Pool(1, quiet) as pool:
        return pool.apply(function, args)


@cache
def forks() -> BaseContext:
    """Starts processes: forks of one that has imported the libraries, which takes seconds; new ones where there is a
    GPU, which a fork may not be able to use."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bitsandbytes", "lora_utils", "minionerec.training.sft_trainer"])
    return context


def in_turn(worker: Callable[..., None], ways: list[str], repeats: int, *settings: Any) -> dict[str, dict[str, Any]]:
    """Runs each way in its own process, with the steps in turn, so that other load on the machine slows all of them.
    `worker(connection, way, *settings)` ends with a call of `answer`.

    Returns for every way `steps`, the results of its `repeats` steps, and the results of its process at the end.
    """
    context = forks()
    connections: dict[str, Connection] = {}
    processes = []
    for way in ways:
        connections[way], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(theirs, way, *settings), daemon=True))
        processes[-1].start()
        theirs.close()
    for connection in connections.values():
        connection.recv()
    steps: dict[str, list[Any]] = {way: [] for way in ways}
    for turn in range(repeats):
        for way, connection in connections.items():
            connection.send("step")
            steps[way].append(connection.recv())
        print(f"{turn + 1} of {repeats} turns", file=sys.stderr)
    results = {}
    for way, connection in connections.items():
        connection.send("stop")
        results[way] = {"steps": steps[way], **connection.recv()}
    for process in processes:
        process.join()
    return results


def answer(connection: Connection, step: Callable[[], object], end: Callable[[], dict[str, Any]]) -> None:
    """The process's side of `in_turn`: sends the result of `step` for each request, and of `end` at the end."""
    connection.send("ready")
    while connection.recv() == "step":
        connection.send(step())
    connection.send(end())


def reset_peak_memory() -> None:
    """Resets the peak of `peak_memory_gb` to the memory held now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak_rss()


def peak_memory_gb() -> float:
    """The peak memory since the last reset, in GB (1e9 bytes): on the GPU if there is one, else resident."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak_rss_gb()


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds that one call takes, including the work of the GPU."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def interleaved_medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function over `repeats` rounds; each round runs all functions in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
    return {name: median(values) for name, values in seconds.items()}


def machine() -> dict[str, str | int]:
    """The torch version, the number of CPU threads it uses, and the name of the GPU or CPU."""
    import torch

    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            hardware = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "CPU")
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "hardware": hardware}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints rows with the same keys as a Markdown table; floats have about three significant digits."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(text, row.values())) + " |")


def print_json(benchmark: str, **results: object) -> None:
    """Prints one line of JSON: the results and the machine."""
    print(json.dumps({"benchmark": benchmark, **machine(), **results}))
