"""Artifacts of well-known shapes with random int4 weights, for the benchmarks that ask for time and not for text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def prepare(shape: str, kv: str, out: Path) -> None:
    """Exports in a child, whose memory is given back; unverified, for random weights' logits mean nothing."""
    code = (
        "import sys\n"
        "from ryzen_compile.api import export\n"
        "from ryzen_compile.config import find_recipe\n"
        "from ryzen_compile.shapes import random_model\n"
        "recipe = find_recipe('int4', kv=sys.argv[2], method='rtn')\n"
        "export(random_model(sys.argv[1]), sys.argv[3], recipe, verify=False)\n"
    )
    subprocess.run([sys.executable, "-c", code, shape, kv, str(out)], check=True)
