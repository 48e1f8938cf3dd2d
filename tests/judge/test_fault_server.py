from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import socket
import subprocess
import sys
import time
from email.utils import parsedate_to_datetime

import httpx
import pytest

from tests.helpers.fault_server import FAULTS, FaultServer, Settings, TokenBucket, read_log, running, spawned, truth

MESSAGE = {
    "history": [{"kind": "search", "text": "tomato seeds"}, {"kind": "click", "text": "Saatgut für Tomaten"}],
    "next_queries": ["raised bed"],
    "returned_queries": ["seed seed", "bed"],
    "words": [{"i": 0, "word": "seed"}, {"i": 1, "word": "seed"}, {"i": 2, "word": "bed"}],
}


def body(message: dict | None = None, **extra: object) -> dict:
    """`extra` joins the user message, so that it is another one."""
    content = json.dumps((message or MESSAGE) | extra, ensure_ascii=False)
    return {"model": "truth", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": content}]}


def ask(server: FaultServer, request: dict | None = None, timeout: float = 5.0) -> httpx.Response:
    return httpx.post(f"http://127.0.0.1:{server.port}/v1/chat/completions", json=request or body(), timeout=timeout)


def only(fault: str, **settings: object) -> Settings:
    return Settings(fault_rate=1.0, faults=fault, **settings)  # type: ignore[arg-type]


def variants(**change: object) -> tuple[str, int]:
    reply = truth(MESSAGE | change)
    return "".join(str(word["score"]) for word in reply["words"]), reply["sentence"]


def test_truth_depends_on_all_that_is_shown():
    """One bit can agree by chance, so every change is made in 64 ways: some must differ."""
    before = variants()
    changes = {
        "history": lambda i: [*MESSAGE["history"], {"kind": "search", "text": str(i)}],
        "next_queries": lambda i: [str(i)],
        "returned_queries": lambda i: [str(i)],
        "words": lambda i: [{"i": 0, "word": str(i)}, *MESSAGE["words"][1:]],
    }
    for key, change in changes.items():
        after = {variants(**{key: change(i)}) for i in range(64)}
        assert {words for words, _ in after} != {before[0]}, key
        assert {sentence for _, sentence in after} == ({before[1]} if key == "words" else {0, 1}), key
    assert truth({k: v for k, v in MESSAGE.items() if k != "words"}) == {"sentence": before[1]}
    # A repeated word has a bit of its own at each place.
    many = truth(MESSAGE | {"words": [{"i": i, "word": "seed"} for i in range(64)]})["words"]
    assert {word["score"] for word in many} == {0, 1}


def test_answers_the_truth_and_logs_it(tmp_path):
    log = tmp_path / "log.jsonl"
    with running(Settings(log=str(log), bodies=str(tmp_path / "bodies"), latency=0.05)) as server:
        start = time.monotonic()
        response = ask(server)
        seconds = time.monotonic() - start
        line = json.loads(log.read_text())  # while the server runs: nothing is held back
    choice = response.json()["choices"][0]
    assert json.loads(choice["message"]["content"]) == truth(MESSAGE)
    assert (choice["finish_reason"], choice["message"]["role"]) == ("stop", "assistant")
    assert response.json()["usage"]["total_tokens"] > 0
    content = body()["messages"][1]["content"]
    assert line["sha256"] == hashlib.sha256(content.encode()).hexdigest()
    assert (line["decision"], line["complete"], line["attempt"], line["client_gone"]) == ("ok", True, 1, False)
    assert start <= line["arrived"] <= line["ended"] - 0.05 <= start + seconds
    assert json.loads((tmp_path / "bodies").read_text()) == body()


def test_openai_client_reads_the_answer():
    openai = pytest.importorskip("openai")
    with running(Settings()) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(**body())
        assert json.loads(answer.choices[0].message.content) == truth(MESSAGE)
        assert [model.id for model in client.models.list()] == ["truth"]


def test_requests_it_does_not_understand_are_refused_and_do_no_harm():
    with running(Settings()) as server:
        assert ask(server, {"model": "m"}).status_code == 400
        assert ask(server, body({"history": []})).status_code == 400
        assert httpx.get(f"http://127.0.0.1:{server.port}/other").status_code == 404
        assert ask(server).status_code == 200
        stats = httpx.get(f"http://127.0.0.1:{server.port}/stats").json()
    assert stats["decisions"] == {"bad_request": 2, "ok": 1}
    assert (stats["in_flight"], stats["max_in_flight"]) == (0, 1)


@pytest.mark.parametrize("status", ["429", "500", "503"])
def test_statuses(status):
    with running(only(status)) as server:
        response = ask(server)
    assert response.status_code == int(status)
    assert "retry-after" not in response.headers
    assert response.json()["error"]["message"] == "injected fault"


def test_retry_after_comes_in_seconds_and_as_a_date():
    with running(only("429_retry_after")) as server:
        answers = [ask(server, body(n=n)) for n in range(20)]
        now = time.time()
    assert {answer.status_code for answer in answers} == {429}
    values = [answer.headers["retry-after"] for answer in answers]
    dates = [value for value in values if not value.isdigit()]
    assert 0 < len(dates) < 20
    assert {value for value in values if value.isdigit()} == {"1", "2"}
    assert all(-5 < parsedate_to_datetime(value).timestamp() - now <= 2 for value in dates)


def test_hang_ends_with_the_client(tmp_path):
    with running(only("hang", log=str(tmp_path / "log"))) as server:
        with pytest.raises(httpx.ReadTimeout):
            ask(server, timeout=0.3)
        deadline = time.monotonic() + 10
        while server.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
    [request] = read_log(tmp_path / "log")
    assert (request.decision, request.complete, request.client_gone) == ("hang", False, True)
    assert request.ended - request.arrived >= 0.29


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("reset_before", httpx.ReadError),
        ("reset_body", httpx.ReadError),
        ("half_body", httpx.RemoteProtocolError),
    ],
)
def test_broken_connections_as_httpx_sees_them(tmp_path, fault, error):
    with running(only(fault, log=str(tmp_path / "log"))) as server, pytest.raises(error):
        ask(server)
    [request] = read_log(tmp_path / "log")
    assert (request.decision, request.complete, request.client_gone) == (fault, False, False)


@pytest.mark.parametrize("fault", ["reset_before", "reset_body", "half_body"])
def test_broken_connections_on_the_wire(fault):
    content = json.dumps(body()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    received, reset = b"", False
    with running(only(fault)) as server, socket.create_connection(("127.0.0.1", server.port), 5) as client:
        client.sendall(head + content)
        try:
            while block := client.recv(1 << 16):
                received += block
        except ConnectionResetError:
            reset = True
    assert reset == (fault != "half_body")
    if fault == "reset_before":
        assert received == b""
    else:
        answer_head, _, answer_body = received.partition(b"\r\n\r\n")
        assert answer_head.startswith(b"HTTP/1.1 200 OK")
        length = int(answer_head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert len(answer_body) == length // 2


def test_truncated_is_a_whole_answer_with_cut_content(tmp_path):
    whole = json.dumps(truth(MESSAGE), ensure_ascii=False)
    with running(only("truncated", log=str(tmp_path / "log"))) as server:
        for n in range(8):
            choice = ask(server, body(n=n)).json()["choices"][0]
            content = choice["message"]["content"]
            assert whole.startswith(content)
            assert len(content) < len(whole)
            assert choice["finish_reason"] == "length"
    assert {(r.decision, r.complete) for r in read_log(tmp_path / "log")} == {("truncated", True)}


def test_faults_are_seeded_and_have_the_rate_asked_for_with_equal_shares():
    def decisions(seed: int, rate: float = 0.3) -> list[str]:
        server = FaultServer(Settings(fault_rate=rate, seed=seed))
        return [server.draw(hashlib.sha256(str(n).encode()).hexdigest(), 1 + n % 3)[0] for n in range(9000)]

    first = decisions(0)
    assert first == decisions(0)
    assert first != decisions(1)
    shares = {fault: first.count(fault) / len(first) for fault in FAULTS}
    assert sum(shares.values()) == pytest.approx(0.3, abs=0.02)
    assert all(share == pytest.approx(0.3 / len(FAULTS), abs=0.008) for share in shares.values())
    assert set(decisions(0, rate=0.0)) == {"ok"}
    assert set(decisions(0, rate=1.0)) == set(FAULTS)


def test_a_fault_is_drawn_anew_for_each_attempt():
    with running(Settings(fault_rate=0.5, faults="500")) as server:
        statuses = [ask(server).status_code for _ in range(20)]
    assert set(statuses) == {200, 500}


def test_token_bucket():
    bucket = TokenBucket(rate=10, capacity=2)
    assert [bucket.wait(0.0), bucket.wait(0.0)] == [0.0, 0.0]
    assert bucket.wait(0.05) == pytest.approx(0.05)
    assert bucket.wait(0.1) == 0.0
    assert [bucket.wait(100.0), bucket.wait(100.0)] == [0.0, 0.0]  # idle time fills it to its capacity only
    assert bucket.wait(100.0) > 0
    assert {TokenBucket(0, 1).wait(0.0) for _ in range(9)} == {0.0}


def test_rate_limit_turns_away_with_retry_after(tmp_path):
    with running(Settings(rate_limit=1, burst=2, log=str(tmp_path / "log"))) as server:
        answers = [ask(server) for _ in range(4)]
    assert answers[0].status_code == answers[1].status_code == 200
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    log = read_log(tmp_path / "log")
    assert [r.attempt for r in log if r.decision == "rate_limited"] == [0] * len(refused)


def test_connections_above_the_limit_are_reset():
    with running(Settings(max_connections=1)) as server, httpx.Client() as first:
        url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        assert first.post(url, json=body()).status_code == 200  # keeps its connection
        with pytest.raises(httpx.TransportError):
            ask(server)
        assert first.post(url, json=body()).status_code == 200
        assert server.refused_connections == 1


def test_requests_are_answered_side_by_side():
    async def many(port: int) -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            answers = await asyncio.gather(*(client.post(url, json=body(n=n)) for n in range(20)))
        return [answer.status_code for answer in answers]

    with running(Settings(latency=1.0)) as server:
        assert asyncio.run(many(server.port)) == [200] * 20
        assert server.max_in_flight > 5


def test_uniform_latency_is_seeded():
    server = FaultServer(Settings(latency=0.1, latency_max=0.5))
    latencies = [server.latency(hashlib.sha256(bytes([n])).digest()) for n in range(200)]
    assert 0.1 <= min(latencies) < 0.15
    assert 0.45 < max(latencies) <= 0.5


def test_own_process_survives_the_clients_death(tmp_path):
    """A client killed with an answer under way: the server logs it as gone and serves the next one."""
    log = tmp_path / "log"
    client = (
        "import httpx, sys; httpx.post(sys.argv[1], content=sys.stdin.buffer.read(), "
        "headers={'content-type': 'application/json'}, timeout=60)"
    )
    with spawned(Settings(latency=1.5, log=str(log))) as port:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        process = subprocess.Popen([sys.executable, "-c", client, url], stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(json.dumps(body()).encode())
        process.stdin.close()
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/stats").json()["in_flight"] == 1)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        wait_for(lambda: len(read_log(log)) == 1)
        assert httpx.post(url, json=body(), timeout=30).status_code == 200
    gone, served = read_log(log)
    assert (gone.client_gone, gone.complete) == (True, False)
    assert (served.client_gone, served.complete) == (False, True)
    assert (gone.attempt, served.attempt) == (1, 2)


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
