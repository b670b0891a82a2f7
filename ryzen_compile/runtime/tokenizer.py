"""The tokenizer of an artifact, on the ``tokenizers`` library alone: text to ids and back.

Loading an artifact must not cost the import of torch and transformers, so this reads ``tokenizer.json`` and the few
settings that matter from ``tokenizer_config.json``. ``decode`` has the signature of transformers' own, so streamers and
stop strings take either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.errors import ArtifactError, PromptError


class Tokenizer:
    """``eos_token_id`` and ``bos_token_id`` are ids or none. Calling it gives transformers' ``input_ids`` mapping."""

    def __init__(self, backend: Any, settings: dict[str, Any]) -> None:
        self._backend = backend
        self._settings = settings
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.pad_token_id = self._id_of("pad_token")

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
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
