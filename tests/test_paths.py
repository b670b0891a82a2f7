"""Paths of the shipped model over real artifacts: each has the tokens that it has alone, in any company.

Native operators compute a row alike whatever is beside it and however a text is cut, so that holds to the bit. ONNX
Runtime's own products sum a lone row in another order than several; float32 artifacts, where that is far below the
distances between random numbers and the borders that they are held to, stand for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryzen_compile.api import export, load
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.config import find_recipe
from ryzen_compile.runtime.paths.program import UnitTests
from ryzen_compile.runtime.paths.sandbox import Limits

PROMPTS = (
    "def add(first, second):\n    return first",
    "import",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items.",
)
SAMPLED = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.95, "stop_strings": ["\n\n"]}
# Nothing here depends on how well weights are rounded.
CASES = {"int4": ("int4", {"method": "rtn", "kv": "int8"}), "fp32": ("fp32", {})}
needs_native = pytest.mark.skipif(native.unusable() != "", reason="native operators are not built here")


@pytest.fixture(scope="module")
def artifacts(tiny_python_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifacts")
    for name, (recipe, settings) in CASES.items():
        export(tiny_python_lm, directory / name, find_recipe(recipe, **settings), verify=False)
    return directory


@pytest.mark.parametrize(("name", "own"), [pytest.param("int4", True, marks=needs_native), ("fp32", False)])
@pytest.mark.parametrize("search", [{"rows": 5}, {"step_strings": "\n", "max_depth": 3}, {"step_tokens": 5}], ids=str)
def test_a_path_is_what_generate_gives_alone(artifacts: Path, name: str, own: bool, search: dict[str, Any]) -> None:
    with load(artifacts / name, native=own, threads=1, digests=False) as model:
        assert model.tokenizer is not None
        results = model.generate_paths(list(PROMPTS), 6, seed=7, **SAMPLED, **search)
        forked = [path for result in results for path in result.paths if path.parent is not None]
        assert bool(forked) == ("rows" not in search)
        for prompt, result in zip(PROMPTS, results, strict=True):
            ids = model.tokenizer(prompt)["input_ids"][0].tolist()
            assert result.totals.prompt_tokens == len(ids) and len({path.tokens for path in result.paths}) > 2
            for path in result.paths:
                whole = [*ids, *path.tokens[: path.branched_at]]
                given = SAMPLED | {"max_new_tokens": 24 - path.branched_at, "do_sample": True, "seed": path.seed}
                alone = model.generate(np.array([whole]), **given)[0, len(ids) :].tolist()
                assert alone[: len(path.tokens)] == list(path.tokens), path
                assert len(alone) == len(path.tokens) or path.ended == "pruned"


def test_code_that_passes_is_found(artifacts: Path) -> None:
    tests = "one = Stack()\none.push(4)\nassert one.items == [4]"
    verifier = UnitTests(tests, before=PROMPTS[2], limits=Limits(seconds=20))
    with load(artifacts / "fp32", native=False, threads=1, digests=False) as model:
        given = SAMPLED | {"stop_strings": ["\n"], "verifier": verifier, "vote": "best", "seed": 1}
        result = model.generate_paths(PROMPTS[2], 16, stop="first", **given)
        assert result.winner is not None and result.winner.verdict is not None and result.winner.verdict.passed
        assert result.text.startswith("append(item)")
        whole = model.generate_paths(PROMPTS[2], 16, **given)
    assert any(path.verdict is not None and not path.verdict.passed for path in whole.paths)
    assert result.totals.paths < 16 == whole.totals.paths
    for early, late in zip(result.paths, whole.paths, strict=False):
        assert early.ended == "cancelled" or early.tokens == late.tokens
