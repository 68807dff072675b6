"""Throughput of a run, from the measurements that its workers wrote into each part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stats = dict[str, Any]

_BINS = 60
_PERCENTILES = (50, 95, 99)
_STAGES = ("queue", "tokenize", "wait", "compute", "decode", "write")


def measure_throughput(stats: list[Stats]) -> dict[str, Any]:
    """Throughput, share of padding and times of the stages of a run.

    ``seconds`` is the time in which any worker held a shard: the length of the union of all [claimed, finished]. So a
    pause between an interrupted run and its resumption does not count.

    Args:
        stats: The workers' measurements, one object for each shard; empty where parts have none.
    """
    if not stats:
        return _speed(stats)
    return {
        **_speed(stats),
        "span_seconds": max(s["finished"] for s in stats) - min(s["claimed"] for s in stats),
        "retried_shards": sum(s.get("attempts", 1) > 1 for s in stats),
        "workers": _grouped(stats, ("worker", "host", "device")),
        "devices": _grouped(stats, ("host", "device")),
        "stages": _stages(stats),
        "over_time": _over_time(stats),
    }


def _speed(stats: list[Stats]) -> dict[str, Any]:
    seconds = _held_seconds(stats)
    documents, ok, rejected, real, computed, windows = (
        sum(int(s.get(name, 0)) for s in stats)
        for name in ("documents", "ok", "rejected", "tokens", "computed_tokens", "windows")
    )
    compute = sum(float(s.get("compute_seconds", 0.0)) for s in stats)
    return {
        "shards": len(stats),
        "documents": documents,
        "ok": ok,
        "rejected": rejected,
        "windows": windows,
        "tokens": real,
        "computed_tokens": computed,
        "padding_share": 1 - real / computed if computed else 0.0,
        "seconds": seconds,
        "compute_seconds": compute,
        "documents_per_second": documents / seconds if seconds else 0.0,
        "tokens_per_second": real / seconds if seconds else 0.0,
    }


def _held_seconds(stats: Iterable[Stats]) -> float:
    total, until = 0.0, float("-inf")
    for claimed, finished in sorted((float(s["claimed"]), float(s["finished"])) for s in stats):
        total += max(0.0, finished - max(claimed, until))
        until = max(until, finished)
    return total


def _grouped(stats: list[Stats], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Throughput of each worker or device over the time in which it held shards, and the share in which it computed."""
    groups: defaultdict[tuple[str, ...], list[Stats]] = defaultdict(list)
    for entry in stats:
        groups[tuple(str(entry.get(name, "")) for name in names)].append(entry)
    rows = []
    for key, group in sorted(groups.items()):
        speed = _speed(group)
        busy = speed["compute_seconds"] / speed["seconds"] if speed["seconds"] else 0.0
        rows.append({**dict(zip(names, key, strict=True)), **speed, "busy_share": min(1.0, busy)})
    return rows


def _stages(stats: list[Stats]) -> dict[str, dict[str, float]]:
    """Seconds of each stage: the sum, and mean and percentiles over shards."""
    measured = {
        stage: np.array([float(s[f"{stage}_seconds"]) for s in stats if f"{stage}_seconds" in s]) for stage in _STAGES
    }
    measured["shard"] = np.array([float(s["finished"]) - float(s["claimed"]) for s in stats])
    return {
        stage: {"total": float(values.sum()), "mean": float(values.mean()), **_percentiles(values)}
        for stage, values in measured.items()
        if values.size
    }


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{p}": float(v) for p, v in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)}


def _over_time(stats: list[Stats]) -> dict[str, Any]:
    """Documents and tokens a second of each device, in equal bins of the run's time.

    The documents and tokens of a shard are spread evenly over the time from its claim to its end.
    """
    begin = min(float(s["claimed"]) for s in stats)
    width = max((max(float(s["finished"]) for s in stats) - begin) / _BINS, 1e-9)
    edges = begin + width * np.arange(_BINS + 1)
    series: dict[str, dict[str, NDArray[np.float64]]] = {}
    for entry in stats:
        claimed, finished = float(entry["claimed"]), max(float(entry["finished"]), float(entry["claimed"]) + 1e-9)
        held = np.clip(np.minimum(edges[1:], finished) - np.maximum(edges[:-1], claimed), 0, None)
        device = " ".join(str(entry.get(name, "")) for name in ("host", "device"))
        one = series.setdefault(device, {"documents": np.zeros(_BINS), "tokens": np.zeros(_BINS)})
        for name, row in one.items():
            row += held / (finished - claimed) * float(entry.get(name, 0)) / width
    return {
        "bin_seconds": width,
        "devices": {
            device: {f"{name}_per_second": row.round(4).tolist() for name, row in one.items()}
            for device, one in sorted(series.items())
        },
    }
