"""How many cores a process may use, in a container with a limit and without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nermill.worker.contracts import processor


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("1000 100000\n", 1),
        ("3200000 100000\n", 8),
        (None, 8),
    ],
)
def test_a_limit_of_the_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(processor, "_QUOTA", tmp_path / "cpu.max")
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit, "utf-8")
    assert processor.usable_cores() == cores
