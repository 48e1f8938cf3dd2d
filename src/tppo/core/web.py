"""What every local page of tppo shares: security headers, bounded bodies, host names, the socket, one-file pages."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tppo.core.common import UserError

MAX_BODY_BYTES = 1_000_000
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
    """Add what keeps other web pages and oversized requests away from `app`.

    Args:
        allowed_hosts: values of the Host header to answer; on loopback this keeps foreign web pages from
            reaching the server through a name they control.
    """

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        response = _refuse_body(request) or await call_next(request)
        response.headers.update(SECURITY_HEADERS)
        return response

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False)


def _refuse_body(request: Request) -> Response | None:
    """413 for a body that is too large, 411 for one that does not say how large it is."""
    if request.method in ("GET", "HEAD"):
        return None
    length = request.headers.get("content-length")
    if length is None or not length.isdigit():
        return JSONResponse({"detail": "give a Content-Length"}, status_code=411)
    if int(length) > MAX_BODY_BYTES:
        return JSONResponse({"detail": f"the body is larger than {MAX_BODY_BYTES} bytes"}, status_code=413)
    return None


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


def run_server(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted. Requests are not logged: their text is somebody's searches."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)).run(
        sockets=[listener]
    )
