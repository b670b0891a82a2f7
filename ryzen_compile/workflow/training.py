"""A training run from its configuration to a saved model: what ``ryzen-compile train`` does."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.backends import get_backend
from ryzen_compile.errors import CaptureError, ConfigError, UnsupportedError
from ryzen_compile.manifest import shown_path
from ryzen_compile.train.config import Mode, PassSettings, TrainConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ryzen_compile.train.checkpoint import Checkpoints, Snapshot
    from ryzen_compile.train.component import Component
    from ryzen_compile.train.documents import Corpus
    from ryzen_compile.train.loop import Trainer, TrainingResult, Watcher
    from ryzen_compile.train.metrics import MetricsCollector
    from ryzen_compile.train.objective import Levers, Objective
    from ryzen_compile.train.plan import Rows

MODEL = "model"  # the folder of the trained model, below that of the run
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class FinishedRun:
    """``directory`` holds the model, checkpoints and metrics of the run; ``result`` says how it went."""

    directory: Path
    mode: Mode
    result: TrainingResult
    main: bool = True  # of several processes, the one that tells

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
        }


@dataclass(frozen=True)
class Text:
    """The documents of a run, their tokenizer, and the rows that are trained and validated on."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    rows: Rows


@dataclass(frozen=True)
class Run:
    """A run that is ready to begin, or to go on behind ``snapshot``; ``collector`` is the main process's."""

    directory: Path
    trainer: Trainer
    model: PreTrainedModel
    text: Text
    components: Sequence[Component]
    snapshot: Snapshot | None
    collector: MetricsCollector | None


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
    from ryzen_compile.workflow.trained_model import save_trained

    with open_run(config, mode, resume=resume, watcher=watcher) as run:
        finished = FinishedRun(run.directory, mode, run.trainer.fit(run.snapshot), run.collector is not None)
        model = whole_model(run.model)
        if run.collector is not None:
            card = model_card(config, mode, finished.result, model, run.text.corpus, run.text.rows)
            target = run.directory / MODEL
            save_trained(model, run.text.tokenizer, run.components, target, config.save_dtype, card)
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
    from ryzen_compile.train.model import prepare_model
    from ryzen_compile.train.objective import Objective
    from ryzen_compile.train.optimizer import hidden_matrices, make_optimizers
    from ryzen_compile.train.plan import make_plan
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
    model = prepare_model(config.model, text.tokenizer, config.seed)
    hidden = hidden_matrices(model)
    objective = Objective(model, _levers(config, mode, accelerator.device))
    context = context_of(model, config.data.length)
    objective.levers = checked_levers(objective, text.rows.train[:1].long(), watcher)
    objective.levers = fused_levers(objective, config.passes, accelerator.device, watcher)
    components = make_components(config.passes, objective, text.tokenizer)
    step = None if not resume else 0 if snapshot is None else snapshot.step
    with closing(MetricsCollector(directory, config.metrics, resume_step=step)) if main else nullcontext() as collector:
        controller = OptimizationController(
            components,
            config.controller.model_copy(update={"ablate": config.controller.ablate and mode != "test"}),
            model,
            objective,
            collector,
            partial(_tell, watcher),
            measure_export=partial(exported_speed, components=components) if config.metrics.export else None,
        )
        model.to(accelerator.device)  # components read off a capture what they stand in for, which runs on the CPU
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
            if collector is None or accelerator.num_processes > 1  # a sharded model generates on all of them or on none
            else Samples(
                model, text.tokenizer, collector, config.metrics.samples, config.metrics.sample_tokens, context
            ),
        )
        yield Run(directory, trainer, model, text, components, snapshot, collector)


def prepare_text(config: TrainConfig, mode: Mode = "optimized", watcher: Watcher | None = None) -> Text:
    """Reads, tokenizes and packs the text of ``config``. Raises ``ConfigError`` where there is too little of it."""
    from ryzen_compile.train.documents import read_corpus
    from ryzen_compile.train.model import prepare_tokenizer
    from ryzen_compile.train.packing import pack
    from ryzen_compile.train.plan import TEST_ROWS, TEST_VALIDATION_ROWS, Rows

    corpus = read_corpus(config.data)
    tokenizer = prepare_tokenizer(config.model, [document.text for document in corpus.train])
    length = config.data.length
    most, most_validated = (TEST_ROWS * length, TEST_VALIDATION_ROWS * length) if mode == "test" else (None, None)
    rows = Rows(
        pack([document.text for document in corpus.train], tokenizer, length, tokens=most),
        pack([document.text for document in corpus.validation], tokenizer, length, tokens=most_validated),
        hashlib.sha256(f"{corpus.digest} {sorted(tokenizer.get_vocab().items())}".encode()).hexdigest(),
    )
    _tell(
        watcher,
        f"{len(corpus.train)} documents, {len(rows.train) * length:,} tokens to train on, "
        f"{len(rows.validation) * length:,} to validate on",
    )
    return Text(corpus, tokenizer, rows)


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
        _tell(watcher, "no checkpoint yet: starting at step 0")
    return snapshot


def checked_levers(objective: Objective, rows: torch.Tensor, watcher: Watcher | None = None) -> Levers:
    """The objective's levers less those that do not work here, each with a word to ``watcher``.

    ``rows`` (1, T + 1) are some to try on.
    """
    from ryzen_compile.train.objective import compiler_works

    levers = objective.levers
    if levers.linear_cross_entropy and not objective.logits_are_a_product(rows):
        _tell(watcher, "loss without logits: off, the model's logits are more than its head's product")
        levers = replace(levers, linear_cross_entropy=False, operators=False)
    if levers.compiled and (reason := compiler_works()):
        _tell(watcher, f"compiled code: off, {reason}")
        levers = replace(levers, compiled=False)
    return levers


def fused_levers(objective: Objective, passes: PassSettings, device: torch.device, watcher: Watcher | None) -> Levers:
    """The objective's levers, without fused operators where they cannot be had."""
    from ryzen_compile.train.config import STANDING_IN

    levers = objective.levers
    if not levers.operators:
        return levers
    reason = next((f"{name} stands in for weights" for name in STANDING_IN if getattr(passes, name) is not None), "")
    if not levers.linear_cross_entropy:
        reason = "the loss reads logits"
    if not reason:
        try:
            objective.fuse(device)
            if device.type == "cuda":
                from ryzen_compile.backends.triton import TritonBackend

                TritonBackend().attach()
        except (UnsupportedError, CaptureError) as error:
            reason = error.message
    if reason:
        _tell(watcher, f"fused operators: off, {reason}")
    return replace(levers, operators=not reason)


def _levers(config: TrainConfig, mode: Mode, device: torch.device) -> Levers:
    import torch

    from ryzen_compile.train.objective import Levers, fast_half

    if mode == "baseline":
        return Levers()
    wanted = config.precision.dtype
    if wanted == "auto":
        wanted = "bf16" if fast_half(device) else "fp32"
    dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
    compiled = config.precision.compile is not False and mode != "test"
    operators = config.precision.operators
    if operators == "auto":
        operators = device.type == "cuda" and get_backend("triton").probe().available
    return Levers(dtype, config.precision.linear_cross_entropy, compiled, operators)


def _refuse_sharding(accelerator: Any, config: TrainConfig) -> None:
    """What needs whole weights, where FSDP2 gives each process a part."""
    from ryzen_compile.train.config import STANDING_IN

    if str(accelerator.distributed_type).rpartition(".")[2] != "FSDP":
        return
    whole = [f"passes.{name}" for name in STANDING_IN if getattr(config.passes, name) is not None]
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
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.passes != type(config.passes)())
    # Unless it is told that there is none, accelerate looks for a GPU before it lets processes share a run.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[unused])
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"accelerate is told to accumulate {accelerator.gradient_accumulation_steps} batches as well",
            hint="set optimization.accumulate, and unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        )
    return accelerator


def _tell(watcher: Watcher | None, text: str) -> None:
    if watcher is not None:
        watcher.event(text)
