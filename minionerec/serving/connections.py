"""Runs the server's application on uvicorn: how many connections may be open, how long a client may take, the log."""

import asyncio
import logging
import resource
import sys
from asyncio import BaseTransport
from collections import Counter
from contextlib import suppress
from weakref import WeakKeyDictionary

import fastapi
import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from minionerec.serving.metrics import Metrics

log = logging.getLogger("minionerec.serve")

BACKLOG = 128  # connections that the system accepts at once, before any of them can be refused
OTHER_FILES = 128  # that are open next to connections
CLIENT_SECONDS = 20  # to send the head of a request, and to take its answer
SHUTDOWN_SECONDS = 10  # for the requests that are there
NO_HTTP = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def most_connections() -> int:
    """How many connections may be open: up to 1,000, and fewer where the system allows few files. It is told to allow
    enough, if it may."""
    wanted = 1_000 + BACKLOG + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return 1_000 if soft == resource.RLIM_INFINITY else max(16, min(1_000, soft - BACKLOG - OTHER_FILES))


class Watch:
    """Closes the connections of clients that are too many or too slow.

    uvicorn has a timeout between requests, and none for a head that trickles in or an answer that is not taken.
    """

    def __init__(self, app: fastapi.FastAPI):
        self.app, self.most = app, most_connections()
        self.metrics: Metrics = app.state.metrics
        self.refused = 0
        self._seen: WeakKeyDictionary[H11Protocol, tuple[float, tuple | None]] = WeakKeyDictionary()
        self.server: uvicorn.Server | None = None

    def make_place(self, new: H11Protocol) -> None:
        """Closes a connection, where one too many is open: the new one, or one of the client that has most, so that no
        client keeps the others out; of these one without a request, if there is one."""
        still_open = [one for one in new.connections if not one.transport.is_closing()]
        counts = Counter(map(_client_of, still_open))
        greedy = max(counts, key=counts.__getitem__)
        if counts[greedy] <= counts[_client_of(new)] + 1:
            self.refuse(new)
        elif len(still_open) > self.most:
            self.refuse(min((one for one in still_open if _client_of(one) == greedy), key=_is_answering))

    def refuse(self, connection: H11Protocol) -> None:
        """Closes a connection at once."""
        self.refused += 1
        self.metrics.refused.inc()
        connection.transport.write(BUSY)
        connection.transport.close()

    async def look(self) -> None:
        """Closes the connections that wait for their client since `CLIENT_SECONDS`, and ends a server without a
        model. uvicorn calls it every second."""
        assert self.server is not None
        if self.app.state.worker.error:
            self.server.should_exit = True
        now = asyncio.get_running_loop().time()
        for connection in list(self.server.server_state.connections):
            answering, untaken = _is_answering(connection), connection.transport.get_write_buffer_size() > 0
            state = (connection.cycle, answering, untaken)
            since, before = self._seen.get(connection, (now, None))
            if state != before:
                self._seen[connection] = (now, state)
            elif (untaken or not answering) and now - since > CLIENT_SECONDS:
                self.metrics.refused.inc()
                connection.transport.abort()
        if self.refused:
            log.warning("%d connections refused: %d are open", self.refused, self.most)
            self.refused = 0


def _client_of(connection: H11Protocol) -> str:
    return connection.client[0] if connection.client else ""


def _is_answering(connection: H11Protocol) -> bool:
    return connection.cycle is not None and not connection.cycle.response_complete


def run(app: fastapi.FastAPI, host: str, port: int) -> None:
    """Serves an application of `make_app` until a signal ends it. The requests that are there then have
    `SHUTDOWN_SECONDS`. Raises what kept its checkpoint from being loaded."""
    watch = Watch(app)

    class Connection(H11Protocol):
        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)
            if len(self.connections) > watch.most:
                watch.make_place(self)

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else it is the rest of a request with an answer
                self.transport.write(NO_HTTP)
            if self.cycle is not None:  # it answers no more
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def _unsupported_upgrade_warning(self) -> None:
            """An offer of HTTP/2, as Java's HttpClient makes with every request, is answered over HTTP/1.1. uvicorn
            would say each time that a WebSocket library is missing."""

    _log_to_standard_error()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        callback_notify=watch.look,
        timeout_notify=1,
    )
    server = watch.server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):  # uvicorn raises again what stopped it
        server.run()
    if app.state.worker.error:
        raise app.state.worker.error


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("minionerec.serve", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
