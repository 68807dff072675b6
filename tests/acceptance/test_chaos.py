"""At length: 20,000 documents, two workers, 41 blows, three seeds; the table is that of an undisturbed run."""

from __future__ import annotations

from statistics import median

import pytest

from tests.chaos import LONG, disturbed, one_of_two, undisturbed


@pytest.fixture(scope="module")
def expected() -> list[dict[str, object]]:
    return undisturbed(LONG.documents)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_comes_out_the_same_whatever_dies(expected: list[dict[str, object]], seed: int) -> None:
    outcome = disturbed(LONG, seed)
    print(
        f"seed {seed}: {len(outcome.table)} documents, {outcome.redeliveries} redeliveries, "
        f"{outcome.duplicates} duplicates dropped, "
        f"{outcome.stolen} messages taken away and {outcome.repeated} sent twice, "
        f"{outcome.seconds:.0f} s; lease {LONG.lease_seconds:.0f} s, from a SIGKILL to the next start of a shard that "
        f"the process held: median {median(outcome.restarts):.1f} s, worst {max(outcome.restarts):.1f} s "
        f"of {len(outcome.restarts)}"
    )
    assert outcome.harmed_to_the_end, "the run was over before the adversary was"
    assert (outcome.stolen, outcome.repeated) == (16, 16), "5 % of 313 messages each"
    assert outcome.table == expected


@pytest.mark.timeout(1200)
def test_what_a_killed_worker_held_is_begun_again_by_the_other() -> None:
    lease = 10.0
    restarts = one_of_two(kills=8, lease_seconds=lease)
    print(
        f"lease {lease:.0f} s, from a SIGKILL of one of two workers to the next start of a shard that it held: "
        f"median {median(restarts):.1f} s, worst {max(restarts):.1f} s of {len(restarts)}"
    )
    assert restarts
