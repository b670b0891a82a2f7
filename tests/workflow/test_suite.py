"""What a report says of suites in which everything goes wrong that can: no test is lost, and no process is left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.workflow import report_schema, suite
from ryzen_compile.workflow.suite import run_suite

SECONDS = 120  # that any of these suites may take on a busy machine; none is meant to
STATUSES = ("passed", "failed", "error", "skipped")


@pytest.fixture(autouse=True)
def _no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this run was started with are not those of the runs inside it."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def written(directory: Path, **files: str) -> Path:
    """``directory``/suite with ``files``: a name for each, without its ending, and its content."""
    home = directory / "suite"
    for name, content in files.items():
        path = home / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(content), encoding="utf-8")
    return home


def by_name(report: Any) -> dict[str, Any]:
    found = {case.name: case for case in report.tests}
    assert len(found) == len(report.tests)
    return found


def statuses(report: Any) -> dict[str, str]:
    return {name: case.status for name, case in by_name(report).items()}


OUTCOMES = """
    import sys
    import unittest
    import numpy as np
    import pytest

    def test_passes(): pass

    def test_fails(): assert [1, 2] == [1, 3], "they differ"

    @pytest.fixture
    def broken(): raise RuntimeError("no fixture today")

    def test_without_its_fixture(broken): pass

    def test_with_an_unknown_fixture(nowhere): pass

    @pytest.fixture
    def untidy():
        yield
        raise RuntimeError("left a mess")

    def test_left_a_mess(untidy): pass

    def test_fails_and_leaves_a_mess(untidy): raise ValueError("first")

    @pytest.mark.skip(reason="not today")
    def test_skipped(): pass

    def test_skips_itself(): pytest.skip("nor now")

    @pytest.mark.xfail(reason="known")
    def test_expected_to_fail(): assert False

    @pytest.mark.xfail(strict=True, reason="was known")
    def test_fails_no_more(): pass

    @pytest.mark.parametrize("x", ["a b", "::", "<b>&amp;", "new\\nline", "größer", "\\udc80"])
    def test_names(x): pass

    class TestGroup:
        def test_inside(self): pass

    class Old(unittest.TestCase):
        def test_old(self): self.assertEqual(1, 2)

    def test_figures(record_property):
        for name, value in {
            "count": 3, "share": 0.25, "single": np.float32(1.5), "whole": np.int64(7), "yes": True, "none": None,
            "word": "9", "nan": float("nan"), "endless": -float("inf"), "list": [1, "a"], "array": np.arange(2),
            "strange": {(1, 2): 3},
        }.items():
            record_property(name, value)
        record_property("count", 4)

    def test_says_where_it_is():
        raise OSError(f"cannot open {__file__} under {sys.prefix}")
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[tuple[str, str]]]:
    """The suite, its report, and what was heard of it."""
    home = written(tmp_path_factory.mktemp("outcomes"), test_outcomes=OUTCOMES)
    heard: list[tuple[str, str]] = []
    return home, run_suite([home], timeout=SECONDS, progress=lambda *told: heard.append(told)), heard


def test_every_outcome_has_its_status_and_reason(outcomes: Any) -> None:
    found = by_name(outcomes[1])
    for name, status, message in (
        ("test_passes", "passed", ""),
        ("test_fails", "failed", "they differ"),
        ("test_without_its_fixture", "error", "no fixture today"),
        ("test_with_an_unknown_fixture", "error", "fixture 'nowhere' not found"),
        ("test_left_a_mess", "error", "left a mess"),
        ("test_fails_and_leaves_a_mess", "failed", "first"),
        ("test_skipped", "skipped", "not today"),
        ("test_skips_itself", "skipped", "nor now"),
        ("test_expected_to_fail", "skipped", "expected to fail: known"),
        ("test_fails_no_more", "failed", "[XPASS(strict)] was known"),
        ("TestGroup::test_inside", "passed", ""),
        ("Old::test_old", "failed", "1 != 2"),
        ("test_figures", "passed", ""),
    ):
        case = found[name]
        assert case.status == status and message in case.message and bool(case.message) == bool(message), case
        assert case.file == "suite/test_outcomes.py" and case.seconds >= 0


def test_the_rate_leaves_skipped_tests_out(outcomes: Any) -> None:
    report = outcomes[1]
    assert report.counts == {status: list(statuses(report).values()).count(status) for status in STATUSES}
    assert report.counts == {"passed": 9, "failed": 5, "error": 3, "skipped": 3}
    assert report.pass_rate == 9 / 17
    assert report.reason == "" and report.seconds > 0 and report.command.startswith("python -m pytest ")


def test_names_are_kept_printable(outcomes: Any) -> None:
    names = [name for name in statuses(outcomes[1]) if name.startswith("test_names[")]
    assert len(names) == 6 and all(name.isprintable() for name in names)
    assert {"test_names[a b]", "test_names[::]", "test_names[<b>&amp;]", "test_names[new\\nline]"} <= set(names)


def test_progress_hears_of_each_test_once(outcomes: Any) -> None:
    assert dict(outcomes[2]) == statuses(outcomes[1])
    assert len(outcomes[2]) == len(outcomes[1].tests)


def test_figures_keep_their_kind(outcomes: Any) -> None:
    found = by_name(outcomes[1])["test_figures"].properties
    whole = {"count": 4, "share": 0.25, "single": 1.5, "whole": 7, "yes": True, "none": None, "word": "9"}
    rest = {"nan": "NaN", "endless": "-Infinity", "list": [1, "a"], "array": "[0 1]", "strange": "{(1, 2): 3}"}
    assert found == whole | rest
    assert [type(found[name]) for name in whole] == [type(value) for value in whole.values()]


def test_messages_name_no_place_of_this_machine(outcomes: Any) -> None:
    home, report, _ = outcomes
    message = by_name(report)["test_says_where_it_is"].message
    assert message == "OSError: cannot open suite/test_outcomes.py under <python>"
    assert str(home) not in report.model_dump_json() and str(Path.home()) not in report.model_dump_json()


def test_a_report_comes_back_from_its_json(outcomes: Any) -> None:
    report = outcomes[1]
    text = report.model_dump_json()
    json.loads(text, parse_constant=pytest.fail)  # strict: numbers that JSON lacks are words
    assert report_schema.TestReport.model_validate_json(text) == report


def test_places_are_whole_parts_of_paths(tmp_path: Path) -> None:
    places = suite._Places([tmp_path / "suite"])
    for given, expected in (
        (f"in {tmp_path}/suite/a.py:3", "in suite/a.py:3"),
        (f"'{tmp_path}'", "'.'"),
        (f"{tmp_path}er/a", f"{places.cleared(str(tmp_path) + 'er')}/a"),
        (f"/data{Path.home()}/x", f"/data{Path.home()}/x"),
        ("a\x1b[31mred\udc80\nb", "a\\x1b[31mred\\udc80\nb"),
        ("", ""),
    ):
        assert places.cleared(given) == expected
    assert str(tmp_path) + "er" not in places.cleared(str(tmp_path)) and len(places.cleared("x" * 10_000)) == 2000


# --- runs that do not end by themselves -------------------------------------------------------------------------------
HANGING = """
    import signal, subprocess, sys, time
    from pathlib import Path

    def test_before(record_property): record_property("figure", 5)

    def test_hangs():
        if {deaf}:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        children = [subprocess.Popen(sleeper), subprocess.Popen(sleeper, start_new_session=True)]
        pids = Path(__file__).with_name("pids.tmp")
        pids.write_text(" ".join(str(child.pid) for child in children))
        pids.rename(pids.with_suffix(".txt"))
        time.sleep(600)

    def test_after(): pass
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # dead, and not yet asked how it ended
    except psutil.NoSuchProcess:
        return False


def expect_gone(home: Path) -> None:
    """Those that the hanging test started; signals take a moment to arrive."""
    pids = [int(pid) for pid in (home / "pids.txt").read_text().split()]
    assert len(pids) == 2
    end = time.monotonic() + SECONDS
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """``late(path)``: the suite's time is over as soon as ``path`` exists, and never before."""

    def arm(path: Path) -> None:
        clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: 1e9 * path.exists())
        monkeypatch.setattr(suite, "time", clock)

    return arm


@pytest.mark.parametrize("deaf", [False, True], ids=["interruptible", "deaf"])
def test_a_hanging_test_is_killed_and_the_others_are_kept(
    tmp_path: Path, late: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    home = written(tmp_path, test_hanging=HANGING.format(deaf=deaf))
    late(home / "pids.txt")
    if deaf:
        monkeypatch.setattr(suite, "_GRACE", 0.5)
    report = run_suite([home], timeout=77)
    expect_gone(home)
    found = by_name(report)
    assert statuses(report) == {"test_before": "passed", "test_hangs": "error", "test_after": "error"}
    assert found["test_before"].properties == {"figure": 5}
    assert found["test_hangs"].message == "not finished when stopped: stopped after 77 s"
    assert found["test_after"].message == "not started when stopped: stopped after 77 s"
    assert report.pass_rate == 1 / 3


def test_an_interruption_ends_the_suite(tmp_path: Path) -> None:
    home = written(tmp_path, test_hanging=HANGING.format(deaf=False))

    def interrupt(name: str, status: str) -> None:
        assert (name, status) == ("test_before", "passed")
        end = time.monotonic() + SECONDS
        while not (home / "pids.txt").exists() and time.monotonic() < end:
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite([home], timeout=SECONDS, progress=interrupt)
    expect_gone(home)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os._exit(0)", ""),
        ("os._exit(5)", ": no test was collected"),
        ("os.kill(os.getpid(), 9)", ": pytest was ended by SIGKILL"),
    ],
)
def test_a_test_that_ends_the_process_does_not_pass(tmp_path: Path, end: str, said: str) -> None:
    home = written(tmp_path, test_ends=f"import os\ndef test_ends(): {end}\ndef test_after(): pass\n")
    report = run_suite([home], timeout=SECONDS)
    assert statuses(report) == {"test_ends": "error", "test_after": "error"}
    assert by_name(report)["test_ends"].message == f"not finished when stopped{said}"
    assert report.pass_rate == 0


def test_an_end_that_no_test_explains_is_an_error(tmp_path: Path) -> None:
    home = written(
        tmp_path, test_one="def test_one(): pass", conftest="def pytest_sessionfinish(session): session.exitstatus = 9"
    )
    report = run_suite([home], timeout=SECONDS)
    assert statuses(report) == {"test_one": "passed", "pytest": "error"}
    assert by_name(report)["pytest"].message == "pytest ended with exit status 9"
    assert report.pass_rate == 0.5


def test_tests_behind_the_first_failure_are_not_forgotten(tmp_path: Path) -> None:
    home = written(tmp_path, test_two="def test_one(): assert 0\ndef test_two(): pass\n")
    report = run_suite([home], arguments=["-x"], timeout=SECONDS)
    assert statuses(report) == {"test_one": "failed", "test_two": "error"}
    assert "not started" in by_name(report)["test_two"].message


# --- runs without tests -----------------------------------------------------------------------------------------------
def test_a_file_that_cannot_be_imported_is_an_error_and_the_others_run(tmp_path: Path) -> None:
    home = written(
        tmp_path,
        **{
            "test_one": "def test_one(): pass",
            "deep/test_broken": "import nowhere_to_be_found",
            "deep/test_wrong": "def test_wrong(:",
            "test_absent": "import pytest\npytest.importorskip('nowhere_to_be_found')\ndef test_absent(): pass\n",
        },
    )
    report = run_suite([home], timeout=SECONDS)
    found = {(case.file, case.name): case for case in report.tests}
    assert {place: case.status for place, case in found.items()} == {
        ("suite/test_one.py", "test_one"): "passed",
        ("suite/deep/test_broken.py", "collection"): "error",
        ("suite/deep/test_wrong.py", "collection"): "error",
        ("suite/test_absent.py", "collection"): "skipped",
    }
    assert found["suite/deep/test_broken.py", "collection"].message.endswith("No module named 'nowhere_to_be_found'")
    assert "SyntaxError" in found["suite/deep/test_wrong.py", "collection"].message
    assert str(tmp_path) not in report.model_dump_json()
    assert report.pass_rate == 1 / 3


def test_paths_are_named_from_the_directory_around_each(tmp_path: Path) -> None:
    home = written(
        tmp_path, **{f"{name}/test_{name}": f"def test_{name}(): pass" for name in ("one", "two", "not_asked")}
    )
    report = run_suite([home / "one", home / "two" / "test_two.py"], timeout=SECONDS)
    assert [case.file for case in report.tests] == ["one/test_one.py", "test_two.py"]


@pytest.mark.parametrize(
    ("content", "arguments", "reason"),
    [
        ("def helper(): pass", (), "no test was collected"),
        ("def test_one(): pass", ("-k", "nothing"), "no test was collected"),
        ("import pytest\n@pytest.mark.skip\ndef test_one(): pass", (), "all 1 tests were skipped"),
        ("import pytest\npytest.skip('x', allow_module_level=True)", (), "all 1 tests were skipped"),
        ("def test_one(): pass", ("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ],
)
def test_without_a_test_there_is_no_rate(tmp_path: Path, content: str, arguments: tuple[str, ...], reason: str) -> None:
    report = run_suite([written(tmp_path, test_one=content)], arguments=arguments, timeout=SECONDS)
    assert report.pass_rate is None and reason in report.reason
    assert report.counts == dict.fromkeys(STATUSES, 0) | {"skipped": len(report.tests)}


def test_a_broken_conftest_says_why_nothing_ran(tmp_path: Path) -> None:
    report = run_suite([written(tmp_path, conftest="import nowhere", test_one="")], timeout=SECONDS)
    assert report.pass_rate is None and not report.tests
    assert "exit status 4" in report.reason and "No module named 'nowhere'" in report.reason
    assert str(tmp_path) not in report.reason


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = written(tmp_path, test_one="def test_one(): pass")
    report = run_suite([home, tmp_path / "absent"])
    assert report.pass_rate is None and report.reason == "there is no 'absent' to run" and not report.tests
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    report = run_suite([home])
    assert report.pass_rate is None and report.reason.startswith("pytest is not installed")


@pytest.mark.parametrize(("paths", "seconds"), [((), 1), ((Path("x"),), 0), ((Path("x"),), float("nan"))])
def test_a_suite_needs_a_path_and_time(paths: tuple[Path, ...], seconds: float) -> None:
    with pytest.raises(UsageError, match="a suite needs a path and a timeout above 0 s"):
        run_suite(paths, timeout=seconds)


LINES = """
    import pytest

    def pytest_collect_file(file_path, parent):
        if file_path.suffix == ".lines":
            return Lines.from_parent(parent, path=file_path)

    class Lines(pytest.File):
        def collect(self):
            for name in ("two\\nlines", "<script>", "a::b", "\\x1b[31mred", ""):
                yield Line.from_parent(self, name=name)

    class Line(pytest.Item):
        def runtest(self): raise ValueError("\\x07 no \\udc80")
"""


def test_names_and_messages_may_hold_anything(tmp_path: Path) -> None:
    home = written(tmp_path, conftest=LINES)
    (home / "some.lines").touch()
    report = run_suite([home], timeout=SECONDS)
    assert [case.name for case in report.tests][:4] == ["two\\nlines", "<script>", "a::b", "\\x1b[31mred"]
    assert len(report.tests) == 5 and report.counts["failed"] == 5
    assert all("\\x07 no \\udc80" in case.message for case in report.tests)
    assert report_schema.TestReport.model_validate_json(report.model_dump_json()) == report
