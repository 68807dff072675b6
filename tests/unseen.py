"""Producers that reach the broker and see nothing of the workers' output."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from nermill.worker.contracts.layout import RunFolder
from tests.harness import Harness, child

NOBODY = 65534
MEETS_ROOT = os.getuid() == 0
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def without_the_rights_of_root() -> None:
    """In a child before it runs a program: files of others are closed to it as to any user."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError("capabilities cannot be dropped")


def nermill(
    fleet: Harness, *arguments: str, stdin: IO[str] | int | None = None
) -> AbstractContextManager[subprocess.Popen[str]]:
    """A command of the producer that sees nothing of the workers' output."""
    return child(
        [sys.executable, "-m", "nermill.producer.cli", *arguments],
        {"NERMILL_BROKER_URL": fleet.server.url},
        preexec_fn=without_the_rights_of_root if MEETS_ROOT else None,
        stdin=stdin,
        stderr=subprocess.PIPE,
    )


def told(fleet: Harness, *arguments: str, stdin: IO[str] | None = None, timeout: float = 240) -> tuple[int, str, str]:
    """Exit code and outputs of such a command."""
    with nermill(fleet, *arguments, stdin=stdin) as process:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err


def closed_place(fleet: Harness) -> tuple[str, Path, dict[str, str]]:
    """Where runs go that the producer cannot see: as it names it, as a folder, and the worker's environment."""
    folder = fleet.folder / "closed"
    folder.mkdir(mode=0o700)
    if MEETS_ROOT:
        os.chown(folder, NOBODY, NOBODY)
        return str(folder), folder, {"NERMILL_ALLOWED_ROOTS": str(folder)}
    # a scheme that the worker alone knows
    return (
        "faulty://bucket",
        folder / "bucket",
        {"FAULT_STORE": str(folder), "NERMILL_ALLOWED_ROOTS": "faulty://bucket"},
    )


def run_below(folder: Path) -> RunFolder:
    """The one run in a folder."""
    (run,) = folder.glob("run=*")
    return RunFolder(str(run))


def documents_in_redis(fleet: Harness) -> list[str]:
    """Keys of documents by value."""
    with fleet.server.client() as client:
        return [key for key in client.keys("*") if key.endswith("documents")]
