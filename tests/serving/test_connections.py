"""Connections of the server: slow clients, greedy clients, and its end."""

import contextlib
import http.client
import socket
import threading
import time
import urllib.request

import pytest
from served import on_a_socket

from minionerec.serving import checks, connections
from minionerec.serving.server import make_app
from minionerec.serving.worker import Loaded


@pytest.fixture
def listening(reader, model, monkeypatch):
    """A server of eight connections, whose clients have half a second, and which ends in a second."""
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "SHUTDOWN_SECONDS", 1)
    monkeypatch.setattr(checks, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(connections, "most_connections", lambda: 8)
    with on_a_socket(make_app(lambda: Loaded(reader, model, 4), 6), monkeypatch) as running:
        yield running


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


def test_an_offer_of_http_2_is_answered_without_a_warning(listening, caplog):
    """As Java's HttpClient makes it, on a connection that it keeps."""
    client = http.client.HTTPConnection("127.0.0.1", listening.port, timeout=20)
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
    for _ in range(2):
        client.request("POST", "/recommend", b'{"history": ["1"]}', offer)
        answer = client.getresponse()
        assert answer.status == 200 and answer.read()
    client.close()
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_a_body_that_is_no_http_is_no_traceback(listening, caplog):
    """Neither before the answer, together with the head or later, nor after it."""
    head, bad = b"/recommend HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n", b"no chunk\r\n"
    client = connected(listening.port, b"POST " + head + b"Content-Type: text/plain\r\n\r\n")
    assert client.recv(12) == b"HTTP/1.1 415"
    client.sendall(bad)
    assert b"HTTP/1.1" not in client.makefile("rb").read()
    for parts in (
        [b"POST " + head + b"\r\n", bad],
        *([method + head + b"\r\n" + bad] for method in (b"GET ", b"HEAD ")),
    ):
        client = connected(listening.port, *parts)
        assert client.makefile("rb").read() == connections.NO_HTTP
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_too_much_is_told_so(listening, chunked):
    """Also one that reads the answer only when it has sent all; what it sends meanwhile is no next request."""
    connections.CLIENT_SECONDS = checks.BODY_SECONDS = 20  # the fixture sets them back
    client = http.client.HTTPConnection("127.0.0.1", listening.port, timeout=20)
    parts = [b"z" * 500_000] * 8
    client.request("POST", "/recommend", iter(parts) if chunked else b"".join(parts), encode_chunked=chunked)
    answer = client.getresponse()
    assert answer.status == 413 and b"more than 1,000,000 bytes" in answer.read()
    client.request("POST", "/recommend", b'{"history": ["1"]}')
    assert client.getresponse().status == 200
    client.close()
