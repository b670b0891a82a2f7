"""What launches share: devices, blocks, and choices that are measured once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ryzen_compile.errors import UnsupportedError, UsageError
from tests.kernels.oracle import DEVICE

CUDA = torch.device("cuda")


@pytest.fixture
def launch() -> ModuleType:
    pytest.importorskip("triton")
    from ryzen_compile.kernels import launch

    return launch


def configs(*blocks: int) -> list:
    import triton

    return [triton.Config({"BLOCK": block}, num_warps=4, num_stages=2) for block in blocks]


def test_tensors_must_be_on_one_device(launch):
    x = torch.zeros(2, device=DEVICE)
    assert launch.expect_device("op", x=x, none=None) == x.device
    with pytest.raises(UsageError, match=f"op: all tensors must be on one device: x is on {x.device}, y on meta"):
        launch.expect_device("op", x=x, none=None, y=torch.zeros(2, device="meta"))


def test_a_compiled_kernel_refuses_a_cpu(launch, monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(UnsupportedError, match="op: a Triton kernel runs on a GPU, the tensors are on cpu; move them"):
        launch.expect_device("op", x=torch.zeros(2))


@pytest.mark.parametrize(("elements", "warps"), [(1, 1), (255, 1), (257, 2), (2048, 8), (1 << 20, 16)])
def test_warps_follow_the_elements(launch, elements, warps):
    assert launch.warps(elements) == warps


@pytest.mark.parametrize(("size", "shared"), [(0, 1), (1, 1), (3, 4), (1024, 1024), (1025, 2048)])
def test_sizes_share_a_choice(launch, size, shared):
    assert launch.bucket(size) == shared


def test_nothing_is_measured_on_a_cpu(launch):
    first, second = configs(64, 128)

    def run(config: object) -> None:
        raise AssertionError("was run")

    assert launch.tuned("k", ("fp32", 4), [first, second], run, torch.device("cpu")) is first


@pytest.fixture
def gpu(launch, monkeypatch) -> ModuleType:
    """A GPU of which only the name is asked, and whether it is capturing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return launch


def choosing(launch: ModuleType, monkeypatch: pytest.MonkeyPatch, file: Path, taken: dict[int, float]) -> list[int]:
    """Opens the choices in ``file``, where a candidate takes what ``taken`` says; returns the blocks that were run."""
    ran: list[int] = []

    def milliseconds(run: Callable[[], object]) -> float:
        run()
        return taken[ran[-1]]

    devices = launch._Devices()
    devices._by_name["NVIDIA H200"] = launch.Choices(file, milliseconds)
    monkeypatch.setattr(launch, "_CHOICES", devices)
    return ran


def pick(launch: ModuleType, ran: list[int], *blocks: int) -> int:
    chosen = launch.tuned("k", ("fp32", 4), configs(*blocks), lambda c: ran.append(c.kwargs["BLOCK"]), CUDA)
    return chosen.kwargs["BLOCK"]


def test_the_fastest_is_kept_across_processes(gpu, monkeypatch, tmp_path):
    file = tmp_path / "cache" / "choices.json"
    ran = choosing(gpu, monkeypatch, file, {64: 3.0, 128: 1.0, 256: 2.0})
    assert pick(gpu, ran, 64, 128, 256) == 128 and ran == [64, 128, 256]
    assert pick(gpu, ran, 64, 128, 256) == 128 and ran == [64, 128, 256], "measured once"
    again = choosing(gpu, monkeypatch, file, {})
    assert pick(gpu, again, 64, 128, 256) == 128 and again == []
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no temporary file is left"


def test_a_choice_that_is_no_candidate_any_more_is_measured_anew(gpu, monkeypatch, tmp_path):
    file = tmp_path / "choices.json"
    pick(gpu, choosing(gpu, monkeypatch, file, {64: 2.0, 128: 1.0}), 64, 128)
    ran = choosing(gpu, monkeypatch, file, {64: 1.0, 32: 2.0})
    assert pick(gpu, ran, 64, 32) == 64 and ran == [64, 32]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"triton": "0", "choices": {"k fp32 4": {"BLOCK": 64}}}', '{"choices": 3}', "\x00"],
)
def test_a_file_that_says_nothing_is_measured_anew(gpu, monkeypatch, tmp_path, content):
    file = tmp_path / "choices.json"
    file.write_text(content)
    ran = choosing(gpu, monkeypatch, file, {64: 2.0, 128: 1.0})
    assert pick(gpu, ran, 64, 128) == 128
    assert json.loads(file.read_text())["choices"]["k fp32 4"]["BLOCK"] == 128


def test_a_place_that_cannot_be_written_costs_nothing_but_time(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    ran = choosing(gpu, monkeypatch, tmp_path / "file" / "choices.json", {64: 2.0, 128: 1.0})
    assert pick(gpu, ran, 64, 128) == 128


def test_while_a_graph_is_captured_nothing_is_measured(gpu, monkeypatch, tmp_path):
    ran = choosing(gpu, monkeypatch, tmp_path / "choices.json", {64: 2.0, 128: 1.0})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick(gpu, ran, 64, 128) == 64 and ran == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pick(gpu, ran, 64, 128) == 128
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick(gpu, ran, 64, 128) == 128, "what is known is used"


@pytest.mark.parametrize("kind", ["OutOfResources", "PTXASError"])
def test_candidates_that_need_too_much_drop_out(gpu, monkeypatch, tmp_path, kind):
    from triton.runtime import errors

    error = {
        "OutOfResources": errors.OutOfResources(300_000, 232_448, "shared memory"),
        "PTXASError": errors.PTXASError("too many registers"),
    }[kind]
    ran = choosing(gpu, monkeypatch, tmp_path / "choices.json", {64: 1.0, 128: 2.0})

    def run(config) -> None:
        if config.kwargs["BLOCK"] == 64:
            raise error
        ran.append(config.kwargs["BLOCK"])

    assert gpu.tuned("k", (), configs(64, 128), run, CUDA).kwargs["BLOCK"] == 128
    with pytest.raises(type(error)):
        gpu.tuned("all", (), configs(64, 64), run, CUDA)
