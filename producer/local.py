"""The mill on one machine: an embedded broker and one supervised worker, for as long as a run lasts."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from nermill.producer.queue import Queue
from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.errors import EngineError, UsageError

STOP_SECONDS = 35.0
EARLY_DEATHS = 2  # a worker process that dies this often before it was ever ready will not get well
_LOG_LINES = 12
_BLOCK = 1 << 20
_OWN_WORDS = "nermill-worker: "  # before what a worker says of its own end; libraries log around it
_READY, _DIED = "ready:", "starting it again"  # what worker.app and worker.supervisor log
_DEVICES = re.compile(r"auto|(cpu|cuda:\d+|npu:\d+)(,(cpu|cuda:\d+|npu:\d+))*")
_PR_SET_PDEATHSIG = 1


class LocalWorker:
    """``nermill-worker`` as a child: it ends with us, and its log is kept for the case that it fails.

    Args:
        model: Artifact, by name or path.
        devices: As in ``--devices``.
        broker: Broker URL.
        root: The folder that it may read and write.
    """

    def __init__(self, model: str, devices: str, broker: str, root: str) -> None:
        self._seen = self._deaths = 0
        self._was_ready = False
        self._tail: deque[str] = deque(maxlen=_LOG_LINES)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop
        self._process = subprocess.Popen(
            python_command("nermill.worker.launch", "--model", model, "--devices", devices, "--broker", broker),
            env={**os.environ, "NERMILL_ALLOWED_ROOTS": root, "NERMILL_LOG_FORMAT": "text"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for us, who then stop it in order
            preexec_fn=_die_with_parent,
        )

    def check(self) -> None:
        """Looks whether it is alive.

        Raises:
            UsageError: it refuses its settings.
            EngineError: it ended, or its processes die before they are ready; with its last word or, where it had none,
            the last lines of its log.
        """
        status = self._process.poll()
        for line in self._new_lines():
            self._tail.append(line)
            self._was_ready |= _READY in line
            self._deaths += _DIED in line
        if status is None and (self._was_ready or self._deaths < EARLY_DEATHS):
            return
        if status == UsageError.exit_code and self._tail:
            raise UsageError(self._tail[-1].removeprefix(_OWN_WORDS))
        if own := [line for line in self._tail if line.startswith(_OWN_WORDS)]:
            raise EngineError(f"the worker failed: {own[-1].removeprefix(_OWN_WORDS)}")
        told = "\n".join(f"  | {line}" for line in self._tail)
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

    def _new_lines(self) -> list[str]:
        block = os.pread(self._log.fileno(), _BLOCK, self._seen)
        whole = block.rfind(b"\n") + 1
        self._seen += whole
        return block[:whole].decode(errors="replace").splitlines()


def check_devices(devices: str) -> None:
    """Looks at ``--devices`` before anything is written.

    Raises:
        UsageError: it names no devices.
    """
    if not _DEVICES.fullmatch(devices.replace(" ", "")):
        raise UsageError(f"--devices {devices!r}: say auto, or a list such as cpu, cuda:0,cuda:1 or npu:0")


@contextmanager
def local_mill(model: str, devices: str, root: str) -> Iterator[tuple[Queue, LocalWorker]]:
    """Starts broker and worker for the time of the ``with`` block.

    Raises:
        UsageError: no broker can be embedded here.
        BrokerError: the embedded broker does not come up.
    """
    from nermill.producer.broker import embedded_broker

    with embedded_broker() as url:
        queue = Queue(url)
        worker = LocalWorker(model, devices, url, root)
        try:
            yield queue, worker
        finally:
            worker.stop()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
