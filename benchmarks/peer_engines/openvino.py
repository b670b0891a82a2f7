"""OpenVINO GenAI: optimum-intel's export, run by ``LLMPipeline`` with its defaults (paged attention, 8-bit cache).

Options: ``arguments`` (what ``optimum-cli export openvino`` is given).
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_engines.child import Engine, Request, serve

CLI = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())"


def prepare(request: Request) -> dict[str, Any]:
    command = [sys.executable, "-c", CLI, "export", "openvino", "-m", request.model]
    command += ["--task", "text-generation-with-past", *request.options["arguments"], request.path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"the export failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    path = Path(request.path) / "openvino_model.xml"
    return {"bytes_per_token": bytes_per_token(path), "format": " ".join(request.options["arguments"])}


def bytes_per_token(path: Path) -> int:
    """The constants of at least 1 KiB that lead, through conversions and scales, to anything but a table lookup."""
    import openvino

    total = 0
    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant" and node.get_byte_size() >= 1024 and _readers(node) - {"Gather"}:
            total += node.get_byte_size()
    return total


def _readers(node: Any) -> set[str]:
    """Kinds of operation that read a weight once it is decompressed."""
    found = set()
    for target in node.output(0).get_target_inputs():
        reader = target.get_node()
        kind = reader.get_type_name()
        found |= _readers(reader) if kind in {"Convert", "Subtract", "Multiply", "Reshape"} else {kind}
    return found


class OpenVINO:
    def __init__(self, request: Request) -> None:
        import openvino_genai

        self.genai = openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(request.path, "CPU", INFERENCE_NUM_THREADS=request.threads)
        self.versions = {name: version(name) for name in ("openvino-genai", "openvino", "optimum-intel", "nncf")}
        self.note = "LLMPipeline, its defaults, its perf_metrics"

    def run(self, prompt: list[int], new: int) -> tuple[float, float]:
        import numpy as np
        import openvino

        config = self.genai.GenerationConfig(max_new_tokens=new + 1, ignore_eos=True, do_sample=False)
        result = self.pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), config)
        metrics = result.perf_metrics
        if metrics.get_num_generated_tokens() != new + 1:
            raise RuntimeError(f"expected {new + 1} tokens, got {metrics.get_num_generated_tokens()}")
        first = metrics.get_ttft().mean / 1e3
        return first, metrics.get_generate_duration().mean / 1e3 - first


def open_engine(request: Request) -> Engine:
    return OpenVINO(request)


if __name__ == "__main__":
    serve(prepare, open_engine)
