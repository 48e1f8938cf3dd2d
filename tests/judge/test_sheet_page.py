"""The page over a real sheet: its interface, what it saves, and people's clicks and keys in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.helpers.agreement_run import RESPONSES, fill, labelled
from tests.helpers.browser import Browser
from tests.helpers.child import end_with_parent
from tests.judge.test_sheet import key_of
from tppo.cli import main
from tppo.core.common import UserError
from tppo.core.config import Agreement
from tppo.core.run import RunFolder
from tppo.core.web import SECURITY_HEADERS
from tppo.judge.sheet import SheetKey, create_app, export_sheet, read_sheet, serve_sheet

AGAINST = ["rose pruning", "<b id=evil>x</b><script>document.title='evil'</script>"]


@pytest.fixture
def key() -> SheetKey:
    return key_of(RESPONSES, AGAINST)


@pytest.fixture
def sheet(tmp_path: Path, key: SheetKey) -> Path:
    return export_sheet(tmp_path / "agreement", key)


@pytest.fixture
def client(key: SheetKey, sheet: Path) -> Iterator[TestClient]:
    with TestClient(create_app(key, sheet), base_url="http://127.0.0.1") as client:
        yield client


def test_the_sheet_is_shown_without_anything_else(client: TestClient):
    items = client.get("/v1/sheet").json()["items"]
    assert len(items) == len(RESPONSES)
    assert items[4] == {
        "against": AGAINST,
        "queries": [["the", "cat", "the", "cat"], ["the"]],
        "answers": {"words": [None] * 5, "sentence": None},
    }
    assert items[7] == {"against": AGAINST, "queries": [], "answers": {"words": [], "sentence": None}}


def test_answers_land_in_the_csv_at_once(client: TestClient, key: SheetKey, sheet: Path):
    given = {"words": [1, 0, None, 1, 0], "sentence": 0}
    assert client.put("/v1/items/4", json=given).json() == {"saved": True}
    assert read_sheet(sheet, key)[4].model_dump() == given
    assert client.get("/v1/sheet").json()["items"][4]["answers"] == given
    assert client.get("/v1/sheet").json()["items"][5]["answers"]["sentence"] is None
    assert [path.name for path in sheet.parent.iterdir() if "tmp" in path.name] == []


def test_labels_typed_into_the_file_meanwhile_are_kept(client: TestClient, key: SheetKey, sheet: Path):
    fill(sheet.parent, lambda example_id, text, i: "1" if example_id == "e1" else "")
    client.put("/v1/items/8", json={"words": [0], "sentence": 0})
    answers = read_sheet(sheet, key)
    assert answers[1].words == [1, 1, 1, 1]
    assert answers[8].words == [0]


@pytest.mark.parametrize(
    ("number", "body", "status"),
    [
        (0, {"words": [1], "sentence": 0}, 422),
        (8, {"words": [2], "sentence": 0}, 422),
        (8, {"words": [True], "sentence": 0}, 422),
        (8, {"words": [1.0], "sentence": 0}, 422),
        (8, {"words": ["1"], "sentence": 0}, 422),
        (8, {"words": [1]}, 422),
        (8, {"words": [1], "sentence": 0, "judge": 1}, 422),
        (10, {"words": [1], "sentence": 0}, 404),
        (-1, {"words": [1], "sentence": 0}, 404),
    ],
)
def test_bad_answers_change_nothing(client: TestClient, sheet: Path, number: int, body: dict[str, Any], status: int):
    before = sheet.read_bytes()
    assert client.put(f"/v1/items/{number}", json=body).status_code == status
    assert sheet.read_bytes() == before


def test_a_spoilt_sheet_is_told_and_left_alone(client: TestClient, sheet: Path):
    sheet.write_bytes(sheet.read_bytes().replace(b"[cat]", b"[dog]", 1))
    before = sheet.read_bytes()
    for reply in (client.get("/v1/sheet"), client.put("/v1/items/8", json={"words": [1], "sentence": 1})):
        assert reply.status_code == 409
        assert re.search(r"sheet\.csv line \d+: column 'text' is not as exported", reply.json()["detail"])
    assert sheet.read_bytes() == before


def test_every_reply_carries_the_security_headers_and_only_loopback_names_are_answered(client: TestClient):
    for reply in (client.get("/"), client.get("/v1/sheet"), client.put("/v1/items/99", json={}), client.get("/docs")):
        assert {name: reply.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert client.get("/docs").status_code == 404
    assert client.get("/v1/sheet", headers={"host": "evil.example"}).status_code == 400
    assert client.put("/v1/items/0", content=b"x" * 1_000_001).status_code == 413
    # Another site's page cannot send this without asking first, and nobody allows it.
    asked = {"origin": "http://evil.example", "access-control-request-method": "PUT"}
    assert client.options("/v1/items/0", headers=asked).status_code in (405, 411)


def test_the_page_is_one_file(client: TestClient):
    page = client.get("/").text
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    facts = json.loads(re.search(r"const FACTS = (.*);", page).group(1))
    assert facts == {"rubric": "targets", "file": "sheet.csv", "items": 10}
    assert "/*STYLE*/" not in page
    assert "/*SCRIPT*/" not in page


needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on this machine to open the page with"
)
WORDS = "[...document.querySelectorAll('#words button')]"
SAVED = "document.getElementById('main').dataset.state === 'saved' && !saving && unsaved.size === 0"


@needs_browser
def test_a_person_answers_by_key_and_click_and_goes_on_later(running: Any, key: SheetKey, sheet: Path, tmp_path: Path):
    with running(create_app(key, sheet)) as url, Browser(tmp_path / "profile") as page:
        page.open(url, "document.getElementById('main')?.dataset.state === 'ready'")
        # What users typed is shown as text: no element, no script of theirs.
        assert page.value("document.getElementById('against').textContent") == "".join(AGAINST)
        assert page.value("document.getElementById('evil')") is None
        assert page.value(f"{WORDS}.map(b => b.textContent)") == RESPONSES[0].split()
        assert page.value("document.title") == "tppo: are these searches relevant?"

        page.press("1", "0", "ArrowRight", "0", "1", "ArrowLeft", "ArrowLeft", "0")
        page.wait(SAVED)
        assert read_sheet(sheet, key)[0].model_dump() == {"words": [1, 0, 0, 0], "sentence": 1}
        assert "1 finished" in page.value("document.getElementById('where').textContent")

        page.press("Enter")
        assert page.value(f"{WORDS}.map(b => b.textContent)") == RESPONSES[1].split()
        assert page.value(f"{WORDS}.findIndex(b => b.ariaCurrent && b === document.activeElement)") == 0
        page.click(f"{WORDS}[0]")
        page.click(f"{WORDS}[2]")
        page.click(f"{WORDS}[2]")
        page.click("document.getElementById('no')")
        page.wait(SAVED)
        assert read_sheet(sheet, key)[1].model_dump() == {"words": [1, None, 0, None], "sentence": 0}
        page.press("Backspace")
        page.wait(SAVED)
        assert read_sheet(sheet, key)[1].sentence is None
        assert page.value(f"{WORDS}.map(b => b.getAttribute('aria-label'))")[:3] == [
            "007: relevant", "1/2: not answered", "1e5: not relevant",
        ]  # fmt: skip

        page.press("Enter")
        assert page.value("window.innerWidth >= document.documentElement.scrollWidth")
        assert page.value(f"{WORDS}[0].textContent") == "<img"
        page.press("Enter", shift=True)
        assert page.value("document.getElementById('where').textContent").startswith("Response 2 of 10")

        # Opened anew, it goes on with the first response that is not finished.
        page.open(url, "document.getElementById('main')?.dataset.state === 'ready'")
        assert page.value("document.getElementById('where').textContent") == "Response 2 of 10; 1 finished."
        assert page.value(f"{WORDS}.map(b => b.dataset.answer)") == ["1", "", "0", ""]


@needs_browser
def test_an_answer_that_cannot_be_saved_is_told_and_saved_later(
    running: Any, key: SheetKey, sheet: Path, tmp_path: Path
):
    with running(create_app(key, sheet)) as url, Browser(tmp_path / "profile") as page:
        page.open(url, "document.getElementById('main')?.dataset.state === 'ready'")
        blank = sheet.read_bytes()
        sheet.write_bytes(b"spoilt")
        page.press("1")
        page.wait("document.getElementById('error').textContent.startsWith('Not saved: ')")
        sheet.write_bytes(blank)
        page.press("0")
        page.wait(SAVED)
        assert page.value("document.getElementById('error').textContent") == ""
    assert read_sheet(sheet, key)[0].words == [1, 0, None, None]


@needs_browser
def test_an_empty_response_is_one_question(running: Any, tmp_path: Path):
    key = key_of(["", "one"])
    sheet = export_sheet(tmp_path / "agreement", key)
    with running(create_app(key, sheet)) as url, Browser(tmp_path / "profile") as page:
        page.open(url, "document.getElementById('main')?.dataset.state === 'ready'")
        assert "The response is empty." in page.value("document.getElementById('words').textContent")
        page.press("0", "Enter", "1", "1")
        page.wait(SAVED)
        assert "All are finished" in page.value("document.getElementById('where').textContent")
    assert [given.model_dump() for given in read_sheet(sheet, key)] == [
        {"words": [], "sentence": 0},
        {"words": [1], "sentence": 1},
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent()


def test_the_command_serves_a_persons_own_sheet_until_interrupted(prepared_recipe: Any, tmp_path: Path):
    """A blank sheet is made for Anna; what she answered is there after Ctrl+C; the exported one stays blank."""
    recipe = labelled(prepared_recipe())
    main(["agreement", "--run_dir", recipe.run_dir, "--agreement.examples", "5"])
    folder, anna, port = RunFolder(recipe).path("agreement"), tmp_path / "anna.csv", free_port()
    blank = (folder / "sheet.csv").read_bytes()
    command = [sys.executable, "-m", "tppo", "agreement", "--run_dir", recipe.run_dir, "--agreement.action", "page"]
    command += ["--agreement.answers", f"[{anna}]", "--agreement.port", str(port)]
    # A shell that put the tests into the background ignores Ctrl+C for all it starts.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        said = process.stderr.readline()
        assert f"http://127.0.0.1:{port}/" in said
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=9), timeout=120
        ) as client:
            [first, *_] = client.get("/v1/sheet").json()["items"]
            words = len(first["answers"]["words"])
            assert client.put("/v1/items/0", json={"words": [1] * words, "sentence": 0}).json() == {"saved": True}
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        watchdog.cancel()
        rest = process.stderr.read()
    assert "Traceback" not in rest
    assert (folder / "sheet.csv").read_bytes() == blank
    assert anna.read_bytes() != blank


def test_a_busy_port_and_a_spoilt_sheet_stop_before_serving(sheet: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1 port {port}.*--agreement\.port"):
            serve_sheet(sheet.parent, Agreement(port=port))
    sheet.write_bytes(b"x")
    with pytest.raises(UserError, match="line 1 is not the heading"):
        serve_sheet(sheet.parent, Agreement(port=0))
