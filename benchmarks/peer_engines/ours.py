"""This project: ``api.export`` of the random model, ``api.load``, ``CompiledModel.generate``.

The options are a ``Recipe``'s and whether native operators run it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_engines.child import Engine, Request, serve


def prepare(request: Request) -> dict[str, Any]:
    from peer_engines.onnx_bytes import bytes_per_token
    from ryzen_compile.api import export
    from ryzen_compile.config import Recipe
    from ryzen_compile.shapes import random_model

    recipe = Recipe(**request.options["recipe"])
    artifact = Path(request.path) / "artifact"
    # Unverified: the gate compares logits, and here they mean nothing.
    export(random_model(request.shape), artifact, recipe, verify=False)
    weights = recipe.weights
    described = "fp32" if weights is None else f"{weights.bits}-bit g{weights.block}, codes by {weights.method}"
    return {
        "bytes_per_token": bytes_per_token(artifact / "model.onnx"),
        "artifact_bytes": sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file()),
        "format": described,
    }


class Ours:
    def __init__(self, request: Request) -> None:
        import ryzen_compile
        from ryzen_compile.validate.machine import read_versions

        self.model = ryzen_compile.load(
            Path(request.path) / "artifact",
            threads=request.threads,
            digests=False,
            native=request.options["native"],
        )
        found = read_versions()
        self.versions = {name: found[name] or "" for name in ("ryzen-compile", "onnxruntime")}
        self.note = f"generate; native operators: {self.model.engine.claims.to_text()}"

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        import numpy as np

        from ryzen_compile.runtime.generate import GenerationStats

        stats = GenerationStats()
        ids = np.array([prompt], np.int64)
        # The first token comes from the prompt's logits, so one more gives ``new`` steps.
        self.model.generate(ids, max_new_tokens=new + 1, do_sample=False, eos_token_id=None, stats=stats)
        if stats.decode_steps != new:
            raise RuntimeError(f"expected {new} steps, got {stats.decode_steps}")
        return stats.prefill_seconds, stats.decode_seconds


def open_engine(request: Request) -> Engine:
    return Ours(request)


if __name__ == "__main__":
    serve(prepare, open_engine)
