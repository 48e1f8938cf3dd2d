"""A key of user hashes for the tests, and small synthetic logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tppo.core.config import Synthetic
from tppo.logs import synthetic

KEY = "a key for the tests only"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPPO_HASH_KEY", KEY)


@pytest.fixture(scope="session")
def make_log(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """A function of the number of users and of the events of each: a synthetic log."""

    def make(users: int, events: int) -> Path:
        path = tmp_path_factory.mktemp("log") / "log.tsv"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "EVENTS_PER_USER", events)
            synthetic.write_log(Synthetic(users=users), 3, path)
        return path

    return make
