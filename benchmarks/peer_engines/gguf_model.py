"""A Hugging Face llama or qwen2 directory as a float16 GGUF, without a vocabulary. Needs ``gguf`` and numpy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peer_engines.weights import open_tensors

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def write_gguf(model: Path, out: Path) -> None:
    """Matrices in float16, vectors in float32. Raises ``KeyError`` for another architecture or an unknown tensor."""
    config = json.loads((model / "config.json").read_text())
    kind = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[kind])
    _write_settings(writer, config)
    for name, tensor in open_tensors(model / "model.safetensors").items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise KeyError(f"gguf knows no tensor {name}")
        writer.add_tensor(target, _convert(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def _write_settings(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or hidden // heads)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_tokenizer_model("none")


def _convert(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    if config["model_type"] == "llama" and ".q_proj." in name:
        tensor = interleave_halves(tensor, config["num_attention_heads"])
    elif config["model_type"] == "llama" and ".k_proj." in name:
        tensor = interleave_halves(tensor, config["num_key_value_heads"])
    return np.ascontiguousarray(tensor, np.float16 if tensor.ndim == 2 else np.float32)


def interleave_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to pairs: ggml's llama rotates neighbours, transformers halves.

    ``tensor`` ``(heads * D, ...)``; row ``h D + i`` goes to ``h D + 2 i``, row ``h D + D/2 + i`` to ``h D + 2 i + 1``.
    """
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(tensor.shape)


def bytes_per_token(path: Path) -> tuple[int, str]:
    """Bytes of all tensors but a table that only embeds, and the formats they are in, such as ``154 Q4_0, 1 Q6_K``."""
    tensors = gguf.GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    read = [tensor for tensor in tensors if not (untied and tensor.name == "token_embd.weight")]
    formats = Counter(tensor.tensor_type.name for tensor in read if len(tensor.shape) == 2)
    return sum(int(tensor.n_bytes) for tensor in read), ", ".join(f"{n} {name}" for name, n in formats.most_common())
