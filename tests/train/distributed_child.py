"""One process of a run under torchrun: ``distributed_child.py DIRECTORY BATCH ACCUMULATE KIND``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PASSES = {"plain": {}, "dkm": {"dkm": {"bits": [4], "cluster_dim": 2}}, "qat": {"qat": {"block": 16}}}


def main() -> None:
    from ryzen_compile.workflow.training import train
    from tests.train.tiny_run import tiny_config

    directory, batch, accumulate, kind = sys.argv[1:]
    torch.set_num_threads(1)
    changes = {"optimization": {"batch": int(batch), "accumulate": int(accumulate)}, "passes": PASSES[kind]}
    config = tiny_config(Path(directory), validation={"every": 2}, controller={"ablate": False}, **changes)
    train(config, resume=(Path(directory) / "run").exists())


if __name__ == "__main__":
    main()
