"""onnxruntime-genai: the model of its own builder, run by its own ``Generator``.

Options: ``extra_options`` (what the builder is given as ``--extra_options``).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_engines.child import Engine, Request, serve


def prepare(request: Request) -> dict[str, Any]:
    from peer_engines.onnx_bytes import bytes_per_token

    out = Path(request.path)
    extra = [f"{name}={value}" for name, value in request.options["extra_options"].items()]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", request.model, "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache"), "--extra_options", *extra]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"the builder failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return {"bytes_per_token": bytes_per_token(out / "model.onnx"), "format": ", ".join(extra)}


class GenAI:
    def __init__(self, request: Request) -> None:
        import onnxruntime_genai as og

        config = og.Config(request.path)
        options = {"intra_op_num_threads": request.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.og, self.model = og, og.Model(config)
        self.versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
        self.note = "Generator, its session options"

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        import numpy as np

        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompt) + new + 1, do_sample=False)
        generator = self.og.Generator(self.model, params)
        started = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))  # runs the prompt
        generator.generate_next_token()  # only chooses from its logits
        prefilled = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        ended = time.perf_counter()
        if generator.token_count() != len(prompt) + new + 1:
            raise RuntimeError(f"stopped after {generator.token_count() - len(prompt)} tokens: an EOS; change --seed")
        return prefilled - started, ended - prefilled


def open_engine(request: Request) -> Engine:
    return GenAI(request)


if __name__ == "__main__":
    serve(prepare, open_engine)
