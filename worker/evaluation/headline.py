"""seqeval's own scores: the headline figures of a report, which our streaming counts must equal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from nermill.worker.contracts.errors import EvaluationError
from nermill.worker.evaluation.blocks import Block
from nermill.worker.evaluation.chunks import B, LabelIndex, O, Tags

SENTENCES = 20_000  # scored by seqeval unless all are asked for; 3,453 are in CoNLL-2003 test
# The same for long documents. seqeval took 4.3 s for 5,000 sentences of 20 words, in both modes together, on one core
# of an AMD EPYC: about 45 s a million words.
WORDS = 400_000
TOLERANCE = 1e-9
_NAMES = {"f1": "f1-score", "precision": "precision", "recall": "recall"}


class Headline:
    """Collects the tags that seqeval scores, and puts its figures into a report.

    Args:
        labels: The labels' numbers.
        unlimited: Whether seqeval scores all documents, whatever time and memory that takes (about 16 bytes a word).
    """

    def __init__(self, labels: LabelIndex, *, unlimited: bool = False) -> None:
        self._labels = labels
        self._unlimited = unlimited
        self._is_over_limit = False
        self._words = 0
        self._gold: list[list[str]] = []
        self._predicted: list[list[str]] = []

    def add(self, block: Block) -> None:
        """Takes in a block's scored documents; all are given up once there are more than seqeval shall score."""
        self._words += len(block.gold.prefix)
        documents = len(self._gold) + len(block.scored)
        if not self._unlimited and (self._is_over_limit or documents > SENTENCES or self._words > WORDS):
            self._is_over_limit = True
            self._gold, self._predicted = [], []
            return
        self._gold += _tag_lists(block.gold)
        self._predicted += _tag_lists(block.predicted)

    def apply(self, scores: dict[str, Any]) -> dict[str, Any]:
        """The scores with seqeval's figures in the place of ours, and ``headline``, which says whose they are.

        Args:
            scores: What ``ChunkCounts.scores`` returned.

        Raises:
            EvaluationError: a figure of ours differs from seqeval's by more than ``TOLERANCE``.
        """
        if self._is_over_limit:
            reason = f"more than {SENTENCES:,} documents or {WORDS:,} words; score them with --seqeval"
            return {**scores, "headline": {"by": "nermill", "reason": reason}}
        if not self._words:
            return {**scores, "headline": {"by": "nermill", "reason": "no words"}}
        theirs = self._score()
        worst = 0.0
        for name, ours, figure in _pairs(scores, theirs):
            if not abs(ours - figure) <= TOLERANCE:
                raise EvaluationError(
                    f"seqeval's {name} is {figure!r}, nermill's counts give {ours!r}: one of the two is wrong, and no "
                    "report is written; please report it with the run's parts"
                )
            worst = max(worst, abs(ours - figure))
        headline = {"by": "seqeval", "version": version("seqeval"), "largest_difference": worst}
        return {**_merged(scores, theirs), "headline": headline}

    def _score(self) -> dict[str, Any]:
        """seqeval's scores in our names, conlleval mode and strict IOB2."""
        from seqeval import metrics
        from seqeval.scheme import IOB2

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of labels that nothing predicts, and of means over no label
            modes: list[dict[str, Any]] = [{}, {"mode": "strict", "scheme": IOB2}]
            conlleval, strict = (
                self._named(
                    metrics.classification_report(
                        self._gold, self._predicted, output_dict=True, zero_division=0, **mode
                    )
                )
                for mode in modes
            )
            accuracy = float(metrics.accuracy_score(self._gold, self._predicted))
        return {**conlleval, "accuracy": accuracy, "strict": strict}

    def _named(self, report: dict[str, Any]) -> dict[str, Any]:
        rows = {name: {ours: float(row[theirs]) for ours, theirs in _NAMES.items()} for name, row in report.items()}
        per_label = {self._labels.names[int(name)]: row for name, row in rows.items() if name.isdecimal()}
        return {**rows["micro avg"], "per_label": per_label}


def _tag_lists(tags: Tags) -> list[list[str]]:
    """The documents' tags as seqeval reads them; labels by number, since it strips dashes from names."""
    label = np.where(tags.prefix == O, 0, tags.label)
    code = np.where(tags.prefix == O, 0, 1 + 2 * label + (tags.prefix != B))
    kinds, at = np.unique(code, return_inverse=True)
    names = ["O" if kind == 0 else f"{'BI'[(kind - 1) % 2]}-{(kind - 1) // 2}" for kind in kinds.tolist()]
    flat = [names[n] for n in at.tolist()]
    offsets = tags.offsets.tolist()
    return [flat[start:end] for start, end in pairwise(offsets)]


def _pairs(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, float, float]]:
    """Each figure of seqeval's beside ours, by name; a label that one of the two lacks has no figure there."""
    if not isinstance(theirs, dict):
        yield name, ours, theirs
        return
    keys = theirs.keys() | ours.keys() if name.endswith("per_label") else theirs.keys()
    nothing = dict.fromkeys(_NAMES, float("nan"))
    for key in sorted(keys):
        yield from _pairs(ours.get(key, nothing), theirs.get(key, nothing), f"{name} {key}".strip())


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _merged(value, theirs[name]) if isinstance(value, dict) and name in theirs else theirs.get(name, value)
        for name, value in ours.items()
    }
