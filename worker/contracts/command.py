"""How a process of nermill starts another process of nermill."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)

# `python -m` and `python -c` put the working directory first on the import path; Python 3.10 has no flag against it.
_RUN = (
    "import sys; sys.path[:] = list(filter(None, sys.path));"
    "import runpy; runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
)


def python_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module in a new interpreter; the working directory is not on its import path."""
    return [sys.executable, "-c", _RUN.format(module), *arguments]


def end_with_parent() -> None:
    """Makes the kernel send SIGTERM to this process when its parent ends; for ``preexec_fn`` of a child (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
