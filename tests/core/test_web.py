"""What every server of tppo shares, by bytes on a real socket: bounds of time and size, nobody's text in logs."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from tppo.core import web
from tppo.core.web import SECURITY_HEADERS, Text, secure

SECRET = "a very private matter"


class Item(BaseModel, extra="forbid"):
    text: Text
    count: int = 0


def make_app() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)

    @app.post("/items")
    def items(item: Item) -> dict[str, str]:
        if item.count == 13:
            raise KeyError(item.text)  # a message that holds the client's text
        return {"text": item.text}

    secure(app, ["*"])
    return app


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app(), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def address(running: Any) -> Iterator[tuple[str, int]]:
    with running(make_app()) as url:
        parts = urlsplit(url)
        yield parts.hostname, parts.port


def talk(address: tuple[str, int], sent: bytes, seconds: float = 5) -> tuple[bytes, bool]:
    """What comes back for `sent` until the server closes or the time is over, and whether it closed."""
    with socket.create_connection(address, timeout=seconds) as peer:
        peer.sendall(sent)
        found = b""
        try:
            while part := peer.recv(65536):
                found += part
        except TimeoutError:
            return found, False
        return found, True


@pytest.mark.parametrize(
    "body",
    [
        '{"text": "SECRET", "count": NaN}',
        '{"text": "SECRET", "count": 1e400}',
        '{"text": "SECRET", "count": -Infinity}',
        '{"text": {"SECRET": NaN}}',
        '{"text": "SECRET \\ud800"}',
        '{"text": "x", "SECRET": 1}',
        '{"text": "x", "SECRET \\ud800": NaN}',
        '{"text": "x", "' + "SECRET" * 5000 + '": NaN}',
        '{"text": "SECRET"',
        "[" * 100_000,
        '{"count": ' + "1" * 5000 + ', "text": "SECRET"}',
        "NaN",
        '"SECRET"',
        "\xff\xfe",
        "",
    ],
)
def test_odd_json_is_a_client_error_that_repeats_no_value(
    client: TestClient, caplog: pytest.LogCaptureFixture, capfd: Any, body: str
):
    sent = body.replace("SECRET", SECRET).encode("latin-1")
    with caplog.at_level(logging.DEBUG):
        reply = client.post("/items", content=sent, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 422)
    assert reply.headers.items() >= {name.lower(): value for name, value in SECURITY_HEADERS.items()}.items()
    values = [detail for detail in reply.json()["detail"] if "input" in detail or "ctx" in detail]
    assert values == []
    assert len(reply.content) < 2000
    assert SECRET not in caplog.text + "".join(capfd.readouterr())


def test_an_error_of_ours_is_a_500_without_anybodys_text(client: TestClient, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        reply = client.post("/items", json={"text": SECRET, "count": 13})
    assert reply.status_code == 500
    assert reply.json() == {"detail": "an error in the server"}
    assert reply.headers["x-frame-options"] == "DENY"
    assert "KeyError at items" in caplog.text
    assert SECRET not in caplog.text


HEAD = b"POST /items HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 411),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", 411),
        (b"Transfer-Encoding: chunked\r\n", 411),
        (b"", 411),
        (b"Content-Length: 2000000\r\n", 413),
    ],
)
def test_a_body_of_unclear_or_too_large_size_gets_one_reply_and_no_second_request(
    address: tuple[str, int], headers: bytes, status: int
):
    """What follows is not taken for a request (request smuggling)."""
    reply, closed = talk(
        address, HEAD + headers + b"\r\n" + b"5\r\nhello\r\n0\r\n\r\n" + b"GET /items HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    assert reply.startswith(f"HTTP/1.1 {status} ".encode())
    assert reply.count(b"HTTP/1.1 ") == 1
    assert closed
    assert b"x-frame-options: DENY" in reply


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: -5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
    ],
)
def test_a_length_that_is_none_is_refused(address: tuple[str, int], headers: bytes):
    reply, closed = talk(address, HEAD + headers + b"\r\nhello")
    assert reply.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 411 "))
    assert closed


def test_late_heads_and_bodies_are_given_up(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(web, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(web, "BODY_SECONDS", 0.3)
    assert talk(address, b"") == (b"", True)
    assert talk(address, HEAD[:20]) == (b"", True)
    reply, closed = talk(address, HEAD + b"Content-Length: 50\r\n\r\n{")
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert closed
    # The head of a second request on a connection kept alive.
    whole = HEAD + b"Content-Length: 13\r\n\r\n" + b'{"text": "x"}'
    reply, closed = talk(address, whole + b"POST /items HT")
    assert reply.startswith(b"HTTP/1.1 200 ")
    assert reply.count(b"HTTP/1.1 ") == 1
    assert closed


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_half_sent_body_does_not_keep_the_server_from_stopping(tmp_path: Path):
    script = tmp_path / "server.py"
    script.write_text(
        "from tests.core.test_web import make_app\n"
        "from tppo.core import web\n"
        "web.SHUTDOWN_SECONDS = 1\n"
        "listener = web.listen('127.0.0.1', 0)\n"
        "print(listener.getsockname()[1], flush=True)\n"
        "web.run_server(make_app(), listener)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        address = ("127.0.0.1", int(server.stdout.readline()))
        try:
            while not talk_once(address):
                time.sleep(0.05)
            with socket.create_connection(address) as peer:
                peer.sendall(HEAD + b"Content-Length: 50\r\n\r\n{")
                time.sleep(0.3)
                server.send_signal(signal.SIGTERM)
                assert server.wait(timeout=8) is not None
        finally:
            server.kill()


def talk_once(address: tuple[str, int]) -> bool:
    """Whether the server listens by now."""
    try:
        return bool(talk(address, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[0])
    except ConnectionRefusedError:
        return False


def test_a_kept_connection_answers_again(address: tuple[str, int]):
    whole = HEAD + b"Content-Length: 13\r\n\r\n" + b'{"text": "x"}'
    reply, _ = talk(address, whole + whole.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n"))
    assert reply.count(b"HTTP/1.1 200 ") == 2
    assert reply.count(json.dumps({"text": "x"}, separators=(",", ":")).encode()) == 2
