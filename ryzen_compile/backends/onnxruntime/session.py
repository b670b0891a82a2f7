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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.backends.onnxruntime.claim_report import KINDS, ClaimReport
from ryzen_compile.errors import ArtifactError, RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.spec import CacheSlot, ModelSpec
from ryzen_compile.validate.machine import read_cpu

LOAD_ERRORS = (runtime.Fail, runtime.InvalidArgument, runtime.InvalidGraph, runtime.InvalidProtobuf, runtime.NoSuchFile)
NATIVE_ERRORS = (*LOAD_ERRORS, runtime.NotImplemented, runtime.RuntimeException, runtime.NotFound, RuntimeError)
LONE_TOKEN = 1  # products of one row may sum in another order than those of several
KEPT_LOGITS = 1 << 22  # elements; a larger buffer, after a long prompt, is given back by the next small step


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
    native operators. Raises ``ArtifactError`` when a file cannot be loaded and ``UnsupportedError`` when it lacks an
    input that the slots call for, or when native operators are required and cannot be had.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        slots: tuple[CacheSlot, ...],
        options: SessionOptions = SessionOptions(),
        prefill: Path | None = None,
    ) -> None:
        self.spec = spec
        self.slots = slots
        self._main = BoundSession(path, spec, len(slots), options)
        self.claims = self._main.claims
        wanted = prefill is not None and "matmul" not in self.claims.whole and _sums_bytes_exactly()
        self._prefill = BoundSession(prefill, spec, len(slots), options) if prefill and wanted else None
        self._prefill_from = options.prefill_from
        self._directory: tempfile.TemporaryDirectory | None = None
        self.all_logits = self._main.all_logits
        alike = LONE_TOKEN if self.claims.rows_alike else LONE_TOKEN + 1
        self.prompt_from = self._prefill_from if self._prefill is not None else alike
        sessions = [session for session in (self._main, self._prefill) if session is not None]
        self._together = all("attention" in session.claims.whole for session in sessions)

    def keep(self, directory: tempfile.TemporaryDirectory) -> None:
        """Ties a temporary directory that holds the model to this engine's life."""
        self._directory = directory

    def step(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        """See ``Engine.step``. The array returned is overwritten by the next step.

        Raises ``UsageError`` when the cache has no room for the tokens, and for several new tokens in several rows that
        hold some already, which ONNX Runtime's own attention cannot do.
        """
        batch, new = tokens.shape
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
        wide = self._prefill is not None and new >= self._prefill_from
        session = self._prefill if wide and self._prefill is not None else self._main
        return session.run(tokens, cache)

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


class BoundSession:
    """One session with the buffers that are bound to it; a step binds anew only what has changed since the last."""

    def __init__(self, path: Path, spec: ModelSpec, slots: int, options: SessionOptions) -> None:
        self._vocab = spec.vocab
        self._session: Any
        self._session, self.claims = _open(path, options)
        self._binding = self._session.io_binding()
        known = {value.name for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._past = [(f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(slots)]
        self._present = [(f"present.{i}.key", f"present.{i}.value") for i in range(slots)]
        wanted = {"input_ids", "attention_mask", "logits", *sum(self._past, ()), *sum(self._present, ())}
        if missing := wanted - known:
            raise UnsupportedError(f"{path} has no {', '.join(sorted(missing))}", hint="export the model again")
        logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        self.all_logits = logits.shape[1] != 1
        self._has_positions = "position_ids" in known
        self._tokens = self._positions = np.empty((0, 0), np.int64)
        self._ones = np.empty(0, np.int64)
        self._flat_logits = self._logits = np.empty(0, np.float32)
        self._bound = -1
        self._cache: weakref.ref[KVCache] | None = None

    def run(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        """One step that is known to fit; see ``OrtEngine.step``."""
        batch, new = tokens.shape
        if (batch, new) != self._tokens.shape:
            self._bind_shape(batch, new)
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

    def _bind_shape(self, batch: int, new: int) -> None:
        """Buffers for tokens, positions and logits, bound once per shape."""
        shape = (batch, new if self.all_logits else 1, self._vocab)
        size = shape[0] * shape[1] * shape[2]
        if not size <= self._flat_logits.size <= max(size, KEPT_LOGITS):
            self._flat_logits = np.empty(size, np.float32)
        self._logits = self._flat_logits[:size].reshape(shape)
        self._bind("logits", self._logits, output=True)
        if self._has_positions:
            self._positions = np.empty((batch, new), np.int64)
            self._bind("position_ids", self._positions)
        # Last: its shape is what says that all of this is bound.
        self._tokens = np.empty((batch, new), np.int64)
        self._bind("input_ids", self._tokens)

    def _bind_cache(self, cache: KVCache) -> None:
        """Past and present of every slot; skipped while the buffers are those of the step before."""
        state = cache.revision
        if self._cache is not None and self._cache() is cache and state == self._bound:
            return
        for index, buffers in enumerate(zip(cache.keys, cache.values, strict=True)):
            for past, present, buffer in zip(self._past[index], self._present[index], buffers, strict=True):
                if not buffer.flags.c_contiguous:
                    raise UsageError(f"the cache buffer for {past} is not contiguous")
                self._bind(past, buffer)
                self._bind(present, buffer, output=True)
        self._cache, self._bound = weakref.ref(cache), state

    def _bind(self, name: str, array: np.ndarray, *, output: bool = False) -> None:
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, _pointer(array))


def _sums_bytes_exactly() -> bool:
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


def _pointer(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _open(path: Path, options: SessionOptions) -> tuple[Any, ClaimReport]:
    """A session of the model at ``path``, over native operators if it may and can have them."""
    why = native.unusable(options.isa) if options.native else "they are switched off"
    if options.native and (not why or options.require_native):
        try:
            return native.open_claimed(path, _runtime_options(options), options.native, options.isa)
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
        stock = onnxruntime.InferenceSession(str(path), _runtime_options(options), providers=["CPUExecutionProvider"])
    except LOAD_ERRORS as error:
        raise ArtifactError(
            f"ONNX Runtime cannot load {path}: {_first_line(error)}", hint="export the model again"
        ) from error
    return stock, ClaimReport(reason=why)


def _runtime_options(options: SessionOptions) -> onnxruntime.SessionOptions:
    """ONNX Runtime's own options."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors: what we can act on is raised
    settings.intra_op_num_threads = options.threads or 0
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    if options.profile:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(tempfile.gettempdir()) / "ryzen_compile")
    return settings


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
