"""The search for documents that end their worker finds them all, and no other document."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nermill.worker.contracts.records import MAX_ATTEMPTS
from nermill.worker.queue.poison import trials


def search(first: int, count: int, poison: set[int]) -> tuple[set[int], int]:
    """Runs the search with real crashes until it ends; returns the rejected rows and the number of executions."""
    strikes: dict[str, int] = {}
    for execution in range(1, 1000):
        rejected = set()
        for trial in trials(first, count, strikes):
            if trial.is_poison:
                rejected.add(trial.start)
            elif poison & set(range(trial.start, trial.end)):
                strikes[trial.name] = strikes.get(trial.name, 0) + 1
                break
        else:
            return rejected, execution
    raise AssertionError("the search does not end")


@given(st.integers(0, 10_000), st.integers(1, 300), st.data())
def test_exactly_the_poison_is_rejected(first: int, count: int, data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, count - 1), max_size=6))
    rejected, _ = search(first, count, poison)
    assert rejected == poison


NAMES = st.integers(0, 200).map(lambda n: f"{n}-{n}")


@given(st.integers(0, 100), st.integers(1, 100), st.dictionaries(NAMES, st.integers(0, 3)))
def test_every_row_is_tried_once_in_order(first: int, count: int, strikes: dict[str, int]) -> None:
    rows = [row for trial in trials(first, count, strikes) for row in range(trial.start, trial.end)]
    assert rows == list(range(count))


def test_two_of_256_are_found_in_few_executions() -> None:
    rejected, executions = search(0, 256, {40, 200})
    assert rejected == {40, 200}
    assert MAX_ATTEMPTS + executions <= 12


def test_one_crash_alone_rejects_no_document() -> None:
    assert not any(trial.is_poison for trial in trials(0, 8, {f"{n}-{n}": 1 for n in range(8)}))
