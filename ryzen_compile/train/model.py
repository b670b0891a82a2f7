"""The model that a configuration asks for, its tokenizer, and the directory that a trained one is saved to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ryzen_compile.errors import ConfigError, NumericalError, ResourceError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.publish import Staging
from ryzen_compile.source import load_model, resolve
from ryzen_compile.train.config import ModelSettings, NewTokenizer
from ryzen_compile.train.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRAINED_MARKER = "config.json"  # what marks a model directory as one that a run may replace


def prepare_tokenizer(settings: ModelSettings, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of the run; a new one is trained on ``texts``. Raises ``ConfigError`` and what loading raises."""
    if isinstance(settings.tokenizer, NewTokenizer):
        return train_tokenizer(texts, settings.tokenizer)
    source = settings.tokenizer or settings.path
    if source is None:  # the configuration has seen to that
        raise ConfigError("model: there is no tokenizer")
    return load_tokenizer(resolve(source))


def prepare_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The model to train, in float32; a new one has the weights that ``seed`` gives.

    Raises ``ConfigError`` for an architecture that transformers does not know or that has settings it does not; and
    what loading a directory and ``ready`` raise.
    """
    if settings.path is not None:
        model = load_model(resolve(settings.path))[0]
    else:
        model = _new_model(settings.architecture or {}, tokenizer, seed)
    return ready(model, tokenizer, settings.freeze or ())


def ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, freeze: Sequence[str]) -> PreTrainedModel:
    """The model to train, less the parameters whose names match a pattern of ``freeze``.

    Raises ``ConfigError`` for a vocabulary smaller than the tokenizer's, and for a pattern that matches nothing.
    """
    vocab = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the model's table {vocab} rows")
    names = [name for name, _ in model.named_parameters()]
    for pattern in freeze:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(
                f"model.freeze: {shown(pattern)} matches none of {len(names)} parameters",
                hint=f"names are like {shown(names[0])}",
            )
        for name in matching:
            model.get_parameter(name).requires_grad_(requires_grad=False)
    return model.train()


def load_teacher(path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model to learn from, frozen. Raises ``ConfigError`` if its tokenizer is another one."""
    teacher, own, _ = load_model(resolve(path))
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the teacher {shown(path)} has another vocabulary than the model that is trained",
            hint="set model.tokenizer to the teacher's directory",
        )
    return teacher.eval().requires_grad_(requires_grad=False)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    dtype: str,
    companions: Callable[[Path], None] | None = None,
) -> None:
    """Writes a Hugging Face directory, all at once: safetensors of ``dtype``, configuration, tokenizer, and what
    ``companions`` writes into the directory that it is given. The model stays as it is.

    Raises ``NumericalError`` for weights that ``dtype`` cannot hold, and what ``Staging`` raises.
    """
    wanted = DTYPES[dtype]
    state = _state(model, wanted)
    with Staging(out, force=True, owner_marker=TRAINED_MARKER) as stage:
        before = model.config.dtype
        try:
            with _no_progress_bar(), _machine_errors(out):
                model.save_pretrained(stage.path, state_dict=state)
                model.config.dtype = wanted  # what was written is the type that the model has in memory
                model.config.save_pretrained(stage.path)
                tokenizer.save_pretrained(stage.path)
        finally:
            model.config.dtype = before
        if companions is not None:
            companions(stage.path)
        stage.commit()


def _state(model: nn.Module, wanted: torch.dtype) -> dict[str, torch.Tensor]:
    """What is tied shares its memory here as well: transformers finds it by that, and stores it once."""
    trained = {name for name, _ in model.named_parameters()}
    converted: dict[tuple[Any, ...], torch.Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in converted:
            converted[place] = value.to(wanted) if value.is_floating_point() else value
            if name in trained and not torch.isfinite(converted[place]).all():
                raise NumericalError(
                    f"parameter {shown(name)} holds values that {wanted} cannot, up to {float(value.abs().max()):.3g}",
                    hint="set save_dtype to bf16 or fp32 and go on with --resume",
                )
        state[name] = converted[place]
    return state


@contextmanager
def _machine_errors(out: Path) -> Iterator[None]:
    """A full disk as ``ResourceError`` where libraries in Rust raise something else, with the system's words."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or "(os error " not in str(error):
            raise
        raise ResourceError(f"cannot write {shown_path(out)}: {error}") from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _new_model(architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    fields = dict(architecture)
    kind = str(fields.pop("model_type"))
    end = tokenizer.eos_token_id
    config = _new_config(kind, fields, {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end})
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise _cannot_build(kind, error) from error
    finally:
        torch.set_rng_state(generator_state)
    return model


def _new_config(kind: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model.architecture: there is no model_type {shown(kind)}{_nearest(kind, CONFIG_MAPPING)}")
    try:
        plain = AutoConfig.for_model(kind)
        config = AutoConfig.for_model(kind, **{**defaults, **fields})
    except Exception as error:  # transformers checks some fields, and trips over others
        raise _cannot_build(kind, error) from error
    # transformers keeps whatever it does not know as an attribute, and renames old spellings of what it does.
    strange = sorted(name for name in fields if hasattr(config, name) and not hasattr(plain, name))
    if strange:
        near = _nearest(strange[0], [*vars(plain), *plain.attribute_map])
        raise ConfigError(f"model.architecture: {kind!r} has no setting {shown(strange[0])}{near}")
    return config


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f", the nearest is {near[0]!r}" if near else ""


def _cannot_build(kind: str, error: Exception) -> Exception:
    """What transformers raised over an architecture, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "allocate memory" in text:
        return ResourceError(f"not enough memory for a new model of type {kind!r}: {text[:300]}")
    return ConfigError(f"model.architecture: {kind!r} cannot be built: {type(error).__name__}: {text[:300]}")
