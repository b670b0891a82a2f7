"""Training runs that are killed, stopped or run out of disk, each in a fork of a process that has trained once.

One JSON object a line is read from standard input: ``do`` names a function, the rest are its arguments. One is
answered: ``status`` is how the fork ended, as ``subprocess`` counts (-9: killed), ``seconds`` what it took of a
processor. Random moments are counted in that time, which a busy machine does not change.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before any library reads them; fork and the tokenizers' threads do not go together.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml

from ryzen_compile import cli
from ryzen_compile.publish import Staging
from ryzen_compile.train import metrics_report  # noqa: F401 - imported before the first fork, as all that a run needs
from ryzen_compile.train.checkpoint import Checkpoints
from ryzen_compile.train.controller import OptimizationController
from ryzen_compile.train.loop import Scores, Trainer
from ryzen_compile.train.metrics import MetricsCollector
from ryzen_compile.train.metrics_schema import CSV_NAME, RECORDS_NAME, REPORT_NAME
from ryzen_compile.workflow import trained_model, training
from tests.train.checkpoint_child import OK, mount_small_disk
from tests.train.tiny_run import tiny_config

Applies = Callable[..., bool]
LONGEST = 300.0  # seconds of a processor: a run that hangs


def always(*_: object, **__: object) -> bool:
    return True


def becomes(name: str) -> Applies:
    return lambda source, target: Path(target).name == name


# Where something can be done to a run: as one of these functions is called.
MOMENTS: dict[str, tuple[Any, str, Applies]] = {
    "text": (training, "prepare_text", always),
    "records": (os, "replace", becomes(RECORDS_NAME)),
    "step": (Trainer, "forward_backward", always),
    "record": (MetricsCollector, "batch", always),
    "validation": (Trainer, "validate", always),
    "epoch": (OptimizationController, "end_epoch", always),
    "exact validation": (Trainer, "validate", lambda *_, exact=False, **__: exact),
    "model": (trained_model, "save_model", always),
    "model is published": (Staging, "commit", lambda stage, *_: stage.out.name == training.MODEL),
    "table": (os, "replace", becomes(CSV_NAME)),
    "report": (os, "replace", becomes(REPORT_NAME)),
}


# --- what is done to a run --------------------------------------------------------------------------------------------
def at(moment: str, count: int, action: Callable[[], None]) -> None:
    """Has ``action`` called the ``count``-th time that ``moment`` comes, one of MOMENTS or "save NAME", a step of a
    checkpoint's writing."""
    left = count

    def reached() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            action()

    if moment.startswith("save "):
        plain_init, step = Checkpoints.__init__, moment.removeprefix("save ")
        Checkpoints.__init__ = lambda *a, **k: plain_init(*a, **k, on_step=lambda s: reached() if s == step else None)
        return
    owner, name, applies = MOMENTS[moment]
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if applies(*args, **kwargs):
            reached()
        return plain(*args, **kwargs)

    setattr(owner, name, call)


def send(names: Sequence[str]) -> None:
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill(filler: Path) -> None:
    """Takes what is free of the disk that ``filler`` is on."""
    with filler.open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)):
                pass
        except OSError:
            return


def poison(first: int, last: int, component: str | None) -> None:
    """Gradients of steps ``first`` to ``last`` are NaN, with ``component`` only while that is on."""
    plain = Trainer.forward_backward

    def poisoned(self: Trainer, rows: torch.Tensor) -> torch.Tensor:
        sums = plain(self, rows)
        on = [c.name for c in self.controller.components if c.active]
        if first <= self.step + 1 <= last and (component is None or component in on):
            next(p for p in self.objective.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return sums

    Trainer.forward_backward = poisoned


def poison_validation(step: int) -> None:
    """What is found after ``step`` is NaN, as where activations overflow."""
    plain = Trainer._score
    nothing = Scores(float("nan"), 0.0, 0.0)
    Trainer._score = lambda self, rows: nothing if self.step == step else plain(self, rows)


# --- cases ------------------------------------------------------------------------------------------------------------
def command(
    directory: Path,
    arguments: Sequence[str],
    signals: Sequence[str] = (),
    moment: str | None = None,
    count: int = 1,
    gradients: tuple[int, int, str | None] | None = None,
    validation: int | None = None,
) -> int:
    """The command line, with what it writes in ``directory``: "out" and "err". At ``moment`` it gets ``signals``."""
    if moment is not None:
        at(moment, count, partial(send, signals))
    if gradients is not None:
        poison(*gradients)
    if validation is not None:
        poison_validation(validation)
    return written(directory, arguments)


def run_out_of_space(
    directory: Path, kept: Path, arguments: Sequence[str], moment: str, count: int, size: int | None
) -> int:
    """The run in ``directory`` has no more space from ``moment`` on: no file may grow beyond ``size`` bytes, or its
    disk, of 1 MiB, is full. What is there then is copied to ``kept``/"stopped". With space again it is resumed, and
    copied to ``kept``/"resumed": other processes do not see that disk. SKIPPED where there may be none."""
    filler = directory / "filler"
    if size is None:
        mount_small_disk(directory)
    at(moment, count, partial(fill, filler) if size is None else partial(limit_file_size, size))
    for name, more in (("stopped", ()), ("resumed", ("--resume",))):
        (kept / name).mkdir()
        status = written(kept / name, [*arguments, *more])
        (kept / name / "status").write_text(str(status))
        limit_file_size(resource.RLIM_INFINITY)
        filler.unlink(missing_ok=True)
        shutil.copytree(directory, kept / name / "run")
    return OK


def written(directory: Path, arguments: Sequence[str]) -> int:
    """Runs the command line with its output in files; returns its status."""
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    return cli.main(list(arguments))


CASES: dict[str, Callable[..., int]] = {"command": command, "run_out_of_space": run_out_of_space}


# --- forks ------------------------------------------------------------------------------------------------------------
def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Forks, runs the case, kills it with ``seconds`` once it has had so many of a processor."""
    do, seconds = CASES[case.pop("do")], case.pop("seconds", None)
    paths = {name: Path(case.pop(name)) for name in ("directory", "kept") if name in case}
    child = os.fork()
    if child == 0:
        status = 99
        try:
            # The suite may have been started in the background of a shell, where these are ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            status = do(**paths, **case)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent would
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    kill_after(child, LONGEST if seconds is None else seconds)
    _, status, usage = os.wait4(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime}


def kill_after(child: int, seconds: float) -> None:
    """Returns when ``child`` has ended, if killed, not yet waited for."""
    clock = (~child << 3) | 2  # that of another process: clock_getcpuclockid(3), which Python lacks
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= seconds:
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(0.0005)


def write_config(directory: Path, changes: dict[str, Any]) -> Path:
    """``tiny_config`` as a file."""
    path = directory / "run.yaml"
    settings = tiny_config(directory, **changes).model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def warm_up() -> None:
    """Trains once, so that no fork has to import anything."""
    with tempfile.TemporaryDirectory() as name:
        config = write_config(Path(name), {})
        saved = os.dup(1)
        os.dup2(2, 1)  # standard output is for answers
        status = cli.main(["train", "--config", str(config)])
        os.dup2(saved, 1)
        os.close(saved)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if status or threads != 1:
        raise SystemExit(f"trained with status {status}, left {threads} threads")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("default")  # the command line shows ours, and which come is tested
    warm_up()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)  # noqa: T201
