"""Let a model continue pieces of its own training text, for a draft model to learn from.

A draft model is asked what the model says next to its own words, so it learns best from those (Zhou et al., 2024,
"DistillSpec"). The text is that of a training configuration, without what is held out there.

    python examples/continue_corpus.py --config examples/configs/tiny-python-draft.yaml --model examples/tiny-python-lm
        --output runs/continued.jsonl

One JSON object a line: ``text`` is the piece and its continuation. Half of them are continued greedily, half are drawn
at a temperature of 0.8.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

import ryzen_compile
from ryzen_compile.train.config import read_config
from ryzen_compile.train.documents import read_corpus

TEMPERATURE = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="whose data section says which text")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="int4", help="as which the model will be drafted for")
    parser.add_argument("--tokens", type=int, default=600_000, help="to generate")
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a piece")
    parser.add_argument("--new", type=int, default=256, help="tokens behind it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    documents = read_corpus(read_config(args.config).data).train
    model = ryzen_compile.optimize(args.model, args.recipe)
    tokenizer = model.tokenizer
    generator = np.random.default_rng(args.seed)
    generated, started = 0, time.monotonic()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", encoding="utf-8") as stream:
        turn = 0
        while generated < args.tokens:
            prompts = pieces(documents, tokenizer, generator, args.batch, args.prompt)
            drawn = {"do_sample": True, "temperature": TEMPERATURE, "seed": turn} if turn % 2 else {}
            rows = np.asarray(model.generate(np.array(prompts), max_new_tokens=args.new, **drawn))
            for row in rows:
                stream.write(json.dumps({"text": tokenizer.decode(row.tolist(), skip_special_tokens=True)}) + "\n")
            generated += rows.size - args.batch * args.prompt
            turn += 1
    print(f"{generated:,} tokens, {generated / (time.monotonic() - started):,.0f} per second")


def pieces(documents, tokenizer, generator, count: int, length: int) -> list[list[int]]:
    """``count`` pieces of ``length`` tokens, each beginning at a line of some document."""
    found: list[list[int]] = []
    while len(found) < count:
        text = documents[generator.integers(len(documents))].text
        start = text.rfind("\n", 0, generator.integers(len(text))) + 1
        ids = tokenizer(text[start : start + 8 * length])["input_ids"]
        if len(ids) >= length:
            found.append([int(i) for i in ids[:length]])
    return found


if __name__ == "__main__":
    main()
