"""The tokenizer of a training run: an existing one, or a new byte-level BPE trained on the run's own text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ryzen_compile.errors import ConfigError, ModelError
from ryzen_compile.manifest import shown, shown_path
from ryzen_compile.source import refuse_code, resolve
from ryzen_compile.train.config import NewTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def train_tokenizer(texts: Sequence[str], settings: NewTokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Radford et al., 2019) of ``settings.vocab`` tokens, or fewer if the texts have no more pairs.

    Every byte is a token, so every text can be written in it and read back exactly. ``settings.end`` is token 0: it
    begins, ends and pads. The same texts give the same tokenizer. Raises ``ConfigError`` without text, and when the end
    token is a byte's own letter.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not any(texts):
        raise ConfigError("a new tokenizer needs text to be trained on, got none")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if settings.end in alphabet:
        raise ConfigError(f"model.tokenizer.end: {shown(settings.end)} stands for a byte", hint="give a longer one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab, special_tokens=[settings.end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = settings.end
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, or of a hub id (downloaded unless cached or offline); never with code of its own.

    Raises ``ModelError`` when there is none or it is damaged, ``UnsafeError`` when it asks to run code.
    """
    directory = resolve(source)
    refuse_code(directory)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for damaged files
        reason = str(error).strip().partition("\n")[0][:300]
        raise ModelError(f"transformers cannot load a tokenizer from {shown_path(directory)}: {reason}") from error
