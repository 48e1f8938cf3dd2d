"""What every server of tppo shares: bounds of time and size, security headers, host names, the socket, one-file pages.

Nothing that a client sent is ever logged or repeated, errors included: a refusal names the field, an error in our code
its type and place.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import traceback
from asyncio import TimerHandle, Transport
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tppo.core.common import UserError

MAX_BODY_BYTES = 1_000_000
HEAD_SECONDS = 10.0
"""Within which a connection has to bring the head of a request, or is closed."""
BODY_SECONDS = 10.0
"""Within which a request has to bring its body."""
SHUTDOWN_SECONDS = 10
"""Requests under way may take so long to finish when the server is told to stop."""
_SHOWN_KEY_CHARS = 100


def _encodable(text: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("half of a surrogate pair is no text")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
"""A string in a request: JSON can spell halves of surrogate pairs, which no reply, file or tokenizer can take."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")
# `unsafe-inline`: a page is one file with its script and style inside; nothing from outside is allowed.
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def secure(app: FastAPI, allowed_hosts: Sequence[str]) -> None:
    """Add what keeps other web pages, oversized, late and malformed requests away from `app`, and what they hold out of
    its logs and replies.

    Args:
        allowed_hosts: values of the Host header to answer; on loopback this keeps foreign web pages from
            reaching the server through a name they control.
    """
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)
    app.add_middleware(_Guard)  # last, so outermost


async def _explain(request: Request, error: Exception) -> JSONResponse:
    """422 that names the field and the rule, and repeats nothing of the input (which may be no JSON either: NaN)."""
    assert isinstance(error, RequestValidationError)
    details = [
        {"type": found["type"], "loc": [_shown(part) for part in found["loc"]], "msg": found["msg"]}
        for found in error.errors()
    ]
    return JSONResponse({"detail": details}, HTTPStatus.UNPROCESSABLE_ENTITY)


def _shown(part: str | int) -> str | int:
    """A key of the client's as text that can be sent: no lone surrogates, not without end."""
    return part.encode("ascii", "backslashreplace").decode()[:_SHOWN_KEY_CHARS] if isinstance(part, str) else part


class _Guard:
    """Outermost layer of an application: reads the body within bounds, adds the headers to every reply, and turns
    whatever goes wrong inside into a 500 and a line that says where."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_secured(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refusal = _refuse(scope)
        body: bytes | None = b""
        if refusal is None:
            try:
                body = await asyncio.wait_for(_read_body(receive), BODY_SECONDS)
            except TimeoutError:
                refusal = _refused(HTTPStatus.REQUEST_TIMEOUT, f"the body did not come within {BODY_SECONDS:g} seconds")
        if refusal is not None:
            await refusal(scope, receive, send_secured)
            return
        if body is None:
            return  # the client has left
        try:
            await self.app(scope, _replay(body, receive), send_secured)
        except Exception as error:
            place = " < ".join(
                f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[:-6:-1]
            )
            logging.getLogger("tppo.web").error("%s at %s", type(error).__name__, place)
            if started:
                raise RuntimeError("a reply broke off") from None
            failed = JSONResponse({"detail": "an error in the server"}, HTTPStatus.INTERNAL_SERVER_ERROR)
            await failed(scope, receive, send_secured)


def _refuse(scope: Scope) -> JSONResponse | None:
    """413 for a body that is too large, 411 for one that does not say how large it is, whatever the method."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        # Also beside a length: whoever stands before this server may have gone by the other of the two.
        return _refused(HTTPStatus.LENGTH_REQUIRED, "give a Content-Length, and no Transfer-Encoding")
    length = headers.get("content-length")
    if length is None:
        needs_body = scope["method"] in ("POST", "PUT", "PATCH")
        return _refused(HTTPStatus.LENGTH_REQUIRED, "give a Content-Length") if needs_body else None
    if not (length.isascii() and length.isdigit()):
        return _refused(HTTPStatus.LENGTH_REQUIRED, "give a Content-Length")
    if int(length) > MAX_BODY_BYTES:
        return _refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return None


def _refused(status: HTTPStatus, detail: str) -> JSONResponse:
    """A refusal before the body is read: what follows on the connection is no request."""
    return JSONResponse({"detail": detail}, status, headers={"Connection": "close"})


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None when the client leaves before its end. Its length has been checked."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body, already read, in front."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def render_page(template: Path, facts: dict[str, Any]) -> str:
    """The page with the shared style and script put inside, and `facts` as the script's constant FACTS."""
    shared = Path(__file__).parent
    page = template.read_text(encoding="utf-8")
    page = page.replace("/*STYLE*/", (shared / "page.css").read_text(encoding="utf-8"))
    page = page.replace("/*SCRIPT*/", (shared / "page.js").read_text(encoding="utf-8"))
    # Last, so that nothing in the facts is taken for a place to fill; "<" could end the script element.
    return page.replace("/*FACTS*/{}", json.dumps(facts).replace("<", "\\u003c"))


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int, section: str = "serve") -> socket.socket:
    """A bound socket; bound before the slow work, so that a busy port is told at once.

    Raises:
        UserError: the address cannot be had; names the settings of `section` to change.
    """
    way_out = "--serve.host or --serve.port" if section == "serve" else f"--{section}.port"
    if not 0 <= port <= 65535:  # getaddrinfo would silently take it modulo 65536
        raise UserError(f"cannot listen on {host} port {port} (ports go from 0 to 65535): give another {way_out}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}): give another {way_out}") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class _Protocol(H11Protocol):
    """A connection that has to bring the head of its request in time; uvicorn by itself waits for ever."""

    _late: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Part of a head is there and the rest is not."""
        in_head = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if in_head and self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not in_head:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def server_of(app: FastAPI) -> uvicorn.Server:
    """The server of an application. Requests are not logged: their text is somebody's searches."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )


def run_server(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted (SIGINT, SIGTERM)."""
    server_of(app).run(sockets=[listener])
