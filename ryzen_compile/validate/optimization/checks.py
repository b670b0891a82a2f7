"""The checks of an optimized model, one function each: it measures, judges, and names what is to blame for a miss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ryzen_compile.errors import RyzenCompileError, UnsupportedError
from ryzen_compile.validate.measured import Measured, median_of, speed_up
from ryzen_compile.validate.optimization.measurements import Measurements
from ryzen_compile.validate.outcome import Component, Outcome, Target, judge
from ryzen_compile.validate.quality import interval

Check = Callable[[Measurements], Outcome]
Blame = Callable[[Measurements], str]
NONE = Target(value=0, at_least=False)  # for what may not happen at all
ALL = Target(value=1.0)


def kernel_speedup(found: Measurements) -> Outcome:
    """The artifact's operators against PyTorch's, summed over a decode step."""
    speeds = found.operators
    details = {row.kind: row.model_dump(mode="json") for row in speeds.rows} | {"left_out": dict(speeds.reasons)}
    if speeds.total is None:
        raise UnsupportedError("; ".join(speeds.reasons.values()) or "the graph holds no operator that is measured")
    slowest = min(speeds.rows, key=lambda row: row.ratio.value)
    blamed = f"{slowest.kind}: {slowest.ratio.to_text()} over {slowest.nodes} nodes"
    return held(found, "kernels", "kernel_speedup", speeds.total, blamed, details)


def passes_hold(found: Measurements) -> Outcome:
    """No pass was rolled back, and none was left out for want of an operator."""
    report = found.subject.model.report
    records = report.get("records", ()) if isinstance(report, Mapping) else ()
    if not records:
        raise UnsupportedError("the artifact holds no report of its passes")
    lost = [record for record in records if record["status"] in ("rolled back", "unsupported")]
    if not lost and report.get("reference_rmse") is None:
        raise UnsupportedError("it was exported without the gate: no pass was held to anything")
    measured = Measured(value=len(lost), unit="passes", samples=len(records))
    culprit = "; ".join(f"{record['name']} {record['status']}: {record['detail']}".rstrip(": ") for record in lost)
    details = {record["name"]: record["status"] for record in records}
    return judged("passes", "passes_hold", measured, NONE, culprit, details)


def compression_ratio(found: Measurements) -> Outcome:
    """How much smaller the weights are."""
    figures = found.inference.engines
    stored, before = figures["optimized"].weights_bytes, figures["baseline"].weights_bytes
    blamed = f"{stored:,} bytes of weights, {before:,} in the model"
    return held(found, "embedding", "compression_ratio", Measured(value=before / stored, unit="x"), blamed, {})


def kv_memory_saving(found: Measurements) -> Outcome:
    """Bytes of keys and values that are held behind a request, against the model's own cache."""
    figures = found.inference.engines
    ours, theirs = figures["optimized"].cache_bytes, figures["baseline"].cache_bytes
    if not theirs:
        raise UnsupportedError("the baseline holds no keys and values that can be counted")
    formats = sorted({f"{slot.key_format}/{slot.value_format}" for slot in found.subject.model.engine.slots})
    details = {"bytes": ours, "baseline_bytes": theirs, "formats": formats}
    saving = Measured(value=1 - ours / theirs, unit="share")
    return held(found, "kv_cache", "kv_memory_saving", saving, f"rows of {', '.join(formats)}", details)


def same_text(found: Measurements) -> Outcome:
    """Drafts leave the text alone. Where one row is computed in another way than several (ONNX Runtime's own products
    with integers), two tokens that are as good as equal may change places: there a difference is a warning."""
    _, drafted = found.continued
    claims = getattr(found.subject.model.engine, "claims", None)
    alike = claims is None or claims.rows_alike
    share = Measured(value=drafted.same_text / drafted.prompts, unit="share", samples=drafted.prompts)
    blamed = f"text with drafts of {_who(drafted.stats.drafters)} is not the model's own"
    target = ALL if alike else ALL.model_copy(update={"advisory": True})
    return judged("speculation", "same_text", share, target, blamed, {"rows_alike": alike})


def speculation_speedup(found: Measurements) -> Outcome:
    """The same text, sooner."""
    plain, drafted = found.continued
    stats = drafted.stats
    details: dict[str, Any] = {"acceptance_rate": stats.acceptance_rate, "tokens_per_step": drafted.tokens_per_step}
    faster = speed_up(plain.timing.seconds, drafted.timing.seconds)
    dropped = "; ".join(f"{name} was dropped: {why}" for name, why in stats.dropped.items())
    kept = f"{100 * stats.acceptance_rate:.0f} % of {stats.drafted} tokens accepted"
    blamed = dropped or stats.idle or f"{_who(stats.drafters)}: {kept}"
    details["speculation"] = stats.to_json()
    return held(found, "speculation", "speculation_speedup", faster, blamed, details)


def accuracy_loss(found: Measurements, blame: Blame | None = None) -> Outcome:
    """How much of the model's accuracy is lost on the text."""
    quality = found.quality
    loss = interval(quality.accuracy_loss, quality.windows, "share")
    details: dict[str, Any] = {
        name: {"value": estimate.value, "error": estimate.error if math.isfinite(estimate.error) else None}
        for name in ("accuracy", "reference_accuracy", "kl", "top1", "perplexity", "reference_perplexity", "ratio")
        for estimate in (getattr(quality, name),)
    } | {"tokens": quality.tokens}
    outcome = held(found, "correctness", "accuracy_loss", loss, "", details)
    if outcome.status != "FAIL" or blame is None:
        return outcome
    found.say("which pass moved the logits")
    try:
        culprit = blame(found)
    except RyzenCompileError as error:  # what was measured stays a failure, whoever is to blame
        culprit = f"not found: {error}"
    return outcome.model_copy(update={"culprit": culprit})


def end_to_end_speedup(found: Measurements) -> Outcome:
    """Whole requests: a prompt, and what follows it."""
    ratios = found.inference.speed_ups
    slower = min(("ttft", "decode"), key=lambda name: ratios[name].value)
    details = {name: ratio.model_dump(mode="json") for name, ratio in ratios.items()}
    blamed = f"{slower}: {ratios[slower].to_text()}"
    return held(found, "end_to_end", "end_to_end_speedup", ratios["end_to_end"], blamed, details)


def ttft_ms(found: Measurements) -> Outcome:
    """Until the first token."""
    report = found.inference
    first = median_of(report.engines["optimized"].samples["ttft_ms"], "ms")
    return held(found, "end_to_end", "ttft_ms", first, f"a prompt of {report.prompt_tokens} tokens", {})


def tokens_per_second(found: Measurements) -> Outcome:
    """Decoding, behind the first token."""
    each = found.inference.engines["optimized"].samples["tpot_ms"]
    rate = median_of([1e3 / milliseconds for milliseconds in each], "tok/s")
    return held(found, "end_to_end", "tokens_per_second", rate, "decode", {})


def peak_memory(found: Measurements) -> Outcome:
    """Told, and held to nothing: small models are smaller than any runtime."""
    baseline, optimized = found.footprints
    return Outcome(
        component="end_to_end",
        check="peak_memory",
        status="SKIPPED",
        measured=Measured(value=optimized.peak_above_start_bytes, unit="bytes"),
        reason="no threshold",
        details={"baseline": baseline.model_dump(mode="json"), "optimized": optimized.model_dump(mode="json")},
    )


def held(
    found: Measurements, component: Component, name: str, measured: Measured, blamed: str, details: dict[str, Any]
) -> Outcome:
    """``measured`` held to the threshold ``name``; ``blamed`` is named where it is missed."""
    target = found.subject.settings.thresholds.target(name)
    if target is not None:
        return judged(component, name, measured, target, blamed, details)
    return Outcome(
        component=component, check=name, status="SKIPPED", measured=measured, reason="no threshold", details=details
    )


def judged(
    component: Component, name: str, measured: Measured, target: Target, blamed: str, details: dict[str, Any]
) -> Outcome:
    """``measured`` held to ``target``."""
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


def _who(drafters: Mapping[str, object]) -> str:
    return ", ".join(drafters) or "no drafter"
