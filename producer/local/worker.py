"""A broker and a worker on this machine, for the time of one run."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from nermill.producer.runs.queue import Queue
from nermill.worker.contracts.command import python_command, start_child
from nermill.worker.contracts.errors import EngineError, UsageError

STOP_SECONDS = 35.0  # longer than the grace period of a worker
START_ATTEMPTS = 2  # a run fails when a worker process has ended so often before it was ready
_LOG_LINES = 12
_BLOCK = 1 << 16
_ERROR_PREFIX = "nermill-worker: "  # of the worker's own error lines, among those of libraries


class LocalWorker:
    """``nermill-worker`` as a child process; it ends with this process, and its log is shown if it fails.

    Args:
        model: Artifact, by name or path.
        devices: Value of ``--devices``.
        broker: Broker URL.
        root: The allowed root.
    """

    def __init__(self, model: str, devices: str, broker: str, root: str) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop
        self._process = start_child(
            python_command("nermill.worker.process.launch", "--model", model, "--devices", devices, "--broker", broker),
            env={
                **os.environ,
                "NERMILL_ALLOWED_ROOTS": root,
                "NERMILL_LOG_FORMAT": "text",
                "NERMILL_START_ATTEMPTS": str(START_ATTEMPTS),
            },
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops it
        )

    def check(self) -> None:
        """Checks that the worker is running.

        Raises:
            UsageError: it refused its settings.
            EngineError: it ended, or its processes end before they are ready. The message is the worker's last error
                line, or the last lines of its log where there is none.
        """
        status = self._process.poll()
        if status is None:
            return
        lines = self._last_lines()
        if status == UsageError.exit_code and lines:
            raise UsageError(lines[-1].removeprefix(_ERROR_PREFIX))
        if own := [line for line in lines if line.startswith(_ERROR_PREFIX)]:
            raise EngineError(f"the worker failed: {own[-1].removeprefix(_ERROR_PREFIX)}")
        end = "\n".join(f"  | {line}" for line in lines)
        raise EngineError(f"the worker failed; the end of its log:\n{end}")

    def stop(self) -> None:
        """Tells the worker to finish its shards and end; after STOP_SECONDS, kills it and its children."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _last_lines(self) -> list[str]:
        end = os.fstat(self._log.fileno()).st_size
        block = os.pread(self._log.fileno(), _BLOCK, max(0, end - _BLOCK))
        return block.decode(errors="replace").splitlines()[-_LOG_LINES:]


@contextmanager
def local_worker(model: str, devices: str, root: str) -> Iterator[tuple[Queue, LocalWorker]]:
    """Starts a broker and a worker for the time of the ``with`` block.

    Args:
        model: Artifact, by name or path.
        devices: Value of ``--devices``.
        root: The folder that the worker may read and write.

    Raises:
        UsageError: no server for the broker is installed.
        BrokerError: the broker does not start.
    """
    from nermill.producer.local.broker import embedded_broker

    with embedded_broker() as url:
        queue = Queue(url)
        worker = LocalWorker(model, devices, url, root)
        try:
            yield queue, worker
        finally:
            worker.stop()
