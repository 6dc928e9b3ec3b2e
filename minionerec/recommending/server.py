"""Recommends over HTTP. Requests that arrive together share a batch.

| path | what it does |
|---|---|
| POST /recommend | recommends for a request (see `recommending.requests`); 422 for a bad one, 503 if too many wait |
| GET /items?title=WORDS | finds items by the words of their titles |
| GET /health | says whether the model can be asked |
| GET / | a page to try it |
| GET /docs, /openapi.json | the interface, described |
"""

import asyncio
import json
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field

from minionerec.errors import InputError
from minionerec.recommending.requests import Request, RequestReader

MOST_BYTES = 1_000_000  # of a body
MOST_FOUND = 100  # items of a search

Recommended = list[dict[str, object]]


class Asked(BaseModel):
    """A request. Items are named by id, SID or title."""

    # It only describes the interface: `RequestReader` checks requests.

    history: list[str | int] = Field(description="what was bought, oldest first", examples=[["12", "40"]])
    K: int | None = Field(None, description="how many items to recommend")
    exclude_seen: bool | None = Field(None, description="leave out the items of the history")
    allow: list[str | int] | None = Field(None, description="recommend only these")
    deny: list[str | int] | None = Field(None, description="do not recommend these")
    where: str | None = Field(None, description="column=value of the item file", examples=["brand=3M"])


class FoundItem(BaseModel):
    """An item of the catalogue."""

    id: str
    title: str
    sid: str


class RecommendedItem(FoundItem):
    """An item and the log-probability of its SID, in nats."""

    score: float


class Answer(BaseModel):
    """The items for a history, best first; fewer than K where fewer are allowed."""

    history: list[str]
    items: list[RecommendedItem]


class Problem(BaseModel):
    """What is wrong."""

    detail: list[str]


class Batcher:
    """One thread that asks the model. The requests that wait when it is free share a batch."""

    def __init__(self, recommend: Callable[[Sequence[Request]], list[Recommended]], batch_size: int, max_waiting: int):
        self.recommend, self.batch_size = recommend, batch_size
        self.waiting: queue.Queue[tuple[Request, Future] | None] = queue.Queue(max_waiting)
        self.thread = threading.Thread(target=self._work, name="recommend", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> "Future[Recommended]":
        """The items of a request, in the future. Raises queue.Full if as many wait as may."""
        future: Future[Recommended] = Future()
        self.waiting.put_nowait((request, future))
        return future

    def close(self) -> None:
        """Stops the thread after what waits."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (taken := self.waiting.get()) is not None:
            batch = [taken]
            while len(batch) < self.batch_size and not self.waiting.empty():  # no other thread takes from it
                if (taken := self.waiting.get()) is None:
                    break
                batch.append(taken)
            batch = [(request, future) for request, future in batch if future.set_running_or_notify_cancel()]
            try:
                answers = self.recommend([request for request, _ in batch]) if batch else []
                for (_, future), items in zip(batch, answers, strict=True):
                    future.set_result(items)
            except Exception as error:  # whatever it is, those who wait must know, and the next batch may do
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            if taken is None:
                return


def make_app(
    recommend: Callable[[Sequence[Request]], list[Recommended]],
    reader: RequestReader,
    batch_size: int,
    max_waiting: int,
) -> fastapi.FastAPI:
    """The web application.

    Args:
        recommend: called in one thread, with at most `batch_size` requests.
        max_waiting: requests that may wait for it; further ones get 503.
    """
    batcher = Batcher(recommend, batch_size, max_waiting)

    @asynccontextmanager
    async def lifespan(_app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = fastapi.FastAPI(title="MiniOneRec-LoRA", description="Recommends items for a history.", lifespan=lifespan)
    with open(os.path.join(os.path.dirname(__file__), "page.html"), encoding="utf-8") as file:
        page = file.read()
    schema = {"required": True, "content": {"application/json": {"schema": Asked.model_json_schema()}}}
    responses: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (413, 422, 500, 503)}
    responses[200] = {"model": Answer}

    @app.post("/recommend", responses=responses, openapi_extra={"requestBody": schema})
    async def recommend_items(http: fastapi.Request) -> fastapi.Response:
        """Recommends items for a history."""
        body = b""
        async for part in http.stream():
            body += part
            if len(body) > MOST_BYTES:
                return _problem(413, f"the body has more than {MOST_BYTES:,} bytes")
        try:
            request = reader.read(json.loads(body))
        except InputError as error:
            return _problem(422, *error.problems)
        except (ValueError, RecursionError) as error:
            return _problem(422, f"the body is not JSON: {error}")
        try:
            items = await asyncio.wrap_future(batcher.submit(request))
        except queue.Full:
            return _problem(503, f"{max_waiting} requests are waiting; try again later")
        except Exception as error:
            lines = str(error).strip().splitlines()
            return _problem(500, f"the model failed: {type(error).__name__}{f': {lines[0]}' if lines else ''}")
        return JSONResponse({"history": request.given, "items": items})

    @app.get("/items")
    def find_items(title: str, limit: int = fastapi.Query(20, ge=1, le=MOST_FOUND)) -> list[FoundItem]:
        """Finds items whose titles contain all the words, in any case."""
        return [FoundItem(id=item.id, title=item.title, sid=item.sid) for item in reader.items.search(title, limit)]

    @app.get("/health", responses={503: {"model": Problem}})
    async def health() -> fastapi.Response:
        """Says whether the model can be asked, and how many requests wait for it."""
        if not batcher.thread.is_alive():
            return _problem(503, "the thread that asks the model has ended")
        return JSONResponse({"status": "ok", "items": len(reader.items), "waiting": batcher.waiting.qsize()})

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def start() -> str:
        return page

    return app


def _problem(code: int, *details: str) -> JSONResponse:
    return JSONResponse({"detail": list(details)}, code, headers={"Retry-After": "1"} if code == 503 else None)
