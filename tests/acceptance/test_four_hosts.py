"""At length: 20,000 documents over four hosts, 5 ms on every wire; what being cut off and what distance costs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from tests.chaos import undisturbed
from tests.hosts import what_forbids
from tests.rack import LONG, SWIFT, over_four_hosts

FORBIDDEN = what_forbids()
pytestmark = pytest.mark.skipif(FORBIDDEN is not None, reason=FORBIDDEN or "")


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return undisturbed(LONG.documents)


@pytest.mark.timeout(600)
def test_a_run_over_four_hosts_comes_out_the_same_whoever_is_cut_off(expected: list[dict[str, Any]]) -> None:
    outcome = over_four_hosts(LONG)
    print(
        f"{len(outcome.table):,} documents in {outcome.report['seconds']:.0f} s, {outcome.redeliveries} redeliveries, "
        f"{outcome.pause:.1f} s until the next part once the broker was back"
    )
    assert outcome.harmed_to_the_end
    assert outcome.redeliveries > 0
    assert outcome.told_after < 10
    assert outcome.table == expected


@pytest.mark.timeout(900)
def test_distance_costs_less_than_a_twentieth(expected: list[dict[str, Any]]) -> None:
    """Near and far run side by side, so that whatever else the machine does slows both."""

    def speed(latency: float) -> float:
        outcome = over_four_hosts(replace(SWIFT, latency=latency))
        assert outcome.table == expected
        return float(outcome.report["documents_per_second"])

    with ThreadPoolExecutor(2) as pool:
        pairs = [tuple(pool.map(speed, (0.0, SWIFT.latency))) for _ in range(5)]
    for near, far in pairs:
        print(f"{near:,.0f} documents/s without latency, {far:,.0f} with {SWIFT.latency * 1000:.0f} ms on every wire")
    assert median(far / near for near, far in pairs) > 0.95
