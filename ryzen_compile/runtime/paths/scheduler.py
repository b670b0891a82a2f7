"""The loop over paths of several prompts: start, step, judge, prune, until every prompt has what it wants.

Each prompt is read once, into a row of its own; its paths begin as copies of that row. One step gives every running
path a token, whatever its prompt. Each path has its own random stream, stop strings and processors, so that it has the
tokens that ``generate`` would give it alone with its seed, wherever the engine computes a row alike alone and among
others: native operators do to the bit, ONNX Runtime's own up to roundings.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from ryzen_compile.errors import PromptError
from ryzen_compile.runtime.arguments import Prompt, Settings, read_prompt
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.generate import INITIAL_ROOM, read_reusing
from ryzen_compile.runtime.paths.batch import Batch
from ryzen_compile.runtime.paths.judges import Judges
from ryzen_compile.runtime.paths.live import LivePath, Rules
from ryzen_compile.runtime.paths.request import Request
from ryzen_compile.runtime.paths.result import PathsResult
from ryzen_compile.runtime.paths.settings import Search, read_search
from ryzen_compile.runtime.pool import CachePool
from ryzen_compile.runtime.prefix import PrefixStore
from ryzen_compile.runtime.reuse import Reuse
from ryzen_compile.runtime.sampling import LogitsProcessor
from ryzen_compile.runtime.stopping import StoppingCriterion, StopStrings, TextDecoder, integer

OWN = tuple(field.name for field in fields(Search) if field.name not in ("n", "seed"))


def generate_paths(
    engine: Engine,
    prompts: Sequence[Any],
    n: int,
    *,
    generation_config: object = None,
    tokenizer: TextDecoder | None = None,
    logits_processor: Iterable[LogitsProcessor] | None = None,
    stopping_criteria: Iterable[StoppingCriterion] | None = None,
    seed: int | None = None,
    prefill_chunk_size: int = 512,
    verify_threads: int = 2,
    pool: CachePool | None = None,
    prefixes: PrefixStore | None = None,
    **kwargs: Any,
) -> list[PathsResult]:
    """``n`` paths from each of ``prompts``: token ids ``(T,)`` each, an empty one becomes BOS.

    ``kwargs`` are the fields of ``Search`` and the names that ``generate`` accepts; ``do_sample`` is True unless it is
    given. All prompts use ``seed`` (None: one that is drawn, and reported), so that what a prompt gets does not depend
    on the others. Raises as ``generate`` does, and ``PromptError`` for a search that contradicts itself.
    """
    own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
    chosen = secrets.randbits(53) if seed is None else seed
    search = read_search(n, own | {"seed": chosen})
    settings = Settings(generation_config, {"do_sample": True, **kwargs}, engine.spec.vocab)
    if settings.copies != 1:
        raise PromptError(f"num_return_sequences {settings.copies}: n says how many paths there are")
    if search.n > 1 and settings.params.greedy:
        raise PromptError(
            f"{search.n} paths need sampling: greedy ones would all be the same", hint="give a temperature above 0"
        )
    if tokenizer is None and (search.verifier or search.guide or search.vote == "majority"):
        raise PromptError("votes and verifiers need the model's tokenizer to see text", hint="pass tokenizer=")
    read = [read_prompt(prompt, None, settings) for prompt in prompts]
    if not read:
        return []
    chunk = integer("prefill_chunk_size", prefill_chunk_size, 1)
    if pool is None:
        pool = CachePool(engine.slots, limit=engine.spec.context, storage=engine.storage)
    stops = StopStrings(settings.get("stop_strings"), tokenizer)
    boundaries = StopStrings(search.step_strings, tokenizer)
    processors, criteria = tuple(logits_processor or ()), tuple(stopping_criteria or ())
    began = time.perf_counter()
    with ExitStack() as held:
        judges = held.enter_context(Judges(integer("verify_threads", verify_threads, 1)))
        most = [settings.lengths(prompt, engine.spec.context) for prompt in read]
        longest = max(prompt.longest for prompt in read)
        end = max(prompt.longest + limit for prompt, (limit, _) in zip(read, most, strict=True)) - 1
        pool.require(len(read) + min(search.rows, search.n * len(read)), end)
        cache = held.enter_context(pool.borrowed(len(read), longest))
        requests = []
        for row, (prompt, (limit, minimum)) in enumerate(zip(read, most, strict=True)):
            rules = Rules(
                settings.params, settings.eos, minimum, stops, boundaries, search.step_tokens, processors, criteria
            )
            request = _read(engine, cache.row(row), prompt, search, rules, limit, tokenizer, judges, chunk, prefixes)
            requests.append(request)
        pool.ask(cache, 0)  # what was learned of the prompts shares the budget
        PathScheduler(engine, cache, requests, judges, rows=search.rows, began=began).run()
        return [request.result() for request in requests]


def _read(
    engine: Engine,
    row: KVCache,
    prompt: Prompt,
    search: Search,
    rules: Rules,
    limit: int,
    tokenizer: TextDecoder | None,
    judges: Judges,
    chunk: int,
    prefixes: PrefixStore | None,
) -> Request:
    """The request of a prompt that has been read into ``row``."""
    (ids,) = prompt.rows()
    reuse = Reuse([] if prefixes is None else [prefixes], prefixes)
    began = time.perf_counter()
    logits, known = read_reusing(engine, row, ids, reuse, chunk=chunk)

    def decoded(tokens: list[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)

    before = decoded(ids)

    def text_of(new: list[int]) -> str:
        # With the prompt, as some tokenizers drop a space at the beginning of a text.
        whole = decoded([*ids, *new])
        return whole[len(before) :] if whole.startswith(before) else decoded(new)

    request = Request(search, ids, row, logits, rules, limit=limit, text_of=text_of, judges=judges)
    request.prefill_seconds, request.reused = time.perf_counter() - began, known
    return request


class PathScheduler:
    """Steps the paths of ``requests`` together, in at most ``rows`` rows. Their prompts are the rows of ``prompts``,
    in their order; ``began`` is when time began to count."""

    def __init__(
        self,
        engine: Engine,
        prompts: KVCache,
        requests: Sequence[Request],
        judges: Judges,
        *,
        rows: int,
        began: float,
    ) -> None:
        self._engine, self._prompts, self._requests, self._judges = engine, prompts, requests, judges
        self._rows = min(rows, sum(request.width for request in requests))
        self._began = began
        self._batch: Batch | None = None
        self._owners: dict[LivePath, Request] = {}  # of the running paths

    def run(self) -> None:
        """Until every request is done."""
        while waiting := [request for request in self._requests if not request.done]:
            for request in waiting:
                request.settle()
                request.expire(time.perf_counter() - self._began)
            self._drop_ended()
            self._start(waiting)
            if self._owners:
                self._step()
            else:
                self._judges.wait()

    def _start(self, requests: Sequence[Request]) -> None:
        """Give rows to paths that go on from a boundary, and to new ones as far as there are rows."""
        coming: dict[LivePath, Request] = {}
        for request in requests:
            coming |= dict.fromkeys(request.branch(), request)
        free = self._rows - len(self._owners)
        free -= sum(path.source is not None for request in self._requests for path in request.live)
        for request in requests:
            while paths := request.fresh(free):
                for path in paths:
                    is_behind_step = path.take(request.logits)
                    waits = request.took(path, is_behind_step)
                    free -= path.ended is None
                    if path.ended is None and not waits:
                        coming[path] = request
        if not coming:
            return
        if self._batch is None:
            origins = [self._requests.index(request) for request in coming.values()]
            ends = max(path.start + path.limit for path in coming) - int(self._prompts.lengths.max())
            room = min(max(1, ends), INITIAL_ROOM)
            self._batch = Batch(self._engine, self._prompts, list(coming), origins, rows=self._rows, room=room)
        else:
            for path in coming:
                self._batch.add(path)
        self._owners |= coming

    def _step(self) -> None:
        """A token for every running path."""
        if self._batch is None:
            return
        began = time.perf_counter()
        running = list(self._batch.running)
        logits = self._batch.step()
        behind = {path: path.take(logits[row]) for row, path in enumerate(running)}
        share = (time.perf_counter() - began) / len(running)
        for request in set(self._owners.values()):
            request.steps += 1
        for path in sorted(running, key=lambda path: path.index):  # those that end together count in their order
            path.seconds += share
            if self._owners[path].took(path, behind[path]):
                self._batch.park(path)
                del self._owners[path]
        self._drop_ended()

    def _drop_ended(self) -> None:
        for path in [path for path in self._owners if path.ended is not None]:
            if self._batch is not None:
                self._batch.drop(path)
            del self._owners[path]
