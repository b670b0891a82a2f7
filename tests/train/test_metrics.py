"""Records are whole lines of strict JSON whatever happens to the run, and the report says what they say."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ryzen_compile.errors import ArtifactError, ConfigError, ResourceError, UsageError
from ryzen_compile.train import metrics_report
from ryzen_compile.train.config import MetricsSettings
from ryzen_compile.train.metrics import BatchMetrics, EpochMetrics, MetricsCollector
from ryzen_compile.train.metrics_report import read_report, replacing, write_report
from ryzen_compile.train.metrics_schema import (
    COLUMNS,
    CSV_NAME,
    FIGURES,
    LISTED,
    RECORDS_NAME,
    REPORT_NAME,
    SAMPLED_BATCHES,
    BatchRecord,
    EpochRecord,
    report_schema,
)

NAN, INF = math.nan, math.inf
SETTINGS = MetricsSettings()


def step(n: int, **changes: Any) -> BatchMetrics:
    # Deterministic, and uneven enough that no two figures agree.
    values = BatchMetrics(
        n, n / 100, 64 * n, 3 + 1 / n, 0.25, 1e-3 / n, 1 + (n * 7 % 11) / 10, 1000.0 + n, 0.064, 1 << 20
    )
    return replace(values, **changes)


def epoch(n: int, **changes: Any) -> EpochMetrics:
    return replace(EpochMetrics(n, 10 * n, 3.0, 3.1, 0.4, 1000.0, 12.5), **changes)


def no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / RECORDS_NAME).read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=no_constant) for line in text.split("\n")[:-1]]


def kinds(directory: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in lines(directory)]


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / CSV_NAME).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_kind_of_record_is_written_at_once(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path / "a" / "run", SETTINGS)
    directory = tmp_path / "a" / "run"
    assert collector.batch(step(1)) == []
    assert kinds(directory) == [("batch", 1)]  # before anything is closed
    assert collector.validation(1, 2.5, None) == []
    settings = {"qat": {"bits": (4, 3), "path": Path("x")}}
    collector.epoch(
        epoch(0, step=1, speedups={"compile": 1.5}, quality={"qat": -0.01}, active=("qat",), settings=settings)
    )
    collector.event(1, "switched off", component="qat", rise=INF, step=7, kind="loss", stages=[1, None, "x"])
    collector.sample(1, "def f(", 'x):\n  return "\u2028\ud800"')
    batch, validation, whole, event, sample = lines(directory)
    assert all(isinstance(line.pop("time"), float) for line in (batch, validation, whole, event, sample))
    assert batch == {"kind": "batch", **asdict(step(1))}
    assert validation == {"kind": "validation", "step": 1, "loss": 2.5, "accuracy": None, "depths": {}}
    assert whole["speedups"] == {"compile": 1.5} and whole["quality"] == {"qat": -0.01} and whole["active"] == ["qat"]
    assert whole["settings"] == {"qat": {"bits": [4, 3], "path": "x"}} and whole["ttft_seconds"] is None
    facts = {"component": "qat", "rise": "Infinity", "step": 7, "kind": "loss", "stages": [1, None, "x"]}
    assert event == {"kind": "event", "step": 1, "event": "switched off", "facts": facts}
    assert sample["text"] == 'x):\n  return "\u2028?"'
    collector.close()


def test_records_have_the_fields_of_what_is_recorded() -> None:
    assert set(BatchRecord.model_fields) - {"kind", "time"} == {f.name for f in fields(BatchMetrics)}
    assert set(EpochRecord.model_fields) - {"kind", "time"} == {f.name for f in fields(EpochMetrics)}
    assert set(COLUMNS) == {*asdict(step(1)), "time"} and all(COLUMNS.values())


@pytest.mark.parametrize(
    ("value", "text"), [(NAN, "NaN"), (INF, "Infinity"), (-INF, "-Infinity")], ids=["nan", "inf", "-inf"]
)
def test_numbers_that_json_lacks(tmp_path: Path, value: float, text: str) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    (found,) = collector.batch(step(1, loss=value, accuracy=None))
    assert found.kind == "not_finite" and found.step == 1
    collector.epoch(epoch(1, train_loss=value, quality={"qat": value}))
    batch, anomaly, whole = lines(tmp_path)
    assert batch["loss"] == anomaly["value"] == whole["train_loss"] == whole["quality"]["qat"] == text
    assert anomaly["anomaly"] == "not_finite" and anomaly["expected"] is None and anomaly["message"] == found.message
    report = read_report(collector.finish({"last_loss": value}))
    assert repr(report.batches[0].loss) == repr(value)
    assert report.summary["last_loss"] == text
    figure = report.statistics.figures["loss"]
    assert (figure.count, figure.not_finite, figure.median) == (0, 1, None)
    assert json.loads((tmp_path / REPORT_NAME).read_text(), parse_constant=no_constant)["batches"][0]["loss"] == text
    (row,) = table(tmp_path)
    assert row["loss"] == text and row["accuracy"] == ""


def test_every_nth_step_the_first_and_what_is_not_finite(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, MetricsSettings(every=10))
    for n in range(1, 36):
        collector.batch(step(n, gradient_norm=INF if n == 13 else 1.0))
    collector.close()
    assert kinds(tmp_path) == [(k, n) for k, n in [("batch", 1), ("batch", 10), ("batch", 13), ("anomaly", 13)]] + [
        ("batch", 20),
        ("batch", 30),
    ]


def test_anomalies_are_recorded_and_come_back(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, MetricsSettings(window=20))
    found = [a for n in range(1, 60) for a in collector.batch(step(n, loss=30.0 if n == 40 else 3.0))]
    found += collector.validation(59, 3.0, 0.5) + collector.validation(60, 3.0, 0.3)
    report = read_report(collector.finish({}))
    assert [a.kind for a in found] == ["loss_spike", "accuracy_drop"]
    assert [(a.anomaly, a.step, a.value, a.expected) for a in report.anomalies] == [
        (a.kind, a.step, a.value, a.expected) for a in found
    ]
    assert report.statistics.anomalies == {"loss_spike": 1, "accuracy_drop": 1}


def test_what_cannot_be_recorded_is_named_and_leaves_no_half_line(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    with pytest.raises(UsageError, match=r"tokens cannot be recorded.*got 'many'"):
        collector.batch(step(1, tokens="many"))
    with pytest.raises(UsageError, match="step cannot be recorded"):
        collector.validation(-1, 2.0, None)
    with pytest.raises(UsageError, match="facts cannot be recorded"):
        collector.event(1, "odd", thing=object)
    with pytest.raises(UsageError, match="summary cannot be recorded"):
        collector.finish({"thing": object})
    collector.batch(step(1))
    assert kinds(tmp_path) == [("batch", 1)]
    collector.finish({})
    with pytest.raises(UsageError, match="is closed"):
        collector.batch(step(2))
    collector.close()


def test_another_run_is_not_written_over(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    collector.close()
    collector = MetricsCollector(tmp_path, SETTINGS)  # nothing was recorded
    collector.batch(step(1))
    collector.close()
    with pytest.raises(UsageError, match="holds the records of another run; resume it"):
        MetricsCollector(tmp_path, SETTINGS)
    assert kinds(tmp_path) == [("batch", 1)]
    MetricsCollector(tmp_path, SETTINGS, resume_step=0).close()
    assert kinds(tmp_path) == [("event", 0)]


def test_a_resumed_run_drops_what_came_behind_its_step(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    for n in range(1, 8):
        collector.batch(step(n))
        if n % 2 == 0:
            collector.validation(n, 3.0, 0.5)
            collector.sample(n, "a", "b")
    collector.epoch(epoch(0, step=5))
    collector.event(5, "switched on", component="qat")
    collector.close()
    before = (tmp_path / RECORDS_NAME).read_bytes().splitlines(keepends=True)
    MetricsCollector(tmp_path, SETTINGS, resume_step=5).close()
    after = (tmp_path / RECORDS_NAME).read_bytes().splitlines(keepends=True)
    assert after[:-1] == [line for line in before if json.loads(line)["step"] <= 5]
    resume = json.loads(after[-1])
    assert resume["event"] == "resume" and resume["step"] == 5
    assert resume["facts"] == {"from_step": 5, "dropped": 4, "unreadable": 0}
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS_NAME]  # nothing temporary stays


def test_a_resume_without_records_and_two_resumes(tmp_path: Path) -> None:
    for n in (3, 3, 9):
        MetricsCollector(tmp_path, SETTINGS, resume_step=n).close()
    assert kinds(tmp_path) == [("event", 3), ("event", 3), ("event", 9)]
    assert read_report(write_report(tmp_path, {})).metadata.resumes == 3


@pytest.mark.parametrize("cut", [1, 2, 17])
@pytest.mark.parametrize(
    "torn", [b"", b"\0" * 4096, b"\xff\xfe{", b'{"kind": "batch"}\n[1]\n'], ids=["cut", "nul", "bytes", "other"]
)
def test_a_torn_end_is_dropped(tmp_path: Path, cut: int, torn: bytes) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    for n in range(1, 6):
        collector.batch(step(n))
    collector.close()
    path = tmp_path / RECORDS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] + torn)
    collector = MetricsCollector(tmp_path, SETTINGS, resume_step=5)
    collector.batch(step(6))
    collector.close()
    assert kinds(tmp_path) == [*(("batch", n) for n in (1, 2, 3, 4)), ("event", 5), ("batch", 6)]
    assert lines(tmp_path)[4]["facts"]["unreadable"] == max(1, torn.count(b"\n"))


def test_a_failing_rewrite_leaves_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    for n in range(1, 6):
        collector.batch(step(n))
    collector.close()
    before = (tmp_path / RECORDS_NAME).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"cannot write .*metrics\.jsonl.*No space left"):
        MetricsCollector(tmp_path, SETTINGS, resume_step=2)
    assert (tmp_path / RECORDS_NAME).read_bytes() == before
    with pytest.raises(ResourceError, match=r"cannot write the report of .*No space left"):
        write_report(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS_NAME]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    """Killed in the middle of writing as fast as it can: every line is whole, and steps have no gap."""
    code = f"""
from ryzen_compile.train.config import MetricsSettings
from ryzen_compile.train.metrics import BatchMetrics, MetricsCollector
collector = MetricsCollector({str(tmp_path)!r}, MetricsSettings())
for n in range(1, 10**9):
    collector.batch(BatchMetrics(n, 0.0, n, 3.0, None, 1e-3, 1.0, 1000.0, 0.1, 1))
    if n == 500:
        print("going", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "going\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    written = [line for line in lines(tmp_path) if line["kind"] == "batch"]
    assert [line["step"] for line in written] == list(range(1, len(written) + 1)) and len(written) >= 500


def test_a_resumed_run_flags_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def losses(n: int) -> float:
        return 30.0 if n in (55, 58, 90) else 3.0

    settings = MetricsSettings(window=30)
    straight = MetricsCollector(tmp_path / "straight", settings)
    expected = [a for n in range(1, 101) for a in straight.batch(step(n, loss=losses(n)))]
    straight.close()
    first = MetricsCollector(tmp_path / "run", settings)
    found = [a for n in range(1, 57) for a in first.batch(step(n, loss=losses(n)))]
    state = json.loads(json.dumps(first.state(), allow_nan=False))
    first.close()
    second = MetricsCollector(tmp_path / "run", settings, resume_step=56)
    second.restore(state)
    found += [a for n in range(57, 101) for a in second.batch(step(n, loss=losses(n)))]
    second.close()
    assert found == expected and [a.step for a in found] == [55, 90]


def test_the_report_says_what_the_records_say(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    run = [
        step(n, accuracy=None if n % 3 else n / 1000, gradient_norm=NAN if n == 7 else 1 + n * 7 % 11)
        for n in range(1, 402)
    ]
    for metrics in run:
        collector.batch(metrics)
    for n, loss in ((100, 3.5), (200, 3.2), (300, NAN), (400, 3.3)):
        collector.validation(n, loss, 0.4)
    collector.epoch(epoch(0, step=401))
    collector.sample(401, "a", "b")
    path = collector.finish({"stopped": "steps", "seconds": 12.5})
    report = read_report(path)
    assert path == tmp_path / REPORT_NAME and report.schema_version == 1
    for name in FIGURES:
        values = [v for m in run if (v := getattr(m, name)) is not None and math.isfinite(v)]
        figure = report.statistics.figures[name]
        assert (figure.count, figure.min, figure.max) == (len(values), min(values), max(values))
        assert figure.median == statistics.median(values)
        assert figure.mean == pytest.approx(statistics.fmean(values), rel=1e-12)  # another order of sums
        assert figure.not_finite == (name == "gradient_norm")
    totals = report.statistics.totals
    assert (totals.steps, totals.tokens) == (401, 64 * 401)
    assert totals.recorded_seconds == pytest.approx(401 * 0.064)
    assert (totals.lowest_validation_loss, totals.lowest_validation_step) == (3.2, 200)
    assert report.statistics.records == {
        "batch": 401, "validation": 4, "epoch": 1, "event": 0, "anomaly": 2, "sample": 1
    }  # fmt: skip
    sampled = [record.step for record in report.batches]
    assert len(sampled) == SAMPLED_BATCHES and (sampled[0], sampled[-1]) == (1, 401)
    assert {b - a for a, b in pairwise(sampled)} == {2, 3}
    assert [record.step for record in report.validations] == [100, 200, 300, 400]
    assert report.epochs[0].step == 401 and report.samples[0].text == "b"
    assert report.summary == {"stopped": "steps", "seconds": 12.5}
    rows = table(tmp_path)
    assert list(rows[0]) == list(COLUMNS) == list(report.metadata.columns) and len(rows) == 401
    assert [int(row["step"]) for row in rows] == list(range(1, 402))
    assert all(float(row["loss"]) == metrics.loss for row, metrics in zip(rows, run, strict=True))
    assert rows[6]["gradient_norm"] == "NaN" and rows[0]["accuracy"] == "" and float(rows[2]["accuracy"]) == 0.003


@pytest.mark.parametrize("count", [0, 1, 2, SAMPLED_BATCHES - 1, SAMPLED_BATCHES, SAMPLED_BATCHES + 1])
def test_batches_are_sampled_only_where_there_are_too_many(tmp_path: Path, count: int) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    for n in range(1, count + 1):
        collector.batch(step(n))
    report = read_report(collector.finish({}))
    found = [record.step for record in report.batches]
    assert len(found) == len(set(found)) == min(count, SAMPLED_BATCHES) and found == sorted(found)
    assert not count or (found[0], found[-1]) == (1, count)
    assert len(table(tmp_path)) == count
    assert (report.metadata.first_record is None) == (count == 0)
    if count == 2:
        assert report.statistics.figures["loss"].median == (step(1).loss + step(2).loss) / 2


def test_long_lists_are_thinned_and_counted(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    for n in range(LISTED + 500):
        collector.event(n, "odd")
    report = read_report(collector.finish({}))
    assert len(report.events) == LISTED and (report.events[0].step, report.events[-1].step) == (0, LISTED + 499)
    assert report.statistics.records["event"] == LISTED + 500


def test_lines_that_are_no_records_are_left_out_and_counted(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    collector.batch(step(1))
    collector.close()
    with (tmp_path / RECORDS_NAME).open("ab") as stream:
        stream.write(b'{"kind": "other", "step": 2, "time": 0}\n{"kind": "batch", "step": 2}\n\nnull\n{"kind": "ba')
    report = read_report(write_report(tmp_path, {}))
    assert report.metadata.unreadable_lines == 5 and [record.step for record in report.batches] == [1]


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """Ten times the records: the peak grows by less than a tenth of what these ten times hold."""
    peaks, sizes = [], []
    for count in (1000, 10_000):
        directory = tmp_path / str(count)
        directory.mkdir()
        record = BatchRecord(time=0.0, **asdict(step(1))).model_dump_json().encode() + b"\n"
        (directory / RECORDS_NAME).write_bytes(record * count)
        tracemalloc.start()
        write_report(directory, {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(len(record) * count)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 10


def test_a_report_of_another_schema_is_refused(tmp_path: Path) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    path = collector.finish({})
    good = json.loads(path.read_text())

    def refused(match: str, change: Callable[[dict], object]) -> None:
        tree = json.loads(json.dumps(good))
        change(tree)
        path.write_text(json.dumps(tree))
        with pytest.raises(ArtifactError, match=match):
            read_report(path)

    refused("schema_version: Input should be 1, got '2'", lambda tree: tree.update(schema_version=2))
    refused("epochs: Field required", lambda tree: tree.pop("epochs"))
    refused("extra: Extra inputs", lambda tree: tree.update(extra=1))
    path.write_bytes(b"{")
    with pytest.raises(ArtifactError, match="is no training report"):
        read_report(path)
    with pytest.raises(ResourceError, match="cannot read"):
        read_report(tmp_path / "nothing")


def test_the_json_schema_describes_what_is_written(tmp_path: Path) -> None:
    schema = report_schema()
    batch = schema["$defs"]["BatchRecord"]
    assert {"enum": ["NaN", "Infinity", "-Infinity"]} in batch["properties"]["loss"]["anyOf"]
    assert batch["properties"]["loss"]["description"] == "nats per token" and batch["additionalProperties"] is False
    tree = json.loads(MetricsCollector(tmp_path, SETTINGS).finish({}).read_text())
    assert set(tree) == set(schema["properties"])
    validator = pytest.importorskip("jsonschema")
    collector = MetricsCollector(tmp_path, SETTINGS, resume_step=0)
    collector.batch(step(1, loss=NAN))
    validator.validate(json.loads(collector.finish({}).read_text()), schema)


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = MetricsCollector(tmp_path, SETTINGS)
    collector.batch(step(1))
    collector.finish({"run": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stopped(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics_report, "_build", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, {"run": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_replacing_keeps_links_out_of_it(tmp_path: Path) -> None:
    """The name is replaced, not what a link of that name points to."""
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "name").symlink_to(tmp_path / "other")
    with replacing(tmp_path / "name") as stream:
        stream.write(b"new")
    assert (tmp_path / "other").read_text() == "untouched" and (tmp_path / "name").read_text() == "new"


def test_trackers_get_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    collector = MetricsCollector(tmp_path, MetricsSettings(every=2, trackers=("tensorboard",)))
    for n in range(1, 5):
        collector.batch(step(n, accuracy=None))
    collector.validation(4, 2.5, 0.5)
    collector.epoch(epoch(0, step=4, speedups={"qat": 0.75}, quality={"qat": 0.25}))
    collector.finish({})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == [(n, pytest.approx(3 + 1 / n)) for n in (1, 2, 4)]
    assert found["validation/loss"] == [(4, 2.5)] and found["validation/accuracy"] == [(4, 0.5)]
    assert found["epoch/speedups/qat"] == [(4, 0.75)] and found["epoch/quality/qat"] == [(4, 0.25)]
    assert "train/accuracy" not in found and "train/step" not in found and "epoch/ttft_seconds" not in found


def test_a_tracker_whose_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=re.escape("needs the package trackio")):
        MetricsCollector(tmp_path, MetricsSettings(trackers=("trackio",)))
    MetricsCollector(tmp_path, SETTINGS).close()  # nothing is in the way afterwards


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / RECORDS_NAME).symlink_to("/dev/full")
    collector = MetricsCollector(tmp_path, SETTINGS)
    with pytest.raises(ResourceError, match="No space left"):
        collector.batch(step(1))
    collector.close()
