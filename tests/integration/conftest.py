"""A mill of its own for every test that does harm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Harness, harness


@pytest.fixture
def mill() -> Iterator[Harness]:
    """A server and room for workers, in a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder)) as made:
        yield made
