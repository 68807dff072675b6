"""Batches that mean nothing: they warm a device up, and tell how large a batch it wants."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch

if TYPE_CHECKING:
    from nermill.worker.engine import Engine

MOST_TOKENS = 1 << 14  # of a batch: its attention bias, in rows of 512, takes 67 MB
GAIN = 1.1  # times the tokens a second that a batch of twice the size must give
REPEATS = 3


def blank_batch(shape: tuple[int, int], manifest: Manifest) -> Batch:
    """A batch of (rows, length): each row is one full window of [CLS] tokens."""
    positions = np.arange(shape[1], dtype=np.int64) + manifest.position_offset
    return Batch(np.full(shape, manifest.cls_id, np.int64), np.ones(shape, np.int64), np.tile(positions, (shape[0], 1)))


def token_budget(engine: Engine) -> int:
    """Tokens of the smallest batch with which a device is busy, in the longest rows, which want most memory.

    A CPU takes the artifact's word. An accelerator whose shapes are free is given batches of twice the size again
    and again, until that is hardly faster or the device refuses. Measured on simulated devices alone so far.

    Raises:
        EngineError: the device does not take a batch of the artifact's own budget.
    """
    manifest = engine.manifest
    budget = manifest.token_budget
    if engine.device == "cpu" or manifest.shapes:
        return budget
    speed = _tokens_per_second(engine, budget)
    while 2 * budget <= MOST_TOKENS:
        try:
            faster = _tokens_per_second(engine, 2 * budget)
        except EngineError:  # no memory left for it, and each call under way wants its own
            return max(manifest.token_budget, budget // engine.in_flight)
        if faster < GAIN * speed:
            break
        budget, speed = 2 * budget, faster
    return budget


def _tokens_per_second(engine: Engine, tokens: int) -> float:
    length = min(tokens, engine.manifest.max_length)
    batch = blank_batch((tokens // length, length), engine.manifest)
    engine.run(batch)
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        engine.run(batch)
        taken.append(time.perf_counter() - begun)
    return batch.input_ids.size / min(taken)
