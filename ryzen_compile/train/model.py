"""The model that a configuration asks for, its tokenizer, and the directory that a trained one is saved to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ryzen_compile.errors import ConfigError
from ryzen_compile.manifest import shown
from ryzen_compile.publish import Staging
from ryzen_compile.source import load_model, resolve
from ryzen_compile.train.config import ModelSettings, NewTokenizer
from ryzen_compile.train.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    Raises ``ConfigError`` for an architecture that transformers does not know or that has settings it does not, and for
    a vocabulary smaller than the tokenizer's; and what loading a directory raises.
    """
    if settings.path is not None:
        model = load_model(resolve(settings.path))[0]
    else:
        model = _new_model(settings.architecture or {}, tokenizer, seed)
    vocab = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab:
        raise ConfigError(f"the tokenizer has {len(tokenizer)} tokens, the model's table {vocab} rows")
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: str, notes: Mapping[str, str]
) -> None:
    """Writes a Hugging Face directory, all at once: safetensors of ``dtype``, configuration, tokenizer, and ``notes``
    (file name -> text). The model stays as it is."""
    with Staging(out, force=True, owner_marker=TRAINED_MARKER) as stage:
        wanted = DTYPES[dtype]
        state = {name: value.to(wanted) if value.is_floating_point() else value for name, value in _state(model)}
        before = model.config.dtype
        model.config.dtype = wanted
        try:
            model.save_pretrained(stage.path, state_dict=state)
        finally:
            model.config.dtype = before
        tokenizer.save_pretrained(stage.path)
        for name, text in notes.items():
            (stage.path / name).write_text(text, encoding="utf-8")
        stage.commit()


def _state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Without what is tied to another: transformers ties it again when it loads."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if _is_tied(model) else set()
    return [(name, value.detach()) for name, value in model.state_dict().items() if name not in tied]


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _new_model(architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(architecture)
    kind = str(fields.pop("model_type"))
    end = tokenizer.eos_token_id
    for name, value in (("vocab_size", len(tokenizer)), ("bos_token_id", end), ("eos_token_id", end)):
        fields.setdefault(name, value)
    try:
        config = AutoConfig.for_model(kind, **fields)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"model.architecture: {kind!r}: {' '.join(str(error).split())}") from error
    plain = AutoConfig.for_model(kind)
    strange = sorted(name for name in fields if not hasattr(plain, name))
    if strange:
        raise ConfigError(f"model.architecture: {kind!r} has no setting {', '.join(map(repr, strange))}")
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model.architecture: {kind!r}: {' '.join(str(error).split())}") from error
    finally:
        torch.set_rng_state(generator_state)
    return model
