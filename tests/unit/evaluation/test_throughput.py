"""Throughput of a run with given times, compared with values computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nermill.worker.evaluation import evaluate
from nermill.worker.evaluation.throughput import measure_throughput
from tests.unit.evaluation.runs import Doc, make_run, stats_of, write_part

DOCS = 100


def paced_run() -> list[dict]:
    """Two devices for 60 s: one a shard every 2 s, computing 80 % of it; the other every 3 s, computing 50 %.

    Clocks are those of two hosts; each device takes its next shard while the last one still is decoded.
    """
    stats: list[dict[str, Any]] = []
    for device, seconds, busy in (("npu:0", 2.0, 0.8), ("npu:1", 3.0, 0.5)):
        for n in range(int(60 / seconds)):
            begin = 1_000.0 + n * seconds
            stats.append(
                stats_of(
                    len(stats),
                    DOCS,
                    device=device,
                    worker=f"w-{device}",
                    claimed=begin - (0.5 if n else 0.0),
                    finished=begin + seconds,
                    compute_seconds=seconds * busy,
                    tokens=1_500,
                    computed_tokens=1_600,
                )
            )
    return stats


def test_a_paced_run_with_two_devices() -> None:
    found = measure_throughput(paced_run())
    assert found["seconds"] == pytest.approx(60, rel=0.02)
    assert found["documents_per_second"] == pytest.approx(50 + 100 / 3, rel=0.02)
    assert found["tokens_per_second"] == pytest.approx((50 + 100 / 3) * 15, rel=0.02)
    assert found["padding_share"] == pytest.approx(1 / 16)
    by_device = {row["device"]: row for row in found["devices"]}
    assert by_device["npu:0"]["documents_per_second"] == pytest.approx(50, rel=0.02)
    assert by_device["npu:1"]["documents_per_second"] == pytest.approx(100 / 3, rel=0.02)
    assert by_device["npu:0"]["busy_share"] == pytest.approx(0.8, rel=0.02)
    assert by_device["npu:1"]["busy_share"] == pytest.approx(0.5, rel=0.02)
    for device, rate in (("here npu:0", 50), ("here npu:1", 100 / 3)):
        series = found["over_time"]["devices"][device]["documents_per_second"]
        assert sum(series) / len(series) == pytest.approx(rate, rel=0.02)


def test_a_pause_between_two_halves_is_not_work() -> None:
    stats = paced_run()
    for entry in stats:
        if entry["claimed"] >= 1_030:
            entry["claimed"] += 86_400
            entry["finished"] += 86_400
    found = measure_throughput(stats)
    assert found["documents_per_second"] == pytest.approx(50 + 100 / 3, rel=0.05)
    assert found["span_seconds"] == pytest.approx(86_460, rel=0.001)


def test_percentiles_of_stages() -> None:
    stats = [stats_of(n, 1, compute_seconds=float(n + 1), write_seconds=2.0) for n in range(100)]
    stages = measure_throughput(stats)["stages"]
    assert (stages["compute"]["p50"], stages["compute"]["total"]) == (50.5, 5050)
    assert stages["compute"]["p95"] == pytest.approx(95.05)
    assert stages["compute"]["p99"] == pytest.approx(99.01)
    assert stages["write"]["p99"] == 2.0


def test_a_run_without_gold_has_its_throughput(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(["a"], ["O"], None)] * 10, per_shard=5)
    report = evaluate(run)
    assert "f1" not in report
    assert report["throughput"]["documents_per_second"] == pytest.approx(5)
    assert any("no gold" in line for line in report["warnings"])


def test_parts_that_measured_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(["a"], ["O"], ["O"])])
    write_part(run, 0, 0, [Doc(["a"], ["O"], ["O"])], stats=[])
    report = evaluate(run)
    assert report["throughput"]["documents_per_second"] == 0.0
    assert report["accuracy"] == 1.0


def test_a_part_of_several_shards_counts_them_all(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(["a"], ["O"], ["O"])])
    write_part(run, 0, 0, [Doc(["a"], ["O"], ["O"])], stats=[stats_of(0, 40), stats_of(1, 60)])
    throughput = evaluate(run)["throughput"]
    assert (throughput["shards"], throughput["documents"], throughput["seconds"]) == (2, 100, 2.0)
