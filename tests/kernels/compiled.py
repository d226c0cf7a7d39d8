"""What the tests of compiled kernels share: limits, instructions, and a process that does not interpret kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}
MATRIX_PRODUCT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # mma.sync, wgmma and tcgen05


def run_compiled(module: str, *arguments: object) -> list[Any]:
    """What a module prints, a JSON value a line, where kernels are compiled and not interpreted."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
