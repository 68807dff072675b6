"""Evaluates a run: scores against gold tags, and throughput from the workers' measurements."""

from __future__ import annotations

from nermill.worker.evaluation.evaluation import GoldOptions, evaluate
from nermill.worker.evaluation.report import write_report
from nermill.worker.evaluation.thresholds import below_thresholds

__all__ = ["GoldOptions", "below_thresholds", "evaluate", "write_report"]
