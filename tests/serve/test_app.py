"""The HTTP interface with tiny random policies behind it, and a real server."""

import json
import logging
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from tppo.core.common import UserError
from tppo.core.config import RL, Recipe, Serve, Task
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.web import SECURITY_HEADERS, is_loopback
from tppo.serve import app as app_module
from tppo.serve.app import create_app, serve

TASK = Task(num_queries=3, history_events=4, max_prompt_tokens=200, max_response_tokens=12)
HISTORY = [{"kind": "search", "text": "Tomato   SEEDS"}, {"kind": "click", "text": "garden shed"}]


@pytest.fixture(scope="module")
def models(tiny_policy: Path) -> dict[str, tuple[Any, Any]]:
    found = {}
    for seed, name in enumerate(("sft", "ppo", "tppo")):
        model, tokenizer = load_policy(tiny_policy)
        torch.manual_seed(seed)
        for weights in model.parameters():
            weights.data += 0.1 * seed * torch.randn_like(weights)
        found[name] = (model, tokenizer)
    return found


@pytest.fixture(scope="module")
def client(models: dict[str, tuple[Any, Any]]) -> Iterator[TestClient]:
    with TestClient(create_app(models, TASK, 0.0)) as client:
        yield client


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/suggest", json={"history": HISTORY, **body})


def test_all_models_answer_side_by_side(client: TestClient):
    answer = ask(client).json()["suggestions"]
    assert list(answer) == ["sft", "ppo", "tppo"]
    for name, found in answer.items():
        assert found["model"] == name
        assert found["milliseconds"] > 0
        assert found["problem"] in (None, "empty", "truncated", "too_many_queries")
        assert (found["events_used"], found["events_given"]) == (2, 2)


def test_one_model_answers_alone_and_alike(client: TestClient):
    together = ask(client).json()["suggestions"]["tppo"]
    alone = ask(client, model="tppo").json()
    assert alone["queries"] == together["queries"]  # greedy
    assert alone["model"] == "tppo"


def test_the_prompt_is_normalised_and_holds_the_newest_events(client: TestClient):
    plain = [{"kind": "search", "text": "tomato seeds"}, {"kind": "click", "text": "garden shed"}]
    assert ask(client, history=plain, model="sft").json()["queries"] == ask(client, model="sft").json()["queries"]
    long = [{"text": f"old {i}"} for i in range(6)] + plain + plain
    found = ask(client, history=long, model="sft").json()
    assert (found["events_used"], found["events_given"]) == (4, 10)
    assert found["queries"] == ask(client, history=plain + plain, model="sft").json()["queries"]


def test_num_cuts_the_list(client: TestClient):
    every = ask(client, model="ppo").json()["queries"]
    assert ask(client, model="ppo", num=1).json()["queries"] == every[:1]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"history": []}, "history"),
        ({}, "history"),
        ({"history": [{"text": "x"}] * 101}, "history"),
        ({"history": [{"text": "x" * 501}]}, "text"),
        ({"history": [{"text": ""}]}, "text"),
        ({"history": [{"text": " \u200b\n"}]}, "text"),
        ({"history": [{"kind": "stare", "text": "x"}]}, "kind"),
        ({"history": [{"text": "x", "user": "me"}]}, "user"),
        ({"history": "tomato"}, "history"),
        ({"history": [{"text": "x"}], "model": "gpt"}, "model"),
        ({"history": [{"text": "x"}], "num": 0}, "num"),
        ({"history": [{"text": "x"}], "num": 4}, "num"),
        ({"history": [{"text": "x"}], "temperature": 9}, "temperature"),
    ],
)
def test_bad_requests_are_refused_with_the_field(client: TestClient, body: dict[str, Any], where: str):
    reply = client.post("/v1/suggest", json=body)
    assert reply.status_code == 422
    assert any(where in detail["loc"] for detail in reply.json()["detail"])


@pytest.mark.parametrize(
    "body",
    [
        '{"history": {"text": "a very private matter", "foo": NaN}}',
        '{"history": [{"text": "x"}], "num": NaN}',
        '{"history": [{"text": "x"}], "num": 1e400}',
        '{"history": [{"text": "a \\ud800 b"}]}',
        '{"history": [{"text": "x"}], "model": "\\udfff"}',
        '{"history": [{"text": "x"}], "\\ud800": 1}',
    ],
)
def test_values_that_json_allows_are_refused_without_a_word_of_them(
    client: TestClient, caplog: pytest.LogCaptureFixture, body: str
):
    reply = client.post("/v1/suggest", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 422
    assert "private" not in reply.text + caplog.text


def test_health_has_a_head(client: TestClient):
    reply = client.head("/healthz")
    assert (reply.status_code, reply.content) == (200, b"")


def test_limits_are_inclusive(client: TestClient):
    assert ask(client, history=[{"text": "x" * 500}] * 100, model="sft").status_code == 200


def test_bodies_are_bounded_before_they_are_read(client: TestClient):
    assert client.post("/v1/suggest", content=b"x" * 1_000_001).status_code == 413
    assert client.post("/v1/suggest", content=iter([b"{}"])).status_code == 411
    assert (
        client.post("/v1/suggest", content=b"{nonsense", headers={"content-type": "application/json"}).status_code
        == 422
    )
    assert client.get("/v1/suggest").status_code == 405


def test_every_reply_carries_the_security_headers(client: TestClient):
    replies = [client.get("/"), client.get("/healthz"), ask(client, history=[]), client.get("/nowhere")]
    for reply in replies:
        for name, value in SECURITY_HEADERS.items():
            assert reply.headers[name] == value
    assert client.get("/docs").status_code == 404  # its scripts would come from elsewhere


def test_health_answers_while_a_model_is_busy(models: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch):
    """Two requests never generate at once, and health does not wait for them."""
    busy, most = [], []
    real = app_module.generate

    def slow(*args: Any, **kwargs: Any) -> Any:
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.15)
        busy.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(app_module, "generate", slow)
    with TestClient(create_app(models, TASK, 0.0)) as client:
        threads = [threading.Thread(target=ask, args=(client,), kwargs={"model": "sft"}) for _ in range(3)]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        health = client.get("/healthz").json()
        assert time.monotonic() - start < 0.3
        for thread in threads:
            thread.join()
    assert health == {"status": "ok", "models": ["sft", "ppo", "tppo"], "num_queries": 3}
    assert most == [1, 1, 1]


def test_foreign_host_names_are_refused(models: dict[str, tuple[Any, Any]]):
    with TestClient(create_app(models, TASK, 0.0, allowed_hosts=["127.0.0.1"])) as client:
        assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/healthz", headers={"host": "127.0.0.1:8000"}).status_code == 200


def test_no_text_of_a_request_is_logged(client: TestClient, caplog: pytest.LogCaptureFixture, capfd: Any):
    with caplog.at_level(logging.DEBUG):
        ask(client, history=[{"text": "a very private matter"}])
        ask(client, history=[{"text": "a very private matter", "kind": "nonsense"}])
    printed = capfd.readouterr()
    assert "private" not in caplog.text + printed.out + printed.err


def test_the_page_is_one_file(client: TestClient):
    page = client.get("/").text
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert '<label for="history">' in page
    facts = json.loads(re.search(r"const FACTS = (.*);", page).group(1))
    assert [model["label"] for model in facts["models"]] == ["SFT", "PPO", "TPPO"]
    assert facts["num_queries"] == 3


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.1.2.3", True), ("0.0.0.0", False),
     ("10.0.0.5", False), ("::", False), ("example.com", False)],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool):
    assert is_loopback(host) is expected


@pytest.fixture(scope="module")
def server(models: dict[str, tuple[Any, Any]], running: Any) -> Iterator[str]:
    """A real uvicorn on a free port."""
    with running(create_app(models, TASK, 0.7)) as url:
        yield url


def test_a_real_server_answers(server: str):
    reply = httpx.post(f"{server}/v1/suggest", json={"history": HISTORY, "model": "tppo"}, timeout=30)
    assert reply.status_code == 200
    assert reply.json()["model"] == "tppo"


def dump_dom(url: str, folder: Path) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={folder} --virtual-time-budget=15000"
    command = ["chromium", *flags.split(), "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on this machine to open the page with"
)


@needs_browser
def test_the_page_shows_the_models_beside_each_other(server: str, tmp_path: Path):
    history = quote("tomato seeds\nclick: garden shed\nrose pruning\nvisa\npurchase: drum kit")
    dom = dump_dom(f"{server}/#history={history}&run=1", tmp_path)
    assert 'data-state="done"' in dom
    assert re.findall(r'<article class="card"[^>]*data-model="(\w+)"', dom) == ["sft", "ppo", "tppo"]
    assert len(re.findall(r"\d+ ms</span>", dom)) == 3
    assert "read the last 4 of your 5 events" in dom


@needs_browser
def test_the_page_explains_what_is_wrong_with_the_input(server: str, tmp_path: Path):
    dom = dump_dom(f"{server}/#history={quote('click:')}&run=1", tmp_path)
    assert "Event 1 has a kind but no text." in dom
    assert 'data-state="error"' in dom


@pytest.fixture
def finished_run(tmp_path: Path, tiny_policy: Path) -> Recipe:
    """A run folder where sft and tppo are trained and ppo is not."""
    recipe = Recipe(run_dir=str(tmp_path / "run"), task=TASK, rl=RL(precision="fp32"))
    recipe.prepare.source = ["log.tsv"]
    run = RunFolder(recipe)
    for stage in ("prepare", "sft", "sample", "label", "reward", "rl_tppo"):
        with run.stage(stage) as (folder, _):
            if stage in ("sft", "rl_tppo"):
                shutil.copytree(tiny_policy, folder / "model")
    return recipe


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_serve_loads_what_is_finished(
    finished_run: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: Any, host: str, warned: bool
):
    health: dict[str, Any] = {}

    def run_once(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        """The server's own loop, left as soon as it has answered once."""
        thread = threading.Thread(target=real_run, args=(self,), kwargs={"sockets": sockets}, daemon=True)
        thread.start()
        while not self.started:
            time.sleep(0.02)
        port = sockets[0].getsockname()[1]
        health.update(httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10).json())
        self.should_exit = True
        thread.join(timeout=10)

    real_run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", run_once)
    serve(replace(finished_run, serve=Serve(host=host, port=0)))
    printed = " ".join(capsys.readouterr().err.split())
    assert health["models"] == ["sft", "tppo"]
    assert "PPO is not trained" in printed
    assert ("WARNING" in printed) is warned


def test_serve_names_what_is_missing(tmp_path: Path, finished_run: Recipe):
    with pytest.raises(UserError, match="stage 'sft' is not finished"):
        serve(Recipe(run_dir=str(tmp_path / "nothing")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1 port {port}"):
            serve(replace(finished_run, serve=Serve(port=port)))
