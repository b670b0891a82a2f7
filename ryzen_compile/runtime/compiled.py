"""The compiled model as people hold it: call it, let it generate, save it, close it.

It binds an engine to what belongs to the model (report, config, generation defaults, tokenizer) and guards the engine:
one call at a time, none after ``close``. How tokens are made is ``generate``'s business, how a directory is written is
the ``saver``'s.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ryzen_compile.errors import PromptError, UsageError
from ryzen_compile.runtime.arguments import Settings, as_input, config_values, read_prompt
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.generate import generate
from ryzen_compile.runtime.stopping import TextDecoder
from ryzen_compile.spec import ModelSpec

Saver = Callable[[Path, bool], None]


class CompiledModel:
    """A model that generates.

    ``report``, ``config`` and ``generation_config`` are handed through as given; the last one (a ``GenerationConfig``
    or a mapping) supplies ``generate``'s defaults. ``saver(directory, force)`` writes the artifact. Calls from several
    threads wait for each other and return what they would alone. A call from inside a streamer or another callback of a
    running call, a call after ``close`` and a call in a forked child raise ``UsageError``. A ``with`` block closes it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        report: Any = None,
        config: dict[str, Any] | None = None,
        generation_config: Any = None,
        tokenizer: TextDecoder | None = None,
        saver: Saver | None = None,
    ) -> None:
        self.engine = engine
        self.report = report
        self.config = config
        self.generation_config = generation_config
        self.tokenizer = tokenizer
        self._saver = saver
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._closed = False
        self._pid = os.getpid()

    @property
    def spec(self) -> ModelSpec:
        """The model in numbers."""
        return self.engine.spec

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def __call__(self, input_ids: Any) -> Any:
        """Logits of whole prompts, recomputed from nothing: float32 ``(B, T, V)``, or ``(B, 1, V)``, the last token's.

        Which of the two, the engine's ``all_logits`` says. ``input_ids`` is ``(B, T)`` or ``(T,)`` without padding, of
        lists, numpy or torch; torch in gives torch out. Raises ``PromptError`` as ``generate`` does.
        """
        with self._entered("the model"):
            spec = self.engine.spec
            ids = read_prompt(input_ids, None, Settings(None, {}, spec.vocab)).ids
            batch, tokens = ids.shape
            if not batch:
                return as_input(input_ids, np.zeros((0, tokens, spec.vocab), dtype=np.float32))
            if tokens > spec.context:
                raise PromptError(f"prompt of {tokens} tokens exceeds the model's context of {spec.context} tokens")
            cache = KVCache(self.engine.slots, batch, tokens, limit=spec.context)
            # A copy: the engine may reuse its output, and this one outlives the lock.
            return as_input(input_ids, self.engine.step(np.ascontiguousarray(ids), cache).copy())

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **arguments: Any) -> Any:
        """``runtime.generate.generate`` on this model, with its tokenizer and generation defaults.

        A ``generation_config`` among the arguments is laid over the model's own; plain arguments are laid over both.
        ``input_ids`` None is an empty prompt, which becomes BOS.
        """
        arguments.setdefault("tokenizer", self.tokenizer)
        own, given = config_values(self.generation_config), config_values(arguments.pop("generation_config", None))
        prompt = np.zeros((1, 0), dtype=np.int64) if input_ids is None else input_ids
        with self._entered("generate"):
            return generate(self.engine, prompt, attention_mask, generation_config={**own, **given}, **arguments)

    def save_pretrained(self, directory: str | os.PathLike[str], force: bool = False) -> None:
        """Write the artifact to ``directory``; ``force`` replaces an artifact that is there.

        Raises ``UsageError`` when the model was made without a way to save it.
        """
        if self._saver is None:
            raise UsageError(
                f"this model, on the {self.engine.name!r} engine, has nothing to save",
                hint="compile it with the onnxruntime backend to get an artifact",
            )
        with self._entered("save_pretrained"):
            self._saver(Path(directory), force)

    def close(self) -> None:
        """Wait for the running call, then release the engine. Closing twice is fine."""
        with self._entered("close", even_closed=True):
            if not self._closed:
                self._closed = True
                self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _entered(self, what: str, *, even_closed: bool = False) -> Iterator[None]:
        """Hold the engine for one call, or say why it cannot be had."""
        if os.getpid() != self._pid:
            # Neither the lock nor an engine's threads survive a fork.
            raise UsageError(f"{what} was called in a forked process", hint="load the model after the fork")
        if self._holder == threading.get_ident():
            raise UsageError(
                f"{what} was called from inside a running call of the same model, by a streamer or another callback",
                hint="call it after the first one has returned, or load the model twice",
            )
        with self._lock:
            if self._closed and not even_closed:
                raise UsageError(f"{what} was called on a closed model", hint="load it again")
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None
