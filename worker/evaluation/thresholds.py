"""Thresholds for continuous integration: the values that a run must reach."""

from __future__ import annotations

from typing import Any

from nermill.worker.contracts.errors import UsageError


def below_thresholds(
    report: dict[str, Any],
    *,
    f1: float | None = None,
    accuracy: float | None = None,
    documents_per_second: float | None = None,
) -> list[str]:
    """The thresholds that a report does not reach, one line each; empty where it reaches all.

    Args:
        report: What ``evaluate`` returned.
        f1: Lowest accepted conlleval F1, micro, in [0, 1]; None for no threshold.
        accuracy: Lowest accepted word accuracy, in [0, 1].
        documents_per_second: Lowest accepted throughput.

    Raises:
        UsageError: there is a threshold for a score, and the run has no gold tags.
    """
    thresholds = {"f1": f1, "accuracy": accuracy}
    for name, threshold in thresholds.items():
        if threshold is not None and name not in report:
            raise UsageError(
                f"{report['run']}: no gold tags, so no {name} to hold against a threshold; add --gold FILE"
            )
    reached = {
        "f1": report.get("f1", 0.0),
        "accuracy": report.get("accuracy", 0.0),
        "documents per second": report["throughput"]["documents_per_second"],
    }
    asked = {**thresholds, "documents per second": documents_per_second}
    return [
        f"{name} {reached[name]:.6g} is below the threshold of {threshold:.6g}"
        for name, threshold in asked.items()
        if threshold is not None and reached[name] < threshold
    ]
