"""`import tppo`: the names a researcher uses, each with a docstring and an example that runs; and the README's."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tppo

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", tppo.__all__)
def test_every_public_name_has_an_example_that_runs(name: str):
    found = getattr(tppo, name)
    module = importlib.import_module(found.__module__)
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, module, globs=vars(module).copy())
    assert len(test.docstring.splitlines()[0]) > 20
    assert test.examples, f"{name} has no example"
    results = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test)
    assert results.failed == 0


def test_the_package_itself_starts_without_torch_and_knows_its_names():
    code = "import sys, tppo; assert dir(tppo) == tppo.__all__; assert 'torch' not in sys.modules; tppo.Nothing"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'tppo' has no attribute 'Nothing'" in run.stderr


@pytest.mark.slow
def test_the_readmes_snippet_has_eight_lines_and_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) <= 8
    run = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    assert -32 < float(run.stdout) < 4
