"""At length: 10,000 mutated messages in one session, 3,000 mutated ledger entries, 20,000 mutated input files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fuzz
from tests.harness import Harness, harness
from tests.integration.test_fuzz import fuzz_ledger, fuzz_messages


@pytest.fixture
def fleet() -> Iterator[Harness]:
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, harness(Path(folder)) as made:
        yield made


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3])
def test_ten_thousand_mutated_messages(fleet: Harness, seed: int) -> None:
    fuzz_messages(fleet, seed, count=10_000)


def test_mutated_ledger_entries(fleet: Harness) -> None:
    fuzz_ledger(fleet, seed=2, count=3000)


@pytest.mark.parametrize("seed", range(2, 10))
def test_mutated_input_files(tmp_path: Path, seed: int) -> None:
    read, refused = fuzz.fuzz_sources(tmp_path, seed, count=2500)
    assert min(read, refused) > 250
