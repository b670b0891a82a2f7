"""What a user may ask for: recipes and their settings. Frozen, and unknown keys are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ryzen_compile.errors import ConfigError
from ryzen_compile.numerics.rows import RowFormat

DEFAULT_RECIPE = "int4"
ENCODER_RECIPE = "fp32"
Bits = Literal[2, 3, 4, 8]
Block = Literal[16, 32, 64, 128, 256]
Method = Literal["rtn", "mse", "gptq"]


def _checked_expressions(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    for expression in overrides:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{expression!r} is not a regular expression: {error}") from error
    return overrides


class TensorFormat(BaseModel):
    """What an override may say of the weights it names; what it leaves out is the recipe's. ``float`` keeps them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Bits | None = None
    block: Block | None = None
    symmetric: bool | None = None
    method: Method | None = None
    float: bool = False


class WeightQuantization(BaseModel):
    """Block-wise integer weights: ``bits`` each, a float32 scale for every ``block`` of a row.

    ``method`` chooses the codes; ``gptq`` reads calibration text. Where there is none, and for a table
    that is only looked up, ``fallback`` changes the format: another method, and smaller blocks to make up for it.
    ``target_bits`` (stored bits per weight, scales included) mixes this format with the next wider one, tensor by
    tensor, by measured sensitivity. ``head_bits`` is for the output head and a table tied to it. ``overrides`` maps
    regular expressions over weight names to formats; the last that matches wins. ``accuracy_level`` 4 lets the product
    round activations to 8 bits per block, 0 keeps them in float32. ``max_kl`` is the parity gate's budget: mean KL
    divergence to the captured model, in nats per token; for an encoder it is ``max_cosine``, the mean of 1 - cosine to
    the captured model's vectors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Bits = 4
    block: Block = 128
    symmetric: bool = True
    method: Method = "gptq"
    fallback: TensorFormat = TensorFormat(method="mse", block=64)
    head_bits: Bits | None = None
    target_bits: float | None = Field(default=None, gt=2, lt=9)
    overrides: Mapping[str, TensorFormat] = Field(default_factory=dict)
    accuracy_level: Literal[0, 4] = 4
    max_kl: float = Field(default=0.5, gt=0)
    max_cosine: float = Field(default=0.02, gt=0, le=1)

    @field_validator("fallback")
    @classmethod
    def _reads_no_text(cls, fallback: TensorFormat) -> TensorFormat:
        if fallback.method in (None, "gptq") or fallback.float:
            raise ValueError("expected a method that reads no text: rtn or mse")
        return fallback

    _expressions = field_validator("overrides")(_checked_expressions)


class EmbeddingCompression(BaseModel):
    """How a table that is looked up is stored as codes into a small codebook, see ``numerics.codebook``.

    ``method`` "kmeans" clusters the weights. "dkm" goes on from there: for ``steps`` steps on the calibration text,
    table and centroids are trained by differentiable k-means so that the model's predictions stay what they were;
    a step costs about what it costs to train the model on 2,048 tokens. A code of ``bits`` (8) stands for
    ``cluster_dim`` weights (2), in ``stages``; a scale for ``group`` weights of a row, 0 for all. The share ``keep`` of
    the rows (0.01), those whose rounding would cost the text most, stays in float16. ``ratio`` (float32 bytes over
    stored bytes, everything counted) chooses bits, cluster_dim and keep in their place. ``weighting`` says what an
    error in a row counts: as often as its token occurs in the text, the same everywhere, or as the text's predictions
    depend on it (the row's Fisher information). ``max_kl`` is the parity gate's budget, mean KL divergence in nats per
    token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["kmeans", "dkm"] = "kmeans"
    bits: int | None = Field(default=None, ge=1, le=8)
    cluster_dim: Literal[1, 2, 4, 8] | None = None
    stages: Literal[1, 2] = 1
    group: int = Field(default=0, ge=0)
    keep: float | None = Field(default=None, ge=0, le=0.5)
    ratio: float | None = Field(default=None, gt=1, le=200)
    weighting: Literal["frequency", "fisher", "none"] = "frequency"
    steps: int = Field(default=300, ge=1)
    max_kl: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _fit_together(self) -> EmbeddingCompression:
        if self.ratio is not None:
            chosen = [n for n in ("bits", "cluster_dim", "keep") if getattr(self, n) is not None]
            chosen += [n for n, plain in (("stages", 1), ("group", 0)) if getattr(self, n) != plain]
            if chosen:
                raise ValueError(f"a ratio of the embedding chooses {', '.join(chosen)} by itself")
        if self.method == "dkm" and self.stages > 1:
            raise ValueError("method 'dkm' of the embedding trains one stage, not 2")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether it cannot be done without text."""
        return self.method == "dkm" or self.weighting == "fisher"


class SparseActivations(BaseModel):
    """What linear layers read, without the channels of small magnitude (TEAL, Liu et al., 2024): no training.

    ``target`` is the share of channels that are dropped. With ``method`` "threshold" every input has a threshold,
    calibrated on text, below which a channel counts as 0; with "topk" each token keeps as many of its largest. What
    the head reads stays whole. ``allocation`` "greedy" drops more where that changes a layer's result less, and the
    target on average over the weights; "uniform" the same share everywhere. ``overrides`` maps regular expressions over
    module paths (of the layers that read an input) to targets of their own, 0 for none; the last that matches wins.
    ``max_kl`` is the parity gate's budget: mean KL divergence in nats per token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: float = Field(default=0.5, ge=0, le=0.95)
    method: Literal["threshold", "topk"] = "threshold"
    allocation: Literal["greedy", "uniform"] = "greedy"
    overrides: Mapping[str, Annotated[float, Field(ge=0, le=0.95)]] = Field(default_factory=dict)
    max_kl: float = Field(default=0.5, gt=0)

    _expressions = field_validator("overrides")(_checked_expressions)

    @property
    def drops(self) -> bool:
        """Whether any layer is asked to leave anything out."""
        return any((self.target, *self.overrides.values()))


# Nats per token; on the shipped model int8 costs 0.0001, int4 0.017.
KV_BUDGETS = {"fp32": 0.0, "int8": 0.02, "auto": 0.02, "k8v4": 0.1, "int4": 0.2}


class KVCacheConfig(BaseModel):
    """How keys and values are kept.

    ``dtype``: "fp32"; "int8", "int4" for both; "k8v4" for 8-bit keys and 4-bit values; "auto" for 4 bits in the layers
    where that costs little and 8 in the others. Without a ``group`` every channel has a fixed scale, calibrated on
    text; with one, each token's row carries a scale for every ``group`` channels. ``bounded`` keeps no more than the
    window of layers that look back over a window only. ``window`` is for endless streams: what is kept of a sequence
    are its first ``sinks`` tokens and at least the ``window`` most recent ones, in every layer (StreamingLLM, Xiao et
    al., 2023). ``max_kl`` is the parity gate's budget for rounding: mean KL divergence to the model with a float32
    cache, nats per token; without one, what the dtype is known to keep.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["fp32", "int8", "int4", "k8v4", "auto"] = "fp32"
    group: Literal[16, 32, 64, 128] | None = None
    bounded: bool = True
    window: int | None = Field(default=None, ge=16)
    sinks: int = Field(default=4, ge=0)
    max_kl: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _groups_are_of_integers(self) -> KVCacheConfig:
        if self.group is not None and self.dtype in ("fp32", "auto"):
            raise ValueError(f"a cache of dtype {self.dtype!r} has no groups")
        return self

    def __str__(self) -> str:
        return self.dtype if self.group is None else f"{self.dtype}-g{self.group}"

    @property
    def budget(self) -> float:
        """``max_kl``, or the dtype's own."""
        return self.max_kl or KV_BUDGETS[self.dtype]

    @property
    def formats(self) -> tuple[RowFormat, RowFormat]:
        """Of keys and of values; for "auto" the narrow ones."""
        bits = {"fp32": (32, 32), "int8": (8, 8), "int4": (4, 4), "k8v4": (8, 4), "auto": (4, 4)}[self.dtype]
        return RowFormat(bits[0], self.group or 0), RowFormat(bits[1], self.group or 0)


def parse_kv(text: str) -> dict[str, Any]:
    """``"int8"`` or ``"int4-g32"`` as settings of ``KVCacheConfig``, not yet checked."""
    dtype, dash, group = text.partition("-g")
    return {"dtype": dtype, "group": int(group) if group.isdecimal() else group if dash else None}


class Recipe(BaseModel):
    """One way of optimizing a model.

    ``logits`` decides whether a step returns logits for its last token only (all that generation reads) or for every
    token (scoring text, verifying drafts). ``context`` shortens the number of positions the artifact is made for.
    ``weights`` None keeps them in float32. ``prefill="int8"`` writes the weights a second time as 8-bit rows, for
    prompts only: about twice the speed there, for one more byte per weight. ``kv`` says how the cache is kept.
    ``embedding`` stores the table of tokens as codes into a codebook; a head tied to it keeps weights of its own.
    ``ternary`` is for models trained with linears of -1, 0 and +1: it rounds what these read to 8 bits a token, as
    training did, and stores them in 2 bits; ``weights`` are then about what is left.
    ``sparsity`` drops small channels of what linear layers read; a number stands for a target.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "fp32"
    description: str = ""
    logits: Literal["last", "all"] = "last"
    context: int | None = Field(default=None, ge=1)
    weights: WeightQuantization | None = None
    prefill: Literal["shared", "int8"] = "shared"
    kv: KVCacheConfig = KVCacheConfig()
    embedding: EmbeddingCompression | None = None
    ternary: bool = False
    sparsity: SparseActivations | None = None

    @field_validator("sparsity", mode="before")
    @classmethod
    def _target_alone(cls, given: object) -> object:
        return {"target": given} if isinstance(given, (int, float)) else given

    @model_validator(mode="after")
    def _ternary_linears_read_everything(self) -> Recipe:
        if self.ternary and self.sparsity is not None and self.sparsity.drops:
            raise ValueError("sparsity is for linears with other weights than ternary ones, which read every channel")
        return self

    @model_validator(mode="after")
    def _prompts_have_integers(self) -> Recipe:
        if self.prefill == "int8" and self.weights is None and not self.ternary:
            raise ValueError("prefill 'int8' is a second form of integer weights, and these stay float32")
        return self


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="int4",
        description="4-bit weights in blocks of 128, 8-bit head, calibrated",
        weights=WeightQuantization(head_bits=8),
    ),
    Recipe(
        name="int8",
        description="8-bit weights in blocks of 128, calibrated",
        weights=WeightQuantization(bits=8, max_kl=0.05, max_cosine=0.005),
    ),
    Recipe(
        name="int4-fast",
        description="4-bit weights in blocks of 256, calibrated: the fewest bytes and the fastest products at 4 bits",
        weights=WeightQuantization(block=256),
    ),
    Recipe(
        name="int4-accurate",
        description="4-bit weights with zero points in blocks of 32, 8-bit head, calibrated",
        weights=WeightQuantization(block=32, symmetric=False, head_bits=8),
    ),
    Recipe(
        name="int3-mixed",
        description="2 and 4-bit weights mixed by measured sensitivity to 3.25 bits, calibrated",
        weights=WeightQuantization(bits=2, symmetric=False, target_bits=3.25, max_kl=2.0),
    ),
    Recipe(
        name="int2",
        description="2-bit weights with zero points in blocks of 32, 4-bit head, calibrated: for models trained for it",
        weights=WeightQuantization(bits=2, block=32, symmetric=False, head_bits=4, max_kl=4.0),
    ),
    Recipe(name="fp32", description="32-bit weights and cache, every fusion; the same greedy tokens as the model"),
)


def find_recipe(recipe: str | Recipe, **changes: Any) -> Recipe:
    """A recipe by name, or the given one, with ``changes`` applied; raises ``ConfigError`` naming the nearest.

    A change may name a field of the recipe, which it replaces, of its ``weights``, or ``window`` and ``sinks`` of its
    ``kv``; None leaves what is there. ``kv`` is a ``KVCacheConfig``, a mapping of its fields, or a name such as "int8"
    or "int4-g32".
    """
    if isinstance(recipe, str):
        found = next((r for r in RECIPES if r.name == recipe), None)
        if found is None:
            names = [r.name for r in RECIPES]
            near = get_close_matches(recipe, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"recipes are {', '.join(names)}"
            raise ConfigError(f"there is no recipe {recipe!r}", hint=hint)
        recipe = found
    settings = recipe.model_dump()
    for name, value in changes.items():
        if value is None:
            continue
        if name in ("kv", "window", "sinks"):
            settings["kv"] |= _kv_settings(name, value)
        elif name in Recipe.model_fields:
            settings[name] = value
        elif settings["weights"] is None:
            raise ConfigError(
                f"recipe {recipe.name!r} keeps float32 weights, it has no {name}", hint="use int4 or int8"
            )
        else:
            settings["weights"][name] = value
    if changes.get("sinks") is not None and settings["kv"].get("window") is None:
        raise ConfigError(f"sinks {changes['sinks']} belong to a window", hint="give a window as well")
    try:
        return Recipe(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a rule between settings
            raise ConfigError(f"recipe {recipe.name!r}: {first['msg'].removeprefix('Value error, ')}") from error
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"recipe {recipe.name!r}: {where}: {first['msg']}, got {first['input']!r}") from error


def refuse_decoding(recipe: Recipe) -> None:
    """Raises ``ConfigError`` for a recipe that asks of an encoder what only a model that generates has."""
    plain = Recipe()
    for name in ("logits", "prefill", "kv", "embedding", "ternary", "sparsity"):
        if getattr(recipe, name) != getattr(plain, name):
            raise ConfigError(
                f"{name} {getattr(recipe, name)} is for models that generate, this one is an encoder",
                hint="leave it out, or pass task='generate'",
            )


def _kv_settings(name: str, value: Any) -> dict[str, Any]:
    """A change to the cache: a name such as "int8", whole settings, or one of them."""
    if name != "kv":
        return {name: value}
    if isinstance(value, KVCacheConfig):
        return value.model_dump()
    if isinstance(value, str):
        return parse_kv(value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"kv: expected settings, a mapping or a name, got {value!r}", hint="for example int8 or int4-g32"
        )
    return dict(value)


def embedding_settings(method: str | None, **settings: Any) -> dict[str, Any] | None:
    """``embedding`` of a recipe from what a command was given; raises ``ConfigError`` for settings without a method."""
    given = {name: value for name, value in settings.items() if value is not None}
    if method is None:
        if given:
            raise ConfigError(
                f"{', '.join(given)} of the embedding: expected a method, too", hint="--embedding kmeans or dkm"
            )
        return None
    return {"method": method, **given}


def parse_overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["lm_head=8,block=32", "mlp=float"]`` as ``Recipe.weights.overrides`` takes it; raises ``ConfigError``."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        expression, equals, settings = text.partition("=")
        if not equals or not expression or not settings:
            raise ConfigError(f"override {text!r}: expected REGEX=SETTING", hint="for example lm_head=8,block=32")
        found.pop(expression, None)  # of two equal ones the later, in its place: the last that matches a weight wins
        found[expression] = dict(_override_setting(text, part.strip()) for part in settings.split(","))
    return found


def _override_setting(text: str, part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        return ("float", True) if name == "float" else ("bits", _number(text, name))
    if name in ("bits", "block"):
        return name, _number(text, value)
    if name == "symmetric" and value in ("true", "false"):
        return name, value == "true"
    if name == "method":
        return name, value
    raise ConfigError(
        f"override {text!r}: {part!r} is no setting", hint="bits, block, symmetric=true|false, method, or float"
    )


def _number(text: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"override {text!r}: expected a number, got {value!r}")
    return int(value)
