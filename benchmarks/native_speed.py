"""Native operators beside ONNX Runtime's own: products alone, attention alone, and the whole decoder.

    python benchmarks/native_speed.py --shape tinyllama-1.1b --kv int8 --rounds 5 --work native-work

One artifact with random int4 weights. A round opens the stock session and the native one, each in a process of its own
(two thread pools that spin on the same cores slow each other), and times: all of the decoder's products in one graph,
for several numbers of rows; all of its attentions in one graph, for several depths and rows; and the decoder itself,
steps behind several depths, steps of eight sequences, and a prompt. What the memory delivers is read in the same
processes. Every other round goes backwards. Prints medians over the rounds with their range, and ratios within rounds;
every sample is appended to ``benchmarks/data/native_speed.csv``.
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
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from random_artifact import prepare

import ryzen_compile
from ryzen_compile.backends.onnxruntime import native
from ryzen_compile.backends.onnxruntime.artifact import slots_of
from ryzen_compile.backends.onnxruntime.claim_report import KINDS
from ryzen_compile.backends.onnxruntime.kernel_choices import NbitsShape, nbits_shapes, write_stand_in
from ryzen_compile.manifest import read_manifest
from ryzen_compile.runtime.cache import KVCache
from ryzen_compile.runtime.generate import read
from ryzen_compile.shapes import SHAPES
from ryzen_compile.validate.machine import read_machine, read_versions, stream_read_gbps

DATA = Path(__file__).resolve().parent / "data" / "native_speed.csv"
SIDES = ("stock", "native")
PARTS = ("products", "attention", "decoder")
WARM_UP = 2
CHUNK = 512
TURNS = 8
LONG = 64  # rows from which a run takes so long that a few will do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--kv", choices=("fp32", "int8", "int4"), default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="samples of each short figure in a process")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 512], help="of the products")
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 512, 1900])
    parser.add_argument("--new", type=int, nargs="+", default=[1, 4, 16], help="rows of the attention alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, default=Path("native-work"))
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    artifact = args.work / f"{args.shape}-{args.kv}"
    if args.child:
        print(json.dumps(measured(artifact, args)))
        return
    if not artifact.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        prepare(args.shape, args.kv, artifact)
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            samples[side].append(in_child(side))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    report(samples, args)
    append(samples, args)


def in_child(side: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child", side], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(artifact: Path, args: argparse.Namespace) -> dict[str, float]:
    """One sample of everything, in this process: milliseconds by name, and GB/s where the name says so."""
    parts = {"products": products, "attention": attentions, "decoder": decoder}
    return {name: value for part in args.parts for name, value in parts[part](artifact, args).items()}


def opened(path: Path, args: argparse.Namespace) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = args.threads
    if args.child == "stock":
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session, claims = native.open_claimed(path, options, KINDS, "auto")
    if claims.left:
        raise SystemExit(f"not everything in {path} is native: {claims.to_text()}")
    return session


def median_ms(run: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times + WARM_UP):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[WARM_UP:])


def products(artifact: Path, args: argparse.Namespace) -> dict[str, float]:
    """All products with quantized weights, as many and as large as the decoder's, side by side."""
    parts = nbits_shapes(onnx.load(artifact / "model.onnx", load_external_data=False))
    found = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        path = write_stand_in(Path(folder) / "model.onnx", parts, parts[0].block, parts[0].accuracy_level)
        session = opened(path, args)
        found["products, 1 row, % of a plain read"] = share_of_read(session, parts, args)
        for rows in args.rows:
            random = np.random.default_rng(0)
            depths = sorted({part.depth for part in parts})
            feeds = {f"x{depth}": random.standard_normal((rows, depth), dtype=np.float32) for depth in depths}
            times = args.steps if rows < LONG else 2
            found[f"products, {rows} rows"] = median_ms(lambda feeds=feeds: session.run(None, feeds), times)
    return found


def share_of_read(session: Any, parts: Sequence[NbitsShape], args: argparse.Namespace) -> float:
    """Bytes a second of products of one row over those of a plain read, each the median of turns of a third of a
    second: what the memory gives changes from second to second here. The first turn warms up."""
    size = sum(part.count * (part.bytes + 4 * part.rows * -(-part.depth // part.block)) for part in parts)
    feeds = {f"x{depth}": np.ones((1, depth), np.float32) for depth in {part.depth for part in parts}}
    shares = []
    for _ in range(TURNS):
        once = median_ms(lambda: session.run(None, feeds), 15)
        shares.append(size / once / 1e6 / stream_read_gbps(0.3, threads=args.threads))
    return 100 * statistics.median(shares[1:])


def attentions(artifact: Path, args: argparse.Namespace) -> dict[str, float]:
    """All attentions of the decoder, each with a cache of its own, reading one query."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    slots = slots_of(read_manifest(artifact))
    facts = {attribute.name: attribute.i for attribute in nodes[0].attribute}
    width = (facts["num_heads"] + 2 * facts["kv_num_heads"]) * slots[0].head_dim
    room = max(args.depths) + max(args.new)
    caches = KVCache(slots, 1, room, limit=room)
    found = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        session = opened(write_attentions(Path(folder) / "model.onnx", model, nodes, width), args)
        for depth in args.depths:
            for new in args.new:
                binding = bound(session, caches, width, depth, new)
                name = f"attention, {new} rows @ {depth}"
                found[name] = median_ms(lambda binding=binding: session.run_with_iobinding(binding), args.steps)
    return found


def write_attentions(path: Path, model: onnx.ModelProto, nodes: list[onnx.NodeProto], width: int) -> Path:
    """The attentions of ``model``, over one packed query, with their tables and scales."""
    graph = onnx.GraphProto(name="attentions")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input}
    graph.input.append(helper.make_tensor_value_info("query", TensorProto.FLOAT, [1, "T", width]))
    graph.input.append(helper.make_tensor_value_info("last", TensorProto.INT32, [1]))
    graph.input.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    used: set[str] = set()
    for number, node in enumerate(nodes):
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0], copy.input[5], copy.input[6] = "query", "last", "total"
        copy.output[0] = f"out{number}"
        graph.node.append(copy)
        graph.input.extend(inputs[name] for name in copy.input[3:5])
        graph.output.append(helper.make_tensor_value_info(copy.output[0], TensorProto.FLOAT, [1, "T", "W"]))
        graph.output.extend(value for value in model.graph.output if value.name in copy.output[1:3])
        used |= {name for name in copy.input[7:] if name}
    for name in sorted(used):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(initializers[name])
        if tensor.data_location == TensorProto.EXTERNAL:  # made up: speed does not depend on them
            shape, kind = tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor = onnx.numpy_helper.from_array(np.full(shape, 0.02, kind), name)
        graph.initializer.append(tensor)
    onnx.save(helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version), path)
    return path


def bound(session: Any, caches: KVCache, width: int, depth: int, new: int) -> Any:
    """A binding for ``new`` rows behind ``depth``, past and present in one buffer."""
    binding = session.io_binding()
    random = np.random.default_rng(0)
    binding.bind_cpu_input("query", random.standard_normal((1, new, width), dtype=np.float32))
    binding.bind_cpu_input("last", np.array([depth + new - 1], np.int32))
    binding.bind_cpu_input("total", np.array(depth + new, np.int32))
    for index, buffers in enumerate(zip(caches.keys, caches.values, strict=True)):
        binding.bind_output(f"out{index}", "cpu")
        for half, buffer in zip(("key", "value"), buffers, strict=True):
            place = ("cpu", 0, buffer.dtype.type, buffer.shape, buffer.__array_interface__["data"][0])
            binding.bind_input(f"past_key_values.{index}.{half}", *place)
            binding.bind_output(f"present.{index}.{half}", *place)
    return binding


def decoder(artifact: Path, args: argparse.Namespace) -> dict[str, float]:
    """The whole model."""
    rng = np.random.default_rng(0)
    found = {}
    wanted = args.child == "native"
    with ryzen_compile.load(artifact, threads=args.threads, digests=False, native=wanted) as model:
        engine, spare = model.engine, args.steps + WARM_UP
        ids = rng.integers(model.spec.vocab, size=max(*args.depths, args.prompt))

        def prompt() -> None:
            read(
                engine,
                KVCache(engine.slots, 1, args.prompt, limit=args.prompt),
                ids[: args.prompt].tolist(),
                chunk=CHUNK,
            )

        found[f"prompt of {args.prompt}"] = median_ms(prompt, 2)
        cache = KVCache(engine.slots, 1, len(ids) + spare, limit=model.spec.context)
        read(engine, cache, ids.tolist(), chunk=CHUNK)
        for depth in sorted(args.depths, reverse=True):
            found[f"step @ {depth}"] = step_ms(engine, cache, depth, args.steps, model.spec.vocab)
        rows = KVCache(engine.slots, args.batch, args.prompt + spare, limit=model.spec.context)
        for theirs, ours in zip((*rows.keys, *rows.values), (*cache.keys, *cache.values), strict=True):
            theirs[:, :, : args.prompt] = ours[:, :, : args.prompt]
        found[f"step of {args.batch} @ {args.prompt}"] = step_ms(
            engine, rows, args.prompt, args.steps, model.spec.vocab
        )
    return found


def step_ms(engine: Any, cache: KVCache, depth: int, steps: int, vocab: int) -> float:
    """Median milliseconds of a step of one new token a row, behind about ``depth``."""
    tokens = np.random.default_rng(0).integers(vocab, size=(cache.batch, 1))
    cache.lengths[:] = depth

    def step() -> None:
        engine.step(tokens, cache)
        cache.advance(1)

    return median_ms(step, steps)


def report(samples: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    machine = read_machine()
    versions = ", ".join(f"{name} {read_versions()[name]}" for name in ("ryzen-compile", "onnxruntime"))
    print(f"{args.shape}, int4, {args.kv} cache, {args.threads} threads, {machine.cpu.name}; {versions}")
    print(f"medians of {args.rounds} rounds (range); the ratio within a round\n")
    print("| ms | stock | native | stock / native |\n|---|---:|---:|---:|")
    for name, stock, ours in paired(samples):
        ratios = [s / n for s, n in zip(stock, ours, strict=True)]
        print(f"| {name} | {spread(stock)} | {spread(ours)} | {spread(ratios)} |")


def paired(samples: dict[str, list[dict[str, float]]]) -> Iterator[tuple[str, list[float], list[float]]]:
    for name in samples["stock"][0]:
        yield name, [s[name] for s in samples["stock"]], [s[name] for s in samples["native"]]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def append(samples: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    machine, versions = read_machine(), read_versions()
    when = datetime.now(UTC).isoformat(timespec="seconds")
    facts = [when, args.shape, args.kv, args.threads, machine.cpu.name, versions["onnxruntime"]]
    fresh = not DATA.exists()
    with DATA.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if fresh:
            writer.writerow(["when", "shape", "kv", "threads", "cpu", "onnxruntime", "side", "round", "name", "value"])
        for side, rounds in samples.items():
            for number, values in enumerate(rounds):
                for name, value in values.items():
                    writer.writerow([*facts, side, number, name, f"{value:.4g}"])


if __name__ == "__main__":
    main()
