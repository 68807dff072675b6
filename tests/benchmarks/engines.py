"""Engines without a model, so that everything but the accelerator is measured: a simulation, and never a result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch

ANSWERS = 1 << 16  # tokens of answers kept ready
BATCH_TOKENS = 1024  # of a batch in packed rows
ENTITY_TOKENS = 0.17  # share of CoNLL-2003's words that are inside an entity

Pace = Callable[[Batch], float]


def as_of_a_device(manifest: Manifest) -> Manifest:
    """The manifest as if the model had been compiled for an accelerator: packed rows, and batches that fill it."""
    return replace(manifest, layout="packed", token_budget=BATCH_TOKENS)


class NullEngine:
    """Answers at once, with as many entities as news text has; see ``nermill.worker.engine.Engine``."""

    device = "cpu"
    at_once = 1
    in_flight = 2

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        numbers = np.random.default_rng(0)
        self._answers = numbers.random((ANSWERS, len(manifest.labels)), np.float32)
        self._answers[numbers.random(ANSWERS) > ENTITY_TOKENS, 0] = 5.0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels) that mean nothing."""
        rows, length = batch.input_ids.shape
        return np.resize(self._answers[: rows * length], (rows, length, self._answers.shape[1]))

    def close(self) -> None:
        """There is nothing to give back."""


class PacedEngine(NullEngine):
    """Answers after as long as a device would take, which begins a batch when it is there and the last one is done.

    Args:
        manifest: What the device was compiled for.
        pace: Seconds that a batch takes.
        account: File that holds the seconds of all batches so far, which is what the device was busy for.
    """

    def __init__(self, manifest: Manifest, pace: Pace, account: Path | None = None) -> None:
        super().__init__(manifest)
        self._account = account
        self._busy = 0.0
        self._pace = pace
        self._queue = threading.Lock()
        self._free_at = 0.0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels) that mean nothing, when the device would have them."""
        with self._queue:
            seconds = self._pace(batch)
            self._free_at = max(time.monotonic(), self._free_at) + seconds
            done = self._free_at
            self._busy += seconds
            if self._account is not None:
                self._account.write_text(repr(self._busy), "utf-8")
        time.sleep(max(0.0, done - time.monotonic()))
        return super().run(batch)


def windows_per_second(rate: float) -> Pace:
    """A device that takes ``rate`` windows a second, whatever their shape."""
    return lambda batch: float(batch.segments.max(axis=1).sum()) / rate


def by_shape(seconds: Mapping[tuple[int, int], float]) -> Pace:
    """A device that takes each shape's own time."""
    return lambda batch: seconds[batch.input_ids.shape[0], batch.input_ids.shape[1]]
