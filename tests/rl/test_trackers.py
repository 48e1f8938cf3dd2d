"""Trackers get every update once, whatever stops the run; without one nothing changes."""

import json
import os
import sys
from dataclasses import replace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from tppo.core.common import UserError
from tppo.core.config import RL, Recipe
from tppo.core.stages import stage_config
from tppo.rl import loop
from tppo.rl.checkpoint import load_newest_checkpoint
from tppo.rl.loop import train

SETTINGS = {"updates": 5, "save_every": 2, "batch_size": 8, "minibatch_size": 8, "micro_batch_size": 8}


class FileTracker(GeneralTracker):
    """A tracker of accelerate's kind that appends what it is told to a file."""

    name = "file"
    requires_logging_directory = False
    path = None
    fails = False

    def __init__(self, run_name, **settings):
        super().__init__()
        self.settings = {"project": run_name, **settings}

    @property
    def tracker(self):
        return self

    def _write(self, **row):
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def start(self):
        self._write(start=self.settings, can_ask=sys.stdin.isatty())

    def store_init_configuration(self, values):
        self._write(config=values)

    def log(self, values, step=None, **kwargs):
        if self.fails:
            raise ConnectionError("no server")
        self._write(step=step, reward=values["reward_mean"])

    def finish(self):
        self._write(finished=True)


@pytest.fixture
def file_tracker(monkeypatch, tmp_path):
    """Stands where trackio's class does; a function that reads back what it wrote under one key."""
    monkeypatch.setattr(FileTracker, "path", tmp_path / "tracker.jsonl")
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", FileTracker)
    monkeypatch.setattr(loop, "get_available_trackers", lambda: ["trackio"])

    def read(key):
        rows = [json.loads(line) for line in FileTracker.path.read_text().splitlines()]
        return [row[key] for row in rows if key in row]

    return read


def stop_before(trainer, update):
    """The trainer's step fails as a killed process would, before this update."""
    step = trainer.step

    def stopping():
        if trainer.update + 1 == update:
            raise KeyboardInterrupt
        return step()

    trainer.step = stopping


def train_with_a_stop(make_trainer, folder, **settings):
    """Updates 1 to 3, a stop, and from the checkpoint of update 2 to the end: update 3 is made twice."""
    stopped = make_trainer(**SETTINGS, **settings)
    stop_before(stopped, 4)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, folder)
    train(make_trainer(**SETTINGS, **settings), folder)
    return [json.loads(line)["reward_mean"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_file_holds_every_update_once(make_trainer, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rewards = train_with_a_stop(make_trainer, tmp_path / "rl", trackers=["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "rl" / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("reward_mean")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
    assert [event.value for event in scalars] == pytest.approx(rewards)
    assert "kl" in events.Tags()["scalars"]
    assert "update" not in events.Tags()["scalars"]


def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker(make_trainer, tmp_path, file_tracker, monkeypatch):
    monkeypatch.setattr(loop, "PROJECT", "mine")
    rewards = train_with_a_stop(make_trainer, tmp_path / "rl", trackers=["trackio"])
    assert file_tracker("step") == [1, 2, 3, 4, 5]
    assert file_tracker("reward") == rewards
    first, second = file_tracker("start")
    assert first == second
    assert first["project"] == "mine"
    assert len(file_tracker("config")) == 1
    assert file_tracker("config")[0]["kl_coef"] == 0.01
    assert len(file_tracker("finished")) == 2


def test_a_tracker_added_later_gets_what_was_before(make_trainer, tmp_path, file_tracker):
    stopped = make_trainer(**SETTINGS)
    stop_before(stopped, 4)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "rl")
    assert not (tmp_path / "rl" / loop.NOTES).exists()
    train(make_trainer(**SETTINGS, trackers=["trackio"]), tmp_path / "rl")
    assert file_tracker("step") == [1, 2, 3, 4, 5]


def test_a_failing_tracker_stops_nothing_and_is_told_later(make_trainer, tmp_path, file_tracker, monkeypatch, capsys):
    trainer = make_trainer(**SETTINGS, trackers=["trackio"])
    step = trainer.step

    def failing_at_first():
        monkeypatch.setattr(FileTracker, "fails", trainer.update < 3)
        return step()

    trainer.step = failing_at_first
    train(trainer, tmp_path / "rl")
    assert file_tracker("step") == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("trackio failed, training goes on and tries again: no server") == 1


def test_nothing_can_ask_for_a_login(make_trainer, tmp_path, file_tracker, monkeypatch):
    terminal, other_end = os.openpty()
    with os.fdopen(other_end) as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        assert sys.stdin.isatty()
        train(make_trainer(**SETTINGS | {"updates": 1}, trackers=["trackio"]), tmp_path / "rl")
        assert sys.stdin is stdin
    os.close(terminal)
    assert file_tracker("can_ask") == [False]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named_before_any_update(make_trainer, tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, "get_available_trackers", list)
    trainer = make_trainer(**SETTINGS, trackers=[name])
    with pytest.raises(UserError, match=rf"{name}, which is not installed: `pip install {name}`"):
        train(trainer, tmp_path / "rl")
    assert trainer.update == 0


def test_a_tracker_that_does_not_start_says_so(make_trainer, tmp_path, file_tracker, monkeypatch):
    def no_start(self):
        raise RuntimeError("no project")

    monkeypatch.setattr(FileTracker, "start", no_start)
    with pytest.raises(UserError, match="trackio does not start: no project"):
        train(make_trainer(**SETTINGS, trackers=["trackio"]), tmp_path / "rl")


def test_trackers_may_change_without_making_anything_stale(make_trainer, tmp_path):
    assert RL().trackers == []
    recipe = Recipe()
    other = replace(recipe, rl=RL(trackers=["wandb"]))
    assert stage_config("rl_ppo", recipe) == stage_config("rl_ppo", other)
    assert stage_config("rl_ppo", recipe) != stage_config("rl_ppo", replace(recipe, rl=RL(gamma=0.5)))
    train(make_trainer(**SETTINGS), tmp_path)
    assert load_newest_checkpoint(make_trainer(**SETTINGS, trackers=["mlflow"]), tmp_path)
