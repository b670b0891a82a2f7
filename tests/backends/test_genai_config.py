"""``genai_config.json``: its content, and that onnxruntime-genai itself accepts it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ryzen_compile.backends.onnxruntime.genai import genai_config
from ryzen_compile.errors import UnsupportedError
from ryzen_compile.spec import ModelSpec

SPEC = ModelSpec(
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=32,
    vocab=100,
    context=8192,
    tied=True,
    parameters=1,
    architecture="llama",
)
CACHE = [f"past_key_values.{layer}.{half}" for layer in range(2) for half in ("key", "value")]
INPUTS = ["input_ids", "attention_mask", *CACHE]


def test_a_library_of_operators_is_named_with_the_model_that_calls_it() -> None:
    found = genai_config(SPEC, inputs=INPUTS, filename="model.native.onnx", operators="libryzen_cpu.so")
    decoder = found["model"]["decoder"]
    assert decoder["filename"] == "model.native.onnx"
    assert decoder["session_options"]["custom_ops_library"] == "libryzen_cpu.so"


def test_the_whole_dictionary() -> None:
    assert genai_config(SPEC, inputs=INPUTS, bos_token_id=1, eos_token_id=2, pad_token_id=0) == {
        "model": {
            "type": "decoder",
            "bos_token_id": 1,
            "eos_token_id": [2],
            "pad_token_id": 0,
            "vocab_size": 100,
            "context_length": 8192,
            "decoder": {
                "filename": "model.onnx",
                "head_size": 8,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "min_length": 0,
            "max_length": 4096,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }


def test_only_inputs_of_the_graph_are_declared() -> None:
    def declared(*names: str) -> set[str]:
        return set(genai_config(SPEC, inputs=[*names, *CACHE])["model"]["decoder"]["inputs"]) - {
            "past_key_names",
            "past_value_names",
        }

    assert declared("input_ids") == {"input_ids"}
    assert declared("input_ids", "position_ids") == {"input_ids", "position_ids"}


def test_a_short_context_bounds_the_default_length() -> None:
    assert genai_config(replace(SPEC, context=512), inputs=INPUTS)["search"]["max_length"] == 512
    for window in (256, 8000):  # a buffer shorter than a window is an error
        wide = genai_config(replace(SPEC, context=32_768), inputs=INPUTS, window=window)
        assert wide["search"]["max_length"] == max(4096, window)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"eos_token_id": [2, 3]}, {"eos_token_id": [2, 3], "pad_token_id": 2}),
        ({"eos_token_id": 0}, {"eos_token_id": [0], "pad_token_id": 0}),
        # genai refuses to start with an end token outside the vocabulary (GPT-2's default in a small vocabulary)
        ({"bos_token_id": 50256, "eos_token_id": 50256}, {"eos_token_id": [99], "pad_token_id": 99}),
        ({"eos_token_id": [2, 100], "pad_token_id": -1}, {"eos_token_id": [2], "pad_token_id": 2}),
        ({"pad_token_id": 5}, {"eos_token_id": [99], "pad_token_id": 5}),
    ],
)
def test_special_tokens(given: dict[str, Any], expected: dict[str, Any]) -> None:
    model = genai_config(SPEC, inputs=INPUTS, **given)["model"]
    assert {key: value for key, value in model.items() if key.endswith("token_id")} == expected


def test_generation_defaults_are_taken_over() -> None:
    generation = {
        "do_sample": True,
        "temperature": 1,
        "top_k": 500,
        "top_p": None,
        "num_beams": 4,
        "max_length": 20,
        "min_p": 0.1,
        "cache_implementation": "static",
    }
    search = genai_config(SPEC, inputs=INPUTS, generation=generation)["search"]
    assert search["do_sample"] is True
    assert isinstance(search["temperature"], float)
    assert (search["top_k"], search["top_p"], search["num_beams"], search["max_length"]) == (100, 1.0, 1, 4096)
    assert "min_p" not in search  # a key that genai does not know stops it from loading
    assert "cache_implementation" not in search


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (CACHE, "no input 'input_ids'"),
        ([*INPUTS, "total_sequence_length"], "feeds no value to the graph input 'total_sequence_length'"),
        ([*INPUTS, "past_key_values.x.key"], "feeds no value"),
        (INPUTS[:-1], "cache layer 1 has only the input 'key'"),
    ],
)
def test_inputs_that_genai_would_not_feed(inputs: list[str], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        genai_config(SPEC, inputs=inputs)


def save_counting_model(directory: Path, vocab: int) -> list[str]:
    """A graph whose next token is always the last one plus one; its cache passes through. Returns its inputs."""
    halves = ("key", "value")
    cache = [
        helper.make_tensor_value_info(f"past_key_values.0.{h}", TensorProto.FLOAT, ["B", 1, "P", 4]) for h in halves
    ]
    present = [helper.make_tensor_value_info(f"present.0.{h}", TensorProto.FLOAT, ["B", 1, "P", 4]) for h in halves]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
            *(helper.make_node("Identity", [f"past_key_values.0.{h}"], [f"present.0.{h}"]) for h in halves),
        ],
        "counting",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"]), *cache],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", vocab]), *present],
        [numpy_helper.from_array(np.roll(np.eye(vocab, dtype=np.float32), 1, axis=1), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, directory / "model.onnx")
    return [value.name for value in graph.input]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eos_token_id": 9, "bos_token_id": 1, "pad_token_id": 0}, list(range(5, 10))),
        ({"eos_token_id": [12, 7]}, [5, 6, 7]),
        ({"eos_token_id": 50256}, list(range(5, 16))),
        ({"eos_token_id": 9, "generation": {"repetition_penalty": 1.1, "top_k": 0, "top_p": 0.9}}, list(range(5, 10))),
    ],
)
def test_genai_runs_it(tmp_path: Path, settings: dict[str, Any], expected: list[int]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    inputs = save_counting_model(tmp_path, vocab=16)
    spec = ModelSpec(1, 1, 1, 4, 4, 16, 40, False, 0, "counting")
    (tmp_path / "genai_config.json").write_text(json.dumps(genai_config(spec, inputs=inputs, **settings)))
    model = genai.Model(str(tmp_path))
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens([4])
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected
