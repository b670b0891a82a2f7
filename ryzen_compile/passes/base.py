"""What a pass is: a promise, and a function from Program to Program that reports hits and near-misses.

Most passes are a :class:`RewritePass`: ``match`` looks at one anchor node and returns either what it found or a
:class:`NoMatch` with the reason, ``rewrite`` builds the replacement. Matching is data: the reasons are shown by
``explain`` and asserted in tests. Loops, dead code and bookkeeping live here, so a pass holds only its algebra.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, TypeVar

from torch import fx

from ryzen_compile.edit import Edit
from ryzen_compile.program import Program, is_call, module_path

Promise = Literal["exact", "lossy"]
Found = TypeVar("Found")


@dataclass(frozen=True)
class NoMatch:
    """Why an anchor was left alone. ``node`` is where the ladder of checks stopped."""

    reason: str
    node: fx.Node


@dataclass(frozen=True)
class Site:
    """A place in the graph, kept after the graph itself has changed."""

    node: str
    module: str
    note: str = ""


@dataclass(frozen=True)
class PassResult:
    """``hits`` are the rewritten places, ``misses`` the anchors left alone, with the reason in ``note``."""

    program: Program
    hits: tuple[Site, ...] = ()
    misses: tuple[Site, ...] = field(default=())

    @property
    def changed(self) -> bool:
        return bool(self.hits)


class Pass(ABC):
    """``name`` is what reports and ``passes=`` use; ``produces`` are the dialect operators it may introduce."""

    name: ClassVar[str]
    promise: ClassVar[Promise] = "exact"
    max_kl: float = 0.0  # a lossy pass's budget: mean KL divergence to the model before it, nats per token
    max_cosine: float = 0.0  # the same for an encoder: mean of 1 - cosine to the vectors before it
    produces: ClassVar[frozenset[str]] = frozenset()
    required: ClassVar[bool] = False  # without it nothing can run: a failure is an error
    works_on: ClassVar[str] = "such operator"  # what a required pass rewrites, in words
    remedy: ClassVar[str] = "more bits, smaller blocks, calibration on such text"  # for one beyond its budget
    builds_on: ClassVar[str] = ""  # the pass whose misses explain why this one found nothing

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Returns the rewritten Program; the given one is left as it was."""


class RewritePass(Pass, Generic[Found]):
    """Visits every node that calls one of ``anchors``, in graph order, and rewrites where ``match`` says so.

    ``match`` returns what ``rewrite`` needs, a ``NoMatch`` for a near-miss worth telling, or none for a node that is
    not this pass's business at all.
    """

    anchors: ClassVar[tuple[object, ...]]

    @abstractmethod
    def match(self, node: fx.Node, program: Program) -> Found | NoMatch | None: ...

    @abstractmethod
    def rewrite(self, edit: Edit, m: Found) -> None: ...

    def run(self, program: Program) -> PassResult:
        edit = Edit(program, self.name)
        hits, misses = [], []
        for node in list(edit.graph.nodes):
            if not is_call(node, *self.anchors) or not node.users:
                continue  # another match has already consumed it
            found = self.match(node, edit.program)
            if found is None:
                continue
            if isinstance(found, NoMatch):
                misses.append(Site(found.node.name, module_path(found.node) or module_path(node), found.reason))
                continue
            site = Site(node.name, module_path(node))
            self.rewrite(edit, found)
            edit.erase_dead()
            hits.append(site)
        return PassResult(edit.finish() if hits else program, tuple(hits), tuple(misses))
