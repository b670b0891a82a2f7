"""``bench --trace``: what ran when, node by node, without a figure of the table being measured under a profile."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile.backends.onnxruntime import node_trace
from ryzen_compile.backends.onnxruntime.session import OrtEngine
from tests.model_directory import shared_artifact
from tests.test_timeline import checked

SMALL = ("-p", 5, "-n", 3, "-r", 2, "-t", 1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


def by_track(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            found[names[event["tid"]]].append(event)
    return found


def end(event: dict[str, Any]) -> int:
    return int(event["ts"] + event["dur"])


@pytest.mark.parametrize("flag", [(), ("--no-native",)], ids=["auto", "stock"])
def test_phases_and_nodes_are_recorded_behind_the_tests(
    run: Any, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: tuple[str, ...]
) -> None:
    steps: list[bool] = []
    original = OrtEngine.step

    def step(self: OrtEngine, *arguments: Any) -> Any:
        steps.append(self._options.profile)
        return original(self, *arguments)

    monkeypatch.setattr(OrtEngine, "step", step)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "trace.json"
    status, out, err = run("bench", artifact, *SMALL, *flag, "--trace", path, "-o", "json")
    assert status == 0, err
    assert f"wrote the timeline {path}" in err and json.loads(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json"]  # the profile's own file is gone
    # Warm-up and two repeats of one prompt and of three steps, all of them before the first profiled step.
    assert steps == [False] * 12 + [True] * 18

    found = by_track(checked(json.loads(path.read_text(encoding="utf-8"))))
    assert [e["name"] for e in found["main"]] == ["load", "pp5", "tg3"]
    profiled = found[node_trace.TRACK]
    prompt, decode = f"prompt of {node_trace.PROMPT}", ["decode"] * node_trace.STEPS
    assert [e["name"] for e in profiled] == ["load", "warm up", prompt, *decode, "measured", prompt, *decode]
    assert found["main"][-1]["ts"] + found["main"][-1]["dur"] <= profiled[0]["ts"]
    measured = [e for e in profiled if e["name"] == "decode"][-node_trace.STEPS :]
    assert [e["args"] for e in measured] == [{"tokens": 1, "behind": 64 + i} for i in range(8)]

    nodes = [e for name, events in found.items() if name == node_trace.NODES for e in events]
    calls = [e for e in nodes if e["name"] == node_trace.CALL]
    assert len(calls) == 18
    # Each call lies in the span of its step, to the microsecond that rounding costs.
    spans = [e for e in profiled if e["name"] in (prompt, "decode")]
    for call, span in zip(calls, spans, strict=True):
        assert span["ts"] - 1 <= call["ts"] and end(call) <= end(span) + 1
    kinds = [e["args"].get("op_name") for e in nodes if calls[-1]["ts"] <= e["ts"] <= end(calls[-1])]
    assert kinds.count("GroupQueryAttention") >= 2


def test_a_short_context_shortens_the_prompt(tmp_path: Path, artifact: Path) -> None:
    from dataclasses import replace

    from ryzen_compile.backends.onnxruntime import artifact as artifacts
    from ryzen_compile.timeline import Timeline

    found = artifacts.read(artifact, digests=False)
    short = replace(found, spec=replace(found.spec, context=11))
    timeline = Timeline()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_trace.artifact, "read", lambda directory, **_: short)
        node_trace.trace_nodes(timeline, artifact, threads=1)
    names = [e["name"] for e in by_track(checked(timeline.to_json()))[node_trace.TRACK]]
    assert names[:4] == ["load", "warm up", "prompt of 3", "decode"] and names.count("decode") == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine", "hf", "--trace", "trace.json"), "--trace records ONNX Runtime's nodes, not engine 'hf'"),
        (("--engine", "onnxruntime", "--engine", "eager", "--trace", "trace.json"), "not engine 'eager'"),
        (("--trace", "."), "--trace . is a directory"),
        (("--trace", os.path.join("absent", "trace.json")), "is to lie in one that there is not"),  # noqa: PTH118 - a text
    ],
)
def test_what_cannot_be_traced_is_refused_before_anything_is_read(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("bench", "no such model", *options)
    assert status == 2 and not out and said in err and not list(tmp_path.iterdir())


def test_a_test_that_does_not_fit_is_refused_before_any_runs(run: Any, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    status, _, err = run("bench", artifact, "-p", 5, "-n", 9000, "-r", 1, "-t", 1, "--trace", path)
    assert status == 2 and "test tg9000 needs 9000 positions" in err and not path.exists()
