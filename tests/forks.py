"""Python programs as forks of one process that has imported the libraries already.

Most of the time until a worker is ready goes into the import of Celery, NumPy, pyarrow and others. A fork has them. It
imports nermill itself, and reads settings, as a new process does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# pandas: pyarrow loads it where it is installed.
LIBRARIES = (
    "celery.apps.worker", "celery.backends.redis", "celery.bin.celery", "celery.concurrency.thread",
    "celery.fixups.django", "celery.worker.consumer", "celery.worker.loops", "celery.worker.pidbox", "fsspec",
    "kombu.transport.redis", "numpy", "pandas", "prometheus_client", "pyarrow.compute", "pyarrow.parquet", "redis",
    "tokenizers",
)  # fmt: skip

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(LIBRARIES))


class Fork:
    """A process that runs a module as ``python -m`` does; of ``subprocess.Popen``'s interface it has what tests use.

    Args:
        module: The module's name.
        arguments: Its command line.
        environment: All of its environment variables.
        folder: Its working directory.
        log: File to which its outputs are appended.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
    ) -> None:
        log.touch()
        self._process = _server.Process(
            target=_run, args=(module, list(arguments), dict(environment), str(folder), str(log)), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self._process.name), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
