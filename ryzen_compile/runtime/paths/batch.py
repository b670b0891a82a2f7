"""The rows that are stepped together, whatever their prompts: compacted as paths leave, filled as they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.engine import Engine
from ryzen_compile.runtime.paths.live import LivePath


class Batch:
    """``rows`` rows of one cache, of which the first ``len(running)`` are stepped.

    It begins as a selection of ``prompts``' rows, row ``origins[i]`` for ``paths[i]``, so that paths of one prompt
    share its pages until they write. Later comers are copied in, and the last row into the place of one that leaves.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: KVCache,
        paths: Sequence[LivePath],
        origins: Sequence[int],
        *,
        rows: int,
        room: int,
    ) -> None:
        self._engine = engine
        spare = [origins[-1]] * (rows - len(origins))
        self._cache = prompts.select([*origins, *spare], room=room)
        self.running = list(paths)
        for path in paths:
            path.source = None
        self._head: KVCache | None = None

    def add(self, path: LivePath) -> None:
        """Give ``path`` a row, filled from its source."""
        if path.source is None:
            return
        row = len(self.running)
        held = int(path.source.lengths[0])
        self._cache.lengths[row:] = 0  # what earlier paths left there
        self._make_room(held + 1)
        copy_row(path.source, self._cache.row(row))
        path.source = None
        self.running.append(path)
        self._head = None

    def drop(self, path: LivePath) -> None:
        """Take the row of ``path``, which is running."""
        row, last = self.running.index(path), len(self.running) - 1
        if row < last:
            copy_row(self._cache.row(last), self._cache.row(row))
            self.running[row] = self.running[last]
        self.running.pop()
        self._head = None

    def park(self, path: LivePath) -> None:
        """``drop``, and keep what the row holds as the path's source."""
        path.source = self._cache.row(self.running.index(path)).select([0], room=0)
        self.drop(path)

    def step(self) -> np.ndarray:
        """Step everybody's newest token; the logits ``(B, V)`` in the order of ``running``, good until the next one."""
        tokens = np.array([[path.newest] for path in self.running], np.int64)
        if self._head is None:
            self._head = self._cache.head(len(self.running))
        longest = int(self._head.lengths.max())
        if longest + 1 > self._cache.capacity:
            self._make_room(longest + 1)
            self._head = self._cache.head(len(self.running))
        logits = self._engine.step(tokens, self._head)[:, -1]
        self._head.advance(1)
        return logits

    def _make_room(self, tokens: int) -> None:
        """For ``tokens`` in every row; by half, so that copying stays a constant share of the work."""
        if tokens > self._cache.capacity:
            limit = self._engine.spec.context
            self._cache.reserve(max(tokens, min(tokens + tokens // 2, limit)))
            self._head = None


def copy_row(source: KVCache, target: KVCache) -> None:
    """Make the only row of ``target`` a copy of that of ``source``; its room suffices."""
    held = int(source.lengths[0])
    target.lengths[0] = held
    for place, slot in enumerate(source.slots):
        count = min(held, slot.rows or held)
        target.keys[place][:, :, :count] = source.keys[place][:, :, :count]
        target.values[place][:, :, :count] = source.values[place][:, :, :count]
