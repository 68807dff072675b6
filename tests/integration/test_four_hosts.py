"""The short form of the rehearsal in tests/acceptance: four hosts, 5 ms on every wire, two of them cut off at times."""

from __future__ import annotations

import pytest

from tests.chaos import undisturbed
from tests.hosts import what_forbids
from tests.rack import SHORT, over_four_hosts


@pytest.mark.slow
def test_a_run_over_four_hosts_comes_out_the_same_whoever_is_cut_off() -> None:
    if reason := what_forbids():
        pytest.skip(reason)
    outcome = over_four_hosts(SHORT)
    assert outcome.harmed_to_the_end
    assert outcome.redeliveries > 0
    assert outcome.told_after < 10
    assert outcome.table == undisturbed(SHORT.documents)
