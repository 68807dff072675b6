"""systemd's notification protocol: datagrams to a unix socket that say ready, alive, stopping."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress


class Notifier:
    """Speaks to whoever started us as a service of type ``notify``; to nobody where there is none.

    Args:
        environ: ``NOTIFY_SOCKET``, and ``WATCHDOG_USEC`` with ``WATCHDOG_PID`` where the unit has ``WatchdogSec=``.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval = int(environ.get("WATCHDOG_USEC", "0")) / 2e6 if is_ours else 0.0
        self._due = 0.0

    def notify(self, state: str) -> None:
        """Sends a state such as ``READY=1``; a socket that is gone is no reason to stop."""
        if self._address:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(state.encode(), self._address)

    def feed_watchdog(self) -> None:
        """Feeds the watchdog, twice as often as it wants; call it while all is well."""
        if self._interval and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._interval
            self.notify("WATCHDOG=1")
