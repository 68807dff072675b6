"""At length: 20,000 documents, two workers, sentinels as patient as those in deploy; the primary is killed."""

from __future__ import annotations

import pytest

from tests.chaos import undisturbed
from tests.sentinels import LONG, with_failover


@pytest.mark.timeout(600)
def test_a_run_outlives_the_primary() -> None:
    outcome = with_failover(LONG)
    print(f"{outcome.report['documents']['total']:,} documents, a pause of {outcome.pause:.1f} s")
    assert outcome.killed_in_the_middle
    assert outcome.table == undisturbed(LONG.documents)
    assert outcome.pause < LONG.down_after + 10
