"""A training run from its configuration to a saved model: what ``ryzen-compile train`` does."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import ConfigError
from ryzen_compile.manifest import shown_path
from ryzen_compile.train.config import ContrastiveSettings, Mode, TrainConfig
from ryzen_compile.workflow.levers import checked_levers, fused_levers, tell, wanted_levers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ryzen_compile.spec import EncoderSettings
    from ryzen_compile.train.checkpoint import Checkpoints, Snapshot
    from ryzen_compile.train.component import Component
    from ryzen_compile.train.documents import Corpus
    from ryzen_compile.train.loop import Trainer, TrainingResult, Watcher
    from ryzen_compile.train.metrics import MetricsCollector
    from ryzen_compile.train.objective import Objective
    from ryzen_compile.train.plan import Rows
    from ryzen_compile.train.retention import Figures, Retention

MODEL = "model"  # the folder of the trained model, below that of the run
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class FinishedRun:
    """``directory`` holds the model, checkpoints and metrics of the run; ``result`` says how it went, ``depths`` what
    is left of vectors that are cut, before and after."""

    directory: Path
    mode: Mode
    result: TrainingResult
    main: bool = True  # of several processes, the one that tells
    depths: Mapping[str, Figures] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What is printed and reported of it, JSON."""
        result = self.result
        return {
            "mode": self.mode,
            "steps": result.steps,
            "tokens": result.tokens,
            "train_loss": result.train_loss,
            "validation_loss": result.validation.loss,
            "validation_accuracy": result.validation.accuracy,
            "tokens_per_second": result.tokens_per_second,
            "seconds": result.seconds,
            "stopped": result.stopped,
            "model": str(self.directory / MODEL),
        } | ({"depths": _plain(self.depths)} if self.depths else {})


@dataclass(frozen=True)
class Text:
    """The documents of a run, their tokenizer, and the rows that are trained and validated on."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    rows: Rows


@dataclass(frozen=True)
class Run:
    """A run that is ready to begin, or to go on behind ``snapshot``; ``collector`` is the main process's.
    ``encoder`` says how an encoder's texts become vectors, ``retention`` measures vectors that are cut."""

    directory: Path
    trainer: Trainer
    model: PreTrainedModel
    text: Text
    components: Sequence[Component]
    snapshot: Snapshot | None
    collector: MetricsCollector | None
    encoder: EncoderSettings | None = None
    retention: Retention | None = None


def train(
    config: TrainConfig, mode: Mode = "optimized", *, resume: bool = False, watcher: Watcher | None = None
) -> FinishedRun:
    """Trains as ``config`` says, below ``config.output``/``mode``.

    Mode "optimized" uses every lever that works here, "baseline" none (eager float32), "test" a few steps of the
    optimized run on a little text, to see whether everything is there. Run under torchrun or accelerate launch it
    shares the work. Raises an error of :mod:`ryzen_compile.errors`.
    """
    from ryzen_compile.train.distributed import whole_model
    from ryzen_compile.workflow.card import model_card
    from ryzen_compile.workflow.depth_figures import depth_figures, record_untrained
    from ryzen_compile.workflow.trained_model import save_trained

    with open_run(config, mode, resume=resume, watcher=watcher) as run:
        if run.snapshot is None:
            record_untrained(run.retention, run.collector)
        result = run.trainer.fit(run.snapshot)
        depths = depth_figures(run.retention, run.directory)
        finished = FinishedRun(run.directory, mode, result, run.collector is not None, depths)
        model = whole_model(run.model)
        if run.collector is not None:
            card = model_card(config, mode, finished.result, model, run.text.corpus, run.text.rows, depths)
            target = run.directory / MODEL
            save_trained(model, run.text.tokenizer, run.components, target, config.save_dtype, card, run.encoder)
            run.collector.finish(finished.summary())
        run.trainer.wait_for_everyone()
    return finished


@contextmanager
def open_run(
    config: TrainConfig, mode: Mode = "optimized", *, resume: bool = False, watcher: Watcher | None = None
) -> Iterator[Run]:
    """Everything that ``train`` needs, made and joined; records are closed at the end. Raises as ``train`` does."""
    import torch

    from ryzen_compile.capture import context_of
    from ryzen_compile.train.checkpoint import Checkpoints
    from ryzen_compile.train.components import make_components
    from ryzen_compile.train.controller import OptimizationController
    from ryzen_compile.train.loop import Trainer, refuse_other_run
    from ryzen_compile.train.metrics import MetricsCollector
    from ryzen_compile.train.optimizer import hidden_matrices, make_optimizers
    from ryzen_compile.train.plan import make_plan
    from ryzen_compile.workflow.depth_figures import open_retention
    from ryzen_compile.workflow.exported import exported_speed
    from ryzen_compile.workflow.samples import Samples

    accelerator = _accelerator(config, mode)
    _refuse_sharding(accelerator, config)
    main = accelerator.is_main_process
    watcher = watcher if main else None
    directory = Path(config.output) / mode
    checkpoints = Checkpoints(directory / CHECKPOINTS, keep=config.checkpoint.keep, best=config.checkpoint.best)
    snapshot = _snapshot(checkpoints, directory, mode, resume, watcher)
    torch.manual_seed(config.seed)
    text = prepare_text(config, mode, watcher)
    plan = make_plan(config, mode, text.rows, accelerator.num_processes)
    if snapshot is not None:  # before its records are touched
        refuse_other_run(snapshot, config, mode, plan, text.rows)
    objective, encoder = _objective(config, mode, text, accelerator.device, watcher)
    model = objective.model
    hidden = hidden_matrices(model)
    context = context_of(model, config.data.length)
    components = make_components(config.passes, objective, text.tokenizer)
    step = None if not resume else 0 if snapshot is None else snapshot.step
    with closing(MetricsCollector(directory, config.metrics, resume_step=step)) if main else nullcontext() as collector:
        controller = OptimizationController(
            components,
            config.controller.model_copy(update={"ablate": config.controller.ablate and mode != "test"}),
            model,
            objective,
            collector,
            partial(tell, watcher),
            measure_export=partial(exported_speed, components=components) if config.metrics.export else None,
        )
        model.to(accelerator.device)  # components read off a capture what they stand in for, which runs on the CPU
        alone = None if accelerator.num_processes > 1 else collector  # what one process measures without the others
        retention = None if alone is None else open_retention(config, objective, components, text.rows)
        extra = [parameter for _, own in controller.own_parameters() for parameter in own]
        trainer = Trainer(
            config,
            mode,
            objective,
            make_optimizers(model, hidden, extra, config.optimization, fused=mode != "baseline"),
            controller,
            text.rows,
            plan,
            checkpoints,
            accelerator=accelerator,
            collector=collector,
            watcher=watcher,
            samples=None
            if alone is None  # a sharded model generates on all of them or on none
            else Samples(model, text.tokenizer, alone, config.metrics.samples, config.metrics.sample_tokens, context),
            depths=None if retention is None else retention.figures,
        )
        yield Run(directory, trainer, model, text, components, snapshot, collector, encoder, retention)


def _plain(depths: Mapping[str, Figures]) -> dict[str, Any]:
    """As JSON has it: the keys of objects are strings."""
    return {name: {str(dim): dict(values) for dim, values in found.items()} for name, found in depths.items()}


def _objective(
    config: TrainConfig, mode: Mode, text: Text, device: torch.device, watcher: Watcher | None
) -> tuple[Objective, EncoderSettings | None]:
    """Over the model that ``config`` names, with the levers that work; and an encoder's settings."""
    from ryzen_compile.train.contrastive import ContrastiveObjective
    from ryzen_compile.train.encoder import prepare_encoder
    from ryzen_compile.train.model import prepare_model
    from ryzen_compile.train.objective import Objective
    from ryzen_compile.train.pairs import PairRows

    levers, rows = wanted_levers(config, mode, device), text.rows
    if (pairs := config.contrastive) is not None and isinstance(rows, PairRows):
        model, encoder = prepare_encoder(config.model, text.tokenizer, max(config.data.length, pairs.query_length))
        found = ContrastiveObjective(
            model, levers, encoder.pooling, rows.columns, scale=pairs.scale, symmetric=pairs.symmetric
        )
        return found, encoder
    objective = Objective(prepare_model(config.model, text.tokenizer, config.seed), levers)
    objective.levers = checked_levers(objective, rows.train[:1].long(), watcher)
    objective.levers = fused_levers(objective, config.passes, device, watcher)
    return objective, None


def prepare_text(config: TrainConfig, mode: Mode = "optimized", watcher: Watcher | None = None) -> Text:
    """Reads, tokenizes and packs the text of ``config``. Raises ``ConfigError`` where there is too little of it."""
    from ryzen_compile.train.documents import read_corpus
    from ryzen_compile.train.model import prepare_tokenizer
    from ryzen_compile.train.packing import pack
    from ryzen_compile.train.plan import TEST_ROWS, TEST_VALIDATION_ROWS, Rows

    if config.contrastive is not None:
        return _prepare_pairs(config, config.contrastive, mode, watcher)
    corpus = read_corpus(config.data)
    tokenizer = prepare_tokenizer(config.model, [document.text for document in corpus.train])
    length = config.data.length
    most, most_validated = (TEST_ROWS * length, TEST_VALIDATION_ROWS * length) if mode == "test" else (None, None)
    rows = Rows(
        pack([document.text for document in corpus.train], tokenizer, length, tokens=most),
        pack([document.text for document in corpus.validation], tokenizer, length, tokens=most_validated),
        hashlib.sha256(f"{corpus.digest} {sorted(tokenizer.get_vocab().items())}".encode()).hexdigest(),
    )
    tell(
        watcher,
        f"{len(corpus.train)} documents, {len(rows.train) * length:,} tokens to train on, "
        f"{len(rows.validation) * length:,} to validate on",
    )
    return Text(corpus, tokenizer, rows)


def _prepare_pairs(config: TrainConfig, settings: ContrastiveSettings, mode: Mode, watcher: Watcher | None) -> Text:
    from ryzen_compile.train.encoder import prepare_reading, prompted
    from ryzen_compile.train.pairs import make_rows, read_pairs
    from ryzen_compile.train.plan import TEST_ROWS, TEST_VALIDATION_ROWS

    tokenizer, reading = prepare_reading(config.model)
    pairs = prompted(read_pairs(config.data, settings), reading)
    most = (TEST_ROWS, TEST_VALIDATION_ROWS) if mode == "test" else (None, None)
    rows = make_rows(pairs, tokenizer, settings.query_length, config.data.length, most=most)
    tell(watcher, f"{len(rows.train):,} pairs to train on, {len(rows.validation):,} to validate on")
    if pairs.incomplete:
        tell(watcher, f"{pairs.incomplete:,} records give no pair: one of their texts is too short, too long or blank")
    return Text(pairs.corpus, tokenizer, rows)


def _snapshot(
    checkpoints: Checkpoints, directory: Path, mode: Mode, resume: bool, watcher: Watcher | None
) -> Snapshot | None:
    """What the run goes on from. Raises ``ConfigError`` where a run would be overwritten, or there is none."""
    if not resume:
        if steps := checkpoints.steps():
            if mode != "test":
                raise ConfigError(
                    f"{shown_path(directory)} holds checkpoints of a run already, the last of step {steps[-1]}",
                    hint="go on with --resume, or choose another output",
                )
            shutil.rmtree(directory)  # a test leaves nothing that anybody wants to keep
        return None
    if not directory.is_dir():
        raise ConfigError(f"{shown_path(directory)} holds no run to resume", hint="start it without --resume")
    snapshot = checkpoints.newest()
    if snapshot is None:
        tell(watcher, "no checkpoint yet: starting at step 0")
    return snapshot


def _refuse_sharding(accelerator: Any, config: TrainConfig) -> None:
    """What needs whole weights, where FSDP2 gives each process a part."""
    from ryzen_compile.train.config import STANDING_IN

    if str(accelerator.distributed_type).rpartition(".")[2] != "FSDP":
        return
    whole = [f"passes.{name}" for name in STANDING_IN if getattr(config.passes, name) is not None]
    whole += ["contrastive"] * (config.contrastive is not None)
    whole += ["passes.matryoshka"] * (config.passes.matryoshka is not None)
    if config.optimization.optimizer == "muon":
        whole.append("optimization.optimizer muon")
    if whole:
        raise ConfigError(
            f"{', '.join(whole)} reads whole weights, and FSDP shards them", hint="launch it with DDP, or leave it out"
        )


def _accelerator(config: TrainConfig, mode: Mode) -> Any:
    import torch

    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise ConfigError("training needs the library accelerate", hint="pip install 'ryzen-compile[train]'") from error
    # What a component computes with depends on whether it is on: not every parameter has a gradient in every step.
    unused = config.passes != type(config.passes)() or config.contrastive is not None  # an encoder may have a pooler
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=unused)
    # Unless it is told that there is none, accelerate looks for a GPU before it lets processes share a run.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[kwargs])
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"accelerate is told to accumulate {accelerator.gradient_accumulation_steps} batches as well",
            hint="set optimization.accumulate, and unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        )
    return accelerator
