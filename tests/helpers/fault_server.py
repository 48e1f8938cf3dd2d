"""An OpenAI-compatible server that knows the right verdicts and misbehaves at a given rate.

    python -m tests.helpers.fault_server --port 0 --fault-rate 0.3 --rate-limit 200 --latency 0.02 --log requests.jsonl

The first line printed is the port. It answers POST /v1/chat/completions and GET /v1/models, and GET /stats with
its own counts (not limited, not logged, without faults). The verdict is `truth` of the user message.

Order of decisions for a request: not understood (400), above the rate limit (429 with Retry-After), a fault of
`FAULTS` with probability `fault_rate`, else the verdict. A fault depends on the seed, the user message and how
often that message was admitted before, so it is the same whatever the order of arrival.

Log: one JSON object a line, written with one system call when the request ends (see `Request`). Times are
`time.monotonic()`, which all processes of a machine share. Raw asyncio protocols instead of a framework: half a
body and resets are impossible to send through one, and the cost per request stays small.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from email.utils import formatdate
from pathlib import Path
from typing import Any

from tests.helpers.child import end_with_parent

FAULTS = (
    "429_retry_after",
    "429",
    "503",
    "500",
    "hang",
    "reset_before",  # connection reset before any byte of the answer
    "reset_body",  # connection reset (RST) in the middle of the body
    "half_body",  # half the body announced by Content-Length, then an orderly end (FIN)
    "truncated",  # a whole HTTP answer whose content is cut, finish_reason "length"
)
OTHER_SHARE = 0.2
REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Settings:
    """What the server does; every field is a command line option. 0 turns a limit off."""

    port: int = 0
    fault_rate: float = 0.0  # share of admitted requests that meet a fault
    rate_limit: float = 0.0  # admitted requests a second
    burst: float = 0.0  # capacity of the token bucket in requests; 0: a quarter of a second's
    latency: float = 0.0  # seconds before an answer (not before a 429)
    latency_max: float = 0.0  # when larger: latencies are uniform between the two, seeded
    seed: int = 0
    log: str = ""  # file of the request log, appended to
    bodies: str = ""  # file that gets every request body that is understood, one a line
    max_connections: int = 0  # a connection above this number is reset at once
    logprobs: bool = True  # gives token log probabilities to who asks for them
    faults: str = ",".join(FAULTS)  # the faults that occur, each with an equal share


def truth(user_message: dict[str, Any]) -> dict[str, Any]:
    """The right reply: bits of a hash of everything the judge is shown, so any mix-up of items shows.

    The sentence bit is the same with and without `words` (token and sentence template). Of a pair, the response with
    the smaller hash wins in either order, but one pair in four or so gets the answer "a" whatever the order.
    """
    if "returned_queries_a" in user_message:
        a, b = (hashlib.sha256(json.dumps(user_message[f"returned_queries_{side}"]).encode()).digest() for side in "ab")
        biased = (a[0] + b[0]) % 4 == 0
        return {"winner": "a" if biased or a < b else "b"}
    context = [user_message["history"], user_message.get("next_queries"), user_message["returned_queries"]]
    digest = hashlib.sha256(json.dumps(context, sort_keys=True).encode())
    reply: dict[str, Any] = {}
    if "words" in user_message:
        reply["words"] = [
            {"i": word["i"], "word": word["word"], "score": _bit(digest, f"{word['i']}:{word['word']}")}
            for word in user_message["words"]
        ]
    reply["sentence"] = _bit(digest, "sentence")
    return reply


def _bit(digest: Any, text: str) -> int:
    copy = digest.copy()
    copy.update(text.encode("utf-8", "surrogatepass"))
    return copy.digest()[0] & 1


@dataclass
class Request:
    """A line of the log. `decision` is "ok", "rate_limited", "bad_request" or one of FAULTS."""

    n: int
    arrived: float
    sha256: str  # of the user message; empty when the request was not understood
    attempt: int  # how often this message had been admitted, this time included; 0 for a request turned away
    decision: str
    complete: bool = False  # the whole HTTP answer was handed to the kernel while the client was there
    client_gone: bool = False  # the client closed first
    ended: float = 0.0


class TokenBucket:
    """Admits `rate` requests a second on average and `capacity` at once; rate 0 admits all."""

    def __init__(self, rate: float, capacity: float) -> None:
        self.rate, self.capacity = rate, capacity
        self.tokens, self.updated = capacity, -math.inf

    def wait(self, now: float) -> float:
        """0 and a token is taken, or the seconds until there will be one."""
        if not self.rate:
            return 0.0
        self.tokens = min(self.capacity, self.tokens + (now - self.updated) * self.rate)
        self.updated = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.rate


def http_answer(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS[status]}", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def error_answer(status: int, message: str, *headers: str) -> bytes:
    body = {"error": {"message": message, "type": REASONS[status].lower().replace(" ", "_"), "code": status}}
    return http_answer(status, json.dumps(body).encode(), *headers)


def log_probabilities(content: str) -> dict[str, Any]:
    """Token log probabilities of a reply: a token is a verdict (a digit with the blank before it, the winner of a
    pair), or what stands between two.

    The other digit, or the other response of a pair, has `OTHER_SHARE` of the probability, and ten other tokens share
    what is left.
    """
    tokens = []
    verdict = r' ?[01](?![0-9])|(?<="winner": ")[ab]'
    for token in re.findall(f"{verdict}|(?:(?!{verdict}).)+", content, re.DOTALL):
        others = {f"<{number}>": 0.01 for number in range(10)}
        if token.strip() in ("0", "1"):
            others[token.replace("0", "2").replace("1", "0").replace("2", "1")] = OTHER_SHARE
        if token in ("a", "b"):
            others[{"a": "b", "b": "a"}[token]] = OTHER_SHARE
        listed = {token: 1 - sum(others.values()), **others}
        top = [{"token": text, "logprob": math.log(share), "bytes": None} for text, share in listed.items()]
        tokens.append({**top[0], "top_logprobs": top})
    return {"content": tokens, "refusal": None}


def completion(
    n: int, model: str, prompt_chars: int, content: str, finish_reason: str = "stop", logprobs: bool = False
) -> bytes:
    """Body of a chat completion. Usage is in made-up tokens of four characters."""
    usage = {"prompt_tokens": prompt_chars // 4, "completion_tokens": len(content) // 4}
    return json.dumps(
        {
            "id": f"chatcmpl-{n}",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content},
                    "finish_reason": finish_reason,
                    "logprobs": log_probabilities(content) if logprobs else None,
                }
            ],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
    ).encode()


class FaultServer:
    """State shared by the connections; `start` and `stop` run in an event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.faults = [fault for fault in settings.faults.split(",") if fault]
        if unknown := set(self.faults) - set(FAULTS):
            raise ValueError(f"unknown faults {sorted(unknown)}: choose from {FAULTS}")
        self.bucket = TokenBucket(settings.rate_limit, max(1.0, settings.burst or settings.rate_limit / 4))
        self.admitted: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        self.requests = self.in_flight = self.max_in_flight = self.refused_connections = 0
        self.connections: set[Connection] = set()
        self.files = {name: _append(getattr(settings, name)) for name in ("log", "bodies")}
        self.port = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self.settings.port, backlog=4096)
        self.port = self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # connection_lost of each is called, and logged, in this turn of the loop
        for file in self.files.values():
            if file is not None:
                os.close(file)

    def write(self, name: str, line: bytes) -> None:
        """Append a line with one system call: a reader never sees half of it, nobody's death loses it."""
        file = self.files[name]
        if file is not None:
            os.write(file, line + b"\n")

    def draw(self, sha256: str, attempt: int) -> tuple[str, bytes]:
        """Decision for an admitted request, and random bytes for its details."""
        digest = hashlib.sha256(f"{self.settings.seed}:{attempt}:{sha256}".encode()).digest()
        point = int.from_bytes(digest[:7]) / (1 << 56)
        if not self.faults or point >= self.settings.fault_rate:
            return "ok", digest[8:]
        return self.faults[int(point / self.settings.fault_rate * len(self.faults))], digest[8:]

    def latency(self, random: bytes) -> float:
        low, high = self.settings.latency, max(self.settings.latency, self.settings.latency_max)
        return low + (high - low) * int.from_bytes(random[:4]) / (1 << 32)

    def stats(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "connections": len(self.connections),
            "refused_connections": self.refused_connections,
            "decisions": dict(self.decisions),
            "cpu_seconds": time.process_time(),
        }


class Connection(asyncio.Protocol):
    """One keep-alive connection: reads requests one after the other and answers each as decided."""

    transport: asyncio.Transport

    def __init__(self, server: FaultServer) -> None:
        self.server = server
        self.buffer = b""
        self.request: Request | None = None
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        limit = self.server.settings.max_connections
        if limit and len(self.server.connections) >= limit:
            self.server.refused_connections += 1
            self.reset()
            return
        self.server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.request is None:
            self.read()

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)
        if self.timer is not None:
            self.timer.cancel()
        if self.request is not None:
            self.request.client_gone = True
            self.end(complete=False)

    def read(self) -> None:
        """Take one whole request from the buffer, if there is one, and act on it."""
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        first, *lines = head.split(b"\r\n")
        length = 0
        for line in lines:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        method, path, _ = first.split(b" ", 2)
        if (method, path) == (b"POST", b"/v1/chat/completions"):
            self.complete_chat(body)
        elif path == b"/stats":
            self.transport.write(http_answer(200, json.dumps(self.server.stats()).encode()))
        elif path == b"/v1/models":
            self.transport.write(http_answer(200, b'{"object": "list", "data": [{"id": "truth", "object": "model"}]}'))
        else:
            self.transport.write(error_answer(404, f"no such path: {path.decode('latin-1')}"))

    def complete_chat(self, body: bytes) -> None:
        server, now = self.server, time.monotonic()
        server.requests += 1
        server.in_flight += 1
        server.max_in_flight = max(server.max_in_flight, server.in_flight)
        request = self.request = Request(server.requests, now, "", 0, "bad_request")
        try:
            call = json.loads(body)
            message = call["messages"][-1]["content"]
            reply = truth(json.loads(message))
        except (ValueError, LookupError, TypeError) as error:
            self.answer(error_answer(400, f"not a request of the judge: {error!r}"))
            return
        request.sha256 = hashlib.sha256(message.encode("utf-8", "surrogatepass")).hexdigest()
        server.write("bodies", body)
        wait = server.bucket.wait(now)
        if wait:
            request.decision = "rate_limited"
            self.answer(error_answer(429, "rate limit", f"Retry-After: {max(1, math.ceil(wait))}"))
            return
        server.admitted[request.sha256] += 1
        request.attempt = server.admitted[request.sha256]
        request.decision, random = server.draw(request.sha256, request.attempt)
        size = sum(len(m["content"]) for m in call["messages"])
        content = json.dumps(reply, ensure_ascii=False)
        logprobs = bool(call.get("logprobs")) and server.settings.logprobs
        act = self.fault(
            request, random, lambda text, why: completion(request.n, call["model"], size, text, why, logprobs)
        )
        delay = 0.0 if request.decision.startswith("429") else server.latency(random)
        if delay:
            self.timer = asyncio.get_running_loop().call_later(delay, act, content)
        else:
            act(content)

    def fault(self, request: Request, random: bytes, body: Callable[[str, str], bytes]) -> Callable[[str], None]:
        """What to do with the right content once the latency is over."""
        detail = random[4]
        match request.decision:
            case "ok":
                return lambda content: self.answer(http_answer(200, body(content, "stop")))
            case "429_retry_after":
                # Every third one as a date; dates have whole seconds, so one to two seconds from now.
                value = formatdate(time.time() + 2, usegmt=True) if detail % 3 == 0 else str(1 + detail % 2)
                return lambda content: self.answer(error_answer(429, "slow down", f"Retry-After: {value}"))
            case "429" | "500" | "503":
                status = int(request.decision)
                return lambda content: self.answer(error_answer(status, "injected fault"))
            case "hang":
                return lambda content: None  # ends when the client gives up
            case "reset_before":
                return lambda content: self.break_off(b"", self.reset)
            case "truncated":
                return lambda content: self.answer(
                    http_answer(200, body(content[: detail * len(content) // 256], "length"))
                )
            case "reset_body" | "half_body":
                close = self.reset if request.decision == "reset_body" else self.transport.close
                return lambda content: self.break_off(http_answer(200, body(content, "stop")), close)
        raise AssertionError(request.decision)

    def answer(self, answer: bytes) -> None:
        self.timer = None
        self.transport.write(answer)
        self.end(complete=not self.transport.is_closing() and not self.transport.get_write_buffer_size())
        if self.buffer:
            self.read()

    def break_off(self, answer: bytes, close: Callable[[], None]) -> None:
        """Send the head and half the body of an answer, then end the connection with `close`."""
        head, blank, body = answer.partition(b"\r\n\r\n")
        self.transport.write(head + blank + body[: len(body) // 2])
        self.end(complete=False)
        close()

    def reset(self) -> None:
        """End the connection with a TCP reset: what lingering for 0 seconds means."""
        peer = self.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def end(self, complete: bool) -> None:
        request, self.request = self.request, None
        assert request is not None
        request.complete, request.ended = complete, time.monotonic()
        self.server.in_flight -= 1
        self.server.decisions[request.decision] += 1
        self.server.write("log", json.dumps(request.__dict__).encode())


def _append(path: str) -> int | None:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path else None


def read_log(path: Path) -> list[Request]:
    """The log so far, in order of the requests' ends."""
    return [Request(**json.loads(line)) for line in path.read_bytes().splitlines()] if path.exists() else []


@contextmanager
def running(settings: Settings) -> Iterator[FaultServer]:
    """The server in a thread of this process: for tests."""
    server, loop = FaultServer(settings), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


@contextmanager
def spawned(settings: Settings) -> Iterator[int]:
    """The server in a process of its own: for measurements and for clients that are killed. Yields the port."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    command = [sys.executable, "-m", "tests.helpers.fault_server", *options]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=30)


async def serve(settings: Settings) -> None:
    server, stopped = FaultServer(settings), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await server.start()
    print(server.port, flush=True)
    await stopped.wait()
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    asyncio.run(serve(Settings(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
