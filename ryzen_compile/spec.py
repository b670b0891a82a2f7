"""What a model is, in numbers: plain facts that every layer may hold and JSON can carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Task = Literal["embed", "generate"]  # what a model is for: vectors of texts, or more text
TASKS: tuple[Task, ...] = get_args(Task)
PoolingMode = Literal["mean", "cls", "max", "last"]
POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
Role = Literal["query", "document"]  # what a text is in a search
PROMPT_NAMES: Mapping[Role, tuple[str, ...]] = {  # of each, by the names that layouts use, the first one first
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)


@dataclass(frozen=True)
class Pooling:
    """How the vectors of a text's tokens become one: their mean, the first token's ("cls"), the largest value of each
    channel, or the last token's; padding counts nowhere. ``normalize`` divides it by its Euclidean length."""

    mode: PoolingMode = "mean"
    normalize: bool = True


@dataclass(frozen=True)
class EncoderSettings:
    """How texts become vectors, beside the model itself.

    ``context`` is the most tokens of a text that are read, None for all that the model can; ``lower_case`` lowers a
    text first. ``prompts`` are texts that are put before, by name, ``default_prompt`` the name of the one used when
    none is asked for. ``dims`` is how many dimensions of a vector are kept unless asked otherwise, None for all, and
    ``depths`` are the numbers of first dimensions that the model was trained to be cut to, widest first.
    """

    pooling: Pooling = Pooling()
    context: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: Similarity = "cosine"
    dims: int | None = None
    depths: tuple[int, ...] = ()

    def prompt_name_for(self, role: Role) -> str | None:
        """The name of the prompt that a text of this ``role`` is put behind: its own, else the default one, if any."""
        return next((name for name in PROMPT_NAMES[role] if name in self.prompts), self.default_prompt)


@dataclass(frozen=True)
class ModelSpec:
    """Read off the captured graph and the model's config.

    ``heads``, ``kv_heads`` and ``head_dim`` are the first attention layer's; models whose layers differ carry the
    exact numbers in their cache slots. ``architecture`` is for people to read: nothing branches on it. ``pooling`` says
    that it is an encoder, whose output is a vector of ``hidden`` channels for each text; a decoder has none.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    tied: bool
    parameters: int
    architecture: str
    pooling: Pooling | None = None


@dataclass(frozen=True)
class CacheSlot:
    """One attention layer's place in the key/value cache; formats are names of ``numerics.rows.RowFormat``.

    A ``window`` above 0 says that the layer looks back so many tokens, itself included, and that the engine drops older
    rows by itself; its buffers then hold little more than the window, however long the sequence.
    """

    layer: int
    kv_heads: int
    head_dim: int
    value_dim: int
    key_format: str = "fp32"
    value_format: str = "fp32"
    window: int = 0

    @property
    def rows(self) -> int:
        """Rows of this layer's buffers where the engine evicts by itself, 0 where they hold every token."""
        return cache_rows(self.window)

    def resident(self, tokens: int) -> int:
        """How many rows are held, the most recent ones, once a sequence of ``tokens`` has been seen."""
        return resident_rows(tokens, self.rows, self.window) if self.window else tokens


def cache_rows(window: int) -> int:
    """Rows of a buffer for a layer that looks back ``window`` tokens: with some slack, so that eviction is rare."""
    return window + max(16, window // 8) if window else 0


def resident_rows(tokens: int, rows: int, window: int) -> int:
    """Rows in use of a buffer of ``rows`` whose owner looks back ``window`` tokens, after ``tokens`` of them.

    When it is full, so many are dropped at once that the window is what remains (the layout that GroupQueryAttention's
    ``sliding_window_cache`` documents): it follows from the number of tokens alone, not from how they were split.
    """
    if tokens <= rows:
        return tokens
    dropped = rows - window + 1
    return tokens - dropped * -(-(tokens - rows) // dropped)
