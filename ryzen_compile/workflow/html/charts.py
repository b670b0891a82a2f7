"""The charts of a report, each an ``<svg>`` for the page, empty where there is nothing to draw.

Values stand beside what is drawn, so that no chart has to be read off its axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ryzen_compile.train.metrics_schema import Report as TrainingMetrics
from ryzen_compile.validate.inference import BASELINE as THEIRS
from ryzen_compile.validate.inference import OPTIMIZED as OURS
from ryzen_compile.validate.inference import EngineFigures, InferenceReport
from ryzen_compile.validate.measured import Measured, Spread
from ryzen_compile.workflow import wording
from ryzen_compile.workflow.html.marks import Bar, draw_bars, label_points, name_rows, number_axes, short, whole_ticks
from ryzen_compile.workflow.html.svg_figure import ACCENT, BASELINE, INK, LINE, MUTED, PAPER, chart
from ryzen_compile.workflow.report_schema import EndToEnd, Point

MIB = 2.0**20
_COLORS = {THEIRS: BASELINE, OURS: ACCENT}
_MARKERS = "osD^v"


def latency_chart(inference: InferenceReport | None) -> str:
    """Times to the first and between further tokens: bars are medians, whiskers lead from the least to the 95th
    percentile."""
    engines = _engines(inference)
    if not engines:
        return ""
    rows = (("ttft_ms", "Time to the first token, ms"), ("tpot_ms", "Time per further token, ms"))
    with chart("latency", "Latency of the baseline and of the optimized model", 2.3, (2, 1)) as made:
        for axes, (field, title) in zip(made.axes, rows, strict=True):
            spreads: list[tuple[str, Spread]] = [(name, getattr(engine, field)) for name, engine in engines]
            bars = [Bar(name, one.median, _COLORS[name], (one.minimum, one.p95)) for name, one in spreads]
            draw_bars(axes, title, bars)
    return made.svg


def memory_chart(inference: InferenceReport | None) -> str:
    """What engines hold, in MiB; what was not measured is left out."""
    engines = _engines(inference)
    rows = [
        (title, [(name, value / MIB) for name, engine in engines if (value := getattr(engine, field)) is not None])
        for field, title in (
            ("peak_memory_bytes", "Peak above what imports take, MiB"),
            ("mean_memory_bytes", "Mean over time, MiB"),
            ("weights_bytes", "Weights as stored, MiB"),
            ("cache_bytes", "KV cache after a request, MiB"),
        )
    ]
    rows = [(title, values) for title, values in rows if values]
    if not rows:
        return ""
    title = "Memory of the baseline and of the optimized model"
    with chart("memory", title, 0.3 + 0.95 * len(rows), (len(rows), 1)) as made:
        for axes, (heading, values) in zip(made.axes, rows, strict=True):
            draw_bars(axes, heading, [Bar(name, amount, _COLORS[name]) for name, amount in values])
    return made.svg


def quality_chart(points: Sequence[Point]) -> str:
    """Divergence and accuracy loss of each recipe, with 95 % intervals; the chosen one in colour."""
    if not points:
        return ""
    height = 0.55 + 0.27 * len(points)
    with chart("quality", "Divergence and accuracy loss by recipe", height, (1, 2), sharey=True) as made:
        names = [short(point.recipe) for point in points]
        colors = [ACCENT if point.chosen else BASELINE for point in points]
        divergences, losses = [point.kl for point in points], [point.accuracy_loss for point in points]
        for axes, title, figures in (
            (made.axes[0], "KL, nats per token", divergences),
            (made.axes[1], "Accuracy loss", losses),
        ):
            bars = [
                Bar(name, figure.value, color, _ends(figure), wording.amount(figure.value, figure.unit, 3))
                for name, figure, color in zip(names, figures, colors, strict=True)
            ]
            draw_bars(axes, title, bars)
    return made.svg


def pareto_chart(points: Sequence[Point]) -> str:
    """Divergence over size, one marker a recipe, its area the speed of decoding; the chosen one in colour."""
    # The chosen one is drawn last, over those beside it.
    shown = sorted((point for point in points if math.isfinite(point.kl.value)), key=lambda point: point.chosen)
    if not shown:
        return ""
    with chart("pareto", "Divergence over size of weights, by recipe", 3.2) as made:
        axes = made.axes[0]
        x, y = [point.bytes / MIB for point in shown], [point.kl.value for point in shown]
        fastest = max((p.tokens_per_second.value for p in shown if math.isfinite(p.tokens_per_second.value)), default=0)
        areas = [_area(point.tokens_per_second.value, fastest) for point in shown]
        colors = [ACCENT if point.chosen else BASELINE for point in shown]
        for at, point in zip(x, shown, strict=True):
            ends = _ends(point.kl)
            if ends is not None:
                axes.plot([at, at], ends, color=MUTED, linewidth=1, clip_on=False)
        axes.scatter(x, y, s=areas, c=colors, edgecolors=PAPER, linewidths=1, zorder=3, clip_on=False)
        axes.set_title("KL, nats per token")
        axes.set_xlabel("weights as stored, MiB; area of markers: tokens per second")
        if min(y) > 0 and max(y) > 10 * min(y):
            axes.set_yscale("log")
        axes.margins(0.12, 0.15)
        number_axes(axes)
        label_points(axes, list(zip(x, y, areas, [short(p.recipe) for p in shown], strict=True)))
    return made.svg


def step_cost_chart(step_cost: Mapping[int, Mapping[int, float]]) -> str:
    """What a step of several tokens takes, one line for each number of tokens in the cache."""
    curves = [(context, sorted(costs.items())) for context, costs in sorted(step_cost.items()) if costs]
    if not curves:
        return ""
    with chart("step-cost", "Milliseconds of a step over its number of tokens", 2.7) as made:
        axes = made.axes[0]
        for i, (context, costs) in enumerate(curves):
            axes.plot(
                [tokens for tokens, _ in costs],
                [cost for _, cost in costs],
                color=ACCENT,
                alpha=1 - 0.5 * (1 - (i + 1) / len(curves)),  # the fuller the cache, the stronger
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.4,
                label=f"{context:,} tokens in the cache",
                clip_on=False,
            )
        axes.set_title("Milliseconds per step")
        axes.set_xlabel("tokens of the step")
        axes.set_ylim(bottom=0)
        number_axes(axes)
        whole_ticks(axes.xaxis)
        axes.legend(loc="best")
    return made.svg


def acceptance_chart(acceptance: Mapping[int, int]) -> str:
    """How many tokens of a draft were kept, as shares of all drafts."""
    drafts = sum(acceptance.values())
    if not drafts:
        return ""
    kept = range(max(acceptance) + 1)
    shares = [100 * acceptance.get(tokens, 0) / drafts for tokens in kept]
    with chart("acceptance", "Accepted tokens per draft", 2.3) as made:
        axes = made.axes[0]
        axes.bar(list(kept), shares, width=0.75, color=ACCENT)
        if len(kept) <= 16:
            for tokens, share in zip(kept, shares, strict=True):
                axes.text(tokens, share, f" {share:.0f} ", ha="center", va="bottom", color=MUTED)
        axes.set_title(f"Share of {wording.count(drafts, 'draft')}, %")
        axes.set_xlabel("tokens of a draft that were accepted")
        axes.margins(y=0.12)
        number_axes(axes)
        whole_ticks(axes.xaxis)
    return made.svg


def training_chart(metrics: TrainingMetrics | None) -> str:
    """Loss of the steps and of the held-out text."""
    if metrics is None:
        return ""
    steps = [(one.step, one.loss) for one in metrics.batches if math.isfinite(one.loss)]
    held_out = [(one.step, one.loss) for one in metrics.validations if math.isfinite(one.loss)]
    if not steps and not held_out:
        return ""
    with chart("training", "Training loss over steps", 2.7) as made:
        axes = made.axes[0]
        if steps:
            axes.plot(*zip(*steps, strict=True), color=BASELINE, linewidth=1, label="training text", clip_on=False)
        if held_out:
            style = {"marker": "o", "markersize": 3.5, "linewidth": 1.4, "clip_on": False}
            axes.plot(*zip(*held_out, strict=True), color=ACCENT, label="held-out text", **style)
        axes.set_title("Loss, nats per token")
        axes.set_xlabel("steps")
        number_axes(axes)
        axes.legend(loc="upper right")
    return made.svg


def parts_chart(whole: EndToEnd | None) -> str:
    """The speed-up of the whole and of each part alone, with 95 % intervals, over what changes nothing."""
    if whole is None:
        return ""
    rows = [("end to end", whole.speed_up), ("first token", whole.prefill), ("decode", whole.decode)]
    rows += [(wording.words(name), figure) for name, figure in whole.parts.items()]
    rows = [(name, figure) for name, figure in rows if math.isfinite(figure.value) and figure.value > 0]
    if not rows:
        return ""
    with chart("parts", "Speed-up of the whole and of its parts", 0.6 + 0.26 * len(rows)) as made:
        axes = made.axes[0]
        for at, (name, figure) in enumerate(rows):
            ends, color = _ends(figure), ACCENT if name == "end to end" else INK
            axes.plot(figure.value, at, marker="o", markersize=5, color=color, clip_on=False)
            if ends is not None and ends[0] > 0:
                axes.plot(ends, [at, at], color=color, linewidth=1.4, clip_on=False)
            reach = max(figure.value, ends[1] if ends is not None else 0)
            label = short(wording.amount(figure.value, figure.unit, 3))
            axes.annotate(label, (reach, at), (7, 0), textcoords="offset points", va="center", color=MUTED)
        axes.axvline(1, color=LINE, linewidth=1, zorder=0)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_title("Times as fast, logarithmic")
        name_rows(axes, [short(name) for name, _ in rows])
        axes.set_xticks([1], ["1 x"])
        axes.minorticks_off()
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    return made.svg


def _engines(inference: InferenceReport | None) -> list[tuple[str, EngineFigures]]:
    found = inference.engines if inference is not None else {}
    return [(name, found[name]) for name in _COLORS if name in found]


def _ends(figure: Measured) -> tuple[float, float] | None:
    if figure.low is None or figure.high is None or not math.isfinite(figure.low + figure.high):
        return None
    return figure.low, figure.high


def _area(rate: float, fastest: float) -> float:
    """Square points of a marker; the fastest has 200, and none is too small to be seen."""
    share = rate / fastest if fastest > 0 and math.isfinite(rate) else 0.0
    return max(200.0 * share, 14.0)
