"""The compiled encoder as people hold it: texts in, vectors out, in as many dimensions and bits as are asked for.

It binds an engine to what belongs to the model (tokenizer, prompts, the ranges of its int8 codes, report) and guards
it: one call at a time, none after ``close``. What a vector of a batch is, is the engine's business.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ryzen_compile.errors import NumericalError, PromptError, UsageError
from ryzen_compile.numerics import embedding_codes
from ryzen_compile.numerics.embedding_codes import (
    DTYPES,
    LIMIT,
    PRECISIONS,
    Int8Range,
    Precision,
    pack_signs,
    sign_bytes,
    unpack_signs,
)
from ryzen_compile.runtime.batches import batches, padded
from ryzen_compile.runtime.engine import EncoderEngine
from ryzen_compile.runtime.guard import Guard
from ryzen_compile.runtime.similarity import similarity
from ryzen_compile.runtime.tokenizer import Tokenizer
from ryzen_compile.spec import EncoderSettings, ModelSpec, Role

WINDOW = 8192  # texts that are tokenized, and sorted by length, at a time
Saver = Callable[[Path, bool], None]


@dataclass
class EncodingStats:
    """What was encoded: ``texts``, of which ``truncated`` were longer than the context and lost their end; their
    ``tokens``, with special ones; how many of ``padding`` were computed beside them, in how many ``batches``."""

    texts: int = 0
    truncated: int = 0
    tokens: int = 0
    padding: int = 0
    batches: int = 0
    seconds: float = 0.0


class CompiledEncoder:
    """A model that turns texts into vectors.

    ``settings`` say what belongs to it beside its weights (prompts, similarity, default dimensions), ``report`` and
    ``config`` are handed through as given. ``int8`` are the ranges of int8 codes, found on text; without any, a
    model of unit vectors has ``1 / 127`` for a step, which ``calibrated`` tells. ``saver(directory, force)`` writes the
    artifact. Calls from several threads wait for each other and return what they would alone; a call after ``close``
    or in a forked child raises ``UsageError``. A ``with`` block closes it.
    """

    def __init__(
        self,
        engine: EncoderEngine,
        tokenizer: Tokenizer | None,
        settings: EncoderSettings,
        *,
        int8: Int8Range | None = None,
        report: Any = None,
        config: dict[str, Any] | None = None,
        saver: Saver | None = None,
    ) -> None:
        hidden = engine.spec.hidden
        if settings.dims is not None and settings.dims > hidden:
            raise UsageError(f"the model's vectors have {hidden} dimensions, its settings keep {settings.dims}")
        if int8 is not None and len(int8.step) != hidden:
            raise UsageError(f"the model's vectors have {hidden} dimensions, its int8 ranges {len(int8.step)}")
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.report = report
        self.config = config
        self.calibrated = int8 is not None
        self._int8 = int8
        self._saver = saver
        self._guard = Guard()

    @property
    def spec(self) -> ModelSpec:
        """The model in numbers."""
        return self.engine.spec

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._guard.closed

    @property
    def dims(self) -> int:
        """Dimensions of a vector unless others are asked for."""
        return self.settings.dims or self.spec.hidden

    @property
    def context(self) -> int:
        """The most tokens of a text that are read, special ones included."""
        return min(self.settings.context or self.spec.context, self.spec.context)

    @property
    def int8_range(self) -> Int8Range:
        """What int8 codes stand for. Raises ``UsageError`` where neither text nor the vectors' length bounds them."""
        if self._int8 is not None:
            return self._int8
        if not self._unit:
            raise UsageError(
                "this model has no int8 ranges, and its vectors no fixed length",
                hint="encode to float32 and fit numerics.embedding_codes.Int8Range on the vectors",
            )
        return Int8Range(np.zeros(self.spec.hidden), np.full(self.spec.hidden, 1 / LIMIT))

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        dims: int | None = None,
        precision: Precision = "float32",
        normalize: bool = False,
        show_progress: bool = False,
        stats: EncodingStats | None = None,
    ) -> np.ndarray:
        """The vectors of ``texts``, in their order: ``(N, D)``, or ``(D,)`` of a single string; ``(0, D)`` of none.

        Each text is put behind ``prompt``, or the prompt called ``prompt_name``, or the model's default one, and cut to
        ``context`` tokens; how many were cut, a warning tells, or ``stats``, which counts all that was done. A text of
        no tokens at all has the zero vector. Texts of about one length share a batch of at most ``batch_size``, fewer
        where they are long; a vector does not depend on the others but for float32 rounding.

        ``dims`` keeps the first D dimensions, scaled to length 1 (Matryoshka representations, Kusupati et al., 2022);
        ``normalize`` scales the vectors of a model that does not, too. ``precision`` is float32; "int8", the codes of
        ``int8_range``, of which ``dims`` keeps the first, unscaled; or "binary", a bit for each sign,
        ``(N, ceil(D / 8))`` uint8 (``numerics.embedding_codes``). ``decode`` turns both into vectors again.

        Raises ``PromptError`` for what is not text, and prompts and numbers out of range, ``NumericalError`` for a
        vector that is not finite, ``UsageError`` as the class says and for ``int8_range``.
        """
        one = isinstance(texts, str)
        given, before = _texts(texts), self._prompt(prompt, prompt_name)
        tokenizer = self._tokenizer()
        kept = self._kept(dims)
        _at_least_one("batch_size", batch_size)
        if precision not in PRECISIONS:
            raise PromptError(f"there is no precision {precision!r}", hint=f"use one of {', '.join(PRECISIONS)}")
        ranges = self.int8_range if precision == "int8" else None
        counts = EncodingStats() if stats is None else stats
        truncated = counts.truncated
        width = sign_bytes(kept) if precision == "binary" else kept
        vectors = np.zeros((len(given), width), DTYPES[precision])

        def finished(rows: np.ndarray) -> np.ndarray:
            if ranges is not None:
                return ranges.encode(rows)[:, :kept]
            short = self._shortened(rows, kept, normalize)
            return pack_signs(short) if precision == "binary" else short

        started = time.perf_counter()
        with self._guard.entered("encode"), _progress(len(given), shown=show_progress) as tell:
            for start in range(0, len(given), WINDOW):
                window = [before + text for text in given[start : start + WINDOW]]
                encoded = tokenizer.encode_batch(window, self.context)
                counts.texts += len(window)
                counts.truncated += sum(cut for _, cut in encoded)
                for rows in batches([len(ids) for ids, _ in encoded], batch_size):
                    ids = [encoded[row][0] for row in rows]
                    found = self._embedded(ids, counts, start + rows)
                    vectors[start + rows] = finished(found)
                    tell(len(rows))
                if ranges is not None:  # zero is a value of its own, and not always code 0
                    empty = [start + row for row, (ids, _) in enumerate(encoded) if not len(ids)]
                    vectors[empty] = ranges.encode(np.zeros((1, self.spec.hidden)))[:, :kept]
        counts.seconds += time.perf_counter() - started
        if stats is None and counts.truncated > truncated:
            warnings.warn(
                f"{counts.truncated} of {len(given)} text(s) are longer than the {self.context} tokens that are read",
                stacklevel=2,
            )
        return vectors[0] if one else vectors

    def encode_query(self, texts: str | Iterable[str], **arguments: Any) -> np.ndarray:
        """``encode`` with the prompt for queries, where the model has one."""
        return self.encode(texts, **self._role(arguments, "query"))

    def encode_document(self, texts: str | Iterable[str], **arguments: Any) -> np.ndarray:
        """``encode`` with the prompt for documents, where the model has one."""
        return self.encode(texts, **self._role(arguments, "document"))

    def decode(self, codes: np.ndarray, dims: int | None = None) -> np.ndarray:
        """float32 ``(N, D)`` vectors that int8 or binary ``codes`` of ``encode`` stand for, of length 1 where the
        model's are; signs stand for a direction alone. ``dims`` is what they were encoded with."""
        kept = self._kept(dims)
        if codes.dtype == np.int8:
            ranges = self.int8_range
            decoded = Int8Range(ranges.middle[:kept], ranges.step[:kept]).decode(codes)
        else:
            decoded = unpack_signs(codes, kept)
        return embedding_codes.normalize(decoded) if self._unit or kept < self.spec.hidden else decoded

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """How alike the vectors ``a`` (N, D) and ``b`` (M, D) are by the model's own measure: float32 (N, M).

        A single vector may be (D,). Codes are decoded first.
        """
        return similarity(self.settings.similarity, np.atleast_2d(a), np.atleast_2d(b))

    def save_pretrained(self, directory: str | os.PathLike[str], force: bool = False) -> None:
        """Write the artifact to ``directory``; ``force`` replaces an artifact that is there.

        Raises ``UsageError`` when the model was made without a way to save it.
        """
        if self._saver is None:
            raise UsageError(
                f"this model, on the {self.engine.name!r} engine, has nothing to save",
                hint="compile it with the onnxruntime backend to get an artifact",
            )
        with self._guard.entered("save_pretrained"):
            self._saver(Path(directory), force)

    def close(self) -> None:
        """Wait for the running call, then release the engine. Closing twice is fine."""
        with self._guard.entered("close", even_closed=True):
            if not self._guard.closed:
                self._guard.closed = True
                self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _unit(self) -> bool:
        """Whether the engine's vectors have length 1."""
        return self.spec.pooling is not None and self.spec.pooling.normalize

    def _embedded(self, ids: Sequence[np.ndarray], counts: EncodingStats, numbers: np.ndarray) -> np.ndarray:
        """One batch, padded behind its texts: float32 (B, C). ``numbers`` are the texts' own, for errors."""
        tokens, mask = padded(ids, 0 if self.tokenizer is None else self.tokenizer.pad_token_id or 0)
        found = self.engine.embed(tokens, mask)
        finite = np.isfinite(found).all(axis=1)
        if not finite.all():
            raise NumericalError(f"the vector of text {numbers[int(np.argmin(finite))]} is not finite")
        counts.batches += 1
        counts.tokens += int(mask.sum())
        counts.padding += mask.size - int(mask.sum())
        return found

    def _shortened(self, rows: np.ndarray, kept: int, unit: bool) -> np.ndarray:
        if kept < self.spec.hidden:
            return embedding_codes.truncate(rows, kept)
        return embedding_codes.normalize(rows) if unit and not self._unit else rows

    def _kept(self, dims: int | None) -> int:
        kept = self.dims if dims is None else dims
        _at_least_one("dims", kept)
        if kept > self.spec.hidden:
            raise PromptError(f"dims {kept} exceeds the {self.spec.hidden} dimensions of the model's vectors")
        return kept

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError("this model came without a tokenizer", hint="engine.embed takes ids")
        return self.tokenizer

    def _prompt(self, prompt: object, name: str | None) -> str:
        if prompt is not None:
            if name is not None:
                raise PromptError("prompt and prompt_name were both given", hint="give one of them")
            if not isinstance(prompt, str):
                raise PromptError(f"prompt must be a str, got {type(prompt).__name__}")
            return prompt
        name = self.settings.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.settings.prompts:
            known = ", ".join(map(repr, self.settings.prompts)) or "none"
            raise PromptError(f"the model has no prompt {name!r}", hint=f"its prompts: {known}")
        return self.settings.prompts[name]

    def _role(self, arguments: dict[str, Any], role: Role) -> dict[str, Any]:
        if arguments.get("prompt") is None and arguments.get("prompt_name") is None:
            return {**arguments, "prompt_name": self.settings.prompt_name_for(role)}
        return arguments


def _texts(texts: object) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
        raise PromptError(f"expected a string or several, got {type(texts).__name__}")
    found = list(texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise PromptError(f"text {number} is of type {type(text).__name__}, expected str")
    return found


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise PromptError(f"{name} must be a number of at least 1, got {value!r}")


@contextmanager
def _progress(texts: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar on stderr that is told of finished texts."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("encoding", total=texts)
        yield lambda done: bar.advance(task, done)
