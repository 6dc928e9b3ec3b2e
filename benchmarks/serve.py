"""Puts `recommend.py --serve` under load: many clients at once, against a server that decodes one request at a time.

Each client sends its next request as soon as the last one is answered. Every answer is compared with that of the batch
command for the same request: none may be lost, none may differ. Prints requests/s and the percentiles of the latency.

    python -m benchmarks.serve --model out/lora/final_checkpoint --info_file info.txt --histories test.csv
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

from benchmarks.common import print_json, print_table
from benchmarks.fixtures import ROOT
from minionerec import cli
from minionerec.data.files import read_info_items
from minionerec.data.items import Items
from minionerec.errors import RunError
from minionerec.flags import Flags, above_zero, command, flag
from minionerec.serving.requests import RequestReader

COMMAND = os.path.join(ROOT, "recommend.py")
TOLERANCE = 1e-3  # for a score: batches of other sizes round differently
PATIENCE = 300  # seconds until a server must answer


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(flags: list[str], batch_size: int, clients: int) -> Iterator[tuple[str, subprocess.Popen, str]]:
    """Runs a server; gives its address, its process and the file of its log."""
    port = free_port()
    words = [sys.executable, COMMAND, *flags, f"--serve={port}", f"--batch_size={batch_size}"]
    words += [f"--max_waiting={clients}"]
    with tempfile.NamedTemporaryFile(prefix="serve-", suffix=".log") as log:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(address, process, log.name)
            yield address, process, log.name
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(address: str, process: subprocess.Popen, log: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(f"{address}/ready", timeout=5).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                with open(log, encoding="utf-8") as file:
                    raise RunError(f"the server did not start: {file.read()[-2000:]}") from None
            time.sleep(0.2)


def in_turns(clients: int, turns: int, work: Callable[[int], None]) -> float:
    """Calls `work` with every number below `turns`; each of `clients` threads takes the next number when it is done.
    Returns the seconds of all."""
    numbers, lock = iter(range(turns)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                turn = next(numbers, None)
            if turn is None:
                return
            work(turn)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def ask(address: str, body: bytes) -> dict:
    """The answer to a request. Raises OSError if there is none."""
    with urllib.request.urlopen(f"{address}/recommend", body, timeout=PATIENCE) as answer:
        return json.load(answer)


def load(address: str, bodies: list[bytes], clients: int) -> tuple[list[dict | None], list[float], float]:
    """The answers in the order of the requests (None for one that was lost), their latencies, and all seconds."""
    answers: list[dict | None] = [None] * len(bodies)
    seconds = [0.0] * len(bodies)

    def work(turn: int) -> None:
        started = time.perf_counter()
        try:
            answers[turn] = ask(address, bodies[turn])
        except OSError as error:
            print(f"request {turn}: {error}", file=sys.stderr)
        seconds[turn] = time.perf_counter() - started

    wall = in_turns(clients, len(bodies), work)
    return answers, seconds, wall


def percentiles(seconds: list[float], *wanted: int) -> dict[str, float]:
    """Latencies in ms, by the name of a column."""
    ordered = sorted(seconds)
    return {f"p{p} (ms)": 1000 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in wanted}


@dataclass(frozen=True, kw_only=True)
class LoadFlags(Flags):
    """What a server recommends with, and what it is asked."""

    model: str = flag("", "a checkpoint, as in recommend.py.")
    info_file: str = flag("", "its catalogue.")
    histories: str = flag("", "file of histories, as in recommend.py; repeated if it has fewer rows than requests.")
    requests: int = flag(1000, "how many are sent to each server.", above_zero)
    clients: int = flag(32, "that send them.", above_zero)
    batch_size: int = flag(32, "most requests of a batch.", above_zero)
    num_beams: int = flag(50, "SIDs ranked per request.", above_zero)

    @property
    def words(self) -> list[str]:
        """The flags of recommend.py that the server and the batch command get."""
        return [f"--model={self.model}", f"--info_file={self.info_file}", f"--num_beams={self.num_beams}"]


def asked(flags: LoadFlags) -> tuple[list[bytes], dict[bytes, dict]]:
    """The bodies of all requests, of the distinct histories in turn, and what the server must answer to each. Raises
    InputError."""
    problems = flags.problems()
    bodies = problems.attempt(_read_bodies, flags.info_file, flags.histories, flags.requests)
    problems.check()
    assert bodies
    answers = answers_of_the_batch_command(flags.words, bodies, flags.batch_size)
    return list(islice(cycle(bodies), flags.requests)), answers


def _read_bodies(info_file: str, histories: str, most: int) -> list[bytes]:
    """The bodies of requests for the distinct histories of a file, at most `most`. Raises InputError."""
    items = Items(read_info_items(info_file), info_file)
    rows = RequestReader(items, None, K=10, most=10).read_file(histories)
    return list(islice(dict.fromkeys(json.dumps({"history": row.given}).encode() for row in rows), most))


def answers_of_the_batch_command(flags: list[str], bodies: list[bytes], batch_size: int) -> dict[bytes, dict]:
    """What the server must answer to each of these bodies."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = os.path.join(folder, "requests.jsonl"), os.path.join(folder, "answers.jsonl")
        with open(source, "wb") as file:
            file.write(b"\n".join(bodies) + b"\n")
        batch = [f"--histories={source}", f"--output={output}", f"--batch_size={batch_size}"]
        subprocess.run([sys.executable, COMMAND, *flags, *batch], check=True, stdout=subprocess.DEVNULL)
        with open(output, encoding="utf-8") as file:
            return dict(zip(bodies, map(json.loads, file), strict=True))


def wrong(answer: dict, expected: dict) -> bool:
    """Whether an answer differs from that of the batch command. Items of equal score may change places."""
    found, wanted = answer["items"], expected["items"]
    if len(found) != len(wanted) or answer["history"] != expected["history"]:
        return True
    if any(abs(one["score"] - other["score"]) > TOLERANCE for one, other in zip(found, wanted, strict=True)):
        return True
    last = wanted[-1]["score"] if wanted else 0.0
    of = {item["id"]: item["score"] for item in wanted}
    return any(abs(of.get(item["id"], last) - item["score"]) > TOLERANCE for item in found)


@dataclass(frozen=True, kw_only=True)
class ServeFlags(LoadFlags):
    """The same, with or without the items of the history."""

    exclude_seen: bool = flag(True, "each request leaves out its own history.")

    @property
    def words(self) -> list[str]:
        return [*super().words, f"--exclude_seen={self.exclude_seen}"]


@command(ServeFlags)
def serve(flags: ServeFlags) -> None:
    """Prints throughput and latency of a server with shared batches, and of one with batches of one."""
    bodies, answer_of = asked(flags)
    expected, clients = [answer_of[body] for body in bodies], flags.clients
    table = []
    for name, size in (("shared batches", flags.batch_size), ("one by one", 1)):
        with served(flags.words, size, clients) as (address, _, _):
            load(address, bodies[:clients], clients)  # the first requests find out how the model can be decoded
            answers, seconds, wall = load(address, bodies, clients)
        row: dict[str, object] = {"server": name, "requests/s": len(bodies) / wall, **percentiles(seconds, 50, 95, 99)}
        row["lost"] = sum(answer is None for answer in answers)
        row["wrong"] = sum(wrong(*pair) for pair in zip(answers, expected, strict=True) if pair[0] is not None)
        table.append(row)
    print_table(table)
    print()
    sizes = {name: getattr(flags, name) for name in ("requests", "clients", "batch_size", "num_beams")}
    print_json("serve", **sizes, table=table)
    if any(row["lost"] or row["wrong"] for row in table):
        raise RunError("requests were lost or answered wrongly")


if __name__ == "__main__":
    cli.run(serve)
