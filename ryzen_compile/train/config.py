"""What a training run is asked for: one tree of settings, frozen, in which unknown keys are refused by name.

It is read from YAML; single settings can be replaced by ``a.b=value`` (``--set`` of the command line). The whole tree
as a JSON Schema is ``json_schema()``, which editors complete from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ryzen_compile.config import Bits, Block
from ryzen_compile.manifest import shown
from ryzen_compile.settings import Section, parse_settings, read_settings, settings_schema

Mode = Literal["test", "baseline", "optimized"]
MODES: tuple[Mode, ...] = ("test", "baseline", "optimized")
COMPONENTS = ("qat", "ternary", "dkm", "lora", "distill", "matryoshka")
STANDING_IN = ("qat", "ternary", "dkm", "lora")  # passes that compute from other weights than the parameters
Share = Annotated[float, Field(ge=0, le=1)]
CodeBits = Annotated[int, Field(ge=1, le=8)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
Width = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]


class NewTokenizer(Section):
    """A byte-level BPE of ``vocab`` tokens, trained on the training text; ``end`` closes each document."""

    vocab: int = Field(ge=257, le=1 << 20)
    end: str = Field(default="<|endoftext|>", min_length=1)


class ModelSettings(Section):
    """What is trained: an existing model (``path``, a directory or hub id) or a new one of ``architecture``.

    ``architecture`` is a transformers configuration, ``model_type`` and its fields; vocabulary and special tokens that
    it leaves out are the tokenizer's. ``tokenizer`` is a directory or hub id, or a new one to train; the model's own if
    it has a ``path``. Parameters whose names match a pattern of ``freeze`` ("*embeddings*") stay as they are.
    """

    path: str | None = None
    architecture: Mapping[str, Any] | None = None
    tokenizer: str | NewTokenizer | None = None
    freeze: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelSettings:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("expected either a path or an architecture")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("architecture: expected a model_type, such as llama")
        if self.architecture is not None and self.tokenizer is None:
            raise ValueError("a new model needs a tokenizer: a path, or {vocab: N} for a new one")
        return self


class TextSource(Section):
    """Documents: a file or directory (``path``), or a named dataset (``dataset``, needs the library datasets).

    ``path`` is .txt (one document), .jsonl or .parquet (one a record, its ``column``), or a directory, of which every
    file that ``include`` matches is read, in the order of its names, hidden ones and those that are not UTF-8 excepted;
    "python-stdlib" is the library of the Python that runs. ``exclude`` are patterns for files or folders to leave out.
    Patterns are for a name below the directory ("test/*.py") or its last part. Documents with fewer than
    ``min_characters`` or more than ``max_characters`` are left out as well, and those of nothing but white space.
    """

    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    include: tuple[str, ...] = ("*.txt", "*.md", "*.py", "*.jsonl", "*.parquet")
    exclude: tuple[str, ...] = ()
    min_characters: int = Field(default=1, ge=1)
    max_characters: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> TextSource:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("expected either a path or a dataset")
        return self


class DataSettings(Section):
    """Text, cut into rows of ``length`` tokens without padding: documents follow each other, each closed by the end
    token.

    What is validated on is ``validation``, a source of its own, or the documents of ``train`` whose names match
    ``hold_out`` (each pattern has to match one; a file's third record is "data.jsonl:3"), or one group of documents in
    ``hold_out_groups``: those of a group have the first part of their names in common, less its suffix ("json" of
    "json/decoder.py", a module), and the first byte of that part's SHA-256 is divisible. Without any of these it is
    every ``1 / validation_share``-th document, at least one. ``validation_tokens`` bounds it. A contrastive run counts
    pairs where others count tokens; there ``length`` is that of a positive at most.
    """

    train: TextSource
    validation: TextSource | None = None
    hold_out: tuple[str, ...] = ()
    hold_out_groups: int | None = Field(default=None, ge=2, le=128)
    validation_share: float = Field(default=0.02, gt=0, le=0.5)
    length: int = Field(default=1024, ge=2)
    validation_tokens: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _one_to_validate_on(self) -> DataSettings:
        named = {
            "validation": self.validation is not None,
            "hold_out": bool(self.hold_out),
            "hold_out_groups": self.hold_out_groups is not None,
        }
        if sum(named.values()) > 1:
            both = " and ".join(name for name, given in named.items() if given)
            raise ValueError(f"{both} both say what is validated on: expected one")
        return self


class OptimizationSettings(Section):
    """``optimizer`` "adamw", or "muon": orthogonalised updates for hidden matrices, AdamW for the rest (Jordan et al.,
    2024). ``batch`` rows at a time in each process, gradients of ``accumulate`` such batches make a step; how long is
    said by exactly one of ``tokens``, ``epochs``, ``steps``. ``clip`` bounds the gradient's norm, 0 does not."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: float = Field(default=1.0, ge=0)
    batch: int = Field(default=4, ge=1)
    accumulate: int = Field(default=1, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> OptimizationSettings:
        if sum(value is not None for value in (self.tokens, self.epochs, self.steps)) != 1:
            raise ValueError("expected exactly one of tokens, epochs and steps")
        return self


class ScheduleSettings(Section):
    """The learning rate: ``warmup`` steps of rise, then by ``kind`` to ``last`` (a share of the peak).

    "wsd" (warm-up, stable, decay) stays at the peak and falls in the last ``decay`` of the steps behind the warm-up.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: int = Field(default=100, ge=0)
    last: Share = 0.05
    decay: float = Field(default=0.2, gt=0, le=1)


class PrecisionSettings(Section):
    """What products are computed in, in mode "optimized"; master weights and optimizer stay float32. "auto" is bf16
    where the processor has instructions for it, else fp32. ``compile`` "auto" is yes where a compiler is found,
    ``operators`` "auto" where their kernels run, on a GPU: the model's body as fused operators. They go with
    ``linear_cross_entropy``, the loss without a batch's logits, and not with passes that stand in for weights."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    linear_cross_entropy: bool = True
    operators: Literal["auto"] | bool = "auto"


class QatSettings(Section):
    """Weights rounded as the export rounds them (to nearest, in blocks), gradients passed straight through.

    ``bits`` are stages, widest first: the controller moves on when the loss has settled. ``head_bits`` is for the
    output head and a table tied to it. ``start`` is the share of the run at which it begins.
    """

    bits: tuple[Bits, ...] = (4,)
    block: Block = 128
    symmetric: bool = True
    head_bits: Bits | None = 8
    start: Share = 0.0

    @model_validator(mode="after")
    def _stages_narrow(self) -> QatSettings:
        if not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ValueError(f"bits: expected stages, widest first, got {list(self.bits)}")
        return self


class TernarySettings(Section):
    """Linears of -1, 0 and +1 times their mean magnitude, activations of 8 bits a row (BitNet b1.58, Ma et al., 2024);
    head and table stay as they are."""

    start: Share = 0.0


class DkmSettings(Section):
    """The table of tokens, softly clustered by differentiable k-means: ``bits`` a code of ``cluster_dim`` weights.

    ``bits`` are stages, widest first, as those of qat are. ``temperatures``, first and last, are in units of a vector's
    mean squared error when clusters began; they fall until the end of the run.
    """

    bits: tuple[CodeBits, ...] = (8,)
    cluster_dim: Literal[1, 2, 4, 8] = 2
    temperatures: tuple[Temperature, Temperature] = (1.0, 0.05)
    start: Share = 0.0

    @model_validator(mode="after")
    def _fall(self) -> DkmSettings:
        if not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ValueError(f"bits: expected stages, widest first, got {list(self.bits)}")
        if self.temperatures[0] < self.temperatures[1]:
            raise ValueError(f"temperatures: expected the first to be the higher, got {list(self.temperatures)}")
        return self


class LoraSettings(Section):
    """Low-rank updates of the linears whose names match ``targets``, all of them by default, by the library peft;
    everything else is frozen, and the updates are merged at the end."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None


class DistillSettings(Section):
    """``weight`` of the loss is the divergence from a ``teacher``'s predictions (a directory or hub id of a model with
    the same tokenizer), the rest is the text's; both at ``temperature`` (Hinton et al., 2015).

    The model may then draft for its teacher: ``draft_cost`` is the seconds of one of its steps over one of the
    teacher's, by default the share of parameters.
    """

    teacher: str
    weight: Share = 0.5
    temperature: float = Field(default=1.0, gt=0)
    start: Share = 0.0
    draft_cost: float | None = Field(default=None, gt=0)


class MatryoshkaSettings(Section):
    """The loss is a mean over ``dims`` by ``weights`` (equal by default): that of the first so many channels alone, so
    that vectors, or a table and its head, can be cut to them (Kusupati et al., 2022).

    ``dims``, widest first, begin with all of the model's channels; by default these are ``depth`` halvings, rounded to
    multiples of 8. ``start`` is the share of the run at which it begins.
    """

    dims: tuple[Width, ...] | None = None
    depth: int = Field(default=6, ge=2, le=16)
    weights: tuple[Positive, ...] | None = None
    start: Share = 0.0

    @model_validator(mode="after")
    def _nested(self) -> MatryoshkaSettings:
        dims = self.dims
        if dims is not None and (len(dims) < 2 or list(dims) != sorted(set(dims), reverse=True)):
            raise ValueError(f"dims: expected two or more, widest first, got {list(dims)}")
        depths = self.depth if dims is None else len(dims)
        if self.weights is not None and len(self.weights) != depths:
            raise ValueError(f"weights: expected one for each of {depths} dims, got {len(self.weights)}")
        return self


class ContrastiveSettings(Section):
    """An encoder is trained on pairs: of the positives in its batch a query is to find its own (van den Oord et al.,
    2018; Henderson et al., 2017), by a softmax over cosines times ``scale``; ``symmetric``: positives find their
    queries as well.

    Pairs are records with two ``columns``, query and positive, or are taken from Python files (.py): the first sentence
    of a function's docstring, and the function without it. Queries are cut at ``query_length`` tokens, positives at
    ``data.length``.
    """

    scale: float = Field(default=20.0, gt=0, le=1000)
    symmetric: bool = False
    query_length: int = Field(default=64, ge=2)
    columns: tuple[str, str] = ("query", "positive")


class PassSettings(Section):
    """What is trained in the loop, each by its settings; none is off."""

    qat: QatSettings | None = None
    ternary: TernarySettings | None = None
    dkm: DkmSettings | None = None
    lora: LoraSettings | None = None
    distill: DistillSettings | None = None
    matryoshka: MatryoshkaSettings | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> PassSettings:
        if self.qat is not None and self.ternary is not None:
            raise ValueError("qat and ternary both round the linears: expected one")
        if self.lora is not None and (self.ternary is not None or self.qat is not None):
            raise ValueError("lora trains updates of frozen weights, which qat and ternary round apart: expected one")
        return self


class ControllerSettings(Section):
    """The controller acts at the end of each epoch of ``every`` steps (0: a pass over the text).

    It undoes its last change to a component (a narrower stage, or turning it on) when the validation loss is more than
    ``loss_rise`` nats over its lowest, twice in a row. It turns a lever off when a step takes ``slowdown`` times as
    long with it as without and the run will be over ``worth`` seconds sooner: times differ from run to run, so that
    the next one may not repeat this one to the bit. ``adapt`` lets it change parameters: a component goes to its next
    stage once the losses of two epochs differ by less than ``settled`` nats. ``ablate`` measures each component's share
    by switching it off. Without ``enabled`` components are turned on at their start, nothing else.
    """

    enabled: bool = True
    every: int = Field(default=0, ge=0)
    loss_rise: float = Field(default=0.5, gt=0)
    slowdown: float = Field(default=1.1, gt=1)
    worth: float = Field(default=60.0, ge=0)
    settled: float = Field(default=0.02, gt=0)
    adapt: bool = True
    ablate: bool = True


class MetricsSettings(Section):
    """``every`` steps a record is written, and of the first step and one that is not finite. Anomalies are flagged
    against the last ``window`` records. ``trackers`` get the same numbers. ``export`` measures the exported model (time
    to the first token, decode speed) at the end of each epoch of the controller."""

    every: int = Field(default=1, ge=1)
    window: int = Field(default=50, ge=5)
    trackers: tuple[Literal["tensorboard", "trackio"], ...] = ()
    export: bool = False
    samples: tuple[str, ...] = ()
    sample_tokens: int = Field(default=64, ge=1)


class CheckpointSettings(Section):
    """Every ``every`` steps (0: at the end of the run only) all that is needed to go on; the last ``keep`` stay, and
    the one with the lowest validation loss with ``best``."""

    every: int = Field(default=500, ge=0)
    keep: int = Field(default=2, ge=1)
    best: bool = True


class ValidationSettings(Section):
    """Every ``every`` steps the loss on the validation text (0: at the end of the run only)."""

    every: int = Field(default=500, ge=0)


class EarlyStopping(Section):
    """Stops when ``patience`` validations in turn were no better than the lowest loss by ``least`` nats, and takes the
    weights that had it. After a change of the controller's losses are counted anew."""

    patience: int = Field(default=3, ge=1)
    least: float = Field(default=0.0, ge=0)


class TrainConfig(Section):
    """A training run; everything it writes goes below ``output``. With ``contrastive`` it trains an encoder, without a
    causal language model."""

    output: str
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    model: ModelSettings
    data: DataSettings
    contrastive: ContrastiveSettings | None = None
    optimization: OptimizationSettings
    schedule: ScheduleSettings = ScheduleSettings()
    precision: PrecisionSettings = PrecisionSettings()
    passes: PassSettings = PassSettings()
    controller: ControllerSettings = ControllerSettings()
    metrics: MetricsSettings = MetricsSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    early_stopping: EarlyStopping | None = None
    save_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _fit_together(self) -> TrainConfig:
        if self.passes.qat is not None and self.save_dtype != "fp32":
            raise ValueError(
                "passes.qat needs save_dtype fp32: narrower weights round to other codes than were trained"
            )
        if self.early_stopping is not None and not (self.validation.every and self.checkpoint.best):
            raise ValueError("early_stopping needs validation.every above 0, and checkpoint.best")
        if self.contrastive is not None:
            _check_contrastive(self)
        return self


def _check_contrastive(config: TrainConfig) -> None:
    """Raises ``ValueError`` for what is a language model's alone."""
    passes = [name for name in COMPONENTS if name != "matryoshka" and getattr(config.passes, name) is not None]
    unfit = {f"passes.{name}": True for name in passes} | {
        "model.architecture": config.model.architecture is not None,
        "model.tokenizer": config.model.tokenizer is not None,
        "metrics.samples": bool(config.metrics.samples),
        "metrics.export": config.metrics.export,
        "precision.compile true": config.precision.compile is True,
        "precision.operators true": config.precision.operators is True,
    }
    if names := [name for name, given in unfit.items() if given]:
        raise ValueError(f"contrastive trains an existing encoder as it reads texts, without {', '.join(names)}")
    if config.optimization.batch < 2:
        raise ValueError("contrastive needs optimization.batch of at least 2: negatives are the other pairs' positives")


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The configuration in the YAML file ``path``, with ``changes`` ("optimization.lr=1e-3") applied in their order.

    Raises ``ConfigError`` that names the file, the setting, what was expected and what came.
    """
    return read_settings(TrainConfig, path, changes)


def parse_config(tree: Mapping[str, Any], name: str = "configuration") -> TrainConfig:
    """Settings as a mapping, checked. Raises ``ConfigError``."""
    return parse_settings(TrainConfig, tree, name)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the whole tree."""
    return settings_schema(TrainConfig)


# What may change between a run and its continuation: it decides what is written down, not what is computed.
FREE_SETTINGS = ("output", "metrics", "checkpoint", "save_dtype")


def changed_settings(before: Mapping[str, Any], now: TrainConfig) -> list[str]:
    """What of ``before``, a dumped configuration, is different in ``now`` and would make it another run."""
    return list(_differences(before, now.model_dump(mode="json"), ""))


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            if path or key not in FREE_SETTINGS:
                yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {_plain(before)}, now {_plain(now)}"


def _plain(value: Any) -> str:
    return shown(value) if isinstance(value, str) else shown(value)[1:-1]
