"""recommend.py --serve as a whole: loading, signals, searches, and the page in a real browser."""

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from types import SimpleNamespace

import pytest
from browser import Browser, needs_browser
from helpers import ROOT, refused, succeed
from processes import free_port, start_command
from served import Checkpoints, Model, httpx, on_a_socket, until, with_client

import recommend
from minionerec.data.files import read_info_items, with_original_ids
from minionerec.data.items import ItemColumns, Items
from minionerec.serving import connections
from minionerec.serving import server as server_module
from minionerec.serving.requests import RequestReader
from minionerec.serving.server import make_app
from minionerec.serving.worker import Loaded


def test_a_server_that_loads_says_so(reader, model):
    gate = threading.Event()

    def load():
        assert gate.wait(20)
        return Loaded(reader, model, 4)

    async def main():
        app = make_app(load, 6)
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


def test_the_signal_sighup_reloads(reader):
    old, new = Model(), Model()
    app = make_app(Checkpoints(reader, old, new), 6)

    async def steps(client):
        without_key = await client.post("/reload")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: app.state.worker.loaded.recommend is new)
        return without_key

    without_key = with_client(app, steps)
    assert without_key.status_code == 403 and "SIGHUP" in without_key.json()["detail"][0]


def test_a_closed_terminal_ends_the_server(reader, monkeypatch):
    stopped = []
    app = make_app(Checkpoints(reader, Model(), Model()), 6)
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


def test_the_server_speaks_of_the_shops_own_ids(files, model):
    """The page then sends these; a search finds them, and a request may not name the number of an item."""
    metadata = {str(i): {"original_id": f"SKU-{i}"} for i in range(40)}
    listed = with_original_ids(read_info_items(files["info"]), metadata)
    reader = RequestReader(Items(listed, "info", only_original_ids=True), None, K=5, most=20)

    async def steps(client):
        posted = [await client.post("/recommend", json={"history": [text]}) for text in ("SKU-7", "7")]
        return (await client.get("/options")).json(), (await client.get("/items?title=SKU-7")).json(), *posted

    options, found, right, wrong = with_client(make_app(lambda: Loaded(reader, model, 4), 6), steps)
    assert options["original_ids"] and [(item["id"], item["original_id"]) for item in found] == [("7", "SKU-7")]
    assert right.status_code == 200 and wrong.status_code == 422
    assert "items are named by their original_id" in wrong.json()["detail"][0]


def test_requests_may_choose_by_the_columns_whose_values_items_share(files, model):
    meta = {str(i): {"title": f"Bolt {i % 2}", "price": i, "brand": "Kö" if i % 4 else "3M, Inc"} for i in range(40)}
    meta["7"]["brand"] = ["3M", "Kö", 4, None]
    items = Items(read_info_items(files["info"]), files["info"])
    reader = RequestReader(items, ItemColumns("meta.json", items, meta), K=5, most=20)

    async def steps(client):
        options = (await client.get("/options")).json()
        where = [f"brand={value}" for value in options["columns"][0]["values"]]
        return options, [(await client.post("/recommend", json={"history": ["1"], "where": one})) for one in where]

    options, chosen = with_client(make_app(lambda: Loaded(reader, model, 4), 6), steps)
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


def test_a_reload_forgets_the_catalogue_and_the_keys_of_before(files, monkeypatch):
    read, models = [], []

    def read_files(*_):
        items = Items(read_info_items(files["info"]), files["info"])
        models.append(Model())
        read.append(weakref.ref(items))
        reader, keys = RequestReader(items, None, K=5, most=20), [["one"], ["two"]][len(read) - 1]
        return SimpleNamespace(reader=reader, items=items, keys=keys, notes=[])

    def run(app, *_):
        async def steps(client):
            key = {"Authorization": "Bearer one"}
            before = await client.post("/recommend", json={"history": ["1"]}, headers=key)
            reloaded = await client.post("/reload", headers=key)
            return before, reloaded, await client.post("/recommend", json={"history": ["1"]}, headers=key)

        before, reloaded, revoked = with_client(app, steps)
        assert before.status_code == 200 and reloaded.json()["items"] == 40 and revoked.status_code == 401
        gc.collect()
        assert [catalogue() is None for catalogue in read] == [True, False]

    monkeypatch.setattr(recommend, "read_files", read_files)
    monkeypatch.setattr(recommend, "load", lambda *_: SimpleNamespace(answer=lambda r, _: models[-1](r), batch_size=4))
    monkeypatch.setattr(connections, "run", run)
    port = free_port()
    recommend.serve(
        recommend.RecommendFlags(model="here", info_file=files["info"], num_beams=20, serve=port, allowed_hosts="*")
    )


@pytest.fixture
def listening_with_a_key(reader, model, monkeypatch):
    """The port of a server with a key, and what lets its model load."""
    gate = threading.Event()

    def load():
        assert gate.wait(20)
        return Loaded(reader, model, 4)

    with on_a_socket(make_app(load, 6, keys=["one"]), monkeypatch) as running:
        yield running.port, gate


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
    succeed("recommend.py", **flags, histories=tmp_path / "r.jsonl", output=tmp_path / "o.jsonl")
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
            for part in (
                "POST /recommend",
                'exclude_seen true or false or "earlier" or null',
                "Answer: list of FoundItem",
            ):
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


BUSY = """
import os, signal
from types import SimpleNamespace
import torch
import recommend
from minionerec.serving import server

def load(*_):
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)

server.CLOSING_SECONDS = 0.1
recommend.read_input = lambda _: SimpleNamespace(keys=[], notes=[])
recommend.load = load
recommend.serve(recommend.RecommendFlags(model="here", info_file="info.txt", serve=%d))
"""


@pytest.mark.slow
def test_a_server_that_is_stopped_while_the_model_computes_ends_without_a_core_dump():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUSY % free_port()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


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
def test_a_checkpoint_of_another_catalogue_ends_the_server(sft_run, tmp_path):
    (tmp_path / "info.txt").write_text("<a_0><b_0><c_0>\tBolt\t1\n<z_1>\tNut\t2\n")
    flags = {"model": sft_run("lora") / "final_checkpoint", "info_file": tmp_path / "info.txt", "serve": free_port()}
    started = start_command("recommend.py", flags)
    assert started.wait(60) == [2] and "belongs to a different catalogue" in started.errors
    assert "Traceback" not in started.errors
