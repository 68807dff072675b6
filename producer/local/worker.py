"""The mill on one machine: an embedded broker and one supervised worker, for as long as a run lasts."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from nermill.producer.runs.queue import Queue
from nermill.worker.contracts.command import end_with_parent, python_command
from nermill.worker.contracts.errors import EngineError, UsageError

STOP_SECONDS = 35.0
START_ATTEMPTS = 2  # a worker process that ends this often before it is ready will not start at all
_LOG_LINES = 12
_BLOCK = 1 << 16
_OWN_WORDS = "nermill-worker: "  # before what a worker says of its own end; libraries log around it


class LocalWorker:
    """``nermill-worker`` as a child: it ends with us, and its log is kept for the case that it fails.

    Args:
        model: Artifact, by name or path.
        devices: As in ``--devices``.
        broker: Broker URL.
        root: The folder that it may read and write.
    """

    def __init__(self, model: str, devices: str, broker: str, root: str) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop
        self._process = subprocess.Popen(
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
            start_new_session=True,  # Ctrl-C is for us, who then stop it in order
            preexec_fn=end_with_parent,
        )

    def check(self) -> None:
        """Looks whether it is alive.

        Raises:
            UsageError: it refuses its settings.
            EngineError: it ended, or its processes die before they are ready; with its last word or, where it had none,
            the last lines of its log.
        """
        status = self._process.poll()
        if status is None:
            return
        lines = self._last_lines()
        if status == UsageError.exit_code and lines:
            raise UsageError(lines[-1].removeprefix(_OWN_WORDS))
        if own := [line for line in lines if line.startswith(_OWN_WORDS)]:
            raise EngineError(f"the worker failed: {own[-1].removeprefix(_OWN_WORDS)}")
        told = "\n".join(f"  | {line}" for line in lines)
        raise EngineError(f"the worker failed; the end of its log:\n{told}")

    def stop(self) -> None:
        """Lets it finish what it holds, then ends it and all it started."""
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
    """Starts broker and worker for the time of the ``with`` block.

    Raises:
        UsageError: no broker can be embedded here.
        BrokerError: the embedded broker does not come up.
    """
    from nermill.producer.local.broker import embedded_broker

    with embedded_broker() as url:
        queue = Queue(url)
        worker = LocalWorker(model, devices, url, root)
        try:
            yield queue, worker
        finally:
            worker.stop()
