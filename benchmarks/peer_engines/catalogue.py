"""Which engines there are: a name, the module that runs it, what that module is told, and the environment it needs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from ryzen_compile.config import find_recipe
from ryzen_compile.errors import ConfigError


@dataclass(frozen=True)
class Environment:
    """An interpreter's contents: the libraries to look for, the option that names one, how to make one."""

    option: str | None
    libraries: tuple[str, ...]
    recipe: str


ENVIRONMENTS = {
    "torch": Environment(None, ("torch", "transformers"), "pip install torch transformers"),
    "genai": Environment(
        "--genai-python",
        ("onnxruntime_genai", "torch", "transformers", "onnx", "onnx_ir"),
        "python -m venv genai && genai/bin/pip install onnxruntime-genai torch transformers onnx onnx-ir",
    ),
    "openvino": Environment(
        "--openvino-python",
        ("openvino_genai", "optimum", "nncf"),
        'python -m venv ov && ov/bin/pip install openvino-genai "optimum-intel[openvino]"',
    ),
    "llama": Environment(
        "--llama-python",
        ("llama_cpp", "gguf"),
        'python -m venv llama && CMAKE_ARGS="-DGGML_NATIVE=ON" llama/bin/pip install '
        "--no-binary llama-cpp-python llama-cpp-python gguf",
    ),
}


@dataclass(frozen=True)
class Subject:
    """One engine of the comparison. ``ours`` ones are what ratios are taken of."""

    name: str
    module: str
    environment: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.module == "ours"

    @property
    def slug(self) -> str:
        """The name of its directory and log."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def same(self, facts: dict[str, Any]) -> bool:
        """Whether files with these ``facts`` were prepared for these options."""
        return facts.get("options") == json.loads(json.dumps(self.options))


def parse_recipe(text: str) -> Subject:
    """``int4`` or ``int4:prefill=int8,context=1024``: a recipe, and settings of it that are replaced.

    Codes are rounded to the nearest unless a ``method`` is given: speed does not depend on them, and to calibrate
    random weights takes long and finds nothing. The whole recipe is what the engine is told, so that one whose
    definition has changed is exported anew. ``native=false`` is no setting of a recipe: it runs the artifact on ONNX
    Runtime's own operators. Raises ``ConfigError`` for what is no recipe or no setting.
    """
    recipe, _, settings = text.partition(":")
    changes: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"recipe {text!r}: expected NAME:SETTING=VALUE, got {setting!r}")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    shown = "".join(f", {name} {value}" for name, value in changes.items())
    native = changes.pop("native", "auto")
    chosen = find_recipe(recipe, **changes)
    if chosen.weights is not None and "method" not in changes:
        chosen = find_recipe(chosen, method="rtn")
    return Subject(f"ryzen_compile {recipe}{shown}", "ours", "torch", {"recipe": chosen.model_dump(), "native": native})


def peers(flash: str) -> list[Subject]:
    """Everybody else. ``flash`` is llama.cpp's flash attention: auto (its default), on or off."""
    sym = ["--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"]
    return [
        *(
            Subject(f"{kind} {short}", "huggingface", "torch", {"dtype": dtype, "compile": kind == "torch.compile"})
            for kind in ("Hugging Face eager", "torch.compile")
            for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
        ),
        Subject("onnxruntime-genai int4 g32", "genai", "genai", {"extra_options": {"accuracy_level": 4}}),
        Subject(
            # The head for the last token only is not the builder's default; it is a gain for prompts.
            "onnxruntime-genai int4 g128, last logits",
            "genai",
            "genai",
            {"extra_options": {"block_size": 128, "accuracy_level": 4, "prune_lm_head": "true"}},
        ),
        Subject(
            "OpenVINO GenAI int4 g128",
            "openvino",
            "openvino",
            {"arguments": [*sym, "--group-size-fallback", "adjust"]},
        ),
        *(
            Subject(
                f"llama.cpp {ftype}{' pure' if pure else ''}",
                "llamacpp",
                "llama",
                {"ftype": ftype, "pure": pure, "flash": flash},
            )
            for ftype, pure in (("Q4_0", True), ("Q4_0", False), ("Q8_0", False))
        ),
    ]
