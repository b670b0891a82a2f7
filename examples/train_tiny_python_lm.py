"""Train the small language model that ships in ``examples/tiny-python-lm``.

A Llama-architecture decoder of 5.5 M parameters learns the Python standard library from its own
sources, which are present wherever Python is: nothing is downloaded. Same interpreter, same
library versions and same thread count give the same data, order and initial weights.

    python examples/train_tiny_python_lm.py --output examples/tiny-python-lm

The run takes about half an hour on two cores with bfloat16 matrix units. It writes fp16 safetensors, a byte-level
BPE tokenizer and a model card that states what was seen and what was held out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
HELD_OUT = (
    "argparse.py", "bisect.py", "calendar.py", "csv.py", "fractions.py", "heapq.py", "json/decoder.py", "queue.py",
    "shlex.py", "statistics.py", "textwrap.py", "unittest/case.py", "wave.py", "xml/dom/minidom.py", "zipfile.py",
)  # fmt: skip
EXCLUDED_DIRS = {"site-packages", "__pycache__", "lib2to3", "bad_coding", "encodings"}


@dataclass(frozen=True)
class Corpus:
    train: list[str]
    held_out: list[str]
    digest: str


def read_corpus(stdlib: Path) -> Corpus:
    """Every UTF-8 module of the standard library in a fixed order, tests included."""
    train, held_out = [], []
    digest = hashlib.sha256()
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if EXCLUDED_DIRS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of tests are deliberately in other encodings
        if not 64 <= len(text) <= 400_000:
            continue  # package markers and generated tables teach nothing
        digest.update(text.encode())
        (held_out if relative.as_posix() in HELD_OUT else train).append(text)
    if len(held_out) != len(HELD_OUT):
        raise SystemExit(f"expected {len(HELD_OUT)} held-out modules under {stdlib}, found {len(held_out)}")
    return Corpus(train, held_out, digest.hexdigest())


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """Concatenates the texts, each closed by the end token, into rows of ``length + 1`` ids."""
    ids: list[int] = []
    end = tokenizer.convert_tokens_to_ids(END)
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += encoding.ids
        ids.append(end)
    rows = (len(ids) - 1) // length
    stream = torch.tensor(ids[: rows * length + 1])
    return stream[: rows * length + 1].unfold(0, length + 1, length)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor, batch: int) -> float:
    model.eval()
    losses = []
    for chunk in rows.split(batch):
        logits = model(chunk[:, :-1]).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="none"))
    model.train()
    return torch.cat(losses).mean().item()


def train(model: LlamaForCausalLM, rows: torch.Tensor, held: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    # Muon orthogonalises the update of every hidden matrix; table and norms keep AdamW, as its authors advise.
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    steps = args.tokens // (args.batch * args.length)
    shuffle = random.Random(args.seed)
    order: list[int] = []
    history, started = [], time.monotonic()
    for step in range(steps):
        if len(order) < args.batch:
            order = list(range(len(rows)))
            shuffle.shuffle(order)
        batch = rows[[order.pop() for _ in range(args.batch)]]
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % args.report_every == 0 or step + 1 == steps:
            seen = (step + 1) * args.batch * args.length
            record = {"step": step + 1, "tokens": seen, "loss": round(loss.item(), 4)}
            if (step + 1) % (10 * args.report_every) == 0 or step + 1 == steps:
                record["held_out_loss"] = round(mean_loss(model, held, args.batch), 4)
            history.append(record)
            print(json.dumps(record | {"tokens_per_second": round(seen / (time.monotonic() - started))}), flush=True)
    return history


def write_card(output: Path, facts: dict) -> None:
    output.joinpath("README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
tags: [llama, python, tiny]
---
# tiny-python-lm

A {facts["parameters"] / 1e6:.1f} M parameter Llama-architecture decoder with a byte-level BPE of {facts["vocab"]:,} tokens, trained from scratch on the
sources of the Python {facts["python"]} standard library. It exists so that `ryzen_compile` can be tried, tested and
measured on a really trained model without a download. It completes Python that looks like the standard library; it
knows nothing else and its code is not meant to be run.

| | |
|---|---|
| layers, width, heads, kv heads, head dim, ffn | {facts["shape"]} |
| training tokens seen | {facts["tokens_seen"]:,} ({facts["epochs"]:.2f} passes over {facts["tokens_unique"]:,} tokens in {facts["files"]} files) |
| context | {facts["context"]} tokens |
| final training loss (last batch) | {facts["train_loss"]:.4f} nats/token |
| held-out loss | **{facts["held_out_loss"]:.4f} nats/token** over {facts["held_out_tokens"]:,} tokens, fp32 |
| held-out loss after rounding to fp16 | {facts["held_out_loss_fp16"]:.4f} nats/token |
| held-out modules | {", ".join(f"`{name}`" for name in HELD_OUT)} |
| optimizer | Muon (hidden matrices) and AdamW (table, norms), peak rate {facts["lr"]}, cosine to 5 %, {facts["batch"]} × {facts["context"]} tokens a step, bf16 autocast |
| corpus SHA-256 | `{facts["digest"]}` |
| wall time | {facts["minutes"]:.0f} minutes on {facts["threads"]} threads |

Reproduce: `python examples/train_tiny_python_lm.py --output examples/tiny-python-lm` (seed {facts["seed"]}).

## Licence
The weights and tokenizer are offered under Apache-2.0, like the rest of this repository. They were learned from the
Python standard library, which is copyright the Python Software Foundation and its contributors and distributed under
the [PSF License Version 2](https://docs.python.org/3/license.html). None of those sources is included here; a model this small can still
reproduce short passages of them, and those stay under their own licence.
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=14_000_000, help="training tokens to see")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--report-every", type=int, default=50)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    started = time.monotonic()
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = train_tokenizer(corpus.train, vocab_size=4096)
    rows = pack(corpus.train, tokenizer, args.length)
    held = pack(corpus.held_out, tokenizer, args.length)
    print(
        f"{len(corpus.train)} files, {rows.shape[0] * args.length:,} training tokens, {held.shape[0] * args.length:,} held out"
    )

    end = tokenizer.convert_tokens_to_ids(END)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=args.length, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters")
    history = train(model, rows, held, args)

    held_out_loss = mean_loss(model, held, args.batch)
    model = model.half()
    held_out_loss_fp16 = mean_loss(model.float(), held, args.batch)
    model.half().save_pretrained(args.output)
    tokenizer.model_max_length = args.length
    tokenizer.save_pretrained(args.output)
    seen = history[-1]["tokens"]
    unique = rows.shape[0] * args.length
    facts = {
        "parameters": parameters, "vocab": 4096, "python": platform.python_version(),
        "shape": "6, 256, 4, 2, 64, 704", "tokens_seen": seen, "tokens_unique": unique, "epochs": seen / unique,
        "files": len(corpus.train), "context": args.length, "train_loss": history[-1]["loss"],
        "held_out_loss": held_out_loss, "held_out_loss_fp16": held_out_loss_fp16,
        "held_out_tokens": held.shape[0] * args.length, "lr": args.lr, "batch": args.batch, "digest": corpus.digest,
        "minutes": (time.monotonic() - started) / 60, "threads": torch.get_num_threads(), "seed": args.seed,
    }  # fmt: skip
    write_card(args.output, facts)
    (args.output / "training.json").write_text(json.dumps({"facts": facts, "history": history}, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
