"""What the server checks before it answers: keys, types and sizes of bodies."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Model, with_client

from minionerec.serving import checks
from minionerec.serving.server import make_app
from minionerec.serving.worker import Loaded


def test_keys_are_asked_for(reader, model):
    async def steps(client):
        codes = {}
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json", "/items?title=a", "/options", "/metrics"):
            codes[path] = (await client.get(path)).status_code
        post = [{"Authorization": text} for text in ("Bearer one", "bearer two", "Bearer three", "Basic one", "one")]
        answers = [await client.post("/recommend", json={"history": ["1"]}, headers=headers) for headers in post]
        return codes, answers, await client.get("/metrics", headers=post[0])

    app = make_app(lambda: Loaded(reader, model, 4), 6, keys=["one", "two"])
    codes, answers, metrics = with_client(app, steps)
    assert list(codes.values()) == [200] * 5 + [401] * 3 and metrics.status_code == 200
    assert [answer.status_code for answer in answers] == [200, 200, 401, 401, 401]
    assert "--api_key_file" in answers[-1].json()["detail"][0] and answers[-1].headers["WWW-Authenticate"] == "Bearer"


def test_a_body_must_be_json_by_its_type(reader, model):
    kinds = {"application/json; charset=utf-8": 200, "application/ld+json": 200, "text/plain": 415}
    kinds |= {"multipart/form-data; boundary=x": 415, "application/x-www-form-urlencoded": 200}

    async def steps(client):
        body = b'{"history": ["1"]}'
        answers = [await client.post("/recommend", content=body, headers={"Content-Type": kind}) for kind in kinds]
        return [answer.status_code for answer in answers]

    assert with_client(make_app(lambda: Loaded(reader, model, 4), 6), steps) == list(kinds.values())


def test_all_that_is_wrong_with_a_request_comes_together(ask):
    async def steps(post, get):
        return await post({"history": ["x", "y"], "K": 0, "k": 1}), await post(b" " * (checks.MOST_BYTES + 1))

    answer, large = ask(steps)
    assert len(answer.json()["detail"]) == 4
    assert large.status_code == 413 and large.json() == {"detail": ["the body has more than 1,000,000 bytes"]}


@pytest.fixture(scope="module")
def plain_app(reader):
    return make_app(lambda: Loaded(reader, Model(), 4), max_waiting=6)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["1", "39", "<a_0><b_0><c_0>"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


KEYS = st.sampled_from(["history", "K", "exclude_seen", "allow", "deny", "where"])


@given(st.lists(st.binary(max_size=40) | st.dictionaries(KEYS, VALUES, max_size=6), min_size=1, max_size=8))
@settings(max_examples=40)
def test_no_body_ends_in_a_traceback(plain_app, bodies):
    async def steps(client):
        for body in bodies:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await client.post("/recommend", content=content)
            assert answer.status_code in (200, 422) and isinstance(answer.json(), dict)

    with_client(plain_app, steps)
