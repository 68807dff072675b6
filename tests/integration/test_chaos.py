"""The short form of the rehearsal in tests/acceptance: kills, stops, a lost server, lost and repeated messages."""

from __future__ import annotations

import pytest

from tests.chaos import SHORT, disturbed, undisturbed


@pytest.mark.slow
def test_a_run_comes_out_the_same_whatever_dies() -> None:
    outcome = disturbed(SHORT, seed=7)
    assert outcome.harmed_to_the_end
    assert outcome.redeliveries > 0
    assert (outcome.stolen, outcome.repeated) == (2, 2), "5 % of 32 messages each"
    assert outcome.table == undisturbed(SHORT.documents)
