"""A Celery task that does nothing, to know what a queue costs; ``BENCH_BROKER`` is a socket."""

from __future__ import annotations

import os

from celery import Celery

SOCKET = f"redis+socket://{os.environ['BENCH_BROKER']}"
app = Celery("echo", broker=SOCKET, backend=SOCKET)
app.conf.task_default_queue = "echo"


@app.task  # type: ignore[untyped-decorator]
def echo() -> None:
    """Answers."""
