"""The short form of the rehearsal in tests/acceptance: kills, stops, a lost server, lost and repeated messages."""

from __future__ import annotations

import pytest

from tests.chaos import SHORT, disturbed, seconds_to_restart, undisturbed


@pytest.mark.slow
def test_a_run_comes_out_the_same_whatever_dies() -> None:
    outcome = disturbed(SHORT, seed=7)
    assert outcome.harmed_to_the_end
    assert outcome.redeliveries > 0
    assert (outcome.stolen, outcome.repeated) == (2, 2), "5 % of 32 messages each"
    assert outcome.table == undisturbed(SHORT.documents)


def test_a_restart_is_the_next_start_of_a_shard_that_a_killed_process_held() -> None:
    trace = """
        100.0 holds 1 3
        100.1 batch
        100.5 holds 1 4
        101.0 drops 1 3
        101.5 holds 2 5
        112.0 holds 2 4
        113.0 holds 3 4
    """
    assert seconds_to_restart(trace, {1: 102.0}) == [10.0]
    assert seconds_to_restart(trace, {2: 120.0}) == [], "the run ended without another start of what it held"
