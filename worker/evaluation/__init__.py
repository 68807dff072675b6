"""What a run is worth: scores that can be believed, and throughput from what its workers measured."""

from __future__ import annotations

from nermill.worker.evaluation.evaluation import GoldOptions, evaluate
from nermill.worker.evaluation.floors import below_floors
from nermill.worker.evaluation.report import write_report

__all__ = ["GoldOptions", "below_floors", "evaluate", "write_report"]
