"""How a process of nermill starts another process of nermill."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1  # prctl(2)

# `python -m` and `python -c` put the working directory first on the import path; Python 3.10 has no flag against it.
_RUN = (
    "import sys; sys.path[:] = list(filter(None, sys.path));"
    "import runpy; runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
)


def python_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module in a new interpreter; the working directory is not on its import path."""
    return [sys.executable, "-c", _RUN.format(module), *arguments]


def end_with(parent: int) -> None:
    """Has this process get SIGTERM when the process that started it ends, however it ends (Linux).

    It is for children of a process with threads, where nothing but the program may run between fork and exec.

    Args:
        parent: Its pid; this process ends at once where that has ended already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def start_child(command: Sequence[str], *, cores: Collection[int] = (), **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process that gets SIGTERM when this process ends, however it ends (Linux).

    Args:
        command: Its command line.
        cores: CPU cores that it may use; all of this process's where none are named.
        options: Those of ``subprocess.Popen``.
    """

    def prepare() -> None:  # runs in the child before the program
        if cores:
            os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(command, preexec_fn=prepare, **options)
