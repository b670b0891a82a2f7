"""Everything that checks read, each measured once, when the first check asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from ryzen_compile.errors import RyzenCompileError, UnsupportedError, UsageError
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.runtime.speculative.settings import Speculation
from ryzen_compile.text import BUILTIN, BUILTIN_CHARACTERS, digest, read_text, token_windows
from ryzen_compile.validate.footprint import Footprint, Kind, Unmeasured, measure_footprint
from ryzen_compile.validate.inference import InferenceReport, InferenceValidator
from ryzen_compile.validate.machine import read_machine
from ryzen_compile.validate.optimization.settings import ValidationSettings
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, Quality, fitting_batch, score
from ryzen_compile.validate.speculation import Continued, measure_speculation, spread_prompts
from ryzen_compile.validate.torch_threads import torch_threads

if TYPE_CHECKING:
    from ryzen_compile.backends.onnxruntime.operator_speed import OperatorSpeeds

CHARACTERS_PER_TOKEN = 64  # of the text at most so many are read for each token
SPECULATION_PROMPTS = 4
Value = TypeVar("Value")


@dataclass(frozen=True)
class Subject:
    """What is validated: an ``artifact``, opened as ``model``, and the transformers model that it was made from.

    ``path`` is where the baseline's files are, None for one that is in memory only. ``random`` weights have no quality
    to keep. ``draft`` is a model that may draft for it. ``arguments`` are the command's that measures all this again.
    """

    artifact: Path
    model: CompiledModel
    baseline: Any
    settings: ValidationSettings
    path: str | None = None
    random: bool = False
    draft: CompiledModel | None = None
    arguments: str = ""


@dataclass(frozen=True)
class ReadText:
    """A text in the model's tokens."""

    name: str
    sha256: str
    windows: np.ndarray  # (n, L) int64
    prompts: np.ndarray  # (N, P) int64


class _once(Generic[Value]):  # noqa: N801 - it decorates methods as functools.cached_property does
    """A property that is computed when it is first asked for; an error of this package's is kept as well."""

    def __init__(self, measure: Callable[[Any], Value]) -> None:
        self._measure = measure
        self.__doc__ = measure.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self  # asked of the class
        kept = instance.__dict__.setdefault("_kept", {})
        if self._name not in kept:
            try:
                kept[self._name] = self._measure(instance)
            except RyzenCompileError as error:
                kept[self._name] = error
        found = kept[self._name]
        if isinstance(found, RyzenCompileError):
            raise found
        return found


class Measurements:
    """Of one subject. What cannot be measured raises its error each time that it is asked for, and is not tried again.

    ``progress`` hears what is being measured. Raises ``UsageError`` for new tokens that the context has no room for.
    """

    def __init__(self, subject: Subject, progress: Callable[[str], None] | None = None) -> None:
        context, new_tokens = subject.model.spec.context, subject.settings.new_tokens
        if context < new_tokens + 2:
            raise UsageError(
                f"{new_tokens} new tokens and a prompt do not fit the model's context of {context}",
                hint=f"set new_tokens to at most {context - 2}",
            )
        self.subject = subject
        self._progress = progress

    @_once
    def threads(self) -> int:
        """That both engines compute with."""
        return read_machine().usable_cores

    @_once
    def text(self) -> ReadText:
        """The validation text."""
        settings = self.subject.settings
        tokenizer: Any = self.subject.model.tokenizer  # an artifact's own, which encodes as well as decodes
        if self.subject.random:
            raise UnsupportedError("its weights are random: there is no quality to keep, and no text to continue")
        if tokenizer is None:
            raise UnsupportedError("the model has no tokenizer, so there is no text to read")
        if settings.text == BUILTIN:
            # Calibration reads the built-in text from its beginning, and what was calibrated on measures too well.
            name, content = f"{BUILTIN}, second half", read_text(BUILTIN)[BUILTIN_CHARACTERS // 2 :]
        else:
            name = Path(settings.text).name
            content = read_text(settings.text, characters=CHARACTERS_PER_TOKEN * (settings.tokens + settings.length))
        length = min(settings.length, self.subject.model.spec.context)
        encode: Callable[[str], list[int]] = tokenizer.encode
        return ReadText(
            name,
            digest(content),
            token_windows(content, encode, length, settings.tokens),
            spread_prompts(content, encode, count=settings.prompts, length=self._prompt_tokens),
        )

    @_once
    def inference(self) -> InferenceReport:
        """Whole requests on both."""
        from ryzen_compile.validate.huggingface import HuggingFaceEager

        subject, settings = self.subject, self.subject.settings
        prompts = self.prompts
        self.say("requests on both models")
        with torch_threads(self.threads):
            return InferenceValidator(
                HuggingFaceEager(subject.baseline),
                subject.model.engine,
                prompts,
                new_tokens=settings.new_tokens,
                rounds=settings.rounds,
            ).measure()

    @_once
    def footprints(self) -> tuple[Footprint, Footprint]:
        """Memory of the baseline and of the artifact, each in a process of its own."""
        subject, settings = self.subject, self.subject.settings
        if not settings.memory:
            raise UnsupportedError("it is switched off")
        if subject.path is None:
            raise UnsupportedError("the baseline is in memory only, and a process of its own reads a directory")
        self.say("memory, each model in a process of its own")
        prompt = self.prompts[0].tolist()
        sides: tuple[tuple[Kind, str | Path], ...] = (("huggingface", subject.path), ("artifact", subject.artifact))
        found = [
            measure_footprint(kind, path, prompt=prompt, new_tokens=settings.new_tokens, threads=self.threads)
            for kind, path in sides
        ]
        baseline, optimized = found
        if isinstance(baseline, Unmeasured):
            raise UnsupportedError(f"the baseline in a process of its own: {baseline.reason}")
        if isinstance(optimized, Unmeasured):
            raise UnsupportedError(f"the artifact in a process of its own: {optimized.reason}")
        return baseline, optimized

    @_once
    def quality(self) -> Quality:
        """The artifact against the baseline on the text."""
        windows, spec = self.text.windows, self.subject.model.spec
        self.say("predictions of both models on the text")
        batch = fitting_batch(8, windows.shape[1], spec.vocab, read_machine().usable_memory // 4)
        with torch_threads(self.threads):
            return score(
                EngineScorer(self.subject.model.engine), ModelScorer(self.subject.baseline), windows, batch=batch
            )

    @_once
    def operators(self) -> OperatorSpeeds:
        """The artifact's operators against PyTorch's, in a decode step."""
        from ryzen_compile.backends.onnxruntime.operator_speed import measure_operators

        settings, context = self.subject.settings, self.subject.model.spec.context
        self.say("operators on their own")
        return measure_operators(
            self.subject.artifact,
            context=min(settings.context, context - 1),
            rounds=settings.rounds,
            threads=self.threads,
        )

    @_once
    def continued(self) -> tuple[Continued, Continued]:
        """Text continued plainly, and with drafts."""
        subject, settings = self.subject, self.subject.settings
        prompts = self._speculation_prompts()
        drafts = {
            "speculation": Speculation(drafters=settings.drafters, required=settings.drafters is not None),
            "assistant_model": subject.draft,
        }
        self.say("text continued with and without drafts")
        plain, drafted = measure_speculation(
            subject.model, prompts, {"drafts": drafts}, new=settings.new_tokens, repeats=settings.rounds
        )
        return plain, drafted

    def say(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what)

    @property
    def _prompt_tokens(self) -> int:
        return min(self.subject.settings.prompt_tokens, self.subject.model.spec.context - self._new_tokens - 1)

    @property
    def _new_tokens(self) -> int:
        return self.subject.settings.new_tokens

    @property
    def prompts(self) -> np.ndarray:
        """``(N, P)`` int64, of the text; random ids where there is none: speed hardly depends on which they are."""
        try:
            return self.text.prompts
        except UnsupportedError:
            shape = (self.subject.settings.prompts, self._prompt_tokens)
            return np.random.default_rng(0).integers(0, self.subject.model.spec.vocab, shape, dtype=np.int64)

    def _speculation_prompts(self) -> np.ndarray:
        """More of them than requests have: how much is accepted depends on the text."""
        windows = self.text.windows
        length = min(self._prompt_tokens, windows.shape[1])
        count = min(len(windows), max(SPECULATION_PROMPTS, self.subject.settings.prompts))
        chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)
        return np.ascontiguousarray(windows[chosen, :length])
