"""The short form of the rehearsal in tests/acceptance: the primary that sentinels watch is killed in a run."""

from __future__ import annotations

import pytest

from tests.chaos import undisturbed
from tests.sentinels import SHORT, with_failover


@pytest.mark.slow
def test_a_run_outlives_the_primary() -> None:
    outcome = with_failover(SHORT)
    assert outcome.killed_in_the_middle
    assert outcome.table == undisturbed(SHORT.documents)
    assert outcome.pause < SHORT.down_after + 10
