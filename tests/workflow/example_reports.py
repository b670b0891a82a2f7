"""Full reports to render in tests. Their numbers are made up: they stand for no measurement."""

from __future__ import annotations

from typing import Any

from ryzen_compile.graphs.change import PassChange, SmallGraph, SmallNode
from ryzen_compile.train import metrics_schema
from ryzen_compile.validate.inference import EngineFigures, InferenceReport
from ryzen_compile.validate.measured import Measured, Spread
from ryzen_compile.validate.outcome import Outcome, Target
from ryzen_compile.workflow.report_schema import (
    ComponentVerdict,
    EndToEnd,
    FinalReport,
    Metadata,
    PhaseRecord,
    Point,
    Summary,
    TestCase,
    TestReport,
    Text,
    ValidationReport,
)

# What a name may hold, each to break out of another place of a page.
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "| a | b |",
    "</details></table></svg>",
    '" onmouseover="alert(2)',
    "`code` **bold** [link](javascript:alert(3)) @someone",
    "</style><script>alert(4)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "$x_{1}$ \u202egnp.exe\x00\x1b[31m",
    "line one\nline two ]]> <!-- &amp;",
)


def ratio(value: float, spread: float = 0.05) -> Measured:
    return Measured(value=value, low=value * (1 - spread), high=value * (1 + spread), unit="x", samples=11)


def metadata(model: str = "examples/tiny-lm") -> Metadata:
    return Metadata(
        made_by="ryzen_compile 0.1.0",
        written="2026-11-30T04:05:06+00:00",
        command="ryzen-compile run --config examples/configs/workflow.yaml --seed 7",
        model=model,
        artifact="runs/tiny/artifact",
        machine="Example 9999X 2-Core Processor",
        microarchitecture="zen4",
        isa=("avx2", "avx512f", "avx512_vnni"),
        threads=2,
        memory_bytes=25_769_803_776,
        system="Linux 6.1 x86_64",
        python="3.12.7",
        libraries={"torch": "2.11.0", "onnxruntime": "1.31.1", "transformers": "5.17.0"},
    )


def outcomes() -> list[Outcome]:
    bench = "python -m benchmarks.example --rounds 11"
    return [
        Outcome(component="kernels", check="kernel_speedup", status="PASS", measured=ratio(4.23),
                target=Target(value=3), command=bench, seconds=41.2,
                details={"matmul_nbits": {"speed_up": 4.9, "share": 0.71}, "attention": {"speed_up": 2.8}}),
        Outcome(component="passes", check="exact_passes", status="PASS",
                measured=Measured(value=3.1e-6), target=Target(value=1e-4, at_least=False), seconds=3.5),
        Outcome(component="embedding", check="compression_ratio", status="FAIL",
                measured=Measured(value=1.83, unit="x"), target=Target(value=2), culprit="model.embed_tokens.weight",
                reason="1.83 x, expected >= 2", command="ryzen-compile export examples/tiny-lm out --recipe int4"),
        Outcome(component="kv_cache", check="kv_memory_saving", status="PASS",
                measured=Measured(value=0.7344, unit="share"), target=Target(value=0.3), command=bench),
        Outcome(component="speculation", check="speculation_speedup", status="WARN", measured=ratio(1.24, 0.08),
                target=Target(value=1.2), culprit="suffix drafter", command=bench,
                reason="1.24 x (1.141 to 1.339): the interval reaches beyond >= 1.2"),
        Outcome(component="correctness", check="accuracy_loss", status="PASS",
                measured=Measured(value=0.0031, low=0.0012, high=0.005, unit="share", samples=97),
                target=Target(value=0.01, at_least=False), command="ryzen-compile eval out --reference tiny-lm"),
        Outcome(component="end_to_end", check="end_to_end_speedup", status="PASS", measured=ratio(7.41),
                target=Target(value=3), command=bench),
        Outcome(component="end_to_end", check="ttft_ms", status="SKIPPED", reason="no machine to hold it to",
                target=Target(value=120, at_least=False, advisory=True)),
        Outcome(component="tests", check="test_pass_rate", status="PASS",
                measured=Measured(value=0.9787, unit="share", samples=47), target=Target(value=0.95)),
    ]  # fmt: skip


def components(found: list[Outcome]) -> tuple[ComponentVerdict, ...]:
    worst = ("FAIL", "WARN", "PASS", "SKIPPED")
    names = list(dict.fromkeys(one.component for one in found))
    return tuple(
        ComponentVerdict(
            component=name,
            status=min((one.status for one in found if one.component == name), key=worst.index),
            checks=tuple(one for one in found if one.component == name),
        )
        for name in names
    )


def record(name: str, **changed: Any) -> dict[str, Any]:
    """A pass as ``report.json`` of an artifact holds it."""
    return {
        "name": name,
        "promise": "exact",
        "status": "applied",
        "hits": [{"node": f"node_{i}", "module": f"model.layers.{i}.mlp", "note": ""} for i in range(3)],
        "misses": [
            {"node": "linear_7", "module": "lm_head", "note": "its weight has another reader"},
            {"node": "linear_9", "module": "model.layers.0.mlp.up", "note": "no activation follows"},
            {"node": "linear_11", "module": "model.layers.1.mlp.up", "note": "no activation follows"},
        ],
        "nodes_before": 211,
        "nodes_after": 187,
        "ops": {"aten.linear": 31},
        "seconds": 0.137,
        "max_error": 2.4e-6,
        "rmse": 1.1e-7,
        "detail": "",
        "kl": None,
        "late_kl": None,
        "top1": None,
        **changed,
    }


def passes(name: str = "quantize_weights") -> dict[str, Any]:
    return {
        "spec": {"architecture": "ExampleForCausalLM", "parameters": 5_500_000},
        "provenance": {},
        "captured_ops": {"aten.linear": 43},
        "records": [
            record("merge_projections"),
            record("fuse_rotary", status="unchanged", hits=[], misses=[], nodes_before=187, nodes_after=187),
            record(name, promise="lossy", max_error=None, kl=0.0042, late_kl=0.0039, top1=0.981),
            record("fold_norms", status="rolled back", detail="the logits moved by 3.1e-2, allowed were 1.0e-4"),
        ],
        "reference_rmse": 5e-8,
        "capture_seconds": 1.5,
        "facts": {},
    }


def small_graph(operator: str = "aten.linear") -> SmallGraph:
    """Three products that become one: two layers between what stays, and an edge that passes a layer."""
    rows = (
        ("%hidden", "aten.mul", "context"),
        ("@q.weight", "weight", "removed"),
        ("@k.weight", "weight", "removed"),
        ("%q.linear", operator, "removed"),
        ("%k.linear", operator, "removed"),
        ("@qk", "aten.cat", "added"),
        ("%qk.linear", "aten.linear", "added"),
        ("%qk.split", "aten.split_with_sizes", "added"),
        ("%attention", "ryzen::attention", "context"),
        ("%residual", "aten.add", "context"),
    )
    edges = (
        ("%hidden", "%q.linear"), ("%hidden", "%k.linear"), ("@q.weight", "%q.linear"), ("@k.weight", "%k.linear"),
        ("%q.linear", "%attention"), ("%k.linear", "%attention"), ("%hidden", "%qk.linear"), ("@qk", "%qk.linear"),
        ("%qk.linear", "%qk.split"), ("%qk.split", "%attention"), ("%hidden", "%residual"),
        ("%attention", "%residual"),
    )  # fmt: skip
    nodes = tuple(
        SmallNode.model_validate({"id": name, "op": op, "label": name, "state": state, "module": "model.layers.0.attn"})
        for name, op, state in rows
    )
    return SmallGraph(nodes=nodes, edges=edges, cut=5)


def change(name: str, lines: int = 11) -> PassChange:
    kinds = ("@@ -12,7 +12,5 @@", " %0.norm = ryzen.rms_norm(%x, @0.norm)  : f32[B,T,64]",
             "-%0.q.linear = aten.linear(%0.norm, @0.q)  : f32[B,T,64]  # layers.0.attn.q",
             "+%0.qkv.linear = aten.linear(%0.norm, @0.qkv)  : f32[B,T,192]  # layers.0.attn")  # fmt: skip
    return PassChange(
        name=name,
        status="applied",
        operators={"aten.linear": -12, "aten.cat": 6, "aten.split_with_sizes": 6},
        diff=tuple(kinds[i % len(kinds)] for i in range(lines)),
        diff_omitted=40,
        graph=small_graph(),
    )


def final_report(model: str = "examples/tiny-lm", **changed: Any) -> FinalReport:
    found = outcomes()
    fields: dict[str, Any] = {
        "metadata": metadata(model),
        "summary": Summary(verdict="FAIL", counts={"PASS": 6, "WARN": 1, "FAIL": 1, "SKIPPED": 1}, seconds=1412.0),
        "phases": (
            PhaseRecord(phase="setup", status="done", seconds=2.13),
            PhaseRecord(phase="train", status="reused", seconds=754.0, reason="its inputs have not changed"),
            PhaseRecord(phase="optimize", status="done", seconds=61.0),
            PhaseRecord(phase="validate", status="done", seconds=431.7),
            PhaseRecord(phase="test", status="done", seconds=151.0),
            PhaseRecord(phase="report", status="done", seconds=0.8),
        ),
        "components": components(found),
        "end_to_end": EndToEnd(
            speed_up=ratio(7.41),
            prefill=ratio(5.2),
            decode=ratio(8.03),
            parts={"fused graph": ratio(3.1), "integer weights": ratio(1.9), "native operators": ratio(1.7)},
            interaction={"end_to_end": 0.74, "decode": 0.8},
        ),
        "training": {"steps": 397, "train_loss": 2.313, "validation_loss": 2.4071, "stopped": "", "tokens": 1_626_112},
        "passes": passes(),
        "changes": (change("merge_projections"), change("quantize_weights", 23)),
    }
    return FinalReport(**(fields | changed))


def engine(name: str, scale: float) -> EngineFigures:
    def spread(unit: str, *samples: float) -> Spread:
        return Spread.of([scale * sample for sample in samples], unit)

    return EngineFigures(
        name=name,
        ttft_ms=spread("ms", 31.0, 33.0, 29.5, 47.0, 30.2),
        tpot_ms=spread("ms", 5.9, 6.1, 6.0, 7.3, 5.8),
        itl_ms=spread("ms", 5.9, 6.1, 6.0, 9.3, 5.8, 5.1, 6.6),
        request_ms=spread("ms", 410.0, 415.0, 409.0, 470.0, 405.0),
        tokens_per_second=Spread.of([169 / scale, 160 / scale, 171 / scale], "tok/s"),
        peak_memory_bytes=int(scale * 197_132_288),
        mean_memory_bytes=int(scale * 150_994_944),
        start_memory_bytes=310_378_496,
        weights_bytes=int(scale * 22_020_096),
        cache_bytes=int(scale * 1_572_864),
        samples={"ttft_ms": (31.0 * scale,), "tpot_ms": (5.9 * scale,)},
    )


def inference() -> InferenceReport:
    return InferenceReport(
        rounds=5,
        prompt_tokens=127,
        new_tokens=61,
        engines={"baseline": engine("hf-eager", 1.0), "optimized": engine("onnxruntime", 0.137)},
        speed_ups={"ttft": ratio(5.2), "decode": ratio(8.03), "end_to_end": ratio(7.41), "throughput": ratio(7.4)},
        memory_ratio=Measured(value=7.3, unit="x"),
    )


def point(recipe: str, megabytes: float, kl: float, loss: float, rate: float, *, chosen: bool = False) -> Point:
    return Point(
        recipe=recipe,
        bytes=int(megabytes * 1e6),
        kl=Measured(value=kl, low=kl * 0.8, high=kl * 1.25, samples=97),
        accuracy_loss=Measured(value=loss, low=loss - 0.002, high=loss + 0.002, unit="share", samples=97),
        tokens_per_second=Measured(value=rate, unit="tok/s"),
        chosen=chosen,
    )


def validation_report(**changed: Any) -> ValidationReport:
    fields: dict[str, Any] = {
        "metadata": metadata(),
        "summary": Summary(verdict="FAIL", counts={"PASS": 6, "WARN": 1, "FAIL": 1, "SKIPPED": 1}, seconds=431.7),
        "outcomes": tuple(outcomes()),
        "inference": inference(),
        "text": Text(name="held-out documents", sha256="c0ffee" * 10 + "0042", tokens=20_011),
        "pareto": (
            point("fp32", 22.0, 1e-7, -0.0004, 1247.0),
            point("int8", 6.1, 0.0004, 0.0002, 1502.0),
            point("int4", 3.7, 0.0042, 0.0031, 1690.0, chosen=True),
            point("int4-dkm", 3.6, 0.0051, 0.0039, 1660.0),
            point("int3", 3.0, 0.031, 0.014, 1650.0),
            point("ternary", 2.1, 0.22, 0.083, 1811.0),
        ),
        "step_cost": {
            0: {1: 0.8, 2: 0.9, 4: 1.1, 8: 1.6, 16: 2.9},
            127: {1: 0.9, 2: 1.0, 4: 1.3, 8: 1.9, 16: 3.3},
            1021: {1: 1.4, 2: 1.6, 4: 2.1, 8: 3.0, 16: 5.1},
        },
        "acceptance": {0: 31, 1: 17, 2: 11, 3: 7, 4: 13},
    }
    return ValidationReport(**(fields | changed))


def suite_report(**changed: Any) -> TestReport:
    cases = [TestCase(name=f"test_example[{i}]", file=f"tests/test_{i % 5}.py", status="passed", seconds=0.013 * i,
                      properties={"tokens_per_second": 1690.2} if i == 3 else {}) for i in range(45)]  # fmt: skip
    cases += [
        TestCase(name="test_size", file="tests/test_size.py", status="failed", seconds=1.37,
                 message="AssertionError: assert 1.83 >= 2\n  where 1.83 = ratio(<artifact>)"),
        TestCase(name="test_gpu", file="tests/test_gpu.py", status="skipped", seconds=0, message="needs a CUDA device"),
    ]  # fmt: skip
    fields: dict[str, Any] = {
        "command": "python -m pytest tests/integration",
        "written": "2026-11-30T04:05:06+00:00",
        "seconds": 151.0,
        "counts": {"passed": 45, "failed": 1, "error": 0, "skipped": 1},
        "pass_rate": 45 / 46,
        "tests": tuple(cases),
    }
    return TestReport(**(fields | changed))


def training_metrics() -> metrics_schema.Report:
    batches = tuple(
        metrics_schema.BatchRecord(
            step=step, time=1.7e9 + step, epoch=step / 100, tokens=4096 * step, loss=2.3 + 6 / (1 + step / 13),
            accuracy=0.4, learning_rate=3e-4, gradient_norm=1.1, tokens_per_second=3900.0, batch_seconds=1.05,
            memory_bytes=1_400_000_000,
        )
        for step in range(1, 398, 2)
    )  # fmt: skip
    validations = tuple(
        metrics_schema.ValidationRecord(step=step, time=1.7e9 + step, loss=2.4 + 6.3 / (1 + step / 13), accuracy=0.39)
        for step in (50, 100, 150, 200, 250, 300, 350, 397)
    )
    figure = metrics_schema.Figure(count=199, not_finite=0, min=2.3, median=2.6, mean=2.9, max=7.9)
    return metrics_schema.Report(
        metadata=metrics_schema.Metadata(
            made_by="ryzen_compile 0.1.0", libraries={}, written="2026-11-30T04:05:06+00:00", first_record=None,
            last_record=None, resumes=0, unreadable_lines=0, columns={},
        ),
        statistics=metrics_schema.Statistics(
            records={"batch": 199, "validation": 8}, anomalies={},
            figures=dict.fromkeys(metrics_schema.FIGURES, figure),
            totals=metrics_schema.Totals(steps=397, tokens=1_626_112, recorded_seconds=410.0,
                                         lowest_validation_loss=2.4071, lowest_validation_step=397),
        ),
        epochs=(), batches=batches, validations=validations, anomalies=(), events=(), samples=(),
        summary={"stopped": ""},
    )  # fmt: skip
