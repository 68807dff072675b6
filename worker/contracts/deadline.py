"""Calls that may hang, with a deadline: a store that stays silent must not hold a worker's thread for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

SECONDS = 120.0  # longer than any store's own retries usually take
MAX_HUNG = 64  # calls under way at once; beyond that, callers wait for one to come back

T = TypeVar("T")

_slots = threading.BoundedSemaphore(MAX_HUNG)


def within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, if it comes in time; a call that is late goes on alone and its result is dropped.

    Raises:
        TimeoutError: it did not come within ``seconds``.
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
