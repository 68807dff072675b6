"""Histogram of the lengths of documents in tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from nermill.worker.evaluation.chunks import Ints

TOKEN_EDGES = np.array([0, 1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192])


@dataclass
class Lengths:
    """A histogram of the documents' lengths in tokens; its bins are TOKEN_EDGES."""

    _documents: Ints = field(default_factory=lambda: np.zeros(len(TOKEN_EDGES), np.int64))
    _tokens: int = 0
    _longest: int = 0

    def add(self, rows: pa.RecordBatch) -> None:
        """Adds a block's documents, those without gold tags included."""
        tokens = rows["n_tokens"].to_numpy()
        self._documents += np.bincount(
            np.searchsorted(TOKEN_EDGES, tokens, side="right") - 1, minlength=len(TOKEN_EDGES)
        )
        self._tokens += int(tokens.sum(dtype=np.int64))
        self._longest = max(self._longest, int(tokens.max(initial=0)))

    def summary(self) -> dict[str, Any]:
        """The histogram with the report's names; bins without documents are left out."""
        upper = [*(TOKEN_EDGES[1:] - 1).tolist(), None]
        documents = int(self._documents.sum())
        return {
            "mean_tokens": self._tokens / documents if documents else 0.0,
            "max_tokens": self._longest,
            "histogram": [
                {"tokens_from": int(low), "tokens_to": high, "documents": n}
                for low, high, n in zip(TOKEN_EDGES.tolist(), upper, self._documents.tolist(), strict=True)
                if n
            ],
        }
