"""``ryzen-compile doctor``: can this machine and installation do the work, and what to do where not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer
from rich.text import Text

from ryzen_compile.cli import output
from ryzen_compile.cli.failure import printable

_STYLE = {"pass": "green", "warn": "yellow", "fail": "bold red"}
FAILED = 3


def doctor(as_json: output.JsonFlag = False) -> None:
    """Check processor, limits, memory, libraries, operators, the hub's cache and the GPU; exit status 3 on failure."""
    found = _checks()
    failed = [check.name for check in found if check.status == "fail"]
    if as_json:
        output.print_json({"ok": not failed, "checks": [asdict(check) for check in found]})
    else:
        console = output.stdout()
        width = max(len(check.name) for check in found)
        for check in found:
            console.print(
                Text.assemble(
                    (check.status, _STYLE[check.status]), f"  {check.name:{width}}  {printable(check.detail)}"
                )
            )
            if check.fix:
                console.print(Text(f"      {'':{width}}  fix: {printable(check.fix)}"))
    if failed:
        raise typer.Exit(FAILED)


def _checks() -> list:
    from pathlib import Path

    from huggingface_hub import constants

    from ryzen_compile.validate import checks, machine, probe

    here = machine.read_machine()
    return [
        checks.check_isa(here),
        checks.check_kernels(here),
        checks.check_cores(here),
        checks.check_topology(here),
        checks.check_quota(here),
        checks.check_memory(here),
        checks.check_versions(),
        checks.check_onnxruntime(probe.probe("onnxruntime")),
        checks.check_native(_native_operators()),
        checks.check_genai(here),
        checks.check_hub(Path(constants.HF_HUB_CACHE), offline=constants.HF_HUB_OFFLINE),
        checks.check_gpu(probe.probe("gpu")),
    ]


def _native_operators() -> dict[str, Any]:
    from ryzen_compile.backends.onnxruntime.native import library, missing
    from ryzen_compile.validate.probe import probe

    built = library()
    if built is None:
        why, remedy = missing()
        return {"missing": why, "remedy": remedy}
    return probe("native", str(built))
