"""How a worker process reports that it is healthy: heartbeats to its supervisor, notifications to systemd.

A worker process writes one byte a second into a pipe, ``send_heartbeats``; its supervisor reads the other end,
``Heartbeat``, and reports to systemd, ``Notifier``.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

VARIABLE = "NERMILL_HEARTBEAT_FD"
HEARTBEAT_SECONDS = 1.0


class Heartbeat:
    """The supervisor's end of the pipe.

    Attributes:
        writer: File descriptor for the process; its number goes into the process's variable VARIABLE.
        received: Whether any heartbeat has been received.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self.writer, False)
        self.received = False
        self._last = time.monotonic()

    def close_writer(self) -> None:
        """Closes the supervisor's copy of ``writer``; call it once the process has been started."""
        os.close(self.writer)

    def silent_seconds(self) -> float:
        """Seconds since the last heartbeat, or since this object was made where there was none."""
        with suppress(BlockingIOError):
            if os.read(self._reader, 4096):
                self.received = True
                self._last = time.monotonic()
        return time.monotonic() - self._last

    def close(self) -> None:
        """Closes the reading end; call it once the process has ended."""
        os.close(self._reader)


def send_heartbeats(environ: Mapping[str, str], problem: Callable[[], str | None], stop: threading.Event) -> None:
    """Sends heartbeats from a worker process while it is healthy; returns at once where it has no supervisor.

    Args:
        environ: VARIABLE holds the number of the file descriptor.
        problem: Returns what is wrong with the process, or None; while it returns a text, no heartbeat is sent.
        stop: Ends the loop when it is set. The loop ends as well when the supervisor has closed the pipe.
    """
    if VARIABLE not in environ:
        return
    with suppress(BrokenPipeError), open(int(environ[VARIABLE]), "wb", buffering=0) as pipe:
        while True:
            if not problem():
                pipe.write(b".")  # writes nothing where the pipe is full
            if stop.wait(HEARTBEAT_SECONDS):
                return


class Notifier:
    """Sends state notifications to systemd over its Unix datagram socket; does nothing outside a ``notify`` service.

    Args:
        environ: ``NOTIFY_SOCKET``, and ``WATCHDOG_USEC`` with ``WATCHDOG_PID`` where the unit has ``WatchdogSec=``; see
            sd_notify(3).
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval = int(environ.get("WATCHDOG_USEC", "0")) / 2e6 if is_ours else 0.0
        self._due = 0.0

    def notify(self, state: str) -> None:
        """Sends a state such as ``READY=1``; a socket that does not exist any more is ignored."""
        if self._address:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(state.encode(), self._address)

    def feed_watchdog(self) -> None:
        """Sends ``WATCHDOG=1``, at most twice in each watchdog interval; call it repeatedly while all is well."""
        if self._interval and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._interval
            self.notify("WATCHDOG=1")
