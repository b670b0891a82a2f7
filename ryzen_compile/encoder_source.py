"""Where an encoder comes from, and whether a model is one: facts of its configuration and class, no model's name.

A directory is checked as ``source`` checks any. The class that the configuration declares is the one that is loaded,
so that every tensor of the checkpoint has its place; its body is what computes vectors.
"""

from __future__ import annotations

import inspect as signatures
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.recipe_file import read_dims
from ryzen_compile.sentence_layout import MODULES_NAME, read_layout
from ryzen_compile.source import (
    check_config,
    check_finite,
    check_loading_info,
    check_ties,
    inspect,
    load_tokenizer,
    loading,
    read_json,
    refuse_code,
)
from ryzen_compile.spec import EncoderSettings, Pooling, Task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENIZER_CONTEXT = 10_000_000  # above it stands transformers' way of saying that there is no limit


@dataclass(frozen=True)
class LoadedEncoder:
    """The body of a model in eval mode, in float32; ``settings`` say what is done before and after it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    settings: EncoderSettings


def task_of_directory(directory: Path, *, trust_remote_code: bool = False) -> Task:
    """What the model in ``directory`` is for.

    An encoder has the layout of sentence-transformers, or declares an architecture that has no head to generate with
    and attends to both sides. What cannot be told is left to whoever loads it as a decoder. Raises ``ModelError`` and
    ``UnsafeError`` for a configuration that is damaged or asks for code.
    """
    if (directory / MODULES_NAME).is_file():
        return "embed"
    if not (directory / "config.json").is_file():
        return "generate"
    settings = read_json(directory / "config.json")
    if not trust_remote_code:
        refuse_code(directory)
    check_config(settings)
    if "auto_map" in settings:
        return "generate"
    kind, config = _declared(directory, settings)
    if kind is None or config is None or not _is_bare_or_masked(kind, config):
        return "generate"
    import torch

    with torch.device("meta"), loading("model", directory):
        model = kind(config)
    return task_of_model(model)


def task_of_model(model: nn.Module) -> Task:
    """The same of a model in memory: a bare or masked-language model of transformers whose attention is not causal, or
    a ``SentenceTransformer``."""
    facts: Any = model
    if _saves_layout(model):
        return "embed"
    if not hasattr(facts, "can_generate") or facts.can_generate():
        return "generate"
    if not _is_bare_or_masked(type(facts), facts.config):
        return "generate"
    causal = any(getattr(module, "is_causal", False) for module in facts.modules())
    return "generate" if causal else "embed"


def read_encoder(
    model: nn.Module | Path,
    *,
    pooling: Pooling | None = None,
    context: int | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> LoadedEncoder:
    """The encoder in a directory, or a model in memory with its ``tokenizer``, which is checked for NaN alone.

    A ``SentenceTransformer`` is read from what it saves. ``pooling``, ``context`` and ``tokenizer`` are in the place of
    the model's own. Raises as ``load_encoder`` does.
    """
    if isinstance(model, Path):
        found = load_encoder(model, pooling=pooling, trust_remote_code=trust_remote_code)
    elif _saves_layout(model):
        saving: Any = model
        with tempfile.TemporaryDirectory(prefix="ryzen_compile-") as folder:
            saving.save_pretrained(folder, create_model_card=False)
            found = load_encoder(Path(folder), pooling=pooling)
    else:
        check_finite(model)
        body: Any = body_of(model)
        found = LoadedEncoder(body, tokenizer, EncoderSettings(pooling or Pooling(), _limit(tokenizer)))
    settings = found.settings if context is None else replace(found.settings, context=context)
    return LoadedEncoder(found.model, tokenizer or found.tokenizer, settings)


def body_of(model: nn.Module) -> nn.Module:
    """The part of a transformers model that computes hidden states; any other module is itself."""
    body: nn.Module = getattr(model, "base_model", model)
    config = getattr(body, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} has an encoder and a decoder", hint="pass its encoder alone, as a module"
        )
    return body


def load_encoder(directory: Path, *, pooling: Pooling | None = None, trust_remote_code: bool = False) -> LoadedEncoder:
    """The encoder in ``directory``, of the layout of sentence-transformers or a plain transformers model.

    ``pooling`` replaces the layout's; a plain model has none and takes the mean of its tokens, scaled to length 1,
    unless told otherwise. Raises what ``read_layout`` and ``inspect`` raise, ``ModelError`` for weights and a tokenizer
    that do not fit, ``UnsupportedError`` for quantized weights and models with a decoder.
    """
    layout = read_layout(directory)
    settings = EncoderSettings() if layout is None else layout.settings
    settings = replace(settings, pooling=pooling or settings.pooling, depths=read_dims(directory) or ())
    directory = directory if layout is None else layout.transformer
    files = inspect(directory, trust_remote_code=trust_remote_code)
    if files.quantization is not None:
        raise UnsupportedError(
            f"the encoder in {shown_path(directory)} has quantized weights", hint="save it dequantized"
        )
    model = _load(directory, files.config, any("pooler." in name for name in files.tensors), trust_remote_code)
    check_ties(model)
    check_finite(model)
    tokenizer = load_tokenizer(directory, model, trust_remote_code)
    limits = [limit for limit in (settings.context, _limit(tokenizer)) if limit is not None]
    body: Any = body_of(model)
    return LoadedEncoder(body.eval(), tokenizer, replace(settings, context=min(limits, default=None)))


def _limit(tokenizer: Any) -> int | None:
    """The most tokens that a tokenizer says its model reads."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < MAX_TOKENIZER_CONTEXT else None


def _saves_layout(model: nn.Module) -> bool:
    """Whether a model in memory is a chain of modules that writes itself as ``read_layout`` reads it."""
    return all(hasattr(model, name) for name in ("similarity_fn_name", "prompts", "save_pretrained"))


def _load(directory: Path, settings: dict[str, Any], has_pooler: bool, trust_remote_code: bool) -> PreTrainedModel:
    import torch
    from transformers import AutoModel

    kind, config = (None, None) if "auto_map" in settings else _declared(directory, settings)
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code} if kind is None else {"config": config}
    if kind is not None and "add_pooling_layer" in signatures.signature(kind.__init__).parameters:
        arguments["add_pooling_layer"] = has_pooler  # it is not read, and may be in the checkpoint or not
    with loading("model", directory):
        model, info = (kind or AutoModel).from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info`, with every shape, instead of raised one by one
            **arguments,
        )
    check_loading_info(info)
    return model


def _declared(
    directory: Path, settings: dict[str, Any]
) -> tuple[type[PreTrainedModel] | None, PretrainedConfig | None]:
    """The class of transformers that ``config.json`` names and its configuration; None where it names no such."""
    import transformers

    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None, None
    with loading("configuration", directory):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if not isinstance(config, getattr(kind, "config_class", None) or ()):
        raise UnsupportedError(f"config.json declares a {shown(name)} of another model type, {type(config).__name__}")
    return kind, config


def _is_bare_or_masked(kind: type, config: PretrainedConfig) -> bool:
    """Whether a class is a model without a head, or with one that fills in masked tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

    return any(kind is mapping.get(type(config), None) for mapping in (MODEL_MAPPING, MODEL_FOR_MASKED_LM_MAPPING))
