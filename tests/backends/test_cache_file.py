"""``cache.safetensors``: what is written comes back bit for bit, and nothing that does not fit the slots is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ryzen_compile
from ryzen_compile.backends.onnxruntime.cache_file import CACHE_NAME, FORMAT, read_shifts, write_shifts
from ryzen_compile.errors import ArtifactError, UnsafeError, UnsupportedError
from ryzen_compile.manifest import MANIFEST_NAME, write_manifest
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.numerics.rows import RowFormat
from ryzen_compile.spec import CacheSlot
from tests.model_directory import shared_artifact

SLOTS = (
    CacheSlot(0, 2, 16, 16),
    CacheSlot(1, 3, 6, 10, "int8", "int8", window=4),
    CacheSlot(4, 1, 8, 8, "int4", "int4"),
    CacheSlot(5, 2, 32, 16, "int4-g16", "int8-g8"),
    CacheSlot(6, 2, 7, 7),
)
RANDOM = np.random.default_rng(0)


def scales(slot: CacheSlot) -> np.ndarray:
    return RANDOM.uniform(1e-6, 3, (1, slot.kv_heads, 1, slot.head_dim)).astype(np.float32)


SHIFTS = (
    RowShift(RowFormat(), 16, 10000.0 ** -(np.arange(8) / 8)),
    RowShift(RowFormat(8), 6, np.array([0.1, 1e-9, 3.0]), True, scales(SLOTS[1])),
    RowShift(RowFormat(4), 8, np.array([0.25]), scale=scales(SLOTS[2])),
    RowShift(RowFormat(4, 16), 32, np.arange(5) / 7),
    RowShift(RowFormat(), 7, np.empty(0)),
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_shifts(tmp_path, SHIFTS, SLOTS)
    return tmp_path


def test_what_was_written_comes_back(written: Path) -> None:
    assert [path.name for path in written.iterdir()] == [CACHE_NAME]
    found = read_shifts(written, SLOTS)
    assert len(found) == len(SHIFTS)
    for one, other in zip(found, SHIFTS, strict=True):
        assert (one.form, one.dim, one.interleaved) == (other.form, other.dim, other.interleaved)
        assert one.frequencies.dtype == np.float64 and one.frequencies.tobytes() == other.frequencies.tobytes()
        assert (one.scale is None) == (other.scale is None)
        if one.scale is not None and other.scale is not None:
            assert one.scale.dtype == np.float32 and one.scale.tobytes() == other.scale.tobytes()


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    shift = RowShift(
        RowFormat(8), 6, np.arange(6.0)[::2], scale=np.ones((1, 6, 1, 3), np.float32).transpose(0, 3, 2, 1)
    )
    write_shifts(tmp_path, [shift], [SLOTS[1]])
    (found,) = read_shifts(tmp_path, [SLOTS[1]])
    np.testing.assert_array_equal(found.frequencies, [0, 2, 4])


def replaced(i: int, **changes: Any) -> tuple[RowShift, ...]:
    given = {name: getattr(SHIFTS[i], name) for name in SHIFTS[i].__dataclass_fields__}
    return (*SHIFTS[:i], RowShift(**given | changes), *SHIFTS[i + 1 :])


@pytest.mark.parametrize(
    ("shifts", "message"),
    [
        (replaced(0, frequencies=np.arange(9) / 9), r"layer 0 turns \(9,\) pairs of 16 channels"),
        (replaced(0, frequencies=np.array([np.nan])), "layer 0 turns"),
        (replaced(0, frequencies=np.array([[0.1]])), r"layer 0 turns \(1, 1\) pairs"),
        (replaced(4, frequencies=np.arange(4) / 9), r"layer 6 turns \(4,\) pairs of 7 channels"),
        (replaced(0, scale=np.ones((1, 2, 1, 16), np.float32)), "layer 0 needs no scales"),
        (replaced(3, scale=np.ones((1, 2, 1, 32), np.float32)), "layer 5 needs no scales"),
        (replaced(1, scale=None), r"layer 1 needs scales \(1, 3, 1, 6\)"),
        (replaced(1, scale=np.ones((1, 3, 1, 8), np.float32)), r"layer 1 needs scales \(1, 3, 1, 6\)"),
        (replaced(2, scale=np.zeros((1, 1, 1, 8), np.float32)), "layer 4 needs scales"),
        (replaced(3, turned=True), "keys of layer 5 are turned or centred"),
        (replaced(3, mean=np.zeros((1, 2, 1, 32), np.float32)), "keys of layer 5 are turned or centred"),
    ],
)
def test_what_does_not_fit_the_slots_is_not_written(tmp_path: Path, shifts: tuple[RowShift, ...], message: str) -> None:
    with pytest.raises(ArtifactError, match=f"{CACHE_NAME}: {message}"):
        write_shifts(tmp_path, shifts, SLOTS)
    assert not list(tmp_path.iterdir())


def forge(directory: Path, *, facts: Any = None, form: str | None = FORMAT, **tensors: np.ndarray | None) -> None:
    """Writes the file anew, as somebody who knows the format: the header is right, the content differs."""
    path = directory / CACHE_NAME
    found = load_file(path) | {name.replace("_", "."): value for name, value in tensors.items()}
    kept = [{"interleaved": shift.interleaved} for shift in SHIFTS]
    content = facts if isinstance(facts, str) else json.dumps(kept if facts is None else facts)
    metadata = None if form is None else {form: content}
    save_file({name: value for name, value in found.items() if value is not None}, path, metadata=metadata)


def altered(values: np.ndarray | None, value: float) -> np.ndarray:
    assert values is not None
    found = values.copy()
    found.flat[-1] = value
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "ryzen_compile.cache/2"}, f"is not {FORMAT} of 5 layers; export the model again"),
        ({"form": None}, f"is not {FORMAT}"),
        ({"facts": [{"interleaved": False}] * 4}, "of 5 layers"),
        ({"facts": [{"interleaved": False}] * 6}, "of 5 layers"),
        ({"facts": [{"turned": False}] * 5}, "cannot be read: 'interleaved'"),
        ({"facts": [1] * 5}, "cannot be read"),
        ({"facts": 7}, "cannot be read"),
        ({"facts": "{"}, "cannot be read"),
        ({"frequencies_0": None}, r"cannot be read: 'frequencies\.0'"),
        ({"scale_1": None}, r"layer 1 needs scales \(1, 3, 1, 6\)"),
        ({"scale_0": np.ones((1, 2, 1, 16), np.float32)}, "layer 0 needs no scales"),
        ({"frequencies_0": np.zeros((2, 4))}, r"layer 0 turns \(2, 4\) pairs of 16"),
        ({"frequencies_0": np.zeros(9)}, r"layer 0 turns \(9,\) pairs of 16"),
        ({"frequencies_0": altered(SHIFTS[0].frequencies, np.nan)}, "layer 0 turns"),
        ({"frequencies_0": altered(SHIFTS[0].frequencies, np.inf)}, "layer 0 turns"),
        ({"scale_1": altered(SHIFTS[1].scale, np.nan)}, "layer 1 needs scales"),
        ({"scale_1": altered(SHIFTS[1].scale, np.inf)}, "layer 1 needs scales"),
        ({"scale_1": altered(SHIFTS[1].scale, -0.5)}, "layer 1 needs scales"),
        ({"scale_1": altered(SHIFTS[1].scale, 0.0)}, "layer 1 needs scales"),
        ({"scale_1": np.ones((3, 6), np.float32)}, "layer 1 needs scales"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(written: Path, changes: dict[str, Any], message: str) -> None:
    forge(written)
    read_shifts(written, SLOTS)  # as forged without changes
    forge(written, **changes)
    with pytest.raises(ArtifactError, match=message):
        read_shifts(written, SLOTS)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (SLOTS[:-1], "of 4 layers"),
        ((*SLOTS, SLOTS[0]), "of 6 layers"),
        ((SLOTS[1], *SLOTS[1:]), "layer 1 turns"),
        ((*SLOTS[:2], CacheSlot(4, 2, 8, 8, "int4", "int4"), *SLOTS[3:]), r"layer 4 needs scales \(1, 2, 1, 8\)"),
        ((CacheSlot(0, 2, 16, 16, "int8", "int8"), *SLOTS[1:]), "layer 0 needs scales"),
        ((*SLOTS[:2], CacheSlot(4, 1, 8, 8), *SLOTS[3:]), "layer 4 needs no scales"),
    ],
)
def test_the_file_of_other_slots_is_refused(written: Path, slots: tuple[CacheSlot, ...], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_shifts(written, slots)


def test_a_damaged_file_is_refused(written: Path) -> None:
    path = written / CACHE_NAME
    data = path.read_bytes()
    for damaged in (b"", data[:7], data[:100], data[:-1], data + b"\0", b"\xff" * 8 + data[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=f"{CACHE_NAME}"):
            read_shifts(written, SLOTS)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{CACHE_NAME} cannot be read"):
        read_shifts(written, SLOTS)


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shared_artifact(tmp_path_factory), tmp_path / "copy"))


def relist(directory: Path, **changes: Any) -> None:
    facts = json.loads((directory / MANIFEST_NAME).read_text()) | changes
    write_manifest(directory, {k: v for k, v in facts.items() if k not in ("schema_version", "made_by", "files")})


def two_layers(**changes: np.ndarray) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / CACHE_NAME) | {k.replace("_", "."): v for k, v in changes.items()}
        facts = json.dumps([{"interleaved": False}] * 2)
        save_file(tensors, directory / CACHE_NAME, metadata={FORMAT: facts})
        relist(directory)

    return damage


def cut_off(directory: Path) -> None:
    (directory / CACHE_NAME).write_bytes((directory / CACHE_NAME).read_bytes()[:-8])
    relist(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (two_layers(frequencies_1=np.full(8, np.nan)), "layer 1 turns"),
        (two_layers(scale_0=np.ones((1, 2, 1, 16), np.float32)), "layer 0 needs no scales"),
        (cut_off, f"{CACHE_NAME} cannot be read"),
    ],
)
def test_an_artifact_with_a_bad_file_is_refused(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    """The digests agree: whoever makes a bad file makes its manifest too."""
    damage(copy)
    with pytest.raises(ArtifactError, match=message):
        ryzen_compile.load(copy)


@pytest.mark.parametrize("kind", ["symbolic link", "hard link"])
def test_links_are_refused(copy: Path, tmp_path: Path, kind: str) -> None:
    elsewhere = (copy / CACHE_NAME).rename(tmp_path / "elsewhere")
    make = (copy / CACHE_NAME).symlink_to if kind == "symbolic link" else (copy / CACHE_NAME).hardlink_to
    make(elsewhere)
    with pytest.raises(UnsafeError, match=f"{CACHE_NAME}' is a {kind}"):
        ryzen_compile.load(copy)


def test_an_artifact_without_the_file_generates_but_does_not_stream(copy: Path) -> None:
    (copy / CACHE_NAME).unlink()
    relist(copy)
    ids = np.array([[5, 17, 80]])
    with ryzen_compile.load(copy, threads=1) as model:
        assert model.generate(ids, max_new_tokens=4).shape == (1, 7)
        with pytest.raises(UnsupportedError, match="the artifact does not say how its keys are moved"):
            model.generate(ids, max_new_tokens=4, window=16)
    relist(copy, motion="it is tuesday")
    with (
        ryzen_compile.load(copy, threads=1) as model,
        pytest.raises(UnsupportedError, match="cannot generate with a window: it is tuesday"),
    ):
        model.generate(ids, max_new_tokens=4, window=16)
