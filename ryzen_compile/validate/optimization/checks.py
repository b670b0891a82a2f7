"""The checks of an optimized model, one function a component: each measures, judges, and names what is to blame."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ryzen_compile.errors import RyzenCompileError, UnsupportedError
from ryzen_compile.validate.measured import Measured, median_of, speed_up
from ryzen_compile.validate.optimization.measurements import Measurements
from ryzen_compile.validate.optimization.table import check_table
from ryzen_compile.validate.outcome import Component, Outcome, Target, judge
from ryzen_compile.validate.quality import interval

Check = Callable[[Measurements], Iterator[Outcome]]
Blame = Callable[[Measurements], str]
NONE = Target(value=0, at_least=False)  # for what may not happen at all
ALL = Target(value=1.0)


def kernels(found: Measurements) -> Iterator[Outcome]:
    """The artifact's operators against PyTorch's, summed over a decode step."""
    speeds = found.operators
    details = {row.kind: row.model_dump(mode="json") for row in speeds.rows} | {"left_out": dict(speeds.reasons)}
    if speeds.total is None:
        raise UnsupportedError("; ".join(speeds.reasons.values()) or "the graph holds no operator that is measured")
    slowest = min(speeds.rows, key=lambda row: row.ratio.value)
    blamed = f"{slowest.kind}: {slowest.ratio.to_text()} over {slowest.nodes} nodes"
    yield held(found, "kernels", "kernel_speedup", speeds.total, blamed, details)


def passes(found: Measurements) -> Iterator[Outcome]:
    """No pass was rolled back, and none was left out for want of an operator."""
    report = found.subject.model.report
    records = report.get("records", ()) if isinstance(report, Mapping) else ()
    if not records:
        raise UnsupportedError("the artifact holds no report of its passes")
    lost = [record for record in records if record["status"] in ("rolled back", "unsupported")]
    measured = Measured(value=len(lost), unit="passes", samples=len(records))
    status, reason = judge(measured, NONE)
    yield Outcome(
        component="passes",
        check="passes_hold",
        status=status,
        measured=measured,
        target=NONE,
        reason=reason,
        culprit="; ".join(f"{record['name']} {record['status']}: {record['detail']}".rstrip(": ") for record in lost),
        details={record["name"]: record["status"] for record in records},
    )


def embedding(found: Measurements) -> Iterator[Outcome]:
    """How much smaller the weights are, and whether the table still says what the model's says."""
    figures = found.inference.engines
    stored, before = figures["optimized"].weights_bytes, figures["baseline"].weights_bytes
    ratio = Measured(value=before / stored, unit="x")
    yield held(
        found, "embedding", "compression_ratio", ratio, f"{stored:,} bytes of weights, {before:,} in the model", {}
    )
    yield check_table(found)


def kv_cache(found: Measurements) -> Iterator[Outcome]:
    """Bytes of keys and values that are held behind a request, against the model's own cache."""
    figures = found.inference.engines
    ours, theirs = figures["optimized"].cache_bytes, figures["baseline"].cache_bytes
    if not theirs:
        raise UnsupportedError("the baseline holds no keys and values that can be counted")
    saving = Measured(value=1 - ours / theirs, unit="share")
    formats = sorted({f"{slot.key_format}/{slot.value_format}" for slot in found.subject.model.engine.slots})
    details = {"bytes": ours, "baseline_bytes": theirs, "formats": formats}
    yield held(found, "kv_cache", "kv_memory_saving", saving, f"rows of {', '.join(formats)}", details)


def speculation(found: Measurements) -> Iterator[Outcome]:
    """The same text, sooner."""
    plain, drafted = found.continued
    stats = drafted.stats
    who = ", ".join(stats.drafters) or "no drafter"
    same = Measured(value=drafted.same_text / drafted.prompts, unit="share", samples=drafted.prompts)
    status, reason = judge(same, ALL)
    details: dict[str, Any] = {"acceptance_rate": stats.acceptance_rate, "tokens_per_step": drafted.tokens_per_step}
    details |= {"speculation": stats.to_json()}
    yield Outcome(
        component="speculation",
        check="same_text",
        status=status,
        measured=same,
        target=ALL,
        reason=reason,
        culprit="" if status == "PASS" else f"text with drafts of {who} is not the model's own",
    )
    faster = speed_up(plain.timing.seconds, drafted.timing.seconds)
    dropped = "; ".join(f"{name} was dropped: {why}" for name, why in stats.dropped.items())
    blamed = dropped or stats.idle or f"{who}: {100 * stats.acceptance_rate:.0f} % of {stats.drafted} tokens accepted"
    yield held(found, "speculation", "speculation_speedup", faster, blamed, details)


def correctness(found: Measurements, blame: Blame | None = None) -> Iterator[Outcome]:
    """How much of the model's accuracy is lost on the text."""
    quality = found.quality
    loss = interval(quality.accuracy_loss, quality.windows, "share")
    details: dict[str, Any] = {
        name: {"value": estimate.value, "error": estimate.error if math.isfinite(estimate.error) else None}
        for name in ("accuracy", "reference_accuracy", "kl", "top1", "perplexity", "reference_perplexity", "ratio")
        for estimate in (getattr(quality, name),)
    } | {"tokens": quality.tokens}
    outcome = held(found, "correctness", "accuracy_loss", loss, "", details)
    if outcome.status == "FAIL" and blame is not None:
        found.say("which pass moved the logits")
        outcome = outcome.model_copy(update={"culprit": blame(found)})
    yield outcome


def end_to_end(found: Measurements) -> Iterator[Outcome]:
    """Whole requests, and what they would have to be on any machine."""
    report = found.inference
    ours = report.engines["optimized"]
    ratios = {name: ratio.model_dump(mode="json") for name, ratio in report.speed_ups.items()}
    slower = min(("ttft", "decode"), key=lambda name: report.speed_ups[name].value)
    blamed = f"{slower}: {report.speed_ups[slower].to_text()}"
    yield held(found, "end_to_end", "end_to_end_speedup", report.speed_ups["end_to_end"], blamed, ratios)
    first = median_of(ours.samples["ttft_ms"], "ms")
    yield held(found, "end_to_end", "ttft_ms", first, f"a prompt of {report.prompt_tokens} tokens", {})
    rate = median_of([1e3 / milliseconds for milliseconds in ours.samples["tpot_ms"]], "tok/s")
    yield held(found, "end_to_end", "tokens_per_second", rate, "decode", {})
    yield _memory(found)


def _memory(found: Measurements) -> Outcome:
    """Peak memory is told, and held to nothing: small models are smaller than any runtime."""
    started = time.perf_counter()
    try:
        baseline, optimized = found.footprints
    except UnsupportedError as error:
        return skipped("end_to_end", "peak_memory", error.message)
    ours = optimized.peak_above_start_bytes
    return Outcome(
        component="end_to_end",
        check="peak_memory",
        status="PASS",
        measured=Measured(value=ours, unit="bytes"),
        reason="not held to a target",
        command=found.subject.arguments,
        seconds=time.perf_counter() - started,
        details={"baseline": baseline.model_dump(mode="json"), "optimized": optimized.model_dump(mode="json")},
    )


def held(
    found: Measurements, component: Component, name: str, measured: Measured, blamed: str, details: dict[str, Any]
) -> Outcome:
    """``measured`` held to the threshold ``name``; ``blamed`` is named where it is missed."""
    target = found.subject.settings.thresholds.target(name)
    if target is None:
        return Outcome(
            component=component,
            check=name,
            status="SKIPPED",
            measured=measured,
            reason="no threshold",
            details=details,
        )
    status, reason = judge(measured, target)
    return Outcome(
        component=component,
        check=name,
        status=status,
        measured=measured,
        target=target,
        reason=reason,
        culprit=blamed if status == "FAIL" else "",
        details=details,
    )


def skipped(component: Component, name: str, reason: str) -> Outcome:
    return Outcome(component=component, check=name, status="SKIPPED", reason=reason)


def broken(component: Component, name: str, error: RyzenCompileError) -> Outcome:
    """What should have been measured failed: that is a failure of what was to be measured."""
    return Outcome(
        component=component, check=name, status="FAIL", reason=f"{error.code}: {error}", culprit=error.message
    )
