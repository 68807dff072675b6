"""The queue's protocol in a simulated world, at length; in short in tests/integration. See tests/exploration."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def explore(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "tests.exploration", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(3600)
def test_every_single_fault_and_random_walks(root: Path) -> None:
    told = explore(root, "--walks", "20000")
    assert "not whole" not in told


@pytest.mark.timeout(7200)
def test_every_two_faults_of_two_workers_two_shards_and_a_producer(root: Path) -> None:
    told = explore(root, "--scenario", "alone", "--faults", "2")
    assert "not whole" not in told


@pytest.mark.timeout(7200)
def test_every_seeded_fault_is_found(root: Path) -> None:
    told = explore(root, "--mutants", "--seconds", "240")
    found = re.search(r"(\d+) of (\d+) found", told)
    assert found
    assert found[1] == found[2]
