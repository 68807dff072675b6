"""A user's own modules in the working directory are neither run nor hidden by nermill's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nermill.worker.contracts.manifest import resolve_artifact

MODULES = (
    "worker",
    "producer",
    "model_build",
    "nermill",
    "celery",
    "celeryconfig",
    "redis",
    "kombu",
    "pyarrow",
    "typer",
)
COMMANDS = {
    "run": ["nermill", "run", "{sample}", "--out", "out", "--devices", "cpu", "--json"],
    "plan": ["nermill", "plan", "{sample}", "--json"],
    "worker": ["nermill-worker", "--devices", "cpu", "--dry-run"],
    "build": ["nermill-build", "inspect", "{artifact}"],
}


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    """A folder of modules that note that they were imported; each has an ``app``, as a user's Celery module would."""
    for name in MODULES:
        note = f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})"
        (tmp_path / f"{name}.py").write_text(f"{note}\napp = None\n")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.slow
def test_modules_in_the_working_directory_change_nothing(command: str, occupied: Path, sample: Path) -> None:
    places = {"sample": sample / "wikigold.conll", "artifact": resolve_artifact("demo")}
    script, *arguments = (word.format(**places) for word in COMMANDS[command])
    done = subprocess.run(
        [str(Path(sys.executable).with_name(script)), *arguments],
        cwd=occupied,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (occupied / "imported").exists(), (occupied / "imported").read_text()
    if command == "run":
        assert json.loads(done.stdout)["documents"]["ok"] == 301
