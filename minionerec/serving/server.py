"""Recommends over HTTP.

| path | what it does |
|---|---|
| POST /recommend | recommends for a request (see `serving.requests`); 422 for a bad one, 503 if too many wait |
| GET /items?title=WORDS | finds items by the words of their titles, or by id |
| GET /options | what requests may say: K, and the columns for `where` |
| GET /health | says whether the server works: not if the model failed when it was last asked |
| GET /ready | says whether the model is loaded |
| GET /metrics | numbers for Prometheus |
| POST /reload | loads the checkpoint and its files again, as SIGHUP does |
| GET / | a page to try it |
| GET /docs, /openapi.json | the interface, described |

`worker` owns the model, `guard` is around every request, `checks` come before an answer, and `connections` runs all of
it on uvicorn.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import fastapi
from fastapi import Depends, HTTPException, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from minionerec.data.files import parse_json
from minionerec.errors import InputError
from minionerec.serving.checks import Serving, check_key, invalid, read_body, refused
from minionerec.serving.guard import Guard, problem
from minionerec.serving.interface import (
    MOST_LISTED,
    Column,
    ErrorResponse,
    FoundItem,
    Health,
    Options,
    RecommendRequest,
    RecommendResponse,
)
from minionerec.serving.metrics import Metrics
from minionerec.serving.requests import Request
from minionerec.serving.worker import Loaded, TooManyWaiting, Worker

MOST_FOUND = 100  # items of a search
MOST_WORDS = 20  # of a search
MOST_VALUES = 200  # of a column
CLOSING_SECONDS = 2  # for the model to end what it does
# The pages load nothing from elsewhere, and no other page may show them.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
}


def make_app(
    load: Callable[[], Loaded],
    max_waiting: int,
    keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = ("*",),
) -> fastapi.FastAPI:
    """The web application. Its `state` has the `Worker` and the `Metrics`.

    Args:
        load: called in one thread when the application starts, and again for each reload; that thread asks the model.
        max_waiting: requests that may wait for it; further ones get 503.
        keys: one of which a request must have; none if there are no keys.
        allowed_hosts: names that a request may call the server; `*` for any.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        worker = app.state.worker = Worker(load, max_waiting, metrics)
        metrics.watch(lambda: worker.waiting)
        with contextlib.suppress(RuntimeError, ValueError):  # signals reach the main thread only
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _on_hangup, worker, in_terminal())
        yield
        with contextlib.suppress(RuntimeError, ValueError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        await asyncio.to_thread(worker.close, CLOSING_SECONDS)

    app = fastapi.FastAPI(
        title="MiniOneRec-LoRA",
        description="Recommends items for a history.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect has no body, and a client that does not follow it sees nothing
    )
    app.state.metrics = metrics
    set_keys(app, keys)
    app.add_middleware(Guard, metrics=metrics, allowed_hosts=list(allowed_hosts))
    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.include_router(_guarded, dependencies=[Depends(check_key)] if keys else [])
    app.include_router(_open)
    return app


def set_keys(app: fastapi.FastAPI, keys: Sequence[str]) -> None:
    """From now on, requests must have one of these keys. Whether they must have any is for `make_app`."""
    app.state.keys = [key.encode() for key in keys]


def in_terminal() -> bool:
    """Whether this process is in the foreground of a terminal."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _on_hangup(worker: Worker, in_foreground: bool) -> None:
    """SIGHUP takes a new checkpoint, unless it says that the terminal which the server was started in is closed."""
    if in_foreground and not in_terminal():
        signal.raise_signal(signal.SIGTERM)
    else:
        worker.reload()


# --- Without a key ----------------------------------------------------------------------------------------------------

_open = fastapi.APIRouter()
_unready: dict[int | str, dict[str, type[ErrorResponse]]] = {503: {"model": ErrorResponse}}


def _health(http: fastapi.Request) -> Response:
    worker = http.app.state.worker
    items = len(worker.loaded.reader.items) if worker.loaded else 0
    status = "ok" if worker.loaded else "loading"
    return JSONResponse({"status": status, "items": items, "waiting": worker.waiting})


@_open.get("/health", responses=_unready, response_model=Health)
async def health(http: fastapi.Request) -> Response:
    """Says whether the server works: not if the model failed when it was last asked."""
    worker = http.app.state.worker
    if worker.failing:
        return problem(503, "the model failed when it was last asked")
    return _health(http) if worker.thread.is_alive() else problem(503, "the thread that asks the model has ended")


@_open.get("/ready", responses=_unready, response_model=Health)
async def ready(http: fastapi.Request, _: Serving) -> Response:
    """Says whether the model is loaded."""
    return _health(http)


def _page(name: str) -> Callable:
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        text = file.read()

    async def page() -> Response:
        return HTMLResponse(text, headers=PAGE_HEADERS)

    return page


_open.add_api_route("/", _page("page.html"), include_in_schema=False)
_open.add_api_route("/docs", _page("docs.html"), include_in_schema=False)


# --- With a key, if there are keys ------------------------------------------------------------------------------------

_guarded = fastapi.APIRouter()
_problems: dict[int | str, dict[str, type[ErrorResponse]]] = {
    code: {"model": ErrorResponse} for code in (401, 408, 413, 415, 422, 500, 503)
}


def _read(loaded: Loaded, body: bytes) -> Request:
    try:
        return loaded.reader.read(parse_json(body), MOST_LISTED)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from None


@_guarded.post(
    "/recommend",
    responses={200: {"model": RecommendResponse}, **_problems},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": RecommendRequest.model_json_schema()}},
        }
    },
)
async def recommend_items(http: fastapi.Request, loaded: Serving) -> Response:
    """Recommends items for a history."""
    worker, id, client = http.app.state.worker, http.state.id, http.client.host if http.client else ""
    try:
        request = await run_in_threadpool(_read, loaded, await read_body(http))
        future = worker.submit(request, loaded, id, client)
    except InputError as error:
        return problem(422, *error.problems)
    except TooManyWaiting:
        return _busy(worker)
    answer, left = asyncio.wrap_future(future), asyncio.ensure_future(_client_left(http))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
        if not answer.done():
            future.cancel()  # nobody takes it
            answer.cancel()
    if answer.cancelled():
        raise ClientDisconnect
    if isinstance(answer.exception(), TooManyWaiting):
        return _busy(worker)
    if answer.exception():
        return problem(500, f"the model failed; the server's log says more of request {id}")
    return JSONResponse({"history": request.given, "items": answer.result()})


def _busy(worker: Worker) -> Response:
    details = f"{worker.max_waiting} requests are waiting; try again later"
    return problem(503, details, **{"Retry-After": "1"})


async def _client_left(http: fastapi.Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


@_guarded.get("/items", responses=_problems, response_model_exclude_none=True)
def find_items(
    loaded: Serving,
    title: Annotated[str, Query(max_length=1_000)],
    limit: Annotated[int, Query(ge=1, le=MOST_FOUND)] = 20,
) -> list[FoundItem]:
    """Finds the item with this id, and items whose titles contain all the words, in any case."""
    if len(title.split()) > MOST_WORDS:
        raise HTTPException(422, f"title: at most {MOST_WORDS} words are allowed")
    return [
        FoundItem(id=item.id, original_id=item.original_id or None, title=item.title, sid=item.sid)
        for item in loaded.reader.items.search(title, limit)
    ]


@_guarded.get("/options", responses=_problems)
def show_options(loaded: Serving) -> Options:
    """What requests may say: how many items, and the columns of the item file for `where`."""
    reader = loaded.reader
    choices = reader.columns.choices(MOST_VALUES) if reader.columns else {}
    columns = [Column(name=name, values=values) for name, values in choices.items()]
    return Options(
        K=reader.K,
        most=reader.most,
        exclude_seen=reader.exclude_seen,
        original_ids=reader.items.only_original_ids,
        columns=columns,
    )


@_guarded.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def show_metrics(http: fastapi.Request) -> Response:
    """Numbers for Prometheus."""
    return Response(http.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@_guarded.post(
    "/reload", responses={code: {"model": ErrorResponse} for code in (401, 403, 409, 422, 500)}, response_model=Health
)
async def reload(http: fastapi.Request) -> Response:
    """Loads the checkpoint and its files again. Requests wait meanwhile; if it fails, what is loaded stays."""
    if not http.app.state.keys:
        return problem(403, "needs a server with --api_key_file; without one, send it the signal SIGHUP")
    future = http.app.state.worker.reload()
    if future is None:
        return problem(409, "a checkpoint is being loaded already")
    try:
        await asyncio.wrap_future(future)
    except InputError as error:
        return problem(422, *error.problems)
    except Exception:
        return problem(500, "the checkpoint cannot be loaded, so it stays as it was; the server's log says more")
    return _health(http)
