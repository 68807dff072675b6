"""What the README shows is run: its console blocks in order, in one folder, and its Python as it stands."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MAKES_ITS_OWN_ENVIRONMENT = {"make demo"}  # run from a fresh clone by hand; too long for every test run


def steps(page: Path) -> Iterator[str]:
    """Shell commands of a page in order; a block of Python is one of them."""
    text = page.read_text("utf-8")
    for language, block in re.findall(r"^```(console|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            yield f"python -c {shlex.quote(block)}"
            continue
        shown = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
        yield from (command for command in shown if command not in MAKES_ITS_OWN_ENVIRONMENT)


@pytest.mark.timeout(300)
def test_everything_that_the_readme_shows_runs(root: Path, tmp_path: Path, embedded_broker_url: str) -> None:
    (tmp_path / "model_build").symlink_to(root / "model_build")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NERMILL_BROKER_URL": embedded_broker_url,
    }
    background: list[subprocess.Popen[bytes]] = []
    commands = list(steps(root / "README.md"))
    assert len(commands) >= 10
    try:
        for command in commands:
            if command.endswith("&"):
                words = command.removesuffix("&").split()
                background.append(subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL))
                continue
            done = subprocess.run(
                command,
                shell=True,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    finally:
        for process in background:
            process.send_signal(signal.SIGTERM)
        for process in background:
            process.wait(40)


def test_the_readme_links_to_files_that_exist(root: Path) -> None:
    text = (root / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (root / target).exists(), target
