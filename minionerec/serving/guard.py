"""What happens to every request of the server: its id, its line in the log, its numbers, and a plain 500."""

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minionerec.serving.metrics import Metrics

log = logging.getLogger("minionerec.serve")

CLIENT_LEFT = 499  # as nginx logs it
PROBES = ("/health", "/ready")  # Kubernetes asks by the address of a pod, which is no name of the service
GIVEN_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


def problem(code: int, *details: str, **headers: str) -> JSONResponse:
    """An answer that says what is wrong."""
    return JSONResponse({"detail": list(details)}, code, headers or None)


class Guard:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, allowed_hosts: list[str]):
        self.app, self.metrics = app, metrics
        self.allowed_hosts = allowed_hosts

    async def _is_our_name(self, scope: Scope, receive: Receive) -> bool:
        """Whether the Host header is one of `allowed_hosts`. Starlette tells; what it answers is plain text."""
        ours = False

        async def accept(*_: object) -> None:
            nonlocal ours
            ours = True

        async def drop(_: Message) -> None:
            pass

        await TrustedHostMiddleware(accept, self.allowed_hosts, www_redirect=False)(scope, receive, drop)
        return ours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request. Logs the id, the client, the request, the status and the milliseconds."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        method = scope["method"]
        # A HEAD request is that of a GET, whose body uvicorn leaves out.
        inner = {
            **scope,
            "method": "GET" if method == "HEAD" else method,
            "state": {**scope.get("state", {}), "id": id},
        }
        status = None

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = id
            await send(message)

        try:
            ours = scope["path"] in PROBES or await self._is_our_name(inner, receive)
            answer = self.app if ours else problem(400, "the Host header is no name of this server (--allowed_hosts)")
            await answer(inner, receive, sending)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except asyncio.CancelledError:  # the server shuts down, and has waited long enough
            if status is None:
                await problem(503, "the server shuts down", Connection="close")(inner, receive, sending)
        except Exception:
            log.exception("%s failed", id)
            if status is None:
                await problem(500, f"the server failed; its log says more of request {id}")(inner, receive, sending)
        status = status or CLIENT_LEFT
        seconds = time.perf_counter() - started
        path = getattr(inner.get("route"), "path", "other")
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        target = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        client = (scope.get("client") or ("-",))[0][:64]
        log.info('%s %s "%s %s" %d %.1f ms', id, client, method, target, status, 1000 * seconds)
        return None
