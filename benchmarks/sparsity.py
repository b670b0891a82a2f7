"""What dropping small activations costs in quality, and what skipping their weights gives in speed.

    python benchmarks/sparsity.py quality --shares 0,0.25,0.5,0.75 --allocations greedy,uniform
    python benchmarks/sparsity.py operator --rounds 5
    python benchmarks/sparsity.py decode --shape tinyllama-1.1b --rounds 5 --work sparsity-work

``quality`` exports the shipped model in int4 and scores it, on standard operators, against itself in float32 on
held-out text. ``operator`` times native products alone, several of a shape with weights of their own so that no cache
holds them, beside the dense native product of the same weights. ``decode`` times steps of a decoder of random int4
weights behind some tokens, with thresholds chosen on random tokens, beside the same decoder without any, and counts
what those thresholds drop of other random tokens. Each side runs in a process of its own, in turns,
forwards and backwards: ratios are those within a round. Results go to ``benchmarks/data/sparsity.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from quality import MODEL, held_out_text, shown, spread_windows
from random_artifact import prepare

import ryzen_compile
from ryzen_compile.api import export, read_source
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.backends.onnxruntime.artifact import slots_of
from ryzen_compile.backends.onnxruntime.emit import Emitter
from ryzen_compile.backends.onnxruntime.session import OrtEngine, SessionOptions
from ryzen_compile.backends.onnxruntime.sparsity import sparsify
from ryzen_compile.manifest import read_manifest
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.shapes import SHAPES
from ryzen_compile.spec import CacheSlot, ModelSpec
from ryzen_compile.validate.machine import read_machine, read_versions
from ryzen_compile.validate.quality import EngineScorer, ModelScorer, score

DATA = Path(__file__).resolve().parent / "data" / "sparsity.csv"
PRODUCTS = ((2048, 5632), (5632, 2048))  # K, N
BLOCK, BITS = 128, 4
LARGE = 256 << 20  # bytes of weights in one graph: several times the last cache
THRESHOLD = 0.5
TOKENS, PASSES = 32, 3  # random ones that a decoder's thresholds are chosen on, over and over
WARM_UP = 3


def quality(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(args.threads)
    windows = spread_windows(held_out_text(), 512, args.tokens)
    reference = ModelScorer(read_source(MODEL).model)
    print("| dropped | how | mean KL, nats per token | top-1, % | perplexity ratio |\n|---:|---|---:|---:|---:|")
    rows = []
    for share in args.shares:
        for allocation in args.allocations.split(",") if share else ("dense",):
            sparsity = {"target": share, "allocation": allocation, "max_kl": 99} if share else None
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "artifact"
                export(MODEL, out, args.recipe, sparsity=sparsity, logits="all", verify=False)
                with ryzen_compile.load(out, threads=args.threads, native=args.native) as model:
                    found = score(EngineScorer(model.engine), reference, windows)
            cells = shown(found.kl, ".3g"), shown(found.top1, ".2f", 100), shown(found.ratio, ".4f")
            print(f"| {share:.0%} | {allocation} | {' | '.join(cells)} |", flush=True)
            row = {"test": "quality", "side": allocation, "share": share, "tokens": found.tokens}
            rows += [
                {**row, "name": name, "value": estimate.value, "error": estimate.error}
                for name, estimate in (("kl", found.kl), ("top1", found.top1), ("ratio", found.ratio))
            ]
    return rows


# --- in turns


def in_turns(args: argparse.Namespace, sides: list[str]) -> dict[str, list[dict[str, float]]]:
    """Samples of each side by round."""
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", side],
                check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            samples[side].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    return samples


def table(test: str, samples: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Prints medians, and ratios to the first side within a round; returns every sample."""
    first, *_ = samples
    print(f"\n| {test} | ms | faster than `{first}` (range) | touched, GB/s | zeros, % |\n|---|---:|---:|---:|---:|")
    rows = []
    for name in [name for name in samples[first][0] if "," not in name]:
        for side, rounds in samples.items():
            ratios = [base[name] / mine[name] for base, mine in zip(samples[first], rounds, strict=True)]
            told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            ms = statistics.median(mine[name] for mine in rounds)
            touched, zeros = rounds[0].get(f"{name}, bytes"), rounds[0].get(f"{name}, zeros")
            cells = f"{touched / ms / 1e6:.1f}" if touched else "", f"{100 * zeros:.1f}" if zeros is not None else ""
            print(f"| {name}, {side} | {ms:.3f} | {told} | {' | '.join(cells)} |")
    for side, rounds in samples.items():
        for number, values in enumerate(rounds):
            rows += [{"test": test, "side": side, "round": number, "name": n, "value": v} for n, v in values.items()]
    return rows


def operator(args: argparse.Namespace) -> list[dict[str, Any]]:
    return table("operator", in_turns(args, ["dense", *(f"{share:g}" for share in args.shares)]))


def decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The dense artifact, and graphs over its weights that drop shares of the channels."""
    artifact = args.work / args.shape
    if not artifact.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        prepare(args.shape, "int8", artifact)
    for share in filter(None, args.shares):
        for depth in args.depths:
            if not graph_of(artifact, f"{share:g}", depth).exists():
                thin_out(artifact, share, depth)
    return table("decode", in_turns(args, [f"{share:g}" for share in sorted({0.0, *args.shares})]))


def graph_of(artifact: Path, share: str, depth: int) -> Path:
    return artifact / ("model.onnx" if share == "0" else f"model-{share}-{depth}.onnx")


def thin_out(artifact: Path, share: float, depth: int) -> None:
    """Writes a graph whose products but the head's read what is left by thresholds that random tokens behind ``depth``
    others gave: of random weights none is more sensitive than another, so all inputs lose the same share."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    found = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    products = [node for node in found if "logits" not in node.output]
    names = list(dict.fromkeys(node.input[0] for node in products))
    e = Emitter()
    sparsify(e, ir.Value(name="x"), threshold=1.0)
    (function,) = e.functions.values()
    model.functions.append(ir.to_proto(function))
    model.opset_import.append(helper.make_opsetid("ryzen", 1))
    for number, name in enumerate(names):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0), f"threshold{number}"))
        kept = helper.make_node(function.name, [name, f"threshold{number}"], [f"kept{number}"], domain="ryzen")
        readers = [node for node in products if node.input[0] == name]
        model.graph.node.insert(list(model.graph.node).index(readers[0]), kept)
        for node in readers:
            node.input[0] = kept.output[0]
    for _ in range(PASSES):  # what a layer reads follows from what those before it drop
        values = values_of(model, artifact, names, depth, seed=1)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for number, value in enumerate(values):
            found = np.quantile(np.abs(value), share).astype(np.float32)
            tensors[f"threshold{number}"].CopyFrom(numpy_helper.from_array(found, f"threshold{number}"))
    onnx.save(model, graph_of(artifact, f"{share:g}", depth))


def values_of(model: onnx.ModelProto, artifact: Path, names: list[str], depth: int, seed: int) -> list[np.ndarray]:
    """What these values are when the model reads random tokens behind ``depth`` others."""
    wanted = onnx.ModelProto()
    wanted.CopyFrom(model)
    wanted.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = native.open_model(wanted, artifact, onnxruntime.SessionOptions())
    manifest = read_manifest(artifact)
    ids = np.random.default_rng(seed).integers(manifest["spec"]["vocab"], size=(1, TOKENS))
    positions = np.arange(depth, depth + TOKENS)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, depth + TOKENS), np.int64), "position_ids": positions}
    cache = filled(slots_of(manifest), depth, depth)
    for index, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        past = (keys[:, :, :depth], values[:, :, :depth])
        feeds |= {f"past_key_values.{index}.{half}": rows for half, rows in zip(("key", "value"), past, strict=True)}
    taken = {value.name for value in session.get_inputs()}
    found: list[np.ndarray] = session.run(names, {name: value for name, value in feeds.items() if name in taken})
    return found


def filled(slots: tuple[CacheSlot, ...], depth: int, capacity: int) -> KVCache:
    """A cache that holds ``depth`` tokens of random numbers, the same for the same depth."""
    cache = KVCache(slots, 1, max(1, capacity), limit=max(1, capacity))
    random = np.random.default_rng(7)
    for rows in (*cache.keys, *cache.values):
        part = rows[:, :, :depth]
        part[:] = (30 * random.standard_normal(part.shape)).clip(-127, 127).astype(rows.dtype)
    cache.lengths[:] = depth
    return cache


# --- one side, in a process of its own


def operator_sample(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one product of one row, and the bytes of weights and scales that it has to touch."""
    share = 0.0 if args.child == "dense" else float(args.child)
    found = {}
    for depth, rows in PRODUCTS:
        random = np.random.default_rng(0)
        copies = LARGE // (depth * rows * BITS // 8)
        session = products(args, depth, rows, copies, random)
        x = random.uniform(2 * THRESHOLD, 4 * THRESHOLD, (1, depth)).astype(np.float32)
        zeros = random.random((1, depth)) < share
        x[zeros] = THRESHOLD / 2
        name = f"K={depth} N={rows}"
        found[name] = median_ms(lambda x=x, session=session: session.run(None, {"x": x}), args.steps) / copies
        found[f"{name}, bytes"] = rows * (depth - zeros.sum()) * BITS / 8 + rows * depth / BLOCK * 4
        found[f"{name}, zeros"] = float(zeros.mean())
    return found


def products(args: argparse.Namespace, depth: int, rows: int, copies: int, random: np.random.Generator) -> Any:
    """A session of ``copies`` products of one x."""
    nodes, constants = [], []
    kind, facts = ("MatMulNBits", {}) if args.child == "dense" else ("SparseMatMulNBits", {"threshold": THRESHOLD})
    for copy in range(copies):
        codes = random.integers(0, 256, (rows, depth // BLOCK, BLOCK * BITS // 8), np.uint8)
        scales = random.uniform(0.01, 0.02, (rows, depth // BLOCK)).astype(np.float32)
        constants += [numpy_helper.from_array(codes, f"B{copy}"), numpy_helper.from_array(scales, f"s{copy}")]
        names = ["x", f"B{copy}", f"s{copy}"], [f"y{copy}"]
        sizes = {"K": depth, "N": rows, "bits": BITS, "block_size": BLOCK}
        nodes.append(helper.make_node(kind, *names, domain="ryzen", **sizes, **facts))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, depth])]
    outputs = [helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, [1, rows]) for copy in range(copies)]
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ryzen", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.register_custom_ops_library(str(native.required()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def decode_sample(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step of one token behind each of the depths."""
    artifact = args.work / args.shape
    manifest = read_manifest(artifact)
    spec, found = ModelSpec(**manifest["spec"]), {}
    for depth in args.depths:
        path = graph_of(artifact, args.child, depth)
        engine = OrtEngine(path, spec, slots_of(manifest), SessionOptions(threads=args.threads, require_native=True))
        if args.child != "0" and "sparse" not in engine.claims.whole:
            raise SystemExit(f"not every product skips channels: {engine.claims.to_text()}")
        cache = filled(engine.slots, depth, depth + args.steps + WARM_UP)
        random = np.random.default_rng(0)

        def step(engine: OrtEngine = engine, cache: KVCache = cache, random: Any = random) -> None:
            engine.step(random.integers(spec.vocab, size=(1, 1)), cache)
            cache.advance(1)

        found[f"step @ {depth}"] = median_ms(step, args.steps)
        engine.close()
        if args.child != "0":
            found[f"step @ {depth}, zeros"] = reached(path, depth)
    return found


def reached(path: Path, depth: int) -> float:
    """The mean share that thresholds drop of tokens that they were not chosen on."""
    model = onnx.load(path, load_external_data=False)
    names = [node.output[0] for node in model.graph.node if node.op_type == "Sparsify"]
    return statistics.mean(float((x == 0).mean()) for x in values_of(model, path.parent, names, depth, seed=2))


def median_ms(run: Any, times: int) -> float:
    seconds = []
    for _ in range(times + WARM_UP):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[WARM_UP:])


def append(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    fields = ["date", "machine", "threads", "test", "side", "round", "share", "tokens", "name", "value", "error",
              "versions"]  # fmt: skip
    shared = {
        "date": datetime.now(UTC).date(),
        "machine": read_machine().cpu.name,
        "threads": args.threads,
        "versions": json.dumps(read_versions()),
    }
    is_new = not DATA.exists()
    with DATA.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({**shared, **row} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", choices=["quality", "operator", "decode"])
    parser.add_argument("--shares", type=lambda text: [float(s) for s in text.split(",")], default=[0, 0.25, 0.5, 0.75])
    parser.add_argument("--allocations", default="greedy,uniform")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--native", action="store_true", help="score native operators, not standard ones")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=read_machine().usable_cores)
    parser.add_argument("--work", type=Path, default=Path("sparsity-work"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"operator": operator_sample, "decode": decode_sample}[args.test](args)))
        return
    append({"quality": quality, "operator": operator, "decode": decode}[args.test](args), args)


if __name__ == "__main__":
    main()
