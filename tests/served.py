"""What the tests of the server share: a stand-in for the model, and clients of an application, over a socket or not."""

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
from processes import free_port

pytest.importorskip("fastapi", reason="pip install fastapi")
pytest.importorskip("uvicorn", reason="pip install uvicorn")
pytest.importorskip("prometheus_client", reason="pip install prometheus-client")

from minionerec.serving import connections
from minionerec.serving.worker import Loaded

httpx = pytest.importorskip("httpx", reason="pip install httpx")


class Model:
    """Stands for the model: answers with the history itself, once the gate is open."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[list[str]]] = []
        self.error: Exception | None = None

    def __call__(self, requests):
        self.batches.append([request.given for request in requests])
        assert self.gate.wait(20)
        if self.error:
            raise self.error
        return [[{"id": text, "title": "", "sid": "", "score": 0.0} for text in one.given] for one in requests]


@contextlib.asynccontextmanager
async def client_of(app):
    """A client of an application whose model is loaded."""
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.worker.loaded)
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def with_client(app, steps):
    """Runs steps(client) against an application."""

    async def main():
        async with client_of(app) as client:
            return await steps(client)

    return asyncio.run(main())


async def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


class Checkpoints:
    """What a server loads: each time the next of these models, or an error."""

    def __init__(self, reader, *models):
        self.reader, self.models = reader, list(models)

    def __call__(self):
        if isinstance(self.models[0], Exception):
            raise self.models.pop(0)
        return Loaded(self.reader, self.models.pop(0), 4)


@contextlib.contextmanager
def on_a_socket(app, monkeypatch):
    """The port of an application on uvicorn, in a thread, and what stops it and says how many seconds that took."""
    monkeypatch.setattr(connections, "_log_to_standard_error", lambda: None)
    made = []

    def keep(config, real=connections.uvicorn.Server):
        config.timeout_notify = 0
        made.append(real(config))
        return made[-1]

    monkeypatch.setattr(connections.uvicorn, "Server", keep)
    port = free_port()
    thread = threading.Thread(target=connections.run, args=(app, "127.0.0.1", port))
    thread.start()
    deadline = time.monotonic() + 20
    while not (made and made[0].started):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    def stop():
        made[0].should_exit = True
        started = time.monotonic()
        thread.join(20)
        return time.monotonic() - started

    yield SimpleNamespace(port=port, stop=stop)
    stop()
    assert not thread.is_alive()
