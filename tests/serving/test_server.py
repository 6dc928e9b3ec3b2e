"""recommend.py --serve: shared batches, a bounded queue, answers for every body, and the page in a real browser."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from browser import Browser, needs_browser
from helpers import refused, run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import free_port, start_command

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="pip install fastapi uvicorn prometheus-client")
httpx = pytest.importorskip("httpx", reason="pip install httpx")

from minionerec.data.files import read_info_items, with_original_ids  # noqa: E402
from minionerec.data.items import ItemColumns, Items  # noqa: E402
from minionerec.errors import InputError, RunError  # noqa: E402
from minionerec.serving import checks, connections  # noqa: E402
from minionerec.serving import server as server_module  # noqa: E402
from minionerec.serving.metrics import Metrics  # noqa: E402
from minionerec.serving.requests import RequestReader  # noqa: E402
from minionerec.serving.server import make_app  # noqa: E402
from minionerec.serving.worker import Loaded, TooManyWaiting, Worker  # noqa: E402


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


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def reader(files) -> RequestReader:
    return RequestReader(Items(read_info_items(files["info"]), files["info"]), None, K=5, most=20)


@contextlib.asynccontextmanager
async def client_of(app):
    """A client of an application whose model is loaded."""
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.worker.loaded)
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


@pytest.fixture
def ask(reader, model):
    """`ask(steps)` runs steps(post, get) against an application with batches of 4 and at most 6 waiting requests."""

    def run(steps):
        async def main():
            async with client_of(make_app(lambda: Loaded(reader, model), batch_size=4, max_waiting=6)) as client:

                def post(body):
                    content = body if isinstance(body, bytes) else json.dumps(body)
                    return client.post("/recommend", content=content)

                return await steps(post, client.get)

        return asyncio.run(main())

    return run


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


def test_requests_that_arrive_together_share_a_batch(ask, model):
    async def steps(post, get):
        model.gate.clear()
        first = asyncio.ensure_future(post({"history": ["0"]}))
        await until(lambda: model.batches)
        others = [asyncio.ensure_future(post({"history": [str(i)]})) for i in range(1, 7)]
        async with asyncio.timeout(20):
            while (await get("/health")).json()["waiting"] < 6:
                await asyncio.sleep(0.01)
        model.gate.set()
        return [(await answer).json() for answer in [first, *others]]

    answers = ask(steps)
    assert [answer["items"][0]["id"] for answer in answers] == [str(i) for i in range(7)]  # each its own
    assert [len(batch) for batch in model.batches] == [1, 4, 2]


def test_a_full_queue_answers_503_and_recovers(ask, model):
    async def steps(post, get):
        model.gate.clear()
        first = asyncio.ensure_future(post({"history": ["0"]}))
        await until(lambda: model.batches)
        others = [asyncio.ensure_future(post({"history": ["1"]})) for _ in range(9)]
        await until(lambda: sum(answer.done() for answer in others) == 3)
        refused = [answer.result() for answer in others if answer.done()]
        model.gate.set()
        codes = sorted([(await answer).status_code for answer in [first, *others]])
        return refused, codes, await post({"history": ["2"]})

    refused, codes, again = ask(steps)
    assert codes == [200] * 7 + [503] * 3 and again.status_code == 200
    for answer in refused:
        assert answer.json() == {"detail": ["6 requests are waiting; try again later"]}
        assert answer.headers["Retry-After"] == "1"


def test_a_model_that_fails_answers_a_plain_500_and_goes_on(ask, model, caplog):
    async def steps(post, get):
        model.error = RunError("/secret/path")
        failed = await asyncio.gather(post({"history": ["0"]}), post({"history": ["1"]}))
        health, ready = await get("/health"), await get("/ready")
        model.error = None
        return failed, health, ready, await post({"history": ["1"]}), await get("/health")

    failed, ill, ready, good, health = ask(steps)
    for answer in failed:
        id = answer.headers["x-request-id"]
        assert answer.status_code == 500 and "secret" not in answer.text
        assert answer.json() == {"detail": [f"the model failed; the server's log says more of request {id}"]}
        assert id in caplog.text
    assert "RunError: /secret/path" in caplog.text and "Traceback" in caplog.text
    assert ill.status_code == 503 and ready.status_code == 200
    assert good.status_code == 200 and health.json() == {"status": "ok", "items": 40, "waiting": 0}


def test_an_endpoint_that_fails_answers_a_plain_500(reader, model, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server_module, "_health", fail)
    answer = with_client(make_app(lambda: Loaded(reader, model), 4, 6), lambda client: client.get("/ready"))
    assert answer.status_code == 500 and "the server failed" in answer.text and "secret" not in answer.text
    assert "RuntimeError: /secret/path" in caplog.text and answer.headers["x-request-id"] in caplog.text


def test_every_request_has_a_line_in_the_log_and_a_number(ask, caplog):
    caplog.set_level("INFO", "minionerec.serve")

    async def steps(post, get):
        kept = await get("/health", headers={"X-Request-ID": "shop:17"})
        made = await get("/a%0Ab", headers={"X-Request-ID": "two words\x01"})
        await post({"history": ["1"]})
        return kept, made, await get("/metrics")

    kept, made, metrics = ask(steps)
    assert kept.headers["x-request-id"] == "shop:17" and made.headers["x-request-id"] != "two words\x01"
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" ", 2)[2].rsplit(" ", 2)[0] for line in lines[:3]] == [
        '"GET /health" 200', '"GET /a%0Ab" 404', '"POST /recommend" 200'
    ]  # fmt: skip
    assert lines[0].startswith("shop:17 127.0.0.1 ") and lines[0].endswith(" ms")
    for line in ('requests_total{path="/recommend",status="200"} 1.0', 'requests_total{path="other",status="404"} 1.0'):
        assert f"minionerec_{line}" in metrics.text
    assert "minionerec_batch_size_count 1.0" in metrics.text and "process_resident_memory_bytes" in metrics.text


def test_a_server_that_loads_says_so(reader, model):
    gate = threading.Event()

    def load():
        assert gate.wait(20)
        return Loaded(reader, model)

    async def main():
        app = make_app(load, 4, 6)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                before = [await client.get("/health"), await client.get("/ready")]
                before += [await client.post("/recommend", json={"history": ["1"]}), await client.get("/items?title=a")]
                gate.set()
                await until(lambda: app.state.worker.loaded)
                return before, await client.get("/ready")

    (health, *others), ready = asyncio.run(main())
    assert health.json() == {"status": "loading", "items": 0, "waiting": 0} and health.status_code == 200
    for answer in others:
        assert answer.status_code == 503 and answer.json() == {"detail": ["the model is loading; try again later"]}
        assert answer.headers["Retry-After"] == "5"
    assert ready.json()["status"] == "ok"


def test_keys_are_asked_for(reader, model):
    async def steps(client):
        codes = {}
        for path in ("/health", "/ready", "/", "/docs", "/openapi.json", "/items?title=a", "/options", "/metrics"):
            codes[path] = (await client.get(path)).status_code
        post = [{"Authorization": text} for text in ("Bearer one", "bearer two", "Bearer three", "Basic one", "one")]
        answers = [await client.post("/recommend", json={"history": ["1"]}, headers=headers) for headers in post]
        return codes, answers, await client.get("/metrics", headers=post[0])

    app = make_app(lambda: Loaded(reader, model), 4, 6, keys=["one", "two"])
    codes, answers, metrics = with_client(app, steps)
    assert list(codes.values()) == [200] * 5 + [401] * 3 and metrics.status_code == 200
    assert [answer.status_code for answer in answers] == [200, 200, 401, 401, 401]
    assert "--api_key_file" in answers[-1].json()["detail"][0] and answers[-1].headers["WWW-Authenticate"] == "Bearer"


def test_a_server_answers_to_its_names(reader, model):
    names = ["localhost", "[::1]", "*.shop.example"]

    async def steps(client):
        hosts = ("localhost:8000", "[::1]:8000", "api.shop.example", "evil.example", "shop.example.evil")
        codes = [(await client.get("/items?title=a", headers={"Host": host})).status_code for host in hosts]
        return codes, (await client.get("/ready", headers={"Host": "10.0.0.7"})).status_code

    app = make_app(lambda: Loaded(reader, model), 4, 6, allowed_hosts=names)
    assert with_client(app, steps) == ([200, 200, 200, 400, 400], 200)


def test_a_body_must_be_json_by_its_type(reader, model):
    kinds = {"application/json; charset=utf-8": 200, "application/ld+json": 200, "text/plain": 415}
    kinds |= {"multipart/form-data; boundary=x": 415, "application/x-www-form-urlencoded": 200}

    async def steps(client):
        body = b'{"history": ["1"]}'
        answers = [await client.post("/recommend", content=body, headers={"Content-Type": kind}) for kind in kinds]
        return [answer.status_code for answer in answers]

    assert with_client(make_app(lambda: Loaded(reader, model), 4, 6), steps) == list(kinds.values())


class Checkpoints:
    """What a server loads: each time the next of these models, or an error."""

    def __init__(self, reader, *models):
        self.reader, self.models = reader, list(models)

    def __call__(self):
        if isinstance(self.models[0], Exception):
            raise self.models.pop(0)
        return Loaded(self.reader, self.models.pop(0))


def test_a_reload_loses_no_request(reader):
    old, new = Model(), Model()
    app = make_app(Checkpoints(reader, old, new), 4, 60, keys=["one"])

    async def steps(client):
        client.headers["Authorization"] = "Bearer one"
        old.gate.clear()
        posts = [asyncio.ensure_future(client.post("/recommend", json={"history": [str(i)]})) for i in range(6)]
        await until(lambda: app.state.worker.waiting == 5 or (old.batches and app.state.worker.waiting >= 2))
        reload = asyncio.ensure_future(client.post("/reload"))
        await until(lambda: app.state.worker._reload)
        second = await client.post("/reload")
        posts += [asyncio.ensure_future(client.post("/recommend", json={"history": [str(i)]})) for i in range(6, 12)]
        await asyncio.sleep(0.05)
        old.gate.set()
        answers = [await post for post in posts]
        return answers, await reload, second, await client.post("/recommend", json={"history": ["39"]})

    answers, reload, second, last = with_client(app, steps)
    assert [answer.json()["items"][0]["id"] for answer in answers] == [str(i) for i in range(12)]
    assert reload.json() == {"status": "ok", "items": 40, "waiting": reload.json()["waiting"]}
    assert second.status_code == 409 and last.status_code == 200
    assert new.batches[-1] == [["39"]] and all(["39"] not in batch for batch in old.batches)


def test_a_checkpoint_that_cannot_be_loaded_leaves_the_one_there_is(reader, model, caplog):
    bad = [InputError(["--model x: no such folder", "--info_file y: is empty"]), RuntimeError("/secret/path")]
    app = make_app(Checkpoints(reader, model, *bad), 4, 6, keys=["one"])

    async def steps(client):
        client.headers["Authorization"] = "Bearer one"
        answers = [await client.post("/reload"), await client.post("/reload")]
        return *answers, await client.post("/recommend", json={"history": ["1"]}), await client.get("/health")

    refused, failed, good, health = with_client(app, steps)
    assert refused.status_code == 422 and refused.json()["detail"] == bad[0].problems
    assert failed.status_code == 500 and "secret" not in failed.text and "/secret/path" in caplog.text
    assert good.status_code == health.status_code == 200


def test_the_signal_sighup_reloads(reader):
    old, new = Model(), Model()
    app = make_app(Checkpoints(reader, old, new), 4, 6)

    async def steps(client):
        without_key = await client.post("/reload")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: app.state.worker.loaded.recommend is new)
        return without_key

    without_key = with_client(app, steps)
    assert without_key.status_code == 403 and "SIGHUP" in without_key.json()["detail"][0]


def test_a_closed_terminal_ends_the_server(reader, monkeypatch):
    stopped = []
    app = make_app(Checkpoints(reader, Model(), Model()), 4, 6)
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    terminal = [True, False]
    monkeypatch.setattr(server_module, "in_terminal", lambda: terminal.pop(0))

    async def steps(client):
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: stopped)

    try:
        with_client(app, steps)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert app.state.worker._reload is None


def asgi_post(app, body: bytes, messages: list[dict]):
    """A POST by hand: what the client sends after its body, and what it gets."""
    scope = {"type": "http", "method": "POST", "path": "/recommend", "raw_path": b"/recommend", "query_string": b""}
    scope |= {"headers": [(b"host", b"test")], "client": ("1.2.3.4", 5), "state": {}}
    waiting, sent = [{"type": "http.request", "body": body, "more_body": not body.endswith(b"}")}, *messages], []

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    return app(scope, receive, send), sent


def test_the_work_of_clients_that_left_is_dropped(reader, model, caplog):
    caplog.set_level("INFO", "minionerec.serve")
    app = make_app(lambda: Loaded(reader, model), batch_size=4, max_waiting=6)
    gone = [{"type": "http.disconnect"}]

    async def steps(client):
        model.gate.clear()
        first = asyncio.ensure_future(client.post("/recommend", json={"history": ["0"]}))
        await until(lambda: model.batches)
        for _ in range(20):  # more than may wait
            call, sent = asgi_post(app, b'{"history": ["7"]}', gone[:])
            await call
            assert not sent
        call, sent = asgi_post(app, b'{"hist', gone[:])  # in the middle of the body
        await call
        assert not sent
        last = asyncio.ensure_future(client.post("/recommend", json={"history": ["1"]}))
        await until(lambda: ["1"] in [one.request.given for one in app.state.worker._waiting])
        model.gate.set()
        return [(await answer).status_code for answer in (first, last)], (await client.get("/metrics")).text

    codes, metrics = with_client(app, steps)
    assert codes == [200, 200] and model.batches == [[["0"]], [["1"]]]
    assert 'status="499"} 21.0' in metrics and "minionerec_dropped_total 20.0" in metrics
    assert "Traceback" not in caplog.text and caplog.text.count('"POST /recommend" 499') == 21


BAD = [
    (b"", "the body is not JSON"),
    (b"\xff\xfe", "the body is not JSON"),
    (b'{"history": [', "the body is not JSON"),
    (b"[" * 100_000, "the body is not JSON"),
    (b"[1]", "expected an object"),
    (b"{}", '"history" is missing or empty'),
    (b'{"history": ["nowhere"]}', "\"history\": 'nowhere' is no item id, SID or title of the info file"),
    (b'{"history": ["\\ud800"]}', '"history" must be a list of item ids, SIDs or titles, found '),
    (b'{"history": ["1"], "K": 21}', '"K" must be a whole number from 1 to 20'),
    (b'{"history": ["1"], "K": 1e400}', '"K" must be a whole number from 1 to 20 (--num_beams), found inf'),
    (b'{"history": ["1"], "where": "a=b"}', '"where" needs --item_meta_path'),
    (b'{"history": ["1"], "\\ud800": 1}', "is unknown; a request may have K, allow"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_bad_bodies_are_named(ask, model, body, message):
    async def steps(post, get):
        return await post(body)

    answer = ask(steps)
    assert answer.status_code == 422 and message in answer.json()["detail"][0]
    assert not model.batches


def test_all_that_is_wrong_with_a_request_comes_together(ask):
    async def steps(post, get):
        return await post({"history": ["x", "y"], "K": 0, "k": 1}), await post(b" " * (checks.MOST_BYTES + 1))

    answer, large = ask(steps)
    assert len(answer.json()["detail"]) == 4
    assert large.status_code == 413 and large.json() == {"detail": ["the body has more than 1,000,000 bytes"]}


@pytest.fixture(scope="module")
def plain_app(reader):
    return make_app(lambda: Loaded(reader, Model()), batch_size=4, max_waiting=6)


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


@pytest.mark.parametrize("name", ["K", "exclude_seen", "allow", "deny", "where"])
def test_null_stands_for_what_is_not_given(reader, name):
    assert reader.read({"history": ["1", "2"], name: None}) == reader.read({"history": ["1", "2"]})


HUGE = {
    "items that are not known": {"history": ["1"], "deny": ["zz"] * 15_000},
    "keys that are not known": {"history": ["1"], **{f"k{i}": 1 for i in range(15_000)}},
    "items of other types": {"history": ["1"], "allow": [[1.5] * 5000] * 10},
    "a long text": {"history": ["z" * 400_000], "where": "z" * 400_000},
}


@pytest.mark.parametrize("kind", HUGE)
def test_errors_have_a_bounded_size(ask, kind):
    async def steps(post, get):
        return await post(HUGE[kind])

    answer = ask(steps)
    assert answer.status_code == 422 and len(answer.content) < 2_000
    if len(answer.json()["detail"]) > 5:
        assert answer.json()["detail"][5:] == ["14,995 more problems like these"]


def test_lists_and_searches_are_limited(ask):
    async def steps(post, get):
        lists = [await post({"history": ["1"], name: ["1"] * 20_001}) for name in ("allow", "deny")]
        searches = [await get("/items", params={"title": text}) for text in ("a " * 21, "a" * 1001, "a " * 20)]
        return lists, searches

    lists, searches = ask(steps)
    for answer, name in zip(lists, ("allow", "deny"), strict=True):
        assert answer.json() == {"detail": [f'"{name}" has 20,001 items; at most 20,000 are allowed']}
    assert [answer.status_code for answer in searches] == [422, 422, 200]
    assert searches[0].json() == {"detail": ["title: at most 20 words are allowed"]} and len(searches[1].content) < 200


@given(st.lists(st.binary(max_size=40) | st.dictionaries(KEYS, VALUES, max_size=6), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_no_body_ends_in_a_traceback(plain_app, bodies):
    async def steps(client):
        for body in bodies:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = await client.post("/recommend", content=content)
            assert answer.status_code in (200, 422) and isinstance(answer.json(), dict)

    with_client(plain_app, steps)


def test_items_are_found_by_the_words_of_their_titles(ask):
    async def steps(post, get):
        return [
            await get("/items", params=params)
            for params in ({"title": "m3 BOLT"}, {"title": "bolt", "limit": 7}, {"title": "nut"}, {"title": "é"}, {})
        ] + [await get("/items?title=bolt&limit=101"), await get("/items?title=%ff")]

    some, seven, none, accent, missing, many, odd = ask(steps)
    assert [item["id"] for item in some.json()] == [str(i) for i in range(3, 40, 7)]
    assert set(some.json()[0]) == {"id", "title", "sid"}
    assert len(seven.json()) == 7 and none.json() == [] and len(accent.json()) == 20
    assert missing.status_code == many.status_code == 422 and odd.status_code == 200


def test_the_interface_describes_itself(ask):
    async def steps(post, get):
        return (await get("/openapi.json")).json(), await get("/docs"), await get("/"), await get("/nowhere")

    interface, docs, page, nowhere = ask(steps)
    body = interface["paths"]["/recommend"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"history", "K", "exclude_seen", "allow", "deny", "where"}
    assert {"200", "422", "500", "503"} <= set(interface["paths"]["/recommend"]["post"]["responses"])
    paths = {"/recommend", "/items", "/options", "/health", "/ready", "/metrics", "/reload"}
    assert set(interface["paths"]) == paths
    assert nowhere.status_code == 404 and nowhere.json() == {"detail": ["Not Found"]}
    for shown in (page, docs):
        assert shown.status_code == 200 and "default-src 'none'" in shown.headers["Content-Security-Policy"]
        assert "://" not in shown.text and "src=" not in shown.text  # nothing from elsewhere


def test_the_server_speaks_of_the_shops_own_ids(files, model):
    """The page then sends these; a search finds them, and a request may not name the number of an item."""
    metadata = {str(i): {"original_id": f"SKU-{i}"} for i in range(40)}
    listed = with_original_ids(read_info_items(files["info"]), metadata)
    reader = RequestReader(Items(listed, "info", only_original_ids=True), None, K=5, most=20)

    async def steps(client):
        posted = [await client.post("/recommend", json={"history": [text]}) for text in ("SKU-7", "7")]
        return (await client.get("/options")).json(), (await client.get("/items?title=SKU-7")).json(), *posted

    options, found, right, wrong = with_client(make_app(lambda: Loaded(reader, model), 4, 6), steps)
    assert options["original_ids"] and [(item["id"], item["original_id"]) for item in found] == [("7", "SKU-7")]
    assert right.status_code == 200 and wrong.status_code == 422
    assert "items are named by their original_id" in wrong.json()["detail"][0]


def test_requests_may_choose_by_the_columns_whose_values_items_share(files, model, tmp_path):
    meta = {str(i): {"title": f"Bolt {i % 2}", "price": i, "brand": "Kö" if i % 4 else "3M, Inc"} for i in range(40)}
    meta["7"]["brand"] = ["3M", "Kö", 4, None]
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    items = Items(read_info_items(files["info"]), files["info"])
    reader = RequestReader(items, ItemColumns(str(tmp_path / "meta.json"), items), K=5, most=20)

    async def steps(client):
        options = (await client.get("/options")).json()
        where = [f"brand={value}" for value in options["columns"][0]["values"]]
        return options, [(await client.post("/recommend", json={"history": ["1"], "where": one})) for one in where]

    options, chosen = with_client(make_app(lambda: Loaded(reader, model), 4, 6), steps)
    columns = [{"name": "brand", "values": ["Kö", "3M", "Inc", "4"]}]  # prices differ, and titles are no choice
    assert options == {"K": 5, "most": 20, "exclude_seen": False, "original_ids": False, "columns": columns}
    assert [answer.status_code for answer in chosen] == [200] * 4


@pytest.mark.parametrize(
    ("flags", "url", "hosts"),
    [
        ({}, "http://127.0.0.1:80", ["localhost", "127.0.0.1", "[::1]"]),
        ({"host": "::1"}, "http://[::1]:80", ["localhost", "127.0.0.1", "[::1]"]),
        ({"host": "0.0.0.0"}, "http://0.0.0.0:80", ["*"]),
        ({"host": "::"}, "http://[::]:80", ["*"]),
        ({"allowed_hosts": "a.example, *.b.example"}, "http://127.0.0.1:80", ["a.example", "*.b.example"]),
    ],
)
def test_a_server_of_this_machine_answers_to_its_names_only(flags, url, hosts):
    from recommend import RecommendFlags

    made = RecommendFlags(serve=80, **flags)
    assert made.url == url and made.hosts == hosts


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


@pytest.fixture
def listening(reader, model, monkeypatch):
    """A server of eight connections, whose clients have half a second, and which ends in a second."""
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "SHUTDOWN_SECONDS", 1)
    monkeypatch.setattr(checks, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(connections, "most_connections", lambda: 8)
    with on_a_socket(make_app(lambda: Loaded(reader, model), 4, 6), monkeypatch) as running:
        yield running


@pytest.fixture
def listening_with_a_key(reader, model, monkeypatch):
    """The port of a server with a key, and what lets its model load."""
    gate = threading.Event()

    def load():
        assert gate.wait(20)
        return Loaded(reader, model)

    with on_a_socket(make_app(load, 4, 6, keys=["one"]), monkeypatch) as running:
        yield running.port, gate


def connected(port: int, *parts: bytes, address: str = "127.0.0.1") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(address, 0))
    for part in parts:
        client.sendall(part)
    return client


POST = b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"


def test_slow_clients_are_closed(listening, caplog):
    """One that says nothing, one that stops in the head, one that stops in the body, and one that takes no answer."""
    greedy = socket.socket()
    greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    greedy.connect(("127.0.0.1", listening.port))
    greedy.settimeout(20)
    idle, head = connected(listening.port), connected(listening.port, b"GET / HTTP/1.1\r\nHost: lo")
    body = connected(listening.port, POST, b"{")
    with pytest.raises(ConnectionError):
        while True:
            greedy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
    for client in (idle, head):
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
    assert body.recv(100).startswith(b"HTTP/1.1 408 ")
    assert "Traceback" not in caplog.text


def test_too_many_connections_are_refused(listening):
    clients = [connected(listening.port, POST) for _ in range(8)]
    refused = [connected(listening.port) for _ in range(3)]
    for client in refused:
        assert client.recv(100).startswith(b"HTTP/1.1 503 ")
    for client in clients:
        client.close()
    time.sleep(0.1)
    with urllib.request.urlopen(f"http://127.0.0.1:{listening.port}/ready", timeout=20) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("parts", [(), (POST,)])
def test_a_client_with_all_connections_does_not_keep_others_out(listening, parts):
    """Others get some of its places, those without a request first; and it gets none of theirs."""
    greedy = [connected(listening.port, *parts) for _ in range(7)] + [connected(listening.port, POST)]
    time.sleep(0.1)
    others = [connected(listening.port, POST, address=f"127.0.0.{2 + i % 2}") for i in range(3)]
    more = connected(listening.port)
    assert more.recv(100).startswith(b"HTTP/1.1 503 ")
    for client in others:
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")
    answers = [client.recv(100)[9:12] for client in greedy]
    assert answers.count(b"503") == 3 and (parts or answers[-1] == b"408")


def test_a_client_with_all_waiting_requests_does_not_keep_others_out(reader, model):
    """The last requests of the one that waits for most are refused in their place, and no more than is fair."""
    worker = Worker(lambda: Loaded(reader, model), 1, 6, Metrics())

    def submit(client: str):
        return worker.submit(reader.read({"history": ["1"]}), worker.loaded, "id", client)

    try:
        until_true(lambda: worker.loaded)
        model.gate.clear()
        busy = submit("greedy")
        until_true(lambda: model.batches)
        greedy = [submit("greedy") for _ in range(6)]
        with pytest.raises(TooManyWaiting):
            submit("greedy")
        others = [submit("a"), submit("b"), submit("a")]
        with pytest.raises(TooManyWaiting):
            submit("a")  # all wait for two or three
        assert [isinstance(one.exception(0), TooManyWaiting) for one in greedy[3:]] == [True] * 3
        model.gate.set()
        assert all(one.result(20) for one in [busy, *greedy[:3], *others])
    finally:
        model.gate.set()
        worker.close(20)


def until_true(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_head_request_gets_the_head_of_the_answer(listening):
    answers = {}
    for method in ("GET", "HEAD"):
        client = http.client.HTTPConnection("127.0.0.1", listening.port, timeout=20)
        client.request(method, "/docs")
        answer = client.getresponse()
        answers[method] = (answer.status, answer.getheader("Content-Length"), len(answer.read()))
        client.close()
    status, length, size = answers["GET"]
    assert status == 200 and int(length) == size and answers["HEAD"] == (200, length, 0)


def test_a_client_that_trickles_does_not_hold_up_the_end(listening, model, caplog):
    model.gate.clear()
    client = connected(listening.port, POST)
    ending = threading.Event()

    def trickle():
        with contextlib.suppress(OSError):
            while not ending.wait(0.05):
                client.sendall(b" ")

    checks.BODY_SECONDS = 60  # the fixture sets it back
    thread = threading.Thread(target=trickle)
    thread.start()
    waiting = connected(listening.port, POST.replace(b"500", b"18"), b'{"history": ["1"]}')
    time.sleep(0.3)
    assert listening.stop() < 8
    ending.set()
    thread.join()
    model.gate.set()
    assert waiting.recv(12) == b"HTTP/1.1 503" and "Traceback" not in caplog.text


@pytest.fixture(scope="module")
def server(files, sft_run):
    """The address of a running command, and the checkpoint it serves."""
    port, checkpoint = free_port(), str(sft_run("lora") / "final_checkpoint")
    flags = {"model": checkpoint, "info_file": files["info"], "num_beams": 20, "serve": port, "K": 5}
    started = start_command("recommend.py", flags)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/ready", timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < deadline and started.processes[0].is_alive(), started.errors[-3000:]
            time.sleep(0.1)
    yield address, checkpoint
    started.kill(signal.SIGINT)
    assert started.wait() == [0] and "Traceback" not in started.errors, started.errors


@pytest.mark.slow
def test_the_server_answers_as_the_batch_command(files, server, tmp_path):
    address, checkpoint = server
    rows = [{"history": [i, i + 3], "exclude_seen": i % 2 == 0, "deny": ["7"]} for i in range(12)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model": checkpoint, "info_file": files["info"], "num_beams": 20, "K": 5}
    done = run_command("recommend.py", **flags, histories=tmp_path / "r.jsonl", output=tmp_path / "o.jsonl")
    assert done.returncode == 0, done.stderr
    expected = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]

    async def main():
        async with httpx.AsyncClient() as client:
            posts = [client.post(f"{address}/recommend", json=row, timeout=60) for row in rows]
            return await asyncio.gather(*posts)

    for answer, row in zip(asyncio.run(main()), expected, strict=True):
        found = answer.json()
        assert [item["score"] for item in found["items"]] == pytest.approx([i["score"] for i in row["items"]], abs=1e-4)
        for name in ("id", "title", "sid"):
            assert [item[name] for item in found["items"]] == [item[name] for item in row["items"]]
        assert found["history"] == row["history"]


@pytest.mark.slow
@needs_browser
def test_the_page_recommends_for_a_history_that_is_clicked_together(server, tmp_path):
    address, _ = server

    def post(history, **more):
        body = json.dumps({"history": history, **more}).encode()
        with urllib.request.urlopen(f"{address}/recommend", data=body, timeout=60) as answer:
            return [item["id"] for item in json.load(answer)["items"]]

    def ids(part):
        return f"[...document.querySelectorAll('#{part} li')].map((line) => line.dataset.id).join()"

    with Browser() as browser:
        browser.call("Page.navigate", url=address)
        browser.wait_for("document.readyState === 'complete' && !!document.getElementById('title')")
        browser.run("document.getElementById('title').focus()")
        browser.call("Input.insertText", text="m3 bolt")
        browser.wait_for(f"{ids('found')} === '3,10,17,24,31,38'")
        browser.run("document.querySelectorAll('#found button')[1].click()")
        browser.wait_for(f"{ids('history')} === '10' && {ids('items')} === '{','.join(post([10], exclude_seen=True))}'")
        browser.run("document.querySelectorAll('#found button')[4].click()")
        expected = post([10, 31], exclude_seen=True)
        browser.wait_for(f"{ids('history')} === '10,31' && {ids('items')} === '{','.join(expected)}'")
        title = browser.run("document.querySelector('#items li span').textContent")
        assert title.startswith(f'Bolt {expected[0]}, "M{int(expected[0]) % 7}" d\'Été {{x}}')
        browser.run("document.getElementById('exclude').click()")
        browser.wait_for(f"{ids('items')} === '{','.join(post([10, 31]))}'")
        browser.run("document.querySelector('#history button').click()")
        browser.wait_for(f"{ids('history')} === '31' && {ids('items')} === '{','.join(post([31]))}'")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 5_000
        asked = [event["params"]["request"]["url"] for event in browser.events if "request" in event.get("params", {})]
        assert len(asked) >= 6 and all(url.startswith((address, "data:,")) for url in asked)
        noise = [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert not noise


# What the parts of a page look like: those that are too small to touch, and the lowest contrast of a text.
SMALL = """[...document.querySelectorAll('button, input, select')].filter((e) => e.offsetParent && e.type !== 'checkbox'
    && Math.min(e.offsetHeight, e.offsetWidth) < 44).map((e) => e.outerHTML).join()"""
CONTRAST = """(() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 :
        ((v + .055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const behind = (e) => { const c = rgb(getComputedStyle(e).backgroundColor);
        return c[3] === 0 && e.parentElement ? behind(e.parentElement) : c; };
    const of = (e) => { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
        return (a + .05) / (b + .05); };
    return Math.min(...[...document.querySelectorAll('body *')].filter((e) => e.textContent.trim() &&
        !['SCRIPT', 'STYLE'].includes(e.tagName)).map(of));
})()"""


@pytest.mark.slow
@needs_browser
def test_the_pages_can_be_used_by_touch_keyboard_and_reader(server):
    address, _ = server
    with Browser() as browser:

        def said(part, text):
            browser.wait_for(f"document.getElementById('{part}').textContent === {json.dumps(text)}")

        for width, shade in ((390, "light"), (1280, "dark")):
            feature = [{"name": "prefers-color-scheme", "value": shade}]
            browser.call("Emulation.setEmulatedMedia", features=feature)
            size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", **size)
            browser.call("Page.navigate", url=address)
            browser.wait_for("document.readyState === 'complete' && document.getElementById('K')?.value === '5'")
            assert browser.run("document.getElementById('choosing').hidden")  # the server has no item file

            # Results are announced, and so is that there are none.
            browser.run("document.getElementById('title').focus()")
            browser.call("Input.insertText", text="nowhere")
            said("found-note", "Nothing found for “nowhere”.")
            browser.run("document.getElementById('title').value = ''")
            browser.call("Input.insertText", text="m3 bolt")
            said("found-note", "6 items found.")
            browser.run("document.querySelectorAll('#found button')[1].click()")
            said("items-note", "5 items recommended.")
            roles = [
                f"document.getElementById('{part}').getAttribute('role')" for part in ("items-note", "items-problem")
            ]
            assert [browser.run(role) for role in roles] == ["status", "alert"]

            # Focus stays where it was, in the place of what is gone.
            browser.run("document.querySelectorAll('#items button')[3].focus(); document.activeElement.click()")
            said("history-note", "2 items bought, oldest first.")
            browser.wait_for("document.getElementById('items').getAttribute('aria-busy') === 'false'")
            assert browser.run("[...document.querySelectorAll('#items button')].indexOf(document.activeElement)") == 3
            for left in (1, 0):
                browser.run("document.querySelector('#history button').focus(); document.activeElement.click()")
                browser.wait_for(f"document.querySelectorAll('#history li').length === {left}")
            assert browser.run("document.activeElement.id") == "title"
            said("items-note", "Waits for a history.")

            # K counts, and what is wrong is said.
            browser.run("document.querySelectorAll('#found button')[1].click()")
            for number, note in ((2, "2 items recommended."), (1, "1 item recommended.")):
                browser.run(f"(() => {{const K = document.getElementById('K'); K.value = {number}; K.onchange();}})()")
                said("items-note", note)
            browser.run("(() => {const K = document.getElementById('K'); K.value = 99; K.onchange();})()")
            said("items-problem", '"K" must be a whole number from 1 to 20 (--num_beams), found 99')

            # Large enough to touch, readable, and nothing to scroll sideways; history and results side by side.
            title = "Bolt" * 60
            browser.run(f"document.querySelectorAll('li span').forEach((part) => {{ part.textContent = '{title}'; }})")
            assert browser.run(SMALL) == "" and browser.run(CONTRAST) > 4.5
            assert browser.run("document.documentElement.scrollWidth") <= width
            tops = [
                browser.run(f"document.getElementById('{part}').getBoundingClientRect().top")
                for part in ("past", "best")
            ]
            assert tops[0] == tops[1] < 600
            browser.call("Page.navigate", url=f"{address}/docs")
            browser.wait_for("document.querySelectorAll('section').length === 7")
            assert browser.run(CONTRAST) > 4.5 and browser.run("document.documentElement.scrollWidth") <= width
            text = browser.run("document.body.innerText")
            for part in ("POST /recommend", "exclude_seen true or false or null", "Answer: list of FoundItem"):
                assert part in text, text


@pytest.mark.slow
@needs_browser
def test_the_page_waits_for_the_model_and_asks_for_a_key(listening_with_a_key):
    port, gate = listening_with_a_key
    with Browser() as browser:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}")
        browser.wait_for(
            "document.getElementById('items-problem')?.textContent === 'Give the key of this server above.'"
        )
        browser.run("(() => {const key = document.getElementById('secret'); key.value = 'no'; key.onchange();})()")
        browser.wait_for("document.getElementById('items-problem').textContent === 'The key is not valid.'")
        browser.run("(() => {const key = document.getElementById('secret'); key.value = 'one'; key.onchange();})()")
        browser.wait_for("document.getElementById('items-note').textContent === 'The model is loading…'")
        gate.set()
        browser.wait_for("document.getElementById('items-note').textContent === 'Waits for a history.'")
        assert browser.run("document.getElementById('K').value") == "5"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"serve": 70000}, "--serve 70000: must be a port, from 1 to 65535"),
        ({"serve": -1}, "--serve -1: must be a port"),
        ({"serve": "x"}, "--serve 'x' is not valid; expected a whole number"),
        ({"serve": 8000, "history": "1"}, "--history and --serve exclude each other"),
        ({"serve": 8000, "host": "nowhere.invalid"}, "cannot listen on --host nowhere.invalid"),
        ({"serve": 8000, "host": " "}, "--host ' ': must be an address"),
        ({"serve": 8000, "host": "x" * 70}, "cannot listen on --host xxx"),
        ({"serve": 8000, "max_waiting": 0}, "--max_waiting 0: must be above 0"),
        ({"serve": 8000, "api_key_file": "nowhere"}, "--api_key_file nowhere: no such file"),
        ({"serve": 8000, "api_key_file": os.devnull}, f"--api_key_file {os.devnull}: no such file"),
        ({"serve": 8000, "api_key_file": __file__}, "has spaces or other than ASCII; a header cannot have it"),
        ({"history": "1", "api_key_file": __file__}, "--api_key_file has no effect without --serve"),
        ({"serve": 8000, "allowed_hosts": "x,http://y"}, "--allowed_hosts 'http://y': must be a name such as"),
    ],
)
def test_what_cannot_be_served_is_refused(files, base, flags, message):
    refused("recommend.py", message, **{"model": base, "info_file": files["info"], "category": "bolts", **flags})


def test_a_port_that_is_taken_is_refused(files, base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = {"model": base, "info_file": files["info"], "category": "bolts", "serve": port}
        refused("recommend.py", f"--serve {port}: cannot listen on --host 127.0.0.1: ", **flags)


def test_one_process_serves(files, base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = {"model": base, "info_file": files["info"], "category": "bolts", "serve": free_port()}
    refused("recommend.py", "one process serves; start it without torchrun", **flags)


@pytest.mark.slow
def test_a_checkpoint_of_another_catalogue_ends_the_server(files, sft_run, tmp_path):
    (tmp_path / "info.txt").write_text("<a_0><b_0><c_0>\tBolt\t1\n<z_1>\tNut\t2\n")
    flags = {"model": sft_run("lora") / "final_checkpoint", "info_file": tmp_path / "info.txt", "serve": free_port()}
    started = start_command("recommend.py", flags)
    assert started.wait(60) == [2] and "belongs to a different catalogue" in started.errors
    assert "Traceback" not in started.errors
