"""The threads that call the engine, and those that prepare its batches and distribute its logits.

Python runs one thread at a time. A thread that distributed the logits of its call itself would keep the next call from
beginning, so the threads that call the engine take a batch that is prepared, and leave its logits to other threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch, Engine
from nermill.worker.engine.warmup import blank_batch
from nermill.worker.tagging.clock import DeviceClock
from nermill.worker.tagging.pool import Pool, Work, build_batch, distribute_logits, mark_failed, split_work

WARM_ROWS = 1  # rows of the batch that warms an engine whose shapes are free

Computed = tuple[Work, NDArray[np.float32], float]  # a batch, its logits, the device's seconds


class Compute:
    """Runs an engine on the windows of a pool.

    Args:
        engine: The model; closed with this.
        pool: The windows that wait.
        manifest: Shapes, layout and token budget of batches.

    Attributes:
        broken: Set when the device failed for good; nothing is computed from then on.
        clock: Measures the calls of the engine.
    """

    def __init__(self, engine: Engine, pool: Pool, manifest: Manifest) -> None:
        self._engine = engine
        self.clock = DeviceClock()
        self.broken: EngineError | None = None
        self._pool = pool
        self._manifest = manifest
        self._prepared: SimpleQueue[tuple[Work, Batch] | None] = SimpleQueue()
        self._computed: SimpleQueue[Computed | None] = SimpleQueue()
        # each of these has one batch at most, so one more is prepared than calls may be under way
        self._serving = [_started(self._serve, f"batches-{n}") for n in range(engine.in_flight + 1)]
        self._calling = [_started(self._call_engine, f"compute-{n}") for n in range(engine.in_flight)]

    def close(self) -> None:
        """Stops the threads and releases the device; jobs that are not done end with an EngineError."""
        self._pool.close()
        for thread in self._serving:
            thread.join()
        for _ in self._calling:
            self._prepared.put(None)
        for thread in self._calling:
            thread.join()
        self._engine.close()

    def warm_up(self) -> None:
        """Runs every compiled shape twice: once to load kernels, once to measure its time.

        Raises:
            EngineError: the device refuses a shape.
        """
        for shape in self._manifest.shapes or ((WARM_ROWS, min(64, self._manifest.window)),):
            batch = blank_batch(shape, self._manifest)
            for _ in range(2):
                _, seconds = self._call(batch)
            self._pool.record_duration(shape, shape[0] * shape[1], seconds / self._engine.at_once)

    def _serve(self) -> None:
        """Body of a thread that prepares a batch and distributes the logits of whichever is computed next."""
        try:
            while self._prepare():
                self._distribute()
        except BaseException as error:
            self._fail(EngineError(f"{type(error).__name__}: {error}"))

    # What one round of a loop holds ends with its method: a thread that waits keeps no job's logits in memory.

    def _prepare(self) -> bool:
        """Prepares a batch; False where the pool is closed."""
        work = self._pool.take()
        if work is not None:
            self._prepared.put((work, build_batch(work, self._manifest)))
        return work is not None

    def _distribute(self) -> None:
        """Waits for a batch that is computed, and distributes its logits."""
        if computed := self._computed.get():
            work, logits, seconds = computed
            distribute_logits(work, logits, seconds)
            self._pool.record_duration(logits.shape[:2], work.placement.tokens, seconds)
        self._pool.finished()

    def _call_engine(self) -> None:
        """Body of a thread that calls the engine, until there is None in the place of a batch."""
        while self._call_next():
            pass

    def _call_next(self) -> bool:
        """Computes the next prepared batch; each has one answer in ``_computed``, whatever happens."""
        prepared = self._prepared.get()
        if prepared is not None:
            self._computed.put(None if self.broken else self._run(*prepared))
        return prepared is not None

    def _call(self, batch: Batch) -> tuple[NDArray[np.float32], float]:
        """Logits of a batch, and the seconds of the device."""
        return self.clock.measure(lambda: self._engine.run(batch))

    def _run(self, work: Work, batch: Batch) -> Computed | None:
        """Runs a batch; None where it failed, and was run again in parts or ended its jobs."""
        try:
            try:
                return (work, *self._call(batch))
            except EngineError as error:
                self._retry_in_halves(work, error)
        except BaseException as error:  # what is no Exception too: somebody waits for the answer
            self._fail(EngineError(f"{type(error).__name__}: {error}"))
        return None

    def _retry_in_halves(self, work: Work, error: EngineError) -> None:
        """Runs a failed batch again, and what fails again in halves, down to single windows.

        So a document on which the model fails costs that document alone, and a batch that was only too large for the
        device's memory costs none. Where the device fails on blank batches too, it is taken to be broken.
        """
        try:
            self.warm_up()
        except EngineError:
            self._fail(error)
            return
        pending = [work]
        while pending:
            part = pending.pop()
            batch = build_batch(part, self._manifest)
            try:
                distribute_logits(part, *self._call(batch))
            except EngineError as reason:
                if len(part.windows) > 1:
                    pending += split_work(part, self._manifest)
                else:
                    mark_failed(part, str(reason))

    def _fail(self, error: EngineError) -> None:
        self.broken = error
        self._pool.close(error)


def _started(body: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    return thread
