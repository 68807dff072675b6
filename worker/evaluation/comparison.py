"""Compares two runs over the same documents, document by document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nermill.worker.contracts.errors import UsageError
from nermill.worker.evaluation.blocks import Parts
from nermill.worker.evaluation.chunks import Bools, find_chunks, find_correct
from nermill.worker.evaluation.scores import Histogram, f1_of, interval
from nermill.worker.evaluation.throughput import measure_throughput

_EXAMPLES = 20


@dataclass
class Comparison:
    """Reads two runs in parallel and counts their differences.

    Args:
        this, other: Parts of the runs; both use the same ``LabelIndex``.

    Attributes:
        documents: Documents compared.
        different: Documents with other tags, entities or status.
        examples: Ids of the first of them.
        scored: Documents with gold tags.
    """

    this: Parts
    other: Parts
    documents: int = 0
    different: int = 0
    examples: list[str] = field(default_factory=list)
    scored: int = 0
    _counts: Histogram = field(default_factory=Histogram)

    def run(self) -> dict[str, Any]:
        """Reads both runs and returns the difference: the other run's values minus this run's.

        Raises:
            UsageError: the runs do not hold the same documents, or a part is damaged.
        """
        for mine, theirs in self._side_by_side():
            self._add(mine, theirs)
        return {
            "documents": self.documents,
            "documents_with_other_tags": self.different,
            "share_with_other_tags": self.different / self.documents if self.documents else 0.0,
            "first_with_other_tags": self.examples,
            **(self._f1() if self.scored else {}),
            "throughput": self._throughput(),
        }

    def _side_by_side(self) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
        """Rows of both runs in pieces of equal length; the runs' parts may have different lengths."""
        left, right = self.this.rows(), self.other.rows()
        mine, theirs = next(left, None), next(right, None)
        while mine is not None and theirs is not None:
            count = min(len(mine), len(theirs))
            yield mine[:count], theirs[:count]
            mine = mine[count:] if len(mine) > count else next(left, None)
            theirs = theirs[count:] if len(theirs) > count else next(right, None)
        if mine is not None or theirs is not None:
            longer = self.this if mine is not None else self.other
            raise UsageError(f"{longer.run.uri}: it has more documents than the run it is compared with")

    def _add(self, mine: pa.RecordBatch, theirs: pa.RecordBatch) -> None:
        for name in ("doc_index", "doc_id"):
            same = pc.equal(mine[name], theirs[name])
            if (at := pc.index(same, False).as_py()) >= 0:
                raise UsageError(
                    f"{self.other.run.uri}: it has {theirs['doc_id'][at].as_py()!r} where {self.this.run.uri} has"
                    f" {mine['doc_id'][at].as_py()!r}; only runs over the same input can be compared"
                )
        self.documents += len(mine)
        other_tags = _find_different(mine, theirs)
        self.different += int(other_tags.sum())
        rows = np.flatnonzero(other_tags)[: _EXAMPLES - len(self.examples)]
        self.examples += map(str, mine["doc_id"].take(rows).to_pylist())
        self._score(mine, theirs)

    def _score(self, mine: pa.RecordBatch, theirs: pa.RecordBatch) -> None:
        gold = self.this.take_gold(mine)
        blocks = self.this.block(mine, gold), self.other.block(theirs, gold)
        documents = len(blocks[0].scored)
        if not documents:
            return
        true = find_chunks(blocks[0].gold)
        columns = [np.bincount(true.document, minlength=documents)]
        for block in blocks:
            predicted = find_chunks(block.predicted)
            hits = predicted.document[find_correct(true, predicted)]
            columns += [np.bincount(some, minlength=documents) for some in (predicted.document, hits)]
        self._counts.add(*columns)
        self.scored += documents

    def _f1(self) -> dict[str, Any]:
        sums = np.array([np.multiply(counts, n) for counts, n in self._counts.documents.items()]).sum(0)[None]
        resampled = self._counts.resample(5)
        (this,), (other,) = f1_of(*sums[:, [0, 1, 2]].T), f1_of(*sums[:, [0, 3, 4]].T)
        difference = f1_of(*resampled[:, [0, 3, 4]].T) - f1_of(*resampled[:, [0, 1, 2]].T)
        return {
            "f1": {
                "this": float(this),
                "other": float(other),
                "difference": float(other - this),
                "difference_interval": interval(difference),
            }
        }

    def _throughput(self) -> dict[str, float]:
        this, other = (
            measure_throughput([entry for part in parts.seen for entry in part.stats])["documents_per_second"]
            for parts in (self.this, self.other)
        )
        return {"this": this, "other": other, "ratio": other / this if this else 0.0}


def _find_different(mine: pa.RecordBatch, theirs: pa.RecordBatch) -> Bools:
    """Which documents have other tags, other entities (apart from scores) or another status; bool, shape (rows,)."""
    different: Bools = np.asarray(pc.not_equal(mine["status"], theirs["status"]).to_numpy(zero_copy_only=False))
    for name in ("tags", "entities"):
        a, b = mine[name], theirs[name]
        lengths, others = (pc.list_value_length(c).fill_null(-1).to_numpy(zero_copy_only=False) for c in (a, b))
        equal = lengths == others
        different |= ~equal
        document = np.repeat(np.flatnonzero(equal), np.maximum(lengths[equal], 0))
        flat: list[Any] = [pc.list_flatten(c.filter(pa.array(equal))) for c in (a, b)]
        pairs = [flat] if name == "tags" else [[f.field(key) for f in flat] for key in ("start", "end", "label")]
        for left, right in pairs:
            different[document[pc.not_equal(left, right).to_numpy(zero_copy_only=False)]] = True
    return different
