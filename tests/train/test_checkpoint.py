"""Checkpoints: what comes back is bitwise what was saved, whatever happened in between."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ryzen_compile.errors import BusyError, ModelError, ResourceError, TamperedError, UnsafeError, UsageError
from ryzen_compile.train import checkpoint_files
from ryzen_compile.train.checkpoint import STEPS, Checkpoints, Snapshot
from ryzen_compile.train.checkpoint_files import DTYPES, MANIFEST, MODEL, OPTIMIZER, STATE
from tests.train.checkpoint_child import OK, SKIPPED, newest_is, snapshot

KILLED = -signal.SIGKILL
Run = Callable[..., int]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is a place: hundreds of saves would wait for a disk each time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def run(repository: Path) -> Iterator[Run]:
    """Runs one function of ``checkpoint_child`` in a process of its own; returns how that ended."""
    script = repository / "tests" / "train" / "checkpoint_child.py"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def call(do: str, directory: Path, **arguments: Any) -> int:
            print(json.dumps({"do": do, "directory": str(directory), **arguments}), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield call
        process.stdin.close()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: Snapshot | None, expected: Snapshot) -> None:
    assert found is not None
    assert found.step == expected.step
    assert found.state == expected.state
    for got, want in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
        assert set(got) == set(want)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
            assert torch.equal(bits(got[name]), bits(tensor)), name


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def tiny(step: int, **tensors: Tensor) -> Snapshot:
    return Snapshot(step, tensors or {"w": torch.tensor([float(step)])}, {}, {"position": step})


def series(directory: Path, metrics: list[float | None], **settings: Any) -> Checkpoints:
    """A save at step 10, 20, ... with these metrics."""
    checkpoints = Checkpoints(directory, **settings)
    for i, metric in enumerate(metrics, start=1):
        checkpoints.save(tiny(10 * i), metric=metric)
    return checkpoints


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (5, 3)], ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Any pattern of bits, NaNs with their payload among them."""
    width = torch.empty((), dtype=dtype).element_size()
    count = torch.empty(shape, device="meta").numel()
    raw = torch.randint(256, (count * width,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    raw = raw & 1 if dtype == torch.bool else raw
    tensor = raw.view(dtype).reshape(shape)
    saved = Snapshot(3, {"t": tensor}, {"t": tensor.clone()}, {})
    path = Checkpoints(tmp_path).save(saved)
    assert_same(Checkpoints(tmp_path).load(path), saved)


def test_the_dtypes_are_all_that_the_format_has(tmp_path: Path) -> None:
    for dtype in DTYPES:
        checkpoint_files._write_tensors(tmp_path / "t", {"t": torch.empty(2, dtype=dtype)})
    with pytest.raises(KeyError, match="complex128"):
        checkpoint_files._write_tensors(tmp_path / "t", {"t": torch.empty(2, dtype=torch.complex128)})


def test_a_run_comes_back(tmp_path: Path) -> None:
    """Parameters, buffers, moments, generators, and JSON of every kind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3).to(torch.bfloat16).float())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    moments = {
        f"{i}.{name}": value for i, values in optimizer.state_dict()["state"].items() for name, value in values.items()
    }
    state = {
        "schedule": {"kind": "cosine", "warm": True, "last": None},
        "numbers": [0, -1, 2**200, 0.1, -0.0, 5e-324, 1.7976931348623157e308],
        "text": "é 😀 \x00 \ud800",
        "empty": [{}, [], ""],
    }
    saved = Snapshot(12, model.state_dict(), {**moments, "rng": torch.get_rng_state()}, state)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    path = checkpoints.save(saved, metric=1.5)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000012"
    assert sorted(entry.name for entry in path.iterdir()) == sorted([MODEL, OPTIMIZER, STATE, MANIFEST])
    found = checkpoints.newest()
    assert_same(found, saved)
    assert str(found.state["numbers"][4]) == "-0.0"
    assert hidden(checkpoints.directory) == []


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    table = nn.Parameter(torch.randn(40, 30))
    untied = table.detach().clone()  # equal, but another tensor
    saved = tiny(1, table=table, head=table, third=table.detach().view(40, 30), untied=untied)
    path = Checkpoints(tmp_path).save(saved)
    assert (path / MODEL).stat().st_size < 2.2 * table.nbytes
    found = Checkpoints(tmp_path).load(path)
    assert_same(found, saved)
    assert found.model["head"] is found.model["table"] is found.model["third"]
    assert found.model["untied"] is not found.model["table"]


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    saved = tiny(
        1,
        whole=base,
        transposed=base.T,
        rows=base[1:3],  # overlaps
        column=base[:, 2],
        same_start=base.view(-1)[:6],
        other_dtype=base.view(torch.int32),
        expanded=torch.tensor([1.0]).expand(5),
        conjugate=torch.tensor([1 + 2j]).conj(),
        negative=torch._neg_view(torch.tensor([1.0, -2.0])),
        empty=torch.empty(0),
        also_empty=torch.empty(0, 3),
    )
    Checkpoints(tmp_path).save(saved)
    assert_same(Checkpoints(tmp_path).newest(), saved)
    value = torch.tensor([1 + 2j])
    pair = tiny(2, plain=value, conjugate=value.conj())  # one address, two values
    Checkpoints(tmp_path).save(pair)
    assert_same(Checkpoints(tmp_path).newest(), pair)


def test_loaded_tensors_do_not_hang_on_the_files(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(snapshot(1))
    found = Checkpoints(tmp_path).load(path)
    with (path / MODEL).open("r+b") as stream:  # not replaced: the very bytes that a mapping would show
        stream.seek(200)
        stream.write(bytes(1000))
    assert_same(found, snapshot(1))


def test_saving_changes_nothing_of_the_run(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Checkpoints(tmp_path).save(tiny(1, **dict(model.named_parameters())))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"metrics": {"loss": [1.0, float("nan")]}}}, r"state\.metrics\.loss\[1\] is nan"),
        ({"state": {"a": float("-inf")}}, r"state\.a is -inf"),
        ({"state": {"a": {3: 1}}}, r"state\.a has the key '3', expected text"),
        ({"state": {"a": torch.tensor(1.0)}}, r"state\.a is a Tensor"),
        ({"state": {"a": b"x"}}, r"state\.a is a bytes"),
        ({"state": {"a": CIRCLE}}, "cannot be written: maximum recursion"),
        ({"state": {"a": 10**5000}}, "cannot be written: Exceeds the limit"),
        ({"model": {"w": torch.ones(2).to_sparse()}}, "model: tensor 'w' cannot be stored: torch.sparse_coo"),
        ({"model": {"w": torch.ones(2, device="meta")}}, "model: tensor 'w' cannot be stored: without data"),
        ({"optimizer": {"w": torch.ones(2).to(torch.complex128)}}, "optimizer: tensor 'w' .*complex128"),
        ({"optimizer": {"w": 3}}, "optimizer: tensor 'w' is a int, expected a tensor"),
        ({"model": {3: torch.ones(2)}}, "model: tensor '3' has a name that cannot be stored"),
        ({"model": {"__metadata__": torch.ones(2)}}, "'__metadata__' has a name"),
        ({"model": {"\ud800": torch.ones(2)}}, "has a name that cannot be stored"),
        ({"step": -1}, "expected a whole number from 0, got '-1'"),
        ({"step": True}, "got 'True'"),
        ({"step": 1.0}, r"got '1\.0'"),
        ({"step": 10**15}, "got '1000000000000000'"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {"step": 1, "model": {}, "optimizer": {}, "state": {}, **change}
    with pytest.raises(UsageError, match=message):
        Checkpoints(tmp_path / "new").save(Snapshot(**values))
    assert list(tmp_path.iterdir()) == []


# --- which stay -------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("metrics", "keep", "steps", "best"),
    [
        ([3.0, 2.0, 1.0], 1, [30], 30),
        ([1.0, 2.0, 3.0], 1, [10, 30], 10),
        ([1.0, 2.0, 3.0, 4.0], 2, [10, 30, 40], 10),
        ([2.0, 1.0, 1.0, 1.0], 1, [20, 40], 20),  # of equals the earliest
        ([2.0, None, None, None], 1, [10, 40], 10),
        ([None, None, None], 2, [20, 30], None),
        ([None, 5.0, None], 1, [20, 30], 20),
        ([NAN, 5.0, INF, -INF], 1, [20, 40], 20),
        ([NAN, INF], 2, [10, 20], None),
        ([-1.0, 0.0, -0.0], 1, [10, 30], 10),
        ([1.0, 2.0], 5, [10, 20], 10),
        ([2, 1, 3], 1, [20, 30], 20),
    ],
)
def test_the_last_and_the_best_stay(
    tmp_path: Path, metrics: list[float | None], keep: int, steps: list[int], best: int | None
) -> None:
    series(tmp_path, metrics, keep=keep)
    again = Checkpoints(tmp_path, keep=keep)  # another process: nothing is known but what is on the disk
    assert again.steps() == steps
    assert again.best() == (None if best is None else tmp_path / f"step-{best:08d}")
    assert_same(again.newest(), tiny(10 * len(metrics)))


def test_without_best_only_the_last_stay(tmp_path: Path) -> None:
    checkpoints = series(tmp_path, [1.0, 2.0, 3.0], keep=2, best=False)
    assert checkpoints.steps() == [20, 30]
    assert checkpoints.best() == tmp_path / "step-00000020"


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_steps_order_as_numbers(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (0, 99_999_999, 100_000_000):
        checkpoints.save(tiny(step))
    assert checkpoints.steps() == [0, 99_999_999, 100_000_000]
    assert_same(checkpoints.newest(), tiny(100_000_000))


def test_a_step_is_replaced(tmp_path: Path) -> None:
    checkpoints = series(tmp_path, [1.0])
    other = tiny(10, w=torch.ones(3))
    checkpoints.save(other, metric=2.0)
    assert checkpoints.steps() == [10]
    assert_same(checkpoints.newest(), other)
    assert hidden(tmp_path) == []


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    """A run that goes on from step 10 abandons 20 and 30: they must not be what it resumes from next time."""
    checkpoints = series(tmp_path, [1.0, 0.5, 0.25], keep=3)
    assert checkpoints.load(tmp_path / "step-00000010").step == 10
    with pytest.warns(UserWarning, match=r"step-000000[23]0 is of a later step than 15.*aside-1") as caught:
        checkpoints.save(tiny(15), metric=2.0)
    assert len(caught) == 2
    assert checkpoints.steps() == [10, 15]
    assert_same(checkpoints.newest(), tiny(15))
    assert_same(checkpoints.load(tmp_path / "step-00000030.aside-1"), tiny(30))
    assert checkpoints.best() == tmp_path / "step-00000010"


def test_nothing_yet(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        checkpoints = Checkpoints(directory)
        assert (checkpoints.newest(), checkpoints.steps(), checkpoints.best()) == (None, [], None)
    (tmp_path / "notes.txt").touch()
    for name in ("step-10", "step-000000010", "step-00000010.aside-1", "step-0000001x", "xstep-00000010"):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).newest() is None
    before = sorted(path.name for path in tmp_path.iterdir())
    Checkpoints(tmp_path).save(tiny(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "step-00000001"])
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"cannot list .*file': Not a directory"):
        Checkpoints(tmp_path / "file").newest()
    with pytest.raises(ResourceError, match=r"cannot make .*file': File exists"):
        Checkpoints(tmp_path / "file").save(tiny(1))


def test_steps_are_reported_in_their_order(tmp_path: Path) -> None:
    seen: list[str] = []
    checkpoints = Checkpoints(tmp_path, on_step=seen.append)
    checkpoints.save(tiny(1))
    assert tuple(seen) == STEPS
    checkpoints.newest()
    assert tuple(seen) == STEPS


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


def flip(name: str, at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[at] ^= 1
        (path / name).write_bytes(data)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def link(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).rename(path / "elsewhere")
        (path / name).symlink_to("elsewhere")

    return damage


def hard_link(path: Path) -> None:
    os.link(path / STATE, path / "another name")


def fifo(path: Path) -> None:
    (path / MODEL).unlink()
    os.mkfifo(path / MODEL)


def folder_instead(path: Path) -> None:
    (path / STATE).unlink()
    (path / STATE).mkdir()


def linked_directory(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a directory")


def foreign(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "thesis.txt").write_text("precious")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def other_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-00000010", path)


def rewrite(name: str, change: Callable[[Any], Any], *, honest: bool = True) -> Callable[[Path], None]:
    """Changes JSON; ``honest`` corrects the digest, as a hand that edits or a bug would: only the contents tell."""

    def damage(path: Path) -> None:
        value = change(json.loads((path / name).read_text()))
        (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        if honest and name != MANIFEST:
            correct_manifest(path)

    return damage


def correct_manifest(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    for name in (MODEL, OPTIMIZER, STATE):
        with (path / name).open("rb") as stream:
            manifest["files"][name]["sha256"] = checkpoint_files._sha256(stream)
        manifest["files"][name]["size"] = (path / name).stat().st_size
    (path / MANIFEST).write_text(json.dumps(manifest))


def bad_tensors(text: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / MODEL).write_bytes(len(text).to_bytes(8, "little") + text)
        correct_manifest(path)

    return damage


def aliased(name: str, stored: object) -> Callable[[Any], Any]:
    return lambda state: {**state, "aliases": {**state["aliases"], MODEL: {name: stored}}}


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda value: {name: item for name, item in value.items() if name != key}


def with_entry(**entry: object) -> Callable[[Any], Any]:
    return lambda manifest: {**manifest, "files": {**manifest["files"], MODEL: entry}}


DAMAGE: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "model truncated": (truncate(MODEL), TamperedError, r"model\.safetensors: expected \d+ bytes, got \d+"),
    "optimizer truncated": (truncate(OPTIMIZER), TamperedError, r"optimizer\.safetensors: expected \d+ bytes"),
    "state truncated": (truncate(STATE), TamperedError, r"state\.json: expected \d+ bytes"),
    "manifest truncated": (truncate(MANIFEST), ModelError, r"manifest\.json is not JSON"),
    "manifest emptied": (lambda path: os.truncate(path / MANIFEST, 0), ModelError, r"manifest\.json is not JSON"),
    "model, last bit": (flip(MODEL, -1), TamperedError, r"model\.safetensors: expected SHA-256"),
    "model, header bit": (flip(MODEL, 12), TamperedError, r"model\.safetensors: expected SHA-256"),
    "optimizer bit": (flip(OPTIMIZER, -1), TamperedError, r"optimizer\.safetensors: expected SHA-256"),
    "state bit": (flip(STATE, 30), TamperedError, r"state\.json: expected SHA-256"),
    "model missing": (remove(MODEL), TamperedError, r"model\.safetensors' is missing"),
    "optimizer missing": (remove(OPTIMIZER), TamperedError, r"optimizer\.safetensors' is missing"),
    "state missing": (remove(STATE), TamperedError, r"state\.json' is missing"),
    "manifest missing": (remove(MANIFEST), ModelError, r"holds no manifest\.json, so it is no checkpoint"),
    "model linked": (link(MODEL), UnsafeError, r"model\.safetensors' is a symbolic link"),
    "manifest linked": (link(MANIFEST), UnsafeError, r"manifest\.json' is a symbolic link"),
    "state hard linked": (hard_link, UnsafeError, r"state\.json' is a hard link"),
    "model a fifo": (fifo, UnsafeError, r"model\.safetensors' is a FIFO"),
    "state a directory": (folder_instead, UnsafeError, r"state\.json' is a directory"),
    "directory linked": (linked_directory, UnsafeError, r"step-00000020' is a symbolic link"),
    "a file": (file_instead, ModelError, r"step-00000020' is a file, expected a directory"),
    "foreign directory": (foreign, ModelError, r"holds no manifest\.json"),
    "empty directory": (empty, ModelError, r"holds no manifest\.json"),
    "another checkpoint's copy": (other_step, ModelError, r"step-00000020' holds step 10, expected 20"),
    "manifest huge": (
        rewrite(MANIFEST, lambda value: json.dumps(value) + " " * (1 << 16)),
        ModelError,
        r"manifest\.json is over the limit of 65536 bytes",
    ),
    "manifest a list": (rewrite(MANIFEST, lambda value: [value]), ModelError, "holds a list, expected an object"),
    "manifest deep": (rewrite(MANIFEST, lambda value: "[" * 60000), ModelError, r"manifest\.json is not JSON"),
    "manifest twice": (
        rewrite(MANIFEST, lambda value: json.dumps(value)[:-1] + ', "files": {}}'),
        ModelError,
        "a key is there twice",
    ),
    "newer schema": (
        rewrite(MANIFEST, lambda value: {**value, "schema_version": 2}),
        ModelError,
        r"manifest\.json has the schema '2', expected 1",
    ),
    "schema of another type": (
        rewrite(MANIFEST, lambda value: {**value, "schema_version": True}),
        ModelError,
        "has the schema 'True'",
    ),
    "no schema": (rewrite(MANIFEST, without("schema_version")), ModelError, "has the schema 'None'"),
    "no table": (rewrite(MANIFEST, without("files")), ModelError, "does not list exactly"),
    "a file too few": (
        rewrite(MANIFEST, lambda value: {**value, "files": without(STATE)(value["files"])}),
        ModelError,
        "does not list exactly",
    ),
    "a file too many": (
        rewrite(MANIFEST, lambda value: {**value, "files": {**value["files"], "../x": {}}}),
        ModelError,
        "does not list exactly",
    ),
    "no digest": (rewrite(MANIFEST, with_entry(size=3)), ModelError, "entry of model.safetensors does not hold"),
    "negative size": (rewrite(MANIFEST, with_entry(size=-1, sha256="0" * 64)), ModelError, "entry of model"),
    "size of another type": (rewrite(MANIFEST, with_entry(size=1.0, sha256="0" * 64)), ModelError, "entry of model"),
    "size of a giant": (rewrite(MANIFEST, with_entry(size=1 << 60, sha256="0" * 64)), TamperedError, "expected 1152"),
    "state not JSON": (rewrite(STATE, lambda value: "{"), ModelError, r"state\.json is not JSON"),
    "state with NaN": (
        rewrite(STATE, lambda value: json.dumps({**value, "state": {"x": NAN}})),
        ModelError,
        r"state\.json is not JSON: NaN",
    ),
    "state without a part": (rewrite(STATE, without("metric")), ModelError, r"state\.json holds .*, expected aliases"),
    "step of another type": (rewrite(STATE, lambda value: {**value, "step": "20"}), ModelError, "does not hold a step"),
    "metric out of range": (
        rewrite(STATE, lambda value: json.dumps({**value, "metric": 1}).replace('"metric": 1', '"metric": 1e999')),
        ModelError,
        "does not hold a step",
    ),
    "state a list": (rewrite(STATE, lambda value: {**value, "state": []}), ModelError, "does not hold a step"),
    "no aliases": (rewrite(STATE, lambda value: {**value, "aliases": {}}), ModelError, "does not hold a step"),
    "alias of nothing": (rewrite(STATE, aliased("head", "absent")), ModelError, "'head' is another name of 'absent'"),
    "alias of itself": (rewrite(STATE, aliased("w", "w")), ModelError, "'w' is another name of 'w'"),
    "alias of another type": (rewrite(STATE, aliased("head", 3)), ModelError, "does not hold a step"),
    "tensors not JSON": (bad_tensors(b"{]"), ModelError, r"model\.safetensors.*not JSON"),
    "tensors outside": (
        bad_tensors(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        ModelError,
        "outside the file's 0 bytes",
    ),
    "tensors of no torch dtype": (
        bad_tensors(b'{"w":{"dtype":"F6_E2M3","shape":[0],"data_offsets":[0,0]}}'),
        ModelError,
        r"model\.safetensors cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path: Path, name: str) -> None:
    damage, error, message = DAMAGE[name]
    checkpoints = series(tmp_path, [1.0, 0.5], keep=2)
    newest = tmp_path / "step-00000020"
    damage(newest)
    with pytest.raises(error, match=message) as caught:
        checkpoints.load(newest)
    assert "export" not in str(caught.value)
    with pytest.warns(UserWarning, match=rf"damaged checkpoint step-00000020: .*{message}.*step-00000010 is taken"):
        found = checkpoints.newest()
    assert_same(found, tiny(10))
    assert checkpoints.steps() == [10, 20]


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.filterwarnings("ignore:step-00000020 is no checkpoint")
def test_a_run_goes_on_over_a_damaged_checkpoint(tmp_path: Path, name: str) -> None:
    """It resumes from the one before and comes to the same step again; what is not a checkpoint's is not deleted."""
    checkpoints = series(tmp_path, [1.0, 0.5], keep=2)
    DAMAGE[name][0](tmp_path / "step-00000020")
    checkpoints.save(tiny(20), metric=0.5)
    assert_same(checkpoints.newest(), tiny(20))
    assert checkpoints.best() == tmp_path / "step-00000020"
    assert hidden(tmp_path) == []
    if name == "foreign directory":
        assert (tmp_path / "step-00000020.aside-1" / "thesis.txt").read_text() == "precious"
    if name == "directory linked":
        assert (tmp_path / "elsewhere" / MODEL).exists()


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        foreign_at = tmp_path / "step-00000010"
        foreign_at.mkdir()
        (foreign_at / "thesis.txt").write_text(str(number))
        with pytest.warns(UserWarning, match=f"is no checkpoint: renamed to step-00000010.aside-{number}"):
            Checkpoints(tmp_path).save(tiny(10))
        shutil.rmtree(foreign_at)
    assert [(tmp_path / f"step-00000010.aside-{i}" / "thesis.txt").read_text() for i in (1, 2)] == ["1", "2"]


def test_training_does_not_begin_anew_when_all_are_damaged(tmp_path: Path) -> None:
    checkpoints = series(tmp_path, [1.0, 0.5], keep=2)
    truncate(MODEL)(tmp_path / "step-00000010")
    remove(STATE)(tmp_path / "step-00000020")
    with pytest.raises(ModelError, match=r"step-00000020: 'state\.json' is missing.*; step-00000010: model\.safe"):
        checkpoints.newest()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_is_not_the_best(tmp_path: Path) -> None:
    checkpoints = series(tmp_path, [3.0, 2.0, 1.0], keep=3)
    flip(OPTIMIZER, -1)(tmp_path / "step-00000030")
    with pytest.warns(UserWarning, match=r"step-00000030: optimizer\.safetensors: .*; it is not the best"):
        assert checkpoints.best() == tmp_path / "step-00000020"
    flip(STATE, -1)(tmp_path / "step-00000020")
    flip(MODEL, -1)(tmp_path / "step-00000010")
    with pytest.warns(UserWarning, match="is not the best"):
        assert checkpoints.best() is None


def test_a_copy_under_another_step_is_not_the_best(tmp_path: Path) -> None:
    checkpoints = series(tmp_path, [2.0, 1.0], keep=1)
    shutil.copytree(tmp_path / "step-00000020", tmp_path / "step-00000005")
    assert checkpoints.best() == tmp_path / "step-00000020"
    checkpoints.save(tiny(30), metric=3.0)
    assert checkpoints.steps() == [5, 20, 30]


def test_a_damaged_checkpoint_is_no_reason_to_delete_a_whole_one(tmp_path: Path) -> None:
    checkpoints = series(tmp_path, [None, None], keep=2)
    remove(STATE)(tmp_path / "step-00000020")
    checkpoints.save(tiny(30))
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.save(tiny(40))
    assert checkpoints.steps() == [20, 30, 40]


def test_other_files_are_not_read(tmp_path: Path) -> None:
    checkpoints = series(tmp_path, [1.0])
    (tmp_path / "step-00000010" / "pytorch_model.bin").write_bytes(b"not to be opened")
    (tmp_path / "step-00000010" / "loop").symlink_to("loop")
    assert_same(checkpoints.newest(), tiny(10))


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
def test_a_disk_that_fails_to_read_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An older checkpoint would lose work for a fault that may pass."""
    checkpoints = series(tmp_path, [1.0, 0.5], keep=2)
    real = os.open

    def fails(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(ResourceError, match=f"cannot read .*{name}': Input/output error"):
        checkpoints.newest()


# --- death, a full disk, another writer -------------------------------------------------------------------------------


def prepared(directory: Path) -> Path:
    """Saves 100, 200 and 300, of which the first is the best; the next save deletes 200."""
    directory.mkdir()
    for step, metric in ((100, 1.0), (200, 200.0), (300, 300.0)):
        Checkpoints(directory, keep=2).save(snapshot(step), metric=metric)
    return directory


def assert_old_or_new(directory: Path, old: int, new: int) -> int:
    """Whole, bitwise, with the best still there; and the next save leaves nothing lying about."""
    checkpoints = Checkpoints(directory, keep=2)
    found = checkpoints.newest()
    assert found is not None and found.step in (old, new)
    assert_same(found, snapshot(found.step))
    assert checkpoints.best() == directory / "step-00000100"
    assert checkpoints.steps() in ([100, 200, old], [100, 200, old, new], [100, old, new], [100, old])
    checkpoints.save(snapshot(500), metric=500.0)
    assert hidden(directory) == []
    assert checkpoints.steps() == [100, found.step, 500]
    assert newest_is(directory, 500)
    return found.step


@pytest.mark.parametrize("name", STEPS)
def test_kill_at_every_step(tmp_path: Path, run: Run, name: str) -> None:
    directory = prepared(tmp_path / "run")
    assert run("kill_at_step", directory, step=400, name=name) == KILLED
    # What was left is a dead process's lock at least, except before the first and after the last was taken.
    assert (hidden(directory) != []) == (name != "sweep")
    assert assert_old_or_new(directory, 300, 400) == (400 if name == "prune" else 300)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", [400, 300])
def test_kill_at_every_call(tmp_path: Path, run: Run, step: int, exchange: bool) -> None:
    """At the first call that changes the disk, the second, ...: every eighth here, from another start each time."""
    first = {(400, True): 1, (400, False): 3, (300, True): 5, (300, False): 7}[step, exchange]
    template = prepared(tmp_path / "template")
    found, ends = set(), []
    for number in range(first, 1000, 8):
        directory = tmp_path / str(number)
        shutil.copytree(template, directory)
        ends.append(run("kill_at_call", directory, step=step, number=number, exchange=exchange))
        found.add(assert_old_or_new(directory, 300, step))
        if ends[-1] == OK:
            break
    assert ends == [KILLED] * (len(ends) - 1) + [OK]
    assert len(ends) > 5
    assert found == {300, step}


def test_kill_at_random_moments(tmp_path: Path, run: Run) -> None:
    """One directory, in which a save after the other is killed: every time the newest is whole, and never an older."""
    random_seconds = random.Random(0)
    directory = tmp_path / "run"
    Checkpoints(directory).save(snapshot(1), metric=1.0)
    step = 1
    for _ in range(20):
        assert run("save_for_ever", directory, seconds=0.005 + 0.1 * random_seconds.random()) == KILLED
        found = Checkpoints(directory).newest()
        assert found is not None and found.step >= step
        assert_same(found, snapshot(found.step))
        step = found.step
        assert Checkpoints(directory).best() is not None
    assert step > 1
    Checkpoints(directory, keep=1, best=False).save(snapshot(step + 1))
    assert [path.name for path in directory.iterdir()] == [f"step-{step + 1:08d}"]


@pytest.mark.parametrize("at", ["model", "optimizer", "state", "manifest", "publish", "prune"])
def test_a_disk_that_becomes_full(tmp_path: Path, run: Run, at: str) -> None:
    """A real one, of 1 MiB: what is asserted stands in ``checkpoint_child.fill_disk``."""
    end = run("fill_disk", tmp_path, at=at)
    if end == SKIPPED:
        pytest.skip("this kernel lets nobody mount a small disk")
    assert end == OK


@pytest.mark.parametrize(("limit", "file"), [(1000, MODEL), (4000, OPTIMIZER), (16000, STATE)])
def test_a_file_that_may_not_grow(tmp_path: Path, run: Run, limit: int, file: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(snapshot(1))
    sizes = {name: (path / name).stat().st_size for name in (MODEL, OPTIMIZER, STATE)}
    assert next(name for name, size in sizes.items() if size > limit) == file
    assert run("limit_file_size", tmp_path, limit=limit) == OK
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_is(tmp_path, 1)


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(tmp_path, [1.0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10**5, 10**5))
    seen: list[str] = []
    with pytest.raises(ResourceError, match=r"needs 0\.4 MiB, 0\.1 MiB are free"):
        Checkpoints(tmp_path, on_step=seen.append).save(tiny(2, w=torch.ones(10**5)))
    assert seen == []
    assert Checkpoints(tmp_path).steps() == [10]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "unlink", "rmdir"])
def test_every_failing_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Fails the first call, then the second, ... until a save survives: an error of ours, and the old or the new."""
    real, steps, failed = getattr(os, call), iter(range(400, 100_000, 100)), 0
    directory = prepared(tmp_path / "run")
    for failing in range(60):
        count, step = iter(range(1000)), next(steps)
        reached = False

        def fails(*args: object, **kwargs: object) -> object:
            nonlocal reached
            if str(args[0]).endswith(".lock"):  # Staging's own, see test_publish
                return real(*args, **kwargs)
            if next(count) == failing:  # noqa: B023 - called only within this round
                reached = True
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        old = Checkpoints(directory).steps()[-1]
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            error = None
            try:
                Checkpoints(directory).save(snapshot(step), metric=float(step))
            except ResourceError as raised:
                error = raised
        if error is not None:
            failed += 1
            assert "No space left" in str(error)
        found = Checkpoints(directory).newest()
        assert found is not None and found.step in (old, step)
        assert_same(found, snapshot(found.step))
        if not reached:
            break
    assert not reached and found.step == step
    assert failed > 0
    assert hidden(directory) == []
    assert Checkpoints(directory).best() == directory / "step-00000100"


def test_a_second_writer_is_busy_whatever_its_step(tmp_path: Path) -> None:
    refused = []

    def intrude(step: str) -> None:
        if step in ("stage", "model", "manifest", "publish", "prune"):
            for other in (10, 11):
                with pytest.raises(BusyError, match=f"process '{os.getpid()}' on .* is writing"):
                    Checkpoints(tmp_path).save(tiny(other))
                refused.append(step)
            Checkpoints(tmp_path).newest()  # reading is free, and sweeps nothing of a live writer's

    Checkpoints(tmp_path, on_step=intrude).save(tiny(10))
    assert len(refused) == 10
    assert_same(Checkpoints(tmp_path).newest(), tiny(10))
    assert hidden(tmp_path) == []


def test_two_processes_save_the_same_step(tmp_path: Path, run: Run) -> None:
    assert run("save_against_another", tmp_path) == OK
    found = Checkpoints(tmp_path).newest()
    assert found is not None and found.model["w"].unique().tolist() == [found.state["own"]]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_an_exception_while_saving_leaves_nothing(tmp_path: Path) -> None:
    series(tmp_path, [1.0])
    for at in STEPS[:-1]:

        def interrupt(step: str) -> None:
            if step == at:  # noqa: B023 - called only within this round
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Checkpoints(tmp_path, on_step=interrupt).save(tiny(20))
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_leftovers_of_others_stay(tmp_path: Path) -> None:
    keep = [".step-00000010.tmp-1-notes", ".step-10.tmp-1-01234567", ".other.pruned", ".step-0000001x.pruned"]
    sweep = [".step-00000010.tmp-1-01234567", ".step-00000020.old-1-01234567", ".step-00000090.pruned"]
    for name in (*keep, *sweep):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-00000070.lock").write_text("1 elsewhere\n")
    Checkpoints(tmp_path).save(tiny(30))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*keep, "step-00000020", "step-00000030"])


def test_a_checkpoint_on_its_way_back_is_found(tmp_path: Path) -> None:
    """Killed between two renames, where there is no exchange: the only checkpoint lies under a hidden name."""
    checkpoints = series(tmp_path, [1.0])
    (tmp_path / "step-00000010").rename(tmp_path / ".step-00000010.old-1-01234567")
    assert_same(checkpoints.newest(), tiny(10))
    assert hidden(tmp_path) == []
