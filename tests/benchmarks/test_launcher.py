"""The launcher's benchmark: it measures starts that really were answered."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_measures_every_way_to_start():
    """Two rounds: a row for each way. A start that was not answered as it should be would end the benchmark."""
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "launcher.py", "--rounds", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    rows = re.findall(r"^(\w[\w ]*?) {2,}-?\d+\.\d", run.stdout, re.MULTILINE)
    assert rows == ["no address set", "nobody listens", "answered at once", "lopsided plans"], run.stdout + run.stderr
