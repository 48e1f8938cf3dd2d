"""A finished stage's folder as if the stage had written what is there now."""

from __future__ import annotations

import json
from pathlib import Path

from tppo.core import folders


def as_if_written(folder: Path) -> None:
    """Take the files of a stage's folder into its manifest after a test has changed them."""
    path = folder / folders.MANIFEST
    made = folders.outputs(folder, [])
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest |= {"outputs": {name: mark.pop("sha256") for name, mark in made.items()}, "stamps": made}
    path.write_text(json.dumps(manifest), encoding="utf-8")
