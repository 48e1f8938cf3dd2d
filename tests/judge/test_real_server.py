"""The LLM judge against a real OpenAI-compatible server with a real model: `transformers serve` and SmolLM2-135M.

A model this small judges badly; what is tested is that the whole path is real: the server's chat format, its idea of
response_format, usage and finish_reason, and replies that break the contract because a model wrote them.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.child import end_with_parent
from tests.helpers.many_items import make_run
from tppo.cli import main
from tppo.core.common import UserError
from tppo.core.config import JudgeSettings
from tppo.core.device import generation_dtype
from tppo.core.models import smollm2_folder
from tppo.core.tables import LABELS, read_table
from tppo.core.text import Event
from tppo.judge.ledger import JudgeLedger
from tppo.judge.llm import LLMJudge
from tppo.judge.verdict import JudgeItem

ITEMS = 3


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Base URL and model name of a running `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dtype = str(generation_dtype("auto")).removeprefix("torch.")
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(smollm2_folder())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", dtype]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=end_with_parent)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/v1", str(smollm2_folder())
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["token", "sentence"])
def test_labels_by_a_real_model(served, tmp_path, template):
    base_url, model = served
    make_run(tmp_path / "run", ITEMS)
    main(
        [
            *("label", "--config", str(tmp_path / "run" / "recipe.yaml"), "--label.judge", "llm"),
            *("--judge.base_url", base_url, "--judge.model", model, "--judge.template", template),
            *("--judge.max_reply_tokens", "120", "--judge.reply_attempts", "1", "--judge.max_concurrency", "2"),
            *("--judge.ledger", str(tmp_path / "judge.sqlite")),
        ]
    )
    rows = read_table(tmp_path / "run" / "label" / "labels.parquet", LABELS).to_pylist()
    assert len(rows) == ITEMS
    assert {row["status"] for row in rows} <= {"ok", "abstained"}
    with JudgeLedger(tmp_path / "judge.sqlite") as ledger:
        attempts = ledger.attempts()
    assert {row["outcome"] for row in attempts} <= {"ok", "broken"}
    assert all(row["reply"] and row["prompt_tokens"] > 200 and row["reply_tokens"] > 0 for row in attempts)
    for row in rows:
        tries = [attempt for attempt in attempts if attempt["outcome"] == "ok"]
        assert row["status"] == "abstained" or (tries and row["sentence_label"] in (0, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_run_leaves_no_server_behind():
    """A process that started one as above is killed with kill -9; the server is gone a moment later."""
    program = (
        "import subprocess, sys, time\n"
        "from tests.helpers.child import end_with_parent\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "server = subprocess.Popen(command, preexec_fn=end_with_parent)\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        server = Path("/proc") / run.stdout.readline().strip()
        assert server.exists()
        run.kill()
    for _ in range(100):
        if not server.exists() or "\nState:\tZ" in (server / "status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the server outlived the run")


@pytest.mark.slow
def test_a_real_server_that_gives_no_log_probabilities(served, tmp_path):
    base_url, model = served
    ledger = str(tmp_path / "judge.sqlite")
    judge = LLMJudge(JudgeSettings(base_url, model, template="sentence", score="probability", ledger=ledger))
    with pytest.raises(UserError, match="this one gave none"):
        judge.judge([JudgeItem([Event("search", "cheap flights")], ["flights to rome"], "rome flights")], "targets")
