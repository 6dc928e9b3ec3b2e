"""Leaves `recommend.py --serve` alone with many clients, 1% of them hostile, while its checkpoint is loaded again.

The hostile ones leave in the middle of a request, trickle, send garbage, ask for too much, or do not take their answer.
Every answer to the others is compared with that of the batch command: none may be lost, none may differ. The memory of
the server must stay flat, its log free of tracebacks, and SIGTERM must end it in time while a client trickles.

    python -m benchmarks.soak --model out/lora/final_checkpoint --info_file info.txt --histories test.csv
"""

import contextlib
import json
import random
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from urllib.parse import urlsplit

from benchmarks.common import print_json, print_table
from benchmarks.serve import PATIENCE, LoadFlags, ask, asked, in_turns, percentiles, served, wrong
from minionerec import cli
from minionerec.errors import RunError
from minionerec.flags import above_zero, command, flag

SAMPLES = 20  # of the server's memory
TRICKLE = 30  # seconds that a slow client goes on
MOST_GROWTH = 0.05  # of the memory, from a quarter of the requests to the end


class Hostile:
    """Clients that no server should mind. Each kind is a method; `attack` runs the next one."""

    def __init__(self, address: str, good: bytes):
        parts = urlsplit(address)
        self.address, self.good = address, good
        self.where = (parts.hostname, parts.port)
        kinds = (self.leave_in_the_body, self.leave_with_the_answer, self.garbage, self.trickle_a_head)
        kinds += (self.trickle_a_body, self.too_large, self.unknown_items, self.not_json, self.long_search)
        kinds += (self.take_no_answer, self.other_host, self.idle)
        self.turns = cycle(kinds)
        self.lock = threading.Lock()
        self.slow: list[threading.Thread] = []
        self.codes: dict[str, int] = {}

    def attack(self) -> None:
        """The next kind of attack."""
        with self.lock:
            kind = next(self.turns)
        with contextlib.suppress(OSError):
            kind()

    def _send(self, *parts: bytes) -> socket.socket:
        client = socket.create_connection(self.where, timeout=TRICKLE)
        for part in parts:
            client.sendall(part)
        return client

    def _head(self, length: int, host: str = "localhost") -> bytes:
        return f"POST /recommend HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n".encode()

    def _aside(self, work: Callable[[], None]) -> None:
        """In a thread of its own, since it takes long."""
        self.slow.append(threading.Thread(target=lambda: _forgive(work), daemon=True))
        self.slow[-1].start()

    def _ask(self, path: str, body: bytes | None) -> None:
        try:
            with urllib.request.urlopen(self.address + path, body, timeout=PATIENCE) as answer:
                code, size = answer.status, len(answer.read())
        except urllib.error.HTTPError as error:
            code, size = error.code, len(error.read())
        with self.lock:
            name = f"{code}, {size // 1000} kB"
            self.codes[name] = self.codes.get(name, 0) + 1

    def leave_in_the_body(self) -> None:
        self._send(self._head(500), b"{").close()

    def leave_with_the_answer(self) -> None:
        self._send(self._head(len(self.good)), self.good).close()

    def garbage(self) -> None:
        client = self._send(random.Random(0).randbytes(3000))
        client.recv(1000)
        client.close()

    def trickle_a_head(self) -> None:
        self._aside(lambda: self._trickle(self._send(b"GET / HTTP/1.1\r\n"), b"X: y\r\n"))

    def trickle_a_body(self) -> None:
        self._aside(lambda: self._trickle(self._send(self._head(900_000), b"{"), b" "))

    def _trickle(self, client: socket.socket, part: bytes) -> None:
        for _ in range(2 * TRICKLE):
            client.sendall(part)
            time.sleep(0.5)

    def too_large(self) -> None:
        self._ask("/recommend", b"x" * 1_500_000)

    def unknown_items(self) -> None:
        self._ask("/recommend", json.dumps({"history": ["1"], "deny": ["zz"] * 19_000}).encode())

    def not_json(self) -> None:
        self._ask("/recommend", b"[" * 100_000)

    def long_search(self) -> None:
        self._ask("/items?title=" + "+".join(["ab"] * 20_000), None)

    def take_no_answer(self) -> None:
        def work() -> None:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.settimeout(TRICKLE)
            client.connect(self.where)
            for _ in range(10_000):
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)

        self._aside(work)

    def other_host(self) -> None:
        client = self._send(self._head(len(self.good), "evil.example"), self.good)
        client.recv(1000)
        client.close()

    def idle(self) -> None:
        self._aside(lambda: self._trickle(self._send(), b""))


def _forgive(work: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        work()


def memory_mb(address: str) -> float:
    """The resident memory of the server, in MB (1e6 bytes)."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_resident_memory_bytes")) / 1e6


@dataclass(frozen=True, kw_only=True)
class SoakFlags(LoadFlags):
    """What is asked, by whom, and what happens meanwhile."""

    requests: int = flag(20_000, "how many are sent.", above_zero)
    clients: int = flag(64, "that send them.", above_zero)
    num_beams: int = flag(20, "SIDs ranked per request.", above_zero)
    hostile: float = flag(0.01, "share of the requests that are hostile.")
    reloads: int = flag(2, "how often the checkpoint is loaded again meanwhile.")


@command(SoakFlags)
def soak(flags: SoakFlags) -> None:
    """Prints what was lost or wrong, the latency, the memory, the log and the end of a server under load."""
    bodies, expected = asked(flags)
    requests, clients, hostile, reloads = flags.requests, flags.clients, flags.hostile, flags.reloads
    reloaded = {requests * (number + 1) // (reloads + 1) for number in range(reloads)}
    every = round(1 / hostile) if hostile > 0 else requests + 1

    lost: list[str] = []
    differ: list[int] = []
    seconds: list[float] = []
    memory: list[tuple[int, float]] = []

    with served(flags.words, flags.batch_size, 2 * clients) as (address, process, log):
        enemies = Hostile(address, bodies[0])

        def good(turn: int) -> None:
            started = time.perf_counter()
            try:
                if wrong(ask(address, bodies[turn]), expected[bodies[turn]]):
                    differ.append(turn)
            except OSError as error:
                lost.append(f"request {turn}: {error}")
            seconds.append(time.perf_counter() - started)

        def work(turn: int) -> None:
            if turn % max(requests // SAMPLES, 1) == 0:
                memory.append((turn, memory_mb(address)))
            if turn in reloaded:
                process.send_signal(signal.SIGHUP)
            if turn % every == every - 1:
                enemies.attack()
            else:
                good(turn)

        wall = in_turns(clients, requests, work)
        for thread in enemies.slow:
            thread.join(TRICKLE)
        memory.append((requests, memory_mb(address)))

        # The end, with a client that trickles.
        enemies.trickle_a_body()
        time.sleep(1)
        ending = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        ending = time.perf_counter() - ending
        with open(log, encoding="utf-8", errors="replace") as file:
            text = file.read()

    settled = next(mb for turn, mb in sorted(memory) if turn >= requests // 4)
    row: dict[str, object] = {"requests": len(seconds), "hostile": requests - len(seconds), "lost": len(lost)}
    row |= {"wrong": len(differ), "requests/s": len(seconds) / wall}
    row |= percentiles(seconds, 50, 99)
    row |= {"memory (MB) at 1/4": settled, "at the end": sorted(memory)[-1][1]}
    row |= {"reloads": text.count("loaded the checkpoint again"), "tracebacks": text.count("Traceback")}
    row |= {"log (MB)": len(text) / 1e6, "end (s)": ending}
    print_table([row])
    print("\nanswers to hostile requests: " + "; ".join(f"{n} of {name}" for name, n in sorted(enemies.codes.items())))
    print_json("soak", **row, clients=clients, num_beams=flags.num_beams, memory=sorted(memory))
    for line in lost[:10]:
        print(line, file=sys.stderr)
    grown = sorted(memory)[-1][1] / settled - 1
    if lost or differ or grown > MOST_GROWTH or row["tracebacks"]:
        raise RunError("requests were lost or answered wrongly, the memory grew, or the log has tracebacks")


if __name__ == "__main__":
    cli.run(soak)
