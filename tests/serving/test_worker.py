"""The thread of the model: batches, a bounded and fair queue, failures and reloads."""

import asyncio
import gc
import time
import weakref

import pytest
from served import Checkpoints, Model, until, with_client

from minionerec.errors import InputError, RunError
from minionerec.serving import worker
from minionerec.serving.checks import check_key
from minionerec.serving.metrics import Metrics
from minionerec.serving.server import make_app
from minionerec.serving.worker import Loaded, TooManyWaiting, Worker


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


def test_a_history_that_the_model_fails_on_fails_alone(reader, model, caplog):
    """NaN for one history is a RunError for its batch. It is found in fewer passes than there are requests, and without
    what the failed pass computed: a card may have no room for both."""
    computed, left, asked = [], [], []

    def recommend(requests):
        asked.append([request.given for request in requests])
        left.append([activations() for activations in computed].count(None) < len(computed))
        activations = Model()
        computed.append(weakref.ref(activations))
        answers = model(requests)
        if ["1"] in asked[-1]:
            raise RunError("NaN")
        return answers

    async def steps(client):
        model.gate.clear()
        first = asyncio.ensure_future(client.post("/recommend", json={"history": ["9"]}))
        await until(lambda: model.batches)
        posts = [asyncio.ensure_future(client.post("/recommend", json={"history": [str(i)]})) for i in range(8)]
        await until(lambda: app.state.worker.waiting == 8)
        model.gate.set()
        answers = [await post for post in [first, *posts]]
        await client.post("/recommend", json={"history": ["9"]})  # the last answer decides whether the model fails
        return answers, await client.get("/health")

    app = make_app(lambda: Loaded(reader, recommend, 8), 8)
    answers, health = with_client(app, steps)
    assert [answer.status_code for answer in answers] == [200, 200, 500, *[200] * 6] and health.status_code == 200
    assert answers[3].json()["items"][0]["id"] == "2"
    assert sorted(map(len, asked)) == [1, 1, 1, 1, 2, 2, 4, 4, 8]  # requests may arrive in any order
    assert not any(left[: asked.index([["1"]]) + 1])  # then pytest keeps what is logged, with its frames
    assert caplog.text.count("the model failed on") == 1 and answers[2].headers["x-request-id"] in caplog.text


def test_a_reload_loses_no_request(reader):
    old, new = Model(), Model()
    app = make_app(Checkpoints(reader, old, new), 60, keys=["one"])

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
    app = make_app(Checkpoints(reader, model, *bad), 6, keys=["one"])

    async def steps(client):
        client.headers["Authorization"] = "Bearer one"
        answers = [await client.post("/reload"), await client.post("/reload")]
        return *answers, await client.post("/recommend", json={"history": ["1"]}), await client.get("/health")

    refused, failed, good, health = with_client(app, steps)
    assert refused.status_code == 422 and refused.json()["detail"] == bad[0].problems
    assert failed.status_code == 500 and "secret" not in failed.text and "/secret/path" in caplog.text
    assert good.status_code == health.status_code == 200


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
    app = make_app(lambda: Loaded(reader, model, 4), max_waiting=6)
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


def until_true(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_client_with_all_waiting_requests_does_not_keep_others_out(reader, model):
    """The last requests of the one that waits for most are refused in their place, and no more than is fair."""
    worker = Worker(lambda: Loaded(reader, model, 1), 6, Metrics())

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


class Heavy(Model):
    """A model that is in a cycle, as an adapter on its base is, and that fails with what it computed in its frames."""

    def __init__(self):
        super().__init__()
        self.itself, self.fails = self, False

    def __call__(self, requests):
        activations = Model()
        self.kept = weakref.ref(activations)
        if self.fails:
            raise RuntimeError("a batch")
        return super().__call__(requests)


def test_what_is_replaced_or_fails_is_not_kept(reader, monkeypatch):
    """Neither while the thread waits for the next request: a card holds one model, or two while it loads."""
    loaded = []

    def load():
        model = Heavy()
        loaded.append(weakref.ref(model))
        if len(loaded) == 2:
            raise InputError("half of it")
        return Loaded(reader, model, 1)

    async def steps(client):
        def ask():
            return asyncio.ensure_future(client.post("/recommend", json={"history": ["1"]}))

        async def alive(*expected):
            await until(lambda: tuple(model() is not None for model in loaded) == expected)

        await alive(True)
        failed = await client.post("/reload", headers=key)
        await alive(True, False)
        first = loaded[0]()
        first.fails = True
        broken = await ask()
        await until(lambda: first.kept() is None)
        first.fails = False
        first.gate.clear()
        asked = ask()
        await until(lambda: app.state.worker.waiting == 0 and len(first.batches) == 1)
        gate, first = first.gate, None
        reloading = asyncio.ensure_future(client.post("/reload", headers=key))
        await until(lambda: app.state.worker.waiting == 1)
        late = ask()
        await until(lambda: app.state.worker.waiting == 2)
        gate.set()
        done = [(await answer).status_code for answer in (asked, reloading, late)]
        await alive(False, False, True)
        return failed.status_code, broken.status_code, done

    monkeypatch.setattr(worker.log, "exception", lambda *_: None)  # pytest keeps what is logged, with its frames
    key = {"Authorization": "Bearer one"}
    app = make_app(load, 6, keys=["one"])
    app.dependency_overrides[check_key] = lambda: None
    gc.collect()
    gc.disable()
    try:
        assert with_client(app, steps) == (422, 500, [200, 200, 200])
    finally:
        gc.enable()
