"""An artifact's golden answers: texts, what the original model said of them, and how far an engine is from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import GOLDEN_FILE, Manifest
from nermill.worker.engine import Batch

if TYPE_CHECKING:
    from nermill.worker.engine import Engine

Ids = Sequence[int]


@dataclass(frozen=True)
class Golden:
    """Windows and the logits of the eager float32 checkpoint.

    Attributes:
        texts: What was tokenized.
        windows: Token ids of each text, special tokens included.
        logits: float32, (tokens, labels) for each window.
    """

    texts: tuple[str, ...]
    windows: tuple[tuple[int, ...], ...]
    logits: tuple[NDArray[np.float32], ...]

    def write(self, folder: Path) -> None:
        """Writes ``golden.json`` into the artifact's folder."""
        logits = [[[round(value, 6) for value in token] for token in window.tolist()] for window in self.logits]
        body = {"texts": self.texts, "windows": self.windows, "logits": logits}
        (folder / GOLDEN_FILE).write_text(json.dumps(body, ensure_ascii=False) + "\n", "utf-8")


def load_golden(folder: Path) -> Golden:
    """Reads an artifact's golden answers.

    Raises:
        ArtifactError: they are not there, or not readable.
    """
    path = folder / GOLDEN_FILE
    try:
        body = json.loads(path.read_text("utf-8"))
        logits = tuple(np.array(window, np.float32) for window in body["logits"])
        return Golden(tuple(body["texts"]), tuple(map(tuple, body["windows"])), logits)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); build the artifact again") from None


def golden_difference(engine: Engine, golden: Golden) -> float:
    """Largest absolute difference of a golden logit, every window computed on its own; NaN counts as infinite."""
    pairs = zip(run_alone(engine, golden.windows), golden.logits, strict=True)
    worst = max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs)
    return worst if np.isfinite(worst) else float("inf")


def run_alone(engine: Engine, windows: Sequence[Ids]) -> list[NDArray[np.float32]]:
    """Logits of each window, computed with nothing beside it: (tokens, labels) each."""
    return [
        engine.run(lay_rows([[ids]], smallest_shape(len(ids), engine.manifest), engine.manifest))[0, : len(ids)]
        for ids in windows
    ]


def smallest_shape(length: int, manifest: Manifest) -> tuple[int, int]:
    """The smallest shape that takes a window of ``length`` tokens."""
    if not manifest.shapes:
        return 1, length
    fitting = [shape for shape in manifest.shapes if shape[1] >= length]
    if not fitting:
        raise ArtifactError(f"{manifest.name}: no compiled shape takes {length} tokens")
    return min(fitting, key=lambda shape: (shape[0] * shape[1], shape[1]))


def lay_rows(rows: Sequence[Sequence[Ids]], shape: tuple[int, int], manifest: Manifest) -> Batch:
    """A batch in which each row holds its windows one behind another; rows that are missing stay empty."""
    input_ids = np.full(shape, manifest.pad_id, np.int64)
    segments = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    for row, windows in enumerate(rows):
        at = 0
        for number, ids in enumerate(windows, 1):
            stretch = slice(at, at + len(ids))
            input_ids[row, stretch] = ids
            segments[row, stretch] = number
            positions[row, stretch] = np.arange(len(ids)) + manifest.position_offset
            at += len(ids)
    return Batch(input_ids, segments, positions)
