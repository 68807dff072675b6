"""Each test that kills or damages something has a server and workers of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Harness, harness


@pytest.fixture
def fleet() -> Iterator[Harness]:
    """A server and room for workers, in a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder)) as made:
        yield made
