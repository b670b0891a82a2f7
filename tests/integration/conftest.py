"""The shipped model and what is made of it: one artifact for each recipe, exported when a test first asks for it.

Everything runs on one thread. Two would wait for each other on a busy machine, and no result here depends on them.
Prompts and texts are from the second half of the built-in text, which no recipe was calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ryzen_compile.api import export, load
from ryzen_compile.config import Recipe, find_recipe
from ryzen_compile.runtime.compiled import CompiledModel
from ryzen_compile.text import read_text
from ryzen_compile.validate.speculation import spread_prompts

THREADS = 1
RATIO = 6.0  # of the table as codes
CODES = {"method": "kmeans", "ratio": RATIO}
RECIPES: dict[str, Recipe] = {
    "fp32": find_recipe("fp32"),
    "int4": find_recipe("int4"),
    "int8 cache": find_recipe("fp32", kv="int8"),
    "codes": find_recipe("fp32", embedding=CODES),
    "int4 and codes": find_recipe("int4", embedding=CODES),
}


@dataclass
class Artifacts:
    """Artifacts of the model at ``source`` by name of their recipe, below ``directory``; not to be changed."""

    source: Path
    directory: Path
    made: dict[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Of the recipe ``name``, exported with every check."""
        if name not in self.made:
            export(self.source, self.directory / name, RECIPES[name])
            self.made[name] = self.directory / name
        return self.made[name]

    @contextmanager
    def open(self, name: str, **options: Any) -> Iterator[CompiledModel]:
        with load(self.path(name), threads=THREADS, **options) as model:
            yield model


@pytest.fixture(scope="session")
def artifacts(tiny_python_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tiny_python_lm, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def recipes() -> dict[str, Recipe]:
    """What the artifacts are made by."""
    return RECIPES


@pytest.fixture(scope="session")
def float_model(tiny_python_lm: Path) -> torch.nn.Module:
    """The model as transformers runs it, in float32; not to be changed."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_python_lm, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def windows(tiny_python_lm: Path) -> Callable[[int, int], np.ndarray]:
    """``windows(count, length)``: (count, length) int64 of text, spread over the second half of the built-in one."""
    tokenizer = Tokenizer.from_file(str(tiny_python_lm / "tokenizer.json"))
    content = read_text("builtin")
    unseen = content[len(content) // 2 :]
    ids = tokenizer.encode(unseen, add_special_tokens=False).ids
    return lambda count, length: spread_prompts(unseen, lambda _: ids, count=count, length=length)


@pytest.fixture(scope="session")
def prompts(windows: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """(6, 48) int64."""
    return windows(6, 48)


@pytest.fixture(scope="session")
def greedy() -> Callable[..., list[list[int]]]:
    """``greedy(model, prompts, new)``: the tokens that follow each prompt, through any end token."""

    def text(model: CompiledModel, prompts: np.ndarray, new: int, **arguments: Any) -> list[list[int]]:
        settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, **arguments}
        return [model.generate(prompt[None], **settings)[0, len(prompt) :].tolist() for prompt in prompts]

    return text


@pytest.fixture(scope="session")
def reference_greedy() -> Callable[..., list[list[int]]]:
    """The same by transformers, the plainest way: everything is computed anew for each token, and no cache is kept."""

    @torch.inference_mode()
    def text(model: torch.nn.Module, prompts: np.ndarray, new: int) -> list[list[int]]:
        ids = torch.from_numpy(prompts)
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids[:, prompts.shape[1] :].tolist()

    return text
