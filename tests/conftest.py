"""Fixtures for all tests: the project's folders, and an environment without the developer's settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "model_build" / "demo" / "sample"

# Set before a library that reads them is imported: test machines may have two cores, and no network is used.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No test fails because its machine is slow.
settings.register_profile("nermill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nermill")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NERMILL_") and name != "NERMILL_REDIS_BIN"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def sample() -> Path:
    """The bundled sample's folder."""
    return SAMPLE


@pytest.fixture(scope="session")
def embedded_broker_url() -> Iterator[str]:
    """One embedded server for the whole session; each test that shares it uses keys and queues of its own."""
    from nermill.producer.local.broker import embedded_broker

    with embedded_broker() as url:
        yield url
