"""Calls with a deadline: a store that does not answer must not block a worker's thread for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

SECONDS = 120.0  # longer than the retries of a store's client usually take
MAX_HUNG = 64  # most calls under way at once; further callers wait for one to end

T = TypeVar("T")

_slots = threading.BoundedSemaphore(MAX_HUNG)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Runs a call in a thread and returns its result; a call that is late goes on, and its result is dropped.

    Raises:
        TimeoutError: the call did not end within ``seconds``.
        Exception: whatever the call raises.
    """
    if not _slots.acquire(timeout=seconds):
        raise TimeoutError(f"{MAX_HUNG} calls before this one have not been answered")
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        finally:
            _slots.release()

    threading.Thread(target=work, name="store", daemon=True).start()
    try:
        return future.result(seconds)
    except FutureTimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
