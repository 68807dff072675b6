"""What the benchmark says: a table, ``bench.json`` with the ratios by name, and a chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.corpora import Corpus
from tests.benchmarks.ways import Sample

COLUMNS = ("way", "documents/s", "tokens/s", "of peak", "padding", "CPU s/1,000", "memory MB", "start-up s")

Samples = Mapping[str, Sequence[Sample]]


def over(one: Sequence[Sample], other: Sequence[Sample]) -> float:
    """How many times as fast one way is as another: the median of the rounds' ratios."""
    pairs = zip(one, other, strict=True)
    return round(median(_rate(a) / _rate(b) for a, b in pairs), 4)


def over_best(ones: Sequence[Sequence[Sample]], others: Sequence[Sequence[Sample]]) -> float:
    """How many times as fast the fastest of some ways is as the fastest of others: the median of the rounds' ratios."""
    rates = [[max(map(_rate, taken)) for taken in zip(*side, strict=True)] for side in (ones, others)]
    return round(median(a / b for a, b in zip(*rates, strict=True)), 4)


def summarise(corpus: Corpus, samples: Samples, flops: float, peak: float) -> list[dict[str, Any]]:
    """One row a way: medians over its rounds.

    Args:
        corpus: What was tagged.
        samples: The measurements, by way.
        flops: Of one document, without padding.
        peak: The machine's fp32 matrix product in GFLOP/s.
    """
    return [_row(name, corpus, taken, flops, peak) for name, taken in samples.items()]


def _row(name: str, corpus: Corpus, samples: Sequence[Sample], flops: float, peak: float) -> dict[str, Any]:
    rate = median(map(_rate, samples))
    padding = [s.padding_share for s in samples if s.padding_share is not None]
    startup = [s.startup_seconds for s in samples if s.startup_seconds is not None]
    cpu = [1000 * s.cpu_seconds / s.documents for s in samples if s.cpu_seconds is not None]
    memory = [s.peak_bytes for s in samples if s.peak_bytes is not None]
    return {
        "way": name,
        "documents": samples[0].documents,
        "documents_per_second": round(rate, 2),
        "tokens_per_second": round(rate * corpus.tokens_per_document, 1),
        "useful_gflops": round(rate * flops / 1e9, 2),
        "peak_share": round(rate * flops / 1e9 / peak, 4),
        "padding_share": round(median(padding), 4) if padding else None,
        "cpu_seconds_per_1000_documents": round(median(cpu), 2) if cpu else None,
        "peak_memory_mb": round(max(memory) / 1e6) if memory else None,
        "startup_seconds": round(median(startup), 2) if startup else None,
        "rounds": [round(_rate(sample), 2) for sample in samples],
    }


def _rate(sample: Sample) -> float:
    return sample.documents / sample.seconds


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    padding, startup = row["padding_share"], row["startup_seconds"]
    cpu, memory = row["cpu_seconds_per_1000_documents"], row["peak_memory_mb"]
    return (
        row["way"],
        f"{row['documents_per_second']:,.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_share']:.1%}",
        "" if padding is None else f"{padding:.1%}",
        "" if cpu is None else f"{cpu:,.1f}",
        "" if memory is None else f"{memory:,}",
        "" if startup is None else f"{startup:.1f}",
    )


def write(folder: Path, body: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``bench.json`` and ``bench.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", "utf-8")
    chart(rows, folder / "bench.svg")


def chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Documents a second of every way, as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nermill"
    from matplotlib import pyplot

    ordered = sorted(rows, key=lambda row: float(row["documents_per_second"]))
    names = [row["way"] for row in ordered]
    rates = [row["documents_per_second"] for row in ordered]
    figure, axes = pyplot.subplots(figsize=(7, 0.36 * len(rows) + 0.9))
    colours = ["#0072b2" if name.startswith("mill") else "#a0a0a0" for name in names]
    bars = axes.barh(names, rates, color=colours)
    axes.bar_label(bars, [f"{rate:,.1f}" for rate in rates], padding=3)
    axes.set_xlabel("documents per second")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
