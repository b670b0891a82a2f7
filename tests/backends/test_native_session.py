"""Sessions over native operators: the same answers as stock ones, what they may do beyond, and falling back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import ryzen_compile
from ryzen_compile.api import export, load, optimize
from ryzen_compile.backends.onnxruntime import LIBRARY_NAME, MODEL_NAME, NATIVE_NAME, artifact, native, session
from ryzen_compile.backends.onnxruntime.artifact import Artifact
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.resident import SMAPS, mappings
from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions
from ryzen_compile.config import find_recipe
from ryzen_compile.errors import ArtifactError, UnsupportedError, UsageError
from ryzen_compile.kernels import cpu
from ryzen_compile.manifest import read_manifest, update_tuning
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.generate import generate
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.validate.machine import cpu_key, read_machine
from tests.backends.test_tuning import GOOD

NONE: frozenset[str] = frozenset()
HERE = KINDS - {"embedding", "sparse"}  # of which the shipped model has nodes
NEW = 24
TIE = 0.5  # logits of order 10; stock products of one row and of several differ by 0.1 themselves
SOURCE = Path(ryzen_compile.__file__).with_name("publish.py")


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory, tiny_python_lm: Path) -> Path:
    """The shipped model in 4 bits, with a form for prompts; rounded to the nearest, which takes no minute."""
    out = tmp_path_factory.mktemp("native") / "int4"
    export(tiny_python_lm, out, find_recipe("int4", method="rtn", prefill="int8"), verify=False)
    return out


@pytest.fixture(scope="session")
def found(shipped: Path) -> Artifact:
    return artifact.read(shipped)


@pytest.fixture(scope="session")
def prompts(shipped: Path) -> list[np.ndarray]:
    ids = Tokenizer.from_directory(shipped).encode(SOURCE.read_text(encoding="utf-8"))
    return [np.array([ids[90 * i : 90 * i + size]]) for i, size in enumerate((1, 2, 5, 9, 17, 40, 200))]


@pytest.fixture
def engine(found: Artifact) -> Iterator[Callable[..., OrtEngine]]:
    """``engine(**options)``: the model without its form for prompts, closed when the test ends."""
    opened: list[OrtEngine] = []

    def make(**options: Any) -> OrtEngine:
        settings = SessionOptions(**{"threads": 2, "require_native": options.get("native") != NONE, **options})
        opened.append(OrtEngine(found.model, found.spec, found.slots, settings))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def filled(engine: OrtEngine, prompts: list[np.ndarray], room: int = 64) -> KVCache:
    """A cache with a row for each prompt, read alone."""
    cache = KVCache(engine.slots, len(prompts), max(p.shape[1] for p in prompts) + room)
    for index, ids in enumerate(prompts):
        row = cache.row(index)
        engine.step(ids, row)
        row.advance(ids.shape[1])
    return cache


def test_weights_are_not_held_twice(library: Path, found: Artifact, engine: Callable[..., OrtEngine]) -> None:
    """The mapped file is given back once its weights are packed; a lookup reads some of it again."""
    ours = engine()
    ours.step(np.array([[5]]), KVCache(ours.slots, 1, 8))
    name = str((found.directory / "model.onnx.data").resolve())
    held = [kib["Rss"] << 10 for _, _, file, kib in mappings(SMAPS.read_text().splitlines()) if file == name]
    assert held and sum(held) < 0.2 * (found.directory / "model.onnx.data").stat().st_size


# --- the same answers


def test_greedy_tokens_are_the_same_but_for_ties(
    library: Path, engine: Callable[..., OrtEngine], prompts: list[np.ndarray]
) -> None:
    stock, ours = engine(native=NONE), engine()
    assert ours.claims.whole == HERE and ours.claims.rows_alike and stock.claims.kinds == NONE
    same = 0
    for ids in prompts:
        want, got = (generate(one, ids, max_new_tokens=NEW, eos_token_id=None)[0] for one in (stock, ours))
        same += (want == got).all()
        if (want != got).any():
            first = int((want != got).argmax())
            logits = stock.step(want[None, :first], KVCache(stock.slots, 1, first))[0, -1]
            assert abs(logits[want[first]] - logits[got[first]]) < TIE
    assert same >= 0.7 * len(prompts)


@pytest.mark.parametrize("kinds", [{"matmul"}, {"attention"}, {"norm"}, {"matmul", "norm"}], ids=sorted)
def test_each_kind_alone_gives_nearly_the_stock_logits(
    library: Path, engine: Callable[..., OrtEngine], prompts: list[np.ndarray], kinds: set[str]
) -> None:
    stock, ours = engine(native=NONE), engine(native=frozenset(kinds))
    assert ours.claims.kinds == kinds
    for ids in prompts[-2:]:
        want, got = (one.step(ids, KVCache(one.slots, 1, 300))[0, -1].copy() for one in (stock, ours))
        assert np.abs(got - want).max() < TIE
        assert np.mean((got - want) ** 2) < 1e-3 * np.mean(want**2)


def test_threads_do_not_change_a_bit(
    library: Path, engine: Callable[..., OrtEngine], prompts: list[np.ndarray]
) -> None:
    results = []
    for threads in (1, 2):
        one = engine(threads=threads)
        cache = filled(one, prompts)
        results.append((one.step(np.full((len(prompts), 1), 7), cache).copy(), *(k.copy() for k in cache.keys)))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx2_vnni", "avx512_vnni"])
def test_every_instruction_set_gives_nearly_the_same(
    library: Path, engine: Callable[..., OrtEngine], prompts: list[np.ndarray], isa: str
) -> None:
    need = {"scalar": "", "avx2_vnni": "avx_vnni"}.get(isa, isa)
    if need and need not in read_machine().cpu.isa:
        with pytest.raises(UnsupportedError, match=f"isa is {isa}, which this processor does not have"):
            engine(isa=isa)
        return
    ours = engine(isa=isa)
    want, got = (one.step(prompts[4], KVCache(one.slots, 1, 64))[0, -1].copy() for one in (engine(native=NONE), ours))
    assert np.abs(got - want).max() < TIE


# --- what native sessions may do beyond


def test_a_step_is_cut_anyhow_to_the_same_bits(
    library: Path, engine: Callable[..., OrtEngine], prompts: list[np.ndarray]
) -> None:
    ours, ids = engine(), prompts[5]
    assert ours.prompt_from == 1
    whole = ours.step(ids, KVCache(ours.slots, 1, 64))[0, -1].copy()
    for chunks in ([1] * ids.shape[1], [3, 1, 17, 19]):
        cache, at = KVCache(ours.slots, 1, 64), 0
        for size in chunks:
            last = ours.step(ids[:, at : at + size], cache)[0, -1].copy()
            cache.advance(size)
            at += size
        assert at == ids.shape[1]
        np.testing.assert_array_equal(last, whole)


def test_several_tokens_in_several_started_rows(
    library: Path, engine: Callable[..., OrtEngine], prompts: list[np.ndarray]
) -> None:
    ours, rows = engine(), prompts[2:6]
    together, alone = filled(ours, rows), filled(ours, rows)
    new = np.array([[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43]])
    got = ours.step(new, together).copy()
    for index in range(len(rows)):
        np.testing.assert_array_equal(got[index], ours.step(new[index : index + 1], alone.row(index))[0])
    for mine, theirs in zip((*together.keys, *together.values), (*alone.keys, *alone.values), strict=True):
        for index, ids in enumerate(rows):
            held = ids.shape[1] + 3
            np.testing.assert_array_equal(mine[index, :, :held], theirs[index, :, :held])


def test_stock_attention_still_refuses_them(library: Path, engine: Callable[..., OrtEngine]) -> None:
    for kinds in (NONE, frozenset({"matmul", "norm"})):
        other = engine(native=kinds)
        with pytest.raises(UsageError, match="2 new tokens in 2 rows that hold 3 already"):
            other.step(np.ones((2, 2), np.int64), filled(other, [np.array([[1, 2, 3]])] * 2))


def test_native_products_need_no_second_form(library: Path, found: Artifact) -> None:
    for kinds, least in ((KINDS, 1), (frozenset({"attention"}), 16), (NONE, 16)):
        both = OrtEngine(found.model, found.spec, found.slots, SessionOptions(1, native=kinds), found.prefill)
        assert (both._prefill is None) == (kinds == KINDS) and both.prompt_from == least
        both.close()


# --- what is asked for, and falling back


def test_load_uses_what_is_there_and_says_so(library: Path, shipped: Path) -> None:
    for choice, kinds in (("auto", HERE), (True, HERE), (False, NONE)):
        with load(shipped, native=choice) as model:  # type: ignore[arg-type]
            assert model.engine.claims.kinds == kinds  # type: ignore[attr-defined]
    assert model.engine.claims.to_text() == "none: they are switched off"  # type: ignore[attr-defined]


def test_without_a_library_auto_is_stock_and_true_is_refused(
    monkeypatch: pytest.MonkeyPatch, shipped: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(cpu, "reason", lambda: "they were not built")
    with load(shipped) as model:
        assert model.engine.claims.reason == "they were not built"  # type: ignore[attr-defined]
    message = "there are no native operators: they were not built; install g[+][+]"
    with pytest.raises(UnsupportedError, match=message):
        load(shipped, native=True)
    with pytest.raises(UnsupportedError, match=message):
        optimize("no such model", native=True)
    with pytest.raises(UnsupportedError, match=message):
        export("no such model", tmp_path / "out", native=True)
    with pytest.raises(UnsupportedError, match=message):
        native.open_claimed(shipped / MODEL_NAME, onnxruntime.SessionOptions(), KINDS, "auto")


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_what_native_may_be_is_checked(shipped: Path, value: Any) -> None:
    with pytest.raises(UsageError, match=f"native must be 'auto', True or False, got {value!r}"):
        load(shipped, native=value)
    with pytest.raises(UsageError, match="native operators run in ONNX Runtime, not on backend 'eager'"):
        optimize("no such model", backend="eager", native=True)
    with pytest.raises(UsageError, match="operators are attention, embedding, matmul, norm, sparse, got gemm"):
        SessionOptions(native=frozenset({"gemm"}))


def test_the_slowest_instruction_set_is_only_used_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, library: Path, engine: Callable[..., OrtEngine]
) -> None:
    monkeypatch.setattr(cpu, "isa", lambda: "scalar")
    lazy = engine(require_native=False)
    assert lazy.claims.kinds == NONE and "none of the instruction sets" in lazy.claims.reason
    assert engine().claims.kinds == engine(require_native=False, isa="scalar").claims.kinds == HERE


def test_a_native_session_that_fails_is_a_warning_or_an_error(
    monkeypatch: pytest.MonkeyPatch, library: Path, engine: Callable[..., OrtEngine]
) -> None:
    def wrong(model: onnx.ModelProto, **options: Any) -> tuple[onnx.ModelProto, Any]:
        claimed, report = original(model, **options)
        claimed.graph.node[3].attribute.append(onnx.helper.make_attribute("activation", "wave"))
        return claimed, report

    original = native.claim
    monkeypatch.setattr(native, "claim", wrong)
    with pytest.warns(UserWarning, match="runs on stock operators, native ones failed: .*activation is 'wave'"):
        fallen = engine(require_native=False)
    assert fallen.claims.kinds == NONE and "wave" in fallen.claims.reason
    assert fallen.step(np.array([[5, 6]]), KVCache(fallen.slots, 1, 8)).shape[2] == fallen.spec.vocab
    with pytest.raises(UnsupportedError, match=r"native operators cannot run .*'wave'.*; without native=True it runs"):
        engine()


def test_a_library_that_cannot_be_asked_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Callable[..., OrtEngine]
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "library", lambda: broken)
    with pytest.warns(UserWarning, match=r"stock operators are used .*broken\.so cannot be used"):
        lazy = engine(require_native=False)
    assert "broken.so cannot be used" in lazy.claims.reason
    with (
        pytest.warns(UserWarning, match="stock operators are used"),
        pytest.raises(UnsupportedError, match=r"native operators cannot run .*broken\.so"),
    ):
        engine()


def test_an_artifact_that_calls_native_operators_itself_is_refused(
    library: Path, shipped: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shipped, tmp_path / "copy"))
    model = onnx.load(copy / MODEL_NAME, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMulNBits").domain = "ryzen"
    (copy / MODEL_NAME).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="calls ryzen::'MatMulNBits', which the model does not define"):
        session.OrtEngine(copy / MODEL_NAME, *described(copy), SessionOptions(1, native=KINDS, require_native=True))


def described(directory: Path) -> tuple[Any, Any]:
    whole = artifact.read_manifest(directory)
    return artifact.ModelSpec(**whole["spec"]), artifact.slots_of(whole)


# --- the tuned choice


@pytest.mark.parametrize(
    ("kinds", "asked"), [(["norm", "matmul"], "auto"), ([], "auto"), (["norm"], True), ([], False)]
)
def test_load_runs_what_tune_found_best(
    library: Path, shipped: Path, tmp_path: Path, kinds: list[str], asked: Any
) -> None:
    copy = Path(shutil.copytree(shipped, tmp_path / "copy"))
    best = {"kinds": kinds, "reason": "the fastest", "candidates": [{"kinds": kinds, "visits": [1.0]}]}
    update_tuning(copy, cpu_key(read_machine()), {**GOOD, "threads": 1, "native": best})
    for threads in (None, 2):
        with load(copy, native=asked, threads=threads) as model:
            wanted = frozenset(kinds) if asked == "auto" else HERE if asked else NONE
            assert model.engine.claims.kinds == wanted  # type: ignore[attr-defined]


# --- for other runtimes


@pytest.fixture(scope="session")
def portable(library: Path, tmp_path_factory: pytest.TempPathFactory, tiny_python_lm: Path) -> Path:
    out = tmp_path_factory.mktemp("native") / "portable"
    export(tiny_python_lm, out, find_recipe("int4", method="rtn"), verify=False, native=True)
    return out


def test_a_native_export_adds_a_model_and_the_library(library: Path, portable: Path) -> None:
    manifest = read_manifest(portable)
    assert {NATIVE_NAME, LIBRARY_NAME, MODEL_NAME} <= set(manifest["files"])
    assert (portable / LIBRARY_NAME).read_bytes() == library.read_bytes()
    decoder = json.loads((portable / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == NATIVE_NAME and decoder["session_options"]["custom_ops_library"] == LIBRARY_NAME
    written = onnx.load(portable / NATIVE_NAME, load_external_data=False)
    places = {entry.value for t in written.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert places == {f"{MODEL_NAME}.data"} and written.ByteSize() < 1 << 20
    stock = onnx.load(portable / MODEL_NAME, load_external_data=False)
    assert not any(node.domain == "ryzen" and node.op_type != "GatedAct" for node in stock.graph.node)
    with load(portable, native=False) as model, load(portable) as ours:
        assert model.generate([[5, 6, 7]], max_new_tokens=3).shape == ours.generate([[5, 6, 7]], max_new_tokens=3).shape


def test_genai_runs_native_operators_to_the_same_tokens(portable: Path, prompts: list[np.ndarray]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    config = genai.Config(str(portable))
    theirs = genai.Model(config)
    config.overlay(json.dumps({"model": {"decoder": {"filename": MODEL_NAME}}}))
    stock = genai.Model(config)  # the way back, without editing a file
    with load(portable, native=True) as model:
        for ids in prompts:
            ours = model.generate(ids, max_new_tokens=NEW, eos_token_id=None)[0].tolist()
            assert continued(genai, theirs, ids) == ours
    assert len(continued(genai, stock, prompts[0])) == 1 + NEW


def continued(genai: Any, model: Any, ids: np.ndarray) -> list[int]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=ids.shape[1] + NEW, min_length=ids.shape[1] + NEW)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def test_the_native_model_stays_on_its_own_in_a_bare_session(library: Path, portable: Path) -> None:
    """Whoever has neither this package nor genai registers the library in the artifact."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(portable / LIBRARY_NAME))
    bare = onnxruntime.InferenceSession(str(portable / NATIVE_NAME), options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    feeds |= {
        v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in bare.get_inputs() if "past" in v.name
    }
    with load(portable, native=True) as model:
        np.testing.assert_array_equal(bare.run(["logits"], feeds)[0][:, -1:], model([[5, 6, 7]])[:, -1:])


def test_prompt_caches_belong_to_the_model_with_and_without(portable: Path, tmp_path: Path) -> None:
    """What a native export adds is not what cached rows are of."""
    read = artifact.read(portable)
    files = {name: facts for name, facts in read.manifest["files"].items() if name not in (NATIVE_NAME, LIBRARY_NAME)}
    plain = Artifact(read.directory, read.spec, read.slots, {**read.manifest, "files": files})
    assert plain.identity == read.identity
