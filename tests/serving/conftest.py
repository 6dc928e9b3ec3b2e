"""A server's application with a stand-in for the model. What needs its packages is imported by those that ask."""

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from minionerec.data.files import read_info_items
from minionerec.data.items import Items
from minionerec.serving.requests import RequestReader

if TYPE_CHECKING:
    from served import Model


@pytest.fixture
def model() -> "Model":
    from served import Model

    return Model()


@pytest.fixture(scope="module")
def reader(files) -> RequestReader:
    return RequestReader(Items(read_info_items(files["info"]), files["info"]), None, K=5, most=20)


@pytest.fixture
def ask(reader, model) -> Callable:
    """`ask(steps)` runs steps(post, get) against an application with batches of 4 and at most 6 waiting requests."""
    from served import client_of

    from minionerec.serving.server import make_app
    from minionerec.serving.worker import Loaded

    def run(steps):
        async def main():
            async with client_of(make_app(lambda: Loaded(reader, model, 4), max_waiting=6)) as client:

                def post(body):
                    content = body if isinstance(body, bytes) else json.dumps(body)
                    return client.post("/recommend", content=content)

                return await steps(post, client.get)

        return asyncio.run(main())

    return run
