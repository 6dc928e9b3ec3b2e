"""recommend.py --serve: shared batches, a bounded queue, answers for every body, and the page in a real browser."""

import asyncio
import json
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest
from browser import Browser, needs_browser
from helpers import refused, run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import free_port, start_command

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")
httpx = pytest.importorskip("httpx", reason="pip install httpx")

from minionerec.data.files import read_info_items  # noqa: E402
from minionerec.data.items import Items  # noqa: E402
from minionerec.errors import RunError  # noqa: E402
from minionerec.recommending.requests import RequestReader  # noqa: E402
from minionerec.recommending.server import MOST_BYTES, make_app  # noqa: E402


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


@pytest.fixture
def ask(files, model):
    """`ask(steps)` runs steps(post, get) against an application with batches of 4 and at most 6 waiting requests."""
    reader = RequestReader(Items(read_info_items(files["info"]), files["info"]), None, K=5, most=20)

    def run(steps):
        async def main():
            app = make_app(model, reader, batch_size=4, max_waiting=6)
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app, raise_app_exceptions=True)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

                    def post(body):
                        content = body if isinstance(body, bytes) else json.dumps(body)
                        return client.post("/recommend", content=content)

                    return await steps(post, client.get)

        return asyncio.run(main())

    return run


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


def test_a_model_that_fails_answers_500_and_goes_on(ask, model):
    async def steps(post, get):
        model.error = RunError("the model's predictions are NaN\nsecond line")
        failed = await asyncio.gather(post({"history": ["0"]}), post({"history": ["1"]}))
        model.error = None
        return failed, await post({"history": ["1"]}), await get("/health")

    failed, good, health = ask(steps)
    for answer in failed:
        assert answer.status_code == 500
        assert answer.json() == {"detail": ["the model failed: RunError: the model's predictions are NaN"]}
    assert good.status_code == 200 and health.json() == {"status": "ok", "items": 40, "waiting": 0}


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
        return await post({"history": ["x", "y"], "K": 0, "k": 1}), await post(b" " * (MOST_BYTES + 1))

    answer, large = ask(steps)
    assert len(answer.json()["detail"]) == 4
    assert large.status_code == 413 and large.json() == {"detail": ["the body has more than 1,000,000 bytes"]}


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
@settings(max_examples=40, deadline=None)
def test_no_body_ends_in_a_traceback(files, bodies):
    reader = RequestReader(Items(read_info_items(files["info"]), files["info"]), None, K=5, most=20)

    async def main():
        app = make_app(Model(), reader, batch_size=4, max_waiting=6)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                for body in bodies:
                    content = body if isinstance(body, bytes) else json.dumps(body).encode()
                    answer = await client.post("/recommend", content=content)
                    assert answer.status_code in (200, 422) and isinstance(answer.json(), dict)

    asyncio.run(main())


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
    assert set(interface["paths"]) == {"/recommend", "/items", "/health"}
    assert docs.status_code == 200 and nowhere.status_code == 404
    assert "://" not in page.text and "src=" not in page.text  # nothing from elsewhere


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
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
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
    ],
)
def test_what_cannot_be_served_is_refused(files, base, flags, message):
    refused("recommend.py", message, **{"model": base, "info_file": files["info"], "category": "bolts", **flags})


def test_a_port_that_is_taken_is_refused(files, base):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = {"model": base, "info_file": files["info"], "category": "bolts", "serve": port}
        refused("recommend.py", f"--serve {port}: cannot listen on --host 127.0.0.1: ", **flags)


def test_one_process_serves(files, base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = {"model": base, "info_file": files["info"], "category": "bolts", "serve": free_port()}
    refused("recommend.py", "one process serves; start it without torchrun", **flags)
