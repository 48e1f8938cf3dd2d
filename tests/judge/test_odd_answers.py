"""Servers that answer with something that is no chat completion, or nearly one: never a crash, never a verdict
out of nothing. What a server says is as little to be trusted as what a model says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tppo.core.common import UserError
from tppo.core.config import JudgeSettings as Settings
from tppo.core.text import Event
from tppo.judge import llm
from tppo.judge.llm import LLMJudge
from tppo.judge.verdict import JudgeItem

REPLY = '{"sentence": 1}'
USAGE = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}


def completion(content: Any = REPLY, **fields: Any) -> dict[str, Any]:
    return (
        with_choice({"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}})
        | fields
    )


def with_choice(choice: Any) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": USAGE}


def usage(**fields: Any) -> dict[str, Any]:
    return completion(usage=USAGE | fields)


# Name: (body, outcome). "ok" and "abstained": status of the verdict; "failed": UserError, with the request listed.
BODIES: dict[str, tuple[Any, str]] = {
    "right": (completion(), "ok"),
    "two choices": (completion() | {"choices": completion()["choices"] * 2}, "ok"),
    "no usage": ({k: v for k, v in completion().items() if k != "usage"}, "ok"),
    "usage null": (completion(usage=None), "ok"),
    "usage empty": (completion(usage={}), "ok"),
    "usage of nulls": (usage(prompt_tokens=None, completion_tokens=None), "ok"),
    "usage a string": (completion(usage="5"), "ok"),
    "usage beyond 64 bits": (usage(prompt_tokens=10**30), "ok"),
    "content null": (completion(None), "abstained"),
    "content empty": (completion(""), "abstained"),
    "content with a lone surrogate": (completion("x\ud800"), "abstained"),
    "content a list": (completion([{"type": "text", "text": REPLY}]), "not ok"),
    "content a number": (completion(1), "not ok"),
    "content an object": (completion({"sentence": 1}), "not ok"),
    "no finish reason": (with_choice({"index": 0, "message": {"role": "assistant", "content": REPLY}}), "not ok"),
    "message null": (with_choice({"index": 0, "finish_reason": "stop", "message": None}), "not ok"),
    "message a string": (with_choice({"index": 0, "finish_reason": "stop", "message": REPLY}), "not ok"),
    "message missing": (with_choice({"index": 0, "finish_reason": "stop"}), "not ok"),
    "choice null": (with_choice(None), "not ok"),
    "choice a string": (with_choice(REPLY), "not ok"),
    "choices null": (completion(choices=None), "failed"),
    "choices empty": (completion(choices=[]), "failed"),
    "choices a string": (completion(choices="abc"), "not ok"),
    "an error with status 200": ({"error": {"message": "overloaded"}}, "failed"),
    "a list": ([], "failed"),
    "a string": (REPLY, "failed"),
    "null": (None, "failed"),
    "a page": (b"<html>502</html>", "failed"),
    "nothing": (b"", "failed"),
    "no UTF-8": (b'{"a": "\xff\xfe"}', "failed"),
    "deep nesting": (b"[" * 100_000, "failed"),
    "a number of 6,000 digits": (b'{"created": ' + b"9" * 6_000 + b"}", "failed"),
}
RETRY_AFTER = ["junk", "-5", "nan", "inf", "Mon, 99 Foo", "Fri, 31 Dec 9999 23:59:59 GMT", "1 0", "", "9" * 400]


class Answering(ThreadingHTTPServer):
    """A server with one answer for everybody."""

    status, headers, body = 200, {}, b""  # type: ignore[var-annotated]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Answering

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.server.status)
        headers = {"content-type": "application/json", "content-length": str(len(self.server.body))}
        for name, value in (headers | self.server.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "TRANSPORT_ATTEMPTS", 1)


@pytest.fixture
def server() -> Iterator[Answering]:
    server = Answering(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def outcome(server: Answering, tmp_path: Any) -> str:
    """What one question comes to with one attempt: the status of its verdict, or failed."""
    settings = Settings(
        base_url=f"http://127.0.0.1:{server.server_port}/v1",
        model="m",
        template="sentence",
        ledger=str(tmp_path / "ledger.sqlite"),
        reply_attempts=1,
        timeout=30,
    )
    try:
        [verdict] = LLMJudge(settings).judge([JudgeItem([Event("search", "a")], ["b"], "c d")], "targets")
    except UserError:
        return "failed"
    assert verdict.status == "abstained" or verdict.sentence_relevant
    return verdict.status


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server, tmp_path, name):
    body, expected = BODIES[name]
    server.body = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = outcome(server, tmp_path)
    assert found in ("abstained", "failed") if expected == "not ok" else found == expected


@pytest.mark.parametrize("value", RETRY_AFTER)
def test_retry_after_that_makes_no_sense(server, tmp_path, value):
    server.status, server.headers, server.body = 429, {"retry-after": value}, b'{"error": {"message": "busy"}}'
    assert outcome(server, tmp_path) == "failed"


@pytest.mark.parametrize("status", [302, 401, 418, 500, 529])
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"error": "x"}', b'{"error": [1]}', b"\xff", b"<html>"])
def test_error_bodies(server, tmp_path, status, body):
    server.status, server.headers, server.body = status, {"location": "http://127.0.0.1:1/"}, body
    assert outcome(server, tmp_path) == "failed"


def test_error_words_with_a_lone_surrogate(server, tmp_path):
    server.status, server.body = 500, b'{"error": {"message": "m\\ud800"}}'
    assert outcome(server, tmp_path) == "failed"
