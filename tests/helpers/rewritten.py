"""Finished stages as if they had written, and read, what is there now."""

from __future__ import annotations

import json
from pathlib import Path

from tppo.core import folders
from tppo.core.run import RunFolder


def as_if_written(folder: Path) -> None:
    """Take the files of a stage's folder into its manifest after a test has changed them."""
    path = folder / folders.MANIFEST
    made = folders.outputs(folder, [])
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest |= {"outputs": {name: mark.pop("sha256") for name, mark in made.items()}, "stamps": made}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def as_if_read(run: RunFolder, *stages: str) -> None:
    """Take the inputs that there are now into the manifests of stages, left to right, after a test has changed them."""
    for stage in stages:
        path = run.path(stage) / folders.MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**manifest, "inputs": run.input_hashes(stage)}), encoding="utf-8")
