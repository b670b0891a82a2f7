"""An engine's memory in a process of its own: what is counted, and what becomes of children that do not answer."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.validate import footprint
from ryzen_compile.validate.footprint import Footprint, Unmeasured, measure_footprint
from tests.model_directory import TOKENS, shared_artifact

MIB = 1 << 20
PROMPT = [3, 1, 4, 1, 5, 9, 2]


# --- children that die ------------------------------------------------------------------------------------------------
@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Measures with a child that runs the given code instead."""

    def measure(code: str, timeout: float = 60.0) -> Footprint | Unmeasured:
        monkeypatch.setattr(footprint, "_command", lambda: [sys.executable, "-I", "-S", "-c", code])
        return measure_footprint("artifact", tmp_path, prompt=PROMPT, new_tokens=2, threads=1, timeout=timeout)

    return measure


KILLED = """
import os, signal, sys
print("half an answer")
sys.stderr.write({!r})
sys.stderr.flush()
os.kill(os.getpid(), signal.{})
"""


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_child_that_was_killed_is_named_by_its_signal(replaced, signal: str) -> None:
    assert replaced(KILLED.format("", signal)) == Unmeasured(f"it ended in {signal}")


def test_the_last_that_a_child_said_is_kept(replaced) -> None:
    found = replaced(KILLED.format("a warning\nout of \x1b[31mmemory\n\n", "SIGKILL"))
    assert found == Unmeasured(r"it ended in SIGKILL: 'out of \x1b[31mmemory'")
    found = replaced("raise SystemExit('there is no such thing')")
    assert found == Unmeasured("it ended with status 1: 'there is no such thing'")


def test_an_ending_without_a_name() -> None:
    assert footprint._ending(-250, "") == "it ended in signal 250"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "its last line is ''"),
        ("print('done')", "its last line is 'done'"),
        ("print('{}')", "its last line is '{}'"),
        ("""print('{"peak_total_bytes": 1}')""", "its last line is "),
    ],
)
def test_a_child_that_gives_no_answer(replaced, code: str, said: str) -> None:
    found = replaced(code)
    assert isinstance(found, Unmeasured) and found.reason.startswith("it ended without an answer, " + said)


def test_an_answer_is_the_last_line(replaced) -> None:
    wanted = Footprint(
        kind="artifact", start_bytes=5, peak_total_bytes=12, mean_total_bytes=8, peak_is_exact=True, seconds=0.25
    )
    found = replaced(f"print('a library says hello'); print({wanted.model_dump_json()!r})")
    assert found == wanted
    assert (wanted.peak_above_start_bytes, wanted.mean_above_start_bytes) == (7, 3)


def test_what_is_asked_of_the_child(replaced) -> None:
    found = replaced("import sys; sys.exit(sys.stdin.read())")
    assert isinstance(found, Unmeasured)
    asked = json.loads(found.reason.removeprefix("it ended with status 1: ").strip("'"))
    assert (asked["kind"], asked["prompt"], asked["new_tokens"], asked["threads"]) == ("artifact", PROMPT, 2, 1)
    assert Path(asked["path"]).is_absolute()


def test_a_child_that_hangs_is_killed(replaced, tmp_path: Path) -> None:
    # Long enough for an interpreter to start on a busy machine, and no longer than that.
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    began = time.monotonic()
    assert replaced(code, timeout=3.0) == Unmeasured("no answer within 3 s: killed")
    assert time.monotonic() - began < 300, "it was not waited for"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(footprint, "_command", lambda: [str(tmp_path / "absent")])
    found = measure_footprint("artifact", tmp_path, prompt=PROMPT, new_tokens=2, threads=1)
    assert isinstance(found, Unmeasured) and found.reason.startswith("no process could be started: ")


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "onnx"}, "unknown kind 'onnx'; kinds are artifact, huggingface"),
        ({"path": "tinyllama-1.1b"}, "'tinyllama-1.1b' is no directory, .*; save or export the model first"),
        ({"path": __file__}, "is no directory"),
        ({"prompt": []}, r"at least one token id, all of them at least 0, got \[\]"),
        ({"prompt": [4, -1]}, r"got \[4, -1\]"),
        ({"new_tokens": 0}, "got 0, 1 and 600.0"),
        ({"threads": 0}, "got 1, 0 and 600.0"),
        ({"timeout": 0}, "got 1, 1 and 0"),
        ({"timeout": float("nan")}, "got 1, 1 and nan"),
    ],
)
def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict, said: str) -> None:
    monkeypatch.setattr(footprint, "_command", lambda: pytest.fail("a process was started"))
    asked = {"kind": "artifact", "path": tmp_path, "prompt": PROMPT, "new_tokens": 1, "threads": 1, **given}
    with pytest.raises(UsageError, match=said):
        measure_footprint(asked.pop("kind"), asked.pop("path"), **asked)


# --- the mean ---------------------------------------------------------------------------------------------------------
def test_the_mean_is_that_over_time() -> None:
    assert footprint._mean_over_time([(5.0, 10), (6.0, 10), (8.0, 40)]) == 20  # (1 x 10 + 2 x 25) / 3
    # Nothing but more samples of the same line.
    assert footprint._mean_over_time([(5.0, 10), (5.1, 10), (5.2, 10), (6.0, 10), (7.0, 25), (8.0, 40)]) == 20


def test_samples_are_taken_while_something_is_held() -> None:
    with footprint._sampled() as samples:
        kept = np.full(64 * MIB, 1, np.uint8)
        until = time.monotonic() + 30
        while len(samples) < 6 and time.monotonic() < until:
            time.sleep(footprint.SAMPLE_SECONDS)
        del kept
    moments, sizes = zip(*samples, strict=True)
    assert len(samples) >= 7 and list(moments) == sorted(moments)
    assert max(sizes) - sizes[0] > 60 * MIB > footprint._mean_over_time(samples) - sizes[0] > 0
    count = len(samples)
    time.sleep(5 * footprint.SAMPLE_SECONDS)
    assert len(samples) == count, "nobody takes samples any more"


# --- the real thing ---------------------------------------------------------------------------------------------------
def measured(found: Footprint | Unmeasured) -> Footprint:
    assert isinstance(found, Footprint), found
    return found


def plausible(found: Footprint) -> None:
    assert 0 < found.start_bytes < found.peak_total_bytes and found.seconds > 0
    # The two are counted by different registers of the kernel, which may be some pages per thread apart.
    assert found.mean_total_bytes < found.peak_total_bytes + 4 * MIB
    assert found.mean_above_start_bytes > 0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_artifact(tmp_path_factory)


@pytest.fixture(scope="module")
def of_artifact(artifact: Path) -> Footprint:
    return measured(measure_footprint("artifact", artifact, prompt=PROMPT, new_tokens=3, threads=1))


def test_an_artifact(of_artifact: Footprint) -> None:
    plausible(of_artifact)
    assert of_artifact.kind == "artifact"
    assert of_artifact.peak_above_start_bytes < 400 * MIB, "a model of some kilobytes: what was loaded is not its own"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": [3] * 159}, "context of 160 tokens"),
        ({"prompt": [TOKENS]}, "indices element out of data bounds|INVALID_ARGUMENT"),
    ],
)
def test_an_artifact_that_cannot_do_it(artifact: Path, changes: dict, said: str) -> None:
    found = measure_footprint("artifact", artifact, **{"prompt": PROMPT, "new_tokens": 3, "threads": 1, **changes})
    assert isinstance(found, Unmeasured) and found.reason.startswith("it ended with status 1: ")
    assert re.search(said, found.reason), found.reason


def test_a_directory_that_holds_no_model(tmp_path: Path) -> None:
    found = measure_footprint("artifact", tmp_path, prompt=PROMPT, new_tokens=1, threads=1)
    assert isinstance(found, Unmeasured)
    assert re.match(r"it ended with status 1: .ryzen_compile\.errors\.ArtifactError: .* holds no ", found.reason)


def test_weights_are_seen_and_imports_are_not(tmp_path: Path, of_artifact: Footprint) -> None:
    """A model of 32 MiB takes as much and not several times it; importing PyTorch, which takes more, does not count."""
    from tests.model_directory import case_named, write_model
    from tests.zoo import build

    model = build(case_named("llama", vocab_size=1 << 16, tie_word_embeddings=False))
    write_model(tmp_path, model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 32 * MIB < weights < 34 * MIB
    found = measured(measure_footprint("huggingface", tmp_path, prompt=PROMPT, new_tokens=3, threads=1))
    plausible(found)
    assert found.start_bytes > of_artifact.start_bytes + 50 * MIB, "the artifact's process does without PyTorch"
    if found.peak_is_exact:
        assert 0.9 * weights < found.peak_above_start_bytes < found.start_bytes
