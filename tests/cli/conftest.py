"""How a command is run in these tests: in this process, with its status and what it wrote."""

from __future__ import annotations

from typing import Any

import pytest

from ryzen_compile import cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line; returns its status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call
