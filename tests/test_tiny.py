"""Ten seconds from a model in memory to tokens from its artifact: what to run before every commit."""

from __future__ import annotations

from pathlib import Path

import torch

import ryzen_compile
from tests.zoo import CASES, build


def test_capture_export_generate(tmp_path: Path) -> None:
    model = build(CASES[0])
    prompt = torch.tensor([[5, 17, 80, 3, 41]])
    expected = model.generate(prompt, max_new_tokens=16, do_sample=False)
    attention_before = model.config._attn_implementation

    with ryzen_compile.optimize(model, "fp32") as compiled:
        assert torch.equal(compiled.generate(prompt, max_new_tokens=16), expected)
        assert compiled.report.hits()["insert_kv_cache"] == 2
        compiled.save_pretrained(tmp_path / "artifact")
    assert model.config._attn_implementation == attention_before

    with ryzen_compile.load(tmp_path / "artifact") as loaded:
        assert loaded.generate(prompt.tolist(), max_new_tokens=16).tolist() == expected.tolist()
