"""The charts of a report, as SVG; text and lines have the text colour of the page around them."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Report = dict[str, Any]

_TEXT_COLOUR = "#010203"  # replaced by ``currentColor``
BLUE, ORANGE, GREEN, RED, GREY = "#4c8dd6", "#e08a3c", "#3fa66b", "#d9594c", "#8a8f98"
_SERIES = [BLUE, ORANGE, GREEN, RED, "#9a6fd0", "#c9a227", "#2aa7a7", GREY]
_MAX_SERIES = 8
_MIN_ROWS = 4  # height of a chart in bars, at least, so that few bars are not too thick
_MIN_SECONDS = 1e-4  # smallest value on an axis of seconds
_DRAWING = threading.Lock()  # matplotlib's styles and Python's warnings are global to the process
_SIZE = (4.8, 2.9)  # inches: small, so that text is readable on a telephone
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": _TEXT_COLOUR,
    "axes.labelcolor": _TEXT_COLOUR,
    "axes.edgecolor": _TEXT_COLOUR,
    "xtick.color": _TEXT_COLOUR,
    "ytick.color": _TEXT_COLOUR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "font.size": 9,
    "grid.color": GREY,
    "grid.alpha": 0.3,
}


def draw_charts(report: Report) -> dict[str, str]:
    """The charts for which the report has values, as inline SVG by name.

    Args:
        report: What ``evaluate`` returned.
    """
    charts: dict[str, Callable[[Axes, Report], None]] = {"lengths": _lengths}
    if report["throughput"].get("over_time"):
        charts |= {"speed": _speed, "devices": _devices, "stages": _stages}
    if report.get("per_label"):
        charts |= {"labels": _labels, "confusion": _confusion, "mistakes": _mistakes}
        charts |= {"by_length": _by_length, "by_document": _by_document}
    if report.get("calibration", {}).get("bins"):
        charts["reliability"] = _reliability
    return {name: _draw(name, draw, report) for name, draw in charts.items()}


def _draw(name: str, draw: Callable[[Axes, Report], None], report: Report) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    sink = io.StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with _DRAWING, matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that matplotlib's font lacks: browsers have them
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.add_subplot(), report)
        figure.savefig(sink, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT_COLOUR, "currentColor")
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def _short(text: str) -> str:
    return text if len(text) <= 28 else text[:27] + "…"


def _speed(axes: Axes, report: Report) -> None:
    over_time = report["throughput"]["over_time"]
    width = over_time["bin_seconds"]
    rows = {}
    for name, one in over_time["devices"].items():
        host, _, device = name.rpartition(" ")
        rows[_device(device, host)] = one["documents_per_second"]
    if len(rows) > _MAX_SERIES:
        rows = {f"{len(rows)} devices together": [sum(values) for values in zip(*rows.values(), strict=True)]}
    for (name, values), colour in zip(rows.items(), _SERIES, strict=False):
        edges = [n * width for n in range(len(values) + 1)]
        axes.stairs(values, edges, color=colour, label=name, linewidth=1.5, fill=len(rows) == 1, alpha=0.75)
    top = 1.25 * max(map(max, rows.values())) or 1.0  # room for the legend
    axes.set(xlabel="seconds since the first shard was claimed", ylabel="documents/s", xlim=(0, None), ylim=(0, top))
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    axes.grid(axis="y")


def _device(device: str, host: str) -> str:
    return _short(f"{device} · {host}")


def _bars(axes: Axes, names: list[str], values: list[float], colour: str) -> None:
    axes.barh([_short(name) for name in names], values, color=colour, height=0.6)
    axes.set_ylim(max(len(names), _MIN_ROWS) - 0.5, -0.5)
    axes.grid(axis="x")


def _devices(axes: Axes, report: Report) -> None:
    """Share of the time in which up to ten devices computed, and share of tokens that were not padding."""
    rows = report["throughput"]["devices"][:10]
    for offset, name, colour, shares in (
        (-0.2, "busy: computing", BLUE, [row["busy_share"] for row in rows]),
        (0.2, "fill: not padding", GREEN, [1 - row["padding_share"] for row in rows]),
    ):
        at = [n + offset for n in range(len(rows))]
        bars = axes.barh(at, [100 * share for share in shares], height=0.36, color=colour, label=name)
        if len(rows) <= _MIN_ROWS:
            labels = [f"{100 * share:.1f}" for share in shares]
            axes.bar_label(bars, labels, label_type="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [_device(row["device"], row["host"]) for row in rows])
    around = max(0.6, (3 - len(rows)) / 2)  # centres a single device
    axes.set(xlabel="%", xlim=(0, 100), ylim=(len(rows) - 1 + around, -around))
    axes.grid(axis="x")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1.2)


def _stages(axes: Axes, report: Report) -> None:
    """Median, 95th and 99th percentile of each stage's seconds, on a logarithmic axis."""
    stages = report["throughput"]["stages"]
    for at, row in enumerate(stages.values()):
        p50, p95, p99 = (max(row[name], _MIN_SECONDS) for name in ("p50", "p95", "p99"))
        axes.plot([p50, p99], [at, at], color=GREY, linewidth=2, zorder=1)
        for value, colour, name in ((p99, ORANGE, "p99"), (p95, GREEN, "p95"), (p50, BLUE, "p50")):
            axes.scatter(value, at, color=colour, s=36, zorder=2, label=None if at else name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(stages)), [stage_name(stage) for stage in stages])
    axes.set(xlabel="seconds of a shard", ylim=(len(stages) - 0.5, -0.5))
    axes.grid(axis="x")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def stage_name(stage: str) -> str:
    """Name of a stage of ``throughput`` for people."""
    return "claimed to finished" if stage == "shard" else stage


def _lengths(axes: Axes, report: Report) -> None:
    histogram = report["lengths"]["histogram"]
    ends = [row["tokens_to"] for row in histogram]
    names = [str(row["tokens_from"]) if row["tokens_to"] else f"{row['tokens_from']}+" for row in histogram]
    axes.bar(range(len(names)), [row["documents"] for row in histogram], color=BLUE, width=0.8)
    for length in sorted({length for _, length in report["lengths"]["shapes"]}):
        at = sum(end is not None and end < length for end in ends) - 0.5
        axes.axvline(at, color=ORANGE, linestyle="--", linewidth=1)
        axes.annotate(str(length), (at, 1), xycoords=("data", "axes fraction"), color=ORANGE, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, fontsize=8)
    axes.set(xlabel="tokens of a document, from", ylabel="documents")
    axes.grid(axis="y")


def _labels(axes: Axes, report: Report) -> None:
    rows = sorted(report["per_label"].items(), key=lambda row: (-row[1]["support"], row[0]))[:20]
    names = [_short(name) for name, _ in rows]
    f1 = [100 * row["f1"] for _, row in rows]
    bounds = [[100 * row["f1_interval"][side] for _, row in rows] for side in (0, 1)]
    spread = [[max(0.0, value - low) for value, low in zip(f1, bounds[0], strict=True)]]
    spread.append([max(0.0, high - value) for value, high in zip(f1, bounds[1], strict=True)])
    _bars(axes, names, f1, BLUE)
    axes.errorbar(f1, range(len(names)), xerr=spread, fmt="none", ecolor=_TEXT_COLOUR, capsize=3, linewidth=1)
    axes.set(xlabel="F1, % (line: 95 % interval)", xlim=(0, 100))


def _confusion(axes: Axes, report: Report) -> None:
    confusion = report["confusion"]
    cells, names = confusion["entities"], confusion["gold"]
    last = len(names) - 1
    for row, counts in enumerate(cells):
        total = sum(counts) or 1
        for column, count in enumerate(counts):
            colour = GREEN if row == column else RED
            shade = 0.75 * (count / total) ** (1.0 if row == column else 0.5)  # makes few mistakes visible
            axes.barh(row, 1, left=column - 0.5, height=1, color=colour, alpha=shade, linewidth=0)
            if count and last <= 12:
                axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8)
    shown = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), [*shown[:-1], "missed"], rotation=45 if last > 5 else 0, fontsize=8)
    axes.set_yticks(range(len(names)), [*shown[:-1], "invented"], fontsize=8)
    axes.set(xlabel="predicted", ylabel="gold", xlim=(-0.5, last + 0.5), ylim=(last + 0.5, -0.5))


def _mistakes(axes: Axes, report: Report) -> None:
    kinds = {kind.replace("_and_", " + "): n for kind, n in report["mistakes"].items() if kind != "correct"}
    _bars(axes, list(kinds), list(map(float, kinds.values())), RED)
    for at, count in enumerate(kinds.values()):
        axes.annotate(f" {count:,}", (count, at), va="center", fontsize=8)
    axes.set(xlabel="entities", xlim=(0, 1.15 * max(kinds.values()) or 1))


def _by_document(axes: Axes, report: Report) -> None:
    found = report["by_document"]
    edges = [100 * edge for edge in found["f1_edges"]]
    bars = axes.bar(edges[:-1], found["f1_histogram"], width=9, align="edge", color=BLUE)
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in found["f1_histogram"]], fontsize=7)
    axes.set(xlabel="F1 of a document, %", ylabel="documents", xlim=(0, 100))
    axes.grid(axis="y")


def _by_length(axes: Axes, report: Report) -> None:
    rows = report["by_length"]
    names = [f"{row['words_from']}–{row['words_to']}" if row["words_to"] else f"{row['words_from']}+" for row in rows]
    axes.bar(range(len(names)), [100 * row["f1"] for row in rows], color=BLUE, width=0.7)
    for at, row in enumerate(rows):
        axes.annotate(f"{row['documents']:,}", (at, 100 * row["f1"]), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30 if len(names) > 6 else 0)
    axes.set(xlabel="words of a document (above the bar: documents)", ylabel="F1, %", ylim=(0, 108))
    axes.grid(axis="y")


def _reliability(axes: Axes, report: Report) -> None:
    bins = report["calibration"]["bins"]
    most = max(row["entities"] for row in bins)
    axes.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1)
    scores, precisions = ([100 * row[name] for row in bins] for name in ("mean_score", "precision"))
    axes.plot(scores, precisions, color=BLUE, linewidth=1.2)
    sizes = [20 + 180 * row["entities"] / most for row in bins]
    axes.scatter(scores, precisions, s=sizes, color=BLUE, alpha=0.8)
    axes.set(xlabel="mean score, % (size: entities)", ylabel="of them correct, %", xlim=(0, 103), ylim=(0, 105))
    axes.grid()
