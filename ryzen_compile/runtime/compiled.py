"""The compiled model as people hold it: call it, let it generate, save it, close it.

It binds an engine to what belongs to the model (report, config, generation defaults, tokenizer, the memory that its
caches share) and guards the engine: one call at a time, none after ``close``. How tokens are made is ``generate``'s
business, how a directory is written is the ``saver``'s.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ryzen_compile.errors import PromptError, UnsupportedError, UsageError
from ryzen_compile.numerics.row_shift import RowShift
from ryzen_compile.runtime.arguments import Settings, as_input, config_values, read_prompt
from ryzen_compile.runtime.breakdown import MemoryBreakdown
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.generate import GenerationStats, generate, read
from ryzen_compile.runtime.guard import Guard
from ryzen_compile.runtime.paths.prompts import as_prompts
from ryzen_compile.runtime.paths.scheduler import generate_paths
from ryzen_compile.runtime.pool import CachePool
from ryzen_compile.runtime.prefix import PrefixStore
from ryzen_compile.runtime.prompt_cache import PromptCache, load_prompt_cache, save_prompt_cache
from ryzen_compile.runtime.speculative.drafter import Drafter, ExitsEarly
from ryzen_compile.runtime.speculative.lookup import PromptLookup
from ryzen_compile.runtime.speculative.model_drafter import ModelDrafter
from ryzen_compile.runtime.speculative.same_tokens import require_same_tokens
from ryzen_compile.runtime.speculative.settings import TRANSFORMERS_NAMES, Speculation, read_speculation
from ryzen_compile.runtime.speculative.speculator import Experience, Speculator
from ryzen_compile.runtime.speculative.stats import SpeculationStats
from ryzen_compile.runtime.speculative.suffix import SuffixDrafter
from ryzen_compile.runtime.stopping import TextDecoder, integer
from ryzen_compile.runtime.stream import Stream
from ryzen_compile.spec import ModelSpec

Saver = Callable[[Path, bool], None]
DEFAULT_SINKS = 4


class CompiledModel:
    """A model that generates.

    ``report``, ``config`` and ``generation_config`` are handed through as given; the last one (a ``GenerationConfig``
    or a mapping) supplies ``generate``'s defaults. ``saver(directory, force)`` writes the artifact. ``motion`` says how
    cached keys are moved, or why they cannot be; ``stream`` (window, sinks) makes every generation an endless one.
    ``identity`` names the artifact that prompt caches belong to. ``cache_budget_bytes`` bounds all caches together;
    ``prefix_bytes`` of it may hold rows of prompts, so that one that begins alike is not read again. ``curves`` are the
    measured seconds of a step (context -> new tokens -> seconds), ``exit_layers`` the layers of an early exit that was
    found to pay, both for speculation; ``speculation`` counts what drafts did in all generations. Calls from several
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
        motion: tuple[RowShift, ...] | str = "nothing says how its keys are moved",
        stream: tuple[int, int] | None = None,
        identity: str | None = None,
        cache_budget_bytes: int | None = None,
        prefix_bytes: int = 0,
        curves: Mapping[int, Mapping[int, float]] | None = None,
        exit_layers: int | None = None,
    ) -> None:
        self.engine = engine
        self.report = report
        self.config = config
        self.generation_config = generation_config
        self.tokenizer = tokenizer
        self._saver = saver
        self._motion = motion
        self._identity = identity
        self._name = identity or f"in memory {secrets.token_hex(8)}"  # what cached rows belong to
        self.stream = None if stream is None else self._streamed(*stream)
        self.pool = CachePool(
            engine.slots, limit=engine.spec.context, budget_bytes=cache_budget_bytes, storage=engine.storage
        )
        if prefix_bytes and self.stream is not None:
            raise UsageError("prefix_bytes is of no use to a model made with a window, which keeps no whole prompts")
        self.prefixes = PrefixStore(engine.slots, budget_bytes=prefix_bytes) if prefix_bytes else None
        if self.prefixes is not None:
            self.pool.register(self.prefixes)
        self.speculation = SpeculationStats()
        self._experience = Experience(curves)
        self._exit_layers = exit_layers
        self._exits: dict[int, Engine] = {}
        self._assistants: weakref.WeakSet[CompiledModel] = weakref.WeakSet()  # that speak in the same tokens
        self._guard = Guard()

    @property
    def spec(self) -> ModelSpec:
        """The model in numbers."""
        return self.engine.spec

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._guard.closed

    def __call__(self, input_ids: Any) -> Any:
        """Logits of whole prompts, recomputed from nothing: float32 ``(B, T, V)``, or ``(B, 1, V)``, the last token's.

        Which of the two, the engine's ``all_logits`` says. ``input_ids`` is ``(B, T)`` or ``(T,)`` without padding, of
        lists, numpy or torch; torch in gives torch out. Raises ``PromptError`` as ``generate`` does.
        """
        with self._guard.entered("the model"):
            spec = self.engine.spec
            ids = read_prompt(input_ids, None, Settings(None, {}, spec.vocab)).ids
            batch, tokens = ids.shape
            if not batch:
                return as_input(input_ids, np.zeros((0, tokens, spec.vocab), dtype=np.float32))
            if tokens > spec.context:
                raise PromptError(f"prompt of {tokens} tokens exceeds the model's context of {spec.context} tokens")
            with self.pool.borrowed(batch, tokens) as cache:
                # A copy: the engine may reuse its output, and this one outlives the lock.
                return as_input(input_ids, self.engine.step(np.ascontiguousarray(ids), cache).copy())

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **arguments: Any) -> Any:
        """``runtime.generate.generate`` on this model, with its tokenizer and generation defaults.

        A ``generation_config`` among the arguments is laid over the model's own; plain arguments are laid over both.
        ``input_ids`` None is an empty prompt, which becomes BOS. ``window`` makes the sequence endless: what is kept of
        it are its first ``sinks`` tokens (default 4) and at least the ``window`` most recent ones.

        ``speculation`` drafts tokens of a single sequence, several of which one step of the model verifies: "auto", or
        a ``Speculation``. The text stays the model's: the same tokens where drafts are not drawn or nothing is, the
        same distribution where a draft model's are. transformers' names choose a drafter each:
        ``prompt_lookup_num_tokens``, ``assistant_model`` (another ``CompiledModel`` with the same tokenizer, which is
        held for the call: a callback of a call on it must not call this one), ``assistant_early_exit`` (layers);
        ``num_assistant_tokens``, ``assistant_confidence_threshold`` and ``max_matching_ngram_size`` adjust it. The
        numbers are upper bounds: fewer tokens are drafted, or none, where more would cost time.

        Steps of one token and of several have to compute alike for greedy text to stay as it is. Native operators do,
        and floats; ONNX Runtime's own products with integer weights do up to roundings, so that a text may change where
        two tokens are as good as equal.
        """
        stream, window, sinks = self.stream, arguments.pop("window", None), arguments.pop("sinks", None)
        if window is not None:
            stream = self._streamed(window, DEFAULT_SINKS if sinks is None else sinks)
        elif sinks is not None:
            raise PromptError(f"sinks={sinks!r} belong to a window", hint="give window as well")
        self._own(arguments.get("prompt_cache"))
        arguments |= {"pool": self.pool, "prefixes": self.prefixes, "stream": stream}
        arguments.setdefault("tokenizer", self.tokenizer)
        own, given = config_values(self.generation_config), config_values(arguments.pop("generation_config", None))
        config = {**own, **given}
        prompt = np.zeros((1, 0), dtype=np.int64) if input_ids is None else input_ids
        named = {name: arguments.pop(name) for name in TRANSFORMERS_NAMES if name in arguments}
        speculation = read_speculation(arguments.pop("speculation", None), named, config)
        assistant = self._assistant(named.get("assistant_model"), speculation)
        with ExitStack() as held:
            # In one order everywhere, so that two models that draft for each other cannot wait for each other.
            for model in sorted([self] if assistant is None else [self, assistant], key=id):
                held.enter_context(model._guard.entered("generate" if model is self else "drafting"))
            if speculation is not None:
                arguments["speculator"] = self._speculator(speculation, assistant)
                arguments["stats"] = arguments.get("stats") or GenerationStats()
            result = generate(self.engine, prompt, attention_mask, generation_config=config, **arguments)
            if speculation is not None:
                self.speculation.add(arguments["stats"].speculation)
            return result

    def generate_paths(self, prompt: Any = None, n: int = 3, **arguments: Any) -> Any:
        """``n`` sampled continuations of one prompt, stepped together: a ``PathsResult`` with all and the winner.

        ``prompt`` is a text, token ids ``(T,)`` or ``(1, T)``, or None for BOS; a list of texts or of ids gives a list
        of results, whose paths are stepped together. ``max_depth`` (default 5) boundaries, each behind ``step_tokens``
        tokens or one of ``step_strings``, prune and fork; ``verifier`` judges texts, ``vote`` and ``answer`` say who
        wins, ``stop`` and ``budget`` when it is enough: ``runtime.paths.settings.Search`` documents them all. Sampling
        arguments are ``generate``'s, and ``do_sample`` is True. Each path has the tokens that ``generate`` gives it
        alone with the seed in its result, on native operators; on ONNX Runtime's own up to roundings. It raises as
        ``generate`` does.
        """
        if self.stream is not None:
            raise UnsupportedError("generate_paths needs whole prompts in its cache, which a window does not keep")
        prompts = as_prompts(prompt, self.tokenizer)
        arguments.setdefault("tokenizer", self.tokenizer)
        own, given = config_values(self.generation_config), config_values(arguments.pop("generation_config", None))
        arguments |= {"generation_config": {**own, **given}, "pool": self.pool, "prefixes": self.prefixes}
        with self._guard.entered("generate_paths"):
            results = generate_paths(self.engine, prompts.ids, n, **arguments)
        return results if prompts.several else results[0]

    def memory_breakdown(self, *, batch: int = 1, tokens: int = 0) -> MemoryBreakdown:
        """What a cache of ``batch`` rows of ``tokens`` tokens takes, by layer and kind, and what a token costs.

        Of a model that was made with a window, what one takes for ever. Nothing is kept; rows that are not written take
        no memory while it is counted.
        """
        tokens = tokens if self.stream is None else self.stream.capacity
        cache = KVCache(self.engine.slots, batch, tokens, limit=self.engine.spec.context)
        cache.lengths[:] = tokens
        return cache.memory_breakdown()

    def read_prompt(self, input_ids: Any, *, prompt_cache: PromptCache | None = None) -> PromptCache:
        """The rows of one prompt ``(T,)`` or ``(1, T)``, for ``generate(..., prompt_cache=)`` and
        ``save_prompt_cache``; what ``prompt_cache`` holds of its beginning is not read again.

        It counts as memory in use while it is kept. Raises ``PromptError`` and ``MemoryLimitError`` as ``generate``.
        """
        self._own(prompt_cache)
        with self._guard.entered("read_prompt"):
            spec = self.engine.spec
            rows = read_prompt(input_ids, None, Settings(self.generation_config, {}, spec.vocab)).rows()
            if len(rows) != 1:
                raise PromptError(f"a prompt cache holds one prompt, got {len(rows)}")
            tokens = np.array(rows[0], dtype=np.int64)
            cache = KVCache(self.engine.slots, 1, 0, limit=spec.context, account=self.pool, storage=self.engine.storage)
            cache.reserve(len(tokens))
            known = 0 if prompt_cache is None else prompt_cache.fill(cache, tokens)
            read(self.engine, cache, rows[0], known=known)
            return PromptCache(cache, tokens, self._name)

    def save_prompt_cache(self, path: str | os.PathLike[str], prompt: PromptCache) -> None:
        """Write what ``read_prompt`` returned to a safetensors file that only this artifact reads again.

        Raises ``UsageError`` for a model that was not loaded from an artifact, and as the module ``prompt_cache`` says.
        """
        self._own(prompt)
        save_prompt_cache(path, prompt.row, prompt.tokens, self._artifact("save_prompt_cache"))

    def load_prompt_cache(self, path: str | os.PathLike[str]) -> PromptCache:
        """What ``save_prompt_cache`` wrote; another artifact's file is refused. It counts while it is kept."""
        spec, identity = self.engine.spec, self._artifact("load_prompt_cache")
        with self._guard.entered("load_prompt_cache"):
            left = self.pool.available
            prompt = load_prompt_cache(
                path, self.engine.slots, identity, vocab=spec.vocab, limit=spec.context, budget_bytes=left
            )
            self.pool.ask(prompt.row, 0)
            return prompt

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
                for exit_engine in self._exits.values():
                    exit_engine.close()
                self.pool.clear()
                if self.prefixes is not None:
                    self.prefixes.clear()
                self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _streamed(self, window: object, sinks: object) -> Stream:
        if isinstance(self._motion, str):
            raise UnsupportedError(f"this model cannot generate with a window: {self._motion}")
        stream = Stream(integer("window", window, 1), integer("sinks", sinks, 0), self._motion)
        stream.check(self.engine.slots, self.engine.spec.context)
        return stream

    def _assistant(self, given: object, speculation: Speculation | None) -> CompiledModel | None:
        """The draft model, checked before anything runs; None where none drafts."""
        if speculation is None or not speculation.wants("draft_model", unasked=given is not None):
            return None
        if not isinstance(given, CompiledModel):
            raise PromptError(
                f"assistant_model must be a CompiledModel, got {type(given).__name__}",
                hint="load() an artifact, or optimize() the model first",
            )
        if given is self:
            raise PromptError(
                "assistant_model is the model itself", hint="assistant_early_exit drafts with its first layers"
            )
        if given not in self._assistants:  # comparing two large vocabularies takes half a second
            require_same_tokens(self.tokenizer, given.tokenizer, self.spec.vocab, given.spec.vocab)
            self._assistants.add(given)
        return given

    def _speculator(self, asked: Speculation, assistant: CompiledModel | None) -> Speculator:
        drafters: list[Drafter] = []
        if asked.wants("lookup", unasked=True):
            drafters.append(PromptLookup(most_ngram=asked.ngram, least_ngram=min(2, asked.ngram)))
        if asked.wants("suffix", unasked=asked.corpus is not None):
            drafters.append(SuffixDrafter(asked.corpus))
        layers = asked.exit_layers or self._tuned_exit()
        if asked.wants("early_exit", unasked=layers is not None):
            drafters.append(ModelDrafter.early_exit(self._early_exit(layers), threshold=asked.threshold))
        if assistant is not None:
            drafters.append(ModelDrafter.draft_model(assistant.engine, assistant.pool, threshold=asked.threshold))
        return Speculator(
            drafters,
            self._experience,
            vocab=self.spec.vocab,
            most=asked.tokens,
            fixed=asked.fixed,
            required=asked.required,
        )

    def _tuned_exit(self) -> int | None:
        """The layers of the exit that was found to pay, if the engine has it."""
        layers = self._exit_layers
        return layers if layers and isinstance(self.engine, ExitsEarly) and layers in self.engine.exits else None

    def _early_exit(self, layers: int | None) -> Engine:
        """The engine of the first ``layers`` layers, opened once."""
        if layers is None:
            raise PromptError(
                "an early exit needs the number of layers behind which to leave the model",
                hint="give assistant_early_exit or exit_layers, or let tune find one that pays",
            )
        if not isinstance(self.engine, ExitsEarly):
            raise UnsupportedError(f"the {self.engine.name!r} engine has no early exits")
        if layers not in self._exits:
            self._exits[layers] = self.engine.early_exit(layers)
        return self._exits[layers]

    def _own(self, prompt: object) -> None:
        """Refuses a prompt cache that another model computed: its rows mean nothing here."""
        if prompt is not None and not (isinstance(prompt, PromptCache) and prompt.identity == self._name):
            whose = f"of {prompt.identity!r}" if isinstance(prompt, PromptCache) else f"{prompt!r}"
            raise PromptError(
                f"prompt_cache is {whose}, this model is {self._name!r}", hint="read the prompt with this model"
            )

    def _artifact(self, what: str) -> str:
        if self._identity is None:
            raise UsageError(f"{what} needs a model that was loaded from an artifact", hint="save it and load it")
        return self._identity
