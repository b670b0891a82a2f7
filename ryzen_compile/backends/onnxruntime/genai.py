"""``genai_config.json``: what lets onnxruntime-genai (Python, C#, C++, Java) run the artifact unchanged.

Its parser refuses every key it does not know inside ``model`` and ``search``, and older releases know fewer; so only
keys that the oldest supported release knows are written, and everything of ours goes into ``ryzen_compile.json``.
``model.type`` is always the generic ``decoder``: the graph says what the model is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ryzen_compile.errors import UnsupportedError
from ryzen_compile.spec import ModelSpec

GENAI_CONFIG_NAME = "genai_config.json"
# genai allocates the cache for search.max_length at once: a 128k context as the default would fail on most machines.
MAX_DEFAULT_LENGTH = 4096
_OPTIONAL_INPUTS = ("attention_mask", "position_ids")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_SEARCH_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "early_stopping": True,
}
# The decoders' tokenizers that genai 0.18 takes, less "Fast" at the end; any other stops it from opening the directory.
_TOKENIZERS = frozenset(
    f"{name}Tokenizer"
    for name in (
        *("Baichuan", "ChatGLM", "CodeGen", "CodeLlama", "Gemma", "GPT2", "GPTNeoX", "InternLM2", "Llama", "Phi3"),
        *("PreTrained", "Qwen2"),
    )
)
_TOKENIZER_BACKENDS = frozenset(("MistralCommonBackend", "PythonBackend", "SentencePieceBackend", "TokenizersBackend"))
_ANY_TOKENIZER = "PreTrainedTokenizerFast"
_FROM_GENERATION = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")


def genai_config(
    spec: ModelSpec,
    *,
    inputs: Iterable[str],
    bos_token_id: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    generation: Mapping[str, Any] | None = None,
    window: int = 0,
    filename: str = "model.onnx",
    operators: str | None = None,
) -> dict[str, Any]:
    """The content of ``genai_config.json``, as a new dictionary.

    ``inputs`` are the graph's input names: ``input_ids`` must be there, caches come as pairs ``past_key_values.N.key``
    and ``.value`` (gaps in N are fine), ``attention_mask`` and ``position_ids`` are declared only if present.
    ``generation`` holds the model's generation defaults, of which sampling settings that are not None are taken over;
    beams are not, because a shared cache buffer serves a single beam. ``window`` is the largest of the layers whose
    attention drops old rows by itself: no buffer may be shorter, and genai makes all as long as ``max_length``.
    ``operators`` is a library of operators that ``filename`` calls, beside it. Raises
    UnsupportedError for an input that genai would leave without a value and for a cache without its other half.
    """
    present = _known_inputs(inputs)
    eos = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id or ()
    model: dict[str, Any] = {
        "type": "decoder",
        **_special_tokens(spec.vocab, bos_token_id, eos, pad_token_id),
        "vocab_size": spec.vocab,
        "context_length": spec.context,
        "decoder": {
            "filename": filename,
            "head_size": spec.head_dim,
            "hidden_size": spec.hidden,
            "num_attention_heads": spec.heads,
            "num_hidden_layers": spec.layers,
            "num_key_value_heads": spec.kv_heads,
            # No thread counts: they belong to the machine that runs the artifact, not to the one that made it.
            "session_options": {
                "log_id": "onnxruntime-genai",
                "provider_options": [],
                **({"custom_ops_library": operators} if operators is not None else {}),
            },
            "inputs": {
                "input_ids": "input_ids",
                **{name: name for name in _OPTIONAL_INPUTS if name in present},
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    return {"model": model, "search": _search(spec, generation or {}, window)}


def known_tokenizer_class(name: object) -> str:
    """``name`` if genai opens such a tokenizer, else the class that stands for whatever ``tokenizer.json`` says.

    transformers reads the same tokenizer from either.
    """
    if not isinstance(name, str):
        return _ANY_TOKENIZER
    return name if name.removesuffix("Fast") in _TOKENIZERS or name in _TOKENIZER_BACKENDS else _ANY_TOKENIZER


def _search(spec: ModelSpec, generation: Mapping[str, Any], window: int) -> dict[str, Any]:
    search = dict(_SEARCH_DEFAULTS)
    for key in _FROM_GENERATION:
        value = generation.get(key)
        if value is not None:
            search[key] = type(_SEARCH_DEFAULTS[key])(value)  # the parser tells 1 from 1.0 and from true
    search["top_k"] = min(search["top_k"], spec.vocab)
    search["max_length"] = max(min(MAX_DEFAULT_LENGTH, spec.context), window)
    search["past_present_share_buffer"] = True
    return search


def _special_tokens(vocab: int, bos: int | None, eos: Iterable[int], pad: int | None) -> dict[str, Any]:
    """The ids that lie in the vocabulary; genai refuses to generate with an end token outside it.

    Nor can it be told that there is none: it would take the padding token. For a model without an end token the last id
    of the vocabulary is named, which tokenizers give to their rarest token.
    """
    ends = [token for token in eos if 0 <= token < vocab] or [vocab - 1]
    ids: dict[str, Any] = {
        "eos_token_id": ends,
        "pad_token_id": pad if pad is not None and 0 <= pad < vocab else ends[0],
    }
    if bos is not None and 0 <= bos < vocab:
        ids["bos_token_id"] = bos
    return ids


def _known_inputs(inputs: Iterable[str]) -> frozenset[str]:
    present = frozenset(inputs)
    if "input_ids" not in present:
        raise UnsupportedError(f"the graph has no input 'input_ids', got {sorted(present)[:10]}")
    halves: dict[str, set[str]] = {}
    for name in sorted(present - {"input_ids", *_OPTIONAL_INPUTS}):
        match = _PAST.fullmatch(name)
        if match is None:
            raise UnsupportedError(
                f"onnxruntime-genai feeds no value to the graph input {name!r}",
                hint="make it an initializer",
            )
        halves.setdefault(match[1], set()).add(match[2])
    for layer, found in halves.items():
        if len(found) != 2:
            raise UnsupportedError(f"cache layer {layer} has only the input {found.pop()!r}, expected key and value")
    return present
