"""What the server checks before it answers, keys and bodies for example, and how it says what is wrong."""

import asyncio
import secrets
from typing import Annotated

import fastapi
from fastapi import Depends, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as AnyHTTPException

from minionerec.data.files import MOST_PROBLEMS
from minionerec.serving.guard import problem
from minionerec.serving.worker import Loaded

MOST_BYTES = 1_000_000  # of a body
BODY_SECONDS = 20  # for a body to arrive
# What clients say that mean JSON; the last two are what curl -d and urllib say by themselves.
JSON_TYPES = ("application/json", "", "application/x-www-form-urlencoded")


async def refused(_: fastapi.Request, error: AnyHTTPException) -> Response:
    """The answer to an HTTPException."""
    return problem(error.status_code, str(error.detail), **(error.headers or {}))


async def invalid(_: fastapi.Request, error: RequestValidationError) -> Response:
    """The answer to parameters of another form, without what they are: it may be long."""
    found = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
    return problem(422, *found[:MOST_PROBLEMS])


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def check_key(http: fastapi.Request, given: Credentials) -> None:
    """Raises HTTPException where a request has no key of --api_key_file."""
    key = given.credentials.encode() if given else b""
    if not any(secrets.compare_digest(key, one) for one in http.app.state.keys):
        headers = {"WWW-Authenticate": "Bearer"}
        raise HTTPException(401, "give a key of --api_key_file in the header Authorization: Bearer KEY", headers)


async def _loaded(http: fastapi.Request) -> Loaded:
    loaded = http.app.state.worker.loaded
    if loaded is None:
        raise HTTPException(503, "the model is loading; try again later", {"Retry-After": "5"})
    return loaded


Serving = Annotated[Loaded, Depends(_loaded)]


async def read_body(http: fastapi.Request) -> bytes:
    """The body. Raises HTTPException for one that is no JSON by its type, too large or too slow."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in JSON_TYPES and not kind.endswith("+json"):
        raise HTTPException(415, f"the body must be JSON, with Content-Type: application/json, not {kind[:80]}")
    # The connection stays open: a client that sends its whole body before it reads the answer would find it reset.
    large = HTTPException(413, f"the body has more than {MOST_BYTES:,} bytes")
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MOST_BYTES:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise large
    except TimeoutError:
        raise HTTPException(408, f"the body took over {BODY_SECONDS} seconds", {"Connection": "close"}) from None
    return bytes(body)
