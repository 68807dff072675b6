"""A pipe from a worker process to its supervisor: one byte a second says that the process runs and is well."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

VARIABLE = "NERMILL_HEARTBEAT_FD"
HEARTBEAT_SECONDS = 1.0


class Heartbeat:
    """The supervisor's end.

    Attributes:
        writer: File descriptor for the process, which finds its number in VARIABLE.
        received: Whether there was ever a beat.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self.writer, False)
        self.received = False
        self._last = time.monotonic()

    def close_writer(self) -> None:
        """The process has its end: ours is closed."""
        os.close(self.writer)

    def silent_seconds(self) -> float:
        """Since the last beat, or since the start before the first."""
        with suppress(BlockingIOError):
            if os.read(self._reader, 4096):
                self.received = True
                self._last = time.monotonic()
        return time.monotonic() - self._last

    def close(self) -> None:
        """The process has ended."""
        os.close(self._reader)


def send_heartbeats(environ: Mapping[str, str], problem: Callable[[], str | None], stop: threading.Event) -> None:
    """The process's end: beats while there is no problem, until ``stop`` or until nobody listens."""
    if VARIABLE not in environ:
        return
    with suppress(BrokenPipeError), open(int(environ[VARIABLE]), "wb", buffering=0) as pipe:
        while True:
            if not problem():
                pipe.write(b".")  # writes nothing where the pipe is full
            if stop.wait(HEARTBEAT_SECONDS):
                return
