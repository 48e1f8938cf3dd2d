"""The documented example runs as a reader would run it, and learns."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "json_validity.py"


def test_json_validity_is_learnt():
    run = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    valid = [int(count) for count in re.findall(r"valid (\d+)/32", run.stdout)]
    assert len(valid) == 40
    assert valid[0] < 8
    assert sum(valid[-3:]) / 3 > 16
