"""From training to text, and from an export to those who run it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ryzen_compile.api import export, load, optimize
from ryzen_compile.config import find_recipe
from ryzen_compile.recipe_file import read_recipe
from ryzen_compile.workflow.training import prepare_text, train
from tests.train.tiny_run import LLAMA, tiny_config

NEW = 24
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 64}
Record = Callable[[str, object], None]


def test_what_was_trained_is_what_generates(tmp_path: Path, record_property: Record) -> None:
    """The exported model's loss on the run's validation text is the run's own last figure, relative 1e-4: float32 sums
    in another order, over weights that training rounded by the export's own function. Activations stay float32 for it,
    as training had them. Its tokens are those of the references."""
    pytest.importorskip("accelerate")
    model = {"architecture": {**LLAMA, **WIDE}}
    config = tiny_config(tmp_path, passes={"qat": {"block": 32, "bits": [4]}}, optimization={"steps": 12}, model=model)
    run = train(config)
    trained = run.directory / "model"
    recipe = find_recipe(read_recipe(trained) or pytest.fail("no recipe"), accuracy_level=0, logits="all")
    report = export(trained, tmp_path / "artifact", recipe)
    rows = prepare_text(config).rows.validation
    prompt = rows[:1, :5].numpy()
    with load(tmp_path / "artifact", native=False, threads=1) as found:
        losses = [
            functional.cross_entropy(torch.from_numpy(found(row[None, :-1].numpy())).double()[0], row[1:])
            for row in rows
        ]
        text = found.generate(prompt, max_new_tokens=12, eos_token_id=None).tolist()
    with optimize(trained, recipe, backend="eager", verify=False) as references:
        expected = references.generate(prompt, max_new_tokens=12, eos_token_id=None).tolist()
    loss, wanted = float(torch.stack(losses).mean()), run.result.validation.loss
    record_property("trained_loss", wanted)
    record_property("exported_loss", loss)
    assert report.hits()["quantize_weights"] > 0
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert text == expected and len(text[0]) == 17


FRESH = """
import json, sys
import ryzen_compile
directory, prompts, new = json.loads(sys.argv[1])
with ryzen_compile.load(directory, threads=1) as model:
    text = [model.generate([prompt], max_new_tokens=new, do_sample=False, eos_token_id=None)[0] for prompt in prompts]
    words = model.tokenizer.decode(text[0].tolist())
heavy = sorted({"torch", "transformers", "onnxscript", "onnx_ir"} & set(sys.modules))
print(json.dumps([[row[len(prompt):].tolist() for row, prompt in zip(text, prompts)], len(words), heavy]))
"""


def test_an_export_runs_in_a_process_without_torch(
    artifacts: Any, prompts: np.ndarray, greedy: Any, record_property: Record
) -> None:
    """The default recipe, whose tokens there are those here to the last: the same engine, and so the same bits."""
    given = json.dumps([str(artifacts.path("int4")), prompts[:3].tolist(), NEW])
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, given], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.stderr == ""
    text, characters, heavy = json.loads(child.stdout)
    record_property("tokens_compared", NEW * len(text))
    with artifacts.open("int4") as model:
        assert text == greedy(model, prompts[:3], NEW)
    assert characters > 0 and heavy == []


def test_genai_runs_the_artifact_unchanged(
    artifacts: Any, prompts: np.ndarray, greedy: Any, record_property: Record
) -> None:
    """On stock operators, which are what runs there: the same nodes in the same order, and the same tokens."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    theirs = genai.Model(str(artifacts.path("fp32")))
    with artifacts.open("fp32", native=False) as model:
        end = model.generation_config["eos_token_id"]
        ours = [through(row, end) for row in greedy(model, prompts, NEW)]
    record_property("tokens_compared", sum(map(len, ours)))
    for prompt, expected in zip(prompts, ours, strict=True):
        parameters = genai.GeneratorParams(theirs)
        parameters.set_search_options(max_length=len(prompt) + NEW)
        generator = genai.Generator(theirs, parameters)
        generator.append_tokens(prompt[None])
        found = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        assert found == expected
    assert len({token for row in ours for token in row}) > len(prompts)


def through(tokens: list[int], end: int) -> list[int]:
    """What is generated where an end token ends the text: that one, and nothing behind it."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
