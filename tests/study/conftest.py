"""The made-up runs of the report's tests and the LLM judge's server serve here, too."""

import sys
from pathlib import Path

for name in ("evaluate", "judge"):
    sys.path.append(str(Path(__file__).parents[1] / name))
