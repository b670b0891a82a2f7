"""The tokenizer of an artifact, on the ``tokenizers`` library alone: text to ids and back.

Loading an artifact must not cost the import of torch and transformers, so this reads ``tokenizer.json`` and the few
settings that matter from ``tokenizer_config.json``. ``decode`` has the signature of transformers' own, so streamers and
stop strings take either.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ryzen_compile.errors import ArtifactError, PromptError, UnsupportedError

BEGINNING = 16  # characters for each token that a long text is first cut to before it is tokenized
CUT_MARGIN = 64  # tokens before a cut that may differ from those of the uncut text
_SPACE = re.compile(r"\s")


class Tokenizer:
    """``eos_token_id`` and ``bos_token_id`` are ids or none. Calling it gives transformers' ``input_ids`` mapping."""

    def __init__(self, backend: Any, settings: dict[str, Any]) -> None:
        self._backend = backend
        self._settings = settings
        self._keeps_beginning = settings.get("truncation_side") != "left"
        self._limited: dict[int, Any] = {}  # the same tokenizer by the limit that it cuts texts at
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.pad_token_id = self._id_of("pad_token")

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """Raises ``ArtifactError`` when a file is damaged."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:
            raise ArtifactError(f"tokenizer.json cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = directory / "tokenizer_config.json"
        try:
            settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        except ValueError as error:
            raise ArtifactError(f"{config.name} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ArtifactError(f"{config.name} holds a {type(settings).__name__}, expected an object")
        return cls(backend, settings)

    @classmethod
    def from_transformers(cls, tokenizer: Any, *, lower_case: bool = False) -> Self:
        """The same as ``from_directory`` of what ``tokenizer`` would save; ``lower_case`` lowers all text beforehand.

        ``tokenizer`` is a transformers tokenizer over the ``tokenizers`` library, which is left as it is. Raises
        ``UnsupportedError`` for one in Python.
        """
        import tokenizers
        from tokenizers import normalizers

        written = getattr(tokenizer, "backend_tokenizer", None)
        if written is None:
            raise UnsupportedError(
                f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library, which artifacts are read with",
                hint="convert it with transformers, or save it with a tokenizer.json",
            )
        backend = tokenizers.Tokenizer.from_str(written.to_str())
        backend.no_truncation()
        backend.no_padding()
        if lower_case:
            steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])]
            backend.normalizer = normalizers.Sequence(steps)
        names = ("bos_token", "eos_token", "pad_token", "truncation_side")
        return cls(backend, {name: getattr(tokenizer, name, None) for name in names})

    def __call__(self, text: str) -> dict[str, np.ndarray]:
        """``{"input_ids": (1, T), "attention_mask": (1, T)}`` int64."""
        ids = np.array([self.encode(text)], dtype=np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; raises ``PromptError`` for text that is not valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode at character {error.start}: {error.reason}") from error
        return list(self._backend.encode(text).ids)

    def encode_batch(self, texts: Sequence[str], limit: int) -> list[tuple[np.ndarray, bool]]:
        """For each text its ids, (T,) int32 with special tokens, T <= ``limit``, and whether that left some out.

        A text far longer than ``limit`` is read no further than takes to know its first tokens. Raises ``PromptError``
        for text that is not valid Unicode, and a ``limit`` that holds no more than the special tokens.
        """
        special = self._backend.num_special_tokens_to_add(is_pair=False)
        if limit <= special:
            raise PromptError(f"{limit} tokens leave no room beside {special} special ones", hint="a longer context")
        for number, text in enumerate(texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise PromptError(
                    f"text {number} is not valid Unicode at character {error.start}: {error.reason}"
                ) from error
        backend = self._truncating(limit)
        found: list[tuple[np.ndarray, bool]] = [(np.zeros(0, np.int32), False)] * len(texts)
        first = BEGINNING * limit if self._keeps_beginning else sys.maxsize
        reading = [(number, _beginning(text, first)) for number, text in enumerate(texts)]
        while reading:
            encoded = backend.encode_batch_fast([beginning for _, beginning in reading])
            again = []
            for (number, beginning), one in zip(reading, encoded, strict=True):
                is_whole = len(beginning) == len(texts[number])
                if is_whole or sum(len(rest.ids) for rest in one.overflowing) >= CUT_MARGIN:
                    found[number] = np.array(one.ids, dtype=np.int32), bool(one.overflowing)
                else:
                    again.append((number, _beginning(texts[number], 4 * len(beginning) + BEGINNING)))
            reading = again
        return found

    def save(self, directory: Path, limit: int) -> None:
        """Writes ``tokenizer.json`` so that others cut texts at ``limit`` tokens, as ``encode_batch`` does."""
        (directory / "tokenizer.json").write_text(self._truncating(limit).to_str(pretty=True) + "\n", encoding="utf-8")

    def _truncating(self, limit: int) -> Any:
        """The tokenizer with a limit, made once: a limit is part of its state, which other threads read."""
        if limit not in self._limited:
            import tokenizers

            backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
            backend.enable_truncation(limit, direction="right" if self._keeps_beginning else "left")
            self._limited[limit] = backend
        return self._limited[limit]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False, **_: Any) -> str:
        return str(self._backend.decode([int(i) for i in token_ids], skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        """Every token's id by its text as the tokenizer writes it, added tokens included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def _id_of(self, name: str) -> int | None:
        token = self._settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        found = self._backend.token_to_id(token) if isinstance(token, str) else None
        return None if found is None else int(found)


def _beginning(text: str, characters: int) -> str:
    """At least ``characters`` of ``text``, to the end of a word: what a word becomes may depend on all of it."""
    if len(text) <= characters:
        return text
    space = _SPACE.search(text, characters)
    return text if space is None else text[: space.start()]
