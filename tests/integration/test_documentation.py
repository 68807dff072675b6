"""What the README shows is run: its console blocks in order, in one folder, and its Python as it stands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

MAKES_ITS_OWN_ENVIRONMENT = {"make demo"}  # run from a fresh clone by hand; too long for every test run


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (root / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(root: Path) -> list[str]:
    lines = [line for block in blocks(root, "console") for line in block.splitlines()]
    found = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [command for command in found if command not in MAKES_ITS_OWN_ENVIRONMENT]


@pytest.mark.timeout(300)
def test_every_command_of_the_readme_runs(root: Path, tmp_path: Path, embedded_broker_url: str) -> None:
    (tmp_path / "model_build").symlink_to(root / "model_build")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NERMILL_BROKER_URL": embedded_broker_url,
    }
    background: list[subprocess.Popen[bytes]] = []
    shown = commands(root)
    assert len(shown) >= 6
    try:
        for command in shown:
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


def test_the_python_of_the_readme_runs(root: Path) -> None:
    for block in blocks(root, "python"):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "Ada Lovelace" in done.stdout


def test_the_readme_links_to_files_that_exist(root: Path) -> None:
    text = (root / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (root / target).exists(), target
