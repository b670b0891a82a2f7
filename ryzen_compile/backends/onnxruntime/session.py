"""OrtEngine: ONNX Runtime sessions whose inputs and outputs are bound to buffers that stay where they are.

The cache's buffers are bound as past and as present at once, so a step appends in place and copies nothing. A decode
step rebinds one input, the attention mask, because its length is part of its shape. An artifact may hold its model
twice, the second time for prompts; both sessions then work on the same cache.

Where the library of native operators is there, a session runs a graph in which they have taken the place of ONNX
Runtime's own (``claim``); what became of it is the engine's ``claims``. Where that fails, the stock graph runs.
"""

from __future__ import annotations

import platform
import tempfile
import warnings
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.backends.onnxruntime.artifact_check import check_model
from ryzen_compile.backends.onnxruntime.claim_report import KINDS, ClaimReport
from ryzen_compile.backends.onnxruntime.early_exit import Exits, cut, find_exits
from ryzen_compile.backends.onnxruntime.logits_rows import choose_rows
from ryzen_compile.errors import ArtifactError, RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import check_last
from ryzen_compile.runtime.storage import HOST
from ryzen_compile.spec import CacheSlot, ModelSpec
from ryzen_compile.validate.machine import read_cpu

LOAD_ERRORS = (runtime.Fail, runtime.InvalidArgument, runtime.InvalidGraph, runtime.InvalidProtobuf, runtime.NoSuchFile)
NATIVE_ERRORS = (*LOAD_ERRORS, runtime.NotImplemented, runtime.RuntimeException, runtime.NotFound, RuntimeError)
LONE_TOKEN = 1  # products of one row may sum in another order than those of several
# Long enough to wait from node to node, and for a caller to come with the next step at once. Without a bound, threads
# spin on for so long behind a Run that a draft model and its target, step by step in turn on two cores, take twice the
# time; without any wait behind a Run (session.force_spinning_stop), waking costs a small model's step 30 us of 190.
# At 100 threads often fell asleep while a token was drawn, which takes 90 us of NumPy and a little more with drafts.
SPIN_MICROSECONDS = 200
KEPT_LOGITS = 1 << 23  # elements; a larger buffer, after a long prompt, is given back by the next small step
KEPT_SHAPES = 64  # of steps whose buffers stay: those of one token, and of several drafted ones
KEPT_TOKENS = 64  # of a step whose buffers stay


@dataclass(frozen=True)
class SessionOptions:
    """``threads`` None leaves the number to ONNX Runtime (one per physical core). ``spinning`` lets idle threads wait
    busily: fastest alone, wasteful in company. ``prefill_from`` is the number of new tokens from which the model's
    second form for prompts is used, where there is one. ``profile`` records every node's time; see
    ``OrtEngine.end_profile``.

    ``native`` are the kinds of nodes that our own operators may take over, none for a stock session; ``require_native``
    makes it an error when they cannot. ``isa`` forces their instruction set."""

    threads: int | None = None
    spinning: bool = True
    prefill_from: int = 16
    profile: bool = False
    native: frozenset[str] = KINDS
    require_native: bool = False
    isa: str = "auto"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}")
        if unknown := self.native - KINDS:
            raise UsageError(
                f"kinds of native operators are {', '.join(sorted(KINDS))}, got {', '.join(sorted(unknown))}"
            )


class OrtEngine:
    """An ``Engine`` over the model at ``path``; ``slots`` are the model's own, heads padded where it pads them.

    ``prefill`` is a second form of the model for many new tokens; on a processor that would compute it wrongly there is
    a warning instead, and where native products serve prompts as well it is not opened. ``claims`` says what runs on
    native operators. With ``layers`` it is the model's first layers and its head alone, over the same ``slots``, of
    which it uses as many. Raises ``ArtifactError`` when a file cannot be loaded and ``UnsupportedError`` when it lacks
    an input that the slots call for, when it cannot be left after so many layers, or when native operators are required
    and cannot be had.
    """

    name = "onnxruntime"
    storage = HOST

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        slots: tuple[CacheSlot, ...],
        options: SessionOptions = SessionOptions(),
        prefill: Path | None = None,
        layers: int | None = None,
    ) -> None:
        self.spec = spec if layers is None else replace(spec, layers=layers)
        self.slots = slots
        self._path, self._options, self._layers = path, options, layers
        self._main = BoundSession(path, spec, slots, options, layers)
        self.claims = self._main.claims
        wanted = prefill is not None and "matmul" not in self.claims.whole and sums_bytes_exactly()
        self._prefill = BoundSession(prefill, spec, slots, options) if prefill and wanted else None
        self._prefill_from = options.prefill_from
        self._directory: tempfile.TemporaryDirectory | None = None
        self.all_logits = self._main.all_logits
        self.verifies = self._main.verifies
        alike = LONE_TOKEN if self.claims.rows_alike else LONE_TOKEN + 1
        self.prompt_from = self._prefill_from if self._prefill is not None else alike
        sessions = [session for session in (self._main, self._prefill) if session is not None]
        self._together = all("attention" in session.claims.whole for session in sessions)

    def keep(self, directory: tempfile.TemporaryDirectory) -> None:
        """Ties a temporary directory that holds the model to this engine's life."""
        self._directory = directory

    def step(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        """See ``Engine.step``. The array returned is overwritten by the next step.

        Raises ``UsageError`` when the cache has no room for the tokens, for logits that cannot be had, and for several
        new tokens in several rows that hold some already, which ONNX Runtime's own attention cannot do.
        """
        batch, new = tokens.shape
        if last != 1:
            check_last(last, tokens, self.verifies)
        longest = int(cache.lengths.max())
        total = longest + new
        if total > cache.capacity or batch != cache.batch:
            raise UsageError(
                f"{new} tokens for {batch} rows do not fit a cache of {cache.batch} rows that holds {longest} of "
                f"{cache.capacity} tokens",
                hint="reserve room before the step",
            )
        if batch > 1 and new > 1 and longest and not self._together:
            raise UsageError(
                f"{new} new tokens in {batch} rows that hold {longest} already", hint="step row by row, with cache.row"
            )
        wide = new >= self._prefill_from and last == 1
        session = self._prefill if wide and self._prefill is not None else self._main
        return session.run(tokens, cache, last)

    @property
    def weights_bytes(self) -> int:
        """Of the files beside the model that hold its weights, as stored; a second form for prompts included."""
        return sum(path.stat().st_size for path in self._path.parent.glob("*.onnx.data"))

    @property
    def exits(self) -> tuple[int, ...]:
        """The numbers of layers after which the model can be left; none with the reason in ``exits_why``."""
        return self._exits.layers

    @property
    def exits_why(self) -> str:
        """Why there are no ``exits``; empty where there are."""
        return self._exits.why

    @cached_property
    def _exits(self) -> Exits:
        if self._layers is not None:
            return Exits(why="the model is left early already")
        return find_exits(check_model(self._path.parent, self._path.name), self.slots)

    def early_exit(self, layers: int) -> OrtEngine:
        """An engine over the first ``layers`` layers, the final norm and the head, with this engine's options.

        It steps on the whole model's cache, reads and writes the first ``layers`` slots of it and leaves the others
        alone. It holds weights of its own where native operators pack them. The caller closes it.

        Raises ``UnsupportedError`` where the model cannot be left after so many layers.
        """
        if layers not in self.exits:
            raise UnsupportedError(
                f"the model cannot be left after {layers} of its {self.spec.layers} layers",
                hint=self.exits_why or f"it can after {', '.join(map(str, self.exits))}",
            )
        return OrtEngine(self._path, self.spec, self.slots, self._options, layers=layers)

    def close(self) -> None:
        self._main.close()
        if self._prefill is not None:
            self._prefill.close()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def end_profile(self) -> Path:
        """Stops recording, and returns the trace (Chrome's format) that it wrote to the temporary directory."""
        return self._main.end_profile()


@dataclass(frozen=True)
class _Shape:
    """Buffers for steps of one shape, and what binds them. ``positions`` is empty where the model reads none."""

    tokens: np.ndarray
    positions: np.ndarray
    logits: np.ndarray
    inputs: tuple[tuple[str, onnxruntime.OrtValue], ...]
    output: onnxruntime.OrtValue


class BoundSession:
    """One session with the buffers that are bound to it; a step binds anew only what has changed since the last."""

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        slots: tuple[CacheSlot, ...],
        options: SessionOptions,
        layers: int | None = None,
    ) -> None:
        self._vocab = spec.vocab
        self._session: Any
        self._session, self.claims, self._start = open_session(path, options, slots, layers)
        self._binding = self._session.io_binding()
        known = {value.name for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        used = len(slots) if layers is None else layers
        self._past = [(f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(used)]
        self._present = [(f"present.{i}.key", f"present.{i}.value") for i in range(used)]
        wanted = {"input_ids", "attention_mask", "logits", *sum(self._past, ()), *sum(self._present, ())}
        if missing := wanted - known:
            raise UnsupportedError(f"{path} has no {', '.join(sorted(missing))}", hint="export the model again")
        logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        self.all_logits = logits.shape[1] != 1 and not self._start
        self.verifies = self.all_logits or bool(self._start)
        self._has_positions = "position_ids" in known
        self._shapes: dict[tuple[int, int, int], _Shape] = {}
        self._current = (0, 0, 0)
        self._tokens = self._positions = np.empty((0, 0), np.int64)
        self._ones = np.empty(0, np.int64)
        self._flat_logits = self._logits = np.empty(0, np.float32)
        self._first = np.full(1, -1)  # of the tokens that logits are computed of, counted from the end
        if self._start:
            self._bind(self._start, self._first)
        self._bound = -1
        self._cache: weakref.ref[KVCache] | None = None

    def run(self, tokens: np.ndarray, cache: KVCache, last: int = 1) -> np.ndarray:
        """One step that is known to fit; see ``OrtEngine.step``."""
        batch, new = tokens.shape
        rows = new if self.all_logits else last
        if (batch, new, rows) != self._current:
            self._bind_shape(batch, new, rows)
        self._tokens[:] = tokens
        if self._has_positions:
            np.add(cache.lengths[:, None], np.arange(new), out=self._positions)
        self._bind("attention_mask", self._mask(cache, batch, new, int(cache.lengths.max()) + new))
        self._bind_cache(cache)
        self._session.run_with_iobinding(self._binding)
        return self._logits

    def close(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._session = None
        self._cache = None

    def end_profile(self) -> Path:
        return Path(self._session.end_profiling())

    def _mask(self, cache: KVCache, batch: int, new: int, total: int) -> np.ndarray:
        """(B, total) int64 whose rows sum to the rows' lengths; ones alone when all are of one length."""
        if batch * total > self._ones.size:
            self._ones = np.ones(batch * cache.capacity, np.int64)
        if batch == 1 or int(cache.lengths.min()) + new == total:
            return self._ones[: batch * total].reshape(batch, total)
        self._padded = (np.arange(total) < cache.lengths[:, None] + new).astype(np.int64)
        return self._padded

    def _bind_shape(self, batch: int, new: int, rows: int) -> None:
        """Binds buffers for tokens, positions and logits. Those of small steps are kept: drafts change in length from
        step to step."""
        self._current = (0, 0, 0)  # until all of them are bound
        shape = self._shapes.get((batch, new, rows)) or self._made(batch, new, rows)
        self._first[0] = -rows
        for name, value in shape.inputs:
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("logits", shape.output)
        self._tokens, self._positions, self._logits = shape.tokens, shape.positions, shape.logits
        self._current = (batch, new, rows)

    def _made(self, batch: int, new: int, rows: int) -> _Shape:
        size = batch * rows * self._vocab
        if not size <= self._flat_logits.size <= max(size, KEPT_LOGITS):
            self._flat_logits = np.empty(size, np.float32)
            self._shapes.clear()  # theirs are views of another buffer
        logits = self._flat_logits[:size].reshape(batch, rows, self._vocab)
        tokens = np.empty((batch, new), np.int64)
        positions = np.empty((batch, new) if self._has_positions else (0, 0), np.int64)
        inputs = {"input_ids": tokens} | ({"position_ids": positions} if self._has_positions else {})
        shape = _Shape(
            tokens, positions, logits, tuple((name, _value(array)) for name, array in inputs.items()), _value(logits)
        )
        if batch * new <= KEPT_TOKENS:
            if len(self._shapes) >= KEPT_SHAPES:
                self._shapes.clear()
            self._shapes[batch, new, rows] = shape
        return shape

    def _bind_cache(self, cache: KVCache) -> None:
        """Past and present of every slot that the model has; skipped while the buffers are those of the step before."""
        state = cache.revision
        if self._cache is not None and self._cache() is cache and state == self._bound:
            return
        for pasts, presents, *buffers in zip(self._past, self._present, cache.keys, cache.values, strict=False):
            for past, present, buffer in zip(pasts, presents, buffers, strict=True):
                if not buffer.flags.c_contiguous:
                    raise UsageError(f"the cache buffer for {past} is not contiguous")
                self._bind(past, buffer)
                self._bind(present, buffer, output=True)
        self._cache, self._bound = weakref.ref(cache), state

    def _bind(self, name: str, array: np.ndarray, *, output: bool = False) -> None:
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, _pointer(array))


def sums_bytes_exactly() -> bool:
    """Whether products of unsigned and signed bytes are summed without saturating: on x86, only with VNNI.

    Before it, pairs of products are added in 16 bits (``vpmaddubsw``), which two large ones overflow.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or {"avx512_vnni", "avx_vnni"} & set(read_cpu().isa):
        return True
    warnings.warn(
        "the artifact's form for prompts is not used: this processor has no VNNI and would saturate its sums",
        stacklevel=3,
    )
    return False


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    """The buffer of ``array``, not a copy of it."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _pointer(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def open_session(
    path: Path, options: SessionOptions, slots: tuple[CacheSlot, ...] = (), layers: int | None = None
) -> tuple[Any, ClaimReport, str]:
    """A session of the model at ``path`` or of its first ``layers``, over native operators if it may and can have them;
    and the input that says how many rows of logits there are, empty where there is none."""
    model = check_model(path.parent, path.name)
    if layers is not None:
        model = cut(model, slots, layers)
    start = choose_rows(model)
    why = native.unusable(options.isa) if options.native else "they are switched off"
    if options.native and (not why or options.require_native):
        try:
            claimed = native.open_claimed(path, runtime_options(options), options.native, options.isa, model)
            return *claimed, start
        except RyzenCompileError:  # some are RuntimeErrors too, and say it already
            raise
        except NATIVE_ERRORS as error:
            why = _first_line(error)
            if options.require_native:
                raise UnsupportedError(
                    f"native operators cannot run {path}: {why}", hint="without native=True it runs on stock ones"
                ) from error
            warnings.warn(f"{path} runs on stock operators, native ones failed: {why}", stacklevel=4)
    try:
        stock = native.open_model(model, path.parent, runtime_options(options))
    except LOAD_ERRORS as error:
        raise ArtifactError(
            f"ONNX Runtime cannot load {path}: {_first_line(error)}", hint="export the model again"
        ) from error
    return stock, ClaimReport(reason=why), start


def runtime_options(options: SessionOptions) -> onnxruntime.SessionOptions:
    """ONNX Runtime's own options."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors: what we can act on is raised
    settings.intra_op_num_threads = options.threads or 0
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    if options.spinning:
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    if options.profile:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(tempfile.gettempdir()) / "ryzen_compile")
    return settings


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
