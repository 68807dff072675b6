"""Ends the process, so that its supervisor starts a new one: a device that hangs or broke, or several defects."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from nermill.worker.process.metrics import Metrics
from nermill.worker.tagging.pipeline import Pipeline

log = logging.getLogger("nermill.worker")

MAX_DEFECTS = 3  # errors that are no fault of a store, device or ledger, before the process ends
EXIT_AGAIN = 75  # sysexits' EX_TEMPFAIL: start me again


class Watchdog:
    """Decides when the process ends itself.

    Args:
        pipeline: Knows how its device does.
        hang_seconds: Longest time of one call of the engine.
        metrics: Where defects are counted.
    """

    def __init__(self, pipeline: Pipeline, hang_seconds: float, metrics: Metrics) -> None:
        self._pipeline = pipeline
        self._hang_seconds = hang_seconds
        self._metrics = metrics
        self._defects = 0

    def note_defect(self) -> None:
        """Counts an error that is no fault of a store, a device or the ledger; several end the process."""
        self._metrics.defect()
        self._defects += 1
        if self._defects >= MAX_DEFECTS:
            log.critical("%d unexpected errors; this process ends and is started again", self._defects, exc_info=True)
            os._exit(EXIT_AGAIN)

    def problem(self) -> str | None:
        """What is wrong with this process, for its health check; a busy device is not wrong."""
        if self._pipeline.broken:
            return str(self._pipeline.broken)
        hung = self._pipeline.clock.call_seconds()
        if hung > self._hang_seconds:
            return f"the device has not answered for {hung:.0f} s"
        return None

    def watch(self, stop: threading.Event, release: Callable[[], object]) -> None:
        """Ends the process when the device hangs or broke; returns when ``stop`` is set.

        Args:
            stop: Set when the process ends by itself.
            release: Gives back what the process holds.
        """
        while not stop.wait(1.0):
            if problem := self.problem():
                log.critical("%s; this process ends and is started again", problem)
                if self._pipeline.broken:  # a document that hangs the device must not go free: its attempt counts
                    release()
                os._exit(EXIT_AGAIN)
