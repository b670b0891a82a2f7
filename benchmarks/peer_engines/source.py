"""The model all engines are made from: a shape with random weights as a Hugging Face directory in float32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peer_engines.child import Engine, Request, serve

# Builders want a tokenizer beside the weights; ids go in and out of every engine, so which one does not matter.
TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "tiny-python-lm"


def prepare(request: Request) -> dict[str, Any]:
    from ryzen_compile.shapes import random_model

    out = Path(request.path)
    random_model(request.shape).save_pretrained(out, max_shard_size="100GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, out / name)
    return {}


def open_engine(request: Request) -> Engine:
    raise NotImplementedError("the source is not an engine")


if __name__ == "__main__":
    serve(prepare, open_engine)
