"""Every request of the server: its number, its line in the log, the names of the server, and a plain 500."""

from served import with_client

from minionerec.serving import server as server_module
from minionerec.serving.server import make_app
from minionerec.serving.worker import Loaded


def test_an_endpoint_that_fails_answers_a_plain_500(reader, model, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server_module, "_health", fail)
    answer = with_client(make_app(lambda: Loaded(reader, model, 4), 6), lambda client: client.get("/ready"))
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


def test_a_server_answers_to_its_names(reader, model):
    names = ["localhost", "[::1]", "*.shop.example"]

    async def steps(client):
        hosts = ("localhost:8000", "[::1]:8000", "api.shop.example", "evil.example", "shop.example.evil")
        answers = [await client.get("/items?title=a", headers={"Host": host}) for host in hosts]
        return answers, (await client.get("/ready", headers={"Host": "10.0.0.7"})).status_code

    app = make_app(lambda: Loaded(reader, model, 4), 6, allowed_hosts=names)
    answers, ready = with_client(app, steps)
    assert ([answer.status_code for answer in answers], ready) == ([200, 200, 200, 400, 400], 200)
    assert answers[3].json() == {"detail": ["the Host header is no name of this server (--allowed_hosts)"]}
    assert "x-request-id" in answers[3].headers
