"""How long the calls of an engine take, and how long the device computes, while several calls may be under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class DeviceClock:
    """Measures the calls of one engine, at most one a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[int, float] = {}  # by thread; times are those of time.monotonic()
        self._last_end = 0.0
        self._busy = 0.0  # seconds until _counted
        self._counted = 0.0

    def measure(self, call: Callable[[], T]) -> tuple[T, float]:
        """Makes a call of the engine.

        Returns:
            Its result, and the seconds that the device spent on it: not those in which it computed an earlier call.
        """
        me = threading.get_ident()
        with self._lock:
            self._begun[me] = self._count()
        try:
            result = call()
        finally:
            with self._lock:
                now = self._count()
                seconds = now - max(self._begun.pop(me), self._last_end)
                self._last_end = now
        return result, seconds

    def busy_seconds(self) -> float:
        """Seconds until now in which at least one call was under way."""
        with self._lock:
            self._count()
            return self._busy

    def call_seconds(self) -> float:
        """Seconds for which the oldest call has been under way; 0.0 where there is none."""
        with self._lock:
            return time.monotonic() - min(self._begun.values()) if self._begun else 0.0

    def _count(self) -> float:
        now = time.monotonic()
        if self._begun:
            self._busy += now - self._counted
        self._counted = now
        return now
