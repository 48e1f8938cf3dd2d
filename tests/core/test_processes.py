"""Real processes: what ends with a run, what a stage at work is not disturbed by, what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tppo import cli
from tppo.core.config import Recipe, Synthetic
from tppo.core.processes import Children, Stopped, ended_by_signals, locked
from tppo.core.run import RunFolder

SLOW_STAGE = """
import subprocess, sys, time
from pathlib import Path

def run(recipe, run, folder):
    child = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(600)"])
    (folder / "log.tsv").write_text(f"{child.pid} {recipe.synthetic.users}")
    while not (Path(recipe.run_dir) / "go").exists():
        time.sleep(0.02)
    child.kill()
    child.wait()
    return {"users": recipe.synthetic.users}
"""
RUNNER = """
import dataclasses, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that were started in the background ignore it
from tppo.core.stages import STAGES

STAGES["synthetic"] = dataclasses.replace(STAGES["synthetic"], module="slow_stage")
from tppo import cli

cli.all_stages = lambda recipe: ["synthetic"]
cli._run_all = lambda recipe, redo: cli.run(recipe, redo=redo)
cli.main(sys.argv[1:])
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """`start(*arguments)`: tppo in a process, with a stage `synthetic` that goes on until the file `go` is there."""
    (tmp_path / "slow_stage.py").write_text(SLOW_STAGE)
    package = tmp_path / "sitecustomize.py"  # the stage's process is started as `python -m tppo`
    package.write_text(
        "import dataclasses\nfrom tppo.core.stages import STAGES\n"
        "STAGES['synthetic'] = dataclasses.replace(STAGES['synthetic'], module='slow_stage')\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "synthetic": {"users": 20}}))
    started: list[subprocess.Popen] = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def begin(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RUNNER, *arguments, "--config", str(path)]
        # A file: a pipe would stay open for as long as a stage that outlives the run.
        log = tmp_path / f"{len(started)}.log"
        with log.open("w") as output:
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        started[-1].log = log  # type: ignore[attr-defined]
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait()


def said(process: subprocess.Popen) -> str:
    """All that it said, when it has ended."""
    process.wait(timeout=120)
    return process.log.read_text()  # type: ignore[attr-defined]


def at_work(root: Path, process: subprocess.Popen) -> tuple[psutil.Process, psutil.Process]:
    """The stage's process, and the one that the stage has started, once it is at work."""
    log = root / "run" / "synthetic" / "log.tsv"
    while not log.exists() or not log.read_text():
        assert process.poll() is None, said(process)
        time.sleep(0.02)
    grandchild = psutil.Process(int(log.read_text().split()[0]))
    parent = grandchild.parent()
    assert parent is not None
    return parent, grandchild


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_run_ends_all_of_it_and_it_can_go_on(tmp_path: Path, start, number: int) -> None:
    run = start("run")
    stage, grandchild = at_work(tmp_path, run)
    run.send_signal(number)
    assert "give the same command again to go on" in said(run)
    assert run.returncode == 128 + number
    assert not stage.is_running()
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "run/synthetic/manifest.json").exists()
    if number == signal.SIGTERM:
        (tmp_path / "run" / "go").touch()
        assert start("run").wait(timeout=120) == 0
        assert (tmp_path / "run/synthetic/manifest.json").exists()


def test_a_run_at_work_is_not_disturbed(tmp_path: Path, start) -> None:
    """Neither by another run, nor by a stage's own command, nor by another recipe.yaml; a killed run's stage is not
    written beside."""
    first = start("run")
    stage, _ = at_work(tmp_path, first)
    # Of another start, the stage would be made with 30 users.
    (tmp_path / "run" / "recipe.yaml").write_text("synthetic: {users: 30}\n")
    others = [start("run", "--synthetic.users", "30"), start("run", "--redo", "synthetic")]
    for other in others:
        told = said(other)
        assert other.returncode == 2, told
        reasons = ("synthetic.users: 20 -> 30", *(f"in use by process {holder.pid}" for holder in (first, stage)))
        assert any(reason in told for reason in reasons), told
    first.kill()
    first.wait()
    left = start("run")
    assert f"stage synthetic of {tmp_path / 'run'} is in use by process {stage.pid}" in said(left)
    assert left.returncode == 2
    (tmp_path / "run" / "go").touch()
    psutil.wait_procs([stage], timeout=60)
    manifest = json.loads((tmp_path / "run/synthetic/manifest.json").read_text())
    assert manifest["config"]["synthetic"]["users"] == manifest["facts"]["users"] == 20


def test_a_kill_at_any_moment_needs_no_repair(tmp_path: Path) -> None:
    """`tppo synthetic` and `tppo prepare` killed on their way; the same commands then end as if nothing had been."""
    code = (
        "import os, signal, sys, threading\n"
        "from tppo import cli\n"
        "from tppo.core import files\n"
        "at, done, replace = int(sys.argv[1]), 0, files.Path.replace\n"
        "def counted(self, target):\n"
        "    global done\n"
        "    done += 1\n"
        "    if done == at: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(self, target)\n"
        "files.Path.replace = counted\n"
        "for stage in ('synthetic', 'prepare'):\n"
        "    recipe = cli.Recipe(run_dir=sys.argv[2])\n"
        "    recipe.synthetic.users = 60\n"
        "    cli.run_one(recipe, stage)\n"
    )

    def examples(root: Path) -> str:
        """Makes what is not made yet."""
        recipe = Recipe(run_dir=str(root), synthetic=Synthetic(users=60))
        for stage in ("synthetic", "prepare"):
            cli.run_one(recipe, stage)
        return RunFolder(recipe).manifest("prepare")["outputs"]["examples.parquet"]  # type: ignore[index]

    expected, killed = examples(tmp_path / "straight"), 0
    for at in range(1, 12):
        root = tmp_path / f"killed-{at}"
        process = subprocess.run([sys.executable, "-c", code, str(at), str(root)], capture_output=True, text=True)
        killed += process.returncode == -signal.SIGKILL
        assert examples(root) == expected
        if process.returncode == 0:
            break
    assert killed > 3


def test_a_signal_is_ours_only_while_we_work_and_only_where_nobody_minds_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_children_that_were_stopped_are_started_no_more(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path) as children:
        raise RuntimeError
    with pytest.raises(ValueError, match="stopped; give the same command again"):
        children.call([sys.executable, "-c", ""])
    assert Children().call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
